"""Claims as data: a statistic of runs, a bound on it, and the verdict.

A claim is judged only where all runs that its statistic needs were trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments import intervals
from experiments.estimate import Choice, Statistic
from experiments.intervals import Exact, Interval
from experiments.scores import NotTrained, Runs

Outcome = Literal["supported", "refuted", "undecided"]

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
        Neither does a single observation, unless the statistic is exact.

        Raises:
          NotTrained: if runs are missing.
          ValueError: if the statistic is no interval; see `intervals.check`.
        """
        for choice in self.needs:
            runs[choice]
        found = self.value(runs)
        intervals.check(found)
        decides = found.n > 1 or isinstance(found, Exact)
        verdict: Outcome = "undecided"
        if decides and found.low > self.above and found.high < self.below:
            verdict = "supported"
        elif decides and (found.high <= self.above or found.low >= self.below):
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
