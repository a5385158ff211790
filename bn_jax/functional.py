r"""Batch normalisation as a pure function with explicit state.

`batch_norm` measures the batch (over all devices), normalises it and updates the moving
averages, as the public functions `measure`, `normalize` and `update_average` do one by
one. It holds no state, reads no global and compiles nothing: callers jit. It works
under `jit`, `grad`, `jvp`, `vmap`, `scan` and `checkpoint`, to derivatives of any
order, in forward and in reverse mode, as its gradients are those of the formula itself.

$$y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta$$
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks, shards
from bn_jax import moments as moments_lib
from bn_jax.averages import BatchNormState, update_average
from bn_jax.mapped_axes import AxisIndexGroups, AxisName
from bn_jax.moments import (
    Moments,
    measure,
    merge_stacked,
)


class BatchNormParams(NamedTuple):
    """What training learns. Either may be None: then it is not applied."""

    scale: Array | None  # gamma, shape [C]
    bias: Array | None  # beta, shape [C]


def init(
    num_features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, BatchNormState]:
    """Return gamma 1, beta 0, moving mean 0 and moving variance 1.

    Args:
      num_features: C, any integer; or the shape of the feature axes where there are
        several.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is; with
        a complex dtype the moving mean is complex.

    Raises:
      TypeError: if `scale` or `bias` is not a boolean.
      ValueError: if `num_features` is neither an integer nor a sequence of them, or
        one is negative.

    Examples:
      >>> params, state = init(2)
      >>> params.scale.tolist(), params.bias.tolist()
      ([1.0, 1.0], [0.0, 0.0])
      >>> state.mean.tolist(), state.var.tolist()
      ([0.0, 0.0], [1.0, 1.0])
    """
    shape = checks.check_num_features(num_features)
    checks.check_static(scale=scale, bias=bias)
    params = BatchNormParams(
        scale=jnp.ones(shape, dtype) if scale else None,
        bias=jnp.zeros(shape, dtype) if bias else None,
    )
    state_dtype = moments_lib.statistics_dtype(dtype)
    state = BatchNormState(
        mean=jnp.zeros(shape, state_dtype),
        var=jnp.ones(shape, jnp.finfo(state_dtype).dtype),
    )
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
      x: array of rank 2 or more with the features on `feature_axis`.
      mean: per feature, shape `[C]`.
      var: per feature, shape `[C]`.
      params: gamma and beta of shape `[C]`, each or both None.
      epsilon: added to the variance, greater than 0.
      feature_axis: axis (or axes) of the features.

    Returns:
      Array of x's shape and dtype; the arithmetic is in float32 or wider.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype, or `params`
        is no NamedTuple with its fields.
      ValueError: if a shape does not fit the features of `x`; on a wrong rank or
        feature axis; or if epsilon is not positive and finite, where it is known.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0], [5.0]])
      >>> params = BatchNormParams(scale=jnp.array([10.0]), bias=jnp.array([1.0]))
      >>> y = normalize(x, jnp.array([1.0]), jnp.array([4.0]), params)
      >>> y.round().ravel().tolist()
      [1.0, 21.0]
    """
    params = BatchNormParams(None, None) if params is None else params
    checks.check_fields(params=(params, checks.AFFINE))
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_features(x, feature_axis, **params._asdict())
    checks.check_statistics(x, feature_axis, {"mean": mean, "var": var})
    checks.check_epsilon(epsilon)
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    return _standardize(x, mean, var, params, epsilon=epsilon, axes=axes)


def scale_and_shift(
    y: Array, scale: Array | None, bias: Array | None, axes: Sequence[int]
) -> Array:
    """Multiply by gamma and add beta, of shape `[C]`, each or both None.

    Args:
      y: normalised values.
      scale: gamma.
      bias: beta.
      axes: those of y that are no feature axes.
    """
    if scale is not None:
        y = y * jnp.expand_dims(scale, axes)
    if bias is not None:
        y = y + jnp.expand_dims(bias, axes)
    return y


def _standardize(
    x: Array,
    mean: Array,
    var: Array,
    params: BatchNormParams,
    *,
    epsilon: float | Array,
    axes: tuple[int, ...],
) -> Array:
    """Return `normalize(...)` without its checks; `axes` are all but the features'."""
    scale, bias = params
    multiplier = lax.rsqrt(var + epsilon)
    if scale is not None:
        multiplier = multiplier * scale
    spread = functools.partial(jnp.expand_dims, axis=axes)
    # x - mean first: folding the mean into the shift would cancel digits where it is
    # large beside the deviation.
    y = x.astype(moments_lib.statistics_dtype(x.dtype)) - spread(mean)
    y = y * spread(multiplier)
    if bias is not None:
        y = y + spread(bias)
    return y.astype(x.dtype)


def _standardize_present(
    x: Array,
    weights: Array | None,
    mean: Array,
    var: Array,
    params: BatchNormParams,
    *,
    epsilon: float | Array,
    axes: tuple[int, ...],
) -> Array:
    """Replace values of weight 0 that are not finite by the mean, and standardise."""
    present = x
    if weights is not None:
        counts = (weights > 0) | jnp.isfinite(x)
        present = jnp.where(counts, x, jnp.expand_dims(mean, axes))
    y = _standardize(present, mean, var, params, epsilon=epsilon, axes=axes)
    return y.astype(x.dtype)


def _standardize_about(
    x: Array,
    moments: Moments,
    params: BatchNormParams,
    *,
    epsilon: float | Array,
    axes: tuple[int, ...],
    about_mean: bool,
) -> Array:
    """Return `_standardize` by the moments of x itself, unweighted.

    Their mean is at most some deviations from `rough_mean`, so it can be folded into
    the shift and cost no digit. Then x - centre, which the moments are taken of, is
    all that is read of x, in the gradient too: with the mean subtracted here, XLA would
    write x - mean to memory besides. Where parts have been measured about means of
    their own, the centre is the mean as a constant.
    """
    scale, bias = params
    spread = functools.partial(jnp.expand_dims, axis=axes)
    wide = x.astype(moments.mean.dtype)
    centre = lax.stop_gradient(moments.mean)
    if not about_mean:
        centre = moments_lib.rough_mean(wide, axes)
    multiplier = lax.rsqrt(moments.var + epsilon)
    if scale is not None:
        multiplier = multiplier * scale
    shift = (centre - moments.mean) * multiplier
    if bias is not None:
        shift = shift + bias
    y = (wide - spread(centre)) * spread(multiplier) + spread(shift)
    return y.astype(x.dtype)


def batch_norm(
    x: Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    train: bool,
    momentum: float | Array = 0.9,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    ghost_batch_size: int | None = None,
    batch_axis: int = 0,
    statistics: BatchNormState | Moments | None = None,
    update_state: bool | None = None,
) -> tuple[Array, BatchNormState]:
    """Normalise by the batch in training, by the moving averages in prediction.

    What normalises, whether the averages move, and whether gamma and beta learn are
    three choices: `train` and `statistics`, `update_state`, and the optimizer's mask
    (`bn_jax.variables.norm_param_mask`).

    `eps` of PyTorch is `epsilon` here, `training` of Keras `train`, its `axis`
    `feature_axis`; `momentum` is not PyTorch's but 1 - it.

    Args:
      x: batch of shape `[N, C]`, `[N, H, W, C]`, `[N, C, H, W]` or any other of rank 2
        or more, of dtype float32, bfloat16, float16, float64 or complex.
      params: gamma and beta, each of shape `[C]` or None.
      state: moving mean and variance, each of shape `[C]`.
      train: static. True normalises by the moments of `x` and returns updated
        averages; False normalises by `state` and returns it as it was. Training on one
        value a feature warns, if there are no weights: y is beta then.
      momentum: weight of the OLD average, in [0, 1]: a constant, or the number that
        `cumulative_momentum` or `debiased_momentum` gives for the step.
      epsilon: added to the variance, greater than 0.
      feature_axis: axis (or axes) of the features; all others are normalised over.
      weights: of the examples or positions in the statistics; see `measure`. A batch
        of total weight 0 is normalised by `state`, and a value of weight 0 that is not
        finite as if it were the mean, since NaN in y would spoil every gradient. They
        are not read where `x` is not measured, as in prediction.
      axis_name: name (or tuple of names) of the mapped axes whose instances share
        their statistics; None uses those of `x` alone. In `jax.shard_map` with
        `check_vma=True` a gradient of replicated parameters is already the sum over
        devices; with `check_vma=False`, and in `jax.pmap`, it is the device's own
        share, to be summed (or averaged) by the caller.
      axis_index_groups: partition of that axis into groups of one size that share
        statistics; see `merge_across`.
      ghost_batch_size: number of examples, a divisor of N, that share statistics:
        contiguous parts of the batch are normalised each by its own (and along a mapped
        axis with the same part of the other instances). The averages move by the
        moments of the whole batch.
      batch_axis: axis of the examples; ghost batches are cut along it, and under jit
        over a mesh that is set (`jax.set_mesh`) the parts that its devices measure.
      statistics: normalise by the mean and var in these, each of shape `[C]`, instead.
      update_state: static. Whether the averages move by the moments of `x`; by
        default in training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state. The biased variance
      both normalises and is averaged.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype, `train` or
        `update_state` is a JAX array or no boolean, or `params`, `state` or
        `statistics` is no NamedTuple with its fields.
      ValueError: on a wrong rank, feature axis, feature count, dtype of the state,
        empty batch, weights, momentum, epsilon, axis name, groups, batch axis or ghost
        batch size; the message says which. What a call does not use is not checked.

    References:
      Ioffe and Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training
      by Reducing Internal Covariate Shift", arXiv:1502.03167.
      Hoffer et al., 2017, "Train longer, generalize better", arXiv:1705.08741 (ghost
      batches).

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import batch_norm, init
      >>> params, state = init(1)
      >>> y, state = batch_norm(jnp.array([[1.0], [3.0]]), params, state, train=True)
      >>> y.round(3).ravel().tolist(), state.mean.round(3).tolist()
      ([-1.0, 1.0], [0.20000000298023224])
    """
    x = jnp.asarray(x)
    checks.check_batch_norm(
        x,
        params,
        state,
        train=train,
        epsilon=epsilon,
        feature_axis=feature_axis,
        weighted=weights is not None,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        ghost_batch_size=ghost_batch_size,
        batch_axis=batch_axis,
        statistics=statistics,
        update_state=update_state,
    )
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    by_batch = train and statistics is None
    update_state = train if update_state is None else update_state
    given = state if statistics is None else statistics
    mean, var = given.mean, given.var
    if not by_batch and not update_state:
        return _standardize(x, mean, var, params, epsilon=epsilon, axes=axes), state

    if weights is not None:
        weights = moments_lib.align_weights(weights, x, feature_axis)
    if not by_batch:
        y = _standardize_present(
            x, weights, mean, var, params, epsilon=epsilon, axes=axes
        )
        moments = measure(
            x,
            feature_axis=feature_axis,
            weights=weights,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
    else:
        axis = batch_axis % x.ndim
        ghosts = x.shape[axis] // ghost_batch_size if ghost_batch_size else 1
        axis = axis if axis in axes else axes[0]
        parts = shards.num_parts(x.shape[axis], ghosts)
        moments = _moments_of_ghosts(
            x,
            weights,
            axes=axes,
            axis=axis,
            ghosts=ghosts,
            parts=parts,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        y = _standardize_ghosts(
            x,
            weights,
            moments,
            params,
            state,
            epsilon=epsilon,
            axes=axes,
            axis=axis,
            ghosts=ghosts,
            about_mean=parts > ghosts,
        )
        if ghosts > 1:
            moments = merge_stacked(moments)
    if not update_state:
        return y, state
    return y, update_average(state, moments, momentum=momentum)


def _moments_of_ghosts(
    x: Array,
    weights: Array | None,
    *,
    axes: tuple[int, ...],
    axis: int,
    ghosts: int,
    parts: int,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
) -> Moments:
    """Return the moments of each ghost batch, stacked; of one, as they are.

    On a mesh each device measures its own part, and the moments are merged, which costs
    one exchange. A ghost batch is one part, or several.

    Args:
      x: the batch.
      weights: of x's rank, or None.
      axes: that statistics are taken over.
      axis: along which the batch is cut.
      ghosts: number of ghost batches.
      parts: number of parts, a multiple of `ghosts`.
      axis_name: see `batch_norm`.
      axis_index_groups: see there.
    """
    across = functools.partial(
        moments_lib.across, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    if parts == 1:
        return across(moments_lib.moments_over(x, axes, weights))
    moments = moments_lib.moments_of_parts(x, axes, weights, parts, axis=axis)
    if parts > ghosts:
        moments = moments_lib.gathered(moments)
        of_ghosts = jax.tree.map(lambda m: shards.cut(m, 0, ghosts), moments)
        moments = jax.vmap(merge_stacked)(of_ghosts)
    moments = jax.vmap(across)(moments)
    return moments if ghosts > 1 else jax.tree.map(lambda m: m[0], moments)


def _standardize_ghosts(
    x: Array,
    weights: Array | None,
    moments: Moments,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: float | Array,
    axes: tuple[int, ...],
    axis: int,
    ghosts: int,
    about_mean: bool,
) -> Array:
    """Normalise each ghost batch by its moments; see `_moments_of_ghosts`."""
    standardize = functools.partial(
        _standardize_by_batch,
        params=params,
        state=state,
        epsilon=epsilon,
        axes=axes,
        about_mean=about_mean,
    )
    if ghosts == 1:
        return standardize(x, weights, moments)
    y = jax.vmap(standardize, (axis, axis, 0), axis)(
        shards.cut(x, axis, ghosts),
        shards.cut_weights(weights, x, axis, ghosts),
        moments,
    )
    return y.reshape(x.shape)


def _standardize_by_batch(
    x: Array,
    weights: Array | None,
    moments: Moments,
    *,
    params: BatchNormParams,
    state: BatchNormState,
    epsilon: float | Array,
    axes: tuple[int, ...],
    about_mean: bool,
) -> Array:
    """Return y by the moments of the batch, or by the state where nothing weighs."""
    if weights is None:
        return _standardize_about(
            x, moments, params, epsilon=epsilon, axes=axes, about_mean=about_mean
        )
    weighs = moments.count > 0
    mean = jnp.where(weighs, moments.mean, state.mean)
    var = jnp.where(weighs, moments.var, state.var)
    return _standardize_present(
        x, weights, mean, var, params, epsilon=epsilon, axes=axes
    )
