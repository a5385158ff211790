"""Figures of runs: metrics by epoch, and what their norms learned."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from bn_jax.fields import counted
from bn_jax.plots import style
from bn_jax.plots.style import (
    AMBER,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    SKY,
)

Layers = Mapping[str, Mapping[str, Sequence[float]]]

# Where gamma and beta start, in the order of their panels.
START = {"gamma": 1.0, "beta": 0.0}
# More layers than these have a line each over depth instead of a dot a feature; of so
# many names there is room beside each other, and names of so many characters.
MOST_WITH_DOTS, MOST_NAMES, LONGEST_NAME = 8, 28, 32


def curves(
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw loss, train and test accuracy by epoch, as the chapter's figure does.

    Loss and accuracy on a validation set are drawn beside them where there is one; a
    loss on it that is far above the others is a triangle at the upper edge.

    Args:
      metrics: rows of metrics.jsonl, at least one: losses in nats, accuracies as shares
        of 1, all known but for losses on a validation set, which are by moving averages
        and may be infinite or None.
      results: of results.json; its exact-statistics accuracy is marked at the end, if
        there is one. The row of a sweep's member will not do.
      path: of the image to write.
      title: what the run is.
    """
    has_averages = results.get("moving_averages", True)
    by_averages = " (moving averages)" * has_averages
    lines = textwrap.wrap(title, 108) + textwrap.wrap(results["data_source"], 108)
    figure = style.figure(7, 4.4, "\n".join(lines))
    axes = figure.subplots()
    epochs = [row["epoch"] for row in metrics]
    top = _top(metrics)
    for name, label, dashes, colour in (
        ("loss", "train loss [nats]", "-", BLUE),
        ("validation_loss", f"validation loss [nats]{by_averages}", "-", SKY),
        ("train_accuracy", "train accuracy", "--", PURPLE),
        ("validation_accuracy", f"validation accuracy{by_averages}", ":", AMBER),
        ("test_accuracy", f"test accuracy{by_averages}", "-.", GREEN),
    ):
        if all(name in row for row in metrics):
            values = _known(metrics, name)
            axes.plot(epochs, values, dashes, color=colour, label=label, marker=".")
            beyond = [e for e, v in zip(epochs, values, strict=True) if v > top]
            if beyond:
                axes.plot(beyond, [top] * len(beyond), "^", color=colour, clip_on=False)
    if results["test_accuracy_exact"] is not None and has_averages:
        axes.plot(
            # Beside the dots of the last epoch, which it would hide.
            epochs[-1] + 0.05 * max(1, epochs[-1] - epochs[0]),
            results["test_accuracy_exact"],
            "*",
            color=ORANGE,
            markersize=11,
            label="test accuracy (exact statistics)",
        )
    style.finish(axes, "epoch", "loss, accuracy")
    axes.set_ylim(0, top)
    style.whole_epochs(axes)
    style.legend_below(figure, columns=2)
    style.save(figure, path)


def _known(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return one value per epoch, NaN where it is unknown."""
    return [math.nan if row[name] is None else row[name] for row in metrics]


def _top(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return the upper end of the axis: it holds all accuracies and training losses.

    By moving averages the loss on a validation set may be a hundred times that of
    training. Where it would flatten the other lines, it runs out of the figure.
    """
    highest: float = max(row["loss"] for row in metrics)
    validated = [
        value
        for row in metrics
        if (value := row.get("validation_loss")) is not None and math.isfinite(value)
    ]
    return max(1.05, 1.05 * highest, min(1.05 * max(validated, default=0), 2 * highest))


def gamma_beta(layers: Layers, path: Path) -> None:
    """Draw the learned gamma and beta of each layer.

    Of few layers each feature has a dot. Of more, each layer has its median, its
    quartiles, and its least and greatest value, over the depth of the network.

    Args:
      layers: gamma and beta by layer, of results.json: lists of C numbers, one of them
        perhaps missing. They are drawn in the order given, unless that is the
        alphabet's, which has layer 10 before layer 2: numbers then go by their size.
      path: of the image to write.
    """
    names = _in_order(list(layers))
    draw: Callable[[Layers, Path], None]
    draw = _dots if len(names) <= MOST_WITH_DOTS else _over_depth
    draw({name: layers[name] for name in names}, path)


def _in_order(names: Sequence[str]) -> list[str]:
    """Return names of layers in the order of drawing."""

    def by_size(name: str) -> list[tuple[str, int]]:
        return [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", name)]

    return sorted(names, key=by_size) if list(names) == sorted(names) else list(names)


def _short(name: str) -> str:
    """Return a layer's name, of a long one without its middle."""
    if len(name) <= LONGEST_NAME:
        return name
    half = LONGEST_NAME // 2 - 2
    return f"{name[:half]}...{name[-half:]}"


def _dots(layers: Layers, path: Path) -> None:
    """Draw a row for each layer, with a dot for each feature."""
    figure = style.figure(
        6, 1.1 + 0.45 * max(3, len(layers)), "a dot a feature, by size"
    )
    grid = figure.subplots(1, 2, sharey=True)
    for axes, (greek, start), colour in zip(
        grid, START.items(), (BLUE, ORANGE), strict=True
    ):
        axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        for position, learned in enumerate(layers.values()):
            values = sorted(learned.get(greek, ()))
            places = style.spread_out(values, position, 0.7)
            axes.plot(values, places, ".", color=colour, markersize=4)
        axes.set_xlabel(f"learned {greek}")
        axes.grid(axis="x", linewidth=0.4, color="#dddddd")
        axes.locator_params(axis="x", nbins=5)
    sizes = [max(map(len, learned.values()), default=0) for learned in layers.values()]
    titles = [f"{_short(name)} ({n})" for name, n in zip(layers, sizes, strict=True)]
    for axes in grid:
        style.rows(axes, titles)
    grid[0].set_ylabel("layer (features)")
    grid[0].set_ylim(len(layers) - 0.4, -0.6)  # of both: the first layer is on top
    style.save(figure, path)


def _over_depth(layers: Layers, path: Path) -> None:
    """Draw a panel of gamma above one of beta, with a line for each layer."""
    note = f"{len(layers)} layers; dot: median, thick: quartiles, thin: extremes"
    figure = style.figure(6, 6, note)
    grid = figure.subplots(2, 1, sharex=True)
    for axes, (greek, start), colour in zip(
        grid, START.items(), (BLUE, ORANGE), strict=True
    ):
        axes.axhline(start, color=GREY, linewidth=0.8, linestyle=":")
        _quartiles(
            axes, [learned.get(greek, ()) for learned in layers.values()], colour
        )
        style.finish(axes, "", f"learned {greek}")
    places = range(0, len(layers), -(-len(layers) // MOST_NAMES))
    names = [_short(name) for name in layers]
    grid[1].set_xticks(places, [names[i] for i in places], rotation=90, fontsize=7)
    grid[1].set_xlabel("layer" if len(places) == len(names) else "layer, some by name")
    style.save(figure, path)


def _quartiles(axes: Axes, layers: Sequence[Sequence[float]], colour: str) -> None:
    """Draw median, quartiles and extremes of the values of each layer that has some."""
    places = [place for place, values in enumerate(layers) if len(values)]
    found = [
        np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) for values in layers if len(values)
    ]
    if not found:
        return
    least, first, median, third, greatest = np.transpose(found)
    width = min(6.0, 200 / len(layers))  # in points; the panel has some 360
    axes.vlines(places, least, greatest, color=colour, linewidth=0.2 * width, alpha=0.6)
    axes.vlines(places, first, third, color=colour, linewidth=width, alpha=0.6)
    axes.plot(places, median, ".", color="black", markersize=min(4.0, 1.2 * width))


def members_by_epoch(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """Draw training loss and test accuracy by epoch, a line for each group of members.

    Lines are means over a group's members, such as its seeds, and bands reach from the
    least to the greatest. The accuracy on a validation set has a panel where there is
    one.

    Args:
      groups: by label, at least one, rows with the per-epoch lists `loss`, in nats, and
        `test_accuracy`, shares of 1, None after divergence; and `validation_accuracy`,
        if there is one.
      path: of the image to write.
    """
    counts = sorted({len(rows) for rows in groups.values()})
    note = counted(sum(map(len, groups.values())), "member")
    if counts[-1] > 1:
        note += (
            f"; n = {'-'.join(str(n) for n in sorted({counts[0], counts[-1]}))} seeds, "
            "band: least to greatest"
        )
    panels = {
        "loss": "training loss [nats]",
        "validation_accuracy": "validation accuracy",
        "test_accuracy": "test accuracy",
    }
    if not any(
        "validation_accuracy" in row for rows in groups.values() for row in rows
    ):
        del panels["validation_accuracy"]
    figure = style.figure(2 + 3 * len(panels), 3.9, note)
    grid = figure.subplots(1, len(panels))
    colours = colormaps["viridis"]
    has_legend = 1 < len(groups) <= 12
    for axes, (name, title) in zip(grid, panels.items(), strict=True):
        for i, (label, rows) in enumerate(groups.items()):
            lists = [row[name] for row in rows if name in row]
            longest = max(map(len, lists), default=0)
            runs = [[*values, *[None] * (longest - len(values))] for values in lists]
            epochs, means, low, high = style.by_epoch(runs)
            colour = colours(i / max(len(groups) - 1, 1) * 0.9)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
            # A thick line stays visible under a thin one that coincides with it.
            width = 1 + 2 * (1 - i / (len(groups) - 1)) if has_legend else 1
            look = {"color": colour, "lw": width, "ms": 4 + 2 * width}
            axes.plot(epochs, means, ".-", label=label, **look)
        style.finish(axes, "epoch", title)
        style.whole_epochs(axes)
    if has_legend:
        style.legend_below(figure, columns=1 if max(map(len, groups)) > 60 else 2)
    style.save(figure, path)


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
      rows: one per run, with `arm`, `config`, of which the seed is read, if known
        `test_accuracy_exact`, and the per-epoch lists `loss`, in nats, `train_accuracy`
        and `test_accuracy`, shares of 1.
      titles: legend by arm, of `style.LINES` and with a row or more; in the order of
        drawing.
      published: (mean, standard deviation) of the last epoch by arm and name of such a
        list, drawn at the end.
      path: of the image to write.

    Raises:
      KeyError: if an arm has no line style.
      ValueError: if lists of an arm are of different lengths.
    """
    counts = [sum(row["arm"] == arm for row in rows) for arm in titles]
    fewer = f"{min(counts)} to " * (min(counts) < max(counts))
    note = (
        f"n = {fewer}{counted(max(counts), 'seed')}; band: least to greatest; star: "
        "exact statistics; at the right: published re-runs, mean and standard deviation"
    )
    figure = style.figure(10, 3.9, note)
    panels = {
        "loss": "training loss, nats",
        "train_accuracy": "training accuracy",
        "test_accuracy": "test accuracy (moving averages)",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for arm, title in titles.items():
            colour, (dashes, width) = COLOURS[arm], LINES[arm]
            runs = [row for row in rows if row["arm"] == arm]
            epochs, means, low, high = style.by_epoch([row[name] for row in runs])
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
            marker = "." if len(epochs) == 1 else ""  # no line has one point
            axes.plot(
                epochs,
                means,
                dashes,
                color=colour,
                lw=width,
                label=title,
                marker=marker,
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
        style.finish(axes, "epoch", label)
        style.whole_epochs(axes)
    style.legend_below(figure, columns=4)
    style.save(figure, path)
