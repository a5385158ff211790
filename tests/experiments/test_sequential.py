from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from experiments import intervals, sequential
from experiments.sequential import COSTLY, LOOKS, Looks


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
    interval: Callable[..., intervals.Interval] = intervals.of_mean,
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
    quantile = stats.t.ppf((1 + level) / 2, n - 1)
    distribution = stats.nct(n - 1, effect * np.sqrt(n))
    return float(distribution.sf(quantile) + distribution.cdf(-quantile))


@pytest.mark.parametrize("looks", [LOOKS, COSTLY])
def test_looks_together_are_wrong_in_5_percent_of_studies(looks):
    found = simulate(looks, 0.0, studies=2_000)
    # The share of 2,000 has a deviation of .005.
    assert found.decided == pytest.approx(sequential.OVERALL, abs=0.015)
    # With an effect of a deviation, or two, most decide, at few seeds.
    effect = {LOOKS: 1.0, COSTLY: 2.0}[looks]
    found = simulate(looks, effect, studies=500)
    assert found.decided > 0.95
    assert found.mean_seeds < 0.7 * looks.seeds[-1]


def test_looks_at_95_percent_each_would_be_wrong_more_often():
    eager = LOOKS._replace(level=0.95)
    assert simulate(eager, 0.0, studies=1_000).decided > 0.08


@pytest.mark.parametrize("interval", [intervals.by_ranks, intervals.of_median])
def test_looks_by_ranks_or_signs_are_wrong_no_more_often(interval):
    found = simulate(
        LOOKS,
        0.0,
        studies=1_000,
        interval=interval,
        draw=np.random.Generator.standard_cauchy,
    )
    assert found.decided <= sequential.OVERALL
    decided = simulate(LOOKS, 2.0, studies=200, interval=interval)
    assert decided.decided > 0.95


def test_power_is_that_of_simulated_studies():
    once = Looks((6,), 0.95)
    assert power(0.0, 6) == pytest.approx(0.05)
    found = simulate(once, 1.2, studies=2_000)
    assert found.decided == pytest.approx(power(1.2, 6), abs=0.035)
    assert found.mean_seeds == 6


def test_looks_until_a_number_of_seeds():
    assert LOOKS.until(20) == LOOKS
    assert LOOKS.until(12).seeds == (5, 10)
    assert LOOKS.until(3).seeds == (3,)
    assert LOOKS.inflation == pytest.approx(2.5)


def test_false_discoveries_are_benjamini_and_hochbergs():
    # Their p times the number of tests by the rank; of 0.04, that of 0.05.
    found = sequential.false_discoveries([0.01, 0.05, 0.04, 0.9])
    assert found == pytest.approx([0.04, 0.05 * 4 / 3, 0.05 * 4 / 3, 0.9])
    # Of 2,000 made-up families of 40 tests, half without an effect, the mean share of
    # false ones among the discoveries at .1 is at most .1.
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(2_000):
        p = np.concatenate([rng.uniform(size=20), rng.uniform(size=20) ** 6])
        discovered = np.asarray(sequential.false_discoveries(p.tolist())) <= 0.1
        shares.append(discovered[:20].sum() / max(1, discovered.sum()))
    assert np.mean(shares) <= 0.1
