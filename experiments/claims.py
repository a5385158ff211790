"""Claims as data: a statistic of runs, a bound on it, and the verdict.

A statistic is a function from `Runs` to an interval, made by `mean`, `paired` and the
others below, or written out. A claim is judged only where all runs that its statistic
needs were trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments import intervals
from experiments.intervals import Interval
from experiments.scores import NotTrained, Row, Runs, Score

Outcome = Literal["supported", "refuted", "undecided"]
Statistic = Callable[[Runs], Interval]
# The choice whose runs are meant, or a function that finds it, such as `best`.
Choice = Any

# What several studies measure, and reasons for their bounds.
LOSS_DIFFERENCE = "paired difference of the training loss, nats"
THE_SIGN = "the sign is the claim"
TWO_DEVIATIONS = "two standard deviations of the published re-runs"


class Verdict(NamedTuple):
    """A claim, the statistic that decides it, and how it came out."""

    claim: str
    statistic: str  # what `interval` is of, with its unit
    interval: Interval
    threshold: str  # what is claimed of the statistic, such as "> 0"
    reason: str  # for the threshold
    verdict: Outcome

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict that JSON can hold; what is not finite is None."""
        numbers = {
            name: value if math.isfinite(value) else None
            for name, value in self.interval._asdict().items()
        }
        return {
            "claim": self.claim,
            "statistic": self.statistic,
            **numbers,
            "threshold": self.threshold,
            "reason": self.reason,
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that a statistic lies above a bound, below one, or between two.

    Attributes:
      text: the claim in a sentence.
      statistic: what decides it, in words with its unit.
      value: computes the statistic.
      above: the claim is that the statistic is greater; fixed before the run.
      below: the claim is that it is less; likewise.
      reason: for the bounds.
      needs: choices that must have been trained, besides those of `value`.
      words: functions of the runs that fill the braces in `text` and `statistic`, such
        as the name of the best arm.

    Raises:
      ValueError: if neither bound is given, or no number is between them.
    """

    text: str
    statistic: str
    _: dataclasses.KW_ONLY
    value: Statistic
    above: float = -math.inf
    below: float = math.inf
    reason: str
    needs: Sequence[Choice] = ()
    words: Mapping[str, Callable[[Runs], Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the bounds."""
        bounded = math.isfinite(self.above) or math.isfinite(self.below)
        if not bounded or not self.above < self.below:
            raise ValueError(
                f"above={self.above}, below={self.below}; give one bound, or two in "
                "order"
            )

    @property
    def threshold(self) -> str:
        """What is claimed of the statistic, such as "> 0"."""
        if math.isinf(self.below):
            return f"> {self.above:.4g}"
        if math.isinf(self.above):
            return f"< {self.below:.4g}"
        return f"in ({self.above:.4g}, {self.below:.4g})"

    def judge(self, runs: Runs) -> Verdict:
        """Return whether all, none or some of the interval is as claimed.

        An interval of NaN, of a statistic that could not be computed, decides nothing.

        Raises:
          NotTrained: if runs are missing.
        """
        for choice in self.needs:
            runs[choice]
        found = self.value(runs)
        verdict: Outcome = "undecided"
        if found.low > self.above and found.high < self.below:
            verdict = "supported"
        elif found.high <= self.above or found.low >= self.below:
            verdict = "refuted"
        words = {name: word(runs) for name, word in self.words.items()}
        texts = (text.format(**words) for text in (self.text, self.statistic))
        return Verdict(*texts, found, self.threshold, self.reason, verdict)


def judge(claims: Iterable[Claim], runs: Runs) -> list[Verdict]:
    """Return the verdicts on the claims whose runs were trained, in order."""
    found = []
    for claim in claims:
        try:
            found.append(claim.judge(runs))
        except NotTrained:
            continue
    return found


def mean(score: Score, choice: Choice) -> Statistic:
    """Return the mean of a score over seeds."""
    return lambda runs: intervals.of_mean(_scores(runs, score, choice))


def paired(score: Score, choice: Choice, other: Choice) -> Statistic:
    """Return the mean over seeds of a choice's score minus another's."""
    return lambda runs: intervals.of_difference(
        _scores(runs, score, choice), _scores(runs, score, other)
    )


def mean_effect(score: Score, pairs: Sequence[tuple[Choice, Choice]]) -> Statistic:
    """Return the mean over seeds of a difference that is itself a mean over pairs.

    Args:
      score: that is compared.
      pairs: of choices, with what has the effect and without, all else equal.
    """

    def statistic(runs: Runs) -> Interval:
        changes = [
            [
                a - b
                for a, b in zip(
                    _scores(runs, score, on), _scores(runs, score, off), strict=True
                )
            ]
            for on, off in pairs
        ]
        of_seeds = zip(*changes, strict=True)
        return intervals.of_mean([sum(c) / len(c) for c in of_seeds])

    return statistic


def spread(score: Score, choice: Choice) -> Statistic:
    """Return the mean of a score over seeds, from the least to the greatest."""

    def statistic(runs: Runs) -> Interval:
        return spread_of(_scores(runs, score, choice))

    return statistic


def spread_of(values: Sequence[float]) -> Interval:
    """Return the mean of values, from the least to the greatest."""
    return Interval(sum(values) / len(values), min(values), max(values), len(values))


def exactly(value: Callable[[Runs], float]) -> Statistic:
    """Return a single number, which is taken as exact."""

    def statistic(runs: Runs) -> Interval:
        found = value(runs)
        return Interval(found, found, found, 1)

    return statistic


def largest(score: Score, choice: Choice) -> Statistic:
    """Return the largest of a score over seeds, which is taken as exact."""

    def statistic(runs: Runs) -> Interval:
        values = _scores(runs, score, choice)
        return Interval(*[max(values)] * 3, len(values))

    return statistic


def largest_difference(
    values: Callable[[Row], Sequence[float]], *choices: Choice
) -> Statistic:
    """Return how far apart choices are in any value from the same seed, at most.

    Args:
      values: of a run, such as its losses by step.
      *choices: two or more.
    """

    def statistic(runs: Runs) -> Interval:
        of_seeds = list(zip(*(runs.find(choice) for choice in choices), strict=True))
        value = max(
            max(at_once) - min(at_once)
            for rows in of_seeds
            for at_once in zip(*map(values, rows), strict=True)
        )
        return Interval(value, value, value, len(of_seeds))

    return statistic


def magnitude(statistic: Statistic) -> Statistic:
    """Return a statistic with the sign that makes it positive."""

    def positive(runs: Runs) -> Interval:
        value, low, high, n = statistic(runs)
        return (
            Interval(-value, -high, -low, n)
            if value < 0
            else Interval(value, low, high, n)
        )

    return positive


def best(
    score: Score, among: Callable[[Any], bool], *, lowest: bool = False
) -> Callable[[Runs], Choice]:
    """Return what finds the trained choice with the highest mean score.

    It is chosen on the same runs that it is then judged by, which favours it.

    Args:
      score: that counts.
      among: whether a choice takes part.
      lowest: whether the lowest mean is the best, as of a loss.
    """

    def find(runs: Runs) -> Choice:
        sums = {
            choice: sum(_scores(runs, score, choice))
            for choice in runs
            if among(choice)
        }
        if not sums:
            raise NotTrained("none of the choices")
        return (min if lowest else max)(sums, key=sums.__getitem__)

    return find


def _scores(runs: Runs, score: Score, choice: Choice) -> list[float]:
    return [score(row) for row in runs.find(choice)]
