"""Figures as data: what is drawn, of which runs, with which line above."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.claims import Verdict
from experiments.estimate import Choice, spread
from experiments.scores import NotTrained, Runs, Score

Draw = Callable[[Runs, Path], None]  # writes an image, unless there is nothing to draw


class Figure(NamedTuple):
    """A figure of a study, and what the index says of it.

    Attributes:
      draw: writes it.
      finding: a sentence above it. `{key}` stands for the number of the claim with that
        key, with its interval.
      alt: what is to be seen, for who does not see it.
    """

    draw: Draw
    finding: str = ""
    alt: str = ""


Kind = Literal[
    "by_choice", "distributions", "estimates", "growth", "matrices", "small_multiples"
]


def figure(
    kind: Kind,
    panels: Any,
    note: str | Callable[[Runs], str],
    *,
    finding: str = "",
    alt: str = "",
    of: Callable[[Any], bool] = lambda choice: True,
    **options: Any,
) -> Figure:
    """Return a figure of statistics.

    Args:
      kind: the function of `bn_jax.plots` that draws it.
      panels: nested dicts as that function takes them, with statistics in place of
        numbers. Any part may be a function of the runs that returns the part. What was
        not trained is left out.
      note: a line above. `{n}` stands for the number of seeds, from the least to the
        greatest of a choice, and `{epochs}`, for example, for that field of the first
        run's config.
      finding: see `Figure`.
      alt: likewise.
      of: whether a choice of runs is drawn.
      **options: further arguments of the function.
    """

    def draw(runs: Runs, path: Path) -> None:
        from bn_jax import plots  # Matplotlib takes a second to import.

        runs = runs.where(of)
        found = _evaluate(panels, runs)
        if not found:
            return
        numbers = {len(rows) for rows in runs.values()}
        least, most = min(numbers), max(numbers)
        n = str(most) if least == most else f"{least}-{most}"
        config = runs.rows[0].get("config", {})
        given = {name: _evaluate(option, runs) for name, option in options.items()}
        line = (note(runs) if callable(note) else note).format(n=n, **config)
        getattr(plots, kind)(found, note=line, path=path, **given)

    return Figure(draw, finding, alt)


def _evaluate(part: Any, runs: Runs) -> Any:
    """Return a part of a figure as numbers; None where runs are missing."""
    if callable(part):
        try:
            return _evaluate(part(runs), runs)
        except NotTrained:
            return None
    if isinstance(part, Mapping):
        found = {name: _evaluate(inner, runs) for name, inner in part.items()}
        return {
            name: inner for name, inner in found.items() if inner is not None
        } or None
    return part


def draw_verdicts(
    verdicts: Sequence[Verdict], path: Path, *, caution: str = ""
) -> None:
    """Draw the intervals of verdicts against what is claimed; checks have none.

    Args:
      verdicts: the verdicts.
      path: of the image to write.
      caution: see `plots.claims`.
    """
    from bn_jax import plots  # Matplotlib takes a second to import.

    drawn = [
        plots.Judged(v.claim, *v.interval[:3], v.above, v.below, v.verdict)
        for v in verdicts
        if v.level is not None and math.isfinite(v.interval.value)
    ]
    if not drawn:
        return
    levels = {v.level for v in verdicts if v.level is not None}
    note = f"value, and its interval of {max(levels):.0%}; shaded: what is claimed"
    plots.claims(drawn, note, path, caution=caution)


Titled = Mapping[str, Choice]  # choices by title, in the order of the rows
SPREAD = "n = {n} seeds; line: least to greatest"


def spreads(
    scores: Mapping[str, Score], titled: Titled | Callable[[Runs], Titled]
) -> Any:
    """Return a panel for each score, with a row for each choice that was trained.

    Args:
      scores: by label of the axis.
      titled: choices by title, or a function of the runs that returns them.
    """

    def panel(score: Score) -> Callable[[Runs], Any]:
        def rows(runs: Runs) -> Any:
            choices = titled(runs) if callable(titled) else titled
            return {title: spread(score, choice) for title, choice in choices.items()}

        return rows

    return {label: panel(score) for label, score in scores.items()}


def with_rates(
    titles: Mapping[Choice, str], tuned: Collection[Choice] | None = None
) -> Callable[[Runs], Titled]:
    """Return a function of the runs: choices by title, with their learning rates.

    Args:
      titles: by choice. A choice that was not trained is left out.
      tuned: choices whose title gets the rate; by default all.
    """

    def titled(runs: Runs) -> Titled:
        found = {}
        for choice in filter(runs.__contains__, titles):
            rate = runs[choice][0]["config"]["learning_rate"]
            shown = f", rate {rate:g}" if tuned is None or choice in tuned else ""
            found[titles[choice] + shown] = choice
        return found

    return titled


def accuracy_curves(by_norm: Mapping[str, Choice]) -> Any:
    """Return a panel of training and test accuracy by epoch, a pair of lines a norm.

    Args:
      by_norm: the choice that is drawn in the colour of a norm.
    """

    def line(name: str, choice: Choice) -> Any:
        return lambda runs: [row[name] for row in runs.find(choice)]

    return {
        f"{norm}{suffix}": line(name, choice)
        for norm, choice in by_norm.items()
        for suffix, name in (("", "train_accuracy"), (" test", "test_accuracy"))
    }


def curves_legend(titles: Mapping[str, str], training: str = "training") -> Any:
    """Return the legend of `accuracy_curves`, from a title for each norm."""
    return {
        f"{norm}{suffix}": f"{title}, {what}"
        for norm, title in titles.items()
        for suffix, what in (
            ("", training),
            (" test", "test" + ", moving averages" * (norm != "none")),
        )
    }
