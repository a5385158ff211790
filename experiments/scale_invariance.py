r"""Why does a large learning rate work with batch norm?

The chapter says that batch norm allows larger rates, not why. The output of a norm does
not change when the weights $w$ before it are scaled, so (with epsilon 0) their gradient
$g$ is orthogonal to them and in inverse proportion to their norm. Steps of plain SGD at
rate $\eta$ then only lengthen them,

$$|w_{t+1}|^2 = |w_t|^2 + \eta^2 |g_t|^2,$$

and what a step turns them by, $\eta / |w|^2$ times the gradient at norm 1, shrinks
until it fits: a rate that is too large makes itself smaller. This follows the weights
before a norm in LeNet, at three rates, and the same weights without norm.

  python -m experiments.scale_invariance --workdir=runs/scale                3 minutes
  python -m experiments.scale_invariance --workdir=runs/scale-try --smoke

Figure: scale_invariance.png, norms by step.

What came out (3 seeds, 3 epochs; all of it in experiments/README.md): the mean |cosine|
of weights and gradient is 3e-6 with batch norm and .45 without, of the layer where it
is largest; norms grow by the formula to 3 parts in 10,000; and of rates 100 times
apart the effective ones end 2.7 times apart.

References: van Laarhoven, 2017, "L2 regularization versus batch and weight
normalization", arXiv:1706.05350; Arora, Li and Lyu, 2019, "Theoretical analysis of auto
rate-tuning by batch normalization", arXiv:1812.03981.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Claim, Row

if TYPE_CHECKING:
    from bn_jax.data import ImageData
    from experiments.claims import Verdict

LAYERS = ("conv1", "conv2", "dense1", "dense2")
TITLES = {"batch_norm": "batch norm", "none": "no batch norm"}


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Rates, with and without norm."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    learning_rates: tuple[float, ...] = fields.option(
        (0.1, 1.0, 10.0),
        "The claims are on 1.0, and on .1 beside 10.",
        valid=fields.POSITIVE,
    )


class Probed(NamedTuple):
    """What a step is asked, besides its loss and accuracy."""

    loss: Any  # shape []
    accuracy: Any  # shape []
    cosine: Any  # of weights and their gradient; shape [4], a layer each
    squared_norm: Any  # of the weights before the step; shape [4]
    squared_gradient: Any  # shape [4]


def probe() -> Any:
    """Return a link of an optimizer's chain that keeps the numbers of `Probed`."""
    import jax.numpy as jnp
    import optax

    zeros = jnp.zeros(len(LAYERS))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state
        pairs = [(params[name]["kernel"], gradients[name]["kernel"]) for name in LAYERS]
        dot, ww, gg = (
            jnp.stack([jnp.vdot(pair[i], pair[j]) for pair in pairs])
            for i, j in ((0, 1), (0, 0), (1, 1))
        )
        return gradients, (dot / jnp.sqrt(ww * gg), ww, gg)

    return optax.GradientTransformation(lambda params: (zeros,) * 3, update)


def measure(design: Design, data: ImageData, folder: Path) -> tuple[list[Row], float]:
    """Return a row for each run, as kept in the folder or trained now, and seconds."""
    from bn_jax.runs import results

    path = folder / study.ROWS
    rows = results.read_rows(path) if path.exists() else []
    done = {(row["arm"], row["learning_rate"], row["seed"]) for row in rows}
    for norm in TITLES:
        run = None
        for choice in itertools.product(
            [norm], design.learning_rates, range(design.seeds)
        ):
            if choice in done:
                continue
            run = run or compiled(norm, design, data)
            print(f"{norm}, rate {choice[1]:g}, seed {choice[2]}", flush=True)
            started = time.perf_counter()
            row = run(*choice[1:])
            rows.append({**row, "seconds": time.perf_counter() - started})
            results.write_rows(path, rows)
    return rows, sum(row["seconds"] for row in rows)


def compiled(norm: str, design: Design, data: ImageData) -> Any:
    """Return `run(rate, seed)`, compiled once for all rates and seeds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bn_jax.training import feed, loop
    from bn_jax.training import state as state_lib
    from bn_jax.training import step as step_lib

    config = design.config(norm=norm)
    model = state_lib.make_model(config, num_classes=len(data.class_names))
    steps_per_epoch = len(data.train.labels) // config.batch_size
    stored = loop.on_device(data.train)

    def optimizer_of(rate: Any) -> Any:
        return optax.chain(probe(), optax.sgd(rate))

    @jax.jit
    def epoch(rate: Any, state: Any, order: Any) -> Any:
        train_step = step_lib.make_train_step(model, optimizer_of(rate))

        def probed_step(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            return state, Probed(*metrics, *state.opt_state[0])

        return step_lib.run_steps(
            probed_step,
            state,
            step_lib.Stored(stored, order),
            jnp.int32(0),
            jnp.int32(steps_per_epoch),
            max_steps=steps_per_epoch,
        )

    def run(rate: float, seed: int) -> Row:
        init_key, order_key = jax.random.split(jax.random.key(seed))
        order = feed.Order(
            order_key,
            num_examples=len(data.train.labels),
            batch_size=config.batch_size,
        )
        variables = state_lib.init_variables(
            model, init_key, data.train.images.shape[1:]
        )
        state = state_lib.init_state(variables, optimizer_of(rate))
        parts = []
        for i in range(config.epochs):
            state, probed = epoch(rate, state, jnp.asarray(order.of_epoch(i)))
            parts.append(probed)
        taken = int(state.step)  # fewer, where a step was not finite
        all_steps = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:taken], *parts)
        return {"arm": norm, "learning_rate": rate, "seed": seed, **follow(all_steps)}

    return run


def follow(probed: Probed) -> Row:
    """Return of a run what is judged and drawn, as JSON holds it.

    A run ends before the first step at which a number is not finite.
    """
    import numpy as np

    columns = [np.asarray(column).reshape(len(column), -1) for column in probed]
    finite = np.isfinite(np.concatenate(columns, axis=1)).all(axis=1)
    steps = len(finite) if finite.all() else max(1, int(finite.argmin()))
    probed = Probed(*(column[:steps] for column in probed))
    squared = np.asarray(probed.squared_norm, np.float64)
    grown = squared[-1] - squared[0]
    # The last gradient has moved what comes after the last norm.
    gradients = np.asarray(probed.squared_gradient, np.float64)[:-1].sum(0)
    every = max(1, len(squared) // 60)
    return {
        "steps": len(squared),
        "mean_abs_cosine": np.abs(probed.cosine).mean(0).tolist(),
        "growth": grown.tolist(),
        "sum_of_squared_gradients": gradients.tolist(),
        "drawn_steps": list(range(0, len(squared), every)),
        "squared_norm": squared[::every].tolist(),
        "final_squared_norm": squared[-1].tolist(),
        "final_accuracy": float(np.mean(probed.accuracy[-100:])),
    }


def _rows(rows: Sequence[Row], norm: str, rate: float) -> list[Row]:
    chosen = [r for r in rows if (r["arm"], r["learning_rate"]) == (norm, rate)]
    return sorted(chosen, key=lambda row: row["seed"])


def growth_error(row: Row) -> float:
    """Return the largest relative error of the formula for growth, over layers."""
    rate = row["learning_rate"]
    return max(
        abs(grown / (rate**2 * squares) - 1)
        for grown, squares in zip(
            row["growth"], row["sum_of_squared_gradients"], strict=True
        )
    )


def effective_rate(row: Row) -> float:
    r"""Return the geometric mean over layers of $\eta / |w|^2$ at the end."""
    logs = [math.log(row["learning_rate"] / w) for w in row["final_squared_norm"]]
    return math.exp(sum(logs) / len(logs))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    def cosine(norm: str) -> intervals.Interval:
        runs = _rows(rows, norm, 1.0)
        return intervals.of_mean([max(row["mean_abs_cosine"]) for row in runs])

    def log_effective(rate: float) -> list[float]:
        runs = _rows(rows, "batch_norm", rate)
        return [math.log10(effective_rate(row)) for row in runs]

    of_cosine = (
        "mean over steps of |cosine| at rate 1.0, of the layer where it is largest"
    )
    claims = [
        Claim(
            [("batch_norm", 1.0)],
            lambda: decide(
                "with batch norm, weights and their gradient are orthogonal",
                of_cosine,
                cosine("batch_norm"),
                below=0.01,
                reason="0 for epsilon 0; random directions of the smallest layer, 150 "
                "weights, have .065",
            ),
        ),
        Claim(
            [("none", 1.0)],
            lambda: decide(
                "without, they are not",
                of_cosine,
                cosine("none"),
                above=0.01,
                reason="the same threshold",
            ),
        ),
        Claim(
            [("batch_norm", 1.0)],
            lambda: decide(
                "squared norms grow by the rate squared times the sum of squared "
                "gradients",
                "relative difference at rate 1.0, of the layer where it is largest",
                intervals.of_mean(
                    [growth_error(row) for row in _rows(rows, "batch_norm", 1.0)]
                ),
                below=0.05,
                reason="exact for epsilon 0; a twentieth allows for epsilon",
            ),
        ),
        Claim(
            [("batch_norm", 0.1), ("batch_norm", 10.0)],
            lambda: decide(
                "of rates 100 times apart, the effective ones end less than 10 times "
                "apart",
                "log10 of the ratio of effective rates, of rates 10 and .1",
                intervals.of_difference(log_effective(10.0), log_effective(0.1)),
                below=1.0,
                reason="half of the two decades between the rates",
            ),
        ),
    ]
    return study.judge([(row["arm"], row["learning_rate"]) for row in rows], claims)


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    panels: dict[str, Any] = {}
    seeds = len({row["seed"] for row in rows})
    for norm, title in TITLES.items():
        lines = {}
        for rate in sorted({row["learning_rate"] for row in rows}):
            runs = _rows(rows, norm, rate)
            shortest = min(len(row["drawn_steps"]) for row in runs)
            lines[f"rate {rate:g}"] = {
                1 + step: study.mean_and_range(
                    [sum(row["squared_norm"][k]) for row in runs]
                )
                for k, step in enumerate(runs[0]["drawn_steps"][:shortest])
            }
        panels[f"step, {title}"] = lines
    plots.growth(
        panels,
        "squared norm of the four weights",
        f"n = {seeds} seeds; mean, and band from least to greatest",
        folder / "scale_invariance.png",
    )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="scale_invariance",
            design=Design,
            measure=measure,
            verdicts=verdicts,
            draw=draw,
        )
    )
