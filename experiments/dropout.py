r"""Can batch norm take the place of dropout, and what changes?

The chapter's fourth exercise; the text counts batch norm's noise among the reasons why
it regularises, as dropout does. This trains LeNet with ReLUs without either, with
dropout of three rates, with batch norm, and with both: dropout after both hidden dense
layers, the first of which a norm follows, or after the last norm alone; on all images
and on 3,000, with half as many steps. ReLUs, since the chapter's sigmoids hardly begin
to learn without norm in as many steps, and an opponent should.

  python -m experiments.dropout --workdir=runs/dropout --devices=2           40 minutes
  python -m experiments.dropout --workdir=runs/dropout-try --smoke            a minute

Each arm is trained at the rate, of three, at which its validation accuracy is highest
on seeds of their own, by which the rate of dropout is chosen, too. Whether batch norm
regularises is judged at equal training loss: a network that has learned less overfits
less. Of each seed, both networks are looked at in the epoch in which their training
loss first reached what both have reached in the end, and their test accuracies are
means over that epoch and the two beside it on either side.

Dropout at rate p scales what it leaves by 1 / (1 - p). That keeps the mean of a unit
$x$, but takes its second moment to $E[x^2] / (1 - p)$: in training, the variance of
$w x$ is larger by $\sum_i w_i^2 E[x_i^2] p / (1 - p)$ than in prediction. A norm that
follows keeps a moving variance of the former and predicts with the latter; their ratio
is Li's (Li et al., 2018, arXiv:1801.05134), here the median over the features of the
last norm.

Scores are of the networks at the end without dropout, on training and test set, by
exact statistics. Figures: dropout_all.png and dropout_few.png, loss, accuracies and
their gap by arm; curves_all.png and curves_few.png; variance_ratio.png.

What would refute the claims: dropout without norm that predicts as well as batch norm,
or no norm that predicts as well at the same training loss; averages that dropout before
a norm does not shift.

What came out (5 to 20 seeds; all of it in experiments/README.md): batch norm classifies
6 points more of the test set than the best dropout without norm, on all images and on
3,000, and there 1.7 points more than neither at the same training loss. Beside batch
norm, dropout after the last norm changes the accuracy by -.2 points, [-.5, .2]: whether
it helps is undecided at 20 seeds, by more than .2 points it does not. Before a norm it
moves the log of the variance by .17 and costs 1.5 points by moving averages. Without
norm, dropout of .5 costs .07 nats in as many steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bn_jax import fields
from bn_jax.training.config import TrainConfig, value_of
from experiments import scores, sequential, study
from experiments.claims import THE_SIGN, Claim
from experiments.estimate import chosen, paired, spread
from experiments.figures import (
    accuracy_curves,
    curves_legend,
    figure,
    spreads,
    with_rates,
)
from experiments.measurements.equal_loss import better_at_equal_loss
from experiments.scores import Row, Runs


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Rates of dropout, with and without norm, on all images and on few."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    dropout_rates: tuple[float, ...] = fields.option(
        (0.1, 0.3, 0.5), "Without norm; one claim is on .5.", valid=fields.BELOW_1
    )
    few_examples: int = fields.option(
        3_000, "How many images are few.", valid=fields.AT_LEAST_1
    )
    longer: int = fields.option(
        10,
        "Epochs on few images for one on all; 10 for half as many steps.",
        valid=fields.AT_LEAST_1,
    )


def arms(design: Design) -> study.Arms:
    """Return each combination of norm and dropout, on all images and on few."""
    epochs = design.longer * design.epochs
    few = {"train_examples": design.few_examples, "epochs": epochs}
    kinds: dict[str, dict[str, Any]] = {
        "none": {"norm": "none", "model": RELU},
        **{
            f"dropout_{100 * p:g}": {
                "norm": "none",
                "model": f"{RELU},dropout_rate={p}",
            }
            for p in sorted(design.dropout_rates)
        },
        "batch_norm": {"model": RELU},
        "norm_dropout_before": {"model": f"{RELU},dropout_rate=0.5"},
        "norm_dropout_after": {"model": f"{RELU},dropout_rate=0.5,dropout_at=last"},
    }
    return {
        f"{size}-{kind}": [{**of_size, **of_kind}]
        for size, of_size in (("all", {}), ("few", few))
        for kind, of_kind in kinds.items()
    }


RELU = "lenet:activation=relu"
RATES = (0.1, 0.3, 1.0)
TITLES = {
    "none": "neither",
    "batch_norm": "batch norm",
    "norm_dropout_before": "batch norm, dropout .5 before a norm",
    "norm_dropout_after": "batch norm, dropout .5 after the last",
}


def dropout_of(row: Row) -> str:
    rate = value_of(row["config"], "model.dropout_rate")
    return f"dropout {rate:g}".replace(" 0.", " .")


def title(row: Row) -> str:
    """Return a title of a run's arm, whatever the number of images."""
    return TITLES.get(row["arm"].partition("-")[2], dropout_of(row))


# By exact statistics where there are any, and without dropout.
train_loss = scores.final("train_loss_exact", "train_loss_average")
train_accuracy = scores.final("train_accuracy_exact", "train_accuracy_average")


def gap(row: Row) -> float:
    return train_accuracy(row) - scores.test_accuracy(row)


def log_ratio(row: Row) -> float:
    """Return |log| of the last norm's moving variance to the exact one."""
    return abs(math.log(row["norm4_variance_ratio"]))


def replaces_dropout(size: str) -> Claim:
    best_dropout = chosen(
        scores.validation_accuracy, lambda arm: arm.startswith(f"{size}-dropout")
    )
    return Claim(
        f"batch norm can take the place of dropout, {size} images: it predicts better "
        "than dropout without norm (the best is {best})",
        "paired difference of the test accuracy, exact statistics",
        words={"best": lambda runs: title(runs.find(best_dropout)[0])},
        key=f"replaces_{size}",
        value=paired(scores.test_accuracy, f"{size}-batch_norm", best_dropout),
        above=0.0,
        reason=THE_SIGN,
    )


BEFORE, AFTER = "all-norm_dropout_before", "all-norm_dropout_after"
CLAIMS = (
    Claim(
        "dropout of .5 slows training without norm: after as many steps the loss is "
        "higher",
        "paired difference of the training loss, nats, all images, re-evaluated",
        value=paired(train_loss, "all-dropout_50", "all-none"),
        above=0.0,
        reason=f"{THE_SIGN}; both losses are measured without dropout",
    ),
    replaces_dropout("all"),
    replaces_dropout("few"),
    Claim(
        "batch norm regularises: on few images it predicts better than neither at the "
        "same training loss",
        "paired difference of the test accuracy, moving averages, where the training "
        "loss is that which both reach",
        key="regularises",
        value=better_at_equal_loss("few-batch_norm", "few-none"),
        above=0.0,
        reason=f"{THE_SIGN}; the moving averages are noisy, which hurts batch norm",
    ),
    Claim(
        "beside batch norm dropout still helps: on few images, after the last norm",
        "paired difference of the test accuracy, exact statistics, to batch norm alone",
        key="beside",
        value=paired(scores.test_accuracy, "few-norm_dropout_after", "few-batch_norm"),
        above=0.0,
        reason=THE_SIGN,
    ),
    Claim(
        "dropout before a norm shifts its variance between training and prediction, "
        "dropout after the last does not",
        "paired difference, before minus after, of the absolute log of moving by exact "
        "variance, last norm, all images",
        key="shift",
        value=paired(log_ratio, BEFORE, AFTER),
        above=0.1,
        reason="a tenth of the variance; for uncorrelated inputs theory says log 2 or "
        "more at rate .5, since E[x^2] is at least the variance. The moving averages "
        "are noisy at rate 1.0 in both",
    ),
    Claim(
        "dropout before a norm hurts prediction by moving averages, to dropout after "
        "the last",
        "paired difference of the test accuracy, moving averages, all images",
        key="before",
        value=paired(scores.moving_test_accuracy, BEFORE, AFTER),
        below=0.0,
        reason=THE_SIGN,
    ),
)


def curves(runs: Runs) -> Any:
    """Return a panel for each dropout, with norm and without."""
    panels: dict[str, dict[str, str]] = {}
    for arm, rows in runs.items():
        panel = dropout_of(rows[0]) if "dropout" in arm else "no dropout"
        panel += " after the last norm" if arm.endswith("after") else ""
        panels.setdefault(panel, {})[rows[0]["config"]["norm"]] = arm
    return {panel: accuracy_curves(by_norm) for panel, by_norm in panels.items()}


def figures_on(size: str, images: str) -> dict[str, Any]:
    note = images + ", {epochs} epochs; n = {n} seeds; "
    return {
        f"dropout_{size}.png": figure(
            "estimates",
            spreads(
                {
                    "training loss, nats": train_loss,
                    "test accuracy": scores.test_accuracy,
                    "training - test accuracy": gap,
                },
                lambda runs: with_rates(
                    {arm: title(rows[0]) for arm, rows in runs.items()}
                )(runs),
            ),
            f"{note}line: least to greatest; without dropout, exact statistics",
            finding="Batch norm predicts better than the best dropout without norm, "
            f"by {{replaces_{size}}}.",
            alt="Loss, test accuracy and gap of each arm: dropout without norm has "
            "high losses, batch norm the lowest.",
            of=lambda arm: arm.startswith(size),
        ),
        f"curves_{size}.png": figure(
            "small_multiples",
            curves,
            f"{note}band: least to greatest",
            of=lambda arm: arm.startswith(size),
            titles=curves_legend(
                {"none": "without norm", "batch_norm": "batch norm"},
                training="training, with its dropout",
            ),
            y_label="accuracy",
            columns=3,
            alt="Accuracy by epoch, a panel for each dropout, with and without norm.",
        ),
    }


def variance_ratios(runs: Runs) -> Any:
    """Return a panel for each number of images, of the arms with norm."""
    panels: dict[str, Any] = {}
    for arm, rows in runs.items():
        if "norm" not in arm:
            continue
        count = rows[0]["config"]["train_examples"]
        images = f"{count:,} images" if count else "all images"
        panel = panels.setdefault(f"moving / exact variance, {images}", {})
        panel[title(rows[0])] = spread(scores.final("norm4_variance_ratio"), arm)
    return panels


def epoch_at_85(row: Row) -> int | None:
    """Return the epoch in which the training accuracy, with dropout, reached .85."""
    accuracies = enumerate(row["train_accuracy"], start=1)
    return next((epoch for epoch, a in accuracies if a and a >= 0.85), None)


STUDY = study.Study(
    name="dropout",
    place=6,
    looks=sequential.AFTER_CHOOSING,
    design=Design,
    arms=arms,
    rates=lambda design: dict.fromkeys(arms(design), RATES),
    claims=CLAIMS,
    score_training=True,
    figures={
        **figures_on("all", "all images"),
        **figures_on("few", "{train_examples:,} images"),
        "variance_ratio.png": figure(
            "estimates",
            variance_ratios,
            "last norm, median of its features; line: least to greatest of the seeds",
            reference=1.0,
            finding="Dropout before a norm moves the log of its variance by {shift} "
            "more than dropout after the last.",
            alt="Moving by exact variance of the last norm: above 1 where dropout "
            "comes before a norm, near 1 elsewhere.",
        ),
    },
    summary=lambda runs: {
        "first_epoch_at_85": {
            arm: [*map(epoch_at_85, rows)] for arm, rows in runs.items()
        }
    },
    smoke={
        "arms": ("few-none", "few-dropout_50", "few-batch_norm"),
        "few_examples": 600,
    },
)

if __name__ == "__main__":
    study.start(STUDY)
