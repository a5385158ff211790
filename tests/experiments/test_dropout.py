import math

import pytest

from bn_jax.training import members
from bn_jax.training.config import TrainConfig, value_of
from experiments import dropout, scores


def configs_of(**choices):
    design = dropout.Design(**choices)
    arms = dropout.STUDY.arms_of(design)
    return {arm: design.configs(choices) for arm, choices in arms.items()}


ARMS = configs_of(epochs=5, seeds=3)
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
    loss += 0.1 * config.seed  # seeds differ, pairs of one do not
    found = {
        "arm": arm,
        "config": config.to_dict(),
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
    return [row(arm, c) for arm, configs in ARMS.items() for c in reversed(configs)]


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep_over_seeds(arm):
    members.check(ARMS[arm])
    assert [config.seed for config in ARMS[arm]] == [0, 1, 2]


def test_arms_differ_in_norm_dropout_and_images_alone():
    assert len(ARMS) == 14
    chapter = TrainConfig(epochs=5).to_dict()
    assert ARMS["all-batch_norm"][0].to_dict() == chapter
    varied = ("norm", "model", "train_examples", "epochs")
    for configs in ARMS.values():
        config = configs[0].to_dict()
        assert config | {name: chapter[name] for name in varied} == chapter


def test_few_images_take_about_as_many_steps_as_all():
    few, all_images = (ARMS[f"{size}-none"][0] for size in ("few", "all"))
    steps = [
        n // few.batch_size * config.epochs
        for n, config in ((few.train_examples, few), (60_000, all_images))
    ]
    assert steps == [1100, 1170]


def test_design_has_the_rates_and_sizes_that_are_given():
    arms = configs_of(
        seeds=1,
        dropout_rates=(0.25, 0.125),
        few_examples=2000,
        longer=3,
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
        ("on few images the gap is smaller", 0.125 - 0.03125, "refuted"),
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
