"""Statistics of runs, each with its interval.

Every function here returns a statistic: a function from `Runs`, and the confidence
level, to an interval. Claims are judged by statistics and figures draw them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from experiments import intervals
from experiments.intervals import LEVEL, Exact, Interval, Scale
from experiments.scores import NotTrained, Row, Runs, Score, seed_of


class Statistic(Protocol):
    """A statistic of runs."""

    def __call__(self, runs: Runs, /, *, level: float = LEVEL) -> Interval:
        """Return the statistic with its interval of that level."""


# The choice whose runs are meant, or a function that finds it, such as `best`.
Choice = Any


def mean(score: Score, choice: Choice, *, scale: Scale | None = None) -> Statistic:
    """Return the mean of a score over seeds, on a scale; see `intervals.of_mean`."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        values = _scores(runs, score, choice)
        return intervals.of_mean(values, level=level, scale=scale)

    return statistic


def paired(
    score: Score, choice: Choice, other: Choice, *, scale: Scale | None = None
) -> Statistic:
    """Return the mean over seeds of a choice's score minus another's, on a scale."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        a, b = _together(runs, score, choice, other)
        return intervals.of_difference(a, b, level=level, scale=scale)

    return statistic


def by_ranks(score: Score, choice: Choice) -> Statistic:
    """Return the centre of a score's distribution, by Wilcoxon's signed ranks."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        return intervals.by_ranks(_scores(runs, score, choice), level=level)

    return statistic


def of_seeds(
    score: Score,
    combine: Callable[..., float],
    *choices: Choice,
    scale: Scale | None = None,
) -> Statistic:
    """Return the mean over seeds of a number made of the scores of several choices.

    Args:
      score: of a run.
      combine: called with the scores of one seed, in the order of the choices. Where it
        returns NaN for a seed, the statistic is unknown.
      *choices: two or more.
      scale: see `intervals.of_mean`.
    """

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        of_choices = _together(runs, score, *choices)
        values = [combine(*values) for values in zip(*of_choices, strict=True)]
        if any(map(math.isnan, values)):
            return intervals.UNKNOWN
        return intervals.of_mean(values, level=level, scale=scale)

    return statistic


def mean_effect(score: Score, pairs: Sequence[tuple[Choice, Choice]]) -> Statistic:
    """Return the mean over seeds of a difference that is itself a mean over pairs.

    Args:
      score: that is compared.
      pairs: of choices, with what has the effect and without, all else equal.
    """

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        flat = _together(runs, score, *(choice for pair in pairs for choice in pair))
        changes = [
            [a - b for a, b in zip(on, off, strict=True)]
            for on, off in zip(flat[::2], flat[1::2], strict=True)
        ]
        of_seeds = zip(*changes, strict=True)
        return intervals.of_mean([sum(c) / len(c) for c in of_seeds], level=level)

    return statistic


def spread(score: Score, choice: Choice) -> Statistic:
    """Return the mean of a score over seeds, from the least to the greatest."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        del level  # it is not a confidence interval
        return spread_of(_scores(runs, score, choice))

    return statistic


def spread_of(values: Sequence[float]) -> Interval:
    """Return the mean of values, from the least to the greatest."""
    least, greatest = min(values), max(values)
    # Rounding may put the mean of equal values beside them.
    mean = min(max(sum(values) / len(values), least), greatest)
    return Interval(mean, least, greatest, len(values))


def exactly(value: Callable[[Runs], float]) -> Statistic:
    """Return a single number, which is taken as exact."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        del level  # it is not a confidence interval
        found = value(runs)
        return Exact(found, found, found, 1)

    return statistic


def largest(score: Score, choice: Choice) -> Statistic:
    """Return the largest of a score over seeds, which is taken as exact."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        del level  # it is not a confidence interval
        values = _scores(runs, score, choice)
        return Exact(*[max(values)] * 3, len(values))

    return statistic


def largest_difference(
    values: Callable[[Row], Sequence[float]], *choices: Choice
) -> Statistic:
    """Return how far apart choices are in any value from the same seed, at most.

    It is taken as exact.

    Args:
      values: of a run, such as its losses by step.
      *choices: two or more.
    """

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        del level  # it is not a confidence interval
        of_seeds = list(zip(*_rows_together(runs, *choices), strict=True))
        value = max(
            max(at_once) - min(at_once)
            for rows in of_seeds
            for at_once in zip(*map(values, rows), strict=True)
        )
        return Exact(value, value, value, len(of_seeds))

    return statistic


def chosen(
    score: Score, among: Callable[[Any], bool], *, lowest: bool = False
) -> Callable[[Runs], Choice]:
    """Return a function that finds the choice with the best mean score.

    It is chosen on runs of their own, see `Study.choosing` and `Study.rates`, and
    judged on others. A choice that was tried at several learning rates counts by the
    best of them.

    Args:
      score: that counts.
      among: whether a choice takes part.
      lowest: whether the lowest mean is the best, as of a loss.
    """
    best = min if lowest else max

    def find(runs: Runs) -> Choice:
        means = {}
        for choice in filter(among, runs.choosing):
            by_rate: dict[Any, list[float]] = {}
            for row in runs.choosing[choice]:
                rate = row.get("config", {}).get("learning_rate")
                by_rate.setdefault(rate, []).append(score(row))
            means[choice] = best(sum(of) / len(of) for of in by_rate.values())
        if not means:
            raise NotTrained("none of the choices")
        return best(means, key=means.__getitem__)

    return find


def _rows_together(runs: Runs, *choices: Choice) -> list[list[Row]]:
    """Return the rows of choices at the seeds that all of them have, in order."""
    rows = [runs.find(choice) for choice in choices]
    common = set.intersection(*({seed_of(row) for row in of} for of in rows))
    return [[row for row in of if seed_of(row) in common] for of in rows]


def _together(runs: Runs, score: Score, *choices: Choice) -> list[list[float]]:
    """Return the scores of each choice, at the seeds that all choices share."""
    return [[score(row) for row in of] for of in _rows_together(runs, *choices)]


def _scores(runs: Runs, score: Score, choice: Choice) -> list[float]:
    return [score(row) for row in runs.find(choice)]
