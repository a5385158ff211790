"""What a number, with its interval, says of a claim."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from bn_jax.analysis.intervals import Interval


class Verdict(NamedTuple):
    """A claim, the statistic that decides it, and how it came out."""

    claim: str
    statistic: str  # what `interval` is of, with its unit
    interval: Interval
    relation: Literal[">", "<"]  # of the statistic to the threshold, by the claim
    threshold: float
    reason: str  # for the threshold
    verdict: Literal["supported", "refuted", "undecided"]

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict that JSON can hold; infinite bounds are None."""
        bounds = {
            name: value if abs(value) < float("inf") else None
            for name, value in self.interval._asdict().items()
        }
        own = self._asdict()
        del own["interval"]
        return {**own, **bounds}


def decide(
    claim: str,
    statistic: str,
    interval: Interval,
    relation: Literal[">", "<"],
    threshold: float,
    *,
    reason: str,
) -> Verdict:
    """Return the verdict: whether all, none or some of the interval is as claimed.

    Args:
      claim: in a sentence.
      statistic: what decides it, with its unit.
      interval: of the statistic.
      relation: that the claim says the statistic has to the threshold.
      threshold: fixed before the run.
      reason: for the threshold.
    """
    low, high = interval.low, interval.high
    if relation == "<":
        low, high, limit = -high, -low, -threshold
    else:
        limit = threshold
    verdict: Literal["supported", "refuted", "undecided"] = "undecided"
    if low > limit:
        verdict = "supported"
    elif high <= limit:
        verdict = "refuted"
    return Verdict(claim, statistic, interval, relation, threshold, reason, verdict)
