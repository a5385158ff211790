r"""What does only removing the mean, or only dividing by the deviation, do?

An exercise of the chapter's newer edition: batch norm does both; is one of the two
enough? This trains LeNet with batch norm, with `center`, which only subtracts the mean
of the batch, with `scale`, which only divides by its deviation, and beside them with
what needs no statistics at all: dynamic tanh and dynamic erf.

  python -m experiments.center_scale --workdir=runs/center_scale --devices=2    an hour
  python -m experiments.center_scale --workdir=runs/center_scale-try --smoke

Each arm is trained at the rate, of six, at which its validation accuracy (by exact
statistics, where a norm has them) is highest on seeds of their own, so that none loses
by a rate that was made for another, and for the chapter's ten epochs. The outputs of
sigmoids have a mean of about one half, so that the inputs of the next layer have means
that are large beside their deviations: `center` removes the former and leaves the
latter small; `scale` enlarges both, and may drive the sigmoids into saturation.

What would refute it: a half that trains to a loss as low as both; or one that trains no
better than no norm. Figure: center_scale.png, loss and test accuracy by arm.

What came out (5 to 20 seeds; all of it in experiments/README.md): at a rate of 3,
removing the mean trains to batch norm's loss within .009 nats, .21 below no norm;
whether a difference is left is not decided at 20 seeds. It predicts as well but for
.002, .890 by the statistics of batches of 500 to .892 by exact ones, and by moving
averages better, .877 to .868. Dividing by the deviation alone ends .05 above no norm:
at a rate of .1 one network in five stays at chance, at larger ones all do, and at .03,
the least of the six, which it is judged at, all learn slowly. Dynamic tanh and erf,
which were made for transformers, leave these sigmoids at chance at all six rates. In an
earlier record, of 3 epochs at four rates up to 3, chosen by moving averages, the mean
alone ended .05 above batch norm, which was supported; batch norm and the mean alone
were at the edge of the rates then, and are not now.

References: Zhu et al., 2025, "Transformers without normalization", arXiv:2503.10622;
Chen et al., 2025, "Stronger normalization-free transformers", arXiv:2512.10938.
"""

from __future__ import annotations

from experiments import scores, sequential, study
from experiments.claims import LOSS_DIFFERENCE, THE_SIGN, Claim
from experiments.estimate import paired
from experiments.figures import SPREAD, figure, spreads, with_rates

TITLES = {
    "batch_norm": "batch norm",
    "center": "mean removed only",
    "scale": "divided by the deviation only",
    "dyt": "dynamic tanh",
    "derf": "dynamic erf",
    "none": "no norm",
}
ALONE = {
    "center": "removing the mean",
    "scale": "dividing by the deviation",
    "dyt": "dynamic tanh",
    "derf": "dynamic erf",
}
EACH = f"{LOSS_DIFFERENCE}, each at its best rate"
CLAIMS = (
    *(
        Claim(
            f"{what} alone is not enough: it trains to a higher loss than batch norm",
            EACH,
            key=f"{arm}_norm",
            value=paired(scores.loss, arm, "batch_norm"),
            above=0.0,
            reason=THE_SIGN,
        )
        for arm, what in ALONE.items()
    ),
    *(
        Claim(
            f"{what} alone helps: it trains to a lower loss than no norm",
            EACH,
            key=f"{arm}_none",
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
    design=study.design(epochs=10),
    arms={arm: [{"norm": arm}] for arm in TITLES},
    rates=dict.fromkeys(TITLES, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    looks=sequential.AFTER_CHOOSING,
    claims=CLAIMS,
    figures={
        "center_scale.png": figure(
            "estimates",
            spreads(
                {
                    "training loss, nats": scores.loss,
                    "test accuracy, exact statistics": scores.test_accuracy,
                },
                with_rates(TITLES),
            ),
            SPREAD,
            finding="To batch norm's loss, removing the mean alone is {center_norm} "
            "nats, dividing by the deviation alone {scale_norm}.",
            alt="Training loss and test accuracy of batch norm, its two halves, "
            "dynamic tanh and erf, and no norm, each at its best rate.",
        )
    },
)

if __name__ == "__main__":
    study.start(STUDY)
