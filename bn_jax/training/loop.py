"""Training of a config on a data set: the loop over epochs, free of disk and flags."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bn_jax import data as data_lib
from bn_jax import population
from bn_jax.training import step as step_lib
from bn_jax.training.config import ConfigError, TrainConfig
from bn_jax.training.state import (
    TrainState,
    init_state,
    init_variables,
    make_model,
    make_optimizer,
)


class EpochReport(NamedTuple):
    """One line of a run's history. Accuracies are shares of 1, losses in nats."""

    epoch: int  # from 1
    step: int  # steps taken at its end
    loss: float  # mean over the epoch's batches, in training mode, as they were trained
    train_accuracy: float  # likewise
    test_loss: float  # in prediction mode, by the moving averages
    test_accuracy: float  # likewise
    seconds: float  # of training alone, without evaluation or compilation
    examples_per_second: float  # trained, without evaluation or compilation


class Fit(NamedTuple):
    """What `fit` returns."""

    model: nn.Module
    state: TrainState
    history: list[EpochReport]
    step_losses: np.ndarray  # shape [steps], float32
    compile_seconds: float


class Score(NamedTuple):
    """Test accuracy by the moving averages and by the training set's statistics."""

    test_loss: float
    test_accuracy: float
    test_loss_exact: float
    test_accuracy_exact: float


def fit(
    config: TrainConfig,
    data: data_lib.ImageData,
    *,
    on_epoch: Callable[[EpochReport], Any] = lambda report: None,
) -> Fit:
    """Train a model from its initial state.

    The same config and data give the same numbers, bit for bit, on one machine.

    Args:
      config: what to train, and how.
      data: the images.
      on_epoch: called with each epoch's report.

    Raises:
      ConfigError: if a batch is larger than the training set.
      FloatingPointError: if the loss is not finite.
    """
    check_fits(config, data)
    model = make_model(config, num_classes=len(data.class_names))
    steps_per_epoch = len(data.train.labels) // config.batch_size
    optimizer = make_optimizer(config, steps_per_epoch=steps_per_epoch)
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    variables = init_variables(model, init_key, data.train.images.shape[1:])
    state = init_state(variables, optimizer)
    train, test = on_device(data.train), on_device(data.test)

    train_step = step_lib.make_train_step(model, optimizer)
    started = time.perf_counter()
    train_epoch = (
        jax.jit(
            functools.partial(
                step_lib.train_epoch, train_step, batch_size=config.batch_size
            ),
            donate_argnums=0,
        )
        .lower(state, train, order_key)
        .compile()
    )
    evaluate = (
        jax.jit(functools.partial(step_lib.evaluate, model))
        .lower(state.variables, test)
        .compile()
    )
    compile_seconds = time.perf_counter() - started

    history, losses = [], []
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        key = jax.random.fold_in(order_key, epoch)
        state, metrics = jax.block_until_ready(train_epoch(state, train, key))
        seconds = time.perf_counter() - started
        losses.append(np.asarray(metrics.loss))
        _check_finite(losses, config)
        tested = evaluate(state.variables, test)
        if not np.isfinite(tested.loss):
            raise FloatingPointError(
                f"the loss on the test set is not finite after epoch {epoch} "
                f"(learning_rate={config.learning_rate}); try a smaller --learning_rate"
            )
        report = EpochReport(
            epoch=epoch,
            step=int(state.step),
            loss=float(metrics.loss.mean()),
            train_accuracy=float(metrics.accuracy.mean()),
            test_loss=float(tested.loss),
            test_accuracy=float(tested.accuracy),
            seconds=seconds,
            examples_per_second=steps_per_epoch * config.batch_size / seconds,
        )
        history.append(report)
        on_epoch(report)
    return Fit(model, state, history, np.concatenate(losses), compile_seconds)


def check_fits(config: TrainConfig, data: data_lib.ImageData) -> None:
    """Refuse a config that cannot train on `data`.

    Raises:
      ConfigError: if a batch is larger than the training set.
    """
    num_examples = len(data.train.labels)
    if config.batch_size > num_examples:
        raise ConfigError(
            f"batch_size={config.batch_size} is larger than the training set of "
            f"{num_examples} images; give at most {num_examples}"
        )


def score(model: nn.Module, variables: Any, data: data_lib.ImageData) -> Score:
    """Evaluate on the test set by moving averages and by exact statistics.

    Args:
      model: the model.
      variables: its parameters and moving averages.
      data: the training set gives the exact statistics, the test set the accuracy.
    """
    evaluate = jax.jit(functools.partial(step_lib.evaluate, model))
    test = on_device(data.test)
    exact = population.exact_statistics(
        functools.partial(step_lib.predict, model),
        variables,
        jnp.asarray(data.train.images),
        batch_size=step_lib.EVAL_BATCH_SIZE,
    )
    by_average = evaluate(variables, test)
    by_exact = evaluate({**variables, "batch_stats": exact}, test)
    return Score(
        test_loss=float(by_average.loss),
        test_accuracy=float(by_average.accuracy),
        test_loss_exact=float(by_exact.loss),
        test_accuracy_exact=float(by_exact.accuracy),
    )


def on_device(split: data_lib.Split) -> step_lib.Batch:
    """Return a split as arrays on the default device, images still as bytes."""
    return step_lib.Batch(jnp.asarray(split.images), jnp.asarray(split.labels))


def _check_finite(losses: list[np.ndarray], config: TrainConfig) -> None:
    """Stop at a loss that is not finite, saying where it was."""
    finite = np.isfinite(np.concatenate(losses))
    if not finite.all():
        raise FloatingPointError(
            f"the loss is not finite at step {int(finite.argmin()) + 1} "
            f"(learning_rate={config.learning_rate}); try a smaller --learning_rate"
        )
