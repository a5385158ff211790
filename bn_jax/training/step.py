"""The pure training step, many of them in one compiled loop, and evaluation.

Images reach the device as bytes; a step takes its batch and scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bn_jax.averages import debiased_momentum
from bn_jax.training.augment import AUGMENTATIONS
from bn_jax.training.config import TrainConfig
from bn_jax.training.losses import losses
from bn_jax.training.state import Network, TrainState
from bn_jax.training.streams import Stream, key_of


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


def make_train_step(
    config: TrainConfig,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Return `train_step(state, batch) -> (state, metrics)`, a pure function.

    Of several micro-batches a step, micro-batch j holds the examples j, j + accumulate,
    ..., so that it takes an equal part of each device's share. Each is normalised by
    its own statistics; `config.accumulate_stats` says what moves the averages: "each"
    one micro-batch after another, "once" the moments of all, merged exactly, as ghost
    batches do.

    Args:
      config: gives augmentation, accumulation, label smoothing, the average of weights,
        and the seed of dropout and augmentation.
      network: what is trained.
      optimizer: of the parameters.
      axis_name: of the mapped axis whose instances each hold an equal part of the
        batch; gradients and metrics are means over all of it. Each instance drops
        features of its own. Whether statistics are shared, too, is the model's affair.
    """
    dropout_key = key_of(config.seed, Stream.DROPOUT)
    augment_key = key_of(config.seed, Stream.AUGMENTATION)
    augment = AUGMENTATIONS.make(config.augment)
    accumulate, average_weights = config.accumulate, config.average_weights

    def key_of_step(step: Array, key: Array) -> Array:
        key = jax.random.fold_in(key, step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        return key

    def augmented(images: Array, step: Array) -> Array:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * len(images)
        return augment(jax.random.fold_in(augment_key, step), images, first=first)

    def gradients_of(
        params: Any, batch_stats: Any, batch: Batch, dropout_key: Array
    ) -> tuple[Any, Any, Metrics]:
        """Return gradients, the moved averages and metrics of a (micro-)batch."""

        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            logits, updates = network.apply(
                {"params": params, "batch_stats": batch_stats},
                batch.images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            of_examples = losses(
                logits, batch.labels, label_smoothing=config.label_smoothing
            )
            return of_examples.mean(), (updates.get("batch_stats", {}), logits)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradients = gradient_of(params)
        accuracy = jnp.mean(logits.argmax(-1) == batch.labels)
        return gradients, batch_stats, Metrics(loss, accuracy)

    def accumulated(
        params: Any, old_stats: Any, batch: Batch, dropout_key: Array
    ) -> tuple[Any, Any, Metrics]:
        """Return the results of `gradients_of`, averaged over the micro-batches."""
        parts: Batch = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(dropout_key, accumulate)

        def add(stats: Any, part: tuple[Batch, Array]) -> tuple[Any, Any]:
            of_part, key = part
            start = old_stats if config.accumulate_stats == "once" else stats
            gradients, stats, metrics = gradients_of(params, start, of_part, key)
            return stats, (gradients, stats, metrics)

        last, (gradients, stats, metrics) = lax.scan(add, old_stats, (parts, keys))
        if config.accumulate_stats == "once":
            first = jax.tree.map(lambda x: x[0], parts)
            last = _moved_once(
                old_stats,
                stats,
                lambda start: gradients_of(params, start, first, keys[0])[1],
            )
        gradients, metrics = jax.tree.map(lambda x: x.mean(0), (gradients, metrics))
        return gradients, last, metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = Batch(augmented(batch.images, state.step), batch.labels)
        compute = gradients_of if accumulate == 1 else accumulated
        gradients, batch_stats, (loss, accuracy) = compute(
            state.params, state.batch_stats, batch, key_of_step(state.step, dropout_key)
        )
        if axis_name is not None:
            gradients, loss, accuracy = _mean_over(
                axis_name, (gradients, loss, accuracy)
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_weights:
            m = debiased_momentum(average_weights, state.step)
            average = jax.tree.map(
                lambda old, new: (m * old + (1 - m) * new).astype(old.dtype),
                average,
                params,
            )
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
        )
        return state, Metrics(loss, accuracy)

    return train_step


def _moved_once(old: Any, moved: Any, move: Callable[[Any], Any]) -> Any:
    r"""Return averages moved by the moments of all micro-batches at once.

    Each micro-batch i has moved the averages a to $a_i = m a + (1 - m) b_i$. Of means,
    the mean over i is what the merged moments give. Of variances, it lacks the variance
    of the means between micro-batches, $(1 - m) V_i[b_i] = V_i[a_i] / (1 - m)$.

    Args:
      old: the averages before, by layer; each layer holds `mean` and `var`.
      moved: those that each micro-batch made of them, with a leading axis.
      move: what the first micro-batch makes of averages: its derivative by them is m.

    """
    ones = jax.tree.map(jnp.ones_like, old)
    _, momentum = jax.jvp(move, (old,), (ones,))

    def is_layer(node: Any) -> bool:
        return isinstance(node, dict) and "mean" in node

    def of_layer(moved: dict[str, Array], momentum: dict[str, Array]) -> Any:
        weight = 1 - momentum["mean"]
        between = jnp.var(moved["mean"], axis=0) / jnp.where(weight > 0, weight, 1)
        return {"mean": moved["mean"].mean(0), "var": moved["var"].mean(0) + between}

    return jax.tree.map(of_layer, moved, momentum, is_leaf=is_layer)


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


class Pace(NamedTuple):
    """How the compiled loop takes its steps."""

    max_steps: int  # of a call
    unasked: int = 1  # steps from one question whether to go on to the next


def run_steps(
    train_step: TrainStep,
    state: TrainState,
    source: Stored | Streamed,
    start: Array,
    stop: Array,
    *,
    pace: Pace,
) -> tuple[TrainState, Metrics]:
    """Take the steps from `start` to `stop`, or to the first that is not finite.

    As `start` and `stop` are not part of the program, a run that is cut into other
    parts gives the same numbers, bit for bit.

    Args:
      train_step: as `make_train_step` returns it.
      state: to start from.
      source: of the batches.
      start: number of the first step in `source`; shape [], int32.
      stop: number after the last; shape [], int32.
      pace: static; `stop - start` is at most `pace.max_steps`. Of several steps from
        one question to the next, those that are not to be taken are computed and left.

    Returns:
      The state after the last step whose loss and new parameters are finite, and the
      metrics of each step, with a leading axis of `pace.max_steps`; those after the
      last one taken are 0. A step that is not finite leaves its metrics, but not its
      state.
    """
    Carry = tuple[Array, Array, TrainState, Metrics]

    def goes_on(carry: Carry) -> Array:
        i, finite, _, _ = carry
        return (i < stop) & finite

    def step(carry: Carry) -> Carry:
        i, _, old, metrics = carry
        taken = goes_on(carry)
        new, of_step = train_step(old, source.batch(i))
        finite = jnp.isfinite(of_step.loss) & _all_finite(new.params)
        kept = taken & finite
        state = jax.tree.map(lambda n, o: jnp.where(kept, n, o), new, old)
        row = jnp.where(
            taken, i - start, max_steps
        )  # beyond the end, where none is set
        metrics = jax.tree.map(
            lambda m, v: m.at[row].set(v, mode="drop"), metrics, of_step
        )
        return i + taken, jnp.where(taken, finite, carry[1]), state, metrics

    def steps(carry: Carry) -> Carry:
        if pace.unasked == 1:
            return step(carry)
        return lax.fori_loop(0, pace.unasked, lambda _, carry: step(carry), carry)

    max_steps = pace.max_steps
    shapes = jax.eval_shape(train_step, state, source.batch(start))[1]
    metrics = jax.tree.map(lambda m: jnp.zeros((max_steps, *m.shape), m.dtype), shapes)
    carry = (start, jnp.asarray(True), state, metrics)
    _, _, state, metrics = lax.while_loop(goes_on, steps, carry)
    return state, metrics


def _all_finite(tree: Any) -> Array:
    """Return whether all numbers of a tree are finite."""
    flat, _ = ravel_pytree(tree)  # one small program on a GPU, rather than one a leaf
    return jnp.all(jnp.isfinite(flat))


class Sums(NamedTuple):
    """Sums over examples."""

    loss: Array  # cross-entropy in nats; shape []
    correct: Array  # number of examples whose largest logit is the label's; shape []


def evaluate(
    predict: Callable[[Any, Array], Array],
    variables: Any,
    batches: Batch,
    counts: Array,
) -> Sums:
    """Return sums over examples.

    Args:
      predict: gives the logits of a batch of images; see `Network.predict`.
      variables: what `predict` takes.
      batches: images and labels with a leading axis of batches, `[T, N, ...]`.
      counts: booleans `[T, N]`; False leaves an example out, such as padding.
    """

    def add_batch(total: Sums, batch: tuple[Batch, Array]) -> tuple[Sums, None]:
        (images, labels), counts = batch
        logits = predict(variables, images)
        of_examples = losses(logits, labels)
        correct = logits.argmax(-1) == labels
        # A product would make NaN of 0 times the loss of padding that overflows.
        added = Sums(
            jnp.sum(jnp.where(counts, of_examples, 0)),
            jnp.sum(correct & counts, dtype=jnp.int32),
        )
        return jax.tree.map(jnp.add, total, added), None

    zero = Sums(jnp.zeros(()), jnp.zeros((), jnp.int32))
    total, _ = lax.scan(add_batch, zero, (batches, counts))
    return total
