r"""Does batch norm allow larger learning rates, and how large?

The second exercise of the chapter, which trains LeNet with batch norm at 1.0 and says
that batch norm seems to allow larger rates. This trains LeNet with and without at
twelve rates, half a decade apart, and for longer at the five best of each.

  python -m experiments.learning_rates --workdir=runs/rates --devices=2    20 minutes
  python -m experiments.learning_rates --workdir=runs/rates-try --smoke     a minute

A rate is workable where the training accuracy of the longest run there reaches .8, as
the mean over its last epoch. Figures: learning_rates.png, accuracy against the rate;
curves.png, accuracy by epoch at each rate.

What came out (3 seeds; all of it in experiments/README.md): with batch norm rates from
.1 to 10 reach .8 for every seed, without only 1, or 1 and 3, or none: a band wider by 2
decades. By the bar of .5, batch norm works from .001 to 30, the largest rate is 14
times that without, and the band is wider by 3.3 decades. That the largest rate is at
least 5 times larger is undecided by three seeds: at rate 3, without, some learn and
some do not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Arms, Row

if TYPE_CHECKING:
    from experiments.claims import Verdict

WORKABLE = 0.8
TITLES = {"batch_norm": "batch norm", "none": "no batch norm"}


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """A grid of rates, and how much longer its best are trained."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    learning_rates: tuple[float, ...] = fields.option(
        (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
        "About half a decade apart, which a band's width counts for its ends.",
        valid=fields.POSITIVE,
    )
    long_rates: int = fields.option(
        5,
        "At how many of them, the best of each norm, runs are longer; 0 for none.",
        valid=fields.NOT_NEGATIVE,
    )
    longer: float = fields.option(
        10 / 3, "How many times as long.", valid=fields.POSITIVE
    )


def short(design: Design, rows: Sequence[Row]) -> Arms:
    """Return a run for each rate and seed."""
    del rows
    return {
        norm: _configs(design, norm, sorted(design.learning_rates), design.epochs)
        for norm in TITLES
    }


def long(design: Design, rows: Sequence[Row]) -> Arms:
    """Return longer runs at the rates with the highest training accuracy."""
    if not design.long_rates:
        return {}
    epochs = max(1, round(design.longer * design.epochs))
    return {
        f"{norm}-long": _configs(
            design, norm, best_rates(rows, norm, design.long_rates), epochs
        )
        for norm in TITLES
    }


def _configs(
    design: Design, norm: str, rates: Sequence[float], epochs: int
) -> list[TrainConfig]:
    return [
        design.config(norm=norm, learning_rate=rate, seed=seed, epochs=epochs)
        for rate, seed in itertools.product(rates, range(design.seeds))
    ]


def rates_of(rows: Sequence[Row]) -> list[float]:
    """Return the rates that have runs, in order of size."""
    return sorted({_rate(row) for row in rows})


def best_rates(rows: Sequence[Row], norm: str, count: int) -> list[float]:
    """Return the rates whose mean training accuracy is highest, in order of size."""

    def mean_accuracy(rate: float) -> float:
        runs = [r for r in rows if r["arm"] == norm and _rate(r) == rate]
        return sum(_accuracy(r) for r in runs) / len(runs)

    return sorted(sorted(rates_of(rows), key=mean_accuracy)[-count:])


def _rate(row: Row) -> float:
    rate: float = row["config"]["learning_rate"]
    return rate


def _accuracy(row: Row) -> float:
    """Return the training accuracy at the end; chance, .1, of a run that diverged."""
    accuracy = study.last(row, "train_accuracy")
    return study.guessing("accuracy") if math.isnan(accuracy) else accuracy


def longest(rows: Sequence[Row], norm: str) -> dict[float, dict[int, Row]]:
    """Return the longest run at each rate, by seed."""
    found: dict[float, dict[int, Row]] = {rate: {} for rate in rates_of(rows)}
    for row in rows:  # the longer ones come last
        if row["arm"].removesuffix("-long") == norm:
            found[_rate(row)][row["config"]["seed"]] = row
    return found


def workable(rows: Sequence[Row], norm: str, seed: int, least: float) -> list[float]:
    """Return the rates at which a seed's run learns, in order of size."""
    runs = longest(rows, norm)
    return [rate for rate in runs if _accuracy(runs[rate][seed]) >= least]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    seeds = sorted({row["config"]["seed"] for row in rows})
    found = []
    for least, why in (
        (WORKABLE, "training accuracy of .8, the claim's own bar"),
        (0.5, "training accuracy of .5: it learns, if slowly"),
    ):
        rates = {
            norm: [workable(rows, norm, seed, least) for seed in seeds]
            for norm in TITLES
        }
        # A seed for which no rate works has no largest one; a ratio needs both.
        pairs = [
            (ours[-1], theirs[-1])
            for ours, theirs in zip(rates["batch_norm"], rates["none"], strict=True)
            if ours and theirs
        ]
        unknown = intervals.Interval(math.nan, math.nan, math.nan, 0)
        ratio = unknown
        if pairs:
            ratio = intervals.of_difference(
                [math.log10(ours) for ours, _ in pairs],
                [math.log10(theirs) for _, theirs in pairs],
            )
        found.append(
            decide(
                "with batch norm the largest workable rate is at least 5 times that "
                f"without ({why})",
                "log10 of the ratio of the largest workable rates",
                ratio,
                above=math.log10(5) - 0.01,
                reason="the paper's Inception trains at 5 times its rate with batch "
                "norm and not without; rates are half a decade apart, so a ratio is "
                "known within a factor of 3",
            )
        )
        widths = {
            norm: [math.log10(r[-1] / r[0]) + 0.5 if r else 0.0 for r in rates[norm]]
            for norm in TITLES
        }
        wider = intervals.of_difference(widths["batch_norm"], widths["none"])
        if not any(map(any, widths.values())):  # nothing to compare
            wider = unknown
        found.append(
            decide(
                f"with batch norm the band of workable rates is wider ({why})",
                "difference of the bands' widths, decades",
                wider,
                above=0.5,
                reason="a step of the grid",
            )
        )
    return found


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    runs = {norm: longest(rows, norm) for norm in TITLES}
    seeds = {row["config"]["seed"] for row in rows}
    panels = {
        label: {
            norm: {
                rate: study.mean_and_range([score(row) for row in by_seed.values()])
                for rate, by_seed in runs[norm].items()
            }
            for norm in TITLES
        }
        for label, score in (
            ("training accuracy, last epoch", _accuracy),
            ("test accuracy, own statistics of 500", study.final_test_accuracy),
        )
    }
    epochs = sorted({len(row["loss"]) for row in rows})
    note = (
        f"n = {len(seeds)} seeds; band: least to greatest; "
        f"{' or '.join(map(str, epochs))} epochs; diverged counts as .1"
    )
    plots.by_choice(
        panels, TITLES, "learning rate", note, folder / "learning_rates.png"
    )
    lines = {
        f"{norm}{suffix}": f"{title}, {what}"
        for norm, title in TITLES.items()
        for suffix, what in (("", "training"), (" test", "test, moving averages"))
    }
    curves = {
        f"rate {rate:g}": {
            f"{norm}{suffix}": [
                _padded(row[name], epochs[-1]) for row in runs[norm][rate].values()
            ]
            for norm in TITLES
            for suffix, name in (("", "train_accuracy"), (" test", "test_accuracy"))
        }
        for rate in rates_of(rows)
    }
    plots.small_multiples(
        curves,
        lines,
        "accuracy",
        f"n = {len(seeds)} seeds; band: least to greatest",
        folder / "curves.png",
    )


def _padded(values: Sequence[float | None], length: int) -> list[float | None]:
    return [*values, *[None] * (length - len(values))]


if __name__ == "__main__":
    study.start(
        study.Study(
            name="learning_rates",
            design=Design,
            stages=(short, long),
            verdicts=verdicts,
            draw=draw,
            exact=False,
            smoke={"learning_rates": (0.1, 1.0, 10.0), "long_rates": 1},
        )
    )
