"""What a run is, and how it is carried out, as dataclasses and as flags.

`TrainConfig` is every choice that decides a run's numbers; `RunOptions` is on which
devices and in which parts they are computed. Where the data lie and where results go is
in neither: the same config gives the same numbers from any folder.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

# Flags that this module defines for an entry point are listed by that one's --help.
flags.disclaim_key_flags()


class ConfigError(ValueError):
    """A value that a config cannot take."""


@dataclasses.dataclass(frozen=True)
class _Range:
    """What a value may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


_AT_LEAST_1 = _Range("a number at least 1", lambda v: v >= 1)
_NOT_NEGATIVE = _Range("a number 0 or greater", lambda v: v >= 0)
_POSITIVE = _Range("a number greater than 0 and finite", lambda v: 0 < v < math.inf)
_BELOW_1 = _Range("a number in [0, 1)", lambda v: 0 <= v < 1)
_SHARE = _Range("a number in [0, 1]", lambda v: 0 <= v <= 1)
# JAX's keys keep 32 bits of a seed: greater ones would repeat these.
_SEED = _Range("a number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
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
_NORM = _Range(
    f"one of {', '.join(NORMS)}, with attributes if need be, such as "
    "whitening:method=zca,max_group_size=16",
    lambda v: (
        re.fullmatch(rf"({'|'.join(NORMS)})(:\w+=[^,=]+(,\w+=[^,=]+)*)?", v) is not None
    ),
)
_NORM_LAYERS = _Range(
    "four digits 0 or 1, such as 0011",
    lambda v: re.fullmatch("[01]{4}", v) is not None,
)
_BATCH_STATS = _Range(
    "synced, per_device or groups:K with K devices a group, such as groups:2",
    lambda v: re.fullmatch(r"synced|per_device|groups:[1-9]\d*", v) is not None,
)
_DEVICES = _Range(
    "all, or a number of devices",
    lambda v: re.fullmatch(r"all|[1-9]\d*", v) is not None,
)
_EVERY = _Range(
    "a number of epochs or steps, such as 1epoch, 2epochs or 500steps, or never",
    lambda v: re.fullmatch(r"never|[1-9]\d*(epoch|step)s?", v) is not None,
)


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    valid: _Range | None = None,
) -> Any:
    metadata = {"help": help, "choices": choices, "valid": valid}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, complete and hashable; refuses values out of range.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    dataset: str = _option(
        "auto",
        "Images to train on. 'auto' takes the full Fashion-MNIST where it is at hand "
        "and the embedded sample of it (6,000 + 1,000 images) otherwise.",
        choices=("auto", "fashion_mnist", "mnist", "kmnist", "sample"),
    )
    train_examples: int = _option(
        0, "Train on the first N images; 0 for all.", valid=_NOT_NEGATIVE
    )
    activation: str = _option(
        "sigmoid", "After each of the four layers.", choices=("sigmoid", "relu")
    )
    norm: str = _option(
        "batch_norm",
        f"<{'|'.join(NORMS)}>, with attributes as in group:num_groups=2 if need be: "
        "what normalises before each activation; flax is Flax's own batch norm.",
        valid=_NORM,
    )
    norm_layers: str = _option(
        "1111",
        "Which of the four layers have the norm, in order: two convolutions, then two "
        "dense layers; 0011 has it after the dense layers alone.",
        valid=_NORM_LAYERS,
    )
    train_gamma: bool = _option(True, "Whether the norms' gamma learns; else it is 1.")
    train_beta: bool = _option(True, "Whether the norms' beta learns; else it is 0.")
    trained: str = _option(
        "all",
        "What learns, the rest staying as initialised: all; the norms' gamma and beta "
        "alone; these and the last layer; or as many other parameters, chosen at "
        "random.",
        choices=("all", "norm", "norm_and_last", "random"),
    )
    dropout_rate: float = _option(
        0.0, "Share of values that training sets to 0.", valid=_BELOW_1
    )
    dropout_at: str = _option(
        "dense",
        "Where: after both hidden dense layers, the first of which a norm follows; or "
        "after the last of them alone.",
        choices=("dense", "last"),
    )
    bias_before_norm: bool = _option(
        True, "Whether layers before a norm have a bias; batch norm cancels it."
    )
    first_padding: int = _option(
        0,
        "Pixels of 0 around the images: 0 in the chapter on batch normalisation, 2 in "
        "the one that introduces LeNet without it.",
        valid=_NOT_NEGATIVE,
    )
    epochs: int = _option(10, "Passes over the training images.", valid=_AT_LEAST_1)
    batch_size: int = _option(
        256,
        "Images a step; those left over at an epoch's end are dropped.",
        valid=_AT_LEAST_1,
    )
    learning_rate: float = _option(1.0, "(Initial) learning rate.", valid=_POSITIVE)
    optimizer: str = _option(
        "sgd",
        "Plain SGD, SGD with momentum, or Adam.",
        choices=("sgd", "momentum", "adam"),
    )
    optimizer_momentum: float = _option(
        0.9,
        "Momentum of --optimizer=momentum (not of the statistics).",
        valid=_SHARE,
    )
    schedule: str = _option(
        "constant",
        "Learning rate over the run: constant, or a cosine from the initial one to 0.",
        choices=("constant", "cosine"),
    )
    momentum: float = _option(
        0.9,
        "Weight of the OLD average in the moving statistics of batch norm.",
        valid=_SHARE,
    )
    epsilon: float = _option(
        1e-5, "Added to the variance in batch norm.", valid=_POSITIVE
    )
    batch_stats: str = _option(
        "synced",
        "<synced|per_device|groups:K>: on several devices, which of them share the "
        "statistics of a batch: all, none, or each K neighbours.",
        valid=_BATCH_STATS,
    )
    merged_stats: str = _option(
        "exact",
        "What prediction takes of moving averages that differ by device: their exact "
        "merge, the variance between devices included, or the first device's.",
        choices=("exact", "first"),
    )
    seed: int = _option(
        0, "Decides initial weights and the order of images.", valid=_SEED
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        _check(self)

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

    devices: str = _option(
        "all",
        "<all|N>: how many devices train together, over all processes. On CPU, N "
        "devices are made of the host's cores; all is one.",
        valid=_DEVICES,
    )
    parallel: str = _option(
        "pmap",
        "How several devices are programmed: by pmap, or by jit over a mesh.",
        choices=("pmap", "jit"),
    )
    input: str = _option(
        "auto",
        "Where the training images are: in the devices' memory, or streamed to them; "
        "auto streams what is larger than 1 GB.",
        choices=("auto", "memory", "stream"),
    )
    checkpoint_every: str = _option(
        "1epoch",
        "<Nepochs|Nsteps|never>: how often the state is saved, to go on from.",
        valid=_EVERY,
    )
    resume: bool = _option(
        True, "Go on from the last checkpoint where the folder holds this run."
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        _check(self)

    def checkpoint_steps(self, steps_per_epoch: int) -> int | None:
        """Return the number of steps from checkpoint to checkpoint; None for never."""
        if self.checkpoint_every == "never":
            return None
        digits = re.match(r"\d+", self.checkpoint_every)
        assert digits is not None  # __post_init__ has checked
        steps = int(digits[0])
        return steps * steps_per_epoch if "epoch" in self.checkpoint_every else steps


def _check(config: Any) -> None:
    """Refuse a dataclass with bad values, naming all of them."""
    faults = [
        fault
        for field in dataclasses.fields(config)
        if (fault := _fault(field, getattr(config, field.name)))
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def _fault(field: dataclasses.Field[Any], value: Any) -> str | None:
    """Return what is wrong with a field's value, or None."""
    choices, valid = field.metadata["choices"], field.metadata["valid"]
    kind = type(field.default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if choices is not None and value not in choices:
        return f"{field.name}={value!r}; expected one of {', '.join(choices)}"
    if not fits:
        return f"{field.name}={value!r}; expected a value of type {kind.__name__}"
    if valid is not None and not valid.holds(value):
        return f"{field.name}={value!r}; expected {valid.words}"
    return None


def define_flags(kind: type[TrainConfig] | type[RunOptions]) -> None:
    """Define an absl flag for each field of a config."""
    define: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        help_text = field.metadata["help"]
        if choices is not None:
            help_text = f"<{'|'.join(choices)}>: {help_text}"
        define[type(field.default)](field.name, field.default, help_text)


def from_flags(
    values: flags.FlagValues, *, defaults: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the config that the parsed flags give.

    Args:
      values: `flags.FLAGS` after parsing.
      defaults: values for fields whose flag was not given on the command line.

    Raises:
      ConfigError: if a value is out of range.
    """
    defaults = defaults or {}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        flag = values[field.name]
        use_default = field.name in defaults and not flag.present
        fields[field.name] = defaults[field.name] if use_default else flag.value
    return TrainConfig(**fields)


def options_from_flags(values: flags.FlagValues) -> RunOptions:
    """Return the options that the parsed flags give.

    Args:
      values: `flags.FLAGS` after parsing.

    Raises:
      ConfigError: if a value is out of range.
    """
    fields: dict[str, Any] = {
        field.name: values[field.name].value for field in dataclasses.fields(RunOptions)
    }
    return RunOptions(**fields)
