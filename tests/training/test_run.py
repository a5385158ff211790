import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest
from PIL import Image

from bn_jax import results
from bn_jax.results import RunError
from bn_jax.training import loop
from bn_jax.training import run as run_lib


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture
def run(finished, tiny_config, tiny_data):
    """A finished run; trained once for this file."""
    if finished.exists():
        return run_lib.load(finished)
    return run_lib.train_into(finished, tiny_config, tiny_data)


def test_run_leaves_all_its_files(run, finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.json",
        "curves.png",
        "environment.json",
        "gamma_beta.png",
        "metrics.jsonl",
        "results.json",
        "variables",
    ]
    for name in ("curves.png", "gamma_beta.png"):
        pixels = np.asarray(Image.open(finished / name).convert("L"))
        assert min(pixels.shape) > 300
        assert (pixels < 128).sum() > 500  # something is drawn


def test_results_name_all_that_the_experiment_promises(run, tiny_data):
    assert run.results["data_source"] == tiny_data.source
    assert run.results["train_loss"] == run.metrics[-1]["loss"]
    assert run.results["train_accuracy"] == run.metrics[-1]["train_accuracy"]
    assert run.results["examples_per_second"] > 0
    learned = run.results["gamma_beta"]
    sizes = {layer: len(values["gamma"]) for layer, values in learned.items()}
    assert sizes == {"norm1": 6, "norm2": 16, "norm3": 120, "norm4": 84}
    params = run.variables["params"]
    np.testing.assert_allclose(learned["norm2"]["beta"], params["norm2"]["bias"])


def test_reading_back_gives_the_same_numbers(
    run, finished, tmp_path, tiny_config, tiny_data
):
    trained = run_lib.train_into(tmp_path / "again", tiny_config, tiny_data)
    read = run_lib.load(tmp_path / "again")
    chex.assert_trees_all_equal(read.variables, trained.variables)
    assert read.config == trained.config
    assert read.results == trained.results
    score = loop.score(read.model, read.variables, tiny_data)
    assert score._asdict().items() <= read.results.items()


def test_finished_run_is_not_overwritten(run, finished, tiny_config, tiny_data):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="finished run of this config.*--load"):
        run_lib.train_into(finished, tiny_config, tiny_data)
    other = dataclasses.replace(tiny_config, seed=3, norm="none")
    message = (
        "another config .norm: 'batch_norm' there, 'none' now; seed: 0 there, 3 now"
    )
    with pytest.raises(RunError, match=message):
        run_lib.train_into(finished, other, tiny_data)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_interrupted_run_of_the_same_config_is_started_over(
    run, finished, tmp_path, tiny_config, tiny_data
):
    interrupted = tmp_path / "run"
    shutil.copytree(finished, interrupted)
    (interrupted / results.RESULTS).unlink()
    again = run_lib.train_into(interrupted, tiny_config, tiny_data)
    assert len(again.metrics) == tiny_config.epochs
    assert again.results["train_loss"] == run.results["train_loss"]


def test_run_without_norm_has_no_gamma_and_no_gap(tmp_path, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, norm="none", epochs=1)
    run = run_lib.train_into(tmp_path / "none", config, tiny_data)
    assert run.results["gamma_beta"] == {}
    assert run.results["test_accuracy"] == run.results["test_accuracy_exact"]
    assert not (tmp_path / "none" / "gamma_beta.png").exists()
    assert run_lib.load(tmp_path / "none").results == run.results


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "variables"), "no folder variables in"),
        (lambda d: (d / "results.json").unlink(), "no results.json in"),
        (
            lambda d: (d / "config.json").write_text('{"epochs": '),
            "config.json.*damaged",
        ),
        (lambda d: (d / "metrics.jsonl").write_text("{"), "metrics.jsonl.*damaged"),
        (lambda d: (d / "metrics.jsonl").unlink(), "no metrics.jsonl in"),
        (
            lambda d: [
                p.write_bytes(b"") for p in d.glob("variables/*") if p.is_file()
            ],
            "cannot read the variables in",
        ),
    ],
)
def test_damaged_run_is_named(run, finished, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    damage(copy)
    with pytest.raises(RunError, match=message):
        run_lib.load(copy)


def test_variables_of_another_model_are_refused(run, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "norm": "none"}))
    with pytest.raises(RunError, match="belong to another model"):
        run_lib.load(copy)
