"""`BatchNorm` for Flax Linen: a thin module on `bn_jax.batch_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax import moments as moments_lib
from bn_jax.functional import (
    BatchNormParams,
    BatchNormState,
    batch_norm,
    normalize,
)


class BatchNorm(nn.Module):
    """Batch normalisation, drop-in for `flax.linen.BatchNorm`.

    Attributes, defaults, collections (`params{scale,bias}`, `batch_stats{mean,var}`)
    and results are Flax's, so that a swapped import changes no number and checkpoints
    move either way. Results differ, beyond 1e-5, only where Flax's are wrong:

    - Flax's default variance, E[x^2] - E[x]^2, loses its digits where the mean is large
      beside the deviation; ours holds to |mean| / deviation of 1e4 in float32.
    - Across an axis, Flax averages the instances' means and mean squares whatever their
      masks hold; ours weighs each instance by its count.
    - A batch that is masked out whole gives NaN in Flax; ours is normalised by the
      running averages and leaves them as they are.
    - Statistics are in float32 or wider whatever the options say.

    Attributes:
      use_running_average: True normalises by the running averages (prediction), False
        by the batch (training). Given here or in the call.
      axis: the feature axis, or several; all others are normalised over.
      momentum: weight of the OLD average in the running averages.
      epsilon: added to the variance.
      dtype: of the result (default: that of input and parameters, promoted).
      param_dtype: of scale and bias.
      use_bias: whether a bias (beta) is added.
      use_scale: whether the result is multiplied by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name (or tuple of names) of the mapped axes that share statistics.
        It need not be bound while the module is initialised.
      axis_index_groups: partition of that axis into groups that share statistics.
      use_fast_variance: accepted for Flax's sake; the variance is computed in the one
        way that is both fast and accurate.
      force_float32_reductions: accepted for Flax's sake; taken as True.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalise `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`.
          use_running_average: as the attribute; given in one place, not in both.
          mask: booleans that broadcast to `x`; False leaves a value out of the
            statistics (it is normalised all the same).

        Returns:
          Array of x's shape, in `dtype`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        moments_lib.check_input(x, self.axis)
        axes = moments_lib.feature_axes(x.ndim, self.axis)
        shape = tuple(x.shape[a] for a in axes)
        state_dtype = moments_lib.statistics_dtype(x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, state_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, state_dtype)
        params = BatchNormParams(
            scale=self._param("scale", self.scale_init, shape, self.use_scale),
            bias=self._param("bias", self.bias_init, shape, self.use_bias),
        )
        dtype = nn.dtypes.canonicalize_dtype(x, *params, dtype=self.dtype)
        weights = None
        if mask is not None:
            mask = jnp.asarray(mask, bool)
            weights = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)

        x = x.astype(state_dtype)
        if self.is_initializing() and not use_running_average:
            # No collective, no average moved, no warning of a dummy batch of one.
            batch = moments_lib.measure(x, feature_axis=self.axis, weights=weights)
            y = normalize(
                x,
                batch.mean,
                batch.var,
                params,
                epsilon=self.epsilon,
                feature_axis=self.axis,
            )
            return y.astype(dtype)
        y, state = batch_norm(
            x,
            params,
            BatchNormState(mean.value, var.value),
            train=not use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            weights=weights,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        if not use_running_average:
            mean.value, var.value = state
        return y.astype(dtype)

    def _param(
        self,
        name: str,
        initializer: initializers.Initializer,
        shape: tuple[int, ...],
        used: bool,
    ) -> Array | None:
        return self.param(name, initializer, shape, self.param_dtype) if used else None
