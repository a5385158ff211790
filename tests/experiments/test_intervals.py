import math

import numpy as np
import pytest

from experiments import intervals
from experiments.claims import decide
from experiments.intervals import Interval


def test_mean_of_three_has_students_interval():
    # Mean 2, deviation 1, and t_{.975} with 2 degrees of freedom is 4.302653.
    found = intervals.of_mean([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3), rel=1e-6)


def test_one_run_says_nothing_of_the_spread():
    assert intervals.of_mean([0.3]) == (0.3, -math.inf, math.inf, 1)


def test_what_a_pair_has_in_common_cancels():
    seeds = np.array([0.0, 100.0, -50.0])
    # Differences 1, 1 and 1: no spread at all.
    assert intervals.of_difference(seeds + 1, seeds) == (1.0, 1.0, 1.0, 3)
    with pytest.raises(ValueError, match="2 values and 3 cannot be paired"):
        intervals.of_difference([1, 2], [1, 2, 3])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_a_mean_holds_it_as_often_as_it_says(level):
    rng = np.random.default_rng(0)
    found = [intervals.of_mean(rng.normal(3, 2, 5), level=level) for _ in range(2_000)]
    share = np.mean([i.low < 3 < i.high for i in found])
    # The share of 2,000 trials has a deviation below .01.
    assert share == pytest.approx(level, abs=0.03)


def test_share_has_wilsons_interval():
    # p = .8, n = 10, z = 1.959964: centre (p + z^2 / 2n) / (1 + z^2 / n) = .716748,
    # half width z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n) = .226584.
    found = intervals.of_share(8, 10)
    assert found == pytest.approx((0.8, 0.490164, 0.943332, 10), abs=2e-5)
    assert intervals.of_share(0, 10).low == 0
    # A test accuracy near .88 of 10,000 images is known to .0064, two errors of .0032.
    accuracy = intervals.of_share(8_800, 10_000)
    assert accuracy.high - accuracy.low == pytest.approx(4 * 0.00325, rel=0.03)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_share_beyond_its_trials_is_refused(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes of {trials} trials"):
        intervals.of_share(successes, trials)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    x = np.random.default_rng(1).normal(0, 1, 400)
    found = intervals.by_bootstrap(x, np.mean, resamples=2_000)
    half = 1.96 * x.std() / 20
    assert found.value == x.mean()
    assert found.low == pytest.approx(x.mean() - half, abs=0.015)
    assert found.high == pytest.approx(x.mean() + half, abs=0.015)


def test_bootstrap_keeps_a_runs_numbers_together():
    runs = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    found = intervals.by_bootstrap(runs, lambda x: float(x[:, 1].sum() / x[:, 0].sum()))
    assert found == (10.0, 10.0, 10.0, 3)


def test_bootstrap_repeats_itself():
    values = [1.0, 5.0, 2.0, 8.0]
    first, again = (intervals.by_bootstrap(values, np.median) for _ in range(2))
    assert first == again
    assert intervals.by_bootstrap(values, np.median, seed=1) != first or first.n == 4


def test_runs_that_diverged_are_not_averaged_in_silence():
    with pytest.raises(ValueError, match="of 3 values 1 are not finite"):
        intervals.of_mean([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="no values"):
        intervals.of_mean([])


@pytest.mark.parametrize(
    ("low", "high", "thresholds", "expected"),
    [
        (0.1, 0.3, {"above": 0.0}, "supported"),
        (-0.1, 0.3, {"above": 0.0}, "undecided"),
        (-0.3, -0.1, {"above": 0.0}, "refuted"),
        (0.0, 0.0, {"above": 0.0}, "refuted"),
        (0.1, 0.3, {"below": 0.5}, "supported"),
        (0.1, 0.6, {"below": 0.5}, "undecided"),
        (0.6, 0.7, {"below": 0.5}, "refuted"),
        (0.1, 0.3, {"above": 0.0, "below": 0.5}, "supported"),
        (-0.1, 0.6, {"above": 0.0, "below": 0.5}, "undecided"),
        (0.5, 0.6, {"above": 0.0, "below": 0.5}, "refuted"),
        (-math.inf, math.inf, {"above": 0.0}, "undecided"),
        (math.nan, math.nan, {"above": 0.0}, "undecided"),
    ],
)
def test_verdict_is_by_the_whole_interval(low, high, thresholds, expected):
    interval = Interval((low + high) / 2, low, high, 3)
    verdict = decide("a", "b", interval, reason="c", **thresholds)
    assert verdict.verdict == expected


def test_verdict_is_written_as_json_holds_it():
    verdict = decide("a", "b", intervals.of_mean([0.5]), reason="c", above=0.25)
    assert verdict.to_dict() == {
        "claim": "a",
        "statistic": "b",
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 1,
        "threshold": "> 0.25",
        "reason": "c",
        "verdict": "undecided",
    }


@pytest.mark.parametrize("thresholds", [{}, {"above": 1.0, "below": 0.0}])
def test_verdict_without_a_threshold_is_refused(thresholds):
    with pytest.raises(ValueError, match="give one threshold, or two in order"):
        decide("a", "b", intervals.of_mean([1, 2]), reason="c", **thresholds)
