"""The statistics of the studies, on made-up runs with known answers."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax import data as data_lib
from bn_jax.training import loop, members
from bn_jax.training.config import TrainConfig, value_of
from bn_jax.training.task import Task, make_network
from experiments import (
    estimate,
    frozen,
    headline,
    learning_rates,
    options,
    report,
    scale_invariance,
    scores,
    study,
    transforms,
    which_layers,
)
from experiments.measurements import (
    biases,
    covariance,
    step_time,
    weight_scores,
    weights,
    workable_rates,
)


def outcome(module, rows, claim):
    (found,) = [v for v in module.STUDY.verdicts(rows) if claim in v.claim]
    return found


def configs_of(module, **choices):
    """Return the configs of a study's first arms, by arm."""
    design = module.STUDY.design(**choices)
    arms = module.STUDY.arms_of(design)
    return {arm: design.configs(of_arm) for arm, of_arm in arms.items()}


def network(config):
    return make_network(config, Task(num_classes=10, image_shape=(28, 28, 1)))


@pytest.mark.parametrize("name", list(report.studies()))
def test_each_arm_is_a_sweep(name):
    module = report.studies()[name]
    for configs in configs_of(module, **(study.SMOKE | {"epochs": 3})).values():
        members.check(configs)  # raises where one program cannot train them
        assert {c.seed for c in configs} == {0, 1}
        assert len(set(configs)) == len(configs)


def test_arms_are_those_that_are_named():
    assert list(configs_of(headline, arms=("none", "flax"))) == ["flax", "none"]


# Learning rates.


def rate_rows(accuracy_of, seeds=10):
    """Runs at each rate whose training accuracy is `accuracy_of(norm, rate, seed)`."""
    return [
        {
            "arm": norm,
            "config": {"learning_rate": rate, "seed": seed, "epochs": 10},
            "loss": [1.0],
            "train_accuracy": [accuracy_of(norm, rate, seed)],
            "test_accuracy": [0.5],
        }
        for norm, rate, seed in itertools.product(
            ("batch_norm", "none"), learning_rates.Design().learning_rates, range(seeds)
        )
    ]


def test_ratio_is_of_the_largest_workable_rates_of_a_seed():
    limits = {"batch_norm": (0.01, 10.0), "none": (0.1, 1.0)}

    def accuracy(norm, rate, seed):
        low, high = limits[norm]
        return 0.9 if low <= rate <= high else None if rate > high else 0.2

    rows = rate_rows(accuracy)
    ratio = outcome(learning_rates, rows, "5 times that without (training accuracy")
    assert ratio.interval == pytest.approx((1.0, 1.0, 1.0, 10))
    assert ratio.verdict == "supported"
    wider = outcome(learning_rates, rows, "wider (training accuracy")
    assert wider.interval.value == pytest.approx(2.0)
    # No loss is below the bar of the others: there is nothing to compare.
    ratio = outcome(learning_rates, rows, "5 times that without (training loss")
    assert (ratio.interval.value, ratio.verdict) == (0.0, "refuted")


def test_seed_for_which_no_rate_works_counts_by_a_bound():
    # Without norm a rate works for 7 of 10 seeds; the largest that was tried with it.
    def accuracy(norm, rate, seed):
        works = rate <= 32 if norm == "batch_norm" else rate == 1.0 and seed > 2
        return 0.9 if works else 0.1

    found = workable_rates.largest_rates(
        learning_rates.STUDY.runs(rate_rows(accuracy)), learning_rates.BARS[1]
    )
    assert found[:3] == [math.inf] * 3
    assert found[3:] == pytest.approx([math.log10(32)] * 7)
    ratio = outcome(
        learning_rates, rate_rows(accuracy), "without (training accuracy of .5"
    )
    assert ratio.interval.value == pytest.approx(math.log10(32))
    assert ratio.verdict == "supported"
    # Where the largest rate works with norm, how much larger could be is not known.
    everywhere = rate_rows(lambda norm, rate, seed: 0.9)
    found = workable_rates.largest_rates(
        learning_rates.STUDY.runs(everywhere), learning_rates.BARS[1]
    )
    assert found == [math.inf] * 10


@pytest.mark.slow
def test_rates_of_one_norm_alone_are_drawn_and_not_judged(tmp_path):
    rows = [r for r in rate_rows(lambda *_: 0.5) if r["arm"] == "none"]
    assert learning_rates.STUDY.verdicts(rows) == []
    learning_rates.STUDY.draw(rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_figures_of_rates_leave_out_what_diverged(tmp_path):
    rows = rate_rows(lambda norm, rate, seed: None if rate > 30 else 0.5)
    learning_rates.STUDY.draw(rows, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"claims.png", "learning_rates.png", "curves.png"}


# Which layers.


def subset_rows(loss_of, chosen_by=None):
    """Rows that judge and, at other seeds, rows to choose by."""
    return [
        {
            "arm": "subsets",
            "config": {"model": f"lenet:norm_layers={subset}", "seed": seed},
            "loss": [loss_of(subset, seed)],
            "test_accuracy": [0.5],
            **choosing,
        }
        for subset in which_layers.SUBSETS
        for seeds, choosing in (
            ((5, 6), {}),
            (
                (0, 1),
                {
                    "choosing": True,
                    "loss": [(chosen_by or loss_of)(subset, 0)],
                },
            ),
        )
        for seed in seeds
    ]


GAINS = (0.1, 0.2, 0.4, 0.8)


def sum_of_gains(subset, seed):
    """Effects that add up, and seeds that differ in all subsets alike."""
    return 2 - sum(g for g, d in zip(GAINS, subset, strict=True) if d == "1") + seed


def test_effect_of_a_layer_is_what_its_norm_changes():
    rows = subset_rows(sum_of_gains)
    runs = which_layers.STUDY.runs(rows)
    for i, gain in enumerate(GAINS):
        for others in range(4):
            found = which_layers.effect(i, others)(runs)
            assert found == pytest.approx((-gain, -gain, -gain, 2))
    # All to dense alone: .3; dense to conv: 1.2 - .3 = .9; conv to none: .3.
    values = [v.interval.value for v in which_layers.STUDY.verdicts(rows)[:3]]
    np.testing.assert_allclose(values, [0.3, 0.9, 0.3])
    needed = outcome(which_layers, rows, "not needed in every layer")
    assert needed.claim.endswith("(the best is 0111)")
    assert needed.interval.value == pytest.approx(0.1)  # without that of conv 1
    assert needed.verdict == "refuted"
    one = outcome(which_layers, rows, "one norm nearly suffices")
    assert one.interval.value == pytest.approx(0.8 / 1.5)
    # What adds up does not stand in for each other.
    overlap = outcome(which_layers, rows, "stand in for each other")
    assert overlap.interval.value == pytest.approx(0.0, abs=1e-12)


def test_best_subset_is_chosen_by_other_runs_than_those_that_judge():
    def other(subset, seed):
        return {"1011": 0.0, "1000": 0.1}.get(subset, 5.0)

    rows = subset_rows(sum_of_gains, chosen_by=other)
    needed = outcome(which_layers, rows, "not needed in every layer")
    assert needed.claim.endswith("(the best is 1011)")
    assert needed.interval.value == pytest.approx(0.2)
    one = outcome(which_layers, rows, "one norm nearly suffices")
    assert one.interval.value == pytest.approx(0.1 / 1.5)


def test_norms_that_do_the_same_stand_in_for_each_other():
    # Any norm takes 1 off the loss, more of them nothing.
    rows = subset_rows(lambda subset, seed: 2.0 - ("1" in subset) + seed)
    overlap = outcome(which_layers, rows, "stand in for each other")
    assert overlap.interval.value == pytest.approx(1.0)
    assert overlap.verdict == "supported"


def test_share_of_nothing_is_unknown():
    rows = subset_rows(lambda subset, seed: 1.0)
    one = outcome(which_layers, rows, "one norm nearly suffices")
    assert (one.interval.n, one.verdict, one.p) == (0, "undecided", None)


def test_run_that_diverged_has_the_loss_of_guessing():
    runs = which_layers.STUDY.runs(subset_rows(lambda subset, seed: None))
    found = estimate.mean(scores.loss, "0000")(runs)
    assert found == pytest.approx((math.log(10),) * 3 + (2,))


def test_figures_of_layers_are_drawn(tmp_path):
    which_layers.STUDY.draw(subset_rows(lambda subset, seed: 1.0), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"claims.png", "which_layers.png", "by_number.png", "effects.png"}


# Bias.


@pytest.mark.slow
def test_biases_have_no_gradient_and_no_effect_but_the_last_has():
    data = data_lib.load("sample")
    config = TrainConfig(dataset="sample")
    variables = network(config).init(jax.random.key(0))
    found = biases.effects({"config": config.to_dict()}, variables, data)
    assert max(found["gradient_ratio"].values()) < 1e-12
    assert found["output_change"] < 1e-12
    assert found["parameters"] == 44878
    # The same measure sees a bias that counts: without norms they do.
    config = TrainConfig(dataset="sample", norm="none")
    variables = network(config).init(jax.random.key(0))
    found = biases.effects({"config": config.to_dict()}, variables, data)
    assert min(found["gradient_ratio"].values()) > 1e-3
    assert found["output_change"] > 1e-3


def test_network_without_biases_has_their_number_alone():
    config = TrainConfig(model="lenet:bias_before_norm=false").to_dict()
    variables = {"params": {"conv1": {"kernel": np.zeros((2, 3))}}}
    assert biases.effects({"config": config}, variables, None) == {"parameters": 6}


# Scale invariance.


def test_probe_keeps_cosine_and_norms_of_weights_and_gradients():
    params = {layer: {"kernel": jnp.array([[3.0, 4.0]])} for layer in weights.LAYERS}
    gradients = {
        layer: {"kernel": jnp.array([[1.0, 0.0]]) * (i + 1)}
        for i, layer in enumerate(weights.LAYERS)
    }
    link = weights.probe()
    passed, (cosine, ww, gg) = link.update(gradients, link.init(params), params)
    assert passed is gradients
    np.testing.assert_allclose(cosine, [0.6] * 4, rtol=1e-6)
    np.testing.assert_allclose(ww, [25.0] * 4)
    np.testing.assert_allclose(gg, [1.0, 4.0, 9.0, 16.0])


def test_growth_and_effective_rate_are_by_the_formula():
    # Gradients of norms 1, 1 and 2 at rate 2: from 5, weights grow by 4, then 4.
    probed = weights.Probed(
        loss=np.ones(3),
        accuracy=np.full(3, 0.5),
        cosine=np.array([[0.1] * 4, [-0.3] * 4, [0.2] * 4]),
        squared_norm=np.array([[5.0] * 4, [9.0] * 4, [13.0] * 4]),
        squared_gradient=np.array([[1.0] * 4, [1.0] * 4, [4.0] * 4]),
    )
    row = {"learning_rate": 2.0, **weights.summarize(probed)}
    assert weight_scores.growth_error(row) == pytest.approx(0)
    np.testing.assert_allclose(row["mean_abs_cosine"], 0.2)
    assert weight_scores.log_effective_rate(row) == pytest.approx(math.log10(2 / 13))
    off = {**row, "growth": [8.0, 8.0, 10.0, 8.0]}
    assert weight_scores.growth_error(off) == pytest.approx(0.25)
    assert json.loads(json.dumps(row)) == row


def test_run_is_followed_to_its_last_finite_step():
    good, overflown = np.full(4, 5.0), np.array([5.0, np.inf, 5.0, 5.0])
    probed = weights.Probed(
        loss=np.array([2.0, 3.0, 4.0]),
        accuracy=np.full(3, 0.5),
        cosine=np.full((3, 4), 0.1),
        squared_norm=np.stack([good, good + 1, good]),
        squared_gradient=np.stack([good, good, overflown]),
    )
    row = weights.summarize(probed)
    assert row["steps"] == 2
    assert row["final_squared_norm"] == [6.0] * 4
    json.dumps(row, allow_nan=False)


@pytest.mark.slow
def test_runs_are_followed_and_those_there_are_not_repeated(tmp_path):
    data = data_lib.load("sample").with_train_examples(600)
    design = scale_invariance.Design(
        epochs=1, seeds=1, dataset="sample", learning_rates=(0.5,)
    )
    rows = []
    for arm, choices in scale_invariance.STUDY.arms_of(design).items():
        configs = design.configs(choices)
        found, seconds = weights.follow(arm, tmp_path / arm, configs, data)
        assert seconds > 0
        again = weights.follow(arm, tmp_path / arm, configs, data)
        assert again == (found, seconds)
        rows += [{"arm": arm, **row} for row in found]
    assert [(row["arm"], row["learning_rate"]) for row in rows] == [
        ("batch_norm", 0.5),
        ("none", 0.5),
        ("held", 0.5),
    ]
    scale_invariance.STUDY.draw(rows, tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"norms.png", "cosines.png", "effective_rates.png"}
    with_norm, without, held = rows
    np.testing.assert_allclose(
        held["final_squared_norm"], with_norm["squared_norm"][0], rtol=1e-4
    )
    assert with_norm["final_squared_norm"] != pytest.approx(held["final_squared_norm"])
    assert max(with_norm["mean_abs_cosine"]) < 1e-3 < max(without["mean_abs_cosine"])
    # The run is the usual one: its first weights are those of the seed.
    key, _ = jax.random.split(jax.random.key(0))
    variables = network(TrainConfig()).init(key)
    expected = optax.tree.norm(variables["params"]["conv1"]["kernel"], squared=True)
    assert with_norm["squared_norm"][0][0] == pytest.approx(float(expected), rel=1e-5)


# Transforms.


@pytest.mark.slow
def test_covariances_of_transforms_are_as_their_names_say():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 48)) @ rng.normal(size=(48, 48))

    def normalised(arm, others=x):
        return covariance.normalised(transforms.NORMS[arm][0], x, others)

    def distance(y):
        return covariance.distance(np.cov(y, rowvar=False, bias=True))

    def within(y):
        covariances = np.cov(y, rowvar=False, bias=True)
        return covariance.distance_within(covariances, 16)

    assert distance(normalised("zca-all")[0]) < 0.01
    assert distance(normalised("batch_norm")[0]) > 0.5
    found = {
        arm: within(normalised(arm)[0])
        for arm in ("zca-16", "zca-8", *(f"iternorm-16-{t}" for t in (1, 3, 5, 7)))
    }
    assert found.pop("zca-16") < 0.01 < found.pop("zca-8")
    steps = list(found.values())
    assert steps == sorted(steps, reverse=True)
    # Others are normalised by the batch's statistics: the batch itself comes out as it
    # did, and examples of another mean keep theirs.
    for arm in ("batch_norm", "zca-16"):
        on_batch, on_others = normalised(arm)
        np.testing.assert_allclose(on_others, on_batch, atol=1e-3)
        shifted = normalised(arm, x + 10 * x.std(axis=0))[1]
        assert np.abs(shifted.mean(axis=0)).max() > 5


def test_distance_to_the_identity_is_by_the_number_of_features():
    # Off-diagonal .5 twice: sqrt(.5) / sqrt(2).
    assert covariance.distance(np.array([[1, 0.5], [0.5, 1]])) == pytest.approx(0.5)


@pytest.mark.slow
def test_features_are_those_before_the_norm_of_the_first_dense_layer():
    data = data_lib.load("sample")
    for seed in (0, 3):
        first, others = covariance.dense_features(data, seed)
        assert first.shape == others.shape == (256, 120)
        untrained = network(TrainConfig())
        variables = untrained.init(jax.random.key(seed))
        _, moved = loop.forward(
            untrained,
            variables["params"],
            variables["batch_stats"],
            jnp.asarray(data.train.images[512 * seed : 512 * (seed + 1)]),
            jax.random.key(0),
        )
        # At momentum .9 the moving mean has a tenth of the batch's.
        mean = np.concatenate([first, others]).mean(0)
        np.testing.assert_allclose(moved["norm3"]["mean"], 0.1 * mean, atol=1e-6)


def test_layer_without_a_norm_has_no_covariance():
    config = TrainConfig(model="lenet:norm_layers=1100").to_dict()
    assert covariance.covariances({"config": config}, None, None) == {}


def test_time_of_a_step_is_the_median_over_rounds_of_the_ratio(monkeypatch):
    seconds = {
        "scale": iter([1.0, 4.0, 3.0, 6.0, 90.0]),
        "batch_norm": iter([1, 2] * 3),
    }
    monkeypatch.setattr(step_time, "_epochs", lambda norm, model, data: seconds[norm])
    row = {"config": TrainConfig(norm="scale").to_dict()}
    assert step_time.to_batch_norm(row, None) == 3.0  # of 1, 2, 3, 3 and 90


@pytest.mark.slow
def test_steps_of_both_networks_are_timed():
    data = data_lib.load("sample")
    row = {"config": TrainConfig(model="mlp:widths=8").to_dict()}
    assert step_time.to_batch_norm(row, data) > 0


def test_loss_in_batch_norms_time_lies_between_epochs():
    def row(arm, time, loss):
        return {"arm": arm, "config": {"seed": 0}, "step_time": time, "loss": loss}

    rows = [
        row("batch_norm", 1.0, [3.0, 2.0, 1.0]),
        row("zca-16", 2.0, [2.0, 1.0, 0.5]),
    ]
    runs = transforms.STUDY.runs([*rows, row("pca-16", 4.0, [1.0, 1.0, 1.0])])
    assert step_time.at_equal_time(runs, "batch_norm") == [1.0]
    assert step_time.at_equal_time(runs, "zca-16") == [1.5]  # after 1.5 epochs
    assert math.isnan(step_time.at_equal_time(runs, "pca-16")[0])


# Designs: each choice that has a flag reaches the runs.


@pytest.mark.parametrize(
    ("module", "choices", "field", "expected"),
    [
        (
            headline,
            {"arms": ("flax", "none")},
            "learning_rate",
            {"flax": [1.0], "none": [0.9]},
        ),
        (
            which_layers,
            {"learning_rate": 0.5},
            "learning_rate",
            {"subsets": [0.5] * 16},
        ),
        (
            learning_rates,
            {"learning_rates": (3.0, 0.5)},
            "learning_rate",
            {"batch_norm": [0.5, 3.0], "none": [0.5, 3.0]},
        ),
        (
            scale_invariance,
            {"learning_rates": (3.0, 0.5), "arms": ("none",)},
            "learning_rate",
            {"none": [3.0, 0.5]},
        ),
        (
            which_layers,
            {},
            "model.norm_layers",
            {"subsets": list(which_layers.SUBSETS)},
        ),
        (
            frozen,
            {"arms": ("relu-norm", "sigmoid-norm")},
            "model.activation",
            {"sigmoid-norm": ["sigmoid"], "relu-norm": ["relu"]},
        ),
        (
            options,
            {"arms": ("no_bias", "two_pass_variance")},
            "norm",
            {
                "no_bias": ["batch_norm:use_bias=false"],
                "two_pass_variance": ["flax:use_fast_variance=false"],
            },
        ),
        (
            transforms,
            {"arms": ("layer", "zca-8")},
            "norm",
            {"layer": ["layer"], "zca-8": ["whitening:max_group_size=8"]},
        ),
    ],
)
def test_choices_of_a_design_reach_its_runs(module, choices, field, expected):
    found = configs_of(module, batch_size=128, epochs=2, seeds=1, **choices)
    assert {
        arm: [value_of(config.to_dict(), field) for config in configs]
        for arm, configs in found.items()
    } == expected
    everyone = [config for configs in found.values() for config in configs]
    assert {(config.batch_size, config.epochs) for config in everyone} == {(128, 2)}
