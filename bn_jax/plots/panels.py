"""Figures of panels: dicts of what is drawn, by title of the panel."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bn_jax.plots import style
from bn_jax.plots.style import ARM_COLOURS, ARM_LINES, BLUE, COLOURS, GREY, ORANGE


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
    figure = style.figure(7, 0.8 + 0.35 * len(summaries))
    axes = figure.subplots()
    _bars(axes, summaries, label)
    axes.invert_yaxis()
    axes.set_title(note, fontsize=8, color=GREY)
    style.save(figure, path)


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
    figure = style.figure(*size, note)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, summaries) in zip(grid[0], panels.items(), strict=True):
        _bars(axes, summaries, label)
        axes.set_title(title, fontsize=9)
    grid[0][0].invert_yaxis()  # of all: they share it
    style.save(figure, path)


def growth(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    y_label: str,
    note: str,
    path: Path,
    *,
    share_y: bool = False,
) -> None:
    """Draw how a cost grows, on logarithmic axes: medians, from least to greatest.

    Args:
      panels: for each panel's x label and each line's title, (median, least, greatest,
        ...) by size, all greater than 0.
      y_label: of the cost, with its unit.
      note: a line above.
      path: of the image to write.
      share_y: whether all panels have the axis of costs in common.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 1 + 3 * columns, 0.7 + 3 * rows
    if len(panels) == 1:
        width, height = 5, 3.9
    figure = style.figure(width, height, note)
    grid = style.in_columns(figure, len(panels), columns, sharey=share_y)
    for axes, (x_label, series) in zip(grid.flat, panels.items(), strict=False):
        looks = zip(itertools.cycle(ARM_COLOURS), itertools.cycle(ARM_LINES))
        for (title, by_size), (colour, (dashes, thickness)) in zip(
            series.items(), looks, strict=False
        ):
            colour = COLOURS.get(title, colour)
            look = {"color": colour, "lw": thickness, "label": title, "marker": "."}
            _line(axes, by_size, dashes, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = list(by_size)
        if len(sizes) <= 6:  # few enough to be written out
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
        style.finish(axes, x_label, y_label if axes in grid[:, 0] else "")
    style.legend_below(figure, columns=4)
    style.save(figure, path)


def by_choice(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    titles: Mapping[str, str],
    x_label: str,
    note: str,
    path: Path,
    *,
    x_scale: str = "log",
) -> None:
    """Draw what comes of a choice, such as a rate.

    Args:
      panels: for each panel's y label and each arm, (value, low, high, ...) by choice.
      titles: legend by arm.
      x_label: of the choices.
      note: a line above.
      path: of the image to write.
      x_scale: of their axis, as Matplotlib calls it; "linear" has ticks at integers
        alone.

    Raises:
      KeyError: if an arm has no title.
    """
    figure = style.figure(1 + 3.7 * len(panels), 3.6, note)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (y_label, arms) in zip(grid[0], panels.items(), strict=True):
        for i, (arm, by_value) in enumerate(arms.items()):
            colour = COLOURS.get(arm, ARM_COLOURS[i % len(ARM_COLOURS)])
            _line(axes, by_value, ".-", color=colour, label=titles[arm])
        axes.set_xscale(x_scale)
        if x_scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.finish(axes, x_label, y_label)
    grid[0][0].legend(fontsize=8, frameon=False)
    style.save(figure, path)


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
    columns = min(2, len(panels))  # more would be small print on a page
    lines = -(-len(panels) // columns)
    size = (2.5 + 3 * columns, 0.2 + lines * (1 + 0.27 * num_rows))
    figure = style.figure(*size, note)
    grid = style.in_columns(figure, len(panels), columns, sharey=True)
    for axes, (x_label, rows) in zip(grid.flat, panels.items(), strict=False):
        if reference is not None:
            axes.axvline(reference, color=GREY, linewidth=0.8, linestyle=":")
        for position, (value, low, high, *_) in enumerate(rows.values()):
            axes.plot([low, high], [position] * 2, color=BLUE, linewidth=2, alpha=0.5)
            axes.plot(value, position, "o", color=BLUE, markersize=4)
        style.rows(axes, rows)
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    grid[0][0].invert_yaxis()  # of all: they share it
    style.save(figure, path)


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
      panels: for each panel's title and each line, a list by epoch for each run, of as
        many epochs with None for those that it did not reach. A line is an arm of
        `style.COLOURS`, or "ARM test" for its test curve, which is dashed.
      titles: legend by line.
      y_label: of all panels.
      note: a line above.
      path: of the image to write.
      columns: panels side by side.

    Raises:
      KeyError: if a line has no title, or its arm no colour.
      ValueError: if the lists of a line are of different lengths.
    """
    rows = -(-len(panels) // columns)
    figure = style.figure(2.1 * columns, 0.6 + 1.7 * rows, note)
    grid = style.in_columns(figure, len(panels), columns, sharex=True, sharey=True)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line, runs in lines.items():
            arm, _, kind = line.partition(" ")
            epochs, mean, low, high = style.by_epoch(runs)
            dashes, colour = "--" if kind else "-", COLOURS[arm]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(
                epochs, mean, dashes, color=colour, label=titles[line], marker="."
            )
        axes.set_title(title, fontsize=8)
        style.finish(axes, "", "")
        style.whole_epochs(axes)
        axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("epoch", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    style.legend_below(figure, columns=2)
    style.save(figure, path)


def distributions(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    references: Sequence[tuple[float, float]],
    note: str,
    path: Path,
) -> None:
    """Draw a histogram of the values of each arm.

    Args:
      panels: values by arm, for each panel's x label: at least one of each arm, all of
        them finite; arms are those of `style.LINES`.
      titles: of the arms.
      references: (mean, standard deviation) for each panel, in grey.
      note: a line above.
      path: of the image to write.

    Raises:
      KeyError: if an arm has no title, or no line style.
      ValueError: if there are more or fewer references than panels.
    """
    figure = style.figure(8, 3.2, note)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (x_label, arms), (mean, sd) in zip(
        grid[0], panels.items(), references, strict=True
    ):
        axes.axvspan(mean - sd, mean + sd, color=GREY, alpha=0.15, lw=0)
        axes.axvline(mean, color=GREY, linewidth=1)
        everything = [value for values in arms.values() for value in values]
        bins = np.histogram_bin_edges(everything, bins=20)
        for arm, values in arms.items():
            (dashes, thickness), colour = style.LINES[arm], COLOURS[arm]
            look: dict[str, Any] = {"color": colour, "ls": dashes, "lw": thickness}
            shares = np.full(len(values), 1 / len(values))
            look["label"] = titles[arm]
            axes.hist(values, bins, weights=shares, histtype="step", **look)
        style.finish(axes, x_label, "share")
    style.legend_below(figure, columns=2)
    style.save(figure, path)


def matrices(
    panels: Mapping[str, Sequence[Sequence[float]]], note: str, path: Path
) -> None:
    """Draw covariances as colours from -1 to 1, one panel each.

    Args:
      panels: rows of each matrix, by title; what is beyond has the colour of the end.
      note: a line above.
      path: of the image to write.
    """
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = style.figure(1.7 * columns, 0.5 + 1.75 * rows, note)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.flat, panels.items(), strict=False):
        # Orange and purple are told apart with any colour vision, and from white.
        image = axes.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, label="covariance")
    style.save(figure, path)


def _bars(axes: Axes, summaries: Mapping[str, Sequence[float]], label: str) -> None:
    for position, (median, low, high, *_) in enumerate(summaries.values()):
        axes.barh(position, median, color=BLUE, height=0.6)
        axes.plot([low, high], [position] * 2, color=ORANGE, linewidth=2)
        axes.text(high, position, f" {median:.3g}", va="center", fontsize=8)
    style.rows(axes, summaries)
    axes.set_xlabel(label)


def _line(
    axes: Axes, points: Mapping[float, Sequence[float]], dashes: str, **look: Any
) -> None:
    """Draw (middle, low, high, ...) by x as a line with a band."""
    middle, low, high = list(zip(*points.values(), strict=True))[:3]
    axes.fill_between(list(points), low, high, color=look["color"], alpha=0.2, lw=0)
    axes.plot(list(points), middle, dashes, **look)
