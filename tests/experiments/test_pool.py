import dataclasses

import jax
import pytest

from bn_jax import data as data_lib
from bn_jax.runs import sweeps
from bn_jax.training.config import RunOptions, TrainConfig
from experiments.pool import Pool


def config(seed, **choices):
    return TrainConfig(
        dataset="sample",
        model="mlp:widths=8",
        train_examples=256,
        batch_size=128,
        epochs=1,
        seed=seed,
        **choices,
    )


@pytest.fixture
def trained(monkeypatch):
    """The seeds of each sweep that is trained."""
    seeds = []
    train = sweeps.sweep

    def sweep(configs, *arguments, **options):
        seeds.append([c.seed for c in configs])
        return train(configs, *arguments, **options)

    monkeypatch.setattr(sweeps, "sweep", sweep)
    return seeds


def test_run_that_is_in_the_pool_is_not_trained_again(tmp_path, trained):
    data = data_lib.load("sample")
    pool = Pool(tmp_path / "pool", RunOptions(devices="1"))
    first = pool.train([config(0), config(1)], data, name="first")
    again = Pool(tmp_path / "pool", RunOptions(devices="1"))
    second = again.train([config(1), config(2), config(0)], data, name="second")
    assert trained == [[0, 1], [2]]
    assert [m.row["config"]["seed"] for m in second] == [1, 2, 0]
    assert second[0].row == first[1].row
    assert second[2].row == first[0].row
    assert second[1].row["seconds"] > 0
    assert "test_accuracy_exact" in second[1].row

    # Each with the variables that it ended with, which are those of a run alone.
    (alone,) = Pool(tmp_path / "other", RunOptions(devices="1")).train(
        [config(2)], data, name="alone"
    )
    jax.tree.map(
        lambda a, b: (a == b).all() or pytest.fail("differ"),
        second[1].variables(),
        alone.variables(),
    )
    assert alone.row["loss"] == second[1].row["loss"]


def test_run_that_lacks_the_scores_asked_for_is_trained_again(tmp_path, trained):
    data = data_lib.load("sample")
    pool = Pool(tmp_path / "pool", RunOptions(devices="1"))
    (without,) = pool.train([config(0)], data, name="arm")
    assert "train_loss_average" not in without.row
    for _ in range(2):
        (scored,) = pool.train([config(0)], data, name="arm", score_training=True)
        assert {"train_loss_average", "train_loss_exact"} <= scored.row.keys()
    pool.train([config(0)], data, name="arm")
    assert trained == [[0], [0]]
    assert scored.row["loss"] == without.row["loss"]


def test_run_of_another_config_or_data_set_is_trained(tmp_path, trained):
    data = data_lib.load("sample")
    pool = Pool(tmp_path / "pool", RunOptions(devices="1"))
    pool.train([config(0)], data, name="a")
    pool.train([config(0, learning_rate=0.5)], data, name="a")
    other = dataclasses.replace(data, source="elsewhere")
    pool.train([config(0)], other, name="a")
    assert trained == [[0], [0], [0]]
