r"""Why does a large learning rate work with batch norm?

The chapter says that batch norm allows larger rates, not why. The output of a norm does
not change when the weights $w$ before it are scaled, so (with epsilon 0) their gradient
$g$ is orthogonal to them and in inverse proportion to their norm. Steps of plain SGD at
rate $\eta$ then only lengthen them,

$$|w_{t+1}|^2 = |w_t|^2 + \eta^2 |g_t|^2,$$

and what a step turns them by, $\eta / |w|^2$ times the gradient at norm 1, shrinks
until it fits: a rate that is too large makes itself smaller. This follows the weights
before a norm in LeNet, at three rates, and the same weights without norm.

  python -m experiments.scale_invariance --workdir=runs/scale                5 minutes
  python -m experiments.scale_invariance --workdir=runs/scale-try --smoke

At the largest rate a further arm brings the weights back to their first norm after
every step: if it is by growing that they make a large rate fit, it must train worse.
Figures, by step: norms.png, squared norms of the weights; cosines.png, |cosine| of
weights and gradient; effective_rates.png, the rate by the squared norm.

What would refute it: gradients that are not orthogonal with batch norm; norms that grow
by another formula; or weights that are held and train as well.

What came out (5 seeds, 3 epochs; all of it in experiments/README.md): the mean |cosine|
of weights and gradient is 3e-6 with batch norm and .43 without, of the layer where it
is largest; norms grow by the formula to 3 parts in 10,000, and without norm 13 times
otherwise; of rates 100 times apart the effective ones end 2.8 times apart. With weights
held at their norm, rate 10 trains to half an accuracy less.

References: van Laarhoven, 2017, "L2 regularization versus batch and weight
normalization", arXiv:1706.05350; Arora, Li and Lyu, 2019, "Theoretical analysis of auto
rate-tuning by batch normalization", arXiv:1812.03981.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.claims import Claim
from experiments.estimate import mean, paired
from experiments.figures import Figure, figure
from experiments.measurements import weight_scores, weights
from experiments.scores import Row

NORMS = {"batch_norm": "batch norm", "none": "no batch norm"}


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
        **{norm: [{"norm": norm, "learning_rate": r} for r in rates] for norm in NORMS},
        weights.HELD: [{"learning_rate": max(rates)}],
    }


COSINE = "mean over steps of |cosine| at rate 1.0, of the layer where it is largest"
CLAIMS = (
    Claim(
        "with batch norm, weights and their gradient are orthogonal",
        COSINE,
        key="cosine",
        value=mean(weight_scores.largest_cosine, ("batch_norm", 1.0)),
        below=0.01,
        reason="0 for epsilon 0; random directions of the smallest layer, 150 weights, "
        "have .065",
    ),
    Claim(
        "without, they are not",
        COSINE,
        key="cosine_without",
        value=mean(weight_scores.largest_cosine, ("none", 1.0)),
        above=0.01,
        reason="the same threshold",
    ),
    Claim(
        "squared norms grow by the rate squared times the sum of squared gradients",
        "relative difference at rate 1.0, of the layer where it is largest",
        key="growth",
        value=mean(weight_scores.growth_error, ("batch_norm", 1.0)),
        below=0.05,
        reason="exact for epsilon 0; a twentieth allows for epsilon",
    ),
    Claim(
        "of rates 100 times apart, the effective ones end less than 10 times apart",
        "log10 of the ratio of effective rates, of rates 10 and .1",
        key="effective",
        value=paired(
            weight_scores.log_effective_rate, ("batch_norm", 10.0), ("batch_norm", 0.1)
        ),
        below=1.0,
        reason="half of the two decades between the rates",
    ),
    Claim(
        "without norm, they do not grow by that formula",
        "relative difference at rate 1.0, of the layer where it is largest",
        value=mean(weight_scores.growth_error, ("none", 1.0)),
        above=0.05,
        reason="the bound of the claim with batch norm",
    ),
    Claim(
        "it is by growing that weights make rate 10 workable: held at their norm, they "
        "train worse",
        "paired difference of the training accuracy, mean over the last 100 steps",
        key="held",
        value=paired(
            weight_scores.final_accuracy, (weights.HELD, 10.0), ("batch_norm", 10.0)
        ),
        below=-0.05,
        reason="5 points, several times what seeds differ by",
    ),
)


def lines(
    value: Callable[[Row, int], float], y_label: str, finding: str, alt: str
) -> Figure:
    return figure(
        "growth",
        lambda runs: weight_scores.by_step(runs, value, NORMS),
        "n = {n} seeds; mean, and band from least to greatest",
        y_label=y_label,
        share_y=True,
        finding=finding,
        alt=alt,
    )


STUDY = study.Study(
    name="scale_invariance",
    place=4,
    design=Design,
    arms=arms,
    measure=weights.follow,
    choice=lambda row: (row["arm"], row["learning_rate"]),
    claims=CLAIMS,
    figures={
        "norms.png": lines(
            weight_scores.squared_norm,
            "squared norm of the four weights",
            "With batch norm the weights grow with the rate, by the formula to a "
            "share of {growth}.",
            "Squared norm of the weights by step, on logarithmic axes, with batch "
            "norm, without, and held at its start, a line for each rate.",
        ),
        "cosines.png": lines(
            weight_scores.abs_cosine,
            "|cosine|, mean over layers",
            "Weights and gradient are orthogonal with batch norm, {cosine}, and are "
            "not without: over all steps, the largest of a layer's is "
            "{cosine_without}.",
            "Absolute cosine of weights and gradient by step, mean over layers: "
            "from 1e-7 to 1e-4 with batch norm, from .01 to .3 without.",
        ),
        "effective_rates.png": lines(
            weight_scores.effective_rate,
            "rate / |w|², geometric mean of layers",
            "Rates that are two decades apart end {effective} decades apart in what "
            "they do; with weights held at their norm, nothing shrinks rate 10.",
            "Effective rate by step, a line for each of three rates: with batch norm "
            "that of rate 10 comes down to the others; with weights held at their norm "
            "it does not.",
        ),
    },
)

if __name__ == "__main__":
    study.start(STUDY)
