"""What a run is, and how it is carried out: dataclasses, and flags by `fields`.

`TrainConfig` is every choice that decides a run's numbers; `RunOptions` is on which
devices and in which parts they are computed. Where the data lie and where results go is
in neither: the same config gives the same numbers from any folder.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from bn_jax.fields import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ConfigError,
    Range,
    check,
    option,
)

# JAX's keys keep 32 bits of a seed: greater ones would repeat these.
_SEED = Range("a number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
# What the models know by name, without importing them here.
NORMS = (
    "batch_norm",
    "flax",
    "none",
    "renorm",
    "layer",
    "group",
    "instance",
    "whitening",
    "quantile",
)
_NORM = Range(
    f"one of {', '.join(NORMS)}, with attributes if need be, such as "
    "whitening:method=zca,max_group_size=16",
    lambda v: (
        re.fullmatch(rf"({'|'.join(NORMS)})(:\w+=[^,=]+(,\w+=[^,=]+)*)?", v) is not None
    ),
)
_NORM_LAYERS = Range(
    "four digits 0 or 1, such as 0011",
    lambda v: re.fullmatch("[01]{4}", v) is not None,
)
_BATCH_STATS = Range(
    "synced, per_device or groups:K with K devices a group, such as groups:2",
    lambda v: re.fullmatch(r"synced|per_device|groups:[1-9]\d*", v) is not None,
)
_DEVICES = Range(
    "all, or a number of devices",
    lambda v: re.fullmatch(r"all|[1-9]\d*", v) is not None,
)
_EVERY = Range(
    "a number of epochs or steps, such as 1epoch, 2epochs or 500steps, or never",
    lambda v: re.fullmatch(r"never|[1-9]\d*(epoch|step)s?", v) is not None,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, complete and hashable; refuses values out of range.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    dataset: str = option(
        "auto",
        "Images to train on. 'auto' takes the full Fashion-MNIST where it is at hand "
        "and the embedded sample of it (6,000 + 1,000 images) otherwise.",
        choices=("auto", "fashion_mnist", "mnist", "kmnist", "sample"),
    )
    train_examples: int = option(
        0, "Train on the first N images; 0 for all.", valid=NOT_NEGATIVE
    )
    activation: str = option(
        "sigmoid", "After each of the four layers.", choices=("sigmoid", "relu")
    )
    norm: str = option(
        "batch_norm",
        f"<{'|'.join(NORMS)}>, with attributes as in group:num_groups=2 if need be: "
        "what normalises before each activation; flax is Flax's own batch norm.",
        valid=_NORM,
    )
    norm_layers: str = option(
        "1111",
        "Which of the four layers have the norm, in order: two convolutions, then two "
        "dense layers; 0011 has it after the dense layers alone.",
        valid=_NORM_LAYERS,
    )
    train_gamma: bool = option(True, "Whether the norms' gamma learns; else it is 1.")
    train_beta: bool = option(True, "Whether the norms' beta learns; else it is 0.")
    trained: str = option(
        "all",
        "What learns, the rest staying as initialised: all; the norms' gamma and beta "
        "alone; these and the last layer; or as many other parameters, chosen at "
        "random.",
        choices=("all", "norm", "norm_and_last", "random"),
    )
    dropout_rate: float = option(
        0.0, "Share of values that training sets to 0.", valid=BELOW_1
    )
    dropout_at: str = option(
        "dense",
        "Where: after both hidden dense layers, the first of which a norm follows; or "
        "after the last of them alone.",
        choices=("dense", "last"),
    )
    bias_before_norm: bool = option(
        True, "Whether layers before a norm have a bias; batch norm cancels it."
    )
    first_padding: int = option(
        0,
        "Pixels of 0 around the images: 0 in the chapter on batch normalisation, 2 in "
        "the one that introduces LeNet without it.",
        valid=NOT_NEGATIVE,
    )
    epochs: int = option(10, "Passes over the training images.", valid=AT_LEAST_1)
    batch_size: int = option(
        256,
        "Images a step; those left over at an epoch's end are dropped.",
        valid=AT_LEAST_1,
    )
    learning_rate: float = option(1.0, "(Initial) learning rate.", valid=POSITIVE)
    optimizer: str = option(
        "sgd",
        "Plain SGD, SGD with momentum, or Adam.",
        choices=("sgd", "momentum", "adam"),
    )
    optimizer_momentum: float = option(
        0.9,
        "Momentum of --optimizer=momentum (not of the statistics).",
        valid=SHARE,
    )
    schedule: str = option(
        "constant",
        "Learning rate over the run: constant, or a cosine from the initial one to 0.",
        choices=("constant", "cosine"),
    )
    momentum: float = option(
        0.9,
        "Weight of the OLD average in the moving statistics of batch norm.",
        valid=SHARE,
    )
    epsilon: float = option(
        1e-5, "Added to the variance in batch norm.", valid=POSITIVE
    )
    batch_stats: str = option(
        "synced",
        "<synced|per_device|groups:K>: on several devices, which of them share the "
        "statistics of a batch: all, none, or each K neighbours.",
        valid=_BATCH_STATS,
    )
    merged_stats: str = option(
        "exact",
        "What prediction takes of moving averages that differ by device: their exact "
        "merge, the variance between devices included, or the first device's.",
        choices=("exact", "first"),
    )
    seed: int = option(
        0, "Decides initial weights and the order of images.", valid=_SEED
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    def with_traced(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return a copy in which fields are traced values, which cannot be checked."""
        traced = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(traced, name, value)
        return traced

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config of such a dict.

        Raises:
          ConfigError: if fields are missing or unknown, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = names - values.keys(), values.keys() - names
        if missing or unknown:
            raise ConfigError(
                f"a config needs the fields {sorted(names)}; missing: "
                f"{sorted(missing)}, unknown: {sorted(unknown)}"
            )
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; but for rounding, its numbers are the same.

    (With statistics per device or in groups, the number of devices is the number of
    parts of a batch, and decides the numbers, too.)

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    devices: str = option(
        "all",
        "<all|N>: how many devices train together, over all processes. On CPU, N "
        "devices are made of the host's cores; all is one.",
        valid=_DEVICES,
    )
    parallel: str = option(
        "pmap",
        "How several devices are programmed: by pmap, or by jit over a mesh.",
        choices=("pmap", "jit"),
    )
    input: str = option(
        "auto",
        "Where the training images are: in the devices' memory, or streamed to them; "
        "auto streams what is larger than 1 GB.",
        choices=("auto", "memory", "stream"),
    )
    checkpoint_every: str = option(
        "1epoch",
        "<Nepochs|Nsteps|never>: how often the state is saved, to go on from.",
        valid=_EVERY,
    )
    resume: bool = option(
        True, "Go on from the last checkpoint where the folder holds this run."
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        check(self)

    def checkpoint_steps(self, steps_per_epoch: int) -> int | None:
        """Return the number of steps from checkpoint to checkpoint; None for never."""
        if self.checkpoint_every == "never":
            return None
        digits = re.match(r"\d+", self.checkpoint_every)
        assert digits is not None  # __post_init__ has checked
        steps = int(digits[0])
        return steps * steps_per_epoch if "epoch" in self.checkpoint_every else steps


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Return a field of a config's dict, or an option as in "norm.momentum"."""
    field, _, key = name.partition(".")
    if not key:
        return config[field]
    defaults: dict[str, Any] = {
        "norm_layers": "1111", "bias_before_norm": True, "activation": "sigmoid",
        "dropout_rate": 0.0, "dropout_at": "dense", "first_padding": 0,
        "momentum": 0.9, "epsilon": 1e-5, "gamma": True, "beta": True,
    }  # fmt: skip
    parts = config[field].partition(":")[2].split(",")
    given = dict(part.split("=") for part in parts if part)
    default = defaults[key]
    if key not in given:
        return default
    text = given[key]
    return text == "true" if isinstance(default, bool) else type(default)(text)
