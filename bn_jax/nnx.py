"""`BatchNorm` for Flax NNX: a thin module on `bn_jax.batch_norm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes
from jax import Array, lax

from bn_jax import moments as moments_lib
from bn_jax.functional import BatchNormParams, BatchNormState, batch_norm


class BatchNorm(nnx.Module):
    """Batch normalisation, drop-in for `flax.nnx.BatchNorm`.

    Parameters, defaults, variables (`scale` and `bias` of `nnx.Param`, `mean` and `var`
    of `nnx.BatchStat`) and results are Flax's, so that a swapped import changes no
    number and checkpoints move either way. Results differ, beyond 1e-5, only where
    Flax's are wrong:

    - Flax's default variance, E[x^2] - E[x]^2, loses its digits where the mean is large
      beside the deviation; ours holds to |mean| / deviation of 1e4 in float32.
    - In evaluation Flax rounds the running averages to `dtype`: with bfloat16 a mean of
      259 becomes 260. Ours never leave float32, and only the result is rounded.
    - Across an axis, Flax averages the instances' means and mean squares whatever their
      masks hold; ours weighs each instance by its count.
    - A batch that is masked out whole gives NaN in Flax; ours is normalised by the
      running averages and leaves them as they are.
    - A NaN that is masked out makes Flax's gradients NaN; ours stay finite.
    - Of complex inputs Flax keeps the real part of the mean; ours is complex.
    - Running averages that someone cast to half precision freeze in Flax where momentum
      is near 1; ours refuse to train so, and evaluate in float32.

    Attributes are the parameters, and may be set later: `use_running_average` by
    `train`, `eval`, `set_attributes` and `nnx.view`, too.

    Args:
      num_features: C, the size of the feature axis.
      use_running_average: True normalises by the running averages (prediction), False
        by the batch (training). What is given in the call goes before it.
      axis: the feature axis; all others are normalised over.
      momentum: weight of the OLD average in the running averages.
      epsilon: added to the variance.
      dtype: of the result (default: that of input, parameters and running averages,
        promoted, so float32 or wider). Input and parameters are cast to it first.
      param_dtype: of scale and bias.
      use_bias: whether a bias (beta) is added.
      use_scale: whether the result is multiplied by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name (or tuple of names) of the mapped axes that share statistics.
        It need not be bound while the module is made.
      axis_index_groups: partition of that axis into groups that share statistics.
      use_fast_variance: accepted for Flax's sake; the variance is computed in the one
        way that is both fast and accurate.
      promote_dtype: function of a tuple (input, mean, var, scale, bias) and a keyword
        `dtype` that returns them cast to the dtype to compute in. What it returns for
        mean and var is not used.
      rngs: source of the keys for the initializers.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `bn_jax.batch_norm`.
      batch_axis: axis of the examples; ghost batches are cut along it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bn_jax.nnx import BatchNorm
      >>> layer = BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0]])).round(3).ravel().tolist()
      [-1.0, 1.0]
      >>> layer.mean[...].round(3).tolist()
      [0.20000000298023224]
      >>> layer.eval()
      >>> layer(layer.mean[...][None]).tolist()
      [[0.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: nnx.Initializer = initializers.zeros,
        scale_init: nnx.Initializer = initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        ghost_batch_size: int | None = None,
        batch_axis: int = 0,
    ) -> None:
        shape = (num_features,)

        def param(
            used: bool, initializer: nnx.Initializer, metadata: Mapping[str, Any]
        ) -> nnx.Param[Array] | None:
            if not used:
                # Data, not a static attribute, as in Flax: the structures are the same.
                return nnx.data(None)
            return nnx.Param(initializer(rngs.params(), shape, param_dtype), **metadata)

        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        # Scale before bias, as in Flax: each draws a key.
        self.scale = param(use_scale, scale_init, scale_metadata)
        self.bias = param(use_bias, bias_init, bias_metadata)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.ghost_batch_size = ghost_batch_size
        self.batch_axis = batch_axis

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        update_average: bool | None = None,
    ) -> Array:
        """Normalise `x`.

        Args:
          x: array with the features on `axis`; of rank 1 it is one example.
          use_running_average: goes before the attribute.
          mask: booleans that broadcast to `x`; False leaves a value out of the
            statistics (it is normalised all the same).
          weights: real, non-negative weights in the statistics, as `measure` takes
            them; given instead of `mask`.
          update_average: whether the running averages move; by default where the batch
            normalises.

        Returns:
          Array of x's shape, in `dtype`.

        Raises:
          ValueError: if `use_running_average` is given nowhere, both mask and weights
            are given, or as `bn_jax.batch_norm` says.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is given nowhere; pass it to BatchNorm or to the "
                "call, or set it with train(), eval() or nnx.view"
            )
        if update_average is None:
            update_average = not use_running_average
        state = BatchNormState(self.mean[...], self.var[...])
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        x, _, _, scale, bias = self.promote_dtype(
            (x, *state, scale, bias), dtype=self.dtype
        )
        if not update_average:
            state = jax.tree.map(_widened, state)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        shape = x.shape
        axes = moments_lib.feature_axes(x.ndim, self.axis)
        if mask is not None:
            if weights is not None:
                raise ValueError("mask and weights are both given; give one of them")
            mask = jnp.asarray(mask, bool)
            weights = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
        if x.ndim == 1:  # an example by itself, as vmap hands it on
            x, axes = x[None], (1,)
            weights = None if weights is None else jnp.asarray(weights)[None]

        y, state = batch_norm(
            _widened(x),  # so that the result is rounded once, to dtype
            BatchNormParams(scale, bias),
            state,
            train=not use_running_average,
            update_state=update_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            feature_axis=axes,
            weights=weights,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            ghost_batch_size=self.ghost_batch_size,
            batch_axis=self.batch_axis,
        )
        if update_average:
            # No gradient, as in Flax: the variables outlive the differentiated call.
            # The mean of complex inputs is complex, which [...] = would cast to real.
            self.mean.set_value(lax.stop_gradient(state.mean))
            self.var.set_value(lax.stop_gradient(state.var))
        return y.astype(dtype).reshape(shape)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set what `nnx.view` changes in a copy of a model.

        Args:
          use_running_average: True normalises by the running averages, False by the
            batch; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _widened(x: Array) -> Array:
    return x.astype(moments_lib.statistics_dtype(x.dtype))
