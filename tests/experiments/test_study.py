import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app
from matplotlib.text import Text

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.plots import style
from bn_jax.runs import json_files, provenance
from experiments import __main__ as command
from experiments import figures, launch, report, study
from marks import slow_but

app.define_help_flags()  # once in a process

# Arms of two steps each; the last depends on the others, and a smoke run leaves the
# large one and the claim about it out.
MADE_UP = """
import dataclasses

from bn_jax import fields
from experiments import scores, study
from experiments.claims import Claim
from experiments.estimate import mean
from experiments.figures import Figure

@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    epochs: int = fields.option_of(study.Design, "epochs", 2)
    batch_size: int = fields.option_of(study.Design, "batch_size", 3000)
    step: float = fields.option(0.1, "Of the rate.", valid=fields.POSITIVE)

def arms(design):
    none = {"learning_rate": 2 * design.step, "norm": "none"}
    return {"large": [{}], "first": [{}], "second": [none]}

def probe(row, variables, data):
    return {"gammas": len(variables["params"].get("norm1", {}).get("scale", []))}

def learns(arm):
    value = mean(scores.loss, arm)
    return Claim(f"{arm} learns", "loss", value=value, above=0, reason="")

study.start(study.Study(
    name="made_up", design=Design, arms=arms, claims=[learns("large"), learns("first")],
    figures={
        "figure.txt": Figure(
            lambda runs, path: path.write_text(f"{len(runs.rows)} rows")
        )
    },
    probe=probe, summary=lambda runs: {"more": len(runs)},
    smoke={"arms": ("first", "second")},
))
"""


@pytest.fixture
def made_up(tmp_path, in_process):
    """Runs the experiment with some flags; returns what it printed."""
    (tmp_path / "made_up.py").write_text(MADE_UP)

    def made_up(*arguments):
        path = str(tmp_path / "made_up.py")
        start = functools.partial(runpy.run_path, path, run_name="__main__")
        return in_process(start, "--workdir=run", *arguments)

    return made_up


@pytest.mark.slow
def test_study_trains_judges_and_draws(made_up, tmp_path):
    folder = tmp_path / "run"
    said = made_up("--smoke")
    rows = json_files.read_rows(folder / "runs.jsonl")
    assert [row["arm"] for row in rows] == ["first", "first", "second", "second"]
    assert [row["config"]["seed"] for row in rows] == [0, 1, 0, 1]
    assert rows[2]["config"]["learning_rate"] == pytest.approx(0.2)
    assert [row["gammas"] for row in rows] == [6, 6, 0, 0]
    results = json.loads((folder / "results.json").read_text())
    (verdict,) = results["verdicts"]
    assert verdict["n"] == 2
    mean = (rows[0]["loss"][-1] + rows[1]["loss"][-1]) / 2
    assert verdict["value"] == pytest.approx(mean)
    assert results["more"] == 2
    assert results["arms"] == ["first", "second"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "experiment": "made_up",
        "epochs": 1,
        "seeds": 2,
        "dataset": "sample",
        "batch_size": 3000,
        "arms": ["first", "second"],
        "step": 0.1,
    }
    assert results["seconds"] > 0
    assert f"{verdict['verdict']}: first learns" in said
    few = "No result, but a try: 2 of the 5 seeds that claims need\n"
    assert f"{few}written to run: runs.jsonl, results.json, figures\n" in said
    assert "which studies share, are in pool" in said

    # Finished runs are read, and everything is written again.
    (folder / "results.json").unlink()
    assert "epoch 1/1" not in made_up("--smoke")
    assert json_files.read_rows(folder / "runs.jsonl") == rows
    assert json.loads((folder / "results.json").read_text())["verdicts"] == [verdict]

    # Figures are drawn from the files alone.
    (folder / "figure.txt").unlink()
    again = made_up("--plot_only")
    judged = said[said.index(again.splitlines()[0]) :].partition("written to")[0]
    assert again == f"{judged}written to run: figures\n"
    assert (folder / "figure.txt").read_text() == "4 rows"

    # Another design does not overwrite this one's results.
    with pytest.raises(SystemExit, match="seeds: 2 there, 5 now"):
        made_up("--smoke", "--seeds=5")


def test_flags_of_the_design_come_before_what_a_smoke_run_sets(made_up, tmp_path):
    # Nothing is trained: this study measures by itself.
    measured = MADE_UP.replace("probe=probe", "measure=measure").replace(
        "def probe",
        """
def measure(arm, folder, configs, data):
    return [{"config": c.to_dict(), "loss": [1.0]} for c in configs], 2.5

def probe""",
    )
    (tmp_path / "made_up.py").write_text(measured)
    said = made_up("--smoke", "--arms=large,second", "--step=0.25")
    rows = json_files.read_rows(tmp_path / "run" / "runs.jsonl")
    assert [row["arm"] for row in rows] == ["large"] * 2 + ["second"] * 2
    assert rows[2]["config"]["learning_rate"] == 0.5
    assert {row["config"]["batch_size"] for row in rows} == {3000}
    assert "large learns" in said
    assert "first learns" not in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"] == 5.0  # of two arms


def test_arm_that_there_is_not_is_refused_before_anything_is_written(made_up, tmp_path):
    message = "arms=large,huge; expected all, or some of large, first"
    with pytest.raises(SystemExit, match=message):
        made_up("--smoke", "--arms=large,huge")
    with pytest.raises(SystemExit, match=r"second \(did you mean second\?\)$"):
        made_up("--smoke", "--arms=large,secnd")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arms": ("a", "a")}, "expected one or more values, none of them twice"),
        ({"seeds": 0}, "seeds=0; expected a number at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; expected a number greater"),
    ],
)
def test_bad_design_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        study.design(learning_rate=1.0)(**fields)


def test_design_gives_a_config_for_each_choice_and_seed():
    design = study.design(epochs=2, learning_rate=0.5)(seeds=2, batch_size=128)
    configs = design.configs([{}, {"norm": "none", "learning_rate": 0.25}])
    found = [(c.norm, c.learning_rate, c.seed, c.epochs, c.batch_size) for c in configs]
    assert found == [
        ("batch_norm", 0.5, 0, 2, 128),
        ("batch_norm", 0.5, 1, 2, 128),
        ("none", 0.25, 0, 2, 128),
        ("none", 0.25, 1, 2, 128),
    ]


def test_help_lists_the_flags_of_the_design(made_up, capsys):
    with pytest.raises(SystemExit):
        made_up("--help")
    listed = capsys.readouterr().out
    for flag in ("--epochs", "--arms", "--step", "--devices", "--[no]plot_only"):
        assert f"\n  {flag}: " in listed
    words = " ".join(listed.split())
    assert "Arms: large, first, second." in words
    defaults = "where not given: epochs 1, seeds 2, dataset sample, arms first,second."
    assert defaults in words


def test_plots_of_no_run_are_refused(made_up):
    with pytest.raises(SystemExit, match="error: workdir='run' does not exist; exp"):
        made_up("--plot_only")
    Path("run").mkdir()
    with pytest.raises(SystemExit, match=r"there is no config\.json in run"):
        made_up("--plot_only")
    for there, message in {
        '{"experiment": "bias"}': "run holds bias, and this is the experiment made_up",
        '{"norm": "none"}': "run holds a run or sweep of none, and this is the exp",
    }.items():
        Path("run/config.json").write_text(there)
        with pytest.raises(SystemExit, match=message):
            made_up("--plot_only")


# The index, and the command that lists and runs what is in the folder.


def test_file_that_defines_a_study_is_found_by_itself(monkeypatch, tmp_path):
    (tmp_path / "new.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "asked.py").write_text('''"""Is it found?"""
import types
STUDY = types.SimpleNamespace(name="asked", place=1)
if __name__ == "__main__":
    print("ran", sys.argv)
''')
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr("experiments.__path__", [str(tmp_path)])
    try:
        assert list(report.studies()) == ["asked"]
        assert command.commands() == {"asked": "Is it found?"}
        assert command.listing().startswith("Is it found?\n")
        assert "not recorded yet" in command.listing()
    finally:
        sys.modules.pop("experiments.asked")


def test_every_study_has_a_question_and_the_name_of_its_file():
    found = report.studies()
    assert set(report.recorded()) <= set(found)
    for name, module in found.items():
        assert module.__name__ == f"experiments.{name}"
        assert report.question(name).endswith("?")
        assert f"python -m experiments.{name} " in module.__doc__
    places = [module.STUDY.place for module in found.values()]
    assert len(set(places)) == len(places)


def test_listing_has_each_question_with_its_command_and_verdicts():
    listed = command.listing()
    for name in report.studies():
        assert f"{report.question(name)}\n  python -m experiments {name} " in listed
    assert "\n  10 supported, 1 refuted, 1 of 1 checks hold; " in listed
    assert "conformance  " in listed


def test_unknown_experiment_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="no experiment 'hedline' .did you mean headl"):
        command.main(["experiments", "hedline", "--smoke"])


def test_experiment_is_run_by_name(monkeypatch):
    ran = []
    monkeypatch.setattr(
        study, "start", lambda study: ran.append((study.name, sys.argv))
    )
    monkeypatch.setattr(sys, "argv", ["experiments", "bias", "--smoke"])
    imported = sys.modules["experiments.bias"]
    command.main(sys.argv)
    sys.modules["experiments.bias"] = imported
    ((name, argv),) = ran
    assert name == "bias"
    assert argv[1:] == ["--smoke"]


# What is committed.


@pytest.mark.parametrize("path", [report.README, report.FRONT])
def test_index_and_front_page_are_made_of_the_committed_results(path):
    assert report.updated(path) == path.read_text()


def test_report_outside_of_a_checkout_is_refused(in_process, tmp_path, monkeypatch):
    def start():
        app.run(report.main, flags_parser=launch.flags_parser(report.define_flags))

    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    with pytest.raises(SystemExit, match="README.md is not there.*in a checkout"):
        in_process(start)


def test_page_without_marks_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("<!-- findings: by experiments.report -->")
    with pytest.raises(ConfigError, match="lacks the marks"):
        report.updated(path)


@pytest.mark.parametrize("name", list(report.recorded()))
def test_committed_verdicts_are_those_of_the_committed_runs(name):
    question = report.studies()[name].STUDY
    folder = report.RESULTS / name
    rows = json_files.read_rows(folder / "runs.jsonl")
    results = report.recorded()[name]
    judged = [verdict.to_dict() for verdict in question.verdicts(rows)]
    assert len(judged) == len(question.claims)
    assert judged == near(results["verdicts"])
    assert "60,000 + 10,000 images" in results["data_source"]
    figures = {path.name for path in folder.glob("*.png")}
    assert figures == {*question.figures, study.CLAIMS}
    summary = json.loads(json.dumps(question.summary(question.runs(rows))))
    assert summary == near({name: results[name] for name in summary})


def test_index_says_what_studies_found_with_their_numbers(monkeypatch):
    monkeypatch.setattr(
        report.findings, "LINES", ("The loss is {headline.loss}, of all rates.",)
    )
    line, unknown = report.summary(report.recorded())
    verdict = report.recorded()["headline"]["verdicts"][0]
    assert line == f"- The loss is {report.number(verdict)}, of all rates."
    of_dropout = report.recorded()["dropout"]["verdicts"][4]
    assert of_dropout["verdict"] == "undecided"
    assert of_dropout["claim"] in unknown
    assert f"; at most {of_dropout['high']:.3g})" in unknown


@pytest.mark.slow
def test_recorded_run_is_repeated_bit_for_bit():
    recorded = report.recorded()["bias"]["environment"]
    here = provenance.environment()
    if any(here[key] != recorded[key] for key in report.INSTRUCTIONS):
        pytest.skip("recorded with other versions or processor instructions")
    try:
        data_lib.load("fashion_mnist")
    except data_lib.DataError as error:
        pytest.skip(f"no data: {error}")
    # As users run it: with one device, and optimised.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "BN_JAX"))}
    command = [sys.executable, "-m", "experiments.report", "--check", "--repeat=bias"]
    done = subprocess.run(
        command, env=env, cwd=report.HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "repeated bias: lenet, batch_norm, seed 0" in done.stdout


def test_repeat_without_check_writes_nothing(in_process):
    def start():
        app.run(report.main, flags_parser=launch.flags_parser(report.define_flags))

    before = report.README.read_text()
    with pytest.raises(SystemExit, match="--repeat=bias without --check; runs are"):
        in_process(start, "--repeat=bias")
    assert report.README.read_text() == before


def test_check_says_which_number_is_not_as_committed(monkeypatch):
    assert report.differences("bias") == []
    changed = report.recorded()
    changed["bias"]["verdicts"][3]["high"] += 1e-3
    monkeypatch.setattr(report, "recorded", lambda: changed)
    (line,) = report.differences("bias")
    assert line.startswith("bias: without the biases LeNet trains as well: high is")


def near(value):
    """What equals a JSON value but for rounding, which differs between Pythons."""
    if isinstance(value, dict):
        return {name: near(v) for name, v in value.items()}
    if isinstance(value, list):
        return [*map(near, value)]
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


@pytest.mark.parametrize("name", slow_but(["which_layers"], report.recorded()))
def test_figures_of_committed_runs_are_drawn(name, tmp_path):
    question = report.studies()[name].STUDY
    rows = json_files.read_rows(report.RESULTS / name / "runs.jsonl")
    question.draw(rows, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {*question.figures, study.CLAIMS}


@pytest.mark.parametrize("name", slow_but(["transforms"], report.recorded()))
def test_figures_can_be_read_at_the_width_of_a_page(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    question = report.studies()[name].STUDY
    rows = json_files.read_rows(report.RESULTS / name / "runs.jsonl")
    question.draw(rows, tmp_path)
    assert len(drawn) == len(question.figures) + 1
    for figure in drawn:
        width = figure.get_size_inches()[0]
        texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert texts
        smallest = min(text.get_fontsize() for text in texts)
        assert smallest / 72 * 900 / width >= 9  # pixels, of 900


# Parts of the designs, in the committed rows: by what they are known, which, how many
# claims they decide, and which figures they fill.
PARTS = {
    "headline": (("flax", "none_padded"), 3, {"curves.png", "gamma_beta.png"}),
    "learning_rates": (
        [(n, r) for n in ("batch_norm", "none") for r in (0.1, 1)],
        4,
        None,
    ),
    "scale_invariance": ([("batch_norm", 10.0), ("none", 10.0)], 0, None),
    "which_layers": (("1111", "0011"), 2, {"which_layers.png", "by_number.png"}),
    "dropout": (
        ("few-none", "few-dropout_30", "few-batch_norm"),
        2,
        {"dropout_few.png", "curves_few.png", "variance_ratio.png"},
    ),
    "frozen": (
        [
            (activation, title)
            for activation in ("sigmoid", "relu")
            for title in ("gamma and beta alone", "as many others a channel")
        ],
        4,
        {"sigmoid.png", "relu.png"},
    ),
    "options": (
        (
            "momentum 0.9, epsilon 1e-05 (chapter, PyTorch)",
            "momentum 0.99, epsilon 1e-05 (Flax)",
            "Flax's layer, fast variance",
        ),
        3,
        None,
    ),
    "transforms": (("layer", "zca-all", "pca-16"), 3, None),
}


@pytest.mark.parametrize("name", slow_but(["which_layers", "frozen"], PARTS))
def test_part_of_a_design_is_judged_and_drawn(name, tmp_path):
    question = report.studies()[name].STUDY
    choices, claims, figures = PARTS[name]
    folder = report.RESULTS / name
    everything = json_files.read_rows(folder / "runs.jsonl")
    rows = [row for row in everything if question.choice(row) in choices]
    assert 0 < len(rows) < len(everything)
    assert len(question.verdicts(rows)) == claims
    json.dumps(question.summary(question.runs(rows)))
    question.draw(rows, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()} - {study.CLAIMS}
    everyone = {path.name for path in folder.glob("*.png")} - {study.CLAIMS}
    assert drawn == (figures or everyone)
    assert (tmp_path / study.CLAIMS).exists() == (claims > 0)


@pytest.mark.parametrize("name", list(report.studies()))
def test_design_by_default_can_be_recorded(name):
    design = report.studies()[name].STUDY.design()
    assert json.loads(json.dumps(design.to_dict())) == design.to_dict()
    recorded = report.recorded().get(name)
    if recorded is not None:
        assert design.epochs == recorded["epochs"]


@pytest.mark.parametrize("name", list(report.studies()))
def test_smoke_run_of_a_study_names_arms_that_there_are(name):
    question = report.studies()[name].STUDY
    smoke = question.design(**study.SMOKE, **question.smoke)
    assert question.arms_of(smoke)


# Looks, and the pool of runs.

LOOKING = """
from experiments import scores, sequential, study
from experiments.claims import Claim
from experiments.estimate import mean

def learns(arm, bound):
    return Claim(f"{arm} learns", "loss", value=mean(scores.loss, arm), above=bound,
                 reason="")

def measure(arm, folder, configs, data):
    # Losses grow by seed; of `same`, all are one.
    print("measured", folder.name)
    rows = []
    for c in configs:
        loss = 5.0 if c.norm == "none" else 1.0 + c.seed
        rows.append({"config": c.to_dict(), "loss": [loss + c.learning_rate]})
    return rows, 1.0

study.start(study.Study(
    name="looking", looks=sequential.Looks((2, 4, 8), 0.9, first_seed=FIRST),
    arms={"varied": [{"learning_rate": 0.5}, {"learning_rate": 1.0}],
          "same": [{"norm": "none", "learning_rate": 0.5}]},
    CHOOSING
    choice=lambda row: (row["arm"], row["config"]["learning_rate"]),
    claims=[learns(("varied", 0.5), 0.0), learns(("same", 0.5), 4.0)],
    figures={}, measure=measure,
))
"""


@pytest.fixture
def looking(tmp_path, in_process):
    """Runs a study that measures at once; returns what it printed."""

    def looking(*arguments, first=0, choosing=""):
        path = tmp_path / "looking.py"
        text = LOOKING.replace("FIRST", str(first)).replace("CHOOSING", choosing)
        path.write_text(text)
        start = functools.partial(runpy.run_path, str(path), run_name="__main__")
        return in_process(start, "--workdir=run", "--dataset=sample", *arguments)

    return looking


def test_more_seeds_are_trained_only_of_what_is_undecided(looking, tmp_path):
    said = looking("--epochs=1")
    measured = [line for line in said.splitlines() if line.startswith("measured")]
    # At two seeds the interval of `varied` is wide; the other rate has no claim.
    assert measured == [
        "measured varied-0-1",
        "measured same-0-1",
        "measured varied-2-3",
    ]
    rows = json_files.read_rows(tmp_path / "run" / "runs.jsonl")
    seeds = {}
    for row in rows:
        key = row["arm"], row["config"]["learning_rate"]
        seeds.setdefault(key, []).append(row["config"]["seed"])
    assert seeds == {
        ("varied", 0.5): [0, 1, 2, 3],
        ("varied", 1.0): [0, 1],
        ("same", 0.5): [0, 1],
    }
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = [(v["n"], v["level"], v["verdict"]) for v in results["verdicts"]]
    assert found == [(4, 0.9, "supported"), (2, 0.9, "supported")]
    # Judged again from the rows, the verdicts are the same.
    said = looking("--plot_only")
    assert "n = 4; claimed > 0" in said
    assert "n = 2; claimed > 4" in said


def test_study_can_be_kept_to_fewer_seeds(looking, tmp_path):
    looking("--epochs=1", "--seeds=3")
    rows = json_files.read_rows(tmp_path / "run" / "runs.jsonl")
    assert {row["config"]["seed"] for row in rows} == {0, 1}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = [v["verdict"] for v in results["verdicts"]]
    assert found == ["undecided", "supported"]


def test_runs_to_choose_by_have_their_own_seeds_and_images(looking, tmp_path):
    choosing = 'choosing={"tried": [{"learning_rate": 0.25}]},'
    looking("--epochs=1", "--seeds=2", first=5, choosing=choosing)
    rows = json_files.read_rows(tmp_path / "run" / "runs.jsonl")
    tried = [row for row in rows if row["arm"] == "tried"]
    assert [row["config"]["seed"] for row in tried] == [0, 1]  # of at most 5
    assert {row["config"]["validation"] for row in tried} == {5000}
    assert all(row["choosing"] for row in tried)
    others = [row for row in rows if row["arm"] != "tried"]
    assert {row["config"]["seed"] for row in others} == {5, 6}
    assert {row["config"]["validation"] for row in others} == {0}


def test_verdicts_of_fewer_seeds_than_claims_need_are_marked(monkeypatch, tmp_path):
    marks = []
    monkeypatch.setattr(
        figures, "draw_verdicts", lambda verdicts, path, caution: marks.append(caution)
    )
    made_up = study.Study(name="made_up", arms={}, claims=(), figures={})
    for count in (2, 5, 20):
        rows = [{"arm": "a", "config": {"seed": seed}} for seed in range(count)]
        made_up.draw(rows, tmp_path)
    assert marks == ["No result, but a try: 2 of the 5 seeds that claims need", "", ""]
