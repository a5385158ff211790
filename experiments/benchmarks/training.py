"""Trainers, sweeps and evaluations of ours, made for the benchmarks that time them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bn_jax.data import ImageData
from bn_jax.measures import population
from bn_jax.training import evaluation, feed, loop, parallel
from bn_jax.training import sweep as sweep_lib
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import Network
from experiments.benchmarks import benchmark, timing

T = TypeVar("T")


def config(**choices: Any) -> TrainConfig:
    """Return a config that trains for longer than any benchmark measures."""
    return TrainConfig(epochs=10_000, **choices)


def trainer(
    data: ImageData,
    *,
    devices: int = 1,
    mode: str = "pmap",
    make_train_step: Callable[..., loop.TrainStep] = loop.make_train_step,
    **choices: Any,
) -> loop.Trainer:
    """Return our trainer.

    Args:
      data: the images.
      devices: how many to train on.
      mode: how they work together: pmap or jit.
      make_train_step: see `loop.Trainer`.
      **choices: fields of the config.
    """
    made = config(**choices)
    return loop.Trainer(
        made,
        data,
        placement=parallel.place(made, devices=str(devices), parallel=mode),
        make_train_step=make_train_step,
    )


def ready(
    data: ImageData,
    *,
    num_checked: int,
    layout: str | None = None,
    **options: Any,
) -> benchmark.Ready:
    """Return an arm of our trainer, which measures an epoch.

    Args:
      data: the images.
      num_checked: number of steps whose losses are compared with other arms'.
      layout: of the model's activations; by default the model's choice.
      **options: as of `trainer`.
    """

    def make_train_step(
        config: TrainConfig, network: Network, *arguments: Any, **more: Any
    ) -> loop.TrainStep:
        # Parameters do not depend on the layout.
        model = network.model.clone(layout=layout)
        network = dataclasses.replace(network, model=model)
        return loop.make_train_step(config, network, *arguments, **more)

    started = time.perf_counter()
    made = trainer(data, make_train_step=make_train_step, **options)
    set_up_seconds = time.perf_counter() - started
    reports = made.train()
    # Some steps of the first epoch, which no round measures.
    while made.step < num_checked:
        next(reports)
    losses = made.progress().step_losses[:num_checked]

    def epoch() -> timing.Measurement:
        report = next_epoch(reports)
        return {
            "examples_per_second": report.examples_per_second,
            "epoch_seconds": report.seconds,
            "loss": report.loss,
            "accuracy": report.train_accuracy,
        }

    about = {
        "losses": losses.astype(float).tolist(),
        "set_up_seconds": set_up_seconds,
        "compile_seconds": made.compile_seconds,
    }
    return benchmark.Ready(epoch, about)


def flat_params(trainer: loop.Trainer) -> dict[str, np.ndarray]:
    """Return a trainer's parameters by path, such as conv1/kernel."""
    params: dict[str, np.ndarray] = traverse_util.flatten_dict(
        trainer.state().params, sep="/"
    )
    return params


def first_order(trainer: loop.Trainer) -> np.ndarray:
    """Return the examples of each step of the first epoch, shape [steps, batch]."""
    return feed.Order(
        trainer.order_key,
        num_examples=len(trainer.data.train.labels),
        batch_size=trainer.config.batch_size,
    ).of_epoch(0)


def statistics_call(trainer: loop.Trainer) -> Callable[..., Any]:
    """Put the training images on the device, to measure exact statistics of them.

    Returns:
      A function that takes further options of `population.exact_statistics`, and
      returns the statistics when they are there.
    """
    measure = functools.partial(
        population.exact_statistics,
        trainer.network.predict,
        jax.tree.map(jnp.asarray, trainer.state().variables),
        jnp.asarray(trainer.data.train.images),
        batch_size=evaluation.BATCH_SIZE,
    )
    return lambda **options: jax.block_until_ready(measure(**options))


def next_epoch(training: Iterator[T | None]) -> T:
    """Train until an epoch ends, and return what the trainer or sweep reports."""
    return next(report for report in training if report is not None)


def sweep_epochs(
    choices: Sequence[dict[str, Any]], data: ImageData, *, devices: int = 1
) -> tuple[sweep_lib.Sweep, Callable[[], tuple[float, int]]]:
    """Set up a sweep.

    Args:
      choices: fields of each member's config.
      data: the images.
      devices: how many the members share.

    Returns:
      The sweep, and a function that trains an epoch of all members and returns its
      seconds, without evaluation, and its steps.
    """
    members = [config(**choice) for choice in choices]
    sweep = sweep_lib.Sweep(members, data, devices=jax.devices()[:devices])
    training = sweep.train()

    def epoch() -> tuple[float, int]:
        seconds, steps = sweep.progress().seconds, sweep.step
        next_epoch(training)
        return sweep.progress().seconds - seconds, sweep.step - steps

    return sweep, epoch
