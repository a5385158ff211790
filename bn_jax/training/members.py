"""The members of a sweep: their configs, and the program of one.

Members differ in `SWEPT` fields alone: numbers that a program takes as arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax.fields import ConfigError
from bn_jax.training import parallel
from bn_jax.training import step as step_lib
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import (
    TrainState,
    dropout_key,
    make_model,
    make_optimizer,
)

# Fields that a program can take as arguments.
SWEPT = (
    "learning_rate",
    "optimizer_momentum",
    "momentum",
    "epsilon",
    "norm_layers",
    "train_gamma",
    "train_beta",
    "seed",
)

Values = dict[str, Any]  # fields that differ, and the seed, as arrays


def parse(spec: str, base: TrainConfig) -> list[TrainConfig]:
    """Return the configs of a sweep written as "learning_rate=0.1,1.0;seed=0..4".

    Args:
      spec: fields with their values, all of which are combined; the last field varies
        fastest. `a..b` stands for the integers from a to b.
      base: gives the other fields.

    Raises:
      ConfigError: if a field cannot be swept, or a value is none of it.
    """
    fields = {field.name: type(field.default) for field in dataclasses.fields(base)}
    choices: dict[str, list[Any]] = {}
    for part in spec.split(";"):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in SWEPT or not text or name in choices:
            raise ConfigError(
                f"sweep={spec!r}: {part!r}; expected FIELD=VALUE,VALUE,... with each "
                f"field once, of {', '.join(SWEPT)}"
            )
        kind = fields[name]
        choices[name] = [v for t in text.split(",") for v in _values(name, t, kind)]
    members = itertools.product(*choices.values())
    return [
        dataclasses.replace(base, **dict(zip(choices, member, strict=True)))
        for member in members
    ]


def _values(name: str, text: str, kind: type) -> list[Any]:
    """Return the values that one entry of a field's list stands for."""
    text = text.strip()
    integers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if kind is int and integers is not None:
        return list(range(int(integers[1]), int(integers[2]) + 1))
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise ConfigError(f"{name}={text!r} in a sweep; expected true or false")
        return [known[text.lower()]]
    try:
        return [kind(text)]
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} in a sweep; expected {kind.__name__}"
        ) from None


def check(configs: Sequence[TrainConfig]) -> None:
    """Refuse configs that one program cannot train.

    Raises:
      ConfigError: if there are none, or they differ in other fields than `SWEPT`.
    """
    if not configs:
        raise ConfigError("a sweep of no configs; give at least one")
    for field in dataclasses.fields(TrainConfig):
        values = {getattr(config, field.name) for config in configs}
        if len(values) > 1 and field.name not in SWEPT:
            raise ConfigError(
                f"configs of a sweep differ in {field.name}: {sorted(map(str, values))}"
                f"; they may in {', '.join(SWEPT)}"
            )
    if not configs[0].bias_before_norm and any(
        config.norm_layers != "1111" for config in configs
    ):
        raise ConfigError(
            "bias_before_norm=False in a sweep with layers without norm, which need a "
            "bias; leave the biases in"
        )


def stack_values(configs: Sequence[TrainConfig]) -> Values:
    """Return the fields that differ as arrays with a leading axis of configs.

    What all configs share stays a constant of the program, which is the faster for it.
    """
    swept: Values = {}
    for name in SWEPT:
        values = [getattr(config, name) for config in configs]
        if name != "seed" and len(set(values)) == 1:
            continue
        if name == "norm_layers":
            swept[name] = np.array([[d == "1" for d in v] for v in values])
        else:
            kind = np.uint32 if name == "seed" else jnp.result_type(type(values[0]))
            swept[name] = np.array(values, kind)
    return swept


def run_member(
    base: TrainConfig,
    num_classes: int,
    steps_per_epoch: int,
    values: Values,
    state: TrainState,
    data: step_lib.Batch,
    order: Any,
    start: Any,
    stop: Any,
) -> tuple[TrainState, step_lib.Metrics]:
    """Take one member's steps; see `step.run_steps`."""
    config = base.with_traced(values)
    train_step = step_lib.make_train_step(
        make_model(config, num_classes=num_classes),
        make_optimizer(config, steps_per_epoch=steps_per_epoch),
        dropout_key=dropout_key(config),
    )
    return step_lib.run_steps(
        train_step,
        state,
        step_lib.Stored(data, order),
        start,
        stop,
        max_steps=parallel.STEPS_PER_CALL,
    )


def evaluate_member(
    base: TrainConfig,
    num_classes: int,
    predict: Callable[[Any, Any, Any], Any],
    values: Values,
    variables: Any,
    batches: step_lib.Batch,
    counts: Any,
) -> step_lib.Sums:
    """Evaluate one member, without dropout."""
    config = base.with_traced({**values, "dropout_rate": 0.0})
    model = make_model(config, num_classes=num_classes)
    return step_lib.evaluate(model, variables, batches, counts, predict=predict)


@functools.lru_cache(maxsize=8)
def predict_of(base: TrainConfig, num_classes: int) -> Callable[[Any, Any], Any]:
    """Return `predict(variables, images)` of a member, whose values are variables.

    It is the same function for the same arguments, so that it is compiled once.
    """

    def predict(variables: Mapping[str, Any], images: Any) -> Any:
        own = {name: variables[name] for name in ("params", "batch_stats")}
        config = base.with_traced(variables["swept"])
        model = make_model(config, num_classes=num_classes)
        return step_lib.predict(model, own, images)

    return predict
