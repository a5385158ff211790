"""Intervals for means, differences, shares and other statistics of a few runs.

Each holds the true value in a share `level` of repetitions of the whole experiment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and the values that the data do not speak against."""

    value: float
    low: float
    high: float
    n: int  # number of independent values


def of_mean(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the mean with Student's t interval, for values that are about normal.

    Args:
      values: of independent runs. A single one says nothing of the spread: the interval
        is the whole line.
      level: of confidence.

    Raises:
      ValueError: if there are no values, or one is not finite.
    """
    x = _finite(values)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(mean, mean - float(half), mean + float(half), len(x))


def of_difference(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL
) -> Interval:
    """Return the mean of a - b for runs in pairs, such as those of one seed.

    What a pair has in common, initial weights or the order of examples, cancels.

    Raises:
      ValueError: if the runs are not in pairs, or as `of_mean`.
    """
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} values and {len(b)} cannot be paired; give one of each a seed"
        )
    return of_mean([x - y for x, y in zip(a, b, strict=True)], level=level)


def of_share(successes: int, trials: int, *, level: float = LEVEL) -> Interval:
    """Return a share with Wilson's interval, for independent trials.

    Args:
      successes: such as the number of test examples that are classified rightly.
      trials: their number, at least 1.
      level: of confidence.

    Raises:
      ValueError: if successes are not between 0 and trials.

    References:
      Wilson, 1927, "Probable inference, the law of succession, and statistical
      inference".
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"{successes} successes of {trials} trials; expected 0 to trials of 1 or "
            "more"
        )
    interval = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(
        successes / trials, float(interval.low), float(interval.high), trials
    )


def by_bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic with the percentile interval over resampled runs.

    Args:
      values: of the runs, shape `[n]`, or `[n, ...]` with several numbers a run, which
        stay together.
      statistic: of an array like `values`.
      level: of confidence.
      resamples: how many times n runs are drawn with replacement.
      seed: decides which.

    Raises:
      ValueError: as `of_mean`.

    References:
      Efron, 1979, "Bootstrap methods: another look at the jackknife".
    """
    x = _finite(values)
    rows = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    found = [statistic(x[row]) for row in rows]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(x)), float(low), float(high), len(x))


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return values as float64; refuse none, NaN and infinite ones."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError("there are no values; give at least one run's")
    if not np.isfinite(x).all():
        raise ValueError(
            f"of {x.size} values {np.sum(~np.isfinite(x))} are not finite; say what a "
            "run that diverged counts as, or leave it out"
        )
    return x
