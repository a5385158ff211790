"""Colours, line styles and parts that figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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


def figure(width: float, height: float, note: str = "") -> Figure:
    """Return a figure of a size in inches, with a line above the axes."""
    made = Figure(figsize=(width, height), layout="constrained")
    if note:
        made.suptitle(note, fontsize=8, color=GREY)
    return made


def save(figure: Figure, path: Path) -> None:
    """Write a figure as an image."""
    figure.savefig(path, dpi=DOTS_PER_INCH)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes, and draw light lines at the ticks of y."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")


def whole_epochs(axes: Axes) -> None:
    """Have ticks at whole numbers alone, also where one epoch is all."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.dataLim.intervalx
    if 0 <= high - low < 1:  # else there are more, or none
        axes.update_datalim([(low - 0.5, 0), (low + 0.5, 0)], updatey=False)
        axes.autoscale_view()


def legend_below(figure: Figure, *, columns: int) -> None:
    """Draw the legend of the first axes under all."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    width = round(14 * figure.get_figwidth() / columns)  # characters of this size
    figure.legend(
        handles,
        [textwrap.fill(label, width) for label in labels],
        fontsize=8,
        ncols=columns,
        loc="outside lower center",
        frameon=False,
    )


def rows(axes: Axes, titles: Iterable[str]) -> None:
    """Name the rows of a panel, of which the first is at the bottom."""
    titles = list(titles)
    axes.set_yticks(range(len(titles)), titles, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def in_columns(figure: Figure, count: int, columns: int, **shared: Any) -> Any:
    """Return a grid of axes with a number of columns; hide those beyond `count`."""
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **shared)
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    return grid


def spread_out(values: Sequence[float], position: int, width: float) -> list[float]:
    """Return places around a position at which dots do not hide each other."""
    count = len(values)
    return [position + width * ((i + 0.5) / count - 0.5) for i in range(count)]


def by_epoch(
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
