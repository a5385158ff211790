r"""Half of batch norm: `center` removes the mean alone, `scale` the deviation alone.

$$y_{center} = \gamma (x - \mu) + \beta, \qquad
  y_{scale} = \gamma \frac{x}{\sqrt{\sigma^2 + \epsilon}} + \beta,$$

with the variance $\sigma^2$ taken about the mean. One after the other they are batch
norm. Both average over batches what prediction uses, as batch norm does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.averages import BatchNormState, update_average
from bn_jax.contract import (
    MOMENTS,
    Epsilon,
    Momentum,
    Transform,
    initializer,
    without_batch_axis,
)
from bn_jax.functional import BatchNormParams
from bn_jax.mapped_axes import AxisIndexGroups, AxisName
from bn_jax.moments import Moments, measure


class CenterState(NamedTuple):
    """The moving average that prediction subtracts."""

    mean: Array  # shape [C], float32 or wider


class ScaleState(NamedTuple):
    """The moving average that prediction divides by the root of."""

    var: Array  # average of biased variances, shape [C], float32 or wider


State = TypeVar("State", CenterState, ScaleState)


def init_center(
    num_features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, CenterState]:
    """Return gamma 1, beta 0 and moving mean 0.

    Args:
      num_features: see `bn_jax.init`.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.

    Raises:
      ValueError: as `bn_jax.init` says.

    Examples:
      >>> params, state = init_center(2)
      >>> params.scale.tolist(), params.bias.tolist(), state.mean.tolist()
      ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    """
    params, averages = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    return params, CenterState(averages.mean)


def init_scale(
    num_features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, ScaleState]:
    """Return gamma 1, beta 0 and moving variance 1.

    Args:
      num_features: see `bn_jax.init`.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.

    Raises:
      ValueError: as `bn_jax.init` says.

    Examples:
      >>> params, state = init_scale(2)
      >>> params.scale.tolist(), params.bias.tolist(), state.var.tolist()
      ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0])
    """
    params, averages = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    return params, ScaleState(averages.var)


def center(
    x: Array,
    params: BatchNormParams,
    state: CenterState,
    *,
    train: bool,
    momentum: float | Array = 0.9,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    statistics: CenterState | BatchNormState | Moments | None = None,
    update_state: bool | None = None,
) -> tuple[Array, CenterState]:
    """Subtract the batch's mean in training, the moving mean in prediction.

    Args:
      x: batch of rank 2 or more, of a floating-point or complex dtype.
      params: gamma and beta, each of shape `[C]` or None.
      state: moving mean, of shape `[C]`.
      train: static. True subtracts the mean of `x` and returns an updated average;
        False subtracts `state` and returns it as it was.
      momentum: weight of the OLD average, in [0, 1].
      feature_axis: axis (or axes) of the features; all others are averaged over.
      weights: of the examples or positions in the mean; see `batch_norm`.
      axis_name: name (or tuple of names) of the mapped axes whose instances share
        their mean.
      axis_index_groups: partition of that axis into groups that share it.
      statistics: whose mean, of shape `[C]`, to subtract instead.
      update_state: static. Whether the average moves by the mean of `x`; by default in
        training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype, `train` or
        `update_state` is a JAX array, or `params` or `state` is no NamedTuple with its
        fields.
      ValueError: on a wrong rank, feature axis, feature count, dtype of the state,
        empty batch, weights, momentum, axis name or groups; the message says which.

    References:
      Salimans and Kingma, 2016, "Weight Normalization", arXiv:1602.07868 (mean-only
      batch normalization).

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init_center(1)
      >>> x = jnp.array([[1.0], [5.0]])
      >>> y, state = center(x, params, state, train=True, momentum=0.5)
      >>> y.ravel().tolist(), state.mean.tolist()
      ([-2.0, 2.0], [1.5])
    """
    x, mean, state = _moment(
        "mean",
        x,
        params,
        state,
        train=train,
        momentum=momentum,
        feature_axis=feature_axis,
        weights=weights,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        statistics=statistics,
        update_state=update_state,
    )
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    y = x.astype(moments_lib.statistics_dtype(x.dtype)) - jnp.expand_dims(mean, axes)
    return functional_lib.scale_and_shift(y, *params, axes).astype(x.dtype), state


def scale(
    x: Array,
    params: BatchNormParams,
    state: ScaleState,
    *,
    train: bool,
    momentum: float | Array = 0.9,
    epsilon: float | Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    statistics: ScaleState | BatchNormState | Moments | None = None,
    update_state: bool | None = None,
) -> tuple[Array, ScaleState]:
    """Divide by the batch's deviation in training, by the moving one in prediction.

    The deviation is taken about the mean, but the mean stays: before gamma and beta, y
    has the mean mu / sqrt(var + epsilon).

    Args:
      x: see `center`.
      params: see `center`.
      state: moving variance, of shape `[C]`.
      train: static. True divides by the deviation of `x` and returns an updated
        average; False divides by that of `state` and returns it as it was.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      feature_axis: see `center`.
      weights: see `center`.
      axis_name: see `center`.
      axis_index_groups: see `center`.
      statistics: by the root of whose variance, of shape `[C]`, to divide instead.
      update_state: static. Whether the average moves by the variance of `x`; by default
        in training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state. The biased variance
      both divides and is averaged.

    Raises:
      TypeError: as `center` says.
      ValueError: if epsilon is not positive, or as `center` says.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init_scale(1)
      >>> x = jnp.array([[1.0], [5.0]])
      >>> y, state = scale(x, params, state, train=True, momentum=0.5)
      >>> y.round(3).ravel().tolist(), state.var.tolist()
      ([0.5, 2.5], [2.5])
    """
    checks.check_epsilon(epsilon)
    x, var, state = _moment(
        "var",
        x,
        params,
        state,
        train=train,
        momentum=momentum,
        feature_axis=feature_axis,
        weights=weights,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        statistics=statistics,
        update_state=update_state,
    )
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    gamma, beta = params
    multiplier = lax.rsqrt(var + epsilon)
    if gamma is not None:
        multiplier = multiplier * gamma
    y = x.astype(moments_lib.statistics_dtype(x.dtype))
    y = y * jnp.expand_dims(multiplier, axes)
    if beta is not None:
        y = y + jnp.expand_dims(beta, axes)
    return y.astype(x.dtype), state


def _moment(
    name: Literal["mean", "var"],
    x: Array,
    params: BatchNormParams,
    state: State,
    *,
    train: bool,
    momentum: float | Array,
    feature_axis: int | Sequence[int],
    weights: Array | None,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    statistics: Any,
    update_state: bool | None,
) -> tuple[Array, Array, State]:
    """Return x, the moment that normalises it, and the new state.

    A value of x that has weight 0 and is not finite is replaced by the mean, as
    `batch_norm` does.
    """
    checks.check_static(train=train, update_state=update_state)
    checks.check_momentum(momentum)
    checks.check_fields(params=(params, checks.AFFINE), state=(state, (name,)))
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_features(x, feature_axis, **params._asdict(), **state._asdict())
    checks.check_state(state)
    old = getattr(state, name)
    moment = old
    if statistics is not None:
        moment = getattr(statistics, name)
        checks.check_statistics(x, feature_axis, {f"statistics.{name}": moment})
    by_batch = train and statistics is None
    moves = train if update_state is None else update_state
    if not by_batch and not moves:
        return x, moment, state

    checks.check_not_empty(x)
    if by_batch and weights is None:
        checks.warn_of_one_value(
            x.shape,
            feature_axis,
            axis_name,
            axis_index_groups,
            outcome={
                "mean": "y equals beta, and nothing before this layer learns",
                "var": "y is divided by the root of epsilon alone",
            }[name],
            stacklevel=4,
        )
    across: Any = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    batch = measure(x, feature_axis=feature_axis, weights=weights, **across)
    if by_batch:
        moment = jnp.where(batch.count > 0, getattr(batch, name), old)
    if weights is not None:
        weights = moments_lib.align_weights(weights, x, feature_axis)
        mean = jnp.expand_dims(
            batch.mean, moments_lib.reduction_axes(x.ndim, feature_axis)
        )
        present = (weights > 0) | jnp.isfinite(x)
        x = jnp.where(present, x, mean.astype(x.dtype))
    if moves:
        # Of both averages, the one that is kept.
        both = BatchNormState(batch.mean, batch.var)._replace(**{name: old})
        moved = update_average(both, batch, momentum=momentum)
        state = state._replace(**{name: getattr(moved, name)})
    return x, moment, state


def center_transform(
    *, momentum: Momentum = 0.9, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return the transform that removes the mean alone.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = center_transform(), jnp.array([[1.0], [5.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.ravel().tolist()
      [-2.0, 2.0]
    """
    return Transform(
        initializer(init_center, scale=use_scale, bias=use_bias),
        without_batch_axis(center, momentum=momentum),
        MOMENTS,
        name="center",
    )


def scale_transform(
    *,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return the transform that removes the deviation alone.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = scale_transform(), jnp.array([[1.0], [5.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.round(3).ravel().tolist()
      [0.5, 2.5]
    """
    return Transform(
        initializer(init_scale, scale=use_scale, bias=use_bias),
        without_batch_axis(scale, momentum=momentum, epsilon=epsilon),
        MOMENTS,
        name="scale",
    )
