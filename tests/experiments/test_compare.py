"""The command `experiments.compare`, in this process."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
from absl import app

from bn_jax import runs
from bn_jax.runs import compare as compare_lib
from bn_jax.training import members
from bn_jax.training.config import RunOptions
from experiments import compare, launch

OPTIONS = RunOptions(devices="1", checkpoint_every="never")


@pytest.fixture
def command(in_process):
    return functools.partial(
        in_process,
        lambda: app.run(
            compare.main, flags_parser=launch.flags_parser(launch.define_workdir_flag)
        ),
    )


@pytest.fixture(scope="module")
def of_sweep(tmp_path_factory, tiny_config, tiny_data):
    """A folder with a sweep."""
    folder = tmp_path_factory.mktemp("compared")
    configs = members.parse("learning_rate=0.1,1e38;seed=0..1", tiny_config)
    runs.sweep(configs, tiny_data, workdir=folder / "sweep", options=OPTIONS)
    return folder


@pytest.fixture(scope="module")
def folder(of_sweep, tiny_config, tiny_data):
    """A folder with a sweep, and two runs that differ in their rate."""
    for name, rate in {"slow": "0.1", "fast": "0.5"}.items():
        config = tiny_config.replaced_by_text("learning_rate", rate)
        runs.train(config, tiny_data, workdir=of_sweep / name, options=OPTIONS)
    return of_sweep


def lines(text):
    """The cells of a table's lines, by the label."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if "|" in line]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in rows}


@pytest.mark.slow
def test_runs_are_named_by_what_differs(command, folder):
    said = command(f"{folder}/slow", f"{folder}/fast", "--workdir=out")
    table = lines(said)
    for rate, name in {0.1: "slow", 0.5: "fast"}.items():
        run = runs.load(folder / name)
        row = table[f"learning_rate={rate}, {folder / name}"]
        loss, accuracy = run.results["train_loss"], run.results["test_accuracy"]
        assert row[:2] == ["1", f"{loss:.4f}"]
        assert f"{accuracy:.4f}" in row
    assert Path("out/table.md").read_text() in said
    assert Path("out/curves.png").stat().st_size > 10_000


def test_seeds_of_a_sweep_are_one_line_with_their_range(command, of_sweep):
    table = lines(command(f"{of_sweep}/sweep", "--workdir=out"))
    n, loss, *_ = table["learning_rate=0.1"]
    losses = sorted(
        m.row["loss"][-1]
        for m in compare_lib.read(of_sweep / "sweep")
        if m.config["learning_rate"] == 0.1
    )
    assert n == "2"
    assert loss == f"{sum(losses) / 2:.4f} ({losses[0]:.4f}-{losses[1]:.4f})"
    assert table["learning_rate=1e+38"] == [
        "2",
        *["diverged"] * (len(table["run"]) - 1),
    ]


@pytest.mark.slow
def test_one_config_in_two_folders_is_told_apart_by_them(folder):
    both = [*compare_lib.read(folder / "slow"), *compare_lib.read(folder / "sweep")]
    labels = compare_lib.grouped(both)
    assert {f"learning_rate=0.1, {folder}/{n}" for n in ("slow", "sweep")} < set(labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give folders of finished runs or sweeps to compare"),
        (["a", "b", "./a"], "a is given twice; give each folder once"),
        (["nowhere"], "folder='nowhere' does not exist; expected the folder of a f"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, message, command, tmp_path):
    with pytest.raises(SystemExit) as ended:
        command(*arguments, "--workdir=out")
    assert re.match(f"error: {message}", ended.value.code)
    assert not any(tmp_path.iterdir())


def test_seeds_in_several_folders_are_one_group():
    def member(folder, seed, rate):
        return compare_lib.Member(
            Path(folder), {"seed": seed, "learning_rate": rate}, {}
        )

    members = [member("a", 0, 0.1), member("b", 1, 0.1), member("c", 0, 0.5)]
    found = compare_lib.grouped(members)
    assert {label: len(of) for label, of in found.items()} == {
        "learning_rate=0.1": 2,
        "learning_rate=0.5, c": 1,
    }


def test_runs_that_differ_in_their_seed_alone_are_one_line():
    members = [compare_lib.Member(Path(f"s{i}"), {"seed": i}, {}) for i in range(3)]
    ((label, group),) = compare_lib.grouped(members).items()
    assert (label, len(group)) == ("all, of other seeds", 3)
    (label,) = compare_lib.grouped(members[:1])
    assert label == "s0"


def test_runs_on_other_data_are_told_apart_whatever_their_configs_say(
    folder, tiny_config, tiny_data, tmp_path
):
    config = dataclasses.replace(tiny_config, learning_rate=0.1, seed=7)
    others = dataclasses.replace(tiny_data, source="others")
    runs.train(config, others, workdir=tmp_path / "others", options=OPTIONS)
    members = [
        m for f in (folder / "slow", tmp_path / "others") for m in compare_lib.read(f)
    ]
    labels = list(compare_lib.grouped(members))
    assert len(labels) == 2
    assert labels[1].startswith("data=others")


@pytest.mark.slow
def test_runs_from_a_folder_that_was_trained_further_are_told_apart(
    tiny_config, tiny_data, tmp_path
):
    source = tmp_path / "source"
    train = functools.partial(runs.train, data=tiny_data)
    train(tiny_config, workdir=source)
    from_there = dataclasses.replace(tiny_config, init_from=str(source))
    train(from_there, workdir=tmp_path / "a")
    longer = dataclasses.replace(tiny_config, epochs=tiny_config.epochs + 1)
    train(longer, workdir=source)
    train(dataclasses.replace(from_there, seed=1), workdir=tmp_path / "b")
    members = [m for n in "ab" for m in compare_lib.read(tmp_path / n)]
    labels = list(compare_lib.grouped(members))
    assert len(labels) == 2
    assert all(re.search(r"init_from=.*source .crc32=", label) for label in labels)


def test_no_score_by_exact_statistics_where_there_are_none(
    tmp_path, tiny_config, tiny_data
):
    config = dataclasses.replace(
        tiny_config, model="mlp:widths=8", norm="layer", label_smoothing=0.1
    )
    runs.train(config, tiny_data, workdir=tmp_path / "run", options=OPTIONS)
    configs = members.parse("seed=3", config)
    runs.sweep(configs, tiny_data, workdir=tmp_path / "sweep", options=OPTIONS)
    read = [*compare_lib.read(tmp_path / "run"), *compare_lib.read(tmp_path / "sweep")]
    table = compare_lib.table(compare_lib.grouped(read))
    assert "test accuracy" in table
    assert "by exact statistics" not in table
    assert "train loss (of smoothed labels, if they are)" in table


def test_what_was_not_measured_is_no_divergence():
    def group(**row):
        return [compare_lib.Member(Path(), {}, {"loss": [1.0], **row})] * 2

    table = lines(
        compare_lib.table(
            {
                "layer": group(),
                "batch_norm": group(test_accuracy_exact=0.5),
                "diverged": group(test_accuracy_exact=None),
            }
        )
    )
    exact = {label: cells[-1] for label, cells in table.items()}
    assert exact["layer"] == "-"
    assert exact["batch_norm"].startswith("0.5000")
    assert exact["diverged"] == "diverged"
