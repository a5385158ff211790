"""The members of a sweep: their configs, and the program of one.

Members whose configs differ in numbers alone (`config.traceable`) share one compiled
program, which takes these as arguments. What else they differ in parts them into
groups, each with a program of its own.
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
from bn_jax.training import evaluation, feed, loop, parallel
from bn_jax.training.config import TrainConfig, traceable
from bn_jax.training.optimizers import make_optimizer
from bn_jax.training.state import Network, TrainState
from bn_jax.training.task import Task, make_network

# As many configs are made, and the rows of their results are held, at once.
MAX_MEMBERS = 100_000

Values = dict[str, Any]  # numbers that differ, and the seed, as arrays, by dotted name


def parse(spec: str, base: TrainConfig) -> list[TrainConfig]:
    """Return the configs of a sweep written as "learning_rate=0.1,1.0;seed=0..4".

    Args:
      spec: fields, or options of named fields such as `norm.momentum`, with their
        values, all of which are combined; the last one varies fastest. `a..b` stands
        for the integers from a to b. Names that have options of their own are set
        apart by `|`, as in "norm=batch_norm|whitening:method=zca,max_group_size=16".
      base: gives the other fields.

    Raises:
      ConfigError: if there is no such field or option, a value does not fit it or is
        given twice, or there are more than `MAX_MEMBERS`.
    """
    choices: dict[str, list[str]] = {}
    num_members = 1
    for part in spec.split(";"):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if not text or name in choices:
            raise ConfigError(
                f"sweep={spec!r}: {part!r}; expected FIELD=VALUE,VALUE,... with each "
                "field once, such as learning_rate=0.1,1.0;norm.momentum=0.9,0.99"
            )
        base.value(name)  # refuses a name that there is not
        has_options = "." not in name and (":" in text or "|" in text)
        pieces = [p.strip() for p in text.split("|" if has_options else ",")]
        num_members *= sum(map(_count, pieces))
        if num_members > MAX_MEMBERS:
            raise ConfigError(
                f"sweep={spec!r} has {num_members:,} members or more; expected at most "
                f"{MAX_MEMBERS:,}: write several sweeps"
            )
        choices[name] = [value for piece in pieces for value in _range(piece)]
    configs = []
    for member in itertools.product(*choices.values()):
        config = base
        for name, text in zip(choices, member, strict=True):
            config = _with(config, name, text)
        configs.append(config)
    if len(set(configs)) < len(configs):
        number, twice = next(
            (i, config) for i, config in enumerate(configs) if config in configs[:i]
        )
        values = ", ".join(f"{name}={twice.value(name)}" for name in choices)
        raise ConfigError(
            f"sweep={spec!r}: members {configs.index(twice) + 1} and {number + 1} are "
            f"the same, {values}; give each value once"
        )
    return configs


def _range(text: str) -> Sequence[str]:
    """Return the integers that "a..b" stands for, or else the text."""
    ends = _ends(text)
    return [text] if ends is None else [str(i) for i in range(ends[0], ends[1] + 1)]


def _count(text: str) -> int:
    """Return how many values a text stands for."""
    ends = _ends(text)
    return 1 if ends is None else ends[1] - ends[0] + 1


def _ends(text: str) -> tuple[int, int] | None:
    """Return a and b of "a..b", or None of another text.

    Raises:
      ConfigError: if b is less than a.
    """
    integers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", text)
    if integers is None:
        return None
    first, last = int(integers[1]), int(integers[2])
    if last < first:
        raise ConfigError(
            f"{text} holds no integer; expected the smaller one first: {last}..{first}"
        )
    return first, last


def _with(config: TrainConfig, name: str, text: str) -> TrainConfig:
    """Return a config with the value that a text writes.

    Raises:
      ConfigError: naming the field, if the text writes none of its values.
    """
    try:
        return config.replaced_by_text(name, text)
    except ConfigError as error:
        hint = ""
        ends = re.fullmatch(r"(\d+)\s*[-:]\s*(\d+)", text)
        if ends is not None:
            hint = (
                f"; the integers from {ends[1]} to {ends[2]} are {ends[1]}..{ends[2]}"
            )
        elif "." not in name and re.search(r",\s*[a-z_]+(:|,|$)", text):
            hint = (
                "; names with options are set apart by |, as in "
                "batch_norm|group:num_groups=2"
            )
        raise ConfigError(f"{error}{hint} (in a sweep of {name})") from None


@functools.lru_cache(maxsize=MAX_MEMBERS)
def static(config: TrainConfig) -> TrainConfig:
    """Return the config that all members of a program share: its numbers are fixed."""
    return config.static()


def grouped(configs: Sequence[TrainConfig]) -> list[list[int]]:
    """Return the numbers of the configs that share a program, group by group.

    Raises:
      ConfigError: if there are none, or one starts from another run.
    """
    if any(config.init_from for config in configs):
        raise ConfigError(
            "init_from is given for a sweep, whose members draw their parameters; "
            "leave it out, or train its members one by one"
        )
    if not configs:
        raise ConfigError("a sweep of no configs; give at least one")
    found: dict[TrainConfig, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(static(config), []).append(i)
    return list(found.values())


def check(configs: Sequence[TrainConfig]) -> None:
    """Refuse configs that one program cannot train.

    Raises:
      ConfigError: if there are none, they differ in more than numbers, or as `grouped`
        says.
    """
    if len(grouped(configs)) > 1:
        differing = [
            field.name
            for field in dataclasses.fields(TrainConfig)
            if len({getattr(static(config), field.name) for config in configs}) > 1
        ]
        raise ConfigError(
            f"configs of one program differ in {', '.join(differing)}; they may in "
            f"{', '.join(traceable(configs[0]))}"
        )


def differing(configs: Sequence[TrainConfig]) -> list[str]:
    """Return the fields and options in which configs of a sweep differ, by name."""
    names = list(traceable(configs[0]))
    for field in dataclasses.fields(TrainConfig):
        if len({getattr(static(config), field.name) for config in configs}) > 1:
            names = [n for n in names if not n.startswith(f"{field.name}.")]
            names.append(field.name)
    return [n for n in names if len({str(c.value(n)) for c in configs}) > 1]


def stack_values(
    configs: Sequence[TrainConfig], whole: Sequence[TrainConfig] | None = None
) -> Values:
    """Return the numbers that differ as arrays with a leading axis of configs.

    What all configs share stays a constant of the program, which is the faster for it.

    Args:
      configs: of the members.
      whole: configs of which these are a part that has to have the program of all.
    """
    stacked: Values = {}
    of_configs = [traceable(config) for config in configs]
    of_whole = [traceable(config) for config in whole or configs]
    for name in of_configs[0]:
        values = [of_config[name] for of_config in of_configs]
        every_value = {of_config[name] for of_config in of_whole}
        if name != "seed" and len(every_value) == 1:
            continue
        digits = [v for v in every_value if isinstance(v, str)]
        if digits:  # 0 and 1, that switch layers; None for 1 throughout
            every = "1" * len(digits[0])
            stacked[name] = np.array([[d == "1" for d in v or every] for v in values])
        else:
            kind = np.uint32 if name == "seed" else jnp.result_type(type(values[0]))
            stacked[name] = np.array(values, kind)
    return stacked


def run_member(
    base: TrainConfig,
    task: Task,
    model: Any,
    steps_per_epoch: int,
    pace: parallel.Pace,
    values: Values,
    state: TrainState,
    data: feed.Batch,
    order: Any,
    start: Any,
    stop: Any,
) -> tuple[TrainState, loop.Metrics]:
    """Take one member's steps; see `loop.run_steps`."""
    config = base.with_traced(values)
    train_step = loop.make_train_step(
        config,
        make_network(config, task, model=model),
        make_optimizer(config, steps_per_epoch=steps_per_epoch),
    )
    return loop.run_steps(
        train_step,
        state,
        feed.Stored(data, order),
        start,
        stop,
        pace=pace,
    )


def evaluate_member(
    base: TrainConfig,
    task: Task,
    model: Any,
    predict: Callable[[Network, Any, Any], Any],
    values: Values,
    variables: Any,
    batches: feed.Batch,
    counts: Any,
) -> evaluation.Sums:
    """Evaluate one member by `Network.predict` or `Network.predict_by_batch`."""
    network = make_network(base.with_traced(values), task, model=model)
    return evaluation.evaluate(
        functools.partial(predict, network), variables, batches, counts
    )


def predict_of(
    base: TrainConfig, task: Task, model: Any
) -> Callable[[Mapping[str, Any], Any], Any]:
    """Return `predict(variables, images)` of a member, whose values are variables."""

    def predict(variables: Mapping[str, Any], images: Any) -> Any:
        own = {name: variables[name] for name in ("params", "batch_stats")}
        config = base.with_traced(variables["swept"])
        return make_network(config, task, model=model).predict(own, images)

    return predict
