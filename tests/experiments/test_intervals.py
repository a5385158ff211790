import math

import numpy as np
import pytest

from experiments import intervals


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


def test_runs_that_diverged_are_not_averaged_in_silence():
    with pytest.raises(ValueError, match="1 of 3 values are not finite"):
        intervals.of_mean([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="no values"):
        intervals.of_mean([])


@pytest.mark.parametrize("level", [95, 0.0, 1.0, -0.5, math.nan])
def test_level_that_is_no_share_is_refused(level):
    for values in ([1.0], [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"level=.*share in \(0, 1\), such as 0"):
            intervals.of_mean(values, level=level)
