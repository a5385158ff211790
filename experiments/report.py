r"""Which claims hold? The index of the studies and their verdicts, in Markdown.

  python -m experiments.report
  python -m experiments.report --check
  python -m experiments.report --check --repeat=bias,headline

Reads the committed results, experiments/results/NAME/results.json, and writes them
between two marks of experiments/README.md, and what was found in three lines between
those of README.md. With --check it writes nothing: it judges
every claim again from the committed rows, NAME/runs.jsonl, and says where a verdict, a
number or the index is another; a test does the same. --repeat trains the first recorded
run of studies again, on the full data, and compares it bit for bit, where versions and
processor instructions are those of the record.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any

from absl import app, flags

from bn_jax.fields import ConfigError
from bn_jax.runs import json_files, provenance, sweeps
from bn_jax.training.config import TrainConfig
from experiments import findings, launch, sequential
from experiments.claims import CHECKED
from experiments.study import CLAIMS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
FRONT = HERE.parent / "README.md"


def studies() -> dict[str, ModuleType]:
    """Find the modules in this folder that define a STUDY, in order of `place`."""
    names = [p.stem for p in HERE.glob("*.py") if "\nSTUDY = " in p.read_text()]
    found = [importlib.import_module(f"experiments.{name}") for name in names]
    found.sort(key=lambda module: (module.STUDY.place, module.STUDY.name))
    return {module.STUDY.name: module for module in found}


def recorded() -> dict[str, Any]:
    """Return the results of the studies that have been run in full."""
    paths = {name: RESULTS / name / "results.json" for name in studies()}
    return {
        name: json.loads(path.read_text())
        for name, path in paths.items()
        if path.is_file()
    }


def question(name: str) -> str:
    """Return the question of a study: the first line of its docstring."""
    doc = studies()[name].__doc__
    assert doc is not None
    return doc.strip().splitlines()[0]


def verdicts_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts on claims, without checks."""
    return [v for v in results["verdicts"] if v["verdict"] not in CHECKED]


def checks_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the checks."""
    return [v for v in results["verdicts"] if v["verdict"] in CHECKED]


def counts(results: Mapping[str, Any]) -> str:
    """Return how many claims came out how, and how many checks hold."""
    outcomes = [verdict["verdict"] for verdict in verdicts_of(results)]
    parts = [
        f"{outcomes.count(outcome)} {outcome}"
        for outcome in ("supported", "refuted", "undecided")
        if outcome in outcomes
    ]
    checks = [check["verdict"] for check in checks_of(results)]
    if checks:
        parts.append(f"{checks.count('holds')} of {len(checks)} checks hold")
    return ", ".join(parts)


def number(verdict: Mapping[str, Any]) -> str:
    """Return a verdict's statistic with its interval."""
    value, low, high = (verdict[name] for name in ("value", "low", "high"))
    if value is None:
        return "not to be had"
    if low == high:
        return f"{value:.3g}"
    if low is None or high is None:
        return f"{value:.3g}, interval unknown"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def largest_false_share(found: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """Return how many verdicts decide, and at most which share of them is wrong.

    Args:
      found: results of all studies, whose verdicts are counted together.
    """
    verdicts = [v for results in found for v in verdicts_of(results)]
    verdicts = [v for v in verdicts if v["p"] is not None]
    shares = sequential.false_discoveries([v["p"] for v in verdicts])
    decided = [
        share
        for share, verdict in zip(shares, verdicts, strict=True)
        if verdict["verdict"] != "undecided"
    ]
    return len(decided), max(decided, default=0.0)


def command(name: str, results: Mapping[str, Any]) -> str:
    """Return the command that recorded the results."""
    return " ".join(
        ["python -m", f"experiments.{name}", *results["environment"]["arguments"]]
    )


def _cell(text: str) -> str:
    """Escape what would end a cell of a table."""
    return text.replace("|", "\\|")


def index(found: Mapping[str, Any]) -> list[str]:
    """Return a table of the studies: question, verdicts, n, time, command."""
    lines = [
        "| question | verdicts | first of them | n | training | command |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in found.items():
        first = results["verdicts"][0]
        lines.append(
            f"| [{question(name)}](results/{name}) | {counts(results)} | "
            f"{_cell(first['statistic'])}: {number(first)} | "
            f"{seeds(results)} seeds | {results['seconds'] / 60:.0f} min | "
            f"`{command(name, results)}` |"
        )
    decided, share = largest_false_share(found.values())
    lines += [
        "",
        f"{decided} verdicts decide. Of these, at most {share:.1%} are to be expected "
        "wrong (the false-discovery rate of Benjamini and Hochberg over all verdicts).",
    ]
    return lines


def seeds(results: Mapping[str, Any]) -> str:
    """Return by how many seeds claims were judged."""
    numbers = [verdict["n"] for verdict in results["verdicts"]]
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least}-{most}"


def numbers(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Return the number of each claim that has a key, with its interval."""
    claims = studies()[name].STUDY.claims
    return {
        claim.key: f"{number(verdict)}"
        for claim, verdict in zip(claims, results["verdicts"], strict=True)
        if claim.key
    }


def filled(lines: Iterable[str], found: Mapping[str, Any]) -> list[str]:
    """Return findings with their numbers, as a list in Markdown.

    A line on a study that is not recorded yet is left out.
    """
    by_study = {
        name: types.SimpleNamespace(**numbers(name, results))
        for name, results in found.items()
    }
    return [
        f"- {line.format(**by_study)}"
        for line in lines
        if {name.partition(".")[0] for _, name, *_ in Formatter().parse(line) if name}
        <= by_study.keys()
    ]


def summary(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that open the index: the findings, and what is undecided."""
    undecided = [
        f"{verdict['claim']} ({verdict['statistic']}: {number(verdict)}"
        f"{_at_most(verdict)})"
        for results in found.values()
        for verdict in verdicts_of(results)
        if verdict["verdict"] == "undecided"
    ]
    lines = filled(findings.LINES, found)
    if undecided:
        lines.append(f"- **What is not known.** Whether {'; '.join(undecided)}.")
    return lines


def _at_most(verdict: Mapping[str, Any]) -> str:
    """Return how far an undecided claim's statistic may reach on the claimed side."""
    if verdict["threshold"].startswith(">") and verdict["high"] is not None:
        return f"; at most {verdict['high']:.3g}"
    if verdict["threshold"].startswith("<") and verdict["low"] is not None:
        return f"; at least {verdict['low']:.3g}"
    return ""


def section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Return a study's verdicts as a table, and its figures."""
    environment = results["environment"]
    verdicts, checks = verdicts_of(results), checks_of(results)
    level = max((v["level"] for v in verdicts), default=0.95)
    lines = [f"### {question(name)}", ""]
    if verdicts:
        lines += [
            f"| claim | statistic | value [{level:.0%} interval] | claimed | verdict |",
            "|---|---|---|---|---|",
            *map(_line, verdicts),
            "",
        ]
    if checks:
        lines += [
            "| check | what is measured | value | expected | |",
            "|---|---|---|---|---|",
            *map(_line, checks),
            "",
        ]
    lines += [
        f"{results['runs']} runs; {results['epochs']} epochs where not said otherwise; "
        f"{results['data_source']}; jax {environment['jax']}, "
        f"{environment['device_count']} x {environment['device_kind']}.",
        "",
    ]
    if (RESULTS / name / CLAIMS).exists():
        alt = "The interval of each claim's statistic, on an axis with what is claimed."
        lines += [f"![{alt}](results/{name}/{CLAIMS})", ""]
    for file, figure in studies()[name].STUDY.figures.items():
        if not (RESULTS / name / file).exists():
            continue
        if figure.finding:
            lines += [figure.finding.format(**numbers(name, results)), ""]
        lines += [f"![{figure.alt or question(name)}](results/{name}/{file})", ""]
    return lines


def page() -> str:
    """Return the part of experiments/README.md that comes from results."""
    found = recorded()
    lines = [*summary(found), "", *index(found), ""]
    for name, results in found.items():
        lines += section(name, results)
    return "\n".join(lines).rstrip() + "\n"


def short_page() -> str:
    """Return the part of the front page that comes from results."""
    return "\n".join(filled(findings.SHORT, recorded())) + "\n"


def updated(path: Path) -> str:
    """Return the text of one of the two READMEs, with what comes from results."""
    mark = "verdicts" if path == README else "findings"
    start, end = f"<!-- {mark}: by experiments.report -->", f"<!-- end of {mark} -->"
    before, found_start, rest = path.read_text().partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ConfigError(f"{path} lacks the marks {start} and {end}")
    made = page() if path == README else short_page()
    return f"{before}{start}\n\n{made}\n{end}{after}"


def _line(verdict: Mapping[str, Any]) -> str:
    """Return the line of a table for a verdict or a check."""
    return (
        f"| {_cell(verdict['claim'])} | {_cell(verdict['statistic'])} | "
        f"{number(verdict)}, n = {verdict['n']} | {verdict['threshold']} | "
        f"**{verdict['verdict']}** |"
    )


def differences(name: str) -> list[str]:
    """Judge the committed rows of a study again; return what is not as committed."""
    study = studies()[name].STUDY
    rows = json_files.read_rows(RESULTS / name / json_files.ROWS)
    committed = recorded()[name]["verdicts"]
    judged = [verdict.to_dict() for verdict in study.verdicts(rows)]
    if len(judged) != len(committed):
        return [f"{name}: {len(committed)} verdicts committed, {len(judged)} judged"]
    return [
        f"{name}: {new['claim']}: {key} is {new[key]!r}, committed {old[key]!r}"
        for old, new in zip(committed, judged, strict=True)
        for key in new
        if not _same(old[key], new[key])
    ]


# What the bits of a run depend on, of its environment.
INSTRUCTIONS = ("jax", "jaxlib", "cpu_instructions", "backend")


def repeated(name: str) -> list[str]:
    """Train a recorded run again; return how it differs, and what it was.

    Raises:
      ConfigError: if the study keeps no config of its runs, or the bits cannot be the
        same here.
    """
    recorded_there = recorded()[name]["environment"]
    here = provenance.environment()
    other = [key for key in INSTRUCTIONS if here[key] != recorded_there[key]]
    if other:
        raise ConfigError(
            f"{name} was recorded with other "
            + ", ".join(f"{k} ({recorded_there[k]}, here {here[k]})" for k in other)
            + "; numbers are the same bits only where these are the same"
        )
    rows = json_files.read_rows(RESULTS / name / json_files.ROWS)
    row = next((row for row in rows if "config" in row), None)
    if row is None:
        raise ConfigError(f"{name} keeps no config of its runs; repeat the whole study")
    config = TrainConfig(**row["config"])
    data = launch.load_data(config.dataset)
    with tempfile.TemporaryDirectory() as folder:
        (again,) = sweeps.sweep([config], data, workdir=Path(folder) / "run")
    words = f"{name}: {config.model}, {config.norm}, seed {config.seed}"
    print(f"repeated {words}: loss {again['loss'][-1]}", flush=True)
    return [
        f"{words}: {key} is {again[key]}, recorded {row[key]}"
        for key in ("loss", "train_accuracy", "test_accuracy")
        if again[key] != row[key]
    ]


def _same(a: Any, b: Any) -> bool:
    """Return whether values are equal but for rounding, which Pythons differ in."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    if not README.exists():
        raise ConfigError(
            f"{README} is not there, nor are the recorded results, which are not "
            "installed with the package; run this in a checkout"
        )
    if flags.FLAGS.repeat and not flags.FLAGS.check:
        raise ConfigError(
            f"--repeat={','.join(flags.FLAGS.repeat)} without --check; runs are "
            "repeated to be compared, so give --check, too"
        )
    if not flags.FLAGS.check:
        for path in (README, FRONT):
            path.write_text(updated(path))
            print(f"written: {path}")
        return
    unknown = set(flags.FLAGS.repeat) - recorded().keys()
    if unknown:
        raise ConfigError(
            f"repeat={','.join(sorted(unknown))}; expected some of "
            f"{', '.join(recorded())}"
        )
    wrong = [line for name in recorded() for line in differences(name)]
    for name in flags.FLAGS.repeat:
        wrong += repeated(name)
    wrong += [
        f"{path} is not made of the results: run without --check"
        for path in (README, FRONT)
        if updated(path) != path.read_text()
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    print(f"{len(recorded())} studies: verdicts, numbers and index are as committed")


def define_flags() -> None:
    launch.define_data_flags()
    flags.DEFINE_boolean("check", False, "Write nothing; say what is not as committed.")
    flags.DEFINE_list("repeat", [], "With --check: studies to train a run of again.")


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(define_flags))
