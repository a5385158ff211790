"""Claims as data: a statistic of runs, a bound on it, and the verdict.

A claim is judged only where all runs that its statistic needs were trained. It is
judged at several looks, as seeds come in, and the first that decides is its verdict;
see `experiments.sequential`. What is exact, or measured once, is a check: it holds or
fails, and is listed apart.
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
from experiments.sequential import Looks

Outcome = Literal["supported", "refuted", "undecided", "holds", "fails"]
CHECKED: tuple[Outcome, ...] = ("holds", "fails")
LEAST_P = 1e-12  # smaller ones are not told apart

# What several studies measure, and reasons for their bounds.
LOSS_DIFFERENCE = "paired difference of the training loss, nats"
THE_SIGN = "the sign is the claim"
TWO_DEVIATIONS = "two standard deviations of the published re-runs"


class Verdict(NamedTuple):
    """A claim, the statistic that decides it, and how it came out."""

    claim: str
    statistic: str  # what `interval` is of, with its unit
    interval: Interval
    above: float  # it is claimed that the statistic lies between these
    below: float
    reason: str  # for the bounds
    verdict: Outcome
    level: float | None = None  # confidence of the interval; None of a check
    # How often a decision as clear as this one is wrong, over all looks; None of a
    # check, and where nothing could be computed.
    p: float | None = None
    used: frozenset[Any] = frozenset()  # choices whose runs were used

    @property
    def threshold(self) -> str:
        """What is claimed of the statistic, such as "> 0"."""
        if math.isinf(self.below):
            return f"> {self.above:.4g}"
        if math.isinf(self.above):
            return f"< {self.below:.4g}"
        return f"in ({self.above:.4g}, {self.below:.4g})"

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
            "level": self.level,
            "p": self.p,
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
      key: by which findings refer to its number.
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
    key: str = ""
    words: Mapping[str, Callable[[Runs], Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the bounds."""
        bounded = math.isfinite(self.above) or math.isfinite(self.below)
        if not bounded or not self.above < self.below:
            raise ValueError(
                f"above={self.above}, below={self.below}; give one bound, or two in "
                "order"
            )

    def judge(self, runs: Runs, looks: Looks) -> Verdict:
        """Return the verdict of the first look that decides, or of the last one.

        A look is one at as many seeds as it says, where all that are used were trained.

        Raises:
          NotTrained: if runs are missing for the first look.
          ValueError: if the statistic is not an interval; see `intervals.check`.
        """
        verdict = None
        for count in looks.seeds:
            try:
                verdict = self._look(runs.look(looks.first_seed, count), looks)
            except NotTrained:
                if verdict is None:
                    raise
                break
            if verdict.verdict != "undecided":
                break
        assert verdict is not None  # there is at least one look
        return verdict

    def _look(self, runs: Runs, looks: Looks) -> Verdict:
        """Return the verdict at a look."""
        for choice in self.needs:
            runs[choice]
        found = self.value(runs, level=looks.level)
        words = {name: word(runs) for name, word in self.words.items()}
        texts = [text.format(**words) for text in (self.text, self.statistic)]
        about = (*texts, found, self.above, self.below, self.reason)
        used = frozenset(runs.used)
        if isinstance(found, Exact):
            holds = self.outcome(found) == "supported"
            return Verdict(*about, CHECKED[0 if holds else 1], used=used)
        p = self._p(runs, looks)
        return Verdict(*about, self.outcome(found), looks.level, p, used)

    def outcome(self, found: Interval) -> Outcome:
        """Return whether all, none or some of an interval is as claimed.

        An interval of NaN, of a statistic that could not be computed, decides nothing.
        Neither does a single observation, unless the statistic is exact.

        Raises:
          ValueError: if it is not an interval.
        """
        intervals.check(found)
        if not (found.n > 1 or isinstance(found, Exact)):
            return "undecided"
        # An end may be infinite: a bound of which nothing is claimed is no bound.
        above = math.isinf(self.above) or found.low > self.above
        below = math.isinf(self.below) or found.high < self.below
        if above and below:
            return "supported"
        if found.high <= self.above or found.low >= self.below:
            return "refuted"
        return "undecided"

    def _p(self, runs: Runs, looks: Looks) -> float | None:
        """Return the least chance of error at which runs decide, for all looks."""

        def decides(p: float) -> bool:
            return self.outcome(self.value(runs, level=1 - p)) != "undecided"

        if math.isnan(self.value(runs, level=looks.level).value):
            return None
        low, high = LEAST_P, 1 - LEAST_P
        if not decides(high):
            return 1.0
        if decides(low):
            high = low
        while high > 1.001 * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if decides(middle) else (middle, high)
        return min(1.0, high * looks.inflation)


def judge(claims: Iterable[Claim], runs: Runs, looks: Looks) -> list[Verdict]:
    """Return the verdicts on the claims whose runs were trained, in order."""
    found = []
    for claim in claims:
        try:
            found.append(claim.judge(runs, looks))
        except NotTrained:
            continue
    return found
