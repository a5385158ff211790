"""Judging a study several times as its seeds come in, without being fooled by it.

Who looks at 5, 10 and 20 seeds and stops as soon as an interval of 95% decides, decides
wrongly in more than 5% of studies. The intervals of each look are therefore wider, so
that all looks together are wrong in 5%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments import intervals
from experiments.intervals import Interval

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


def once(seeds: int) -> Looks:
    """Return a single look."""
    return Looks((seeds,), 1 - OVERALL)


# The levels are those at which `simulate` finds 5% of wrong decisions; see the tests.
LOOKS = Looks((5, 10, 20), 0.98)
AFTER_CHOOSING = LOOKS._replace(first_seed=5)
COSTLY = Looks((4, 8, 12), 0.98)


class Simulated(NamedTuple):
    """How made-up studies ended."""

    decided: float  # share of studies in which a look's interval excludes 0
    mean_seeds: float  # until then, or at the last look


def simulate(
    looks: Looks,
    effect: float,
    *,
    studies: int,
    seed: int = 0,
    interval: Callable[..., Interval] = intervals.of_mean,
    draw: Callable[..., np.ndarray] = np.random.Generator.standard_normal,
) -> Simulated:
    """Return how often looks at made-up differences decide on which side of 0 they are.

    With no effect that is the share of wrong decisions; with one it is the power.

    Args:
      looks: when to judge.
      effect: mean of the differences, in standard deviations.
      studies: how many to make up.
      seed: of the random numbers.
      interval: of a look.
      draw: gives differences without an effect, as `draw(generator, shape)`.
    """
    made_up = effect + draw(np.random.default_rng(seed), (studies, looks.seeds[-1]))
    decided, seeds = 0, 0
    for values in made_up:
        for n in looks.seeds:
            _, low, high, _ = interval(values[:n].tolist(), level=looks.level)
            if low > 0 or high < 0:
                decided += 1
                break
        seeds += n
    return Simulated(decided / studies, seeds / studies)


def power(effect: float, n: int, *, level: float = intervals.LEVEL) -> float:
    """Return how often the t interval of n values excludes 0.

    Args:
      effect: mean in standard deviations.
      n: number of values, at least 2.
      level: of the interval.
    """
    from scipy import stats

    quantile = stats.t.ppf((1 + level) / 2, n - 1)
    distribution = stats.nct(n - 1, effect * np.sqrt(n))
    return float(distribution.sf(quantile) + distribution.cdf(-quantile))


def false_discoveries(p_values: Sequence[float]) -> list[float]:
    """Return, for each p value, the share of false ones among those as small as it.

    The bound of Benjamini and Hochberg (1995), for tests that are independent or depend
    on each other positively.
    """
    from scipy import stats

    return [float(q) for q in stats.false_discovery_control(p_values)]
