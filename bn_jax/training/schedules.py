"""Schedules by name: the learning rate as a function of the number of steps taken.

Each may start with a warm-up, in which the rate rises in a straight line from 0.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, NamedTuple

import optax
from jax import Array

from bn_jax.fields import NOT_NEGATIVE, SHARE, ConfigError, Range, counted
from bn_jax.names import Table

_INSIDE = Range("a number greater than 0 and less than 1", lambda v: 0 < v < 1)


class Run(NamedTuple):
    """How long a run is."""

    epochs: int
    steps_per_epoch: int

    def steps(self, epochs: float) -> int:
        """Return the number of steps of some epochs, rounded."""
        return round(epochs * self.steps_per_epoch)


def constant(
    *,
    learning_rate: float | Array,
    run: Run,
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0,
) -> optax.Schedule:
    """The same rate in every step."""
    return _warm_up(
        optax.constant_schedule(learning_rate), learning_rate, run, warmup_epochs
    )


def cosine(
    *,
    learning_rate: float | Array,
    run: Run,
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0,
    end: Annotated[float, SHARE] = 0.0,
) -> optax.Schedule:
    """Half a cosine from the rate to a share `end` of it.

    References:
      Loshchilov and Hutter, 2017, "SGDR: stochastic gradient descent with warm
      restarts".
    """
    num_steps = _steps_after_warmup(run, warmup_epochs)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, end)
    return _warm_up(schedule, learning_rate, run, warmup_epochs)


def linear(
    *,
    learning_rate: float | Array,
    run: Run,
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0,
    end: Annotated[float, SHARE] = 0.0,
) -> optax.Schedule:
    """A straight line from the rate to a share `end` of it."""
    num_steps = _steps_after_warmup(run, warmup_epochs)
    schedule = optax.linear_schedule(learning_rate, end * learning_rate, num_steps)
    return _warm_up(schedule, learning_rate, run, warmup_epochs)


def steps(
    *,
    learning_rate: float | Array,
    run: Run,
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0,
    at: tuple[Annotated[float, _INSIDE], ...] = (0.5, 0.75),
    factor: Annotated[float, SHARE] = 0.1,
) -> optax.Schedule:
    """The rate, multiplied by `factor` at each of the shares `at` of the run."""
    if sorted(set(at)) != list(at):
        raise ConfigError(
            f"schedule='steps:at={'x'.join(map(str, at))}'; expected shares of the run "
            "in ascending order, such as 0.5x0.75"
        )
    if warmup_epochs >= at[0] * run.epochs:
        raise ConfigError(
            f"schedule='steps:warmup_epochs={warmup_epochs:g}', with a first step down "
            f"after {at[0] * run.epochs:g} epochs; expected a warm-up that ends before"
        )
    factors: dict[int, float] = defaultdict(lambda: 1.0)
    for share in at:  # In a short run, two of them may be one step.
        boundary = run.steps(share * run.epochs) - run.steps(warmup_epochs)
        factors[boundary] *= factor
    schedule = optax.piecewise_constant_schedule(learning_rate, factors)
    return _warm_up(schedule, learning_rate, run, warmup_epochs)


SCHEDULES: Table[optax.Schedule] = Table(
    "schedule",
    {"constant": constant, "cosine": cosine, "linear": linear, "steps": steps},
)


def is_of_any_length(schedule: str) -> bool:
    """Return whether the rates of a run are the first ones of any longer run."""
    return SCHEDULES.parse(schedule).name == "constant"


def _warm_up(
    schedule: optax.Schedule,
    learning_rate: float | Array,
    run: Run,
    warmup_epochs: float,
) -> optax.Schedule:
    """Put a straight line from 0 to the rate before a schedule."""
    _steps_after_warmup(run, warmup_epochs)
    warmup = run.steps(warmup_epochs)
    if warmup == 0:
        return schedule
    rising = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([rising, schedule], [warmup])


def _steps_after_warmup(run: Run, warmup_epochs: float) -> int:
    if warmup_epochs >= run.epochs:
        raise ConfigError(
            f"schedule with warmup_epochs={warmup_epochs:g} in a run of "
            f"{counted(run.epochs, 'epoch')}; expected a warm-up shorter than the run"
        )
    return max(1, run.steps(run.epochs) - run.steps(warmup_epochs))
