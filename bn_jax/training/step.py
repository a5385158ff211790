"""The pure training step, an epoch of them in one scan, and evaluation.

Images stay on the device as bytes; a step gathers its batch and scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array, lax

from bn_jax.training.state import TrainState

# Large enough to amortise a step's overhead; activations of 500 images stay in cache.
EVAL_BATCH_SIZE = 500


class Batch(NamedTuple):
    """Images and labels; a whole data set is one, too."""

    images: Array  # shape [N, H, W, C], uint8
    labels: Array  # shape [N], int32


class Metrics(NamedTuple):
    """Means over the examples of a batch."""

    loss: Array  # cross-entropy in nats; shape []
    accuracy: Array  # share of examples whose largest logit is the label's; shape []


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def to_float(images: Array) -> Array:
    """Return pixels in [0, 1] as float32, of bytes."""
    return images.astype(jnp.float32) / 255


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation
) -> TrainStep:
    """Return `train_step(state, batch) -> (state, metrics)`, a pure function."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                to_float(batch.images),
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            return losses.mean(), (updates.get("batch_stats", {}), logits)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradients = gradient_of(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, Metrics(loss, jnp.mean(logits.argmax(-1) == batch.labels))

    return train_step


def train_epoch(
    train_step: TrainStep,
    state: TrainState,
    data: Batch,
    key: Array,
    *,
    batch_size: int,
) -> tuple[TrainState, Metrics]:
    """Take one step on each batch of the shuffled data.

    Args:
      train_step: the step.
      state: before the epoch.
      data: all examples; those left over when it is cut into batches are dropped.
      key: decides the order of the examples.
      batch_size: examples a step.

    Returns:
      The state after the epoch and each step's metrics, of shape `[steps]`.
    """
    num_examples = len(data.labels)
    num_steps = num_examples // batch_size
    order = jax.random.permutation(key, num_examples)
    batches = order[: num_steps * batch_size].reshape(num_steps, batch_size)

    def step(state: TrainState, indices: Array) -> tuple[TrainState, Metrics]:
        return train_step(state, jax.tree.map(lambda leaf: leaf[indices], data))

    return lax.scan(step, state, batches)


def predict(model: nn.Module, variables: Any, images: Array) -> Array:
    """Return the logits of images given as bytes, in prediction mode."""
    logits: Any = model.apply(variables, to_float(images), train=False)
    return logits


def evaluate(
    model: nn.Module,
    variables: Any,
    data: Batch,
    *,
    batch_size: int = EVAL_BATCH_SIZE,
) -> Metrics:
    """Return loss and accuracy in prediction mode, each example counted once.

    Args:
      model: the model.
      variables: its parameters and statistics.
      data: the examples. The last batch is filled up with examples that do not count.
      batch_size: examples at a time; it does not change the result.
    """
    num_examples = len(data.labels)
    num_batches = -(-num_examples // batch_size)
    padding = num_batches * batch_size - num_examples
    counts = jnp.ones(num_examples, bool)  # padded with False

    def batched(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))
        return filled.reshape(num_batches, batch_size, *leaf.shape[1:])

    def add_batch(total: Metrics, batch: tuple[Batch, Array]) -> tuple[Metrics, None]:
        (images, labels), counts = batch
        logits = predict(model, variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = logits.argmax(-1) == labels
        added = Metrics(jnp.sum(losses * counts), jnp.sum(correct * counts))
        return jax.tree.map(jnp.add, total, added), None

    zero = Metrics(jnp.zeros(()), jnp.zeros((), jnp.int32))
    total, _ = lax.scan(add_batch, zero, (jax.tree.map(batched, data), batched(counts)))
    return Metrics(*(value / num_examples for value in total))
