"""Confidence intervals for means, medians and paired differences of a few runs.

If the whole experiment were repeated many times, a share `level` of its intervals would
contain the true value. Which interval fits depends on the values: `of_mean` of what is
roughly normal, on a scale on which it is; `by_ranks` of what is symmetric, with tails
however long; `of_median` of anything, even of values of which only a bound is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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


UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)  # it could not be computed


class Scale(NamedTuple):
    """A scale on which values are closer to normal than on their own."""

    forward: Callable[[np.ndarray], np.ndarray]
    back: Callable[[float], float]
    low: float  # what values lie above
    high: float  # and below


def _odds(log_odds: float) -> float:
    """Return the odds, infinite where they are too large for a number."""
    return math.exp(log_odds) if log_odds < 700 else math.inf


def _share(log_odds: float) -> float:
    """Return the share with these odds."""
    odds = _odds(-abs(log_odds))
    return (1 if log_odds >= 0 else odds) / (1 + odds)


# Of a share, such as an accuracy: its log odds. Of what is positive: its logarithm.
LOGIT = Scale(lambda x: np.log(x / (1 - x)), _share, 0.0, 1.0)
LOG = Scale(np.log, _odds, 0.0, math.inf)


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


def of_mean(
    values: Sequence[float],
    *,
    level: float = LEVEL,
    scale: Scale | None = None,
    alike: Iterable[Sequence[float]] = (),
) -> Interval:
    """Return the mean with Student's t interval, for values that are roughly normal.

    Args:
      values: of independent runs. From a single one the spread cannot be estimated: the
        interval is the whole line, unless there are others that are alike.
      level: confidence level, in (0, 1).
      scale: on which mean and interval are taken, and brought back from: no end is then
        beyond what the values can be.
      alike: further samples with the same spread, if not the same mean, whose residuals
        are pooled with these.

    Raises:
      ValueError: if there are no values, one is not finite or not on the scale, or the
        level is not between 0 and 1.
    """
    _check_level(level)
    x = _on(scale, values)
    samples = [x, *(_on(scale, sample) for sample in alike)]
    mean = float(x.mean())
    degrees = sum(len(sample) - 1 for sample in samples)
    half = math.inf
    if degrees:
        from scipy import special  # It takes a third of a second to import.

        variance = sum(float(((s - s.mean()) ** 2).sum()) for s in samples) / degrees
        quantile = special.stdtrit(degrees, (1 + level) / 2)
        half = float(quantile * math.sqrt(variance / len(x)))
    return _back(scale, Interval(mean, mean - half, mean + half, len(x)))


def of_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = LEVEL,
    scale: Scale | None = None,
) -> Interval:
    """Return the mean of a - b with its interval, for runs that come in pairs.

    What the two runs of a seed have in common, such as the order of examples, cancels.

    Args:
      a: values of the first of each pair.
      b: of the second.
      level: confidence level, in (0, 1).
      scale: on which differences are taken: `LOG` gives the ratio of a to b, `LOGIT`
        the ratio of their odds.

    Raises:
      ValueError: if the runs are not in pairs, or as `of_mean`.
    """
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} values and {len(b)} cannot be paired; give one of each a seed"
        )
    found = of_mean((_on(scale, a) - _on(scale, b)).tolist(), level=level)
    return found if scale is None else _back(LOG, found)


def by_ranks(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the centre of a symmetric distribution, by signed ranks.

    The estimate is that of Hodges and Lehmann, the median of the means of all pairs;
    the interval holds the centres that Wilcoxon's test would not reject, by its exact
    distribution. It is the whole line where n is so small that no sample could reject:
    at a level of 98%, below 7.

    Raises:
      ValueError: as `of_mean`.
    """
    _check_level(level)
    x = _finite(values)
    n = len(x)
    first, second = np.triu_indices(n)
    means = np.sort((x[first] + x[second]) / 2)
    # How many of the 2^n patterns of signs give each sum of the positive ranks.
    patterns = np.ones(1)
    for rank in range(1, n + 1):
        longer = np.zeros(len(patterns) + rank)
        longer[: len(patterns)] += patterns
        longer[rank:] += patterns
        patterns = longer
    tails = patterns.cumsum() / 2.0**n
    return _between(means, tails, level, n)


def of_median(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the median, with the interval that the sign test gives.

    Nothing is assumed of the distribution, and a value of which only a bound is known
    may be infinite, such as a rate beyond the largest that was tried. The interval is
    the whole line where n is so small that no sample could reject: at a level of 98%,
    below 7.

    Raises:
      ValueError: if there are no values, one is NaN, the median lies between -inf and
        inf, or the level is not between 0 and 1.
    """
    from scipy import stats

    _check_level(level)
    x = np.sort(_some(values))
    if np.isnan(x).any():
        raise ValueError(f"{np.isnan(x).sum()} of {x.size} values are NaN")
    tails = stats.binom.cdf(np.arange(len(x)), len(x), 0.5)
    return _between(x, tails, level, len(x))


def _between(ordered: np.ndarray, tails: np.ndarray, level: float, n: int) -> Interval:
    """Return the median of ordered values, and the interval that counts give.

    Args:
      ordered: values.
      tails: by k, the probability that at most k of them are on one side of the centre.
      level: confidence level.
      n: number of independent values.
    """
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]]
    if middle[0] == -math.inf and middle[1] == math.inf:
        raise ValueError(
            "the median lies between -inf and inf: half of the values have only a "
            "lower bound, half an upper one"
        )
    outside = int((tails <= (1 - level) / 2 * (1 + 1e-12)).sum())  # at each end
    low, high = -math.inf, math.inf
    if outside:
        low, high = float(ordered[outside - 1]), float(ordered[-outside])
    value = middle[0] if middle[0] == middle[1] else middle.mean()
    return Interval(float(value), low, high, n)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(
            f"level={level!r}; expected a share in (0, 1), such as 0.95 for 95%"
        )


def _on(scale: Scale | None, values: Sequence[float]) -> np.ndarray:
    """Return values on a scale; refuse those that are not on it."""
    x = _finite(values)
    if scale is None:
        return x
    beyond = ~((scale.low < x) & (x < scale.high))
    if beyond.any():
        raise ValueError(
            f"{x[beyond][0]} cannot be put on the scale, which takes values in "
            f"({scale.low}, {scale.high}); use by_ranks or of_median"
        )
    return scale.forward(x)


def _back(scale: Scale | None, found: Interval) -> Interval:
    """Return an interval on a scale as one of the values themselves."""
    if scale is None:
        return found
    return Interval(*map(scale.back, found[:3]), found.n)


def _some(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError("there are no values; give at least one run's")
    return x


def _finite(values: Sequence[float]) -> np.ndarray:
    """Return values as float64; refuse none, NaN and infinite ones."""
    x = _some(values)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(x))} of {x.size} values are not finite; replace "
            "those of runs that diverged, or leave them out"
        )
    return x
