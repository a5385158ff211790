import math

import pytest

from bn_jax.training import members
from bn_jax.training.config import TrainConfig, value_of
from experiments import dropout, scores
from experiments.measurements import equal_loss


def configs_of(**choices):
    design = dropout.Design(**choices)
    arms = dropout.STUDY.arms_of(design)
    seeds = range(5, 5 + design.seeds)
    return {arm: design.configs(choices, seeds) for arm, choices in arms.items()}


ARMS = configs_of(epochs=3, seeds=3)
# By arm: training loss, training accuracy, test accuracy, all by exact statistics.
MADE_UP = {
    "none": (0.5, 0.75, 0.71875),
    "dropout_10": (0.5, 0.75, 0.5),
    "dropout_30": (1.0, 0.75, 0.6875),  # the best rate
    "dropout_50": (1.5, 0.625, 0.625),
    "batch_norm": (0.25, 0.875, 0.75),
    "norm_dropout_before": (0.25, 0.875, 0.75),
    "norm_dropout_after": (0.25, 0.875, 0.75),
}
AVERAGE = {"norm_dropout_before": 0.5, "norm_dropout_after": 0.625}
RATIO = {"norm_dropout_before": 0.25, "norm_dropout_after": 2.0}


def row(arm, config):
    _, _, kind = arm.partition("-")
    loss, train, test = MADE_UP[kind]
    loss += 0.125 * (config.seed - 5)  # seeds differ, pairs of one do not
    found = {
        "arm": arm,
        "config": config.to_dict(),
        "loss": [2.0] * (config.epochs - 1) + [loss],
        "train_accuracy": [0.25] * config.epochs,
        "test_accuracy": [0.125] * (config.epochs - 1) + [AVERAGE.get(kind, test)],
        "train_loss_average": loss,
        "train_accuracy_average": train,
    }
    if config.norm == "none":
        return found
    return found | {
        "train_loss_average": 9.0,  # not to be taken
        "train_accuracy_average": 0.0,
        "train_loss_exact": loss,
        "train_accuracy_exact": train,
        "test_accuracy_exact": test,
        "norm4_variance_ratio": RATIO.get(kind, 1.0),
    }


def made_up():
    # Last seed first: pairs are made by seed, not by place.
    rows = [row(arm, c) for arm, configs in ARMS.items() for c in reversed(configs)]
    # By the runs to choose by, dropout of .3 is the best, at its better rate.
    rows += [
        {
            "arm": arm,
            "config": {**configs[0].to_dict(), "learning_rate": rate},
            "choosing": True,
            "validation_accuracy": [0.75 if (arm[-2:], rate) == ("30", 1.0) else 0.5],
        }
        for arm, configs in ARMS.items()
        for rate in (0.1, 1.0)
    ]
    return rows


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep_over_seeds(arm):
    members.check(ARMS[arm])
    assert [config.seed for config in ARMS[arm]] == [5, 6, 7]


def test_arms_differ_in_norm_dropout_and_images_alone():
    assert len(ARMS) == 14
    chapter = TrainConfig(epochs=3, seed=5, model="lenet:activation=relu").to_dict()
    assert ARMS["all-batch_norm"][0].to_dict() == chapter
    varied = ("norm", "model", "train_examples", "epochs")
    for configs in ARMS.values():
        config = configs[0].to_dict()
        assert config | {name: chapter[name] for name in varied} == chapter


def test_few_images_take_about_half_as_many_steps_as_all():
    few, all_images = (ARMS[f"{size}-none"][0] for size in ("few", "all"))
    steps = [
        n // few.batch_size * config.epochs
        for n, config in ((few.train_examples, few), (60_000, all_images))
    ]
    assert steps == [330, 702]


def test_design_has_the_rates_and_sizes_that_are_given():
    arms = configs_of(
        seeds=1,
        dropout_rates=(0.25, 0.125),
        few_examples=2000,
        longer=3,
        epochs=5,
    )
    few = {arm: c for arm, (c,) in arms.items() if arm.startswith("few")}
    assert {
        arm: tuple(
            value_of(c.to_dict(), f"model.{name}")
            for name in ("dropout_rate", "dropout_at")
        )
        for arm, c in few.items()
    } == {
        "few-none": (0.0, "dense"),
        "few-dropout_12.5": (0.125, "dense"),
        "few-dropout_25": (0.25, "dense"),
        "few-batch_norm": (0.0, "dense"),
        "few-norm_dropout_before": (0.5, "dense"),
        "few-norm_dropout_after": (0.5, "last"),
    }
    assert {(c.train_examples, c.epochs) for c in few.values()} == {(2000, 15)}


def test_scores_are_by_exact_statistics_where_there_are_any():
    norm = row("all-batch_norm", ARMS["all-batch_norm"][0])
    assert dropout.train_loss(norm) == 0.25
    assert dropout.train_accuracy(norm) == 0.875
    assert scores.test_accuracy(norm) == 0.75
    assert dropout.gap(norm) == 0.125
    assert dropout.gap(row("all-none", ARMS["all-none"][0])) == 0.03125


def test_run_that_diverged_counts_as_guessing_and_has_no_gap():
    lost = row("all-none", ARMS["all-none"][0]) | {
        "train_loss_average": None,
        "train_accuracy_average": None,
        "test_accuracy": [0.125, None],
    }
    assert dropout.train_loss(lost) == pytest.approx(math.log(10))
    assert dropout.gap(lost) == 0
    assert scores.moving_test_accuracy(lost) == 0.1


def test_log_ratio_counts_a_variance_too_small_like_one_too_large():
    runs = dropout.STUDY.runs(made_up())
    for arm, size in (("norm_dropout_before", 4), ("norm_dropout_after", 2)):
        found = [dropout.log_ratio(row) for row in runs[f"few-{arm}"]]
        assert found == pytest.approx([math.log(size)] * 3)


@pytest.mark.parametrize(
    "words, value, outcome",
    [
        ("dropout of .5 slows", 1.0, "supported"),
        ("take the place of dropout, all", 0.0625, "supported"),  # to dropout .3
        ("take the place of dropout, few", 0.0625, "supported"),
        # At a loss of .5, in the last of 30 epochs: of .75 and .71875, the 29 before
        # having .125, the mean of three epochs.
        ("at the same training loss", (0.75 - 0.71875) / 3, "supported"),
        ("beside batch norm dropout still helps", 0.0, "refuted"),
        ("shifts its variance", math.log(4) - math.log(2), "supported"),
        ("before a norm hurts", -0.125, "supported"),
    ],
)
def test_verdict_is_on_the_difference_that_it_names(words, value, outcome):
    (found,) = (v for v in dropout.STUDY.verdicts(made_up()) if words in v.claim)
    assert found.interval.value == pytest.approx(value)
    assert found.interval.n == 3
    assert found.verdict == outcome


def test_best_rate_of_dropout_is_named():
    claims = [v.claim for v in dropout.STUDY.verdicts(made_up()) if "place" in v.claim]
    assert all("the best is dropout .3" in claim for claim in claims)


def test_arms_are_compared_where_both_first_had_the_same_loss():
    def run(arm, loss, accuracy):
        config = {"seed": 5}
        return {"arm": arm, "config": config, "loss": loss, "test_accuracy": accuracy}

    fast = run("fast", [0.9, 0.5, 0.3, 0.2, 0.1, 0.05], [0.1, 0.2, 0.3, 0.4, 0.9, 0.9])
    slow = run("slow", [1.0, 0.9, 0.6, 0.5, 0.4, None], [0.5] * 5 + [None])
    runs = dropout.STUDY.runs([fast, slow])
    # Both reach .4: in epochs 3 and 5.
    found = equal_loss.at_equal_loss(runs, "fast", "slow")
    assert found == [[pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.9) / 5)], [0.5]]
    assert equal_loss.at_equal_loss(runs, "slow", "fast") == found[::-1]


@pytest.mark.slow
def test_figures_are_drawn_of_made_up_rows(tmp_path):
    dropout.STUDY.draw(made_up(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.png",
        "dropout_all.png",
        "dropout_few.png",
        "curves_all.png",
        "curves_few.png",
        "variance_ratio.png",
    }
