"""The streams of random numbers of a run, apart from one another by their keys."""

from __future__ import annotations

import enum

import jax
from jax import Array


class Stream(enum.IntEnum):
    """What random numbers of a run are drawn for."""

    WEIGHTS = 0
    ORDER = 1  # of the examples
    DROPOUT = 2
    AUGMENTATION = 3
    TRAINED = 4  # the parameters that `trained=random` chooses


def key_of(seed: int | Array, stream: Stream) -> Array:
    """Return the key of a stream of the run with a seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)
