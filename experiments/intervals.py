"""Confidence intervals for means and paired differences of a few runs.

If the whole experiment were repeated many times, a share `level` of its intervals would
contain the true value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate, and the range of values that are compatible with the data.

    All three are NaN, and n is 0, of a statistic that could not be computed.
    """

    value: float
    low: float
    high: float
    n: int  # number of independent values


class Exact(Interval):
    """An interval of no length, of a number that is what it is even at n = 1."""


def check(interval: Interval) -> None:
    """Refuse an interval that is none.

    Raises:
      ValueError: if it does not hold its value, or is NaN though there are values.
    """
    value, low, high, n = interval
    if n == 0 and all(map(math.isnan, (value, low, high))):
        return
    if not (low <= value <= high and n >= 1):
        raise ValueError(
            f"value {value} in [{low}, {high}] with n={n} is no interval; expected "
            "low <= value <= high and n of at least 1, or NaN for all three and n=0 "
            "where the statistic could not be computed"
        )


def of_mean(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the mean with Student's t interval, for values that are roughly normal.

    Args:
      values: of independent runs. From a single one the spread cannot be estimated: the
        interval is the whole line.
      level: confidence level, in (0, 1).

    Raises:
      ValueError: if there are no values, one is not finite, or the level is no share.
    """
    if not 0 < level < 1:
        raise ValueError(
            f"level={level!r}; expected a share in (0, 1), such as 0.95 for 95%"
        )
    x = _finite(values)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    from scipy import special  # It takes a third of a second to import.

    quantile = special.stdtrit(len(x) - 1, (1 + level) / 2)
    half = float(quantile * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def of_difference(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL
) -> Interval:
    """Return the mean of a - b with its interval, for runs that come in pairs.

    What the two runs of a seed have in common, such as the order of examples, cancels.

    Raises:
      ValueError: if the runs are not in pairs, or as `of_mean`.
    """
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} values and {len(b)} cannot be paired; give one of each a seed"
        )
    return of_mean([x - y for x, y in zip(a, b, strict=True)], level=level)


def _finite(values: Sequence[float]) -> np.ndarray:
    """Return values as float64; refuse none, NaN and infinite ones."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError("there are no values; give at least one run's")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(x))} of {x.size} values are not finite; replace "
            "those of runs that diverged, or leave them out"
        )
    return x
