"""What a number, with its interval, says of a claim."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from experiments.intervals import Interval

Outcome = Literal["supported", "refuted", "undecided"]


class Verdict(NamedTuple):
    """A claim, the statistic that decides it, and how it came out."""

    claim: str
    statistic: str  # what `interval` is of, with its unit
    interval: Interval
    least: float  # the claim is that the statistic is greater than this,
    greatest: float  # and less than this; one of them may be infinite
    reason: str  # for these thresholds
    verdict: Outcome

    @property
    def threshold(self) -> str:
        """What is claimed of the statistic, such as "> 0"."""
        if math.isinf(self.greatest):
            return f"> {self.least:.4g}"
        if math.isinf(self.least):
            return f"< {self.greatest:.4g}"
        return f"in ({self.least:.4g}, {self.greatest:.4g})"

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


def decide(
    claim: str,
    statistic: str,
    interval: Interval,
    *,
    reason: str,
    above: float = -math.inf,
    below: float = math.inf,
) -> Verdict:
    """Return the verdict: whether all, none or some of the interval is as claimed.

    Args:
      claim: in a sentence.
      statistic: what decides it, with its unit.
      interval: of the statistic; NaN, where it could not be had, decides nothing.
      reason: for the threshold.
      above: the claim is that the statistic is greater; fixed before the run.
      below: the claim is that it is less; likewise.

    Raises:
      ValueError: if neither threshold is given, or no number is between them.
    """
    if not (math.isfinite(above) or math.isfinite(below)) or not above < below:
        raise ValueError(
            f"above={above}, below={below}; give one threshold, or two in order"
        )
    verdict: Outcome = "undecided"
    if interval.low > above and interval.high < below:
        verdict = "supported"
    elif interval.high <= above or interval.low >= below:
        verdict = "refuted"
    return Verdict(claim, statistic, interval, above, below, reason, verdict)
