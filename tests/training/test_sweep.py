import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from bn_jax.fields import ConfigError
from bn_jax.measures import population
from bn_jax.runs import interrupt, sweeps
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop, mapped, members, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.members import parse
from bn_jax.training.sweep import Sweep
from marks import rounding_of_plain_code, slow_but
from small_runs import swept, trained


def difference(single, sweep, i):
    """Largest difference of a run's parameters and statistics to those of member i.

    The member may have norms that are passed by, and that the run has not.
    """
    of_sweep = dict(
        jax.tree_util.tree_leaves_with_path(sweep.progress().state.variables)
    )
    return max(
        np.max(np.abs(leaf - of_sweep[path][i]) / (1 + np.abs(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(single.state().variables)
    )


SLOW = pytest.mark.slow
SWITCHED = {"model": "mlp:widths=16x16,bias_before_norm=true", "epochs": 4}
SPECS = [
    (
        "learning_rate=0.05,0.2;seed=0..1",
        {"model": "mlp:widths=8", "inputs": "standardised"},
    ),
    pytest.param("learning_rate=0.05,0.2;seed=0..1", SWITCHED, marks=SLOW),
    pytest.param(
        "model.norm_layers=11,01,00;trained.gamma=true,false", SWITCHED, marks=SLOW
    ),
    pytest.param(
        "norm.momentum=0.5,0.99;norm.epsilon=1e-5,1e-2;trained.beta=false",
        SWITCHED,
        marks=SLOW,
    ),
    pytest.param("optimizer.momentum=0,0.9;seed=0..1", SWITCHED, marks=SLOW),
    pytest.param(
        "model.norm_layers=11,01",
        {"model": "mlp:widths=8x8,bias_before_norm=true"},
        marks=SLOW,
    ),
    pytest.param(
        "norm.momentum=0.9,0.5", {"model": "resnet:depth=8,width=2"}, marks=SLOW
    ),
    pytest.param(
        "seed=0,1",
        {
            "model": "mlp:widths=8",
            "augment": "crop_and_flip:padding=2,size=26",
            "inputs": "norm",
            "average_weights": 0.5,
            "label_smoothing": 0.1,
            "accumulate": 2,
            "schedule": "cosine",
        },
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("spec", "choices"), SPECS)
def test_members_train_as_they_would_alone(spec, choices, tiny_config, tiny_data):
    base = dataclasses.replace(tiny_config, learning_rate=0.1, **choices)
    configs = parse(spec, base)
    sweep = swept(configs, tiny_data)
    assert sweep.step == 5 * base.epochs
    rows = sweep.rows()
    for i in (0, len(configs) - 1):
        assert_as_alone(sweep, rows[i], i, tiny_data)


def assert_as_alone(sweep, row, i, data):
    """Member i has become what a run of its config alone becomes."""
    single = trained(sweep.configs[i], data)
    losses = sweep.progress().step_losses[i]
    np.testing.assert_allclose(losses, single.progress().step_losses, atol=1e-5)
    assert difference(single, sweep, i) < 1e-5
    report = single.history[-1]
    assert row["test_accuracy"][-1] == pytest.approx(report.test_accuracy)
    score = single.score()
    assert row["test_loss_exact"] == pytest.approx(score.test_loss_exact, rel=1e-4)


@pytest.fixture(scope="module")
def configs(tiny_config):
    """Three members, the last of which diverges."""
    base = dataclasses.replace(tiny_config, model="mlp:widths=8")
    return parse("learning_rate=0.1,1e38;seed=0..1", base)[:3]


@pytest.fixture(scope="module")
def three(configs, tiny_data):
    """A sweep of `configs` on one device."""
    return swept(configs, tiny_data)


@pytest.mark.slow
def test_two_devices_share_three_members_and_change_no_number(rows, three):
    one = three.progress()
    # JSON's null is NaN here.
    losses = np.array([row["first_step_losses"] for row in rows], np.float32)
    accuracies = np.array([row["test_accuracy"] for row in rows], np.float32)
    assert losses.shape == (3, 10)
    np.testing.assert_allclose(losses, one.step_losses, atol=1e-5)
    np.testing.assert_array_equal(accuracies, one.scores["test_accuracy"])


@pytest.mark.slow
def test_eight_devices_share_three_members_and_change_no_number(three, tiny_data):
    one = three.progress()
    many = swept(three.configs, tiny_data, devices=jax.devices()).progress()
    assert many.step_losses.shape == (3, 10)
    np.testing.assert_allclose(many.step_losses, one.step_losses, atol=1e-5)
    np.testing.assert_array_equal(
        many.scores["test_accuracy"], one.scores["test_accuracy"]
    )


@pytest.mark.slow
def test_vmapped_members_are_those_that_take_turns(tiny_config, tiny_data, monkeypatch):
    configs = parse("learning_rate=0.1,0.5", tiny_config)
    in_turns = swept(configs, tiny_data).progress()
    assert mapped.takes_turns(jax.devices())
    monkeypatch.setattr(mapped, "takes_turns", lambda devices: False)
    vmapped = swept(configs, tiny_data).progress()
    np.testing.assert_allclose(vmapped.step_losses, in_turns.step_losses, atol=1e-5)


def test_diverged_member_leaves_the_others_alone(three, tiny_data):
    alone = swept(three.configs[:1], tiny_data).progress()
    np.testing.assert_allclose(
        three.progress().step_losses[0],
        alone.step_losses[0],
        rtol=rounding_of_plain_code(),
    )
    rows = three.rows()
    diverged = rows[2]
    assert diverged["diverged_at_step"] == 2
    assert diverged["loss"] == [None, None]
    assert diverged["test_accuracy_exact"] is None
    assert diverged["first_step_losses"][0] > 0
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("greek", "name", "start", "other"),
    slow_but(
        [("beta", "bias", 0, "scale")],
        [("gamma", "scale", 1, "bias"), ("beta", "bias", 0, "scale")],
    ),
)
def test_frozen_gamma_and_beta_stay_at_their_start(
    greek, name, start, other, tiny_config, tiny_data
):
    config = dataclasses.replace(
        tiny_config, model="mlp:widths=8x8", trained=f"all:{greek}=false"
    )
    trainer = loop.Trainer(config, tiny_data, checkpoint_steps=1)
    next(trainer.train())
    params = trainer.state().params
    for norm in ("norm1", "norm2"):
        np.testing.assert_array_equal(params[norm][name], start)
    assert np.ptp(params["norm2"][other]) > 0
    assert np.ptp(params["dense3"]["bias"]) > 0


def test_layers_without_norm_have_none(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, model="mlp:widths=8x8,norm_layers=01")
    assert set(loop.Trainer(config, tiny_data).state().batch_stats) == {"norm2"}


@pytest.fixture(scope="module")
def validated(tiny_config, tiny_data):
    """A sweep, one of whose members diverges, with images set aside."""
    base = dataclasses.replace(tiny_config, validation=30)
    return swept(parse("learning_rate=0.1,1e38", base), tiny_data)


@pytest.mark.slow
def test_members_are_scored_on_the_images_set_aside(validated, tiny_data):
    row, diverged = validated.rows(exact=False)
    history = trained(validated.configs[0], tiny_data).history
    assert row["validation_accuracy"] == pytest.approx(
        [report.validation_accuracy for report in history]
    )
    assert row["validation_loss"] == pytest.approx(
        [report.validation_loss for report in history], rel=1e-4
    )
    assert diverged["validation_accuracy"] == [None, None]


@pytest.mark.slow
def test_images_set_aside_are_scored_by_exact_statistics_of_the_others(
    validated, tiny_data
):
    row, diverged = validated.rows()
    network = trained(validated.configs[0], tiny_data).network
    chosen = task.select(validated.configs[0], tiny_data)
    variables = jax.tree.map(lambda leaf: leaf[0], validated.progress().state.variables)
    exact = population.exact_statistics(
        network.predict, variables, chosen.train.images, batch_size=30
    )
    logits = network.predict(
        {**variables, "batch_stats": exact}, chosen.validation.images
    )
    right = (logits.argmax(-1) == chosen.validation.labels).mean()
    assert row["validation_accuracy_exact"] == pytest.approx(float(right))
    assert row["validation_accuracy_exact"] != row["validation_accuracy"][-1]
    assert diverged["validation_accuracy_exact"] is None


def test_members_without_images_set_aside_have_no_score_of_them(three):
    assert set(three.progress().scores) == {"test_loss", "test_accuracy"}


def test_spec_combines_all_values_the_last_fastest():
    configs = parse("learning_rate=0.1, 1; seed=3..5,9", TrainConfig(epochs=2))
    assert [(c.learning_rate, c.seed) for c in configs] == [
        (rate, seed) for rate in (0.1, 1.0) for seed in (3, 4, 5, 9)
    ]
    assert {c.epochs for c in configs} == {2}


def test_names_with_options_are_set_apart_by_a_bar():
    base = TrainConfig()
    configs = parse("norm=batch_norm|group:num_groups=4,epsilon=0.1;seed=0,1", base)
    assert [(c.norm, c.seed) for c in configs] == [
        ("batch_norm", 0),
        ("batch_norm", 1),
        ("group:num_groups=4,epsilon=0.1", 0),
        ("group:num_groups=4,epsilon=0.1", 1),
    ]
    assert [c.norm for c in parse("norm=batch_norm,none", base)] == [
        "batch_norm",
        "none",
    ]
    (config,) = parse("norm=group:num_groups=4,epsilon=0.1", base)
    assert config.norm == "group:num_groups=4,epsilon=0.1"
    layers = [c.model for c in parse("model.norm_layers=0011,1111", base)]
    assert layers == ["lenet:norm_layers=0011", "lenet"]


@pytest.mark.parametrize(
    ("spec", "groups", "differing"),
    [
        ("learning_rate=0.1,1;seed=0..1", [[0, 1, 2, 3]], ["learning_rate", "seed"]),
        ("model.norm_layers=0011,1111", [[0, 1]], ["model.norm_layers"]),
        ("norm=batch_norm|group:num_groups=2", [[0], [1]], ["norm"]),
        (
            "norm=batch_norm:momentum=0.5|batch_norm:epsilon=0.1",
            [[0, 1]],
            ["norm.momentum", "norm.epsilon"],
        ),
        (
            "norm=batch_norm,none;seed=0..1",
            [[0, 1], [2, 3]],
            ["seed", "norm"],
        ),
        ("seed=0..1;batch_size=10,30", [[0, 2], [1, 3]], ["seed", "batch_size"]),
    ],
)
def test_members_that_differ_in_numbers_share_a_program(spec, groups, differing):
    configs = parse(spec, TrainConfig())
    assert members.grouped(configs) == groups
    assert members.differing(configs) == differing


def test_switches_of_all_layers_are_written_out_beside_others():
    base = TrainConfig(model="mlp:widths=3x3,bias_before_norm=true")
    configs = [base, base.replaced("model.norm_layers", "01")]
    assert members.grouped(configs) == [[0, 1]]
    np.testing.assert_array_equal(
        members.stack_values(configs)["model.norm_layers"], [[1, 1], [0, 1]]
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colour=red,blue", "'colour' is no field; expected .* learning_rate"),
        ("lr=0.1,1", r"'lr' is no field \(did you mean learning_rate\?\); expected"),
        ("learning_rate", "expected FIELD=VALUE"),
        ("seed=0;seed=1", "each field once"),
        ("seed=a", r"seed='a'; expected an integer \(in a sweep of seed"),
        ("seed=0-4", r"'0-4'; .*; the integers from 0 to 4 are 0..4 \(in a sweep"),
        ("learning_rate=-1", "learning_rate=-1.0; expected a number greater than 0"),
        ("model.norm_layers=11", "four digits"),
        ("trained.beta=maybe", "expected true or false"),
        ("seed.x=1", "'seed' is no field with options; those are inputs"),
        ("norm.mean=1", "norm='batch_norm' has no option 'mean'; batch_norm takes"),
        ("norm=none,group:num_groups=2", r"'none,group:n.*; names .* set apart by \|"),
        ("norm=batch_norm,none;norm.momentum=0.5", "norm='none' has no option 'mom"),
    ],
)
def test_spec_that_makes_no_sweep_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse(spec, TrainConfig())


def test_configs_that_one_program_cannot_train_are_refused(tiny_config, tiny_data):
    other = dataclasses.replace(tiny_config, norm="none")
    with pytest.raises(ConfigError, match="differ in norm; they may in learning_rate"):
        Sweep([tiny_config, other], tiny_data)
    with pytest.raises(ConfigError, match="no configs"):
        Sweep([], tiny_data)


OPTIONS = RunOptions(devices="2", checkpoint_every="3steps")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps") / "finished"


@pytest.fixture
def rows(finished, configs, tiny_data):
    """Rows of a finished sweep; trained once for this file."""
    return sweeps.sweep(configs, tiny_data, workdir=finished, options=OPTIONS)


def test_sweep_leaves_a_row_for_each_member_and_is_not_repeated(
    rows, finished, configs, tiny_data
):
    names = sorted(path.name for path in finished.glob("[!.]*"))
    assert names == [
        "checkpoints",
        "checksums.json",
        "config.json",
        "environment.json",
        "results.json",
        "runs.jsonl",
        "sweep.png",
        "variables",
    ]
    assert [row["config"]["learning_rate"] for row in rows] == [0.1, 0.1, 1e38]
    before = (finished / "results.json").stat().st_mtime_ns
    again = sweeps.sweep(configs, tiny_data, workdir=finished, options=OPTIONS)
    assert again == rows
    assert (finished / "results.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another config .learning_rate"):
        sweeps.sweep(configs[:2], tiny_data, workdir=finished, options=OPTIONS)


def test_variables_of_a_sweep_are_read_back(rows, finished, configs, tiny_data):
    assert rows[1]["config"] == configs[1].to_dict()
    variables = sweeps.load(finished)[1].variables
    single = trained(configs[1], tiny_data).state()
    np.testing.assert_allclose(
        variables["params"]["norm1"]["scale"],
        single.params["norm1"]["scale"],
        atol=1e-5,
    )


def test_stopped_sweep_resumes_to_the_same_numbers(
    rows, tmp_path, configs, tiny_data, monkeypatch
):
    class StopAtOnce(interrupt.StopRequest):
        signum = 15

    listening = interrupt.listening
    stopped = contextlib.nullcontext(StopAtOnce())
    monkeypatch.setattr(interrupt, "listening", lambda: stopped)
    for _ in range(2):
        with pytest.raises(interrupt.Interrupted, match="the same command resumes"):
            sweeps.sweep(configs, tiny_data, workdir=tmp_path, options=OPTIONS)
    monkeypatch.setattr(interrupt, "listening", listening)
    again = sweeps.sweep(configs, tiny_data, workdir=tmp_path, options=OPTIONS)
    assert again == rows


def test_options_that_a_sweep_cannot_take_are_refused(tmp_path, configs, tiny_data):
    for options, message in (
        (RunOptions(devices="9"), "at most its own 8 devices"),
        (RunOptions(devices="1", input="stream"), "leave out input"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweeps.sweep(configs, tiny_data, workdir=tmp_path / "new", options=options)
    assert not (tmp_path / "new").exists()


def test_members_of_several_data_sets_are_refused(tmp_path, tiny_config, tiny_data):
    for spec in ("validation=0,30", "train_examples=0,60", "dataset=auto,sample"):
        with pytest.raises(ConfigError, match=f"differ in {spec.partition('=')[0]};"):
            sweeps.sweep(parse(spec, tiny_config), tiny_data, workdir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "norm=layer|group:num_groups=3;seed=0,1",
            r"16 features of layer norm1; .*one of 1, 2, 4, 8, 16 \(member 3 of 4: "
            r"seed=0, norm=group:num_groups=3\)",
        ),
        (
            "seed=0,1;model.norm_layers=11,1",
            r"norm_layers has 1 digit; expected 2, .* \(member 2 of 4: seed=0, model",
        ),
    ],
)
def test_member_that_does_not_fit_is_named(
    spec, message, tmp_path, tiny_config, tiny_data
):
    configs = parse(spec, tiny_config)
    with pytest.raises(ConfigError, match=message):
        sweeps.sweep(configs, tiny_data, workdir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_members_of_several_norms_are_trained_as_alone(
    tmp_path, tiny_config, tiny_data
):
    base = dataclasses.replace(
        tiny_config,
        model="mlp:widths=8,activation=relu",
        learning_rate=0.1,
        validation=30,
    )
    configs = parse("norm=batch_norm|group:num_groups=2;seed=0..1", base)
    rows = sweeps.sweep(configs, tiny_data, workdir=tmp_path)
    assert [row["config"]["norm"] for row in rows] == [
        *["batch_norm"] * 2,
        *["group"] * 2,
    ]
    for row, config in zip(rows, configs, strict=True):
        single = trained(config, tiny_data)
        assert row["config"] == config.to_dict()
        losses = single.progress().step_losses
        np.testing.assert_allclose(row["first_step_losses"], losses, atol=1e-5)
        report = single.history[-1]
        assert row["test_loss"][-1] == pytest.approx(report.test_loss, rel=1e-4)
        assert row["validation_loss"][-1] == pytest.approx(
            report.validation_loss, rel=1e-4
        )
        assert ("test_loss_exact" in row) == (config.norm == "batch_norm")
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["members"] == 4
    assert summary["best_validation_accuracy"] == max(
        row["validation_accuracy"][-1] for row in rows
    )
    assert "norm=" in summary["best_by_validation"]
    # They are read again, not trained.
    assert sweeps.sweep(configs, tiny_data, workdir=tmp_path) == rows
