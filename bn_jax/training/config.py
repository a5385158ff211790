"""What a run is, and how it is carried out.

`TrainConfig` is every choice that decides a run's numbers; `RunOptions` is on which
devices and in which parts they are computed. Where the data lie and where results go is
in neither: the same config gives the same numbers from any folder.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from bn_jax import data as data_lib
from bn_jax.fields import (
    AT_LEAST_1,
    BELOW_1,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    Range,
    check,
    did_you_mean,
    names_checked,
    option,
    parse,
)
from bn_jax.models import MODELS
from bn_jax.names import Table
from bn_jax.training.augment import AUGMENTATIONS
from bn_jax.training.inputs import INPUTS
from bn_jax.training.optimizers import OPTIMIZERS
from bn_jax.training.parameters import RATE_FACTORS, TRAINED
from bn_jax.training.schedules import SCHEDULES
from bn_jax.transforms import NORMS

# The start of `TrainConfig.model` where the user passed the model in, before its class.
OWN_MODEL = "own:"
# The start of `TrainConfig.init_from` where the user passed variables in, before their
# checksum.
OWN_VARIABLES = "variables:"

# JAX's keys keep 32 bits of a seed: greater ones would repeat these.
_SEED = Range("a number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
_BATCH_STATS = Range(
    "synced, per_device or groups:K with K devices a group, such as groups:2",
    lambda v: re.fullmatch(r"synced|per_device|groups:[1-9]\d*", v) is not None,
)
_DEVICES = Range(
    "all, or a number of devices",
    lambda v: re.fullmatch(r"all|[1-9]\d*", v) is not None,
)
_LOGS = Range(
    "csv, tensorboard, both with a comma between, or none",
    lambda v: v == "none" or (bool(v) and set(v.split(",")) <= {"csv", "tensorboard"}),
)
_EVERY = Range(
    "a number of epochs or steps, such as 1epoch, 2epochs or 500steps, or never",
    lambda v: re.fullmatch(r"never|[1-9]\d*(epoch|step)s?", v) is not None,
)


@names_checked
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, complete and hashable; the defaults are the chapter's.

    Each field is a flag of `python -m experiments.train`; its --help says what it does.
    Fields that name something take a name with options, `name:key=value,...`, and hold
    it in one canonical form: options in their order, defaults left out.

    Raises:
      ConfigError: naming each bad or unknown field, its value, and what was expected.
    """

    dataset: str = option(
        "auto",
        f"Images to train on: {', '.join(data_lib.DATASETS)}. 'auto' takes the full "
        "Fashion-MNIST where it is at hand and the embedded sample of it "
        "(6,000 + 1,000 images) otherwise; npz:PATH is a file of your own.",
    )
    train_examples: int = option(
        0, "Train on the first N images; 0 for all.", valid=NOT_NEGATIVE
    )
    validation: int = option(
        0,
        "Set the last N training images aside, score them after each epoch, and keep "
        "the checkpoint that is best on them; 0 for none.",
        valid=NOT_NEGATIVE,
    )
    inputs: str = option("unit", "How bytes become numbers.", table=INPUTS)
    augment: str = option(
        "none", "How training images are changed at random.", table=AUGMENTATIONS
    )
    model: str = option("lenet", "The network.", table=MODELS)
    norm: str = option(
        "batch_norm",
        "What the network normalises with; flax is Flax's own batch norm.",
        table=NORMS,
    )
    norm_statistics: str = option(
        "batch",
        "Statistics that norms use in training: those of the batch, or the moving "
        "averages, which then stay as they are. The latter is for fine-tuning.",
        choices=("batch", "moving"),
    )
    init_from: str = option(
        "",
        "Folder of a finished run of the same network, whose parameters and moving "
        "statistics this one starts from; empty draws them by the seed. (Of variables "
        "that are passed in, it is their checksum.)",
    )
    init_statistics: str = option(
        "kept",
        "Whether the moving statistics of init_from are kept, or fresh.",
        choices=("kept", "fresh"),
    )
    trained: str = option(
        "all",
        "What learns, the rest staying as initialised: all, perhaps without the norms' "
        "gamma or beta; the norms alone, or with another layer; or as many other "
        "parameters, chosen at random.",
        table=TRAINED,
    )
    epochs: int = option(10, "Passes over the training images.", valid=AT_LEAST_1)
    batch_size: int = option(
        256,
        "Images a step, on all devices together; those left over at an epoch's end are "
        "dropped.",
        valid=AT_LEAST_1,
    )
    learning_rate: float = option(1.0, "(Peak) learning rate.", valid=POSITIVE)
    optimizer: str = option("sgd", "The optimizer.", table=OPTIMIZERS)
    schedule: str = option(
        "constant", "The learning rate over the run.", table=SCHEDULES
    )
    weight_decay: float = option(
        0.0,
        "Added to the gradient, times the parameters; adamw decouples it, and has none "
        "either unless it is given, where optax's has 1e-4.",
        valid=FINITE,
    )
    decay: str = option(
        "kernels",
        "What decays: kernels alone, not norms and biases; or all parameters.",
        choices=("kernels", "all"),
    )
    clip_norm: float = option(
        0.0,
        "Largest norm of the gradient, which is scaled down to it; 0 for any.",
        valid=FINITE,
    )
    label_smoothing: float = option(
        0.0,
        "Share of a label spread over all classes, in the loss of training, not in "
        "those of validation and test.",
        valid=BELOW_1,
    )
    rate_factors: str = option(
        "",
        "PATTERN=FACTOR;...: factors of the learning rate for parameters whose path, "
        "such as dense1/kernel, matches a regular expression.",
        valid=RATE_FACTORS,
    )
    accumulate: int = option(
        1,
        "Micro-batches that a batch is cut into, whose gradients are averaged: a "
        "divisor of the batch, for batches that do not fit a device.",
        valid=AT_LEAST_1,
    )
    accumulate_stats: str = option(
        "each",
        "Micro-batches are normalised each by its own statistics. The moving averages "
        "take these one after another (each), or take the moments of the whole batch "
        "at once (once).",
        choices=("each", "once"),
    )
    average_weights: float = option(
        0.0,
        "Decay a step of an exponential average of the weights, which is scored at "
        "the end with exact statistics of its own; 0 for none.",
        valid=BELOW_1,
    )
    precision: str = option(
        "highest",
        "Of products and convolutions: highest, of float32 everywhere; default, as "
        "JAX's backend takes float32, rounded to TF32 on a GPU and to bfloat16 on a "
        "TPU; bfloat16, activations and gradients too. Parameters and statistics are "
        "float32.",
        choices=("default", "highest", "bfloat16"),
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

    _traced: ClassVar[Mapping[str, Any]] = {}
    # Fields that the first runs of this version lack. They hold their default.
    _LATER: ClassVar[tuple[str, ...]] = (
        "norm_statistics",
        "init_from",
        "init_statistics",
    )

    def __post_init__(self) -> None:
        """Check each field's type and range, and write names in one form."""
        faults = []
        try:
            check(self)
        except ConfigError as error:
            faults.append(str(error))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(field.default) is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
        if isinstance(self.dataset, str):  # else named by `check`
            try:
                data_lib.check_name(self.dataset)
            except data_lib.DataError as error:
                faults.append(str(error))
        for name, table in _tables().items():
            text = getattr(self, name)
            if not isinstance(text, str):  # named by `check`
                continue
            if name == "model" and text.startswith(OWN_MODEL):
                continue
            try:
                object.__setattr__(self, name, table.canonical(text))
            except ConfigError as error:
                faults.append(str(error))
        if faults:
            raise ConfigError("; ".join(faults))
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate={self.accumulate} does not divide batch_size="
                f"{self.batch_size}; give a divisor"
            )

    def value(self, name: str) -> Any:
        """Return a field, or an option of a named field, such as "norm.momentum".

        Raises:
          ConfigError: if there is no such field or option.
        """
        fields = dataclasses.fields(self)
        return value_of({f.name: getattr(self, f.name) for f in fields}, name)

    def replaced(self, name: str, value: Any) -> TrainConfig:
        """Return a copy with another value of a field or of a named field's option.

        Raises:
          ConfigError: if there is no such field or option, or the value does not fit.
        """
        self.value(name)  # refuses a name that there is not
        field, _, option_name = name.partition(".")
        if option_name:
            table = _table(field)
            value = table.replaced(getattr(self, field), **{option_name: value})
        return dataclasses.replace(self, **{field: value})

    def static(self) -> TrainConfig:
        """Return the config that all have in common that differ in numbers alone.

        Their numbers, see `traceable`, have values that are always the same.
        """
        options: dict[str, dict[str, Any]] = {}
        for name in traceable(self):
            field, _, option_name = name.partition(".")
            if option_name:
                table = _table(field)
                known = table.options(getattr(self, field).partition(":")[0])
                default = known[option_name].default
                options.setdefault(field, {})[option_name] = default
        texts: dict[str, Any] = {
            field: _table(field).replaced(getattr(self, field), **defaults)
            for field, defaults in options.items()
        }
        return dataclasses.replace(self, learning_rate=1.0, seed=0, **texts)

    def replaced_by_text(self, name: str, text: str) -> TrainConfig:
        """Return `replaced` with the value that a text writes.

        Raises:
          ConfigError: as `replaced`, or if the text writes no value of the field.
        """
        self.value(name)  # refuses a name that there is not
        field, _, option_name = name.partition(".")
        if option_name:
            table = _table(field)
            kind = table.options(table.parse(getattr(self, field)).name)
            return self.replaced(name, kind[option_name].parse(text))
        (known,) = (f for f in dataclasses.fields(self) if f.name == name)
        return self.replaced(name, parse(known, text))

    def with_traced(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return a copy in which fields and options are traced values, by name.

        Traced values cannot be checked. Those of options are read with `traced`.
        """
        traced = copy.copy(self)
        options = {name: v for name, v in values.items() if "." in name}
        object.__setattr__(traced, "_traced", {**self._traced, **options})
        for name in values.keys() - options.keys():
            object.__setattr__(traced, name, values[name])
        return traced

    def traced(self, field: str) -> dict[str, Any]:
        """Return the traced values of a named field's options."""
        return {
            name.partition(".")[2]: value
            for name, value in self._traced.items()
            if name.startswith(f"{field}.")
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config of such a dict.

        Raises:
          ConfigError: if fields are missing or unknown, as in a run of another version,
            or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = names - values.keys(), values.keys() - names
        missing -= set(cls._LATER)
        if missing or unknown:
            raise ConfigError(
                f"a config needs the fields {sorted(names)}; missing: "
                f"{sorted(missing)}, unknown: {sorted(unknown)}"
            )
        return cls(**values)


def _tables() -> dict[str, Table[Any]]:
    """Return the tables of the fields that take a name."""
    return {
        field.name: field.metadata["table"]
        for field in dataclasses.fields(TrainConfig)
        if field.metadata["table"] is not None
    }


def _table(field: str) -> Table[Any]:
    tables = _tables()
    if field not in tables:
        raise ConfigError(
            f"{field!r} is no field with options; those are {', '.join(tables)}"
        )
    return tables[field]


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Return a field of a config's dict, or an option, such as "norm.momentum".

    Args:
      config: as `TrainConfig.to_dict` returns it.
      name: of the field, with that of the option after a dot.

    Raises:
      ConfigError: if there is no such field or option.
    """
    field, _, option_name = name.partition(".")
    if field not in config:
        raise ConfigError(
            f"{field!r} is no field{did_you_mean(field, config)}; expected one of "
            f"{', '.join(config)}"
        )
    if not option_name:
        return config[field]
    return _table(field).value(config[field], option_name)


def traceable(config: TrainConfig) -> dict[str, Any]:
    """Return the numbers that a compiled program can take as arguments, by name.

    Returns:
      The values of `config`: learning rate, seed, and the options of named fields that
      are marked so, by dotted name.
    """
    found = {"learning_rate": config.learning_rate}
    for field, table in _tables().items():
        text = getattr(config, field)
        if text.startswith(OWN_MODEL):
            continue
        options = table.options(table.parse(text).name)
        for name, known in options.items():
            # A layer without norm needs the bias that others then do not have.
            adds_bias = name == "norm_layers" and not table.value(
                text, "bias_before_norm"
            )
            if known.is_traceable and not adds_bias:
                found[f"{field}.{name}"] = table.value(text, name)
    return {**found, "seed": config.seed}


@names_checked
@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; but for rounding, its numbers are the same.

    (With statistics per device or in groups, the number of devices is the number of
    parts of a batch, and decides the numbers, too.)

    Raises:
      ConfigError: naming each bad or unknown field, its value, and what was expected.
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
        "<Nepochs|Nsteps|never>: how often the state is saved, to resume from.",
        valid=_EVERY,
    )
    resume: bool = option(
        True, "Resume from the last checkpoint where the folder holds this run."
    )
    log: str = option(
        "none",
        "<csv|tensorboard|csv,tensorboard|none>: logs for other programs, a point an "
        "epoch.",
        valid=_LOGS,
    )

    def __post_init__(self) -> None:
        """Check each field's type and range; a number of devices may be an integer."""
        if type(self.devices) is int:
            object.__setattr__(self, "devices", str(self.devices))
        check(self)

    def logs(self) -> list[str]:
        """Return the names of the logs that are written."""
        return [] if self.log == "none" else self.log.split(",")

    @classmethod
    def given(cls, options: RunOptions | None) -> RunOptions:
        """Return options as Python gives them; by default on one device.

        Raises:
          TypeError: if they are something else.
        """
        if options is None:
            return cls(devices="1")
        if not isinstance(options, cls):
            raise TypeError(
                f"options are a {type(options).__name__}; expected a RunOptions, such "
                "as RunOptions(devices=2)"
            )
        return options

    def checkpoint_steps(self, steps_per_epoch: int) -> int | None:
        """Return the number of steps from checkpoint to checkpoint; None for never."""
        if self.checkpoint_every == "never":
            return None
        digits = re.match(r"\d+", self.checkpoint_every)
        assert digits is not None  # __post_init__ has checked
        steps = int(digits[0])
        return steps * steps_per_epoch if "epoch" in self.checkpoint_every else steps
