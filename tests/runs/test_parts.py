"""A sweep in parts, each trained apart, is the sweep undivided."""

import dataclasses
import shutil

import chex
import pytest

from bn_jax.fields import ConfigError
from bn_jax.runs import json_files, parts, results, sweeps
from bn_jax.runs.json_files import RunError
from bn_jax.runs.sweeps import Part
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.members import parse

OPTIONS = RunOptions(devices="1")
SPECS = {
    "rates and seeds": "learning_rate=0.1,1e38;seed=0..2",
    "two programs": "norm=batch_norm:momentum=0.5|none;seed=0..2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def configs(tiny_config):
    base = dataclasses.replace(tiny_config, model="mlp:widths=8", epochs=1)
    return {name: parse(spec, base) for name, spec in SPECS.items()}


def train_parts(configs, data, workdir, num_parts, numbers=None):
    for number in numbers or range(1, num_parts + 1):
        part = Part(number, num_parts)
        sweeps.sweep(configs, data, workdir=workdir, options=OPTIONS, part=part)


@pytest.mark.slow  # test_jobs.py merges two parts in the quick run
@pytest.mark.parametrize("num_parts", [1, 2, 4, 6])
@pytest.mark.parametrize("name", SPECS)
def test_merged_parts_are_the_undivided_sweep_bit_for_bit(
    name, num_parts, folder, configs, tiny_data
):
    whole, workdir = folder / name, folder / f"{name} of {num_parts}"
    sweeps.sweep(configs[name], tiny_data, workdir=whole, options=OPTIONS)
    train_parts(configs[name], tiny_data, workdir, num_parts)
    merged = {"workdir": workdir, "num_parts": num_parts}
    rows = parts.merge(configs[name], tiny_data, **merged)
    for file in ("runs.jsonl", "config.json"):
        assert (workdir / file).read_bytes() == (whole / file).read_bytes()
    # With what `load` checks: sums of all arrays and files.
    for one, other in zip(sweeps.load(workdir), sweeps.load(whole), strict=True):
        assert one.config == other.config and one.results == other.results
        chex.assert_trees_all_equal(one.variables, other.variables)
    assert rows == json_files.read_rows(whole / "runs.jsonl")
    assert (workdir / "sweep.png").exists()
    before = (workdir / "results.json").stat().st_mtime_ns
    assert parts.merge(configs[name], tiny_data, **merged) == rows
    assert (workdir / "results.json").stat().st_mtime_ns == before


def test_parts_have_each_member_once_and_few_programs(configs):
    groups = [[0, 2, 4, 6], [1, 3, 5]]
    for num_parts in range(1, 8):
        every = [Part(k, num_parts).members(groups) for k in range(1, num_parts + 1)]
        assert sorted(i for part in every for i in part) == list(range(7))
        assert all(part == sorted(part) and part for part in every)
        several = [p for p in every if len({i % 2 for i in p}) > 1]
        assert len(several) <= 1
    with pytest.raises(ConfigError, match="8 parts of a sweep of 7 members; expected"):
        Part(1, 8).members(groups)


def test_what_cannot_be_merged_is_named(tmp_path, configs, tiny_data):
    sweep = configs["rates and seeds"][2:4]
    merged = {"workdir": tmp_path / "run", "num_parts": 2}
    assert parts.unfinished(sweep, **merged) == [Part(1, 2), Part(2, 2)]
    train_parts(sweep, tiny_data, tmp_path / "run", 2, numbers=[1])
    assert parts.unfinished(sweep, **merged) == [Part(2, 2)]
    with pytest.raises(RunError, match="no config.json in .*2_of_2"):
        parts.merge(sweep, tiny_data, **merged)
    assert not (tmp_path / "run" / "config.json").exists()
    # A part of another sweep, put there by hand.
    first = Part(1, 2).folder(tmp_path / "run")
    shutil.copytree(first, Part(2, 2).folder(tmp_path / "run"))
    with pytest.raises(RunError, match=r"2_of_2 holds a part of another sweep \(part:"):
        parts.merge(sweep, tiny_data, **merged)
    # Of another sweep, nothing is trained in there.
    results.start_run(
        tmp_path / "run",
        sweeps.identity(sweep[:1], tiny_data, exact=True, train=False),
    )
    with pytest.raises(RunError, match="run of another config .*learning_rate"):
        train_parts(sweep, tiny_data, tmp_path / "run", 3, numbers=[1])
    assert not Part(1, 3).folder(tmp_path / "run").exists()
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "environment.json").unlink()
    other = [dataclasses.replace(config, batch_size=20) for config in sweep]
    with pytest.raises(RunError, match="another config .batch_size: 30 there, 20 now"):
        train_parts(other, tiny_data, tmp_path / "run", 2, numbers=[1])


@pytest.mark.slow
def test_finished_sweeps_and_parts_go_on_with_more_epochs(tmp_path, configs, tiny_data):
    few = configs["two programs"]
    more = [dataclasses.replace(config, epochs=3) for config in few]
    whole = {"workdir": tmp_path / "whole", "options": OPTIONS}
    rows = sweeps.sweep(more, tiny_data, **whole)
    grown = {"workdir": tmp_path / "grown", "options": OPTIONS}
    sweeps.sweep(few, tiny_data, **grown)
    assert sweeps.sweep(more, tiny_data, **grown) == rows
    assert (tmp_path / "grown" / "results_1_epochs.json").exists()
    assert [len(run.metrics) for run in sweeps.load(tmp_path / "grown")] == [3] * 6

    merged = {"workdir": tmp_path / "parts", "num_parts": 4}
    for sweep in (few, more):
        assert len(parts.unfinished(sweep, **merged)) == 4
        train_parts(sweep, tiny_data, tmp_path / "parts", 4)
        assert parts.unfinished(sweep, **merged) == []
        found = parts.merge(sweep, tiny_data, **merged)
    assert found == rows
    # Rates of another schedule depend on the length.
    linear = [dataclasses.replace(config, schedule="linear") for config in few]
    sweeps.sweep(linear, tiny_data, workdir=tmp_path / "linear", options=OPTIONS)
    longer = [dataclasses.replace(config, epochs=2) for config in linear]
    with pytest.raises(RunError, match="has other learning rates from the start"):
        sweeps.sweep(longer, tiny_data, workdir=tmp_path / "linear", options=OPTIONS)


@pytest.mark.parametrize("configs", [{"learning_rate": [0.1]}, TrainConfig(), ["a"]])
def test_what_are_no_configs_is_refused(configs, tiny_data, tmp_path):
    with pytest.raises(TypeError, match="expected a list of TrainConfig, one for each"):
        sweeps.sweep(configs, tiny_data, workdir=tmp_path)
    assert not list(tmp_path.iterdir())
