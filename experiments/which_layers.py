r"""Is batch norm needed in every layer?

The chapter's third exercise. LeNet has batch norm after two convolutions and two dense
layers; this trains all 16 subsets of the four.

  python -m experiments.which_layers --workdir=runs/layers --devices=2     12 minutes
  python -m experiments.which_layers --workdir=runs/layers-try --smoke      a minute

The effect of a layer's norm is what it changes in the training loss of the last epoch,
as the mean over the eight settings of the other layers; a run that diverged has the
loss of guessing, ln 10. Figures: which_layers.png, loss and test accuracy of each
subset; effects.png.

What came out (3 seeds, 5 epochs; all of it in experiments/README.md): in order of the
training loss all four < dense layers alone < convolutions alone < none, each step clear
of 0. A norm after either dense layer takes .10 nats off the loss, after the second
convolution .05, after the first .03. Whether the best three, without that of the second
convolution, do as well as all four is undecided: .006 nats, interval -.012 to .023.
"""

from __future__ import annotations

import itertools

from bn_jax.training.config import value_of
from experiments import scores, sequential, study
from experiments.claims import LOSS_DIFFERENCE, Claim
from experiments.estimate import Statistic, best, mean_effect, paired
from experiments.figures import figure, spreads
from experiments.scores import Row, Runs

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


best_but_all = best(scores.loss, lambda subset: subset != "1111", lowest=True)
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
        needs=SUBSETS,
        below=0.01,
        reason="a tenth of what the norms change in the loss as published, .47 to "
        ".27; the best subset is chosen on the same runs, which favours it",
    ),
)


def effect(i: int) -> Statistic:
    """Return the change of the loss by the norm of layer `i`."""
    pairs = [(s, f"{s[:i]}0{s[i + 1 :]}") for s in SUBSETS if s[i] == "1"]
    return mean_effect(scores.loss, pairs)


def titles(runs: Runs) -> dict[str, str]:
    """Return subsets by title, in order of the loss."""

    def title(subset: str) -> str:
        present = [name for name, d in zip(LAYERS, subset, strict=True) if d == "1"]
        return " + ".join(present) or "none"

    order = sorted(runs, key=lambda subset: sum(map(scores.loss, runs[subset])))
    return {title(subset): subset for subset in order}


STUDY = study.Study(
    name="which_layers",
    place=5,
    looks=sequential.once(3),
    design=study.design(epochs=5, learning_rate=1.0),
    arms={"subsets": [{"model": f"lenet:norm_layers={subset}"} for subset in SUBSETS]},
    choice=subset_of,
    claims=CLAIMS,
    figures={
        "which_layers.png": figure(
            "estimates",
            lambda runs: spreads(
                {
                    "training loss, nats": scores.loss,
                    "test accuracy": scores.test_accuracy,
                },
                titles(runs),
            ),
            "n = {n} seeds; line: least to greatest; test by own statistics of 500",
            finding="Norms after the dense layers alone end {dense} nats above all "
            "four; the best subset, chosen on these runs, {best}.",
            alt="Training loss and test accuracy of the 16 subsets of four norms, in "
            "order of the loss.",
        ),
        "effects.png": figure(
            "estimates",
            {
                "change of the training loss by its norm, nats": {
                    layer: effect(i) for i, layer in enumerate(LAYERS)
                }
            },
            "mean over the others' 8 settings; n = {n} seeds; line: 95% interval",
            reference=0.0,
            finding="Without the norms of the dense layers the loss is {convolutions} "
            "nats higher than without those of the convolutions.",
            alt="What each layer's norm changes in the loss: a tenth of a nat after "
            "either dense layer, less after the convolutions.",
        ),
    },
)

if __name__ == "__main__":
    study.start(STUDY)
