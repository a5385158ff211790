"""Finished runs and sweeps side by side: in what they differ, and how they did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bn_jax import transforms
from bn_jax.runs import json_files, provenance, results, workdirs

_BY_EPOCH = ("loss", "train_accuracy", "validation_accuracy", "test_accuracy")
_BY_EXACT = ("test_loss_exact", "test_accuracy_exact")
_AT_THE_END = (*_BY_EXACT, "test_accuracy_averaged")
# Columns of the table, and their titles.
_SCORES = {
    "loss": "train loss",
    "train_accuracy": "train accuracy",
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "test_accuracy_exact": "by exact statistics",
    "test_accuracy_averaged": "of averaged weights",
}


class Member(NamedTuple):
    """A run, or a member of a sweep."""

    folder: Path
    config: dict[str, Any]  # with the source of the images, which tells "auto" apart
    row: dict[str, Any]  # values by epoch as lists, and those at the end


def read(folder: str | Path) -> list[Member]:
    """Return the run in a folder, or the members of the sweep there.

    Raises:
      RunError: if there is none that has ended, or a file is damaged.
    """
    folder = workdirs.existing(folder, "folder")
    config = json_files.read_object(folder / json_files.CONFIG)
    if workdirs.is_sweep(config):
        results.check_finished(folder, others=results.OF_A_SWEEP)
        rows = json_files.read_rows(folder / json_files.ROWS)
        source = json_files.read_object(folder / json_files.RESULTS)["data_source"]
        return [
            Member(
                folder,
                {**row["config"], "data": source},
                _measured(row, transforms.is_batch_norm(row["config"]["norm"])),
            )
            for row in rows
        ]
    workdirs.check_no_experiment(folder, config)
    results.check_finished(folder, others=results.OF_A_RUN)
    summary = json_files.read_object(folder / json_files.RESULTS)
    metrics = results.read_metrics(folder)
    row: dict[str, Any] = {
        name: [epoch.get(name) for epoch in metrics]
        for name in _BY_EPOCH
        if any(name in epoch for epoch in metrics)
    }
    row |= {name: summary[name] for name in _AT_THE_END if name in summary}
    row = _measured(row, summary["moving_averages"])
    config["data"] = summary["data_source"]
    start = json_files.read_object(folder / json_files.ENVIRONMENT).get(
        provenance.START
    )
    if start is not None:  # the folder may have held another run since
        config["init_from"] = f"{config['init_from']} ({start})"
    return [Member(folder, config, row)]


def _measured(row: Mapping[str, Any], has_statistics: bool) -> dict[str, Any]:
    """Return a row, without scores by exact statistics if the model has none."""
    left_out = () if has_statistics else _BY_EXACT
    return {name: value for name, value in row.items() if name not in left_out}


def grouped(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Return members that differ in their seed alone together, by a label.

    The label names the fields in which the groups differ. Where several folders are
    compared it names the folder, too, unless the seeds of a group lie in several.
    """
    names = differing([m.config for m in members])

    def label(member: Member) -> str:
        return ", ".join(f"{name}={member.config.get(name)}" for name in names)

    folders: dict[str, set[Path]] = {}
    for member in members:
        folders.setdefault(label(member), set()).add(member.folder)
    seeds = [(label(m), m.config.get("seed")) for m in members]
    repeated = len(set(seeds)) < len(seeds)
    several = len({member.folder for member in members}) > 1
    found: dict[str, list[Member]] = {}
    for member in members:
        own = label(member)
        in_several = len(folders[own]) > 1
        if (repeated and in_several) or (not in_several and (several or not own)):
            own = ", ".join(filter(None, (own, str(member.folder))))
        found.setdefault(own or "all, of other seeds", []).append(member)
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fields but the seed in which configs differ."""
    names = dict.fromkeys(name for config in configs for name in config)
    first = configs[0]
    return [
        name
        for name in names
        if name != "seed" and any(c.get(name) != first.get(name) for c in configs)
    ]


def table(groups: Mapping[str, Sequence[Member]]) -> str:
    """Return a Markdown table: a line a group, mean and range over its seeds."""
    rows = [member.row for members in groups.values() for member in members]
    scores = [name for name in _SCORES if any(name in row for row in rows)]
    titles = dict(_SCORES)
    found = [member.config for members in groups.values() for member in members]
    if any(config.get("label_smoothing") for config in found):
        titles["loss"] += " (of smoothed labels, if they are)"
    lines = [["run", "n", *(titles[name] for name in scores)]]
    for label, members in groups.items():
        # What a row lacks was not measured; None in it is of a run that diverged.
        cells = [
            _cell([_last(m.row[name]) for m in members if name in m.row])
            for name in scores
        ]
        lines.append([label, str(len(members)), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) else value


def _cell(values: Sequence[float | None]) -> str:
    """Return the mean of numbers and their range, and how many have diverged."""
    known = [value for value in values if value is not None]
    if not known:
        return "diverged" if len(values) > 1 else "-"
    text = f"{statistics.fmean(known):.4f}"
    if len(known) > 1:
        text += f" ({min(known):.4f}-{max(known):.4f})"
    if len(known) < len(values):
        text += f", {len(values) - len(known)} diverged"
    return text
