"""Figures of results; the only file that imports matplotlib. It reads no models."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito, 2008: told apart with any colour vision. One meaning, one colour.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#666666"
SKY, AMBER = "#56B4E9", "#E69F00"
ARM_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY)
# Arms that several figures have keep their colours.
COLOURS = {"batch_norm": BLUE, "flax": ORANGE, "none": GREEN, "none_padded": PURPLE}
# A thick line stays visible under a thin, dashed one that coincides with it.
ARM_LINES = (("-", 4.0), ("--", 1.5), ("-", 1.5), ("-.", 1.5))
LINES = dict(zip(COLOURS, ARM_LINES, strict=True))

DOTS_PER_INCH = 150


def curves(
    metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any], path: Path
) -> None:
    """Draw loss, train and test accuracy by epoch, as the chapter's figure does.

    Args:
      metrics: rows of metrics.jsonl.
      results: of results.json; its exact-statistics accuracy is marked at the end, if
        there is one.
      path: of the image to write.
    """
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in metrics]
    for name, label, style, colour in (
        ("loss", "train loss [nats]", "-", BLUE),
        ("train_accuracy", "train accuracy", "--", PURPLE),
        ("test_accuracy", "test accuracy (moving averages)", "-.", GREEN),
    ):
        values = [row[name] for row in metrics]
        axes.plot(epochs, values, style, color=colour, label=label, marker=".")
    if results["test_accuracy_exact"] is not None:
        axes.plot(
            epochs[-1],
            results["test_accuracy_exact"],
            "*",
            color=ORANGE,
            markersize=11,
            label="test accuracy (exact statistics)",
        )
    _finish(axes, "epoch", "loss, accuracy")
    axes.set_ylim(0, max(1, 1.05 * max(row["loss"] for row in metrics)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(results["data_source"], fontsize=8, color=GREY)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def gamma_beta(layers: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw the learned gamma and beta of each layer, a dot a feature.

    Args:
      layers: gamma and beta by layer, of results.json.
      path: of the image to write.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    start = {"gamma": 1.0, "beta": 0.0}
    for axes, greek, colour in zip(
        figure.subplots(1, 2), start, (BLUE, ORANGE), strict=True
    ):
        axes.axhline(start[greek], color=GREY, linewidth=0.8, linestyle=":")
        for position, layer in enumerate(layers):
            values = sorted(layers[layer].get(greek, ()))
            offsets = [
                position + 0.7 * ((i + 0.5) / len(values) - 0.5)
                for i in range(len(values))
            ]
            axes.plot(offsets, values, ".", color=colour, markersize=4)
        names = [f"{name}\n({_size(layers[name])})" for name in layers]
        axes.set_xticks(range(len(layers)), names)
        _finish(axes, "layer (features, in order of size)", f"learned {greek}")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def arms_by_epoch(
    rows: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    published: Mapping[str, Mapping[str, tuple[float, float]]],
    path: Path,
) -> None:
    """Draw loss, training and test accuracy by epoch, a line an arm.

    Lines are means over seeds, bands reach from the least to the greatest seed; after
    divergence a run is left out. Stars are means of the accuracy by exact statistics,
    with their range.

    Args:
      rows: one per run, with `arm`, `test_accuracy_exact`, and the per-epoch lists
        `loss`, `train_accuracy` and `test_accuracy`.
      titles: legend by arm; in the order of drawing.
      published: (mean, standard deviation) of the last epoch by arm and name of such a
        list, drawn at the end.
      path: of the image to write.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = {
        "loss": "training loss, nats",
        "train_accuracy": "training accuracy",
        "test_accuracy": "test accuracy (moving averages)",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for arm, title in titles.items():
            colour, (style, width) = COLOURS[arm], LINES[arm]
            runs = [row for row in rows if row["arm"] == arm]
            epochs, means, low, high = _by_epoch([row[name] for row in runs])
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
            marker = "." if len(epochs) == 1 else ""  # no line has one point
            axes.plot(
                epochs, means, style, color=colour, lw=width, label=title, marker=marker
            )
            end = len(runs[0][name]) + 0.6
            scores = [row.get(f"{name}_exact") for row in runs]
            exact = [score for score in scores if score is not None]
            if exact:
                axes.plot([end, end], [min(exact), max(exact)], color=colour, lw=1)
                axes.plot(end, sum(exact) / len(exact), "*", color=colour, ms=8)
            if name in published.get(arm, {}):
                mean, sd = published[arm][name]
                axes.errorbar(end + 0.6, mean, sd, fmt="_", color=colour, capsize=3)
        _finish(axes, "epoch", label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds = len({row["config"]["seed"] for row in rows})
    figure.suptitle(
        f"n = {seeds} seeds; band: least to greatest; star: exact statistics; "
        "at the right: published re-runs, mean and standard deviation",
        fontsize=8,
        color=GREY,
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, ncols=4, loc="outside lower center", frameon=False
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _by_epoch(
    runs: Sequence[Sequence[float | None]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return epochs, and mean, least and greatest value of the runs that reached it."""
    epochs, means, low, high = [], [], [], []
    for epoch, of_runs in enumerate(zip(*runs, strict=True), start=1):
        values = [value for value in of_runs if value is not None]
        if values:
            epochs.append(epoch)
            means.append(sum(values) / len(values))
            low.append(min(values))
            high.append(max(values))
    return epochs, means, low, high


def members_by_epoch(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], path: Path
) -> None:
    """Draw training loss and test accuracy by epoch, a line for each member of a sweep.

    Args:
      rows: with the per-epoch lists `loss` and `test_accuracy`, None after divergence.
      labels: of the rows.
      path: of the image to write.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = {"loss": "training loss [nats]", "test_accuracy": "test accuracy"}
    colours = colormaps["viridis"]
    for axes, (name, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, row in enumerate(rows):
            values = [float("nan") if v is None else v for v in row[name]]
            colour = colours(i / max(len(rows) - 1, 1) * 0.9)
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, ".-", color=colour, label=labels[i], lw=1)
        _finish(axes, "epoch", label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < len(rows) <= 12:
        figure.axes[0].legend(fontsize=7, frameon=False)
    figure.axes[1].set_title(f"{len(rows)} members", fontsize=8, color=GREY)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def bars(
    summaries: Mapping[str, Sequence[float]], label: str, note: str, path: Path
) -> None:
    """Draw a bar for each median, with a line from the least to the greatest value.

    Args:
      summaries: (median, least, greatest, ...) by title; in the order of drawing.
      label: of the axis, with its unit.
      note: a line above.
      path: of the image to write.
    """
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for position, (median, low, high, *_) in enumerate(summaries.values()):
        axes.barh(position, median, color=BLUE, height=0.6)
        axes.plot([low, high], [position] * 2, color=ORANGE, linewidth=2)
        axes.text(high, position, f" {median:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(summaries)), list(summaries), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(note, fontsize=8, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _size(layer: Mapping[str, Sequence[float]]) -> int:
    return max((len(values) for values in layer.values()), default=0)


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")


def bar_panels(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    label: str,
    note: str,
    path: Path,
) -> None:
    """Draw the same bars in several panels, as `bars` does in one.

    Args:
      panels: for each panel's title, (median, least, greatest, ...) by bar; the bars
        of all panels have the same titles.
      label: of the axes, with its unit.
      note: a line above.
      path: of the image to write.
    """
    num_bars = max(map(len, panels.values()))
    size = (2.5 + 2.5 * len(panels), 1.2 + 0.3 * num_bars)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, summaries) in zip(grid[0], panels.items(), strict=True):
        for position, (median, low, high, *_) in enumerate(summaries.values()):
            axes.barh(position, median, color=BLUE, height=0.6)
            axes.plot([low, high], [position] * 2, color=ORANGE, linewidth=2)
            axes.text(high, position, f" {median:.3g}", va="center", fontsize=8)
        axes.set_yticks(range(len(summaries)), list(summaries), fontsize=8)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()  # of all: they share it
    figure.savefig(path, dpi=DOTS_PER_INCH)


def growth(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    y_label: str,
    note: str,
    path: Path,
) -> None:
    """Draw how a cost grows, on logarithmic axes: medians, from least to greatest.

    Args:
      panels: for each panel's x label and each line's title, (median, least, greatest,
        ...) by size.
      y_label: of the cost, with its unit.
      note: a line above.
      path: of the image to write.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (1 + 3.4 * columns, 0.4 + 3.2 * rows) if len(panels) > 1 else (5, 3.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes, (x_label, series) in zip(grid.flat, panels.items(), strict=False):
        looks = zip(itertools.cycle(ARM_COLOURS), itertools.cycle(ARM_LINES))
        for (title, by_size), (colour, (style, width)) in zip(
            series.items(), looks, strict=False
        ):
            colour = COLOURS.get(title, colour)
            median, low, high = list(zip(*by_size.values(), strict=True))[:3]
            sizes = list(by_size)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(
                sizes, median, style, color=colour, lw=width, label=title, marker="."
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        if len(sizes) <= 6:  # few enough to be written out
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
        _finish(axes, x_label, y_label if axes in grid[:, 0] else "")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def by_choice(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    titles: Mapping[str, str],
    x_label: str,
    note: str,
    path: Path,
) -> None:
    """Draw what comes of a choice, such as a rate, on a logarithmic axis.

    Args:
      panels: for each panel's y label and each arm, (value, low, high, ...) by choice.
      titles: legend by arm.
      x_label: of the choices.
      note: a line above.
      path: of the image to write.
    """
    figure = Figure(figsize=(1 + 3.7 * len(panels), 3.6), layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (y_label, arms) in zip(grid[0], panels.items(), strict=True):
        for i, (arm, by_value) in enumerate(arms.items()):
            colour = COLOURS.get(arm, ARM_COLOURS[i % len(ARM_COLOURS)])
            middle, low, high = list(zip(*by_value.values(), strict=True))[:3]
            choices = list(by_value)
            axes.fill_between(choices, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(choices, middle, ".-", color=colour, label=titles[arm])
        axes.set_xscale("log")
        _finish(axes, x_label, y_label)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def estimates(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    note: str,
    path: Path,
    *,
    reference: float | None = None,
) -> None:
    """Draw a dot for each estimate, with a line over its interval.

    Args:
      panels: for each panel's x label, (value, low, high, ...) by title; all panels
        have the same titles.
      note: a line above.
      path: of the image to write.
      reference: a value to mark, such as 0 of a difference.
    """
    num_rows = max(map(len, panels.values()))
    size = (2.5 + 3 * len(panels), 1.2 + 0.27 * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (x_label, rows) in zip(grid[0], panels.items(), strict=True):
        if reference is not None:
            axes.axvline(reference, color=GREY, linewidth=0.8, linestyle=":")
        for position, (value, low, high, *_) in enumerate(rows.values()):
            axes.plot([low, high], [position] * 2, color=BLUE, linewidth=2, alpha=0.5)
            axes.plot(value, position, "o", color=BLUE, markersize=4)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_xlabel(x_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    grid[0][0].invert_yaxis()  # of all: they share it
    figure.savefig(path, dpi=DOTS_PER_INCH)


def small_multiples(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]],
    titles: Mapping[str, str],
    y_label: str,
    note: str,
    path: Path,
    *,
    columns: int = 4,
) -> None:
    """Draw curves by epoch in many small panels with the same axes.

    Lines are means over runs, bands reach from the least to the greatest; an epoch
    that a run did not reach is left out of both.

    Args:
      panels: for each panel's title and each line, a list by epoch for each run. A line
        is an arm, or "ARM test" for its test curve, which is dashed.
      titles: legend by line.
      y_label: of all panels.
      note: a line above.
      path: of the image to write.
      columns: panels side by side.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.1 * columns, 0.6 + 1.7 * rows), layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(rows, columns, sharey=True, sharex=True, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line, runs in lines.items():
            arm, _, kind = line.partition(" ")
            epochs, mean, low, high = _by_epoch(runs)
            style = "--" if kind else "-"
            axes.fill_between(epochs, low, high, color=COLOURS[arm], alpha=0.15, lw=0)
            axes.plot(
                epochs, mean, style, color=COLOURS[arm], label=titles[line], marker="."
            )
        axes.set_title(title, fontsize=8)
        _finish(axes, "", "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("epoch", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, ncols=2, loc="outside lower center",
        frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=DOTS_PER_INCH)


def distributions(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    references: Sequence[tuple[float, float]],
    note: str,
    path: Path,
) -> None:
    """Draw each value as a dot, in order of size, a row an arm.

    Args:
      panels: values by arm, for each panel's x label.
      titles: of the arms.
      references: (mean, standard deviation) for each panel, in grey.
      note: a line above.
      path: of the image to write.
    """
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(8, 1.4 + 0.7 * rows), layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (x_label, arms), (mean, sd) in zip(
        grid[0], panels.items(), references, strict=True
    ):
        axes.axvspan(mean - sd, mean + sd, color=GREY, alpha=0.15, lw=0)
        axes.axvline(mean, color=GREY, linewidth=1)
        for position, (arm, values) in enumerate(arms.items()):
            offsets = [
                position + 0.6 * ((i + 0.5) / len(values) - 0.5)
                for i in range(len(values))
            ]
            axes.plot(sorted(values), offsets, ".", color=COLOURS[arm], markersize=4)
        axes.set_yticks(range(len(arms)), [titles[arm] for arm in arms], fontsize=8)
        axes.set_xlabel(x_label)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()  # of all: they share it
    figure.savefig(path, dpi=DOTS_PER_INCH)


def matrices(
    panels: Mapping[str, Sequence[Sequence[float]]], note: str, path: Path
) -> None:
    """Draw matrices as colours from -1 to 1, one panel each.

    Args:
      panels: rows of each matrix, by title.
      note: a line above.
      path: of the image to write.
    """
    columns = min(6, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.7 * columns, 0.5 + 1.75 * rows), layout="constrained")
    figure.suptitle(note, fontsize=8, color=GREY)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.flat, panels.items(), strict=False):
        # Orange and purple are told apart with any colour vision, and from white.
        image = axes.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, label="covariance")
    figure.savefig(path, dpi=DOTS_PER_INCH)
