r"""What do gamma and beta do, when they are fixed, and when nothing else learns?

The chapter's fifth exercise asks to fix them and to look. The chapter has them learned,
to give back the freedom that standardising takes away. This trains LeNet, with sigmoids
and with ReLUs, with both, one or neither of them fixed at 1 and 0; and, the other way
round, with all other parameters fixed as they were initialised: gamma and beta alone,
these and the last layer, or as many other parameters chosen at random.

  python -m experiments.frozen --workdir=runs/frozen --devices=2             10 minutes
  python -m experiments.frozen --workdir=runs/frozen-try --smoke              a minute

Losses are means over the last epoch as it was trained; a run that diverged has that of
guessing, ln 10. Test accuracy is by exact statistics. Figures: sigmoid.png and
relu.png, loss, accuracy and gammas by arm; changes.png, what fixing changes in the
loss.

What came out (3 seeds, 4 epochs; all of it in experiments/README.md): with sigmoids
fixing both costs .081 nats, with ReLUs .006 and no accuracy. Gamma and beta alone reach
a test accuracy of .68 and .67, as many other parameters .66 and .62: that they learn
more is undecided by three seeds. They switch hardly any feature off. With the last
layer they reach .80 and .78.

Reference: Frankle, Schwab and Morcos, 2020, "Training BatchNorm and only BatchNorm",
arXiv:2003.00152.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Arms, Row

if TYPE_CHECKING:
    from bn_jax.data import ImageData
    from experiments.claims import Verdict
    from experiments.intervals import Interval

ACTIVATIONS = ("sigmoid", "relu")
NORMS = ("norm1", "norm2", "norm3", "norm4")
SMALL = 0.01  # of a gamma, as Frankle et al. count the features that are off
# By what learns, and whether gamma and beta do.
TITLES = {
    ("all", True, True): "all",
    ("all", True, False): "all but beta",
    ("all", False, True): "all but gamma",
    ("all", False, False): "all but both",
    ("norm_and_last", True, True): "gamma, beta and the last layer",
    ("norm", True, True): "gamma and beta alone",
    ("random", True, True): "as many others, at random",
}
FREE, NEITHER = TITLES["all", True, True], TITLES["all", False, False]
NORM, RANDOM = TITLES["norm", True, True], TITLES["random", True, True]
TRAINED = tuple(dict.fromkeys(trained for trained, _, _ in TITLES))


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Activations with their rates, and what learns."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 4)
    activations: tuple[str, ...] = fields.option(
        ACTIVATIONS, "After each layer.", choices=ACTIVATIONS
    )
    sigmoid_learning_rate: float = fields.option(
        1.0, "With sigmoids, the chapter's.", valid=fields.POSITIVE
    )
    relu_learning_rate: float = fields.option(
        0.1, "And with ReLUs, as in its later chapters.", valid=fields.POSITIVE
    )
    learning: tuple[str, ...] = fields.option(
        TRAINED,
        "What learns: all, with gamma and beta, one or neither; the norms' gamma and "
        "beta alone; these and the last layer; as many other parameters.",
        choices=TRAINED,
    )


def arms(design: Design, rows: Sequence[Row]) -> Arms:
    """Return a run for each activation, choice of what learns, and seed."""
    del rows
    found: dict[str, list[TrainConfig]] = {}
    rates = {
        "sigmoid": design.sigmoid_learning_rate,
        "relu": design.relu_learning_rate,
    }
    for activation, (trained, gamma, beta), seed in itertools.product(
        design.activations, TITLES, range(design.seeds)
    ):
        if trained not in design.learning:
            continue
        config = design.config(
            activation=activation,
            learning_rate=rates[activation],
            trained=trained,
            train_gamma=gamma,
            train_beta=beta,
            seed=seed,
        )
        found.setdefault(f"{activation}-{trained}", []).append(config)
    return found


def with_small_gammas(folder: Path, rows: list[Row], data: ImageData) -> list[Row]:
    """Add the share of gammas near 0, over all norms, from the runs' parameters."""
    import numpy as np

    del data
    params = study.load_params(folder)
    gammas = np.concatenate([params[norm]["scale"] for norm in NORMS], axis=1)
    shares = (np.abs(gammas) < SMALL).mean(axis=1)
    return [
        {**row, "small_gammas": float(share)}
        for row, share in zip(rows, shares, strict=True)
    ]


def by_choice(rows: Sequence[Row], activation: str) -> dict[str, list[Row]]:
    """Return the runs with an activation by what learned, in order of seeds."""
    found: dict[str, list[Row]] = {title: [] for title in TITLES.values()}
    for row in sorted(rows, key=lambda row: row["config"]["seed"]):
        config = row["config"]
        if config["activation"] == activation:
            choice = (config["trained"], config["train_gamma"], config["train_beta"])
            found[TITLES[choice]].append(row)
    return {title: runs for title, runs in found.items() if runs}


def change(runs: dict[str, list[Row]], choice: str) -> Interval:
    """Return what fixing changes in the loss, paired by seed."""
    from experiments import intervals

    return intervals.of_difference(
        *([study.final_loss(row) for row in runs[c]] for c in (choice, FREE))
    )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    def changes(activation: str, runs: dict[str, list[Row]]) -> Verdict:
        value, low, high, n = change(runs, NEITHER)
        direction = "higher"
        if value < 0:
            value, low, high, direction = -value, -high, -low, "lower"
        return decide(
            f"{activation}: fixing gamma and beta changes the training loss (it is "
            f"{direction})",
            f"paired difference of the training loss, nats, counted as {direction}",
            intervals.Interval(value, low, high, n),
            above=0.01,
            reason="two standard deviations of the published re-runs; the "
            "direction is taken from the same runs, which favours the claim",
        )

    def learn_more(activation: str, runs: dict[str, list[Row]]) -> Verdict:
        norm, others = (
            [study.final_test_accuracy(row) for row in runs[choice]]
            for choice in (NORM, RANDOM)
        )
        return decide(
            f"{activation}: gamma and beta alone learn more than as many other "
            "parameters",
            "paired difference of the test accuracy, exact statistics",
            intervals.of_difference(norm, others),
            above=0.0,
            reason="the sign is the claim, as Frankle et al. found in ResNets",
        )

    def switch_off(activation: str, runs: dict[str, list[Row]]) -> Verdict:
        return decide(
            f"{activation}: trained alone, gammas switch features off",
            f"share of gammas below {SMALL} in absolute value, over the four norms",
            intervals.of_mean([row["small_gammas"] for row in runs[NORM]]),
            above=0.1,
            reason="a tenth of the features; Frankle et al. found about a third in "
            "ResNets, after many more steps",
        )

    needs = {changes: (FREE, NEITHER), learn_more: (NORM, RANDOM), switch_off: (NORM,)}
    found = []
    for activation in ACTIVATIONS:
        runs = by_choice(rows, activation)
        claims = [
            study.Claim(choices, functools.partial(decision, activation, runs))
            for decision, choices in needs.items()
        ]
        found += study.judge(runs, claims)
    return found


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    changes = {}
    for activation in ACTIVATIONS:
        runs = by_choice(rows, activation)
        if not runs:
            continue
        first = next(iter(runs.values()))
        note = (
            f"{activation}, rate {first[0]['config']['learning_rate']:g}; "
            f"n = {len(first)} seeds; "
        )
        plots.estimates(
            {
                label: {
                    choice: study.mean_and_range([score(row) for row in of_choice])
                    for choice, of_choice in runs.items()
                }
                for label, score in (
                    ("training loss, nats", study.final_loss),
                    ("test accuracy, exact statistics", study.final_test_accuracy),
                    (f"share of |gamma| < {SMALL}", lambda row: row["small_gammas"]),
                )
            },
            f"what learns; {note}line: least to greatest",
            folder / f"{activation}.png",
        )
        if FREE in runs:
            changes[f"change of the loss, nats, {activation}"] = {
                choice: change(runs, choice)
                for choice in runs
                if choice.startswith(f"{FREE} but")
            }
    if changes:
        plots.estimates(
            changes,
            "what learns, to all; paired by seed; line: 95% interval",
            folder / "changes.png",
            reference=0.0,
        )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="frozen",
            design=Design,
            stages=(arms,),
            verdicts=verdicts,
            draw=draw,
            complete=with_small_gammas,
            smoke={"activations": ("sigmoid",), "learning": ("all", "norm", "random")},
        )
    )
