"""How the weights before each norm, and their gradients, change step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bn_jax.data import ImageData
from bn_jax.runs import json_files
from bn_jax.runs.json_files import ROWS
from bn_jax.training import feed, loop, parallel
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import init_state
from bn_jax.training.task import Task, make_network
from experiments.scores import Row

HELD = "held"
LAYERS = ("conv1", "conv2", "dense1", "dense2")  # of LeNet, each before a norm


class Probed(NamedTuple):
    """What is kept of each step; with a leading axis of steps."""

    loss: Any  # shape []
    accuracy: Any  # shape []
    cosine: Any  # of weights and their gradient; shape [4], a layer each
    squared_norm: Any  # of the weights before the step; shape [4]
    squared_gradient: Any  # shape [4]


def follow(
    arm: str, folder: Path, configs: Sequence[TrainConfig], data: ImageData
) -> tuple[list[Row], float]:
    """Train configs that differ in rate and seed; keep what happens to the weights.

    Plain SGD at a constant rate, whatever the configs say; in the arm `HELD` the norm
    of each of the weights is brought back after every step to what it was at the start.
    Runs that the folder holds are read.

    Returns:
      A row for each run, as `summarize` returns it, and the seconds of all runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS
    rows = json_files.read_rows(path) if path.exists() else []
    done = {(row["learning_rate"], row["seed"]) for row in rows}
    run = None
    for config in configs:
        rate, seed = config.learning_rate, config.seed
        if (rate, seed) in done:
            continue
        run = run or compiled(config, data, held=arm == HELD)
        print(f"rate {rate:g}, seed {seed}", flush=True)
        started = time.perf_counter()
        row = {"learning_rate": rate, "seed": seed, **summarize(run(rate, seed))}
        rows.append({**row, "seconds": time.perf_counter() - started})
        json_files.write_rows(path, rows)
    return rows, sum(row["seconds"] for row in rows)


def probe() -> optax.GradientTransformation:
    """Return a link of an optimizer's chain that keeps the last three of `Probed`."""
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


def hold() -> optax.GradientTransformation:
    """Return a link of an optimizer's chain after which weights keep their norm."""

    def kernels(params: Any) -> list[Array]:
        return [params[name]["kernel"] for name in LAYERS]

    def init(params: Any) -> list[Array]:
        return [jnp.linalg.norm(kernel) for kernel in kernels(params)]

    def update(updates: Any, norms: list[Array], params: Any) -> tuple[Any, Any]:
        held = dict(updates)
        for name, old, norm in zip(LAYERS, kernels(params), norms, strict=True):
            new = old + updates[name]["kernel"]
            kernel = new * (norm / jnp.linalg.norm(new)) - old
            held[name] = {**updates[name], "kernel": kernel}
        return held, norms

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def compiled(
    config: TrainConfig, data: ImageData, *, held: bool = False
) -> Callable[[float, int], Probed]:
    """Return a function of rate and seed that trains; it is compiled only once."""
    network = make_network(config, Task.of(config, data))
    steps_per_epoch = len(data.train.labels) // config.batch_size
    stored = feed.Batch(*map(jnp.asarray, data.train))

    def optimizer_of(rate: float | Array) -> optax.GradientTransformation:
        links = [probe(), optax.sgd(rate), *([hold()] if held else [])]
        return optax.chain(*links)

    @jax.jit
    def epoch(rate: Array, state: Any, order: Array) -> Any:
        train_step = loop.make_train_step(config, network, optimizer_of(rate))

        def probed_step(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            return state, Probed(*metrics, *state.opt_state[0])

        return loop.run_steps(
            probed_step,
            state,
            feed.Stored(stored, order),
            jnp.int32(0),
            jnp.int32(steps_per_epoch),
            pace=parallel.Pace(steps_per_epoch),
        )

    def run(rate: float, seed: int) -> Probed:
        init_key, order_key = jax.random.split(jax.random.key(seed))
        order = feed.Order(
            order_key,
            num_examples=len(data.train.labels),
            batch_size=config.batch_size,
        )
        state = init_state(network.init(init_key), optimizer_of(rate))
        parts = []
        for i in range(config.epochs):
            state, probed = epoch(rate, state, jnp.asarray(order.of_epoch(i)))
            parts.append(probed)
        taken = int(state.step)  # fewer, where a step was not finite
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:taken], *parts)

    return run


def summarize(probed: Probed) -> Row:
    """Return the numbers that claims and figures use, as JSON can hold them.

    A run ends before the first step at which a number is not finite.
    """
    columns = [np.asarray(column).reshape(len(column), -1) for column in probed]
    finite = np.isfinite(np.concatenate(columns, axis=1)).all(axis=1)
    steps = len(finite) if finite.all() else max(1, int(finite.argmin()))
    probed = Probed(*(column[:steps] for column in probed))
    squared = np.asarray(probed.squared_norm, np.float64)
    # Without the last gradient: the weights after that step are not known.
    gradients = np.asarray(probed.squared_gradient, np.float64)[:-1].sum(0)
    every = max(1, len(squared) // 60)
    return {
        "steps": len(squared),
        "mean_abs_cosine": np.abs(probed.cosine).mean(0).tolist(),
        "growth": (squared[-1] - squared[0]).tolist(),
        "sum_of_squared_gradients": gradients.tolist(),
        "drawn_steps": list(range(0, len(squared), every)),
        "squared_norm": squared[::every].tolist(),
        "abs_cosine": np.abs(probed.cosine)[::every].mean(1).tolist(),
        "final_squared_norm": squared[-1].tolist(),
        "final_accuracy": float(np.mean(probed.accuracy[-100:])),
    }
