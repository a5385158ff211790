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
times that without, and the band is wider by 3.3 decades. Whether the largest rate is at
least 5 times larger is undecided by three seeds: at rate 3, without, some learn and
some do not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import intervals, scores, sequential, study
from experiments.claims import Claim
from experiments.estimate import spread
from experiments.figures import accuracy_curves, curves_legend, figure
from experiments.intervals import LEVEL
from experiments.scores import Row, Runs

NORMS = {"batch_norm": "batch norm", "none": "no batch norm"}


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


def arms(design: Design) -> study.Arms:
    rates = sorted(design.learning_rates)
    return {norm: [{"norm": norm, "learning_rate": r} for r in rates] for norm in NORMS}


def longer(design: Design, runs: Runs) -> study.Arms:
    """Return longer runs at the rates with the highest training accuracy."""
    epochs = max(1, round(design.longer * design.epochs))
    long_arms = {}
    for norm in NORMS if design.long_rates else ():
        accuracies = {
            rate: sum(map(scores.train_accuracy, rows)) / len(rows)
            for (arm, rate), rows in sorted(runs.items())
            if arm == norm
        }
        best = sorted(accuracies, key=accuracies.__getitem__)[-design.long_rates :]
        long_arms[f"{norm}-long"] = [
            {"norm": norm, "learning_rate": rate, "epochs": epochs}
            for rate in sorted(best)
        ]
    return {arm: choices for arm, choices in long_arms.items() if choices}


def choice_of(row: Row) -> tuple[str, float]:
    return row["arm"], row["config"]["learning_rate"]


def rates_of(runs: Runs) -> list[float]:
    return sorted({rate for _, rate in runs})


def longest(norm: str, rate: float) -> Any:
    """Return a function that finds the longest runs at a rate."""
    long = (f"{norm}-long", rate)
    return lambda runs: long if long in runs else (norm, rate)


def workable(runs: Runs, norm: str, least: float) -> list[list[float]]:
    """Return by seed the rates at which a run reaches an accuracy, in order of size."""
    by_rate = {rate: runs.find(longest(norm, rate)) for rate in rates_of(runs)}
    learns = {
        rate: [scores.train_accuracy(row) >= least for row in rows]
        for rate, rows in by_rate.items()
    }
    return [
        [rate for rate, works in zip(learns, of_seed, strict=True) if works]
        for of_seed in zip(*learns.values(), strict=True)
    ]


def largest_rates(runs: Runs, least: float, level: float = LEVEL) -> intervals.Interval:
    """Return log10 of the largest workable rate with norm to that without, by seed.

    A seed for which no rate works, with norm or without, does not count.
    """
    seeds = zip(*(workable(runs, norm, least) for norm in NORMS), strict=True)
    largest = [(math.log10(a[-1]), math.log10(b[-1])) for a, b in seeds if a and b]
    if not largest:
        return intervals.UNKNOWN
    return intervals.of_difference(*zip(*largest, strict=True), level=level)


def wider_bands(runs: Runs, least: float, level: float = LEVEL) -> intervals.Interval:
    """Return by how many decades the band of workable rates is wider with norm."""
    found = [workable(runs, norm, least) for norm in NORMS]
    if not any(map(any, found)):  # nothing to compare
        return intervals.UNKNOWN
    with_norm, without = (
        [math.log10(rates[-1] / rates[0]) + 0.5 if rates else 0.0 for rates in of_seeds]
        for of_seeds in found
    )
    return intervals.of_difference(with_norm, without, level=level)


def claims_with(least: float, bar: str, key: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            "with batch norm the largest workable rate is at least 5 times that "
            f"without ({bar})",
            "log10 of the ratio of the largest workable rates",
            key=f"ratio_{key}",
            value=lambda runs, level: largest_rates(runs, least, level),
            above=math.log10(5) - 0.01,
            reason="the paper's Inception trains at 5 times its rate with batch norm "
            "and not without; rates are half a decade apart, so a ratio is known "
            "within a factor of 3",
        ),
        Claim(
            f"with batch norm the band of workable rates is wider ({bar})",
            "difference of the bands' widths, decades",
            key=f"width_{key}",
            value=lambda runs, level: wider_bands(runs, least, level),
            above=0.5,
            reason="a step of the grid",
        ),
    )


def lengths(runs: Runs) -> str:
    epochs = sorted({row["config"]["epochs"] for row in runs.rows})
    return " or ".join(map(str, epochs))


STUDY = study.Study(
    name="learning_rates",
    place=3,
    looks=sequential.once(3),
    design=Design,
    arms=arms,
    more_arms=longer,
    choice=choice_of,
    claims=(
        *claims_with(0.8, "training accuracy of .8, the claim's own bar", "80"),
        *claims_with(0.5, "training accuracy of .5: it learns, if slowly", "50"),
    ),
    figures={
        "learning_rates.png": figure(
            "by_choice",
            lambda runs: {
                label: {
                    norm: {r: spread(score, longest(norm, r)) for r in rates_of(runs)}
                    for norm in NORMS
                }
                for label, score in (
                    ("training accuracy, last epoch", scores.train_accuracy),
                    ("test accuracy, own statistics of 500", scores.test_accuracy),
                )
            },
            lambda runs: (
                f"n = {{n}} seeds; band: least to greatest; {lengths(runs)} "
                "epochs; diverged counts as .1"
            ),
            titles=NORMS,
            x_label="learning rate",
            finding="With batch norm rates reach an accuracy of .5 over a band that is "
            "wider by {width_50} decades.",
            alt="Training and test accuracy against the learning rate: a wide plateau "
            "with batch norm, a narrow peak near 1 without.",
        ),
        "curves.png": figure(
            "small_multiples",
            lambda runs: {
                f"rate {rate:g}": accuracy_curves({n: longest(n, rate) for n in NORMS})
                for rate in rates_of(runs)
            },
            "n = {n} seeds; band: least to greatest",
            titles=curves_legend(NORMS),
            y_label="accuracy",
            finding="Without batch norm the largest rates that work do so for some "
            "seeds and not for others.",
            alt="Accuracy by epoch, a panel for each learning rate, with and without "
            "batch norm.",
        ),
    },
    smoke={"learning_rates": (0.1, 1.0, 10.0), "long_rates": 1},
)

if __name__ == "__main__":
    study.start(STUDY)
