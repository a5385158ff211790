r"""What do the options of a library's batch norm change?

The chapter's sixth exercise sends the reader to the libraries' documentation of their
layers. This trains LeNet with other momenta and epsilons, the libraries' defaults among
them; without scale, bias or both; and with both of the ways in which Flax computes a
variance.

  python -m experiments.options --workdir=runs/options --devices=2           10 minutes
  python -m experiments.options --workdir=runs/options-try --smoke            a minute

Momentum is the weight of the old average. Defaults of momentum and epsilon are .9 and
1e-5 in the chapter and in PyTorch, which writes 0.1, the weight of the new value (its
moving variance is over n - 1, here over n: 1.004 times as large after a dense layer);
.99 and 1e-5 in Flax; .99 and 1e-3 in Keras. Haiku has 1e-5 and no default for the
momentum, which it calls decay_rate.

Other options change no number that training could show, and are tested instead: the
axis of the features in tests/test_linen.py and tests/models, statistics shared along a
named axis in tests/training/test_parallel.py, layers of other libraries in
tests/convert and experiments/conformance.py.

Losses are means over the last epoch as it was trained. Figures: options.png, loss and
test accuracy by option, by moving averages and by exact statistics; momentum.png, the
accuracies against momentum.

What would refute the claims: a loss that depends on momentum; averages of .99 that
predict worse than those of .9; an epsilon that changes the loss by more than the
re-runs of the chapter vary by.

What came out (5 to 20 seeds, 3 epochs; all of it in experiments/README.md): momentum
changes no loss, bit for bit. At .999 the averages have not arrived after 700 steps. A
slower average does not predict better: .99 ends farther from the exact statistics than
.9, and classifies 2.4 points less of the test set. Scale and bias are worth .078 nats
together. Keras's epsilon changes the loss by less than .008 nats.
"""

from __future__ import annotations

from bn_jax.training.config import value_of
from experiments import scores, study
from experiments.claims import LOSS_DIFFERENCE, THE_SIGN, TWO_DEVIATIONS, Claim
from experiments.estimate import Statistic, largest_difference, mean, paired, spread
from experiments.figures import SPREAD, figure, spreads
from experiments.scores import Row, Runs

# By arm, with the chapter's momentum and epsilon: a norm, and a title.
NORMS = {
    "no_scale": ("batch_norm:use_scale=false", "no scale"),
    "no_bias": ("batch_norm:use_bias=false", "no bias"),
    "neither": ("batch_norm:use_scale=false,use_bias=false", "no scale, no bias"),
    "fast_variance": ("flax:use_fast_variance=true", "Flax's layer, fast variance"),
    "two_pass_variance": (
        "flax:use_fast_variance=false",
        "Flax's layer, variance in two passes",
    ),
}
# Momentum and epsilon, all in one sweep, and whose defaults they are.
NUMBERS = {
    (0.0, 1e-5): "",
    (0.5, 1e-5): "",
    (0.9, 1e-5): " (chapter, PyTorch)",
    (0.99, 1e-5): " (Flax)",
    (0.999, 1e-5): "",
    (0.9, 1e-12): "",
    (0.9, 1e-3): "",
    (0.99, 1e-3): " (Keras)",
}
ARMS = {
    "numbers": [
        {"norm": f"batch_norm:momentum={momentum},epsilon={epsilon}"}
        for momentum, epsilon in NUMBERS
    ],
    **{arm: [{"norm": norm}] for arm, (norm, _) in NORMS.items()},
}


def title(momentum: float, epsilon: float) -> str:
    whose = NUMBERS[momentum, epsilon]
    return f"momentum {momentum:g}, epsilon {epsilon:g}{whose}"


CHAPTER, FLAX = title(0.9, 1e-5), title(0.99, 1e-5)
SLOWEST, LARGE = title(0.999, 1e-5), title(0.9, 1e-3)
NEITHER, FAST, TWO_PASSES = (
    NORMS[arm][1] for arm in ("neither", "fast_variance", "two_pass_variance")
)


def numbers_of(row: Row) -> tuple[float, float]:
    """Return a run's momentum and epsilon."""
    config = row["config"]
    return value_of(config, "norm.momentum"), value_of(config, "norm.epsilon")


def option_of(row: Row) -> str:
    in_numbers = row["arm"] == "numbers"
    return title(*numbers_of(row)) if in_numbers else NORMS[row["arm"]][1]


def momenta(runs: Runs) -> dict[float, str]:
    """Return the options at the chapter's epsilon, by momentum."""
    pairs = {numbers_of(row) for row in runs.rows if row["arm"] == "numbers"}
    return {pair[0]: title(*pair) for pair in sorted(pairs) if pair[1] == 1e-5}


def first_steps_differ(option: str, other: str) -> Statistic:
    return largest_difference(lambda row: row["first_step_losses"], option, other)


def distance_to_exact(row: Row) -> float:
    return abs(scores.test_accuracy(row) - scores.moving_test_accuracy(row))


CLAIMS = (
    Claim(
        "momentum takes no part in training",
        "largest difference of an epoch's training loss, nats, over momenta from the "
        "same seed",
        value=lambda runs, level: largest_difference(
            lambda row: row["loss"], *momenta(runs).values()
        )(runs, level=level),
        needs=(CHAPTER, FLAX),
        below=1e-6,
        reason="exactly 0, as the batch normalises; rounding of float32, were it "
        "compiled otherwise",
    ),
    Claim(
        "a momentum of .999 is too slow for 700 steps",
        "paired difference of the test accuracy, moving averages minus exact",
        key="slowest",
        value=mean(
            lambda row: scores.moving_test_accuracy(row) - scores.test_accuracy(row),
            SLOWEST,
        ),
        below=-0.05,
        reason="5 points, several times what seeds differ by; after 700 steps the "
        "initial 0 and 1 still weigh .999^700 = .50",
    ),
    Claim(
        "a slower average predicts better: Flax's and Keras's momentum of .99, to the "
        "chapter's and PyTorch's .9",
        "paired difference of the test accuracy, moving averages, after the last epoch",
        key="slower",
        value=paired(scores.moving_test_accuracy, FLAX, CHAPTER),
        above=0.0,
        reason=f"{THE_SIGN}: at rate 1.0 averages over 10 steps are noisy, those over "
        "100 lag behind",
    ),
    Claim(
        "a slower average ends farther from the exact statistics: .99, to .9",
        "paired difference of the absolute difference of the test accuracy by moving "
        "averages and by exact statistics",
        key="distance",
        value=paired(distance_to_exact, FLAX, CHAPTER),
        above=0.0,
        reason=f"{THE_SIGN}; in the rows of three seeds it was .035 [.026, .044]",
    ),
    Claim(
        "Keras's epsilon of 1e-3 trains like 1e-5",
        LOSS_DIFFERENCE,
        key="epsilon",
        value=paired(scores.loss, LARGE, CHAPTER),
        above=-0.01,
        below=0.01,
        reason=TWO_DEVIATIONS,
    ),
    Claim(
        "on these images Flax's fast variance is as good as that in two passes",
        "largest difference of the loss in the first 20 steps, nats, over seeds",
        value=first_steps_differ(FAST, TWO_PASSES),
        below=1e-4,
        reason="rounding of float32, which 20 steps at rate 1.0 enlarge about a "
        "hundredfold; digits are lost where means are large beside deviations, here "
        "they are near them",
    ),
    Claim(
        "without scale and bias the loss is higher",
        LOSS_DIFFERENCE,
        key="neither",
        value=paired(scores.loss, NEITHER, CHAPTER),
        above=0.01,
        reason=TWO_DEVIATIONS,
    ),
)


def summary(runs: Runs) -> Row:
    """Return how far our losses are from those of Flax's two-pass variance."""
    differences = {
        name: first_steps_differ(option, TWO_PASSES)(runs).value
        for name, option in (("fast_variance", FAST), ("ours", CHAPTER))
        if {option, TWO_PASSES} <= runs.keys()
    }
    return {"loss_difference_to_two_passes_in_20_steps": differences}


ACCURACIES = {
    "moving averages": scores.moving_test_accuracy,
    "exact statistics": scores.test_accuracy,
}
STUDY = study.Study(
    name="options",
    place=8,
    design=study.design(epochs=3, learning_rate=1.0),
    arms=ARMS,
    choice=option_of,
    claims=CLAIMS,
    figures={
        "options.png": figure(
            "estimates",
            spreads(
                {
                    "training loss, nats": scores.loss,
                    **{f"test accuracy, {by}": a for by, a in ACCURACIES.items()},
                },
                lambda runs: {option: option for option in runs},
            ),
            SPREAD,
            finding="Without scale and bias the loss is higher by {neither} nats; an "
            "epsilon of 1e-3 changes it by {epsilon}.",
            alt="Training loss, and test accuracy by moving averages and by exact "
            "statistics, for each option.",
        ),
        "momentum.png": figure(
            "by_choice",
            lambda runs: {
                "test accuracy": {
                    by: {
                        1 - m: spread(a, option) for m, option in momenta(runs).items()
                    }
                    for by, a in ACCURACIES.items()
                }
            },
            "n = {n} seeds; band: least to greatest",
            titles={by: by for by in ACCURACIES},
            finding="Momentum .999 costs {slowest} of accuracy after 700 steps; .99 "
            "ends farther from exact statistics than .9, by {distance}.",
            alt="Test accuracy by moving averages and by exact statistics against 1 - "
            "momentum: the former falls where momentum is near 1, the latter is flat.",
            x_label="1 - momentum, weight of the new value",
        ),
    },
    summary=summary,
    smoke={"arms": ("numbers", "fast_variance", "two_pass_variance")},
)

if __name__ == "__main__":
    study.start(STUDY)
