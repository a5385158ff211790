import numpy as np
import pytest

from experiments import intervals, sequential
from experiments.sequential import COSTLY, LOOKS


@pytest.mark.parametrize("looks", [LOOKS, COSTLY])
def test_looks_together_are_wrong_in_5_percent_of_studies(looks):
    found = sequential.simulate(looks, 0.0, studies=2_000)
    # The share of 2,000 has a deviation of .005.
    assert found.decided == pytest.approx(sequential.OVERALL, abs=0.015)
    # With an effect of a deviation, or two, most decide, at few seeds.
    effect = {LOOKS: 1.0, COSTLY: 2.0}[looks]
    found = sequential.simulate(looks, effect, studies=500)
    assert found.decided > 0.95
    assert found.mean_seeds < 0.7 * looks.seeds[-1]


def test_looks_at_95_percent_each_would_be_wrong_more_often():
    eager = LOOKS._replace(level=0.95)
    assert sequential.simulate(eager, 0.0, studies=1_000).decided > 0.08


@pytest.mark.parametrize("interval", [intervals.by_ranks, intervals.of_median])
def test_looks_by_ranks_or_signs_are_wrong_no_more_often(interval):
    found = sequential.simulate(
        LOOKS,
        0.0,
        studies=1_000,
        interval=interval,
        draw=np.random.Generator.standard_cauchy,
    )
    assert found.decided <= sequential.OVERALL
    decided = sequential.simulate(LOOKS, 2.0, studies=200, interval=interval)
    assert decided.decided > 0.95


def test_power_is_that_of_simulated_studies():
    once = sequential.once(6)
    assert sequential.power(0.0, 6) == pytest.approx(0.05)
    found = sequential.simulate(once, 1.2, studies=2_000)
    assert found.decided == pytest.approx(sequential.power(1.2, 6), abs=0.035)
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
