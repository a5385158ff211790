r"""What do gamma and beta do, when they are fixed, and when nothing else learns?

The chapter's fifth exercise asks to fix them and to look. The chapter has them learned,
to give back the freedom that standardising takes away. This trains LeNet, with
sigmoids and with ReLUs, with gamma fixed at 1, with beta fixed at 0, with both fixed
and with neither. Then it freezes all other parameters at their initial values: gamma
and beta alone learn, or these and the last layer, or as many other parameters chosen at
random.

  python -m experiments.frozen --workdir=runs/frozen --devices=2             40 minutes
  python -m experiments.frozen --workdir=runs/frozen-try --smoke              a minute

Frankle et al. find that gamma and beta alone learn more than an equal number of other
parameters, two of each channel, and that they do so by switching off a third of the
features. Their ResNets train for 160 epochs from gammas drawn from [0, 1). So two arms
here start from such gammas, and one of them trains five times as long. The two arms
that are compared, gamma and beta alone and the others, each train at the best of four
rates by validation accuracy, on seeds apart from those that judge.

Losses are means over the last epoch as it was trained; a run that diverged has that of
guessing, ln 10. Test accuracy is by exact statistics. Claims on the share of gammas
near 0 count half a gamma more that is and half that is not, so that a share of 0 has
odds; figures show the share itself. Figures: sigmoid.png and relu.png, loss, accuracy
and gammas by arm; changes.png, what fixing changes in the loss.

What would refute it: a network that trains as well with both fixed; others that learn
as much as gamma and beta; hardly any gamma near 0.

What came out (5 to 10 seeds, 4 epochs; all of it in experiments/README.md): with
sigmoids fixing both costs .082 nats, with ReLUs .006 and no accuracy. Gamma and beta
alone reach a test accuracy of .71 and .76, as many others a channel .56 and .72. They
switch hardly any feature off, even from drawn gammas and in 20 epochs: 1% and 3%. With
the last layer they reach .80 and .77. All four arms train best at the largest of the
rates, 3; whether larger ones would serve them better is not known.

Reference: Frankle, Schwab and Morcos, 2020, "Training BatchNorm and only BatchNorm",
arXiv:2003.00152.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bn_jax.data import ImageData
from experiments import scores, sequential, study
from experiments.claims import LOSS_DIFFERENCE, THE_SIGN, TWO_DEVIATIONS, Claim
from experiments.estimate import mean, paired
from experiments.figures import Figure, figure, spreads, with_rates
from experiments.intervals import LOGIT
from experiments.scores import Row

# The chapter's with sigmoids, and with ReLUs as in its later chapters.
RATES = {"sigmoid": 1.0, "relu": 0.1}
TRIED = (0.1, 0.3, 1.0, 3.0)
NORMS = ("norm1", "norm2", "norm3", "norm4")
GAMMAS = 226  # of LeNet's four norms
SMALL = 0.01  # of a gamma, as Frankle et al. count the features that are off
DRAWN = {"model": "gamma=uniform", "trained": "norms"}
# By arm, what learns, by title: fields of the config, with options of the model.
LEARNING: dict[str, dict[str, study.Fields]] = {
    "all": {
        "all": {"trained": "all"},
        "all but beta": {"trained": "all:beta=false"},
        "all but gamma": {"trained": "all:gamma=false"},
        "all but both": {"trained": "all:gamma=false,beta=false"},
    },
    "norm_and_last": {
        "gamma, beta and the last layer": {"trained": "norms:also=dense3"}
    },
    "norm": {"gamma and beta alone": {"trained": "norms"}},
    "random": {"as many others a channel": {"trained": "random:per_channel=true"}},
    "drawn": {"gamma and beta, gamma drawn": DRAWN},
    "drawn_long": {"the same, five times as long": {**DRAWN, "longer": 5}},
}
FREE, NEITHER = "all", "all but both"
NORM, RANDOM = "gamma and beta alone", "as many others a channel"
DRAWN_LONG = "the same, five times as long"
TITLES = [title for of_arm in LEARNING.values() for title in of_arm]


def arms(design: study.Design) -> study.Arms:
    """Return the arms: one for each activation and each set of trained parameters."""

    def fields(activation: str, of: study.Fields) -> study.Fields:
        options = [f"activation={activation}", *filter(None, [of.get("model")])]
        return {
            "model": f"lenet:{','.join(options)}",
            "learning_rate": RATES[activation],
            "trained": of["trained"],
            "epochs": design.epochs * of.get("longer", 1),
        }

    return {
        f"{activation}-{kind}": [fields(activation, of) for of in titled.values()]
        for activation in RATES
        for kind, titled in LEARNING.items()
    }


def choice_of(row: Row) -> tuple[str, str]:
    """Return the activation of a run, and a title of what learned."""
    activation, _, kind = row["arm"].partition("-")
    trained = row["config"]["trained"]
    titled = LEARNING[kind].items()
    return activation, next(t for t, of in titled if of["trained"] == trained)


def small_gammas(row: Row, variables: Any, data: ImageData) -> Row:
    """Return the share of gammas near 0, over all norms."""
    del row, data
    gammas = np.concatenate([variables["params"][norm]["scale"] for norm in NORMS])
    return {"small_gammas": float((np.abs(gammas) < SMALL).mean())}


share_off = scores.final("small_gammas")


def odds_off(row: Row) -> float:
    """Return the share of gammas near 0, counting half a one more of either kind.

    So counted a share of 0 has odds, too, which claims are on. Figures show the share.
    """
    return (share_off(row) * GAMMAS + 0.5) / (GAMMAS + 1)


def claims_on(activation: str) -> tuple[Claim, ...]:
    norm, others = (activation, NORM), (activation, RANDOM)
    return (
        Claim(
            f"{activation}: fixing gamma and beta costs: the training loss is higher",
            LOSS_DIFFERENCE,
            key=f"{activation}_fixing",
            value=paired(scores.loss, (activation, NEITHER), (activation, FREE)),
            above=0.01,
            reason=TWO_DEVIATIONS,
        ),
        Claim(
            f"{activation}: gamma and beta alone learn more than as many other "
            "parameters of each channel, each at its best rate",
            "paired difference of the test accuracy, exact statistics",
            key=f"{activation}_alone",
            value=paired(scores.test_accuracy, norm, others),
            above=0.0,
            reason=f"{THE_SIGN}, as Frankle et al. found in ResNets",
        ),
        *(
            Claim(
                f"{activation}: trained alone, gammas switch features off{words}",
                f"share of gammas below {SMALL} in absolute value, over the four norms",
                key=f"{activation}_{key}",
                value=mean(odds_off, (activation, title), scale=LOGIT),
                above=0.1,
                reason="a tenth of the features; Frankle et al. found about a third in "
                "ResNets, after many more steps",
            )
            for title, key, words in (
                (NORM, "off", ""),
                (DRAWN_LONG, "off_long", ", from gammas drawn from [0, 1), in the end"),
            )
        ),
    )


def scores_with(activation: str) -> Figure:
    return figure(
        "estimates",
        spreads(
            {
                "training loss, nats": scores.loss,
                "test accuracy, exact statistics": scores.test_accuracy,
                f"share of |gamma| < {SMALL}": share_off,
            },
            with_rates(
                {(activation, title): title for title in TITLES},
                tuned=[(activation, title) for title in (NORM, RANDOM)],
            ),
        ),
        f"what learns; {activation}, rate {RATES[activation]:g} but where said; n = "
        "{n} seeds; line: least to greatest",
        finding=f"Fixing both changes the loss by {{{activation}_fixing}} nats; alone "
        f"they reach {{{activation}_alone}} more accuracy than as many others.",
        alt=f"Loss, accuracy and share of small gammas by what learns, {activation}.",
        of=lambda choice: choice[0] == activation,
    )


STUDY = study.Study(
    name="frozen",
    place=7,
    looks=sequential.AFTER_CHOOSING,
    rates={f"{a}-{kind}": TRIED for a in RATES for kind in ("norm", "random")},
    design=study.design(epochs=4),
    arms=arms,
    choice=choice_of,
    claims=[claim for activation in RATES for claim in claims_on(activation)],
    figures={
        "sigmoid.png": scores_with("sigmoid"),
        "relu.png": scores_with("relu"),
        "changes.png": figure(
            "estimates",
            {
                f"change of the loss, nats, {activation}": {
                    title: paired(scores.loss, (activation, title), (activation, FREE))
                    for title in TITLES
                    if title.startswith("all but")
                }
                for activation in RATES
            },
            "what learns, to all; paired by seed; line: 95% interval",
            reference=0.0,
            finding="Fixing both costs {sigmoid_fixing} nats with sigmoids and "
            "{relu_fixing} with ReLUs.",
            alt="What fixing beta, gamma or both changes in the loss, with sigmoids "
            "and with ReLUs.",
        ),
    },
    probe=small_gammas,
    smoke={"arms": ("sigmoid-all", "sigmoid-norm", "sigmoid-random")},
)

if __name__ == "__main__":
    study.start(STUDY)
