"""A run that starts from another one's variables, and norms that are frozen."""

import dataclasses

import chex
import numpy as np
import pytest

from bn_jax import runs
from bn_jax.fields import ConfigError
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop
from bn_jax.training.config import RunOptions, TrainConfig

CONFIG = TrainConfig(
    model="mlp:widths=16", epochs=1, batch_size=16, learning_rate=0.1, seed=1
)
OPTIONS = RunOptions(devices="1", checkpoint_every="never")


@pytest.fixture(scope="module")
def first(tiny_data, tmp_path_factory):
    """A finished run, and its folder."""
    folder = tmp_path_factory.mktemp("first")
    return runs.train(CONFIG, tiny_data, workdir=folder, options=OPTIONS), folder


def starting(first, **choices):
    return dataclasses.replace(CONFIG, init_from=str(first[1]), seed=2, **choices)


@pytest.mark.parametrize("statistics", ["kept", "fresh"])
def test_run_starts_from_anothers_parameters_and_statistics(
    statistics, first, tiny_data
):
    run, _ = first
    config = starting(first, init_statistics=statistics)
    state = loop.Trainer(config, tiny_data, start=run.variables).state()
    chex.assert_trees_all_equal(state.params, run.variables["params"])
    of_run = run.variables["batch_stats"]["norm1"]["mean"]
    mean = of_run if statistics == "kept" else np.zeros_like(of_run)
    np.testing.assert_array_equal(state.batch_stats["norm1"]["mean"], mean)


def test_frozen_norms_train_by_their_statistics_and_keep_them(
    first, tiny_data, tmp_path
):
    run, _ = first
    config = starting(first, norm_statistics="moving")
    tuned = runs.train(config, tiny_data, workdir=tmp_path, options=OPTIONS)
    chex.assert_trees_all_equal(
        tuned.variables["batch_stats"], run.variables["batch_stats"]
    )
    before, after = (r.variables["params"]["dense1"]["kernel"] for r in (run, tuned))
    assert np.abs(after - before).max() > 1e-4
    # In training mode its first loss is that of prediction, on the same images.
    trainer = loop.Trainer(config, tiny_data, start=run.variables)
    rows = trainer._order.of_epoch(0)[0]
    images, labels = (array[rows] for array in trainer.data.train)
    logits = np.asarray(run.predict(images), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(len(labels)), labels].mean()
    np.testing.assert_allclose(
        tuned.results["first_step_losses"][0], expected, rtol=1e-5
    )
    assert runs.load(tmp_path).config == config


def test_run_that_cannot_be_started_from_is_refused_before_anything_is_written(
    first, tiny_data, tmp_path
):
    other = starting(first, model="mlp:widths=8")
    workdir = tmp_path / "new"
    with pytest.raises(ConfigError, match="another network: .*norm1.* and others diff"):
        runs.train(other, tiny_data, workdir=workdir, options=OPTIONS)
    missing = dataclasses.replace(CONFIG, init_from=str(tmp_path / "none"))
    with pytest.raises(RunError, match="init_from='.*none' does not exist; expected"):
        runs.train(missing, tiny_data, workdir=workdir, options=OPTIONS)
    with pytest.raises(ConfigError, match="init_from is given for a sweep"):
        runs.sweep([starting(first)], tiny_data, workdir=workdir, options=OPTIONS)
    assert not workdir.exists()
    with pytest.raises(ConfigError, match="give start=variables"):
        loop.Trainer(starting(first), tiny_data)


def test_config_of_a_run_before_there_were_these_fields_is_read():
    values = CONFIG.to_dict()
    for name in ("norm_statistics", "init_from", "init_statistics"):
        del values[name]
    assert TrainConfig.from_dict(values) == CONFIG
