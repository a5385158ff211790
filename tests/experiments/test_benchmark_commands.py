import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import benchmarks

ROOT = Path(__file__).parents[2]
MODULES = [
    importlib.import_module(f"experiments.benchmarks.{found.name}")
    for found in pkgutil.iter_modules(benchmarks.__path__)
]
BENCHMARKS = {
    module.BENCHMARK.name: module for module in MODULES if hasattr(module, "BENCHMARK")
}


def ran(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_is_described(name):
    module, described = BENCHMARKS[name], BENCHMARKS[name].BENCHMARK
    command = f"python -m experiments.benchmarks.{name}"
    assert module.__name__ == f"experiments.benchmarks.{name}"
    assert module.__doc__.splitlines()[0].endswith("?")
    assert f"{command} --workdir=" in module.__doc__
    assert command in (ROOT / "README.md").read_text()
    smoke = described.design(**described.smoke)
    assert smoke.rounds < described.design().rounds
    assert set(described.needed) <= set(described.arms)
    titles = [arm.title for arm in described.arms.values()]
    assert len(set(titles)) == len(titles)


def test_benchmark_has_a_flag_for_each_option():
    run = ran("lenet", "--help")
    assert "How fast does LeNet" in run.stdout
    assert "--steps=" not in run.stdout
    for flag in (
        *("arms", "batch_size", "data_dir", "dataset", "data_files", "rounds", "smoke"),
        *("steps", "torch_compile", "workdir"),
    ):
        assert f"--{flag}:" in run.stdout or f"--[no]{flag}:" in run.stdout


def test_earlier_measurements_are_kept(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    refused = ran("sweep", f"--workdir={tmp_path}", "--smoke")
    assert refused.returncode == 1
    assert f"error: {tmp_path} holds results, which would be lost" in refused.stderr
    assert (tmp_path / "results.json").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", ".lock"}


def test_bad_options_are_named_before_anything_is_measured(tmp_path):
    refused = ran(
        "population", f"--workdir={tmp_path / 'new'}", "--sizes=0", "--rounds=0"
    )
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: rounds=0; expected a number at least 1; sizes=(0,); expected of each "
        "value a number at least 1\n"
    )
    assert not (tmp_path / "new").exists()
