"""Loss and accuracy on a data set, with all devices, each example counted once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax import data as data_lib
from bn_jax.training import parallel
from bn_jax.training.feed import Batch
from bn_jax.training.losses import losses

# Large enough to amortise a step's overhead; activations of 500 images stay in cache.
BATCH_SIZE = 500
# What is on the devices at a time of a data set that does not fit.
_PART_SIZE = 2**16


class Evaluation(NamedTuple):
    """Means over the examples of a data set."""

    loss: float  # cross-entropy in nats
    accuracy: float  # share of examples whose largest logit is the label's


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
    """Return the summed loss of examples, and how many are classified rightly.

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


class Evaluator:
    """Evaluates variables on one data set.

    Args:
      predict: gives the logits of a batch of images, of variables and images.
      split: the data set, with at least one example.
      devices: of all processes; each takes an equal part.
      stored: whether the data set stays in the devices' memory; else it is sent there
        in parts at each evaluation.
      batch_size: examples at a time on a device; it does not change the result.
    """

    def __init__(
        self,
        predict: Callable[[Any, Array], Array],
        split: data_lib.Split,
        *,
        devices: Sequence[jax.Device],
        stored: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        if not len(split.labels):
            raise ValueError("there are no examples to evaluate on; give at least one")
        self.compile_seconds = 0.0
        self._split, self._num_devices = split, len(devices)
        self._batch_size = batch_size
        mesh = jax.sharding.Mesh(np.array(devices), (parallel.DATA,))
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_column = NamedSharding(mesh, PartitionSpec(None, parallel.DATA))
        self._evaluate = jax.jit(
            functools.partial(evaluate, predict),
            out_shardings=self._replicated,
        )
        self._compiled: Any = None
        self._stored = list(self._parts()) if stored else None

    def __call__(self, variables: Any) -> Evaluation:
        """Return mean loss and accuracy over the data set.

        Args:
          variables: parameters and statistics, on the host or on one device.
        """
        placed = jax.tree.map(lambda v: parallel.put(v, self._replicated), variables)
        loss, correct = 0.0, 0
        for part in self._parts() if self._stored is None else self._stored:
            if self._compiled is None:
                started = time.perf_counter()
                with jax.set_mesh(self._mesh):  # convolutions look at it
                    self._compiled = self._evaluate.lower(placed, *part).compile()
                self.compile_seconds = time.perf_counter() - started
            sums = self._compiled(placed, *part)
            loss += float(sums.loss)
            correct += int(sums.correct)
        n = len(self._split.labels)
        return Evaluation(loss / n, correct / n)

    def _parts(self) -> Iterator[Any]:
        """Yield the data set in equal parts `[T, N, ...]`, the last one padded."""
        n = len(self._split.labels)
        size = -(-n // -(-n // _PART_SIZE))
        num_batches = -(-size // (self._batch_size * self._num_devices))
        columns = -(-size // (num_batches * self._num_devices)) * self._num_devices
        for i in range(0, n, size):
            part = data_lib.Split(*(array[i : i + size] for array in self._split))
            batches, counts = batched(part, num_batches, columns)
            yield jax.tree.map(
                lambda array: parallel.put(array, self._by_column), (batches, counts)
            )


def batched(
    split: data_lib.Split, num_batches: int, columns: int
) -> tuple[Batch, np.ndarray]:
    """Return examples as batches, and which of them count: all but the padding.

    Args:
      split: at most `num_batches * columns` examples.
      num_batches: T.
      columns: N, examples a batch.

    Returns:
      Images and labels `[T, N, ...]`, and booleans `[T, N]`.
    """

    def filled(array: np.ndarray) -> np.ndarray:
        padded = np.zeros((num_batches * columns, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        return padded.reshape(num_batches, columns, *array.shape[1:])

    counts = filled(np.ones(len(split.labels), bool))
    images: Any = filled(split.images)
    labels: Any = filled(split.labels)
    return Batch(images, labels), counts
