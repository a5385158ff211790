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

What came out (3 seeds, 3 epochs; all of it in experiments/README.md): momentum changes
no loss, bit for bit, and from 0 to .99 the test accuracy by moving averages little; at
.999 they have not arrived after 700 steps: .21, where exact statistics give .86. Scale
and bias are worth .076 nats together. Epsilon and Flax's two variances change less than
seeds differ by.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Arms, Claim, Row

if TYPE_CHECKING:
    from experiments.claims import Verdict

# (momentum, epsilon), all in one program.
CHAPTER, FLAX, KERAS = (0.9, 1e-5), (0.99, 1e-5), (0.99, 1e-3)
SLOWEST, LARGE = (0.999, 1e-5), (0.9, 1e-3)
LIBRARIES = {CHAPTER: "chapter, PyTorch", FLAX: "Flax", KERAS: "Keras"}
# By arm; these have the chapter's momentum and epsilon.
NORMS = {
    "no_scale": "batch_norm:use_scale=False",
    "no_bias": "batch_norm:use_bias=False",
    "neither": "batch_norm:use_scale=False,use_bias=False",
    "fast_variance": "flax:use_fast_variance=True",
    "two_pass_variance": "flax:use_fast_variance=False",
}
TITLES = {
    "no_scale": "no scale",
    "no_bias": "no bias",
    "neither": "no scale, no bias",
    "fast_variance": "Flax's layer, fast variance",
    "two_pass_variance": "Flax's layer, variance in two passes",
}
FAST, TWO_PASSES = TITLES["fast_variance"], TITLES["two_pass_variance"]


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Momenta, epsilons and other options."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    learning_rate: float = fields.option_of(TrainConfig, "learning_rate")
    momenta: tuple[float, ...] = fields.option(
        (0.0, 0.5, 0.9, 0.99, 0.999),
        "At the chapter's epsilon, 1e-5. The libraries' defaults are always trained.",
        valid=fields.SHARE,
    )
    epsilons: tuple[float, ...] = fields.option(
        (1e-12, 1e-5, 1e-3),
        "At the chapter's momentum, .9.",
        valid=fields.POSITIVE,
    )
    norms: tuple[str, ...] = fields.option(
        tuple(NORMS),
        "Other options, with the chapter's momentum and epsilon.",
        choices=tuple(NORMS),
    )


def numbers(design: Design) -> list[tuple[float, float]]:
    """Return pairs of momentum and epsilon, each once."""
    momentum, epsilon = CHAPTER
    momenta = [(m, epsilon) for m in design.momenta]
    epsilons = [(momentum, e) for e in design.epsilons]
    return list(dict.fromkeys((*momenta, *epsilons, *LIBRARIES)))


def arms(design: Design, rows: Sequence[Row]) -> Arms:
    """Return a run for each option and seed."""
    del rows

    def config(norm: str, pair: tuple[float, float], seed: int) -> TrainConfig:
        momentum, epsilon = pair
        return design.config(norm=norm, momentum=momentum, epsilon=epsilon, seed=seed)

    seeds = range(design.seeds)
    return {
        "numbers": [
            config("batch_norm", pair, seed)
            for pair, seed in itertools.product(numbers(design), seeds)
        ],
        **{
            arm: [config(NORMS[arm], CHAPTER, seed) for seed in seeds]
            for arm in design.norms
        },
    }


def title(pair: tuple[float, float]) -> str:
    """Return a label of momentum and epsilon."""
    momentum, epsilon = pair
    whose = f" ({LIBRARIES[pair]})" if pair in LIBRARIES else ""
    return f"momentum {momentum:g}, epsilon {epsilon:g}{whose}"


def by_option(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Return the runs of each option that has any, by title and seed."""
    found: dict[str, dict[int, Row]] = {_option(row): {} for row in rows}
    for row in sorted(rows, key=lambda row: row["config"]["seed"]):
        found[_option(row)][row["config"]["seed"]] = row
    return found


def _option(row: Row) -> str:
    """Return the title of a run's option."""
    return title(_pair(row)) if row["arm"] == "numbers" else TITLES[row["arm"]]


def _pair(row: Row) -> tuple[float, float]:
    """Return a run's momentum and epsilon."""
    return row["config"]["momentum"], row["config"]["epsilon"]


def momenta_of(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return the pairs that have runs and the chapter's epsilon, by momentum."""
    pairs = {_pair(row) for row in rows if row["arm"] == "numbers"}
    return sorted(pair for pair in pairs if pair[1] == CHAPTER[1])


def scores(row: Row) -> dict[str, float]:
    """Return a run's scores at the end; those of guessing if it diverged.

    Returns:
      `loss`, of training; and test accuracies, by moving averages as `average` and by
      exact statistics as `exact`.
    """
    average = study.last(row, "test_accuracy")
    if math.isnan(average):
        average = study.guessing("accuracy")
    exact = study.final_test_accuracy(row)
    return {"loss": study.final_loss(row), "average": average, "exact": exact}


def spread_over_momenta(rows: Sequence[Row]) -> float:
    """Return how far momenta are apart in any epoch's loss from the same seed."""
    runs = by_option(rows)
    of_momenta = [runs[title(pair)] for pair in momenta_of(rows)]
    return max(
        max(losses) - min(losses)
        for seed in of_momenta[0]
        for losses in zip(
            *(by_seed[seed]["loss"] for by_seed in of_momenta), strict=True
        )
    )


def difference_in_first_steps(rows: Sequence[Row], option: str, other: str) -> float:
    """Return how far two options are apart in any loss of the first 20 steps."""
    runs = by_option(rows)
    return max(
        abs(a - b)
        for seed in runs[option]
        for a, b in zip(
            *(runs[o][seed]["first_step_losses"] for o in (option, other)), strict=True
        )
    )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    runs = by_option(rows)
    n = len(runs[title(CHAPTER)])

    def of(option: str, name: str) -> list[float]:
        return [scores(row)[name] for row in runs[option].values()]

    def change(name: str, option: str, other: str) -> intervals.Interval:
        return intervals.of_difference(of(option, name), of(other, name))

    def exactly(value: float) -> intervals.Interval:
        return intervals.Interval(value, value, value, n)

    chapter, flax, slowest, large = map(title, (CHAPTER, FLAX, SLOWEST, LARGE))
    claims = [
        Claim(
            [chapter, flax],
            lambda: decide(
                "momentum takes no part in training",
                "largest difference of an epoch's training loss, nats, over momenta "
                "from the same seed",
                exactly(spread_over_momenta(rows)),
                below=1e-6,
                reason="exactly 0, as the batch normalises; rounding of float32, were "
                "it compiled otherwise",
            ),
        ),
        Claim(
            [slowest],
            lambda: decide(
                "a momentum of .999 is too slow for 700 steps",
                "paired difference of the test accuracy, moving averages minus exact",
                intervals.of_difference(of(slowest, "average"), of(slowest, "exact")),
                below=-0.05,
                reason="5 points, several times what seeds differ by; after 700 steps "
                "the initial 0 and 1 still weigh .999^700 = .50",
            ),
        ),
        Claim(
            [flax, chapter],
            lambda: decide(
                "a slower average predicts better: Flax's and Keras's momentum of .99, "
                "to the chapter's and PyTorch's .9",
                "paired difference of the test accuracy, moving averages",
                change("average", flax, chapter),
                above=0.0,
                reason="the sign is the claim: at rate 1.0 averages over 10 steps are "
                "noisy, those over 100 lag behind",
            ),
        ),
        Claim(
            [large, chapter],
            lambda: decide(
                "Keras's epsilon of 1e-3 trains like 1e-5",
                "paired difference of the training loss, nats",
                change("loss", large, chapter),
                above=-0.01,
                below=0.01,
                reason="two standard deviations of the published re-runs",
            ),
        ),
        Claim(
            [FAST, TWO_PASSES],
            lambda: decide(
                "on these images Flax's fast variance is as good as that in two passes",
                "largest difference of the loss in the first 20 steps, nats, over "
                "seeds",
                exactly(difference_in_first_steps(rows, FAST, TWO_PASSES)),
                below=1e-4,
                reason="rounding of float32, which 20 steps at rate 1.0 enlarge about "
                "a hundredfold; digits are lost where means are large beside "
                "deviations, here they are near them",
            ),
        ),
        Claim(
            [TITLES["neither"], chapter],
            lambda: decide(
                "without scale and bias the loss is higher",
                "paired difference of the training loss, nats",
                change("loss", TITLES["neither"], chapter),
                above=0.01,
                reason="two standard deviations of the published re-runs",
            ),
        ),
    ]
    return study.judge(runs, claims)


def summary(rows: Sequence[Row]) -> Row:
    """Return how far our layer, too, is from Flax's in two passes: by rounding."""
    present = by_option(rows)
    differences = {
        name: difference_in_first_steps(rows, option, TWO_PASSES)
        for name, option in (("fast_variance", FAST), ("ours", title(CHAPTER)))
        if {option, TWO_PASSES} <= present.keys()
    }
    return {"loss_difference_to_two_passes_in_20_steps": differences}


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    runs = by_option(rows)

    def ends(option: str, name: str) -> tuple[float, float, float]:
        return study.mean_and_range(
            [scores(row)[name] for row in runs[option].values()]
        )

    note = f"n = {len(runs[title(CHAPTER)])} seeds"
    plots.estimates(
        {
            label: {option: ends(option, name) for option in runs}
            for name, label in (
                ("loss", "training loss, nats"),
                ("average", "test accuracy, moving averages"),
                ("exact", "test accuracy, exact statistics"),
            )
        },
        f"{note}; line: least to greatest",
        folder / "options.png",
    )
    titles = {"average": "moving averages", "exact": "exact statistics"}
    plots.by_choice(
        {
            "test accuracy": {
                name: {
                    1 - pair[0]: ends(title(pair), name) for pair in momenta_of(rows)
                }
                for name in titles
            }
        },
        titles,
        "1 - momentum, weight of the new value",
        f"{note}; band: least to greatest",
        folder / "momentum.png",
    )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="options",
            design=Design,
            stages=(arms,),
            verdicts=verdicts,
            draw=draw,
            summary=summary,
            smoke={"norms": ("fast_variance", "two_pass_variance")},
        )
    )
