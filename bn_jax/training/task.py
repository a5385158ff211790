"""What a config makes of a data set: the task and the network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax import data as data_lib
from bn_jax import linen, models, transforms
from bn_jax.fields import ConfigError, counted
from bn_jax.training import inputs as inputs_lib
from bn_jax.training.augment import AUGMENTATIONS
from bn_jax.training.config import OWN_MODEL, OWN_VARIABLES, TrainConfig
from bn_jax.training.state import Network
from bn_jax.variables import collection, replaced


def select(config: TrainConfig, data: data_lib.ImageData) -> data_lib.ImageData:
    """Return the part of a data set that a config trains and validates on.

    Raises:
      TypeError: if data are none.
      DataError: if there are too few examples, or images are not bytes.
      ConfigError: if a batch is larger than the training set, or an option does not fit
        the images.
    """
    if not isinstance(data, data_lib.ImageData):
        raise TypeError(
            f"data are a {type(data).__name__}; expected an ImageData, as "
            'bn_jax.data.load("sample") returns it; of arrays of your own make '
            "ImageData(train=Split(images, labels), test=Split(images, labels))"
        )
    for images in (data.train.images, data.test.images):
        if images.dtype != np.uint8:
            raise data_lib.DataError(
                f"images have dtype {images.dtype}; expected bytes, uint8, as training "
                "scales them itself: give them as they were before any scaling"
            )
    data = data.with_validation(config.validation)
    data = data.with_train_examples(config.train_examples)
    num_examples = len(data.train.labels)
    if config.batch_size > num_examples:
        raise ConfigError(
            f"batch_size={config.batch_size} is larger than the training set of "
            f"{counted(num_examples, 'image')}; give at most {num_examples}"
        )
    AUGMENTATIONS.make(config.augment).check(data.image_shape)
    return data


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network has to fit: all that it depends on besides the config.

    Attributes:
      num_classes: number of outputs.
      image_shape: `[H, W, C]` of the data set.
      statistics: of the training images, where inputs are standardised by them.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    statistics: inputs_lib.ChannelStatistics | None = None

    @classmethod
    def of(cls, config: TrainConfig, data: data_lib.ImageData) -> Task:
        """Return the task that a config sets on a data set."""
        statistics = None
        if config.inputs == "standardised":
            mean, deviation = data_lib.channel_statistics(data.train)
            statistics = inputs_lib.ChannelStatistics(
                tuple(map(float, mean / 255)), tuple(map(float, deviation / 255))
            )
        return cls(data.num_classes, data.image_shape, statistics)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        found: dict[str, Any] = {
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }
        if self.statistics is not None:
            found["channels"] = self.statistics._asdict()
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Return the task of a dict that `to_dict` returned."""
        statistics = None
        if "channels" in values:
            channels = values["channels"]
            statistics = inputs_lib.ChannelStatistics(
                tuple(channels["mean"]), tuple(channels["deviation"])
            )
        return cls(values["num_classes"], tuple(values["image_shape"]), statistics)


def make_network(
    config: TrainConfig,
    task: Task,
    *,
    model: Any = None,
    norm_attributes: Mapping[str, Any] | None = None,
    binds_axes: bool = True,
) -> Network:
    """Return the network that `config` names.

    Args:
      config: names it.
      task: what it has to fit.
      model: the user's own, instead of the one that `config` names.
      norm_attributes: attributes of the norms besides their options, such as the axis
        that shares statistics.
      binds_axes: whether axes that norms of the user's own model name are bound to this
        one instance; False where the program is mapped over them.

    Raises:
      ConfigError: if the model is missing, or its norm does not take the attributes.
    """
    scale = inputs_lib.make(config.inputs, task.statistics)
    augment = AUGMENTATIONS.make(config.augment)
    height, width, channels = task.image_shape
    shape = (augment.side(height), augment.side(width), channels)
    products = "highest" if config.precision == "highest" else None
    of_task = (shape, task.num_classes, scale, augment.centre, products)
    if model is not None:
        model = models.as_model(model)
        return Network(
            model, *of_task, binds_axes=binds_axes, data_shape=task.image_shape
        )
    if config.model.startswith(OWN_MODEL):
        raise ConfigError(
            f"the run is of a model that was passed in, of the class "
            f"{config.model.removeprefix(OWN_MODEL)}; pass one like it as model=..."
        )
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
    is_frozen = config.norm_statistics == "moving"
    if is_frozen and not transforms.keeps_statistics(config.norm):
        raise ConfigError(
            f"norm_statistics='moving' with norm={config.norm!r}, which keeps no "
            "moving statistics; leave it out"
        )
    attributes = dict(norm_attributes or {})
    if dtype is not None:
        attributes["dtype"] = dtype
    try:
        norm = linen.norm(config.norm, options=config.traced("norm"), **attributes)
        if norm is not None and is_frozen:
            norm = functools.partial(_frozen, norm)
        made = models.MODELS.make(
            config.model,
            norm=norm,
            num_classes=task.num_classes,
            dtype=dtype,
            **config.traced("model"),
        )
    except ValueError as error:
        raise ConfigError(f"{error}") from error
    if config.inputs == "norm":
        # Batch norm whatever the norm inside, which may be none.
        of_inputs = linen.norm("batch_norm", **attributes)
        assert of_inputs is not None
        made = inputs_lib.NormalisedInput(made, of_inputs)
    return Network(made, *of_task, data_shape=task.image_shape)


def started(config: TrainConfig, drawn: Any, start: Any) -> Any:
    """Return the variables that a run starts from.

    Args:
      config: of the run.
      drawn: the network's initial variables.
      start: those of the run in `config.init_from`, or that were passed in; None where
        there are none.

    Raises:
      ConfigError: if they are missing, or are of another network.
    """
    if not config.init_from:
        return drawn
    if start is None:
        raise ConfigError(
            f"init_from={config.init_from!r} names a folder, which is not read here; "
            "give start=variables"
        )
    passed_in = config.init_from.startswith(OWN_VARIABLES)
    own, given = (
        {
            (kind, path): value
            for kind in ("params", "batch_stats")
            for path, value in collection(tree, kind).items()
        }
        for tree in (drawn, start)
    )
    faults = {
        "/".join((key[0], *key[1])): fault
        for key in sorted(own.keys() | given.keys())
        if (fault := _misfit(own.get(key), given.get(key)))
    }
    if faults and passed_in:
        listed = [f"{name} {fault}" for name, fault in faults.items()]
        raise ConfigError(
            f"the variables that were passed in are not the model's: "
            f"{'; '.join(listed[:5])}{' and others' * (len(listed) > 5)}. Give those "
            "that its init returns, or a conversion, with other numbers"
        )
    if faults:
        differ = list(faults)
        raise ConfigError(
            f"init_from={config.init_from!r} is a run of another network: "
            f"{', '.join(differ[:3])}{' and others' * (len(differ) > 3)} differ; give "
            "the same model, norm and number of classes"
        )
    if passed_in:  # in whatever precision
        cast = {key: np.asarray(given[key], own[key].dtype) for key in own}
        start = replaced(drawn, cast)
    statistics = start if config.init_statistics == "kept" else drawn
    return {"params": start["params"], "batch_stats": statistics["batch_stats"]}


def _misfit(own: Any, given: Any) -> str | None:
    """Describe how an array does not fit the one in its place, or return None."""
    if own is None:
        return "is unknown"
    if given is None:
        return "is missing"
    if given.shape != own.shape:
        return f"has shape {list(given.shape)}, not {list(own.shape)}"
    if _kind(given.dtype) > _kind(own.dtype):
        return f"has dtype {given.dtype}, not {own.dtype}"
    return None


def _kind(dtype: Any) -> int:
    """Return 0 for integers and booleans, 1 for real and 2 for complex numbers."""
    kinds = (jnp.inexact, jnp.complexfloating)
    return sum(bool(jnp.issubdtype(dtype, kind)) for kind in kinds)


def _frozen(norm: Callable[..., Any], **attributes: Any) -> Any:
    """Make a layer that normalises by its moving statistics in training, too."""
    return norm(**{**attributes, "use_running_average": True})
