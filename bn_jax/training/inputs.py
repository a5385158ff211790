"""How a model's inputs are scaled, by name: `[N, H, W, C]` bytes become floats.

What scales the inputs is a hashable function of the images, so that it may be a static
argument of a compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bn_jax.names import Table

Scaling: TypeAlias = Callable[[Array], Array]


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of a training set, of bytes / 255."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def make(text: str, statistics: ChannelStatistics | None) -> Scaling:
    """Return the function that scales images.

    Args:
      text: a name of `INPUTS`.
      statistics: of the training set; `standardised` alone needs them.
    """
    return INPUTS.make(text, statistics=statistics)


def to_unit(images: Array) -> Array:
    """Return bytes as numbers in [0, 1], in JAX's default float dtype.

    Raises:
      ValueError: if images are not integers.
    """
    return to_float(images) / 255


def to_float(images: Array) -> Array:
    """Return bytes as numbers from 0 to 255, in JAX's default float dtype.

    Raises:
      ValueError: if images are not integers.
    """
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(
            f"images of dtype {images.dtype}; expected bytes, 0 to 255, which the "
            "network scales itself; for images that are scaled already give its "
            "model, network.model, in place of the network"
        )
    return images.astype(jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Standardise:
    """Subtract each channel's mean and divide by its deviation.

    A channel that is the same everywhere, whose deviation is 0, becomes 0.
    """

    statistics: ChannelStatistics

    def __call__(self, images: Array) -> Array:
        """Return standardised images, in JAX's default float dtype."""
        mean, deviation = map(np.asarray, self.statistics)
        x = to_unit(images)
        return (x - mean.astype(x.dtype)) / np.where(
            deviation > 0, deviation, 1
        ).astype(x.dtype)


def unit(*, statistics: ChannelStatistics | None) -> Scaling:
    """Divide by 255."""
    del statistics
    return to_unit


def none(*, statistics: ChannelStatistics | None) -> Scaling:
    """Leave the values from 0 to 255."""
    del statistics
    return to_float


def standardised(*, statistics: ChannelStatistics | None) -> Scaling:
    """Standardise each channel by the training set's mean and deviation."""
    assert statistics is not None, "standardised inputs without their statistics"
    return Standardise(statistics)


def norm(*, statistics: ChannelStatistics | None) -> Scaling:
    """Divide by 255; the model then starts with a norm, see `NormalisedInput`."""
    del statistics
    return to_unit


INPUTS: Table[Scaling] = Table(
    "inputs", {"unit": unit, "none": none, "standardised": standardised, "norm": norm}
)


class NormalisedInput(nn.Module):
    """A model with a norm on its input.

    The model's parameters keep their paths and their initial values, and those of the
    norm are beside them, under `input_norm`.

    Attributes:
      model: called as `model(images, train=...)`.
      norm: constructor, called as
        `norm(use_running_average=..., axis=..., batch_axis=..., name=...)`.
    """

    model: nn.Module
    norm: Callable[..., nn.Module]

    def setup(self) -> None:
        """Give the model's variables to this module."""
        nn.share_scope(self, self.model)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Any:
        """Return the model's outputs for normalised images.

        Args:
          images: floats `[N, H, W, C]`.
          train: whether norms use the batch's statistics.
        """
        input_norm = self.norm(
            use_running_average=not train, axis=-1, batch_axis=0, name="input_norm"
        )
        return self.model(input_norm(images), train=train)
