import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bn_jax.runs import results as results_lib
from experiments import report, study

# Arms of two steps each; the second depends on the first, and a smoke run leaves the
# large one and the claim about it out.
MADE_UP = """
import dataclasses

from experiments import intervals
from experiments.claims import decide
from bn_jax import fields
from experiments import study
from experiments.study import Study

@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    epochs: int = fields.option_of(study.Design, "epochs", 2)
    batch_size: int = fields.option_of(study.Design, "batch_size", 3000)
    arms: tuple[str, ...] = fields.option(
        ("large", "first"), "Arms.", choices=("large", "first")
    )
    step: float = fields.option(0.1, "Of the rate.", valid=fields.POSITIVE)

def first(design, rows):
    assert not rows
    seeds = {"large": [0], "first": range(design.seeds)}
    return {arm: [design.config(seed=s) for s in seeds[arm]] for arm in design.arms}

def second(design, rows):
    rate = design.step * len(rows)
    return {"second": [design.config(learning_rate=rate, norm="none")]}

def complete(folder, rows, data):
    gamma = study.load_params(folder).get("norm1", {}).get("scale", [[]] * len(rows))
    return [{**row, "gammas": len(gamma[i])} for i, row in enumerate(rows)]

def verdicts(rows):
    def learns(arm):
        losses = [study.last(row, "loss") for row in study.runs_of(rows, arm)]
        interval = intervals.of_mean(losses)
        return decide("it learns", "loss", interval, reason="", above=0)

    arms = ("large", "first")
    claims = [study.Claim([a], lambda a=a: learns(a)) for a in arms]
    return study.judge(study.arms_of(rows), claims)

def draw(rows, folder):
    (folder / "figure.txt").write_text(f"{len(rows)} rows")

study.start(Study(
    name="made_up", design=Design, stages=(first, second),
    verdicts=verdicts, draw=draw, complete=complete, exact=False,
    summary=lambda rows: {"more": len(rows)}, smoke={"arms": ("first",)},
))
"""


@pytest.fixture
def made_up(tmp_path):
    """Return what runs the experiment with some flags."""
    (tmp_path / "made_up.py").write_text(MADE_UP)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "made_up.py", "--workdir=run", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            },
        )

    return run


def test_study_trains_what_is_missing_judges_and_draws(made_up, tmp_path):
    folder = tmp_path / "run"
    ran = made_up("--smoke")
    assert ran.returncode == 0, ran.stderr
    rows = results_lib.read_rows(folder / "runs.jsonl")
    assert [row["arm"] for row in rows] == ["first", "first", "second"]
    assert [row["config"]["seed"] for row in rows] == [0, 1, 0]
    assert rows[2]["config"]["learning_rate"] == pytest.approx(0.2)
    assert [row["gammas"] for row in rows] == [6, 6, 0]
    results = json.loads((folder / "results.json").read_text())
    (verdict,) = results["verdicts"]
    assert verdict["n"] == 2
    mean = (rows[0]["loss"][-1] + rows[1]["loss"][-1]) / 2
    assert verdict["value"] == pytest.approx(mean)
    assert results["more"] == 3
    assert results["arms"] == ["first"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "experiment": "made_up",
        "epochs": 1,
        "seeds": 2,
        "dataset": "sample",
        "batch_size": 3000,
        "arms": ["first"],
        "step": 0.1,
    }
    assert results["seconds"] > 0
    assert f"{verdict['verdict']}: it learns" in ran.stdout

    # Finished runs are read; one that is missing is trained, to the same numbers.
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "second")
    ran = made_up("--smoke")
    assert ran.returncode == 0, ran.stderr
    before_second, _, after = ran.stdout.partition("second: 1 runs")
    assert "epoch 1/1" not in before_second
    assert "epoch 1/1" in after
    again = results_lib.read_rows(folder / "runs.jsonl")
    speeds = [{**row, "examples_per_second": 0} for row in again]
    assert speeds == [{**row, "examples_per_second": 0} for row in rows]

    # Figures are drawn from the files alone.
    (folder / "figure.txt").unlink()
    shutil.rmtree(folder / "first")
    ran = made_up("--plot_only")
    assert ran.returncode == 0, ran.stderr
    assert (folder / "figure.txt").read_text() == "3 rows"
    assert "it learns" in ran.stdout

    # Another design does not overwrite this one's results.
    ran = made_up("--smoke", "--seeds=5")
    assert ran.returncode == 1
    assert "seeds: 2 there, 5 now" in ran.stderr


def test_flags_of_the_design_come_before_what_a_smoke_run_sets(made_up, tmp_path):
    ran = made_up("--smoke", "--arms=large", "--step=0.25")
    assert ran.returncode == 0, ran.stderr
    rows = results_lib.read_rows(tmp_path / "run" / "runs.jsonl")
    assert [row["arm"] for row in rows] == ["large", "second"]
    assert rows[1]["config"]["learning_rate"] == 0.25
    assert ran.stdout.count("it learns") == 1
    assert {row["config"]["batch_size"] for row in rows} == {3000}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--arms=large,huge", "arms=('large', 'huge'); expected of each value one of"),
        ("--arms=first,first", "expected one or more values, none of them twice"),
        ("--step=0", "step=0.0; expected a number greater than 0"),
        ("--seeds=0", "seeds=0; expected a number at least 1"),
    ],
)
def test_bad_design_is_refused_before_anything_is_written(
    made_up, tmp_path, flag, words
):
    ran = made_up("--smoke", flag)
    assert ran.returncode == 1
    assert words in ran.stderr
    assert not (tmp_path / "run").exists()


def test_help_lists_the_flags_of_the_design(made_up):
    listed = made_up("--help").stdout
    for flag in ("--epochs", "--arms", "--step", "--devices", "--[no]plot_only"):
        assert f"\n  {flag}: " in listed
    words = " ".join(listed.split())
    assert "where not given: epochs 1, seeds 2, dataset sample, arms first." in words


def test_plots_of_no_run_are_refused(made_up):
    ran = made_up("--plot_only")
    assert ran.returncode == 1
    assert "there is no runs.jsonl in run" in ran.stderr


def test_run_that_diverged_or_learned_nothing_is_known():
    assert study.has_diverged({"loss": [1.0, None]})
    assert study.has_diverged({"loss": [1.0, 2.31]})
    assert not study.has_diverged({"loss": [2.5, 2.29]})
    assert math.isnan(study.last({"loss": [1.0, None]}, "loss"))


def test_final_loss_of_a_run_that_diverged_is_that_of_guessing():
    assert study.final_loss({"loss": [2.0, None]}) == pytest.approx(2.302585)
    assert study.final_loss({"loss": [2.0, 0.5]}) == 0.5


def test_runs_of_an_arm_are_in_order_of_seeds():
    rows = [
        {"arm": arm, "config": {"seed": seed}} for seed in (2, 0, 1) for arm in "ab"
    ]
    runs = study.runs_of(rows, "b")
    assert [(r["arm"], r["config"]["seed"]) for r in runs] == [
        ("b", 0), ("b", 1), ("b", 2),
    ]  # fmt: skip


def test_final_test_accuracy_is_by_the_least_noisy_statistics():
    row = {"test_accuracy": [0.5, 0.6], "test_accuracy_batch": 0.7}
    assert study.final_test_accuracy(row) == 0.7
    assert study.final_test_accuracy({**row, "test_accuracy_exact": 0.8}) == 0.8
    assert study.final_test_accuracy({"test_accuracy": [0.5, 0.6]}) == 0.6
    assert study.final_test_accuracy({"test_accuracy": [0.5, None]}) == 0.1
    assert study.final_test_accuracy({**row, "test_accuracy_batch": None}) == 0.1


# What is committed.


def test_index_is_made_of_the_committed_results():
    readme = report.README.read_text()
    assert report.updated(readme) == readme
    assert report.START in readme
    assert report.END in readme


@pytest.mark.parametrize("name", list(report.recorded()))
def test_committed_verdicts_and_figures_are_those_of_the_committed_runs(name, tmp_path):
    import importlib

    module = importlib.import_module(f"experiments.{name}")
    folder = report.RESULTS / name
    rows = results_lib.read_rows(folder / "runs.jsonl")
    results = report.recorded()[name]
    judged = [verdict.to_dict() for verdict in module.verdicts(rows)]
    for now, then in zip(judged, results["verdicts"], strict=True):
        assert now == {
            key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for key, value in then.items()
        }
    assert "60,000 + 10,000 images" in results["data_source"]
    module.draw(rows, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in folder.glob("*.png")}


# Parts of the designs, in the committed rows: which, how many claims they decide, and
# which figures they fill.
PARTS = {
    "headline": ("arm", ("flax", "none_padded"), 1, {"curves.png", "gamma_beta.png"}),
    "learning_rates": ("learning_rate", (0.1, 1.0), 4, None),
    "which_layers": ("norm_layers", ("1111", "0011"), 1, {"which_layers.png"}),
    "dropout": (
        "arm",
        ("few-none", "few-dropout_30", "few-batch_norm"),
        2,
        {"dropout_few.png", "curves_few.png", "variance_ratio.png"},
    ),
    "frozen": ("trained", ("norm", "random"), 4, {"sigmoid.png", "relu.png"}),
    "options": ("arm", ("numbers", "fast_variance"), 4, None),
    "transforms": ("arm", ("layer", "zca-all", "pca-16"), 1, None),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_of_a_design_is_judged_and_drawn(name, tmp_path):
    import importlib

    module = importlib.import_module(f"experiments.{name}")
    field, values, claims, figures = PARTS[name]
    folder = report.RESULTS / name
    everything = results_lib.read_rows(folder / "runs.jsonl")
    rows = [row for row in everything if {**row["config"], **row}[field] in values]
    assert 0 < len(rows) < len(everything)
    assert len(module.verdicts(rows)) == claims
    if hasattr(module, "summary"):
        json.dumps(module.summary(rows))
    module.draw(rows, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == (figures or {path.name for path in folder.glob("*.png")})


def test_rates_of_the_weights_without_those_of_the_claims_are_drawn(tmp_path):
    from experiments import scale_invariance

    everything = results_lib.read_rows(report.RESULTS / "scale_invariance/runs.jsonl")
    rows = [row for row in everything if row["learning_rate"] == 10.0]
    assert scale_invariance.verdicts(rows) == []
    scale_invariance.draw(rows, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scale_invariance.png"]


@pytest.mark.parametrize("name", report.STUDIES)
def test_designs_by_default_are_those_that_were_recorded(name):
    import importlib

    module = importlib.import_module(f"experiments.{name}")
    design = module.Design()
    assert json.loads(json.dumps(design.to_dict())) == design.to_dict()
    recorded = report.recorded()[name]
    assert (design.epochs, design.seeds) == (recorded["epochs"], recorded["seeds"])
