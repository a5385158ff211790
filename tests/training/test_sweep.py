import contextlib
import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from bn_jax.fields import ConfigError
from bn_jax.runs import interrupt, sweeps
from bn_jax.runs.results import RunError
from bn_jax.training import loop, mapped
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.members import parse
from bn_jax.training.sweep import Sweep


def trained(configs, data, num_devices=1):
    members = Sweep(configs, data, devices=jax.devices()[:num_devices])
    for _ in members.train():
        pass
    return members


def difference(single, members, i):
    """Largest difference of a run's parameters and statistics to those of member i."""
    of_sweep = dict(jax.tree_util.tree_leaves_with_path(members.progress().state))
    leaves = jax.tree_util.tree_leaves_with_path(
        {"params": single.state.params, "batch_stats": single.state.batch_stats}
    )
    flat = {jax.tree_util.keystr(path[-2:]): leaf for path, leaf in of_sweep.items()}
    return max(
        float(
            np.max(
                np.abs(leaf - flat[jax.tree_util.keystr(path[-2:])][i])
                / (1 + np.abs(leaf))
            )
        )
        for path, leaf in leaves
    )


SPECS = [
    "learning_rate=0.05,0.2;seed=0..1",
    "norm_layers=1111,0011,0000;train_gamma=true,false",
    "momentum=0.5,0.99;epsilon=1e-5,1e-2;train_beta=false",
]


@pytest.mark.parametrize("spec", SPECS)
def test_members_train_as_they_would_alone(spec, tiny_config, tiny_data):
    base = dataclasses.replace(tiny_config, epochs=4, learning_rate=0.1)
    configs = parse(spec, base)
    members = trained(configs, tiny_data)
    assert members.step == 20
    rows = members.rows()
    for i in (0, len(configs) - 1):
        single = loop.fit(configs[i], tiny_data)
        losses = members.progress().step_losses[i]
        np.testing.assert_allclose(losses, single.step_losses, atol=1e-5)
        assert difference(single, members, i) < 1e-5
        report = single.history[-1]
        assert rows[i]["test_accuracy"][-1] == pytest.approx(report.test_accuracy)
        score = loop.score(single.model, single.state.variables, tiny_data)
        assert rows[i]["test_loss_exact"] == pytest.approx(
            score.test_loss_exact, rel=1e-4
        )


@pytest.mark.parametrize("num_devices", [2, 8])
def test_devices_share_the_members_and_change_no_number(
    num_devices, tiny_config, tiny_data
):
    configs = parse("learning_rate=0.1,0.5,1.0", tiny_config)
    one = trained(configs, tiny_data).progress()
    many = trained(configs, tiny_data, num_devices).progress()
    assert many.step_losses.shape == (3, 10)
    np.testing.assert_allclose(many.step_losses, one.step_losses, atol=1e-5)
    np.testing.assert_array_equal(many.test_accuracies, one.test_accuracies)


def test_vmapped_members_are_those_that_take_turns(tiny_config, tiny_data, monkeypatch):
    configs = parse("learning_rate=0.1,0.5", tiny_config)
    in_turns = trained(configs, tiny_data).progress()
    assert mapped.takes_turns(jax.devices())
    monkeypatch.setattr(mapped, "takes_turns", lambda devices: False)
    vmapped = trained(configs, tiny_data).progress()
    np.testing.assert_allclose(vmapped.step_losses, in_turns.step_losses, atol=1e-5)


def test_diverged_member_leaves_the_others_alone(tiny_config, tiny_data):
    alone = trained(parse("learning_rate=0.1", tiny_config), tiny_data)
    both = trained(parse("learning_rate=0.1,1e38", tiny_config), tiny_data)
    chex.assert_trees_all_equal(
        alone.rows(exact=False)[0]["loss"], both.rows(exact=False)[0]["loss"]
    )
    diverged = both.rows()[1]
    assert diverged["diverged_at_step"] == 2
    assert diverged["loss"] == [None, None]
    assert diverged["test_accuracy_exact"] is None
    assert diverged["first_step_losses"][0] > 0
    json.dumps(both.rows(exact=False), allow_nan=False)


def test_frozen_gamma_and_beta_stay_at_their_start(tiny_config, tiny_data):
    for field, name, start in (("train_gamma", "scale", 1), ("train_beta", "bias", 0)):
        config = dataclasses.replace(tiny_config, epochs=1, **{field: False})
        fitted = loop.fit(config, tiny_data)
        params = fitted.state.params
        for norm in ("norm1", "norm2", "norm3", "norm4"):
            np.testing.assert_array_equal(params[norm][name], start)
        other = {"scale": "bias", "bias": "scale"}[name]
        assert np.ptp(params["norm4"][other]) > 0
        assert np.ptp(params["dense1"]["bias"]) > 0 or name == "bias"


def test_layers_without_norm_have_none(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, epochs=1, norm_layers="0110")
    assert set(loop.fit(config, tiny_data).state.batch_stats) == {"norm2", "norm3"}


def test_spec_combines_all_values_the_last_fastest():
    configs = parse("learning_rate=0.1, 1; seed=3..5,9", TrainConfig(epochs=2))
    assert [(c.learning_rate, c.seed) for c in configs] == [
        (rate, seed) for rate in (0.1, 1.0) for seed in (3, 4, 5, 9)
    ]
    assert {c.epochs for c in configs} == {2}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("batch_size=1,2", "'batch_size=1,2'; expected FIELD=.* of learning_rate"),
        ("learning_rate", "expected FIELD=VALUE"),
        ("seed=0;seed=1", "each field once"),
        ("seed=a", "seed='a' in a sweep; expected int"),
        ("learning_rate=-1", "learning_rate=-1.0; expected a number greater than 0"),
        ("norm_layers=11", "four digits"),
        ("train_beta=maybe", "expected true or false"),
    ],
)
def test_spec_that_makes_no_sweep_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse(spec, TrainConfig())


def test_configs_that_one_program_cannot_train_are_refused(tiny_config, tiny_data):
    other = dataclasses.replace(tiny_config, norm="none")
    with pytest.raises(ConfigError, match=r"differ in norm: \['batch_norm', 'none'\]"):
        Sweep([tiny_config, other], tiny_data)
    with pytest.raises(ConfigError, match="no configs"):
        Sweep([], tiny_data)


OPTIONS = RunOptions(devices="2", checkpoint_every="3steps")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps") / "finished"


@pytest.fixture
def configs(tiny_config):
    return parse("learning_rate=0.1,1e38;seed=0..1", tiny_config)


@pytest.fixture
def rows(finished, configs, tiny_data):
    """Rows of a finished sweep; trained once for this file."""
    return sweeps.sweep_into(finished, configs, tiny_data, OPTIONS)


def test_sweep_leaves_a_row_for_each_member_and_is_not_repeated(
    rows, finished, configs, tiny_data
):
    names = sorted(path.name for path in finished.glob("[!.]*"))
    assert names == [
        "checkpoints",
        "config.json",
        "environment.json",
        "results.json",
        "runs.jsonl",
        "sweep.png",
        "variables",
    ]
    assert [row["config"]["learning_rate"] for row in rows] == [0.1, 0.1, 1e38, 1e38]
    before = (finished / "results.json").stat().st_mtime_ns
    assert sweeps.sweep_into(finished, configs, tiny_data, OPTIONS) == rows
    assert (finished / "results.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another config .learning_rate"):
        sweeps.sweep_into(finished, configs[:3], tiny_data, OPTIONS)


def test_stopped_sweep_goes_on_to_the_same_numbers(
    rows, tmp_path, configs, tiny_data, monkeypatch
):
    class StopAtOnce(interrupt.StopRequest):
        signum = 15

    listening = interrupt.listening
    stopped = contextlib.nullcontext(StopAtOnce())
    monkeypatch.setattr(interrupt, "listening", lambda: stopped)
    for _ in range(2):
        with pytest.raises(interrupt.Interrupted, match="the same command goes on"):
            sweeps.sweep_into(tmp_path, configs, tiny_data, OPTIONS)
    monkeypatch.setattr(interrupt, "listening", listening)
    again = sweeps.sweep_into(tmp_path, configs, tiny_data, OPTIONS)
    assert again == rows


def test_options_that_a_sweep_cannot_take_are_refused(tmp_path, configs, tiny_data):
    for options, message in (
        (RunOptions(devices="9"), "at most its own 8 devices"),
        (RunOptions(devices="1", input="stream"), "leave out --input"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweeps.sweep_into(tmp_path / "new", configs, tiny_data, options)
    assert not (tmp_path / "new").exists()
