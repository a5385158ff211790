import dataclasses
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import zlib

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.runs import json_files, results, summary, sweeps
from bn_jax.runs import run as run_lib
from bn_jax.runs.interrupt import Interrupted
from bn_jax.runs.json_files import RunError
from bn_jax.training import parallel, scoring
from bn_jax.training.config import RunOptions
from bn_jax.training.evaluation import Evaluator
from bn_jax.version import __version__
from marks import slow_but

# A checkpoint amid an epoch of five steps, one before its end, and none at it.
OPTIONS = RunOptions(devices="1", checkpoint_every="2steps")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture(scope="module")
def run(finished, tiny_config, tiny_data):
    """A run that was never stopped."""
    return run_lib.train(tiny_config, tiny_data, workdir=finished, options=OPTIONS)


def test_run_leaves_all_its_files(run, finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock",
        "checkpoints",
        "checksums.json",
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
    assert sizes == {"norm1": 16, "norm2": 16}
    params = run.variables["params"]
    np.testing.assert_allclose(learned["norm2"]["beta"], params["norm2"]["bias"])


def test_reading_back_gives_the_same_numbers(run, finished, tiny_data):
    read = run_lib.load(finished)
    chex.assert_trees_all_equal(read.variables, run.variables)
    assert read.config == run.config
    assert read.results == run.results
    devices = jax.devices()[:1]
    score = scoring.score(
        read.network,
        read.variables,
        Evaluator(read.network.predict, tiny_data.test, devices=devices),
        tiny_data.train.images,
        devices=devices,
    )
    assert score.to_row().items() <= read.results.items()
    images = tiny_data.test.images
    np.testing.assert_array_equal(read.predict(images), run.predict(images))


def test_finished_run_is_not_overwritten(run, finished, tiny_config, tiny_data):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="finished run of this.*--load.*train_or_load"):
        run_lib.train(tiny_config, tiny_data, workdir=finished)
    other = dataclasses.replace(tiny_config, seed=3, epochs=4)
    message = "another config .epochs: 2 there, 4 now; seed: 0 there, 3 now"
    with pytest.raises(RunError, match=message):
        run_lib.train(other, tiny_data, workdir=finished)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


TIMES = ("seconds", "examples_per_second", "compile_seconds")


def without_times(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def assert_same_run(a, b):
    """Two runs are the same, bit for bit, but for the times that they took."""
    chex.assert_trees_all_equal(a.variables, b.variables)
    assert list(map(without_times, a.metrics)) == list(map(without_times, b.metrics))
    assert without_times(a.results) == without_times(b.results)


def steps_in(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names)


def test_read_run_is_the_trained_run(run, finished):
    assert_same_run(run_lib.load(finished), run)
    assert results.read_metrics(finished) == run.metrics
    assert steps_in(finished) == [6, 8, 10]


# More epochs.


@pytest.mark.slow
def test_longer_run_goes_on_from_the_end_of_a_shorter_one(
    run, finished, tiny_config, tiny_data, tmp_path
):
    copy, whole = tmp_path / "copy", tmp_path / "whole"
    shutil.copytree(finished, copy)
    longer = dataclasses.replace(tiny_config, epochs=3)
    said = run_lib.train_or_load(longer, tiny_data, workdir=copy, options=OPTIONS)
    expected = run_lib.train(longer, tiny_data, workdir=whole, options=OPTIONS)
    assert_same_run(said, expected)
    assert_same_run(run_lib.load(copy), expected)
    assert said.metrics[:2] == run.metrics  # not trained again, times included
    assert json_files.read_json(copy / "results_2_epochs.json") == run.results
    with pytest.raises(RunError, match="another config .epochs: 3 there, 2 now"):
        run_lib.train(tiny_config, tiny_data, workdir=copy, options=OPTIONS)


@pytest.mark.slow
def test_longer_run_of_other_rates_is_refused_with_the_reason(
    tiny_config, tiny_data, tmp_path
):
    config = dataclasses.replace(tiny_config, epochs=1, schedule="cosine")
    run_lib.train(config, tiny_data, workdir=tmp_path, options=OPTIONS)
    longer = dataclasses.replace(config, epochs=2)
    message = "a run of 1 epoch; with schedule='cosine.*, a run of 2 has other"
    for train in (run_lib.train, run_lib.train_or_load):
        with pytest.raises(RunError, match=message):
            train(longer, tiny_data, workdir=tmp_path, options=OPTIONS)
    assert (tmp_path / "results.json").exists()


def test_longer_run_needs_a_checkpoint_and_keeps_what_is_there(
    run, finished, tiny_config, tiny_data, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints")
    longer = dataclasses.replace(tiny_config, epochs=3)
    with pytest.raises(RunError, match="fewer epochs, and no checkpoint to go on from"):
        run_lib.train(longer, tiny_data, workdir=copy, options=OPTIONS)
    assert_same_run(run_lib.load(copy), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "step", "signum"),
    [
        ("memory", 3, signal.SIGTERM),
        ("memory", 5, signal.SIGINT),
        ("memory", 8, signal.SIGTERM),
        ("stream", 3, signal.SIGTERM),
    ],
)
def test_run_that_was_told_to_stop_goes_on_bit_for_bit(
    where, step, signum, run, signal_at, tmp_path, tiny_config, tiny_data, monkeypatch
):
    monkeypatch.setattr(parallel, "STEPS_PER_CALL", 1)  # to stop between checkpoints
    train = functools.partial(
        run_lib.train,
        tiny_config,
        tiny_data,
        workdir=tmp_path,
        options=dataclasses.replace(OPTIONS, input=where),
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as raised:
        signal_at(step, signum, patch)
        train()
    assert raised.value.signum == signum
    assert str(raised.value) == (
        f"stopped at step {step} of 10; the same command resumes from there"
    )
    assert steps_in(tmp_path)[-1] == step
    assert len(results.read_metrics(tmp_path)) == step // 5
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    assert_same_run(train(), run)
    assert_same_run(run_lib.load(tmp_path), run)
    assert [row["epoch"] for row in results.read_metrics(tmp_path)] == [1, 2]


def test_signal_in_the_last_step_lets_the_run_finish(
    run, signal_at, tmp_path, tiny_config, tiny_data, monkeypatch
):
    signal_at(10, signal.SIGTERM, monkeypatch)
    assert_same_run(run_lib.train(tiny_config, tiny_data, workdir=tmp_path), run)
    assert steps_in(tmp_path) == [5, 10]  # by default each epoch, which is five steps


@pytest.fixture
def stopped(finished, run, tmp_path):
    """A copy of the run, as if stopped after its second epoch and before its end."""
    copy = tmp_path / "stopped"
    shutil.copytree(finished, copy)
    for name in ("results.json", "curves.png", "gamma_beta.png"):
        (copy / name).unlink()
    shutil.rmtree(copy / "variables")
    shutil.rmtree(copy / "checkpoints" / "10")
    return copy


def test_metrics_hold_each_epoch_once_whatever_was_left_of_them(
    stopped, run, tiny_config, tiny_data
):
    # The last checkpoint is of step 8; the second epoch has ended since, and the
    # process died in writing a line.
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 10, "loss": 0.5}\n{"epoch": 3, "st')
    again = run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS)
    assert_same_run(again, run)
    assert_same_run(run_lib.load(stopped), run)
    # The first epoch was not trained again.
    assert again.metrics[0] == run.metrics[0]


def test_run_without_a_checkpoint_begins_anew(stopped, run, tiny_config, tiny_data):
    shutil.rmtree(stopped / "checkpoints")
    assert_same_run(
        run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS), run
    )


def test_run_that_was_trained_but_not_scored_is_finished(
    stopped, finished, run, tiny_config, tiny_data
):
    shutil.copytree(finished / "checkpoints" / "10", stopped / "checkpoints" / "10")
    again = run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS)
    assert_same_run(again, run)
    assert again.metrics == run.metrics


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unfinished_run_is_refused_if_it_is_not_to_be_gone_on_with(
    stopped, tiny_config, tiny_data
):
    before = contents(stopped)
    options = dataclasses.replace(OPTIONS, resume=False)
    with pytest.raises(
        RunError, match="unfinished run of this config; give resume=True"
    ):
        run_lib.train(tiny_config, tiny_data, workdir=stopped, options=options)
    assert contents(stopped) == before


def test_checkpoint_of_other_data_is_refused(stopped, tiny_config, tiny_data):
    fewer = data_lib.Split(*(array[:160] for array in tiny_data.train))
    other = dataclasses.replace(tiny_data, train=fewer)
    message = "data: 'tiny, 170 images' there, 'tiny, 160 images' now"
    with pytest.raises(RunError, match=message):
        run_lib.train(tiny_config, other, workdir=stopped, options=OPTIONS)


@pytest.mark.slow
def test_damaged_checkpoint_is_named_and_moved_away_lets_the_run_go_on(
    stopped, run, tmp_path, tiny_config, tiny_data
):
    damaged = stopped / "checkpoints" / "8"
    (damaged / "run" / "metadata").write_text("{")
    message = f"{damaged} is damaged: move it away, .*resumes from step 6"
    with pytest.raises(RunError, match=message):
        run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS)
    damaged.rename(tmp_path / "away")
    assert_same_run(
        run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS), run
    )


@pytest.mark.slow
def test_never_writes_a_checkpoint_at_a_signal_alone(
    run, signal_at, tmp_path, tiny_config, tiny_data, monkeypatch
):
    train = functools.partial(
        run_lib.train,
        tiny_config,
        tiny_data,
        workdir=tmp_path,
        options=dataclasses.replace(OPTIONS, checkpoint_every="never"),
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(5, signal.SIGTERM, patch)
        train()
    assert steps_in(tmp_path) == [5]
    assert_same_run(train(), run)
    assert steps_in(tmp_path) == [5]


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(
    tmp_path, tiny_config, tiny_data
):
    config = dataclasses.replace(
        tiny_config, model="mlp:widths=16", norm="none", learning_rate=1e38
    )
    options = dataclasses.replace(OPTIONS, checkpoint_every="1step")
    with pytest.raises(FloatingPointError, match=r"at step \d+ ") as raised:
        run_lib.train(config, tiny_data, workdir=tmp_path, options=options)
    step = int(re.search(r"at step (\d+) ", str(raised.value))[1])
    assert steps_in(tmp_path)[-1] == step - 1
    # The same command comes to the same end.
    with pytest.raises(FloatingPointError, match=re.escape(str(raised.value))):
        run_lib.train(config, tiny_data, workdir=tmp_path, options=options)


@pytest.mark.slow
def test_folder_in_which_another_process_is_at_work_is_refused(
    stopped, run, tiny_config, tiny_data
):
    hold = (
        "import sys, time; from bn_jax.runs import workdirs\n"
        "with workdirs.locked(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    before = contents(stopped)
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(stopped)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        message = f"another process is at work in {stopped}"
        try:
            with pytest.raises(RunError, match=message):
                run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS)
        finally:
            other.kill()
    assert contents(stopped) == before
    # A process that was killed holds nothing.
    assert_same_run(
        run_lib.train(tiny_config, tiny_data, workdir=stopped, options=OPTIONS), run
    )


@pytest.mark.parametrize("parent", slow_but(["file"], ["file", "/proc"]))
def test_folder_that_cannot_be_made_is_refused(
    parent, tmp_path, tiny_config, tiny_data
):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / parent / "run"  # an absolute parent replaces tmp_path
    with pytest.raises(
        RunError, match=f"cannot write to .* {workdir}: .*another workdir"
    ):
        run_lib.train(tiny_config, tiny_data, workdir=workdir)


def test_finished_run_is_read_instead_of_trained(
    run, finished, tmp_path, tiny_config, tiny_data
):
    assert_same_run(
        run_lib.train_or_load(
            tiny_config, tiny_data, workdir=finished, options=OPTIONS
        ),
        run,
    )
    other = dataclasses.replace(tiny_config, seed=3)
    with pytest.raises(RunError, match=r"another run \(seed: 0 there, 3 now\)"):
        run_lib.train_or_load(other, tiny_data, workdir=finished, options=OPTIONS)


def test_gamma_and_beta_are_kept_of_norms_without_statistics_too():
    params = {
        "dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)},
        "group": {
            "norm": {"scale": np.array([1.0, 2.0]), "bias": np.array([3.0, 4.0])}
        },
        "center": {"bias": np.zeros(2)},
        "bias": np.ones(2),  # of the model itself
        "fixup": {"scale": np.ones(())},
    }
    found = summary.gamma_beta({"params": params, "batch_stats": {}})
    assert found == {
        "center": {"beta": [0.0, 0.0]},
        "group/norm": {"gamma": [1.0, 2.0], "beta": [3.0, 4.0]},
    }


def test_norms_are_listed_in_the_order_of_the_network(tmp_path, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, model="resnet:depth=8,width=2", epochs=1)
    run = run_lib.train(config, tiny_data, workdir=tmp_path / "resnet")
    names = [*run_lib.load(tmp_path / "resnet").results["gamma_beta"]]
    assert names[:3] == ["stem_norm", "stage1_block1/norm1", "stage1_block1/norm2"]
    assert sorted(names) == sorted(run.results["gamma_beta"])
    assert len(names) == 7


@pytest.mark.slow
def test_run_without_norm_has_no_gamma_and_no_gap(tmp_path, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, norm="none", epochs=1)
    run = run_lib.train(config, tiny_data, workdir=tmp_path / "none")
    assert run.results["gamma_beta"] == {}
    assert run.results["test_accuracy"] == run.results["test_accuracy_exact"]
    assert run.results["moving_averages"] is False
    assert not (tmp_path / "none" / "gamma_beta.png").exists()
    assert run_lib.load(tmp_path / "none").results == run.results


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "variables"), "no folder variables in"),
        (
            lambda d: (d / "results.json").unlink(),
            "the run in .* has not ended; train it",
        ),
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


def test_finished_run_on_other_images_is_refused_as_another(
    run, finished, tiny_config, tiny_data
):
    other = dataclasses.replace(tiny_data, source=f"{tiny_data.source}, retaken")
    for epochs in (tiny_config.epochs, tiny_config.epochs + 1):
        config = dataclasses.replace(tiny_config, epochs=epochs)
        with pytest.raises(RunError, match="holds a run on other images .*, retaken'"):
            run_lib.train(config, other, workdir=finished, options=OPTIONS)
    assert run_lib.load(finished).results == run.results


def test_variables_of_another_model_are_refused(run, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "norm": "none"}))
    with pytest.raises(RunError, match="config.json is damaged: it is not what check"):
        run_lib.load(copy)
    known = json_files.read_json(copy / "checksums.json")
    known["files"]["config.json"] = zlib.crc32((copy / "config.json").read_bytes())
    json_files.write_json(copy / "checksums.json", known)
    with pytest.raises(
        RunError, match="are of another model: .* unknown batch_stats/norm1/"
    ):
        run_lib.load(copy)


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (lambda x: x / np.float32(255), r": of images that are scaled .* the logits"),
        (lambda x: x[0], r": give one image as images\[None\]"),
        (lambda x: x[..., 0], r": give one channel as images\[..., None\]"),
        (lambda x: np.moveaxis(x, -1, 1), r": give numpy.moveaxis\(images, 1, -1\)"),
        (lambda x: x[:, 1:], ""),
    ],
)
def test_images_that_are_no_bytes_of_the_runs_shape_are_refused(
    change, mend, run, tiny_data
):
    with pytest.raises(ValueError, match=rf"expected bytes \[N, .*, 0 to 255{mend}$"):
        run.predict(change(tiny_data.test.images))


def test_images_of_the_data_set_are_predicted_from_their_crops(
    tiny_config, tiny_data, tmp_path
):
    height = tiny_data.image_shape[0]
    for size in (height - 2, height + 2):  # of the images, padded by 4
        config = dataclasses.replace(
            tiny_config, augment=f"crop_and_flip:size={size}", epochs=1
        )
        folder = tmp_path / str(size)
        run = run_lib.train(config, tiny_data, workdir=folder, options=OPTIONS)
        images, labels = tiny_data.test
        found = np.asarray(run.predict(images)).argmax(1)
        assert np.mean(found == labels) == run.results["test_accuracy"]
        with pytest.raises(ValueError, match=rf"expected bytes \[N, {height}, "):
            run.predict(np.zeros((2, size, size, 1), np.uint8))


def test_no_images_have_no_logits(run, tiny_data):
    logits = run.predict(tiny_data.test.images[:0])
    assert logits.shape == (0, tiny_data.num_classes)
    assert logits.dtype == run.predict(tiny_data.test.images[:1]).dtype


def test_integers_that_are_no_bytes_are_refused(run, tiny_data):
    images = tiny_data.test.images[:2].astype(int)
    np.testing.assert_array_equal(
        run.predict(images), run.predict(images.astype(np.uint8))
    )
    with pytest.raises(ValueError, match="hold values from 0 to 510; expected bytes"):
        run.predict(images * 0 + np.array([0, 510]).reshape(2, 1, 1, 1))


def test_images_that_are_scaled_already_are_refused(tiny_config, tiny_data, tmp_path):
    images, labels = tiny_data.train
    scaled = tiny_data.train._replace(images=images / np.float32(255), labels=labels)
    data = dataclasses.replace(tiny_data, train=scaled)
    with pytest.raises(
        data_lib.DataError, match="dtype float32; expected bytes, uint8"
    ):
        run_lib.train(tiny_config, data, workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_given_by_name_are_refused(tiny_config, tmp_path):
    with pytest.raises(TypeError, match=r"data are a str; .*bn_jax.data.load"):
        run_lib.train(tiny_config, "sample", workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_of_another_kind_is_named(run, finished, tmp_path):
    with pytest.raises(RunError, match="holds a run, not a sweep; bn_jax.runs.load"):
        sweeps.load(finished)
    (tmp_path / "config.json").write_text('{"experiment": "bias", "epochs": 2}')
    for load in (run_lib.load, sweeps.load):
        with pytest.raises(RunError, match="holds the experiment bias; give the"):
            load(tmp_path)


def test_folder_that_there_is_not_is_named(tmp_path):
    (tmp_path / "file").touch()
    for load in (run_lib.load, sweeps.load):
        with pytest.raises(RunError, match="workdir='.*none' does not exist; expected"):
            load(tmp_path / "none")
        with pytest.raises(RunError, match="workdir='.*file' is a file; expected the"):
            load(tmp_path / "file")


def test_runs_in_a_folder_of_runs_are_named(tmp_path):
    message = "no config.json in .*; expected the working directory of a run"
    (tmp_path / "first").mkdir()
    with pytest.raises(RunError, match=f"{message}$"):
        run_lib.load(tmp_path)
    (tmp_path / "first" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=f"{message}, such as {tmp_path}/first$"):
        run_lib.load(tmp_path)


def test_run_of_an_older_version_is_refused_by_its_name(run, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    of_now = json.loads((copy / "config.json").read_text())
    older = {"activation": "sigmoid", "momentum": 0.9, "norm_layers": "1111"}
    kept = ("dataset", "norm", "epochs", "batch_size", "learning_rate", "seed")
    older |= {name: of_now[name] for name in kept}
    (copy / "config.json").write_text(json.dumps(older))
    (copy / "environment.json").write_text('{"bn_jax": "0.1.0"}')
    with pytest.raises(ConfigError) as caught:
        run_lib.load(copy)
    assert str(caught.value) == (
        f"{copy} was written by bn_jax 0.1.0, whose configs {__version__} does not "
        "read; read it with that version, or train it again"
    )
