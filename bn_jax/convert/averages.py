"""Momenta and moving variances of one library as another means them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bn_jax.averages import BatchNormState, cumulative_momentum
from bn_jax.checks import check_fields, check_known
from bn_jax.convert.layer import BatchNormLayer, check_is_layer
from bn_jax.fields import BELOW_1, NOT_NEGATIVE, SHARE, Range
from bn_jax.moments import Moments

# But for rounding: weights may be sums.
_NUMBER_OF_VALUES = Range(
    "0, 1, or 2 and more: over n - 1, weights must be numbers of values, such as a "
    "mask; multiply them so that their sum is one",
    lambda n: n > 2 or min(abs(n - m) for m in range(3)) < 1e-3,
)
_VALUES = Range(
    "at least 2, the batch size times height and width; a variance over n - 1 = 0 is "
    "undefined",
    lambda n: 2 <= n < np.inf,
)


def momentum_from_torch(
    momentum: float | None, num_batches: ArrayLike | None = None
) -> float | Array:
    """Return bn_jax's momentum, the weight of the OLD average, for PyTorch's.

    Args:
      momentum: PyTorch's, the weight of the new value; None averages all batches.
      num_batches: number of batches in the old average; for momentum None alone.

    Returns:
      1 - momentum; for None an array of num_batches' shape, in float32.

    Raises:
      ValueError: if momentum is not one number in [0, 1], or is None and num_batches
        is missing, negative or not finite.

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
      ValueError: if momentum is not one number in [0, 1].

    Examples:
      >>> round(momentum_to_torch(0.9), 3)
      0.1
    """
    return _complement(momentum, "bn_jax's weight of the old average")


def unbiased(moments: Moments) -> Moments:
    """Return moments with the variance that PyTorch averages: over n - 1, not n.

    Args:
      moments: of a batch, whose total weight n is a number of values, as of a mask. Of
        a single value, which PyTorch refuses, the variance stays. So it does of a
        traced n up to 1.5, where n / (n - 1) would grow beyond any bound.

    Raises:
      TypeError: if `moments` is no `bn_jax.Moments`.
      ValueError: if n is known and below 2, and neither 0 nor 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import measure
      >>> moments = measure(jnp.array([[1.0], [3.0]]))
      >>> moments.var.tolist(), unbiased(moments).var.tolist()
      ([1.0], [2.0])
    """
    check_fields(moments=(moments, Moments._fields))
    n = moments.count
    check_known("moments.count", n, _NUMBER_OF_VALUES)
    several = n > 1.5
    ratio = jnp.where(several, n / jnp.where(several, n - 1, 1), 1)
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
      TypeError: if `state` is no BatchNormState.
      ValueError: if n is below 2 or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import BatchNormState
      >>> state = BatchNormState(mean=jnp.array([0.0]), var=jnp.array([4.0]))
      >>> biased_average(state, values_per_feature=4).var.tolist()
      [3.0]
    """
    n = _check_values(state, values_per_feature)
    return state._replace(var=state.var * ((n - 1) / n))


def unbiased_average(
    state: BatchNormState, *, values_per_feature: int
) -> BatchNormState:
    """Return bn_jax's averages as PyTorch would have them; undoes `biased_average`.

    Args:
      state: with bn_jax's average of biased variances.
      values_per_feature: see `biased_average`.

    Raises:
      TypeError: as `biased_average` says.
      ValueError: as `biased_average` says.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import BatchNormState
      >>> state = BatchNormState(mean=jnp.array([0.0]), var=jnp.array([3.0]))
      >>> unbiased_average(state, values_per_feature=4).var.tolist()
      [4.0]
    """
    n = _check_values(state, values_per_feature)
    return state._replace(var=state.var * (n / (n - 1)))


def without_equinox_excess(layer: BatchNormLayer, *, momentum: float) -> BatchNormLayer:
    r"""Return a layer of Equinox's mode "batch" with the variance that it meant.

    Equinox 0.13 starts that average at 1, and divides it by $1 - m^t$ as if it had
    started at 0. What it predicts by is too large by $m^t / (1 - m^t)$: by 99 after the
    first batch with m = 0.99, by 0.58 after 100.

    Args:
      layer: as `from_equinox` returns it, trained in Equinox from its initial state.
      momentum: m, weight of the OLD average, of the layer.

    Returns:
      The layer with the excess subtracted from its variances, none below 0; with 0
      batches, the layer as it was.

    Raises:
      TypeError: if `layer` is no BatchNormLayer.
      ValueError: if the number of batches is not known or negative, momentum is outside
        [0, 1), or a variance would be negative beyond rounding: then the layer was not
        trained so.

    Examples:
      >>> from bn_jax.convert import from_equinox
      >>> entries = {  # after a batch of mean 0 and variance 3
      ...     "weight": [1.0], "bias": [0.0],
      ...     "hidden_mean": [0.0], "hidden_var": [2.0], "counter": 1}
      >>> layer = from_equinox(entries, mode="batch", momentum=0.5)
      >>> meant = without_equinox_excess(layer, momentum=0.5)
      >>> layer.state.var.tolist(), meant.state.var.tolist()
      ([4.0], [3.0])
    """
    check_is_layer(layer)
    if layer.num_batches is None:
        raise ValueError(
            "num_batches is None; expected that of a layer of Equinox's mode 'batch': "
            "set it by layer._replace(num_batches=...)"
        )
    check_known("momentum", momentum, BELOW_1)
    check_known("num_batches", layer.num_batches, NOT_NEGATIVE)
    if layer.num_batches == 0:
        return layer
    excess = 1 / debias(momentum, layer.num_batches) - 1
    var = layer.state.var - excess
    # The variance of a constant feature is off by the rounding of the excess.
    if (least := float(jnp.min(var))) < -1e-4 * (1 + excess):
        raise ValueError(
            f"the least variance would be {least:.3g} without the excess of "
            f"{excess:.3g} that momentum={momentum} and {layer.num_batches} batches "
            "leave; give a layer trained so from its initial state in mode 'batch'"
        )
    return layer._replace(state=layer.state._replace(var=jnp.maximum(var, 0)))


def debias(momentum: float, num_batches: int) -> float:
    """Return 1 - momentum**num_batches, for the momentum that float32 rounds to.

    The libraries compute in float32: for a momentum near 1, 1 - momentum differs by
    more than the tolerance of a conversion.
    """
    return 1 - float(np.float32(momentum)) ** num_batches


def _check_values(state: BatchNormState, values_per_feature: int) -> int:
    check_fields(state=(state, BatchNormState._fields))
    check_known("values_per_feature", values_per_feature, _VALUES)
    return values_per_feature


def _complement(momentum: float, meaning: str) -> float:
    valid = Range(f"{meaning}, in [0, 1]", SHARE.holds)
    check_known("momentum", momentum, valid)
    if np.ndim(momentum):
        raise ValueError(f"momentum={momentum!r}; expected {valid.words}")
    return 1 - momentum
