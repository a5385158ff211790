r"""What do gamma and beta do, when they are fixed, and when nothing else learns?

The chapter's fifth exercise asks to fix them and to look. The chapter has them learned,
to give back the freedom that standardising takes away. This trains LeNet, with sigmoids
and with ReLUs, with both, one or neither of them fixed at 1 and 0; and, the other way
round, with all other parameters frozen as they were initialised: gamma and beta alone
learn, or these and the last layer, or as many other parameters chosen at random.

  python -m experiments.frozen --workdir=runs/frozen --devices=2             10 minutes
  python -m experiments.frozen --workdir=runs/frozen-try --smoke              a minute

Losses are means over the last epoch as it was trained; a run that diverged has that of
guessing, ln 10. Test accuracy is by exact statistics. Figures: sigmoid.png and
relu.png, loss, accuracy and gammas by arm; changes.png, what fixing changes in the
loss.

What came out (3 seeds, 4 epochs; all of it in experiments/README.md): with sigmoids
fixing both costs .081 nats, with ReLUs .006 and no accuracy. Gamma and beta alone reach
a test accuracy of .68 and .67, as many other parameters .66 and .62: whether they learn
more is undecided by three seeds. They switch hardly any feature off. With the last
layer they reach .80 and .78.

Reference: Frankle, Schwab and Morcos, 2020, "Training BatchNorm and only BatchNorm",
arXiv:2003.00152.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bn_jax.data import ImageData
from bn_jax.training.config import value_of
from experiments import scores, sequential, study
from experiments.claims import Claim
from experiments.estimate import magnitude, mean, paired
from experiments.figures import Figure, figure, spreads
from experiments.scores import Row

# The chapter's with sigmoids, and with ReLUs as in its later chapters.
RATES = {"sigmoid": 1.0, "relu": 0.1}
NORMS = ("norm1", "norm2", "norm3", "norm4")
SMALL = 0.01  # of a gamma, as Frankle et al. count the features that are off
# What learns, by arm: the value of --trained, and a title.
LEARNING = {
    "all": {
        "all": "all",
        "all:beta=false": "all but beta",
        "all:gamma=false": "all but gamma",
        "all:gamma=false,beta=false": "all but both",
    },
    "norm_and_last": {"norms:also=dense3": "gamma, beta and the last layer"},
    "norm": {"norms": "gamma and beta alone"},
    "random": {"random": "as many others, at random"},
}
TITLES = {trained: title for of in LEARNING.values() for trained, title in of.items()}
FREE, NEITHER = TITLES["all"], TITLES["all:gamma=false,beta=false"]
NORM, RANDOM = TITLES["norms"], TITLES["random"]


ARMS = {
    f"{activation}-{arm}": [
        {
            "model": f"lenet:activation={activation}",
            "learning_rate": rate,
            "trained": trained,
        }
        for trained in titles
    ]
    for activation, rate in RATES.items()
    for arm, titles in LEARNING.items()
}


def choice_of(row: Row) -> tuple[str, str]:
    """Return the activation of a run, and a title of what learned."""
    config = row["config"]
    return value_of(config, "model.activation"), TITLES[config["trained"]]


def small_gammas(row: Row, variables: Any, data: ImageData) -> Row:
    """Return the share of gammas near 0, over all norms."""
    del row, data
    gammas = np.concatenate([variables["params"][norm]["scale"] for norm in NORMS])
    return {"small_gammas": float((np.abs(gammas) < SMALL).mean())}


def claims_on(activation: str) -> tuple[Claim, ...]:
    fixing = paired(scores.loss, (activation, NEITHER), (activation, FREE))
    return (
        Claim(
            f"{activation}: fixing gamma and beta changes the training loss (it is "
            "{direction})",
            "paired difference of the training loss, nats, counted as {direction}",
            words={
                "direction": lambda runs: (
                    "lower" if fixing(runs).value < 0 else "higher"
                )
            },
            key=f"{activation}_fixing",
            value=magnitude(fixing),
            above=0.01,
            reason="two standard deviations of the published re-runs; the direction is "
            "taken from the same runs, which favours the claim",
        ),
        Claim(
            f"{activation}: gamma and beta alone learn more than as many other "
            "parameters",
            "paired difference of the test accuracy, exact statistics",
            key=f"{activation}_alone",
            value=paired(
                scores.test_accuracy, (activation, NORM), (activation, RANDOM)
            ),
            above=0.0,
            reason="the sign is the claim, as Frankle et al. found in ResNets",
        ),
        Claim(
            f"{activation}: trained alone, gammas switch features off",
            f"share of gammas below {SMALL} in absolute value, over the four norms",
            key=f"{activation}_off",
            value=mean(scores.final("small_gammas"), (activation, NORM)),
            above=0.1,
            reason="a tenth of the features; Frankle et al. found about a third in "
            "ResNets, after many more steps",
        ),
    )


def scores_with(activation: str) -> Figure:
    return figure(
        "estimates",
        spreads(
            {
                "training loss, nats": scores.loss,
                "test accuracy, exact statistics": scores.test_accuracy,
                f"share of |gamma| < {SMALL}": scores.final("small_gammas"),
            },
            {title: (activation, title) for title in TITLES.values()},
        ),
        f"what learns; {activation}, rate {{learning_rate:g}}; n = {{n}} seeds; line: "
        "least to greatest",
        finding=f"Fixing both changes the loss by {{{activation}_fixing}} nats; alone "
        f"they reach {{{activation}_alone}} more accuracy than as many others.",
        alt=f"Loss, accuracy and share of small gammas by what learns, {activation}.",
        of=lambda choice: choice[0] == activation,
    )


STUDY = study.Study(
    name="frozen",
    place=7,
    looks=sequential.once(3),
    design=study.design(epochs=4),
    arms=ARMS,
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
                    for title in TITLES.values()
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
