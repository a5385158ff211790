import importlib
import pkgutil
import runpy
from pathlib import Path

import pytest
from absl import app

from experiments import benchmarks

app.define_help_flags()  # once in a process

ROOT = Path(__file__).parents[2]
MODULES = [
    importlib.import_module(f"experiments.benchmarks.{found.name}")
    for found in pkgutil.iter_modules(benchmarks.__path__)
]
BENCHMARKS = {
    module.BENCHMARK.name: module for module in MODULES if hasattr(module, "BENCHMARK")
}


@pytest.fixture
def run(in_process):
    """Runs a benchmark's file here; returns what it printed."""

    def run(name, *arguments):
        path = BENCHMARKS[name].__file__
        return in_process(lambda: runpy.run_path(path, run_name="__main__"), *arguments)

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_is_described(name):
    module, described = BENCHMARKS[name], BENCHMARKS[name].BENCHMARK
    command = f"python -m experiments.benchmarks.{name}"
    assert module.__name__ == f"experiments.benchmarks.{name}"
    assert module.__doc__.splitlines()[0].endswith("?")
    assert f"{command} --workdir=" in module.__doc__
    assert command in (ROOT / "SPEED.md").read_text()
    smoke = described.design(**described.smoke)
    assert smoke.rounds < described.design().rounds
    assert set(described.needed) <= set(described.arms)
    titles = [arm.title for arm in described.arms.values()]
    assert len(set(titles)) == len(titles)


def test_benchmark_has_a_flag_for_each_option(run, capsys):
    with pytest.raises(SystemExit):
        run("lenet", "--help")
    shown = capsys.readouterr().out
    assert "How fast does LeNet" in shown
    assert "--steps=" not in shown
    for flag in (
        *("arms", "batch_size", "data_dir", "dataset", "data_files", "rounds", "smoke"),
        *("steps", "torch_compile", "workdir"),
    ):
        assert f"--{flag}:" in shown or f"--[no]{flag}:" in shown


def test_earlier_measurements_are_kept(run, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    message = f"error: {tmp_path} holds results, which would be lost"
    with pytest.raises(SystemExit, match=message):
        run("sweep", f"--workdir={tmp_path}", "--smoke")
    assert (tmp_path / "results.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_bad_options_are_named_before_anything_is_measured(run, tmp_path):
    with pytest.raises(SystemExit) as refused:
        run("population", f"--workdir={tmp_path / 'new'}", "--sizes=0", "--rounds=0")
    assert refused.value.code == (
        "error: rounds=0; expected a number at least 1; sizes=(0,); expected of each "
        "value a number at least 1"
    )
    assert not (tmp_path / "new").exists()
