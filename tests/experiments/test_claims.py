import math

import pytest

from experiments import claims, estimate, scores, sequential
from experiments.claims import Claim
from experiments.intervals import Interval
from experiments.scores import NotTrained, Runs


def runs(**losses):
    """Runs by arm, with these losses by seed; the last seed comes first."""
    rows = [
        {"arm": arm, "seed": seed, "loss": [9.0, loss]}
        for arm, of_arm in losses.items()
        for seed, loss in reversed(list(enumerate(of_arm)))
    ]
    return Runs.of(rows, scores.arm_of)


def once(seeds):
    """A single look."""
    return sequential.Looks((seeds,), 0.95)


ONCE = once(2)


def claim(value, **bounds):
    return Claim("it learns", "loss, nats", value=value, reason="why", **bounds)


# Scores.


def test_runs_of_a_choice_are_in_order_of_seeds_and_choices_as_they_come():
    found = runs(b=[1.0, 2.0, 3.0], a=[4.0])
    assert list(found) == ["b", "a"]
    assert [row["seed"] for row in found["b"]] == [0, 1, 2]
    assert len(found.rows) == 4
    assert list(found.where(lambda arm: arm == "a")) == ["a"]
    assert found.find(lambda runs: "a") is found["a"]
    with pytest.raises(NotTrained):
        found["c"]


def test_score_of_a_run_that_diverged_is_that_of_guessing():
    assert scores.loss({"loss": [2.0, None]}) == pytest.approx(2.302585)
    assert scores.loss({"loss": [2.0, 0.5]}) == 0.5
    assert scores.final("small_loss")({"small_loss": None}) == pytest.approx(2.302585)
    assert scores.train_accuracy({"train_accuracy": [0.5, None]}) == 0.1


def test_test_accuracy_is_by_the_least_noisy_statistics():
    row = {"test_accuracy": [0.5, 0.6], "test_accuracy_batch": 0.7}
    assert scores.test_accuracy(row) == 0.7
    assert scores.test_accuracy({**row, "test_accuracy_exact": 0.8}) == 0.8
    assert scores.test_accuracy({"test_accuracy": [0.5, 0.6]}) == 0.6
    assert scores.test_accuracy({"test_accuracy": [0.5, None]}) == 0.1
    assert scores.test_accuracy({**row, "test_accuracy_batch": None}) == 0.1
    assert scores.moving_test_accuracy(row) == 0.6


# Statistics.


def test_paired_difference_is_by_seed():
    found = runs(a=[1.5, 2.5, 3.5], b=[1.0, 2.0, 3.0])
    # Seeds differ by 1, the pairs do not.
    assert estimate.paired(scores.loss, "a", "b")(found) == (0.5, 0.5, 0.5, 3)


def test_choices_are_compared_at_the_seeds_that_all_have():
    found = runs(a=[1.5, 2.5, 3.5], b=[1.0, 2.0])
    assert estimate.paired(scores.loss, "a", "b")(found) == (0.5, 0.5, 0.5, 2)
    apart = estimate.largest_difference(lambda row: row["loss"], "a", "b")
    assert apart(found) == (0.5, 0.5, 0.5, 2)
    effect = estimate.mean_effect(scores.loss, [("a", "b")])
    assert effect(found) == (0.5, 0.5, 0.5, 2)


def test_statistic_of_what_was_not_trained_is_refused():
    for statistic in (
        estimate.mean(scores.loss, "b"),
        estimate.paired(scores.loss, "a", "b"),
        estimate.spread(scores.loss, "b"),
        estimate.largest(scores.loss, "b"),
        estimate.largest_difference(lambda row: row["loss"], "a", "b"),
        estimate.paired(
            scores.loss, "a", estimate.chosen(scores.loss, lambda arm: arm == "b")
        ),
    ):
        with pytest.raises(NotTrained):
            statistic(runs(a=[1.0, 2.0]))


def test_mean_has_an_interval_and_spread_has_a_range():
    found = runs(a=[1.0, 3.0, 2.0])
    # Mean 2, deviation 1, and t_{.975} with 2 degrees of freedom is 4.302653.
    half = 4.302653 / math.sqrt(3)
    expected = pytest.approx((2.0, 2.0 - half, 2.0 + half, 3), rel=1e-6)
    assert estimate.mean(scores.loss, "a")(found) == expected
    assert estimate.spread(scores.loss, "a")(found) == (2.0, 1.0, 3.0, 3)
    assert estimate.largest(scores.loss, "a")(found) == (3.0, 3.0, 3.0, 3)


def test_largest_difference_is_over_choices_of_one_seed_and_all_values():
    found = runs(a=[1.0, 5.0], b=[1.5, 5.25], c=[1.25, 5.0])
    statistic = estimate.largest_difference(lambda row: row["loss"], "a", "b", "c")
    assert statistic(found) == (0.5, 0.5, 0.5, 2)
    found["c"][1]["loss"][0] = 7.0  # 9 in the others
    assert statistic(found).value == 2.0


def test_best_is_the_choice_with_the_highest_or_lowest_mean_among_some():
    found = runs(a=[0.0], b=[0.0])
    found.choosing = runs(a=[1.0, 2.0], b=[5.0, 0.0], c=[9.0, 9.0])
    among = "ab".__contains__
    assert estimate.chosen(scores.loss, among)(found) == "b"
    assert estimate.chosen(scores.loss, among, lowest=True)(found) == "a"
    found.choosing = runs(c=[9.0, 9.0])
    with pytest.raises(NotTrained):
        estimate.chosen(scores.loss, among)(found)


def test_choice_that_was_tried_at_several_rates_counts_by_its_best():
    found = runs(a=[0.0], b=[0.0])
    found.choosing = Runs(
        {
            arm: [
                {"loss": [loss], "config": {"seed": seed, "learning_rate": rate}}
                for rate, losses in by_rate.items()
                for seed, loss in enumerate(losses)
            ]
            for arm, by_rate in {
                "a": {0.1: [9.0, 8.0], 1.0: [1.0, 2.0]},
                "b": {0.1: [2.0, 3.0], 1.0: [3.0, 2.0]},
            }.items()
        }
    )
    everyone = lambda arm: True  # noqa: E731
    assert estimate.chosen(scores.loss, everyone, lowest=True)(found) == "a"
    assert estimate.chosen(scores.loss, everyone)(found) == "a"


def test_mean_effect_is_a_mean_over_pairs_for_each_seed():
    found = runs(on=[1.0, 2.0], off=[0.5, 1.0], on2=[1.0, 1.0], off2=[0.0, 0.5])
    pairs = [("on", "off"), ("on2", "off2")]
    # Seed 0: (.5 + 1) / 2; seed 1: (1 + .5) / 2.
    assert estimate.mean_effect(scores.loss, pairs)(found) == (0.75, 0.75, 0.75, 2)


# Claims.


@pytest.mark.parametrize(
    ("low", "high", "bounds", "expected"),
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
        (-math.inf, math.inf, {"below": 0.0}, "undecided"),
        (0.1, math.inf, {"above": 0.0}, "supported"),
        (0.6, math.inf, {"below": 0.5}, "refuted"),
        (-math.inf, -0.1, {"above": 0.0}, "refuted"),
    ],
)
def test_verdict_is_by_the_whole_interval(low, high, bounds, expected):
    middle = max(low, min(0.0, high))
    interval = Interval(middle, low, high, 3)
    found = claim(lambda runs, level: interval, **bounds).outcome(interval)
    assert found == expected


def test_statistic_that_could_not_be_computed_decides_nothing():
    unknown = Interval(math.nan, math.nan, math.nan, 0)
    found = claim(lambda runs, level: unknown, above=0.0).judge(runs(), ONCE)
    assert (found.verdict, found.p) == ("undecided", None)


@pytest.mark.parametrize(
    "interval",
    [
        Interval(0.5, 1.0, 2.0, 3),  # does not hold its value
        Interval(1.5, 2.0, 1.0, 3),  # upside down
        Interval(1.0, math.nan, 2.0, 3),
        Interval(math.nan, math.nan, math.nan, 3),
        Interval(1.0, 1.0, 1.0, 0),
    ],
)
def test_interval_that_is_none_is_refused(interval):
    with pytest.raises(ValueError, match="no interval; expected low <= value <= high"):
        claim(lambda runs, level: interval, above=0.0).judge(runs(), ONCE)


def test_one_run_decides_only_what_is_exact():
    found = runs(a=[1.0], b=[1.0])
    for statistic, expected in (
        (lambda runs, level: Interval(1.0, 1.0, 1.0, 1), "undecided"),
        (estimate.mean(scores.loss, "a"), "undecided"),
        (estimate.spread(scores.loss, "a"), "undecided"),
        (estimate.exactly(lambda runs: 1.0), "holds"),
        (estimate.largest(scores.loss, "a"), "holds"),
    ):
        one = once(1)
        assert claim(statistic, above=0.0).judge(found, one).verdict == expected
        other = "fails" if expected == "holds" else expected
        assert claim(statistic, below=0.0).judge(found, one).verdict == other
    apart = estimate.largest_difference(lambda row: row["loss"], "a", "b")
    assert claim(apart, above=-1.0).judge(found, once(1)).verdict == "holds"


def test_first_look_that_decides_gives_the_verdict():
    # The first two differences are of both signs, the first four of one, then one is
    # far off: at six the interval would hold 0 again.
    losses = [-0.1, 1.0, 1.1, 1.2, 1.0, -9.0]
    looks = sequential.Looks((2, 4, 6), 0.8)
    statistic = estimate.mean(scores.loss, "a")
    found = claim(statistic, above=0.0).judge(runs(a=losses), looks)
    assert (found.verdict, found.interval.n, found.level) == ("supported", 4, 0.8)
    assert found.interval == statistic(runs(a=losses[:4]), level=0.8)
    # With what has been trained so far.
    found = claim(statistic, above=0.0).judge(runs(a=losses[:3]), looks)
    assert (found.verdict, found.interval.n) == ("undecided", 2)
    with pytest.raises(NotTrained):
        claim(statistic, above=0.0).judge(runs(a=losses[:1]), looks)


def test_seeds_that_judge_are_not_those_that_chose():
    rows = [
        {"arm": arm, "seed": seed, "loss": [loss], **more}
        for arm, of_arm in {"a": [3.0, 4.0], "b": [1.0, 2.0]}.items()
        for seed, loss in enumerate(of_arm)
        for more in ({"choosing": True}, {})
    ]
    rows += [
        {"arm": arm, "seed": 2 + seed, "loss": [loss]}
        for arm, of_arm in {"a": [0.0, 1.0], "b": [7.0, 9.0]}.items()
        for seed, loss in enumerate(of_arm)
    ]
    of = Runs.of(rows, scores.arm_of)
    best = estimate.chosen(scores.loss, lambda arm: True, lowest=True)
    looks = once(2)._replace(first_seed=2)
    found = claim(estimate.mean(scores.loss, best), above=0.0).judge(of, looks)
    assert found.interval.value == 8.0  # of b, though a is lower now
    assert found.used == {"b"}


def test_p_value_is_that_of_the_t_test_times_the_looks():
    from scipy import stats

    losses = [0.3, 0.9, 0.4, 1.3]
    p = stats.ttest_1samp(losses, 0.1).pvalue
    statistic = estimate.mean(scores.loss, "a")
    judged = claim(statistic, above=0.1).judge(runs(a=losses), once(4))
    assert judged.p == pytest.approx(p, rel=2e-3)
    looks = sequential.Looks((4, 8), 0.975)
    twice = claim(statistic, above=0.1).judge(runs(a=losses), looks)
    assert twice.p == pytest.approx(2 * p, rel=2e-3)
    # Of two bounds, which it is to lie between: the larger of both.
    between = claim(statistic, above=0.1, below=1.6)
    upper = stats.ttest_1samp(losses, 1.6).pvalue
    found = between.judge(runs(a=losses), once(4))
    assert found.p == pytest.approx(max(p, upper), rel=2e-3)


def test_mean_of_equal_values_lies_between_the_least_and_the_greatest():
    # Their sum, .1 + .1 + .1, is rounded up.
    assert estimate.spread_of([0.1] * 3) == (0.1, 0.1, 0.1, 3)


def test_verdict_is_written_as_json_holds_it():
    given = claim(estimate.mean(scores.loss, "a"), above=0.25)
    found = given.judge(runs(a=[0.5]), once(1))
    assert found.to_dict() == {
        "claim": "it learns",
        "statistic": "loss, nats",
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 1,
        "level": 0.95,
        "p": 1.0,
        "threshold": "> 0.25",
        "reason": "why",
        "verdict": "undecided",
    }
    half = estimate.mean(scores.loss, "a")
    for bounds, words in (
        ({"below": 0.25}, "< 0.25"),
        ({"above": 0.0, "below": 0.25}, "in (0, 0.25)"),
    ):
        verdict = claim(half, **bounds).judge(runs(a=[0.5]), once(1))
        assert verdict.threshold == words


@pytest.mark.parametrize("bounds", [{}, {"above": 1.0, "below": 0.0}])
def test_claim_without_a_bound_is_refused(bounds):
    with pytest.raises(ValueError, match="give one bound, or two in order"):
        claim(estimate.mean(scores.loss, "a"), **bounds)


def test_claims_are_judged_whose_runs_were_trained():
    losses = {arm: estimate.mean(scores.loss, arm) for arm in "abc"}
    given = [
        claim(losses["b"], above=0),
        claim(losses["a"], above=0),
        claim(losses["c"], above=0, needs=["a", "d"]),
    ]
    found = claims.judge(given, runs(a=[1.0, 1.0], c=[2.0, 2.0]), ONCE)
    assert [verdict.interval.value for verdict in found] == [1.0]


def test_words_of_a_claim_come_from_the_runs():
    given = Claim(
        "{best} is best",
        "loss of {best}",
        value=estimate.mean(scores.loss, "a"),
        above=0.0,
        reason="",
        words={"best": lambda runs: max(runs, key=lambda arm: runs[arm][0]["loss"])},
    )
    found = given.judge(runs(a=[1.0, 1.0], b=[2.0, 2.0]), ONCE)
    assert (found.claim, found.statistic) == ("b is best", "loss of b")
