r"""Why does a large learning rate work with batch norm?

The chapter says that batch norm allows larger rates, not why. The output of a norm does
not change when the weights $w$ before it are scaled, so (with epsilon 0) their gradient
$g$ is orthogonal to them and in inverse proportion to their norm. Steps of plain SGD at
rate $\eta$ then only lengthen them,

$$|w_{t+1}|^2 = |w_t|^2 + \eta^2 |g_t|^2,$$

and what a step turns them by, $\eta / |w|^2$ times the gradient at norm 1, shrinks
until it fits: a rate that is too large makes itself smaller. This follows the weights
before a norm in LeNet, at three rates, and the same weights without norm.

  python -m experiments.scale_invariance --workdir=runs/scale                3 minutes
  python -m experiments.scale_invariance --workdir=runs/scale-try --smoke

Figure: scale_invariance.png, norms by step.

What came out (3 seeds, 3 epochs; all of it in experiments/README.md): the mean |cosine|
of weights and gradient is 3e-6 with batch norm and .45 without, of the layer where it
is largest; norms grow by the formula to 3 parts in 10,000; and of rates 100 times
apart the effective ones end 2.7 times apart.

References: van Laarhoven, 2017, "L2 regularization versus batch and weight
normalization", arXiv:1706.05350; Arora, Li and Lyu, 2019, "Theoretical analysis of auto
rate-tuning by batch normalization", arXiv:1812.03981.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import sequential, study
from experiments.claims import Claim
from experiments.estimate import mean, paired, spread
from experiments.figures import figure
from experiments.measurements import weights
from experiments.scores import Row, Runs

TITLES = {"batch_norm": "batch norm", "none": "no batch norm"}


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Rates, with and without norm."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    learning_rates: tuple[float, ...] = fields.option(
        (0.1, 1.0, 10.0),
        "The claims are on 1.0, and on .1 beside 10.",
        valid=fields.POSITIVE,
    )


def arms(design: Design) -> study.Arms:
    rates = design.learning_rates
    return {
        norm: [{"norm": norm, "learning_rate": r} for r in rates] for norm in TITLES
    }


def largest_cosine(row: Row) -> float:
    return max(row["mean_abs_cosine"])


def growth_error(row: Row) -> float:
    """Return the largest relative error of the formula for growth, over layers."""
    pairs = zip(row["growth"], row["sum_of_squared_gradients"], strict=True)
    return max(abs(g / (row["learning_rate"] ** 2 * sq) - 1) for g, sq in pairs)


def effective_rate(row: Row) -> float:
    r"""Return the geometric mean over layers of $\eta / |w|^2$ at the end."""
    logs = [math.log(row["learning_rate"] / w) for w in row["final_squared_norm"]]
    return math.exp(sum(logs) / len(logs))


def log_effective_rate(row: Row) -> float:
    return math.log10(effective_rate(row))


COSINE = "mean over steps of |cosine| at rate 1.0, of the layer where it is largest"
CLAIMS = (
    Claim(
        "with batch norm, weights and their gradient are orthogonal",
        COSINE,
        value=mean(largest_cosine, ("batch_norm", 1.0)),
        below=0.01,
        reason="0 for epsilon 0; random directions of the smallest layer, 150 weights, "
        "have .065",
    ),
    Claim(
        "without, they are not",
        COSINE,
        value=mean(largest_cosine, ("none", 1.0)),
        above=0.01,
        reason="the same threshold",
    ),
    Claim(
        "squared norms grow by the rate squared times the sum of squared gradients",
        "relative difference at rate 1.0, of the layer where it is largest",
        value=mean(growth_error, ("batch_norm", 1.0)),
        below=0.05,
        reason="exact for epsilon 0; a twentieth allows for epsilon",
    ),
    Claim(
        "of rates 100 times apart, the effective ones end less than 10 times apart",
        "log10 of the ratio of effective rates, of rates 10 and .1",
        value=paired(log_effective_rate, ("batch_norm", 10.0), ("batch_norm", 0.1)),
        below=1.0,
        reason="half of the two decades between the rates",
    ),
)


def norms_by_step(runs: Runs) -> Any:
    """Return a panel with and without norm, and a line for each rate."""
    panels: dict[str, Any] = {f"step, {title}": {} for title in TITLES.values()}
    for (norm, rate), rows in sorted(runs.items()):
        shortest = min((row["drawn_steps"] for row in rows), key=len)
        panels[f"step, {TITLES[norm]}"][f"rate {rate:g}"] = {
            1 + step: spread(lambda row, k=k: sum(row["squared_norm"][k]), (norm, rate))
            for k, step in enumerate(shortest)
        }
    return panels


STUDY = study.Study(
    name="scale_invariance",
    place=4,
    looks=sequential.once(3),
    design=Design,
    arms=arms,
    measure=weights.follow,
    choice=lambda row: (row["arm"], row["learning_rate"]),
    claims=CLAIMS,
    figures={
        "scale_invariance.png": figure(
            "growth",
            norms_by_step,
            "n = {n} seeds; mean, and band from least to greatest",
            y_label="squared norm of the four weights",
        )
    },
)

if __name__ == "__main__":
    study.start(STUDY)
