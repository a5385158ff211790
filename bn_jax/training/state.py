"""`TrainState`, all that a training step changes, and `Network`, what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from bn_jax import models
from bn_jax.training import memory
from bn_jax.training.augment import Unchanged
from bn_jax.training.inputs import to_unit


class TrainState(struct.PyTreeNode):
    """What a step reads and returns."""

    step: Array  # number of steps taken; shape [], int32
    params: Any  # as `model.init` makes them
    batch_stats: Any  # the moving statistics; {} in a model without any
    opt_state: optax.OptState
    # Exponential average of params, like them; {} where none is kept.
    average: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with what comes before it.

    Attributes:
      model: called as `model.apply(variables, images, train=..., ...)`.
      image_shape: `[H, W, C]` of the images that the model sees.
      num_classes: number of outputs that it should have; None for any.
      scale: turns images of bytes into the numbers that the model takes.
      centre: cuts images of the data set to `image_shape` where nothing is random.
      products: precision of its matrix products and convolutions, forward and backward,
        as `jax.default_matmul_precision` takes it; None for the backend's default.
      binds_axes: whether mapped axes that the model's norms name are bound in training
        mode, with this one instance along each: as on one device.
      data_shape: `[H, W, C]` of the images of the data set, which `centre` takes; None
        for `image_shape`.
    """

    model: Any
    image_shape: tuple[int, ...]
    num_classes: int | None = None
    scale: Callable[[Array], Array] = to_unit
    centre: Callable[[Array], Array] = Unchanged().centre
    products: str | None = None
    binds_axes: bool = False
    takes_bytes: ClassVar[bool] = True  # read by `bn_jax.measures.layer_calls`
    data_shape: tuple[int, ...] | None = None

    def check_fits(self, num_images: int = 2) -> None:
        """Refuse a model that does not fit the images, the classes or the memory.

        Args:
          num_images: of a batch on one device.

        Raises:
          ConfigError: in one line, as `bn_jax.models.check_fits` says.
        """
        models.check_fits(
            self.model,
            self.image_shape,
            num_classes=self.num_classes,
            num_images=num_images,
            # Twice, as the compiler may need no array of what is summed at once.
            max_bytes=2 * memory.total(),
        )

    def init(self, key: Array) -> dict[str, Any]:
        """Return the model's initial variables."""
        return models.make_init(self.model, self.image_shape)(key)

    def predict(self, variables: Any, images: Array) -> Array:
        """Return the logits of images given as bytes, in prediction mode."""
        with self.tracing():
            images = self.scale(self.centre(images))
            logits: Array = self.model.apply(variables, images, train=False)
            return logits

    def predict_by_batch(self, variables: Any, images: Array) -> Array:
        """Return the logits that norms give by the statistics of these images.

        Nothing is dropped, and the moving averages in `variables` are not used.
        """
        with self.tracing():
            call = functools.partial(models.logits_by_batch, self.model, variables)
            logits: Array = self.bound(call)(self.scale(self.centre(images)))
            return logits

    def bound(self, call: Callable[[Array], Any]) -> Callable[[Array], Any]:
        """Return a call of the model in training mode with its norms' axes bound.

        If `binds_axes` is False it is returned as it is.

        Args:
          call: function of scaled images.
        """
        if not self.binds_axes:
            return call
        names = set()
        for name in models.axis_names(self.model, self.image_shape).values():
            names |= set(name) if isinstance(name, tuple) else {name}
        for name in sorted(names - {None}, key=str):
            call = _along(name, call)
        return call

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the model is traced: it sets `products`."""
        if self.products is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.products)


def _along(axis_name: Any, call: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Return a function that is called with a mapped axis of size 1 bound."""

    def called(images: Array) -> Any:
        outputs = jax.vmap(call, axis_name=axis_name)(images[None])
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return called


def init_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    averages: bool = False,
) -> TrainState:
    """Return the state before the first step, from a model's initial variables.

    Args:
      variables: as `Network.init` returns them.
      optimizer: of the parameters.
      averages: whether an average of the parameters is kept.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        average=jax.tree.map(np.asarray, params) if averages else {},
    )
