r"""What does only removing the mean, or only dividing by the deviation, do?

An exercise of the chapter's newer edition: batch norm does both; is one of the two
enough? This trains LeNet with batch norm, with `center`, which only subtracts the mean
of the batch, and with `scale`, which only divides by its deviation.

  python -m experiments.center_scale --workdir=runs/center_scale --devices=2  5 minutes
  python -m experiments.center_scale --workdir=runs/center_scale-try --smoke

The rate is the chapter's, 1.0, for all. The outputs of sigmoids have a mean of about
one half, so that the inputs of the next layer have means that are large beside their
deviations: `center` removes the former and leaves the latter small; `scale` enlarges
both, and may drive the sigmoids into saturation. The claims were written before the
first run, and are not recorded yet.

Figure: center_scale.png, loss and test accuracy by arm.
"""

from __future__ import annotations

from experiments import scores, study
from experiments.claims import LOSS_DIFFERENCE, THE_SIGN, Claim
from experiments.estimate import paired
from experiments.figures import figure, spreads

TITLES = {
    "batch_norm": "batch norm",
    "center": "mean removed only",
    "scale": "divided by the deviation only",
    "none": "no norm",
}
ALONE = {"center": "removing the mean", "scale": "dividing by the deviation"}
CLAIMS = (
    *(
        Claim(
            f"{what} alone is not enough: it trains to a higher loss than batch norm",
            LOSS_DIFFERENCE,
            value=paired(scores.loss, arm, "batch_norm"),
            above=0.0,
            reason=THE_SIGN,
        )
        for arm, what in ALONE.items()
    ),
    *(
        Claim(
            f"{what} alone helps: it trains to a lower loss than no norm",
            LOSS_DIFFERENCE,
            value=paired(scores.loss, arm, "none"),
            below=0.0,
            reason=THE_SIGN,
        )
        for arm, what in ALONE.items()
    ),
)

STUDY = study.Study(
    name="center_scale",
    place=10,
    design=study.design(epochs=3, learning_rate=1.0),
    arms={arm: [{"norm": arm}] for arm in TITLES},
    claims=CLAIMS,
    figures={
        "center_scale.png": figure(
            "estimates",
            spreads(
                {
                    "training loss, nats": scores.loss,
                    "test accuracy, its batch of 500": scores.test_accuracy,
                },
                {title: arm for arm, title in TITLES.items()},
            ),
            "n = {n} seeds; line: least to greatest",
        )
    },
)

if __name__ == "__main__":
    study.start(STUDY)
