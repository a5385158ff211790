"""`BatchNorm` for Flax Linen: a thin module on `bn_jax.batch_norm`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen import initializers
from jax import Array, lax

from bn_jax import moments as moments_lib
from bn_jax.functional import (
    BatchNormParams,
    BatchNormState,
    batch_norm,
    cumulative_momentum,
    debiased_momentum,
    normalize,
)
from bn_jax.moments import Moments
from bn_jax.variants.renorm import batch_renorm


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

    What normalises, whether the averages move, and whether scale and bias learn are
    three choices: `use_running_average`, `update_average` in the call, and an optimizer
    masked by `norm_param_mask`.

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
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `bn_jax.batch_norm`.
      batch_axis: axis of the examples; ghost batches are cut along it.
      average: "exponential", with `momentum`; "debiased", the same without the weight
        of the initial mean 0 and variance 1; or "cumulative", the mean over all
        batches. The last two keep the number of batches as `count` in `batch_stats`.
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
    ghost_batch_size: int | None = None
    batch_axis: int = 0
    average: Literal["exponential", "debiased", "cumulative"] = "exponential"

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        update_average: bool | None = None,
        statistics: BatchNormState | Moments | None = None,
        renorm_limits: tuple[Any, Any] | None = None,
    ) -> Array:
        """Normalise `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`; or of rank 1, one
            example of a batch mapped by `jax.vmap`. Integers are promoted to float32.
          use_running_average: as the attribute; given in one place, not in both.
          mask: booleans that broadcast to `x`; False leaves a value out of the
            statistics (it is normalised all the same).
          weights: real, non-negative weights in the statistics, as `measure` takes
            them; given instead of `mask`.
          update_average: whether the running averages move; by default where the batch
            normalises.
          statistics: normalise by these instead.
          renorm_limits: `(r_max, d_max)` makes training batch renormalisation; see
            `bn_jax.variants.renorm`, whose `limits` gives them for a step.

        Returns:
          Array of x's shape, in `dtype`.

        Raises:
          ValueError: if both mask and weights are given, `average` is unknown, or as
            `bn_jax.batch_norm` says.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        given = jnp.asarray(x)
        # Integers, too, as in Flax.
        state_dtype = moments_lib.statistics_dtype(given.dtype)
        x = given.astype(state_dtype)
        axis = self.axis
        is_example = x.ndim == 1  # one of a vmapped batch: a batch of its own
        if is_example:
            x, axis = x[None], -1
        moments_lib.check_input(x, axis)
        axes = moments_lib.feature_axes(x.ndim, axis)
        shape = tuple(x.shape[a] for a in axes)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, state_dtype)
        var = self.variable(
            "batch_stats", "var", jnp.ones, shape, jnp.finfo(state_dtype).dtype
        )
        momentum, count = self._momentum()
        params = BatchNormParams(
            scale=self._param("scale", self.scale_init, shape, self.use_scale),
            bias=self._param("bias", self.bias_init, shape, self.use_bias),
        )
        dtype = nn.dtypes.canonicalize_dtype(given, *params, dtype=self.dtype)
        if mask is not None:
            if weights is not None:
                raise ValueError("mask and weights are both given; give one of them")
            mask = jnp.asarray(mask, bool)
            weights = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)

        if self.is_initializing() and not use_running_average:
            # No collective, no average moved, no warning of a dummy batch of one.
            batch = moments_lib.measure(x, feature_axis=axis, weights=weights)
            y = normalize(
                x,
                batch.mean,
                batch.var,
                params,
                epsilon=self.epsilon,
                feature_axis=axis,
            )
            return (y[0] if is_example else y).astype(dtype)
        if update_average is None:
            update_average = not use_running_average
        if renorm_limits is None:
            transform: Callable[..., tuple[Array, BatchNormState]] = functools.partial(
                batch_norm,
                ghost_batch_size=self.ghost_batch_size,
                batch_axis=self.batch_axis,
                statistics=statistics,
                update_state=update_average,
            )
        elif self.ghost_batch_size is None and statistics is None:
            r_max, d_max = renorm_limits
            transform = functools.partial(
                batch_renorm, r_max=r_max, d_max=d_max, update_state=update_average
            )
        else:
            raise ValueError(
                "batch renormalisation has neither ghost batches nor given statistics; "
                "leave out renorm_limits, or ghost_batch_size and statistics"
            )
        y, state = transform(
            x,
            params,
            BatchNormState(mean.value, var.value),
            train=not use_running_average,
            momentum=momentum,
            epsilon=self.epsilon,
            feature_axis=axis,
            weights=weights,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        if update_average:
            mean.value, var.value = state
            if count is not None:
                count.value += self._present(weights)
        return (y[0] if is_example else y).astype(dtype)

    def _present(self, weights: Array | None) -> Array | int:
        """Return 1 if the batch, over all instances along the axis, weighs anything."""
        if weights is None:
            return 1
        present = jnp.any(jnp.asarray(weights) > 0).astype(jnp.float32)
        if self.axis_name is None:
            return present
        return lax.pmax(
            present, self.axis_name, axis_index_groups=self.axis_index_groups
        )

    def _momentum(self) -> tuple[float | Array, nn.Variable | None]:
        """Return the weight of the old average, and the counter that decides it."""
        if self.average == "exponential":
            return self.momentum, None
        if self.average not in ("debiased", "cumulative"):
            raise ValueError(
                f"average={self.average!r}; expected exponential, debiased or "
                "cumulative"
            )
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.float32)
        if self.average == "debiased":
            return debiased_momentum(self.momentum, count.value), count
        return cumulative_momentum(count.value), count

    def _param(
        self,
        name: str,
        initializer: initializers.Initializer,
        shape: tuple[int, ...],
        used: bool,
    ) -> Array | None:
        return self.param(name, initializer, shape, self.param_dtype) if used else None


class BatchRenorm(BatchNorm):
    """Batch renormalisation with constant limits; see `bn_jax.variants.renorm`.

    Limits that rise over training, as in the paper, are given to `BatchNorm` in the
    call, `renorm_limits`.

    Attributes:
      r_max: largest correction of the deviation, at least 1.
      d_max: largest correction of the mean, in deviations, at least 0.

    References:
      Ioffe, 2017, "Batch Renormalization", arXiv:1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    def __call__(
        self, x: Array, use_running_average: bool | None = None, **options: Any
    ) -> Array:
        """Normalise `x`; arguments are those of `BatchNorm` but `renorm_limits`."""
        limits = (self.r_max, self.d_max)
        return super().__call__(x, use_running_average, renorm_limits=limits, **options)


def norm_param_mask(variables: Any) -> Any:
    """Return a tree of booleans: True at the scale and bias of normalisation layers.

    With `optax.masked` it freezes them or singles them out, as in
    `optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask))`.

    Args:
      variables: of a model; layers that hold batch statistics count as normalisation.

    Returns:
      A tree like `variables["params"]`.
    """
    params = traverse_util.flatten_dict(variables["params"])
    statistics = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    layers = {path[:-1] for path in statistics}
    return traverse_util.unflatten_dict({path: path[:-1] in layers for path in params})
