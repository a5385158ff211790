r"""Can batch norm take the place of dropout, and what changes?

The chapter's fourth exercise; the text counts batch norm's noise among the reasons why
it regularises, as dropout does. This trains LeNet without either, with dropout of three
rates, with batch norm, and with both: dropout after both hidden dense layers, the first
of which a norm follows, or after the last norm alone; on all images and on 3,000, with
as many steps.

  python -m experiments.dropout --workdir=runs/dropout --devices=2           20 minutes
  python -m experiments.dropout --workdir=runs/dropout-try --smoke            a minute

Dropout at rate p scales what it leaves by 1 / (1 - p). That keeps the mean of a unit
$x$, but takes its second moment to $E[x^2] / (1 - p)$: in training, the variance of
$w x$ is larger by $\sum_i w_i^2 E[x_i^2] p / (1 - p)$ than in prediction. A norm that
follows keeps a moving variance of the former and predicts with the latter; their ratio
is Li's (Li et al., 2018, arXiv:1801.05134), here the median over the features of the
last norm.

Scores are of the networks at the end without dropout, on training and test set, by
exact statistics. Figures: dropout_all.png and dropout_few.png, loss, accuracies and
their gap by arm; curves_all.png and curves_few.png; variance_ratio.png.

What came out (5 seeds; all of it in experiments/README.md): without norm, dropout only
slows these sigmoids: after 5 epochs the test accuracy is .73 without it, .68 at rate
.1, and at .5 no network has begun to learn. Batch norm, at .87, needs none. On 3,000
images it fits them (.98, and .84 on the test set: the gap is larger than without norm,
not smaller, as those networks fit nothing); dropout after the last norm narrows the gap
by a fifth and predicts as well. Dropout before a norm makes its moving variance 1.20
times the exact one, and costs 1.3 points by moving averages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Arms, Row

if TYPE_CHECKING:
    from experiments.claims import Verdict

KINDS = ("none", "dropout", "batch_norm", "norm_dropout_before", "norm_dropout_after")
SIZES = ("all", "few")
# Of --smoke: the embedded sample has 6,000.
FEW_OF_SAMPLE = 600


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Rates of dropout, with and without norm, on all images and on few."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 5)
    seeds: int = fields.option_of(study.Design, "seeds", 5)
    learning_rate: float = fields.option_of(TrainConfig, "learning_rate")
    arms: tuple[str, ...] = fields.option(
        KINDS,
        "Neither dropout nor norm; dropout alone; batch norm alone; batch norm with "
        "dropout before a norm, or after the last.",
        choices=KINDS,
    )
    dropout_rates: tuple[float, ...] = fields.option(
        (0.1, 0.3, 0.5),
        "Without norm; one claim is on .5.",
        valid=fields.BELOW_1,
    )
    dropout_rate_with_norm: float = fields.option(
        0.5, "Before a norm, and after the last.", valid=fields.BELOW_1
    )
    sizes: tuple[str, ...] = fields.option(
        SIZES, "Train on all images, on few, or on both.", choices=SIZES
    )
    few_examples: int = fields.option(
        3_000, "How many are few.", valid=fields.AT_LEAST_1
    )
    longer: int = fields.option(
        20,
        "Epochs on few images for one on all; 20 for about as many steps. Without norm "
        "LeNet spends the first hundreds of them at the loss of guessing; after 8 "
        "epochs it is hardly off it.",
        valid=fields.AT_LEAST_1,
    )


def choices(design: Design) -> dict[str, dict[str, Any]]:
    """Return what each arm has."""
    with_norm = {"dropout_rate": design.dropout_rate_with_norm}
    of_kind: dict[str, dict[str, dict[str, Any]]] = {
        "none": {"none": {"norm": "none"}},
        "dropout": {
            f"dropout_{100 * rate:g}": {"norm": "none", "dropout_rate": rate}
            for rate in sorted(design.dropout_rates)
        },
        "batch_norm": {"batch_norm": {}},
        "norm_dropout_before": {
            "norm_dropout_before": {**with_norm, "dropout_at": "dense"}
        },
        "norm_dropout_after": {
            "norm_dropout_after": {**with_norm, "dropout_at": "last"}
        },
    }
    return {
        arm: of_arm
        for kind, of_arms in of_kind.items()
        if kind in design.arms
        for arm, of_arm in of_arms.items()
    }


def arms(design: Design, rows: Sequence[Row]) -> Arms:
    """Return a run for each arm and seed, on all images and on few."""
    del rows
    sizes = {
        "all": {},
        "few": {
            "train_examples": design.few_examples,
            "epochs": design.longer * design.epochs,
        },
    }
    return {
        f"{size}-{arm}": [
            design.config(seed=seed, **sizes[size], **of_arm)
            for seed in range(design.seeds)
        ]
        for size in design.sizes
        for arm, of_arm in choices(design).items()
    }


def _dropout(row: Row) -> str:
    return f"dropout {row['config']['dropout_rate']:g}".replace(" 0.", " .")


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """Return a title of each arm that has runs, whatever the number of images."""
    found = {}
    for row in rows:
        _, _, arm = row["arm"].partition("-")
        found[arm] = {
            "none": "neither",
            "batch_norm": "batch norm",
            "norm_dropout_before": f"batch norm, {_dropout(row)} before a norm",
            "norm_dropout_after": f"batch norm, {_dropout(row)} after the last",
        }.get(arm, _dropout(row))
    return found


def scores(row: Row) -> dict[str, float]:
    """Return a run's scores at the end, without dropout; of guessing if it diverged.

    Returns:
      Loss and accuracies by exact statistics; `gap`, by how much the training accuracy
      is above that of the test; and `test_accuracy_average`, by moving averages.
    """
    kind = "exact" if "train_loss_exact" in row else "average"
    loss, train = row[f"train_loss_{kind}"], row[f"train_accuracy_{kind}"]
    average = study.last(row, "test_accuracy")
    if loss is None:
        loss = study.guessing("loss")
        train = average = study.guessing("accuracy")
    test = study.final_test_accuracy(row)
    return {
        "train_loss": loss,
        "train_accuracy": train,
        "test_accuracy": test,
        "gap": train - test,
        "test_accuracy_average": average,
    }


def log_ratios(rows: Sequence[Row], arm: str) -> list[float]:
    """Return |log| of the last norm's moving variance to the exact one, by seed."""
    return [
        abs(math.log(row["norm4_variance_ratio"])) for row in study.runs_of(rows, arm)
    ]


def _scores(rows: Sequence[Row], arm: str, name: str) -> list[float]:
    return [scores(row)[name] for row in study.runs_of(rows, arm)]


def summary(rows: Sequence[Row]) -> Row:
    """Return the epoch in which each run's training accuracy reached .85, by arm.

    It is that of the steps as they were taken, with dropout; None was not reached.
    """
    reached = {
        arm: [
            next(
                (i for i, a in enumerate(row["train_accuracy"], 1) if a and a >= 0.85),
                None,
            )
            for row in study.runs_of(rows, arm)
        ]
        for arm in study.arms_of(rows)
    }
    return {"first_epoch_at_85": reached}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    def change(name: str, size: str, arm: str, other: str) -> intervals.Interval:
        return intervals.of_difference(
            *(_scores(rows, f"{size}-{a}", name) for a in (arm, other))
        )

    def replaces_dropout(size: str) -> Verdict:
        best = max(
            dropouts,
            key=lambda arm: sum(_scores(rows, f"{size}-{arm}", "test_accuracy")),
        )
        return decide(
            f"batch norm can take the place of dropout, {size} images: it predicts "
            f"better than dropout without norm (the best is {names[best]})",
            "paired difference of the test accuracy, exact statistics",
            change("test_accuracy", size, "batch_norm", best),
            above=0.0,
            reason="the sign is the claim; the best rate is chosen on the same "
            "runs, which favours dropout",
        )

    names = titles(rows)
    dropouts = [arm for arm in names if arm.startswith("dropout")] or ["dropout"]

    def on(size: str, *arms: str) -> list[str]:
        return [f"{size}-{arm}" for arm in arms]

    claims = [
        study.Claim(
            on("all", "none", "dropout_50"),
            lambda: decide(
                "dropout of .5 slows training without norm: after as many steps the "
                "loss is higher",
                "paired difference of the training loss, nats, all images, "
                "re-evaluated",
                change("train_loss", "all", "dropout_50", "none"),
                above=0.0,
                reason="the sign is the claim; both losses are measured without "
                "dropout",
            ),
        ),
        *(
            study.Claim(
                on(size, "batch_norm", *dropouts),
                lambda size=size: replaces_dropout(size),
            )
            for size in SIZES
        ),
        study.Claim(
            on("few", "batch_norm", "none"),
            lambda: decide(
                "batch norm regularises: on few images the gap is smaller than with "
                "neither",
                "paired difference of training minus test accuracy, re-evaluated",
                change("gap", "few", "batch_norm", "none"),
                below=0.0,
                reason="the sign is the claim; a network that has not learned has no "
                "gap, so read it beside the accuracies",
            ),
        ),
        study.Claim(
            on("all", "norm_dropout_before", "norm_dropout_after"),
            lambda: decide(
                "dropout before a norm shifts its variance between training and "
                "prediction, dropout after the last does not",
                "paired difference, before minus after, of the absolute log of moving "
                "by exact variance, last norm, all images",
                intervals.of_difference(
                    log_ratios(rows, "all-norm_dropout_before"),
                    log_ratios(rows, "all-norm_dropout_after"),
                ),
                above=0.1,
                reason="a tenth of the variance; for uncorrelated inputs theory says "
                "log 2 or more at rate .5, since E[x^2] is at least the variance. The "
                "moving averages are noisy at rate 1.0 in both",
            ),
        ),
        study.Claim(
            on("all", "norm_dropout_before", "norm_dropout_after"),
            lambda: decide(
                "dropout before a norm hurts prediction by moving averages, to dropout "
                "after the last",
                "paired difference of the test accuracy, moving averages, all images",
                change(
                    "test_accuracy_average",
                    "all",
                    "norm_dropout_before",
                    "norm_dropout_after",
                ),
                below=0.0,
                reason="the sign is the claim",
            ),
        ),
    ]
    return study.judge(study.arms_of(rows), claims)


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    ratios = {}
    for size in SIZES:
        of_size = [row for row in rows if row["arm"].startswith(size)]
        if not of_size:
            continue
        names = titles(of_size)
        runs = {arm: study.runs_of(rows, f"{size}-{arm}") for arm in names}
        config = of_size[0]["config"]
        count = config["train_examples"]
        images = f"{count:,} images" if count else "all images"
        seeds = {row["config"]["seed"] for row in of_size}
        note = f"{images}, {config['epochs']} epochs; n = {len(seeds)} seeds; "
        plots.estimates(
            {
                label: {
                    title: study.mean_and_range(_scores(rows, f"{size}-{arm}", name))
                    for arm, title in names.items()
                }
                for name, label in (
                    ("train_loss", "training loss, nats"),
                    ("test_accuracy", "test accuracy"),
                    ("gap", "training - test accuracy"),
                )
            },
            f"{note}line: least to greatest; without dropout, exact statistics",
            folder / f"dropout_{size}.png",
        )
        _draw_curves(
            runs, f"{note}band: least to greatest", folder / f"curves_{size}.png"
        )
        ratios[f"moving / exact variance, {images}"] = {
            names[arm]: study.mean_and_range(
                [row["norm4_variance_ratio"] for row in of_arm]
            )
            for arm, of_arm in runs.items()
            if "norm4_variance_ratio" in of_arm[0]
        }
    if all(ratios.values()):
        plots.estimates(
            ratios,
            "last norm, median of its features; line: least to greatest of the seeds",
            folder / "variance_ratio.png",
            reference=1.0,
        )


def _draw_curves(runs: dict[str, list[Row]], note: str, path: Path) -> None:
    from bn_jax import plots

    panels: dict[str, dict[str, str]] = {}  # which arm is without norm, and which with
    for arm, of_arm in runs.items():
        title = _dropout(of_arm[0]) if "dropout" in arm else "no dropout"
        if arm == "norm_dropout_after":
            title += " after the last norm"
        panels.setdefault(title, {})[of_arm[0]["config"]["norm"]] = arm
    plots.small_multiples(
        {
            title: {
                f"{norm}{suffix}": [row[name] for row in runs[arm]]
                for norm, arm in by_norm.items()
                for suffix, name in (("", "train_accuracy"), (" test", "test_accuracy"))
            }
            for title, by_norm in panels.items()
        },
        {
            f"{norm}{suffix}": f"{title}, {what}"
            for norm, title in (("none", "without norm"), ("batch_norm", "batch norm"))
            for suffix, what in (
                ("", "training, with its dropout"),
                (" test", "test, moving averages"),
            )
        },
        "accuracy",
        note,
        path,
        columns=3,
    )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="dropout",
            design=Design,
            stages=(arms,),
            verdicts=verdicts,
            draw=draw,
            train=True,
            summary=summary,
            smoke={
                "arms": ("none", "dropout", "batch_norm"),
                "dropout_rates": (0.5,),
                "sizes": ("few",),
                "few_examples": FEW_OF_SAMPLE,
            },
        )
    )
