r"""Is batch norm needed in every layer?

The chapter's third exercise. LeNet has batch norm after two convolutions and two dense
layers; this trains all 16 subsets of the four.

  python -m experiments.which_layers --workdir=runs/layers --devices=2     30 minutes
  python -m experiments.which_layers --workdir=runs/layers-try --smoke      a minute

A run that diverged counts with the loss of guessing, ln 10. Norms stand in for each
other: what one adds depends on how many there are, so that a mean effect says little.
Which subset is best, of all but the full one and of those of a single norm, is chosen
by the training loss, which the claims are on, on seeds of their own. Figures:
which_layers.png, loss and test accuracy of each subset; by_number.png, loss against the
number of norms; effects.png, what each norm changes with the others on and off.

What would refute it: a norm that takes as much off the loss beside three others as
alone; for the chapter's answer, no subset within .01 nats of all four.

What came out (5 to 20 seeds; all of it in experiments/README.md): not every layer needs
one, as without that of the second convolution the loss is .006 nats higher. In order of
the loss, all four < dense layers alone < convolutions alone < none. One norm, after the
second dense layer, takes .89 of what all four take off the loss, and a norm takes .21
nats more off alone than beside the others. Subsets were at first chosen by the
validation loss, which is by moving averages: at rate 1 these are so far off after dense
layers that it chose the single norm of least use, and with it other verdicts.
"""

from __future__ import annotations

import itertools
import math

from bn_jax.training.config import value_of
from experiments import scores, sequential, study
from experiments.claims import LOSS_DIFFERENCE, Claim
from experiments.estimate import (
    Statistic,
    chosen,
    mean,
    mean_effect,
    of_seeds,
    paired,
    spread,
)
from experiments.figures import SPREAD, figure, spreads
from experiments.scores import Row, Runs

ARMS = {
    "subsets": [
        {"model": f"lenet:norm_layers={''.join(digits)}"}
        for digits in itertools.product("01", repeat=4)
    ]
}
LAYERS = ("conv 1", "conv 2", "dense 1", "dense 2")
SUBSETS = tuple("".join(digits) for digits in itertools.product("01", repeat=4))
# In the order of their losses in a reader's single runs of ten epochs.
NAMES = {
    "1111": "in all four layers",
    "0011": "after the dense layers alone",
    "1100": "after the convolutions alone",
    "0000": "in none",
}
KEYS = {"0011": "dense", "1100": "convolutions", "0000": "none"}


def subset_of(row: Row) -> str:
    subset: str = value_of(row["config"], "model.norm_layers")
    return subset


best_but_all = chosen(scores.loss, lambda subset: subset != "1111", lowest=True)
SINGLES = tuple(subset for subset in SUBSETS if subset.count("1") == 1)
BUT_ONE = tuple(subset for subset in SUBSETS if subset.count("1") == 3)
best_single = chosen(scores.loss, SINGLES.__contains__, lowest=True)


def share_of_one(with_one: float, with_all: float, with_none: float) -> float:
    """Return which share of what all norms take off the loss one of them takes."""
    of_all = with_none - with_all
    return (with_none - with_one) / of_all if of_all else math.nan


def overlap(none: float, all_four: float, *others: float) -> float:
    """Return by how much more a norm takes off the loss alone than beside the others.

    As the mean over layers, of the losses with `SINGLES` and then with `BUT_ONE`.
    """
    alone = sum(none - loss for loss in others[:4])
    beside = sum(loss - all_four for loss in others[4:])
    return (alone - beside) / 4


CLAIMS = (
    *(
        Claim(
            f"batch norm {NAMES[less]} trains to a higher loss than {NAMES[more]}",
            LOSS_DIFFERENCE,
            key=KEYS[less],
            value=paired(scores.loss, less, more),
            above=0.0,
            reason="the order that a reader's single runs of ten epochs showed",
        )
        for more, less in itertools.pairwise(NAMES)
    ),
    Claim(
        "batch norm is not needed in every layer: a subset trains as well as all "
        "four (the best is {best})",
        "paired difference of the training loss to all four, nats",
        words={"best": best_but_all},
        key="best",
        value=paired(scores.loss, best_but_all, "1111"),
        below=0.01,
        reason="a twentieth of what the norms change in the loss as published, .47 to "
        ".27",
    ),
    Claim(
        "one norm nearly suffices: it takes three quarters off the loss of what all "
        "four do (the best is {best})",
        "share of the difference of the training loss between none and all four",
        words={"best": best_single},
        key="one",
        value=of_seeds(scores.loss, share_of_one, best_single, "1111", "0000"),
        above=0.75,
        reason="the recorded means of three seeds gave one dense norm most of it",
    ),
    Claim(
        "norms stand in for each other: one alone takes more off the loss than it does "
        "beside the three others",
        "difference of both changes, mean over the layers, nats",
        key="overlap",
        value=of_seeds(scores.loss, overlap, "0000", "1111", *SINGLES, *BUT_ONE),
        above=0.05,
        reason="a quarter of what the norms change in the loss as published",
    ),
)


def effect(i: int, others: int) -> Statistic:
    """Return the change of the loss by the norm of layer `i`.

    Args:
      i: the layer.
      others: how many other layers have a norm: the mean over which they are.
    """
    pairs = [
        (s, f"{s[:i]}0{s[i + 1 :]}")
        for s in SUBSETS
        if s[i] == "1" and s.count("1") == others + 1
    ]
    return mean_effect(scores.loss, pairs)


def by_number(runs: Runs) -> dict[str, dict[str, dict[int, Statistic]]]:
    """Return the loss of the best and the worst subset of each number of norms."""
    ordered = list(titles(runs).values())  # from the least loss
    lines: dict[str, dict[int, Statistic]] = {"best": {}, "worst": {}}
    for number in range(5):
        of = [subset for subset in ordered if subset.count("1") == number]
        if of:
            lines["best"][number] = spread(scores.loss, of[0])
            lines["worst"][number] = spread(scores.loss, of[-1])
    return {"training loss, nats": lines}


def titles(runs: Runs) -> dict[str, str]:
    """Return subsets by title, in order of the loss."""

    def title(subset: str) -> str:
        present = [name for name, d in zip(LAYERS, subset, strict=True) if d == "1"]
        return " + ".join(present) or "none"

    order = sorted(runs, key=lambda subset: mean(scores.loss, subset)(runs).value)
    return {title(subset): subset for subset in order}


STUDY = study.Study(
    name="which_layers",
    place=5,
    looks=sequential.AFTER_CHOOSING,
    choosing=ARMS,
    design=study.design(epochs=5, learning_rate=1.0),
    arms=ARMS,
    choice=subset_of,
    claims=CLAIMS,
    figures={
        "which_layers.png": figure(
            "estimates",
            spreads(
                {
                    "training loss, nats": scores.loss,
                    "test accuracy": scores.test_accuracy,
                },
                titles,
            ),
            f"{SPREAD}; test by exact statistics",
            finding="Norms after the dense layers alone end {dense} nats above all "
            "four, norms after the convolutions alone {convolutions} above that.",
            alt="Training loss and test accuracy of the 16 subsets of four norms, in "
            "order of the loss.",
        ),
        "by_number.png": figure(
            "by_choice",
            by_number,
            "by mean loss; n = {n} seeds; band: least to greatest",
            titles={"best": "best subset", "worst": "worst subset"},
            x_label="number of norms",
            x_scale="linear",
            finding="One norm alone, the best, takes {one} of what all four take off "
            "the loss.",
            alt="Training loss against the number of norms, of the best and of the "
            "worst subset of each number: the best falls most with the first norm.",
        ),
        "effects.png": figure(
            "estimates",
            {
                f"change of the loss, nats, {words}": {
                    layer: effect(i, others) for i, layer in enumerate(LAYERS)
                }
                for others, words in ((0, "with no other norm"), (3, "beside three"))
            },
            "n = {n} seeds; line: 95% interval",
            reference=0.0,
            finding="A norm takes {overlap} nats more off the loss alone than it does "
            "beside the three others.",
            alt="What each layer's norm changes in the loss with no other norm, and "
            "beside the three others, where it changes far less.",
        ),
    },
)

if __name__ == "__main__":
    study.start(STUDY)
