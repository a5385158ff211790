r"""Which claims hold? The index of the studies and their verdicts, in Markdown.

  python -m experiments.report

Reads the committed results, experiments/results/NAME/results.json, and writes them
between two marks of experiments/README.md; a test keeps the two the same.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
START, END = "<!-- verdicts: by experiments.report -->", "<!-- end of verdicts -->"


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


def counts(results: Mapping[str, Any]) -> str:
    """Return how many claims came out how."""
    outcomes = [verdict["verdict"] for verdict in results["verdicts"]]
    return ", ".join(
        f"{outcomes.count(outcome)} {outcome}"
        for outcome in ("supported", "refuted", "undecided")
        if outcome in outcomes
    )


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
            f"{results['seeds']} seeds | {results['seconds'] / 60:.0f} min | "
            f"`{command(name, results)}` |"
        )
    return lines


def section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Return a study's verdicts as a table, and its figures."""
    environment = results["environment"]
    lines = [
        f"### {question(name)}",
        "",
        "| claim | statistic | value [95% interval] | claimed | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {_cell(v['claim'])} | {_cell(v['statistic'])} | {number(v)}, "
            f"n = {v['n']} | "
            f"{v['threshold']} | **{v['verdict']}** |"
            for v in results["verdicts"]
        ),
        "",
        f"{results['runs']} runs; {results['epochs']} epochs where not said otherwise; "
        f"{results['data_source']}; jax {environment['jax']}, "
        f"{environment['device_count']} x {environment['device_kind']}.",
        "",
    ]
    figures = sorted((RESULTS / name).glob("*.png"))
    for figure in figures:
        lines += [f"![{question(name)}](results/{name}/{figure.name})", ""]
    return lines


def page() -> str:
    """Return the part of experiments/README.md that comes from results."""
    found = recorded()
    lines = [*index(found), ""]
    for name, results in found.items():
        lines += section(name, results)
    return "\n".join(lines).rstrip() + "\n"


def updated(readme: str) -> str:
    """Return the text of the README with the page between its marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{page()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    print(f"written: {README}")
