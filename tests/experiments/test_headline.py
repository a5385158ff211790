import math

import numpy as np
import pytest

from experiments import headline


def row(arm, seed, **values):
    scores = {"loss": [1.0], "train_accuracy": [0.9], "test_accuracy": [0.5, 0.8]}
    norms = {} if arm.startswith("none") else {"test_accuracy_exact": 0.85}
    if norms:
        norms |= {"gamma": [2.0, 3.0], "beta": [-1.0, 2.0]}
    steps = {"first_step_losses": [2.0] * 20}
    config = {"seed": seed, "learning_rate": 0.5 if arm == "flax" else 0.25}
    return {"arm": arm, "config": config, **scores, **norms, **steps, **values}


def rows(**of_batch_norm):
    ours = [
        row("batch_norm", seed, **{k: v[seed] for k, v in of_batch_norm.items()})
        for seed in (0, 1)
    ]
    arms = ("flax", "whole_epochs", "none", "none_padded")
    others = [row(arm, s) for arm in arms for s in (1, 0)]
    return [*others, *ours]


def summary(of_rows):
    return headline.summary(headline.STUDY.runs(of_rows))


def verdict(claim, of_rows):
    (found,) = [v for v in headline.STUDY.verdicts(of_rows) if claim in v.claim]
    return found


def test_arms_differ_in_what_they_are_named_after():
    design = headline.STUDY.design(epochs=10, seeds=3)
    arms = {
        arm: design.configs(choices)
        for arm, choices in headline.STUDY.arms_of(design).items()
    }
    assert [c.seed for c in arms["flax"]] == [0, 1, 2]
    first = {arm: configs[0] for arm, configs in arms.items()}
    assert first["batch_norm"].learning_rate == first["flax"].learning_rate == 1.0
    assert first["none"].learning_rate == first["none_padded"].learning_rate == 0.9
    assert {arm: (c.norm, c.model) for arm, c in first.items()} == {
        "batch_norm": ("batch_norm", "lenet"),
        "flax": ("flax", "lenet"),
        "whole_epochs": ("batch_norm", "lenet"),
        "none": ("none", "lenet"),
        "none_padded": ("none", "lenet:first_padding=2"),
    }
    assert {c.epochs for configs in arms.values() for c in configs} == {10}
    assert 60_000 % first["whole_epochs"].batch_size == 0


def test_gamma_and_beta_are_those_of_the_first_norm_where_there_is_one():
    norm = {"scale": np.array([1.0, 2.0]), "bias": np.array([0.5, -1.0])}
    variables = {"params": {"norm1": norm, "norm2": {}}}
    found = headline.first_norm({}, variables, None)
    assert found == {"gamma": [1.0, 2.0], "beta": [0.5, -1.0]}
    assert headline.first_norm({}, {"params": {"conv1": {}}}, None) == {}


def test_published_loss_is_reached_within_two_deviations():
    # t_{.975} with 1 degree of freedom is 12.706: .2670 and .2672 give .2671 +- .0013.
    claim = "with batch norm LeNet trains to the published loss"
    near = verdict(claim, rows(loss=[[0.267], [0.2672]]))
    assert near.verdict == "supported"
    assert near.interval.value == pytest.approx(0.2671)
    assert verdict(claim, rows(loss=[[0.26], [0.28]])).verdict == "undecided"
    assert verdict(claim, rows(loss=[[0.4], [0.4]])).verdict == "refuted"


def test_agreement_is_the_largest_difference_over_seeds():
    given = rows(first_step_losses=[[2.0] * 19 + [2.5], [1.75] + [2.0] * 19])
    runs = headline.STUDY.runs(given)
    assert headline.layers_differ_at(1)(runs).value == 0.25
    assert headline.layers_differ_at(20)(runs).value == 0.5
    assert verdict("the same function", given).verdict == "fails"
    assert verdict("the same function", rows()).verdict == "holds"


def test_scores_are_paired_by_seed():
    given = rows(test_accuracy_exact=[0.8, 0.9], test_accuracy=[[0.79], [0.89]])
    found = verdict("exact statistics predict better", given)
    assert found.interval.value == pytest.approx(0.01)
    assert found.verdict == "undecided"  # two ranks reject nothing
    # Without norm the last test accuracy, .8, counts, whose odds are 4; those with it
    # are 4 and 9.
    found = verdict("better than none", given)
    assert found.interval.value == pytest.approx(math.sqrt(1 * 9 / 4))


def test_gamma_and_beta_are_means_over_channels_of_a_run():
    given = rows(gamma=[[1.0, 2.0], [3.0, 4.0]], beta=[[-1.0, 1.0], [-2.0, 2.0]])
    assert verdict("gamma of the first", given).interval.value == 2.5
    assert verdict("|beta| of the first", given).interval.value == 1.5


def test_summary_is_mean_and_spread_of_each_arm():
    found = summary(rows(loss=[[0.25], [0.75]]))["scores"]["batch_norm"]["loss"]
    # The sample variance of .25 and .75 is .125.
    assert found.pop("sd") == pytest.approx(math.sqrt(0.125))
    assert found == {"mean": 0.5, "min": 0.25, "max": 0.75, "n": 2}


def test_legend_names_the_rates_of_the_arms_that_there_are():
    present = [r for r in rows() if r["arm"] != "none"]
    assert headline.titles(headline.STUDY.runs(present)) == {
        "batch_norm": "batch norm, ours (rate 0.25)",
        "flax": "batch norm, Flax's own (rate 0.5)",
        "whole_epochs": "batch norm, batches of 250 (rate 0.25)",
        "none_padded": "no batch norm, images padded by 2",
    }


def test_run_that_diverged_counts_as_guessing_and_its_curve_ends(tmp_path):
    lost = {
        "loss": [1.0, None],
        "train_accuracy": [0.5, None],
        "test_accuracy": [0.5, None],
        "test_accuracy_exact": None,
    }
    given = [row("batch_norm", 0, **lost), row("batch_norm", 1, **lost)]
    found = summary(given)["scores"]["batch_norm"]
    assert found["loss"]["mean"] == pytest.approx(math.log(10))
    for name in ("train_accuracy", "test_accuracy", "test_accuracy_exact"):
        assert found[name]["mean"] == pytest.approx(0.1)
    headline.STUDY.draw(given, tmp_path)
    assert len(headline.STUDY.verdicts(given)) == 6
    assert summary(given)["scores"]["batch_norm"]["loss"]["n"] == 2


def test_figures_are_drawn(tmp_path):
    of_epochs = {"loss": [[1.0, 0.5]] * 2, "train_accuracy": [[0.5, 0.6]] * 2}
    given = [
        {**r, "loss": [1.0, 0.5], "train_accuracy": [0.5, 0.6]}
        for r in rows(**of_epochs)
    ]
    headline.STUDY.draw(given, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.png",
        "curves.png",
        "gamma_beta.png",
    }
    assert np.array([p.stat().st_size > 10_000 for p in tmp_path.iterdir()]).all()
