"""How networks predict when they have learned the training images equally well."""

from __future__ import annotations

import math
import statistics

from experiments import intervals
from experiments.estimate import Statistic
from experiments.intervals import LEVEL, Interval
from experiments.scores import Runs


def at_equal_loss(runs: Runs, *arms: str) -> list[list[float]]:
    """Return by arm and seed the test accuracy when all first had the same loss.

    That loss is, of each seed, the highest of the lowest losses that arms reached, as
    means over epochs of training. A test accuracy is the mean over five epochs around.
    """
    found: list[list[float]] = [[] for _ in arms]
    for rows in zip(*(runs[arm] for arm in arms), strict=True):
        of_runs = [[math.inf if v is None else v for v in row["loss"]] for row in rows]
        reached = max(map(min, of_runs))
        for values, losses, row in zip(found, of_runs, rows, strict=True):
            epoch = next(i for i, loss in enumerate(losses) if loss <= reached)
            around = row["test_accuracy"][max(0, epoch - 2) : epoch + 3]
            values.append(statistics.mean(v for v in around if v is not None))
    return found


def better_at_equal_loss(arm: str, other: str) -> Statistic:
    """Return an arm's test accuracy minus another's, of the same training loss."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        return intervals.of_difference(*at_equal_loss(runs, arm, other), level=level)

    return statistic
