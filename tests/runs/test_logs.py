"""Logs for other programs: metrics.csv and TensorBoard's event files."""

import csv
import dataclasses
import signal
import struct
import sys

import numpy as np
import pytest

from bn_jax.fields import ConfigError
from bn_jax.runs import run as run_lib
from bn_jax.runs.interrupt import Interrupted
from bn_jax.runs.json_files import RunError
from bn_jax.runs.summary import layer_values
from bn_jax.training.config import RunOptions


def csv_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def events(folder):
    """The values that TensorBoard would show, of all event files, by tag and step."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status:  # a start, from a step on: later ones go
                found = {k: v for k, v in found.items() if k[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = (
                    value.histo if value.HasField("histo") else value.simple_value
                )
    return found


OPTIONS = RunOptions(devices="1", log="csv,tensorboard", checkpoint_every="3steps")


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(
        tiny_config, model="mlp:widths=8", epochs=3, schedule="steps:at=0.6666"
    )


@pytest.mark.slow
def test_logs_have_each_epoch_once_also_of_a_run_that_was_stopped(
    config, tiny_data, tmp_path, signal_at, monkeypatch
):
    train = {"workdir": tmp_path / "run", "options": OPTIONS}
    signal_at(6, signal.SIGTERM, monkeypatch)  # amid the second epoch
    with pytest.raises(Interrupted):
        run_lib.train(config, tiny_data, **train)
    monkeypatch.undo()
    assert len(csv_rows(tmp_path / "run")) == 1
    run = run_lib.train(config, tiny_data, **train)

    rows = csv_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, report in zip(rows, run.metrics, strict=True):
        for name, value in report.items():
            assert float(row[name]) == pytest.approx(value)
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([1.0, 1.0, 0.1])
    values = layer_values(run.variables)
    assert values.keys() == {
        f"norm1/{name}" for name in ("gamma", "beta", "mean", "var")
    }
    shown = events(tmp_path / "run")
    for name, features in values.items():
        assert float(rows[-1][f"{name}/mean"]) == pytest.approx(features.mean())
        histogram = shown[name, 15]
        assert histogram.num == 8
        assert (histogram.min, histogram.max) == (features.min(), features.max())
    for tag in ("loss", "test_accuracy", "examples_per_second", "norm1/var/mean"):
        points = {step: value for (t, step), value in shown.items() if t == tag}
        assert list(points) == [5, 10, 15]
        np.testing.assert_allclose(
            list(points.values()), [float(row[tag]) for row in rows], rtol=1e-5
        )


def test_bad_logs_are_refused_before_anything_is_written(
    config, tiny_data, tmp_path, monkeypatch
):
    for log in ("tensorbord", "csv,", "", "none,csv"):
        with pytest.raises(ConfigError, match="expected csv, tensorboard, both"):
            RunOptions(log=log)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[log\]'"):
        run_lib.train(config, tiny_data, workdir=tmp_path / "run", options=OPTIONS)
    assert not (tmp_path / "run").exists()


def test_damaged_log_is_named(config, tiny_data, tmp_path):
    folder = tmp_path / "run"
    config = dataclasses.replace(config, schedule="constant", epochs=1)
    options = dataclasses.replace(OPTIONS, log="csv")
    run_lib.train(config, tiny_data, workdir=folder, options=options)
    (folder / "metrics.csv").write_text("no,table\nof,ours\n")
    longer = dataclasses.replace(config, epochs=2)
    with pytest.raises(RunError, match=r"metrics.csv is damaged: .* move it away"):
        run_lib.train(longer, tiny_data, workdir=folder, options=options)
