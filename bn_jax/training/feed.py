"""The batches of a run: stored on the device with their order, or streamed to it.

The order is decided by the seed alone, so that a data set in the devices' memory, one
that is streamed to them, and the parts that several processes read are the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from bn_jax import data as data_lib


class Batch(NamedTuple):
    """Images and labels; a whole data set is one, too."""

    images: Array  # shape [N, H, W, C], uint8
    labels: Array  # shape [N], int32


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


class Call(NamedTuple):
    """Steps that are taken in one call of the compiled loop, all of one epoch."""

    first: int  # number of steps taken before, over all epochs
    stop: int  # number of steps taken after


def calls(
    first: int,
    last: int,
    *,
    max_steps: int,
    steps_per_epoch: int,
    checkpoint_steps: int | None,
) -> list[Call]:
    """Return the calls from step `first` to `last`.

    Args:
      first: number of steps taken so far.
      last: number of steps of the run.
      max_steps: of a call.
      steps_per_epoch: no call goes beyond the end of its epoch.
      checkpoint_steps: likewise beyond a multiple of this.
    """
    planned = []
    while first < last:
        stop = min(last, first + max_steps)
        for period in (steps_per_epoch, checkpoint_steps):
            if period is not None:
                stop = min(stop, (first // period + 1) * period)
        planned.append(Call(first, stop))
        first = stop
    return planned


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


class Order:
    """The examples of each step, `[steps_per_epoch, batch_size]` an epoch.

    Args:
      key: decides the order.
      num_examples: of the data set.
      batch_size: examples a step, over all devices.
    """

    def __init__(self, key: jax.Array, *, num_examples: int, batch_size: int) -> None:
        self.steps_per_epoch = num_examples // batch_size
        self._key = key
        order = functools.partial(
            epoch_order, num_examples=num_examples, batch_size=batch_size
        )
        self._order = jax.jit(order)
        self.of_epoch = functools.lru_cache(maxsize=2)(self._of_epoch)

    def _of_epoch(self, epoch: int) -> np.ndarray:
        return np.asarray(self._order(jax.random.fold_in(self._key, epoch + 1)))


class _Chunks:
    """The batches of each call, as a source that Grain reads at random."""

    def __init__(
        self,
        split: data_lib.Split,
        order: Order,
        planned: list[Call],
        columns: slice,
        max_steps: int,
    ) -> None:
        self._split, self._order = split, order
        self._planned, self._columns = planned, columns
        self._max_steps = max_steps

    def __len__(self) -> int:
        return len(self._planned)

    def __getitem__(self, i: int) -> Batch:
        first, stop = self._planned[i]
        epoch, start = divmod(first, self._order.steps_per_epoch)
        steps = slice(start, start + stop - first)
        rows = self._order.of_epoch(epoch)[steps, self._columns]
        padding = ((0, self._max_steps - len(rows)), (0, 0))  # steps that are not taken
        rows = np.pad(rows, padding, mode="edge")
        return Batch(self._split.images[rows], self._split.labels[rows])


def stream(
    split: data_lib.Split,
    order: Order,
    planned: list[Call],
    *,
    columns: slice,
    max_steps: int,
) -> Iterator[Batch]:
    """Yield the batches of each call, read ahead by other threads.

    Args:
      split: the data set; memory-mapped, it is read where it is needed.
      order: of its examples.
      planned: the calls.
      columns: part of each batch that this process reads.
      max_steps: of a call.

    Yields:
      Batches with a leading axis of `max_steps`.
    """
    import grain  # here, because it takes a second to import

    source = grain.MapDataset.source(_Chunks(split, order, planned, columns, max_steps))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    yield from source.to_iter_dataset(options)
