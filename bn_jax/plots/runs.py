"""Figures of runs: metrics by epoch, and what their norms learned."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from bn_jax.plots import style
from bn_jax.plots.style import BLUE, COLOURS, GREEN, GREY, LINES, ORANGE, PURPLE


def curves(
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw loss, train and test accuracy by epoch, as the chapter's figure does.

    Args:
      metrics: rows of metrics.jsonl, at least one: losses in nats, accuracies as shares
        of 1, all known.
      results: of results.json; its exact-statistics accuracy is marked at the end, if
        there is one. The row of a sweep's member will not do.
      path: of the image to write.
      title: what the run is.
    """
    has_averages = results.get("moving_averages", True)
    tested = "test accuracy" + " (moving averages)" * has_averages
    figure = style.figure(6, 3.8)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in metrics]
    for name, label, dashes, colour in (
        ("loss", "train loss [nats]", "-", BLUE),
        ("train_accuracy", "train accuracy", "--", PURPLE),
        ("test_accuracy", tested, "-.", GREEN),
    ):
        values = [row[name] for row in metrics]
        axes.plot(epochs, values, dashes, color=colour, label=label, marker=".")
    if results["test_accuracy_exact"] is not None and has_averages:
        axes.plot(
            epochs[-1],
            results["test_accuracy_exact"],
            "*",
            color=ORANGE,
            markersize=11,
            label="test accuracy (exact statistics)",
        )
    style.finish(axes, "epoch", "loss, accuracy")
    axes.set_ylim(0, max(1, 1.05 * max(row["loss"] for row in metrics)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = [*textwrap.wrap(title, 90), results["data_source"]]
    axes.set_title("\n".join(lines), fontsize=8, color=GREY)
    axes.legend(fontsize=8, frameon=False)
    style.save(figure, path)


def gamma_beta(layers: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw the learned gamma and beta of each layer, a dot a feature.

    Args:
      layers: gamma and beta by layer, of results.json: lists of C numbers, one of them
        perhaps missing.
      path: of the image to write.
    """
    figure = style.figure(6, 3.2)
    start = {"gamma": 1.0, "beta": 0.0}
    for axes, greek, colour in zip(
        figure.subplots(1, 2), start, (BLUE, ORANGE), strict=True
    ):
        axes.axhline(start[greek], color=GREY, linewidth=0.8, linestyle=":")
        for position, layer in enumerate(layers):
            values = sorted(layers[layer].get(greek, ()))
            places = style.spread_out(values, position, 0.7)
            axes.plot(places, values, ".", color=colour, markersize=4)
        sizes = [max(map(len, layer.values()), default=0) for layer in layers.values()]
        names = [f"{name}\n({n})" for name, n in zip(layers, sizes, strict=True)]
        axes.set_xticks(range(len(layers)), names)
        style.finish(axes, "layer (features, in order of size)", f"learned {greek}")
    style.save(figure, path)


def members_by_epoch(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """Draw training loss and test accuracy by epoch, a line for each group of members.

    Lines are means over a group's members, such as its seeds, and bands reach from the
    least to the greatest.

    Args:
      groups: by label, at least one, rows with the per-epoch lists `loss`, in nats, and
        `test_accuracy`, shares of 1, None after divergence.
      path: of the image to write.
    """
    counts = sorted({len(rows) for rows in groups.values()})
    note = f"{sum(map(len, groups.values()))} members"
    if counts[-1] > 1:
        note += (
            f"; n = {'-'.join(str(n) for n in sorted({counts[0], counts[-1]}))} seeds, "
            "band: least to greatest"
        )
    figure = style.figure(8, 3.9, note)
    panels = {"loss": "training loss [nats]", "test_accuracy": "test accuracy"}
    colours = colormaps["viridis"]
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, (label, rows) in enumerate(groups.items()):
            longest = max(len(row[name]) for row in rows)
            runs = [[*row[name], *[None] * (longest - len(row[name]))] for row in rows]
            epochs, means, low, high = style.by_epoch(runs)
            colour = colours(i / max(len(groups) - 1, 1) * 0.9)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(epochs, means, ".-", color=colour, label=label, lw=1)
        style.finish(axes, "epoch", title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < len(groups) <= 12:
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
    seeds = len({row["config"]["seed"] for row in rows})
    note = (
        f"n = {seeds} seeds; band: least to greatest; star: exact statistics; at the "
        "right: published re-runs, mean and standard deviation"
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend_below(figure, columns=4)
    style.save(figure, path)
