"""Judging a study several times as its seeds come in, without being fooled by it.

Who looks at 5, 10 and 20 seeds and stops as soon as an interval of 95% decides, decides
wrongly in more than 5% of studies. The intervals of each look are therefore wider, so
that all looks together are wrong in 5%.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OVERALL = 0.05  # share of studies without an effect that all looks together decide


class Looks(NamedTuple):
    """When a study is judged, and how sure each look has to be."""

    seeds: tuple[int, ...]  # how many each look is at, in order
    level: float  # confidence of its intervals
    first_seed: int = 0  # that judges; lower ones may have chosen what is compared

    def until(self, seeds: int) -> Looks:
        """Return the looks at no more than so many seeds; at least one."""
        kept = tuple(n for n in self.seeds if n <= seeds)
        return self._replace(seeds=kept or (seeds,))

    @property
    def inflation(self) -> float:
        """How much more often all looks are wrong than one of them, at most."""
        return OVERALL / (1 - self.level)


# The levels are those at which simulated studies are wrong in 5%; see the tests.
LOOKS = Looks((5, 10, 20), 0.98)
AFTER_CHOOSING = LOOKS._replace(first_seed=5)
COSTLY = Looks((4, 8, 12), 0.98)


def false_discoveries(p_values: Sequence[float]) -> list[float]:
    """Return, for each p value, the share of false ones among those as small as it.

    The bound of Benjamini and Hochberg (1995), for tests that are independent or depend
    on each other positively.
    """
    from scipy import stats

    return [float(q) for q in stats.false_discovery_control(p_values)]
