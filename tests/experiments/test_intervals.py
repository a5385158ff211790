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


# On scales.


def test_mean_on_a_scale_is_brought_back():
    # Of logarithms 0 and 2 log 3 the mean is log 3.
    found = intervals.of_mean([1.0, 9.0], scale=intervals.LOG)
    assert found.value == pytest.approx(3.0)
    assert 0 < found.low < 3 < found.high
    # Odds of 1/9 and 9, whose geometric mean is 1.
    found = intervals.of_mean([0.1, 0.9], scale=intervals.LOGIT)
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low < 0.5 < found.high <= 1


def test_difference_on_a_scale_is_a_ratio():
    found = intervals.of_difference([2.0, 8.0], [1.0, 2.0], scale=intervals.LOG)
    assert found.value == pytest.approx(math.sqrt(2 * 4))
    found = intervals.of_difference([0.5, 0.5], [0.2, 0.2], scale=intervals.LOGIT)
    assert found == pytest.approx((4.0, 4.0, 4.0, 2))  # odds of 1 and 1/4


def test_single_value_on_a_scale_may_be_anything_there():
    found = intervals.of_mean([0.3], scale=intervals.LOGIT)
    assert found == pytest.approx((0.3, 0.0, 1.0, 1))
    found = intervals.of_mean([3.0], scale=intervals.LOG)
    assert (found.low, found.high) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("scale", "value"),
    [(intervals.LOGIT, 1.0), (intervals.LOGIT, 0.0), (intervals.LOG, -1.0)],
)
def test_value_that_is_not_on_the_scale_is_refused(scale, value):
    with pytest.raises(ValueError, match=f"{value} cannot be put on the scale"):
        intervals.of_mean([0.5, value], scale=scale)


def test_residuals_of_samples_that_are_alike_are_pooled():
    from scipy import stats

    a, b = [1.0, 3.0, 2.5], [10.0, 10.5, 12.0, 11.0]
    found = intervals.of_mean(a, alike=[b], level=0.9)
    squares = sum((x - np.mean(s)) ** 2 for s in (a, b) for x in s)
    half = stats.t.ppf(0.95, 5) * math.sqrt(squares / 5 / 3)
    mean = np.mean(a)
    assert found == pytest.approx((mean, mean - half, mean + half, 3))
    # One value and another sample: its spread is known after all.
    assert math.isfinite(intervals.of_mean([1.0], alike=[b]).high)


# By ranks, by signs, and of shares.


@pytest.mark.parametrize("n", [3, 6, 7, 12])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.98])
def test_interval_by_ranks_holds_what_wilcoxons_test_does_not_reject(n, level):
    from scipy import stats

    x = np.random.default_rng(n).normal(0.3, 1, n)
    value, low, high, _ = intervals.by_ranks(x.tolist(), level=level)
    pairs = [(x[i] + x[j]) / 2 for i in range(n) for j in range(i, n)]
    assert value == pytest.approx(np.median(pairs))

    def rejects(centre):
        p = stats.wilcoxon(x - centre, method="exact").pvalue
        return p <= 1 - level + 1e-12

    if math.isinf(low):
        assert 0.5**n * 2 > 1 - level  # no sample of this size is rejected
        assert not rejects(x.max() + 1)
        return
    assert rejects(low - 1e-6)
    assert not rejects(low + 1e-6)
    assert rejects(high + 1e-6)
    assert not rejects(high - 1e-6)


@pytest.mark.parametrize("n", [5, 7, 10, 20])
def test_interval_of_the_median_holds_what_the_sign_test_does_not_reject(n):
    from scipy import stats

    x = np.random.default_rng(n).exponential(1, n)
    value, low, high, _ = intervals.of_median(x.tolist(), level=0.98)
    assert value == pytest.approx(np.median(x))

    def rejects(centre):
        return stats.binomtest(int((x > centre).sum()), n).pvalue <= 0.02

    if n == 5:
        assert (low, high) == (-math.inf, math.inf)
        return
    assert rejects(low - 1e-9)
    assert not rejects(low + 1e-9)
    assert rejects(high + 1e-9)
    assert not rejects(high - 1e-9)


def test_median_takes_values_of_which_only_a_bound_is_known():
    values = [2.0, math.inf, 3.0, math.inf, 2.5, 1.0, math.inf, 2.2]
    value, low, high, n = intervals.of_median(values, level=0.95)
    assert (value, low, high, n) == (2.75, 1.0, math.inf, 8)
    assert intervals.of_median([math.inf] * 9, level=0.95)[:3] == (math.inf,) * 3
    with pytest.raises(ValueError, match="between -inf and inf"):
        intervals.of_median([-math.inf, math.inf])
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        intervals.of_median([math.nan, 1.0])


@pytest.mark.parametrize("of", [intervals.by_ranks, intervals.of_median])
def test_interval_without_normality_holds_the_centre_as_often_as_it_says(of):
    rng = np.random.default_rng(1)
    found = [of(rng.standard_cauchy(8).tolist(), level=0.95) for _ in range(2_000)]
    share = np.mean([i.low < 0 < i.high for i in found])
    assert share > 0.94  # or more, as counts are whole numbers
