import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = "batch_norm growth lenet population profile scaling start_up sweep".split()


def ran(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_explains_itself(name):
    run = ran(name, "--help")
    assert f"python -m experiments.benchmarks.{name} --workdir=" in run.stdout
    for flag in ("workdir", "rounds", "smoke"):
        assert f"--{flag}:" in run.stdout or f"--[no]{flag}:" in run.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_earlier_measurements_are_kept(name, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    refused = ran(name, f"--workdir={tmp_path}", "--smoke")
    assert refused.returncode == 1
    assert f"error: {tmp_path} holds results, which would be lost" in refused.stderr
    assert (tmp_path / "results.json").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", ".lock"}


def test_sizes_that_are_none_are_named_before_anything_is_measured(tmp_path):
    refused = ran("population", f"--workdir={tmp_path / 'new'}", "--sizes=1e3")
    assert refused.returncode == 1
    assert refused.stderr == "error: sizes=['1e3']; expected such as 1000,4000\n"
    assert not (tmp_path / "new").exists()
