"""The pure training step, many of them in one compiled loop, and evaluation.

Images reach the device as bytes; a step takes its batch and scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bn_jax.training.state import TrainState


class Batch(NamedTuple):
    """Images and labels; a whole data set is one, too."""

    images: Array  # shape [N, H, W, C], uint8
    labels: Array  # shape [N], int32


class Metrics(NamedTuple):
    """Means over the examples of a batch."""

    loss: Array  # cross-entropy in nats; shape []
    accuracy: Array  # share of examples whose largest logit is the label's; shape []


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Stored(NamedTuple):
    """A data set on the device, and the examples of each step of an epoch."""

    data: Batch
    order: Array  # shape [steps, N], integers: the examples of each step's batch

    def batch(self, i: Array) -> Batch:
        """Return the batch of the epoch's step `i`."""
        return jax.tree.map(lambda leaf: leaf[self.order[i]], self.data)


class Streamed(NamedTuple):
    """The batches of some steps, read from elsewhere."""

    batches: Batch  # with a leading axis of steps

    def batch(self, i: Array) -> Batch:
        """Return batch `i`."""
        return jax.tree.map(lambda leaf: leaf[i], self.batches)


def to_float(images: Array) -> Array:
    """Return pixels in [0, 1], of bytes, in JAX's default float dtype."""
    return images.astype(jnp.result_type(float)) / 255


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    dropout_key: Array | None = None,
) -> TrainStep:
    """Return `train_step(state, batch) -> (state, metrics)`, a pure function.

    Args:
      model: called as `model(images, train=True)`.
      optimizer: of the parameters.
      axis_name: of the mapped axis whose instances each hold an equal part of the
        batch; gradients and metrics are means over all of it. Whether statistics are
        shared, too, is the model's affair.
      dropout_key: decides what each step drops, on each instance along the axis; None
        for a model without dropout.
    """

    def random_streams(step: Array) -> dict[str, Array]:
        if dropout_key is None:
            return {}
        key = jax.random.fold_in(dropout_key, step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        return {"dropout": key}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                to_float(batch.images),
                train=True,
                mutable=["batch_stats"],
                rngs=random_streams(state.step),
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            return losses.mean(), (updates.get("batch_stats", {}), logits)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradients = gradient_of(state.params)
        accuracy = jnp.mean(logits.argmax(-1) == batch.labels)
        if axis_name is not None:
            gradients, loss, accuracy = _mean_over(
                axis_name, (gradients, loss, accuracy)
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, Metrics(loss, accuracy)

    return train_step


def _mean_over(axis_name: str, tree: Any) -> Any:
    """Return the means over a mapped axis, in one collective for the whole tree."""
    flat, unravel = ravel_pytree(tree)
    return unravel(lax.pmean(flat, axis_name))


def epoch_order(key: Array, *, num_examples: int, batch_size: int) -> Array:
    """Return the examples of each step of an epoch, in an order that `key` decides.

    Args:
      key: decides the order, and so which examples are left over.
      num_examples: of the data set.
      batch_size: examples a step.

    Returns:
      Indices of shape `[num_examples // batch_size, batch_size]`, each at most once.
    """
    num_steps = num_examples // batch_size
    order = jax.random.permutation(key, num_examples)
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def run_steps(
    train_step: TrainStep,
    state: TrainState,
    source: Stored | Streamed,
    start: Array,
    stop: Array,
    *,
    max_steps: int,
) -> tuple[TrainState, Metrics]:
    """Take the steps from `start` to `stop`, or to the first that is not finite.

    As `start` and `stop` are no part of the program, a run that is cut into other parts
    gives the same numbers, bit for bit.

    Args:
      train_step: as `make_train_step` returns it.
      state: to start from.
      source: of the batches.
      start: number of the first step in `source`; shape [], int32.
      stop: number after the last; shape [], int32.
      max_steps: static; at least `stop - start`.

    Returns:
      The state after the last step whose loss and new parameters are finite, and the
      metrics of each step, with a leading axis of `max_steps`; those after the last
      one taken are 0. A step that is not finite leaves its metrics, but not its state.
    """
    Carry = tuple[Array, Array, TrainState, Metrics]

    def goes_on(carry: Carry) -> Array:
        i, finite, _, _ = carry
        return (i < stop) & finite

    def step(carry: Carry) -> Carry:
        i, _, old, metrics = carry
        new, of_step = train_step(old, source.batch(i))
        finite = jnp.isfinite(of_step.loss) & _all_finite(new.params)
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = jax.tree.map(lambda m, v: m.at[i - start].set(v), metrics, of_step)
        return i + 1, finite, state, metrics

    shapes = jax.eval_shape(train_step, state, source.batch(start))[1]
    metrics = jax.tree.map(lambda m: jnp.zeros((max_steps, *m.shape), m.dtype), shapes)
    carry = (start, jnp.asarray(True), state, metrics)
    _, _, state, metrics = lax.while_loop(goes_on, step, carry)
    return state, metrics


def _all_finite(tree: Any) -> Array:
    """Return whether all numbers of a tree are finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite))


def predict(model: nn.Module, variables: Any, images: Array) -> Array:
    """Return the logits of images given as bytes, in prediction mode."""
    logits: Any = model.apply(variables, to_float(images), train=False)
    return logits


def predict_by_batch(model: nn.Module, variables: Any, images: Array) -> Array:
    """Return the logits that norms give by the statistics of these images.

    Args:
      model: without dropout, which training mode would apply.
      variables: as for `predict`; the moving statistics are not used.
      images: the batch, as bytes.
    """
    logits, _ = model.apply(
        variables, to_float(images), train=True, mutable=["batch_stats"]
    )
    return logits


class Sums(NamedTuple):
    """Sums over examples."""

    loss: Array  # cross-entropy in nats; shape []
    correct: Array  # number of examples whose largest logit is the label's; shape []


def evaluate(
    model: nn.Module,
    variables: Any,
    batches: Batch,
    counts: Array,
    *,
    predict: Callable[[nn.Module, Any, Array], Array] = predict,
) -> Sums:
    """Return sums over examples.

    Args:
      model: the model.
      variables: its parameters and statistics.
      batches: images and labels with a leading axis of batches, `[T, N, ...]`.
      counts: booleans `[T, N]`; False leaves an example out, such as one of padding.
      predict: gives the logits of a batch.
    """

    def add_batch(total: Sums, batch: tuple[Batch, Array]) -> tuple[Sums, None]:
        (images, labels), counts = batch
        logits = predict(model, variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = logits.argmax(-1) == labels
        # A product would make NaN of 0 times the loss of padding that overflows.
        added = Sums(
            jnp.sum(jnp.where(counts, losses, 0)),
            jnp.sum(correct & counts, dtype=jnp.int32),
        )
        return jax.tree.map(jnp.add, total, added), None

    zero = Sums(jnp.zeros(()), jnp.zeros((), jnp.int32))
    total, _ = lax.scan(add_batch, zero, (batches, counts))
    return total
