r"""Batch normalisation as a pure function with explicit state.

`batch_norm` is the composition of four steps, each public and usable alone: `measure`
the batch, `merge_across` devices, `normalize`, and `update_average`. It holds no state,
reads no global and compiles nothing: callers jit. It works under `jit`, `grad`, `jvp`,
`vmap`, `scan` and `checkpoint`, to derivatives of any order, in forward and in reverse
mode, as its gradients are those of the formula itself.

$$y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta$$
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import moments as moments_lib
from bn_jax.moments import AxisIndexGroups, Moments, measure, merge_across


class BatchNormParams(NamedTuple):
    """What training learns. Either may be None: then it is not applied."""

    scale: Array | None  # gamma, shape [C]
    bias: Array | None  # beta, shape [C]


class BatchNormState(NamedTuple):
    """The moving averages that prediction normalises by."""

    mean: Array  # shape [C], float32 or wider
    var: Array  # average of biased variances, shape [C], float32 or wider


def init(
    num_features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, BatchNormState]:
    """Return gamma 1, beta 0, moving mean 0 and moving variance 1.

    Args:
      num_features: C, or the shape of the feature axes where there are several.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.
    """
    shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)
    params = BatchNormParams(
        scale=jnp.ones(shape, dtype) if scale else None,
        bias=jnp.zeros(shape, dtype) if bias else None,
    )
    state_dtype = moments_lib.statistics_dtype(dtype)
    state = BatchNormState(jnp.zeros(shape, state_dtype), jnp.ones(shape, state_dtype))
    return params, state


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    params: BatchNormParams | None = None,
    *,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
) -> Array:
    """Standardise `x` by given statistics, then scale and shift.

    Args:
      x: array with the features on `feature_axis`.
      mean: per feature, shape `[C]`.
      var: per feature, shape `[C]`.
      params: gamma and beta of shape `[C]`, each or both None.
      epsilon: added to the variance, greater than 0.
      feature_axis: axis (or axes) of the features.

    Returns:
      Array of x's shape and dtype; the arithmetic is in float32 or wider.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype.
      ValueError: if a shape does not fit the features of `x`, or epsilon is not
        positive.
    """
    scale, bias = params or (None, None)
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    _check_features(x, feature_axis, mean=mean, var=var, scale=scale, bias=bias)
    if not isinstance(epsilon, jax.Array) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r}; expected a number greater than 0")
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)

    def spread(per_feature: Array) -> Array:
        return jnp.expand_dims(per_feature, axes)

    # x - mean first: folding the mean into the shift would cancel digits where it is
    # large beside the deviation.
    y = x.astype(moments_lib.statistics_dtype(x.dtype)) - spread(mean)
    multiplier = lax.rsqrt(var + epsilon)
    if scale is not None:
        multiplier = multiplier * scale
    y = y * spread(multiplier)
    if bias is not None:
        y = y + spread(bias)
    return y.astype(x.dtype)


def update_average(
    state: BatchNormState, moments: Moments, *, momentum: float = 0.9
) -> BatchNormState:
    """Return the moving averages after one more batch.

    Args:
      state: the averages so far.
      moments: of the batch. A batch of total weight 0 leaves the averages as they are.
      momentum: weight of the OLD average, in [0, 1]; the batch has 1 - momentum.

    Raises:
      ValueError: if momentum is outside [0, 1], or the state is narrower than float32.
    """
    if not isinstance(momentum, jax.Array) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum!r}; expected the weight of the old average, in [0, 1]"
        )

    _check_state(state)

    def moved(old: Array, new: Array) -> Array:
        average = momentum * old + (1 - momentum) * new
        return jnp.where(moments.count > 0, average, old).astype(old.dtype)

    return BatchNormState(
        moved(state.mean, moments.mean), moved(state.var, moments.var)
    )


def batch_norm(
    x: Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> tuple[Array, BatchNormState]:
    """Normalise by the batch in training, by the moving averages in prediction.

    Args:
      x: batch of shape `[N, C]`, `[N, H, W, C]`, `[N, C, H, W]` or any other of rank 2
        or more, of dtype float32, bfloat16, float16 or float64.
      params: gamma and beta, each of shape `[C]` or None.
      state: moving mean and variance, each of shape `[C]`.
      train: static. True normalises by the moments of `x` and returns updated
        averages; False normalises by `state` and returns it as it was.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      feature_axis: axis (or axes) of the features; all others are normalised over.
      weights: of the examples or positions in the statistics; see `measure`. A batch
        of total weight 0 is normalised by `state`, and a value of weight 0 that is not
        finite as if it were the mean, since NaN in y would spoil every gradient.
      axis_name: name (or tuple of names) of the mapped axes whose instances share
        their statistics; None uses those of `x` alone.
      axis_index_groups: partition of that axis into groups that share statistics.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state. The biased variance
      both normalises and is averaged.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype, or `train` is traced.
      ValueError: on a wrong rank, feature count, empty batch, weights, momentum,
        epsilon or axis name; the message says which.

    References:
      Ioffe and Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training
      by Reducing Internal Covariate Shift", arXiv:1502.03167.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import batch_norm, init
      >>> params, state = init(1)
      >>> y, state = batch_norm(jnp.array([[1.0], [3.0]]), params, state, train=True)
      >>> y.round(3).ravel().tolist(), state.mean.round(3).tolist()
      ([-1.0, 1.0], [0.20000000298023224])
    """
    if isinstance(train, jax.Array):
        raise TypeError(
            f"train must be a Python bool, known when the function is traced, but is "
            f"{train}; pass it through static_argnames or functools.partial"
        )
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    _check_features(x, feature_axis, mean=state.mean, var=state.var)
    _check_state(state)
    if not train:
        y = normalize(
            x,
            state.mean,
            state.var,
            params,
            epsilon=epsilon,
            feature_axis=feature_axis,
        )
        return y, state
    if x.size == 0:
        raise ValueError(
            f"x of shape {list(x.shape)} is empty; training mode needs at least one "
            "example: skip the batch, or pad it and give the padding weight 0"
        )
    moments = measure(x, feature_axis=feature_axis, weights=weights)
    if axis_name is not None:
        moments = merge_across(moments, axis_name, axis_index_groups)
    elif axis_index_groups is not None:
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} groups a mapped axis, but "
            "axis_name is None; give the axis's name too"
        )
    if weights is None:
        _warn_if_single(x, feature_axis, axis_name, axis_index_groups)

    present = moments.count > 0
    mean = jnp.where(present, moments.mean, state.mean)
    var = jnp.where(present, moments.var, state.var)
    dtype = x.dtype
    if weights is not None:
        w = moments_lib.align_weights(weights, x, feature_axis)
        axes = moments_lib.reduction_axes(x.ndim, feature_axis)
        used = (w > 0) | jnp.isfinite(x)
        x = jnp.where(used, x, jnp.expand_dims(mean, axes))
    y = normalize(x, mean, var, params, epsilon=epsilon, feature_axis=feature_axis)
    return y.astype(dtype), update_average(state, moments, momentum=momentum)


def _check_features(
    x: Array, feature_axis: int | Sequence[int], **per_feature: Array | None
) -> None:
    """Refuse parameters or statistics that do not fit the features of `x`."""
    axes = moments_lib.feature_axes(x.ndim, feature_axis)
    expected = tuple(x.shape[a] for a in axes)
    for name, value in per_feature.items():
        if value is not None and jnp.shape(value) != expected:
            raise ValueError(
                f"{name} has shape {list(jnp.shape(value))}, but x of shape "
                f"{list(x.shape)} has {list(expected)} features on feature_axis="
                f"{feature_axis!r}; make them with bn_jax.init("
                f"{expected[0] if len(expected) == 1 else expected}) or name the axis "
                "that holds the features"
            )


def _check_state(state: BatchNormState) -> None:
    """Refuse moving averages in a dtype that momentum near 1 would freeze."""
    for name, value in state._asdict().items():
        if value.dtype != moments_lib.statistics_dtype(value.dtype):
            raise ValueError(
                f"state.{name} has dtype {value.dtype}, too narrow to average in; keep "
                "it in float32, as bn_jax.init makes it"
            )


def _warn_if_single(
    x: Array,
    feature_axis: int | Sequence[int],
    axis_name: Hashable | tuple[Hashable, ...] | None,
    axis_index_groups: AxisIndexGroups | None,
) -> None:
    """Warn, when traced, of a batch with one value a feature over all instances."""
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    n = math.prod(x.shape[a] for a in axes)
    if axis_name is not None:
        size = moments_lib.axis_size(axis_name)
        groups = axis_index_groups
        n *= size if groups is None else moments_lib.group_size(groups, size)
    if n == 1:
        warnings.warn(
            f"batch_norm in training mode was given one value a feature (x of shape "
            f"{list(x.shape)}): y equals beta whatever x is, and nothing before this "
            "layer learns; use a larger batch, or train=False",
            stacklevel=3,
        )
