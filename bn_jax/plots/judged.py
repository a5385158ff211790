"""What is claimed of statistics, and what they came out as."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from bn_jax.plots import style
from bn_jax.plots.style import BLUE, GREEN, GREY, ORANGE

# Colour and marker of an outcome.
LOOKS = {"supported": (BLUE, "o"), "refuted": (ORANGE, "X"), "undecided": (GREY, "D")}
LINE = 110  # characters of 8 points that fit above an axis


class Judged(NamedTuple):
    """A claim that a statistic lies between two bounds, and its outcome."""

    claim: str
    value: float
    low: float  # the ends of its interval; infinite where it has none
    high: float
    above: float  # the bounds; infinite where there is none
    below: float
    outcome: str  # "supported", "refuted" or "undecided"


def claims(
    judged: Sequence[Judged], note: str, path: Path, *, caution: str = ""
) -> None:
    """Draw each claim's interval on an axis of its own, with what is claimed shaded.

    Args:
      judged: the claims, at least one, in the order of drawing.
      note: a line above.
      path: of the image to write.
      caution: why these are not results, such as that the seeds are too few: a line in
        large print above the note.

    Raises:
      KeyError: if an outcome is none of the three.
    """
    titles = [textwrap.fill(claim.claim, LINE) for claim in judged]
    lines = [title.count("\n") for title in titles]
    heights = [0.6 + 0.16 * extra for extra in lines]
    figure = style.figure(9, 0.4 + 0.3 * bool(caution) + sum(heights), note)
    if caution:
        figure.suptitle(f"{caution}\n{note}", fontsize=11, color=ORANGE)
    grid = figure.subplots(len(judged), 1, squeeze=False, height_ratios=heights)
    for axes, claim, title in zip(grid.flat, judged, titles, strict=True):
        _draw(axes, claim)
        axes.set_title(title, fontsize=8, loc="left")
    style.save(figure, path)


def _draw(axes: Axes, claim: Judged) -> None:
    colour, marker = LOOKS[claim.outcome]
    points = [claim.value, claim.low, claim.high, claim.above, claim.below]
    finite = [point for point in points if math.isfinite(point)]
    least, greatest = min(finite), max(finite)
    margin = 0.15 * (greatest - least) or 1.0
    left, right = least - margin, greatest + margin
    axes.axvspan(
        max(claim.above, left), min(claim.below, right), color=GREEN, alpha=0.2
    )
    for bound in (claim.above, claim.below):
        if math.isfinite(bound):
            axes.axvline(bound, color=GREEN, linewidth=1)
    ends = [max(claim.low, left), min(claim.high, right)]
    axes.plot(ends, [0, 0], color=colour, linewidth=2)
    axes.plot(claim.value, 0, marker, color=colour, markersize=6)
    place = (1.01, 0.5)
    axes.annotate(
        claim.outcome, place, xycoords="axes fraction", color=colour, va="center"
    )
    axes.set_xlim(left, right)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
