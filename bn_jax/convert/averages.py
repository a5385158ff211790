"""Momenta and moving variances of one library as another means them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bn_jax.averages import BatchNormState, cumulative_momentum
from bn_jax.convert.layer import BatchNormLayer
from bn_jax.moments import Moments


def momentum_from_torch(
    momentum: float | None, num_batches: ArrayLike | None = None
) -> float | Array:
    """Return bn_jax's momentum, the weight of the OLD average, for PyTorch's.

    Args:
      momentum: PyTorch's, the weight of the new value; None averages all batches.
      num_batches: number of batches in the old average; for momentum None alone.

    Raises:
      ValueError: if momentum is outside [0, 1], or None without num_batches.

    Examples:
      >>> momentum_from_torch(0.1)
      0.9
    """
    if momentum is not None:
        return _complement(momentum, "PyTorch's weight of the new value")
    if num_batches is None:
        raise ValueError(
            "momentum=None, PyTorch's average of all batches, needs num_batches: give "
            "the layer's num_batches_tracked"
        )
    return cumulative_momentum(num_batches)


def momentum_to_torch(momentum: float) -> float:
    """Return PyTorch's momentum, the weight of the new value, for bn_jax's.

    Args:
      momentum: bn_jax's, the weight of the OLD average. What `cumulative_momentum`
        gives step by step is PyTorch's momentum None.

    Raises:
      ValueError: if momentum is outside [0, 1].
    """
    return _complement(momentum, "bn_jax's weight of the old average")


def unbiased(moments: Moments) -> Moments:
    """Return moments with the variance that PyTorch averages: over n - 1, not n.

    Args:
      moments: of a batch. Of a single value, which PyTorch refuses, the variance stays.
    """
    n = moments.count
    ratio = jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), 1)
    return moments._replace(var=moments.var * ratio)


def biased_average(state: BatchNormState, *, values_per_feature: int) -> BatchNormState:
    """Return PyTorch's averages as bn_jax would have them, of biased variances.

    Exact where every batch had the same number of values, but for the weight of the
    variance's initial 1, which is scaled along.

    Args:
      state: with PyTorch's running_var, of variances over n - 1.
      values_per_feature: n, number of values of a feature in a batch, at least 2: the
        batch size, times height and width for images.

    Raises:
      ValueError: if there are fewer than 2 values.
    """
    n = _check_values(values_per_feature)
    return state._replace(var=state.var * ((n - 1) / n))


def unbiased_average(
    state: BatchNormState, *, values_per_feature: int
) -> BatchNormState:
    """Return bn_jax's averages as PyTorch would have them; undoes `biased_average`.

    Args:
      state: with bn_jax's average of biased variances.
      values_per_feature: see `biased_average`.

    Raises:
      ValueError: if there are fewer than 2 values.
    """
    n = _check_values(values_per_feature)
    return state._replace(var=state.var * (n / (n - 1)))


def without_equinox_excess(layer: BatchNormLayer, *, momentum: float) -> BatchNormLayer:
    r"""Return a layer of Equinox's mode "batch" with the variance that it meant.

    Equinox 0.13 starts that average at 1, and divides it by $1 - m^t$ as if it had
    started at 0. What it predicts by is too large by $m^t / (1 - m^t)$: by 99 after the
    first batch with m = 0.99, by 0.58 after 100.

    Args:
      layer: as `from_equinox` returns it, trained in Equinox from its initial state.
      momentum: m, weight of the OLD average, of the layer.

    Raises:
      ValueError: if the number of batches is not known.
    """
    if layer.num_batches is None:
        raise ValueError(
            "num_batches is None; expected that of a layer of Equinox's mode 'batch': "
            "set it by layer._replace(num_batches=...)"
        )
    if layer.num_batches == 0:
        return layer
    excess = 1 / debias(momentum, layer.num_batches) - 1
    return layer._replace(state=layer.state._replace(var=layer.state.var - excess))


def debias(momentum: float, num_batches: int) -> float:
    """Return 1 - momentum**num_batches, for the momentum that float32 rounds to.

    The libraries compute in float32: for a momentum near 1, 1 - momentum differs by
    more than the tolerance of a conversion.
    """
    return 1 - float(np.float32(momentum)) ** num_batches


def _check_values(values_per_feature: int) -> int:
    if values_per_feature < 2:
        raise ValueError(
            f"values_per_feature={values_per_feature!r}; expected at least 2, the "
            "batch size times height and width; a variance over n - 1 = 0 is undefined"
        )
    return values_per_feature


def _complement(momentum: float, meaning: str) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum!r}; expected {meaning}, in [0, 1]")
    return 1 - momentum
