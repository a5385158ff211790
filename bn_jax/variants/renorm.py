r"""Batch renormalisation: training that sees what prediction will use.

The batch's standardised values are corrected towards the moving averages by

$$r = \sigma_B / \sigma \in [1 / r_{max}, r_{max}], \qquad
  d = (\mu_B - \mu) / \sigma \in [-d_{max}, d_{max}],$$

both taken as constants by the gradient. With r_max 1 and d_max 0 this is batch norm;
without limits, training normalises by the moving averages, as prediction does.

The limits may rise over training, as the state counts the batches: linearly, as in the
paper, or at once after a warm-up as batch norm, as is usual in reinforcement learning.

References:
  Ioffe, 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in
  Batch-Normalized Models", arXiv:1702.03275.
  Bhatt et al., 2024, "CrossQ: Batch Normalization in Deep Reinforcement Learning for
  Greater Sample Efficiency and Simplicity", arXiv:1902.05605 (100,000 steps of batch
  norm, then r_max 3 and d_max 5 at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax.averages import BatchNormState, CountedState
from bn_jax.contract import (
    MOMENTS,
    Epsilon,
    Momentum,
    Transform,
    initializer,
    without_batch_axis,
)
from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE, ConfigError
from bn_jax.functional import BatchNormParams, batch_norm
from bn_jax.mapped_axes import AxisIndexGroups, AxisName
from bn_jax.moments import Moments, measure
from bn_jax.names import TRACEABLE

_LAST_COUNT = 2**24  # a float32 count to which 1 is added stays there


def init(
    num_features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, CountedState]:
    """Return gamma 1, beta 0, moving mean 0, moving variance 1 and no batch counted.

    Args:
      num_features: see `bn_jax.init`.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.

    Raises:
      ValueError: as `bn_jax.init` says.

    Examples:
      >>> params, state = init(1)
      >>> state.mean.tolist(), state.var.tolist(), state.count.item()
      ([0.0], [1.0], 0.0)
    """
    params, averages = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    return params, CountedState(*averages, jnp.zeros((), jnp.float32))


def batch_renorm(
    x: Array,
    params: BatchNormParams,
    state: CountedState,
    *,
    train: bool,
    r_max: float | Array = 3.0,
    d_max: float | Array = 5.0,
    start: int = 0,
    r_end: int | None = None,
    d_end: int | None = None,
    momentum: float | Array = 0.9,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    statistics: BatchNormState | Moments | None = None,
    update_state: bool | None = None,
) -> tuple[Array, CountedState]:
    """Normalise by the batch, corrected towards the moving averages.

    A deviation is the root of a variance plus epsilon. For prediction the paper
    averages deviations, this averages biased variances.

    Args:
      x: see `batch_norm`.
      params: see `batch_norm`.
      state: moving mean and variance, of shape `[C]`, and the number of batches in
        them, which is the step of the schedule.
      train: static. False is `batch_norm` in prediction.
      r_max: largest correction of the deviation, at least 1, or infinite; may be
        traced.
      d_max: largest correction of the mean, in deviations, at least 0, or infinite; may
        be traced.
      start: see `limits`, and so are `r_end` and `d_end`; by default the limits are
        constant.
      r_end: see `start`.
      d_end: see `start`.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: see `batch_norm`.
      feature_axis: see `batch_norm`.
      weights: see `batch_norm`. A batch of total weight 0 is not counted.
      axis_name: see `batch_norm`.
      axis_index_groups: see `batch_norm`.
      statistics: normalise by these instead, without a correction.
      update_state: static. Whether the averages and the count move by `x`; by default
        in training.

    Returns:
      `(y, state)`, as `batch_norm`.

    Raises:
      TypeError: as `batch_norm` says.
      ValueError: if a limit is too small, or the schedule ends before it starts or is
        too long, as `limits` says; or as `batch_norm` says.

    References:
      Ioffe, 2017, arXiv:1702.03275; Bhatt et al., 2024, arXiv:1902.05605.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init(1)  # moving mean 0, variance 1
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = batch_renorm(x, params, state, train=True)
      >>> y.round().ravel().tolist()  # as in prediction
      [1.0, 3.0]
      >>> y, _ = batch_renorm(x, params, state, train=True, r_max=1.0, d_max=0.0)
      >>> y.round(3).ravel().tolist()  # as batch norm
      [-1.0, 1.0]
    """
    checks.check_static(train=train, update_state=update_state)
    checks.check_fields(
        params=(params, checks.AFFINE), state=(state, ("mean", "var", "count"))
    )
    r_limit, d_limit = limits(
        state.count, start=start, r_max=r_max, r_end=r_end, d_max=d_max, d_end=d_end
    )
    across: dict[str, Any] = {
        "feature_axis": feature_axis,
        "weights": weights,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
    }
    averages = BatchNormState(state.mean, state.var)
    moves = train if update_state is None else update_state
    by_batch = train and statistics is None
    if by_batch or moves:
        # batch_norm measures again; compiled, the two are one.
        moments = measure(x, **across)
        present = moments.count > 0
    if by_batch:
        sigma = jnp.sqrt(state.var + epsilon)
        r = jnp.clip(jnp.sqrt(moments.var + epsilon) / sigma, 1 / r_limit, r_limit)
        d = _limited((moments.mean - state.mean) / sigma, d_limit)
        # Without examples batch_norm normalises by the averages.
        r = lax.stop_gradient(jnp.where(present, r, 1))
        d = lax.stop_gradient(jnp.where(present, d, 0))
        # gamma (r x_hat + d) + beta, as a batch norm with other parameters.
        gamma, beta = params
        scale = r if gamma is None else gamma * r
        bias = d if gamma is None else gamma * d
        params = BatchNormParams(scale, bias if beta is None else bias + beta)
    y, averages = batch_norm(
        x,
        params,
        averages,
        train=train,
        momentum=momentum,
        epsilon=epsilon,
        statistics=statistics,
        update_state=update_state,
        **across,
    )
    if not moves:
        return y, state
    count = state.count + jnp.any(present).astype(state.count.dtype)
    return y, CountedState(*averages, count)


def _limited(d: Array, limit: Array) -> Array:
    """Return d with |d| at most `limit`; of a complex number the direction stays."""
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -limit, limit)
    size = jnp.abs(d)
    return d * jnp.where(size > limit, limit / size, 1)


def limits(
    step: ArrayLike,
    *,
    start: int = 5_000,
    r_max: float | Array = 3.0,
    r_end: int | None = 40_000,
    d_max: float | Array = 5.0,
    d_end: int | None = 25_000,
) -> tuple[Array, Array]:
    """Return `(r_max, d_max)` at a step: batch norm at first, then a ramp or a jump.

    The defaults are those of Ioffe (2017). Those of CrossQ are `start=100_000` with
    `r_end=None` and `d_end=None`.

    Args:
      step: number of the training step, from 0, of any shape.
      start: step at which the limits begin to rise from 1 and 0.
      r_max: final limit of the deviation's correction, at least 1.
      r_end: step at which it is reached, linearly from `start` on. None, or `start`
        itself, makes it jump at `start`.
      d_max: final limit of the mean's correction, at least 0.
      d_end: step at which it is reached, as `r_end`.

    Returns:
      Both limits, of the step's shape, in float32.

    Raises:
      ValueError: if a limit is too small, reached before it begins to rise, or not
        within the 2^24 batches that a state can count.

    Examples:
      >>> [tuple(map(float, limits(step))) for step in (0, 40_000)]
      [(1.0, 0.0), (3.0, 5.0)]
    """
    checks.check_known("r_max", r_max, AT_LEAST_1)
    checks.check_known("d_max", d_max, NOT_NEGATIVE)
    t = jnp.asarray(step, jnp.float32)

    for name, at in {"start": start, "r_end": r_end, "d_end": d_end}.items():
        if at is not None and at > _LAST_COUNT:
            raise ValueError(
                f"{name}={at} is never reached, as the state counts batches up to "
                f"{_LAST_COUNT}; give a step of {_LAST_COUNT} or earlier"
            )

    def risen(name: str, end: int | None, first: int, last: float | Array) -> Array:
        end = start if end is None else end
        if not end >= start:
            raise ValueError(
                f"{name}={end} is before start={start}; give the step at which the "
                f"limit has risen, {start} or later, or none for a jump at {start}"
            )
        if end > start:
            share = jnp.clip((t - start) / (end - start), 0, 1)
        else:
            share = (t >= start).astype(jnp.float32)
        # 0 times an infinite limit is not a number.
        return jnp.where(share > 0, first + (last - first) * share, first)

    return risen("r_end", r_end, 1, r_max), risen("d_end", d_end, 0, d_max)


def renorm_transform(
    *,
    r_max: Annotated[float, AT_LEAST_1, TRACEABLE] = 3.0,
    d_max: Annotated[float, NOT_NEGATIVE, TRACEABLE] = 5.0,
    start: Annotated[int, NOT_NEGATIVE] = 0,
    r_end: Annotated[int | None, NOT_NEGATIVE] = None,
    d_end: Annotated[int | None, NOT_NEGATIVE] = None,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return batch renormalisation: `bn_jax.variants.renorm.batch_renorm`.

    `renorm:start=5000,r_end=40000,d_end=25000` is the schedule of Ioffe (2017), and
    `renorm:start=100000` that of CrossQ (Bhatt et al., 2024).

    Args:
      r_max: largest correction of the deviation, at least 1.
      d_max: largest correction of the mean, in deviations, at least 0.
      start: step at which the limits begin to rise from 1 and 0; until then this is
        batch norm.
      r_end: step at which the first limit has risen to `r_max`, linearly from `start`
        on; None makes it jump there.
      d_end: step at which the second has risen to `d_max`; likewise.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Raises:
      ConfigError: if a limit is too small, reached before it begins to rise, or not
        within 2^24 batches.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform = renorm_transform(start=1)  # the first batch is batch norm's
      >>> x = jnp.array([[5.0], [9.0]])
      >>> y, state = transform.apply(x, *transform.init(1), train=True)
      >>> y.round(3).ravel().tolist(), state.count.item()
      ([-1.0, 1.0], 1.0)
    """
    schedule: dict[str, Any] = {
        "r_max": r_max,
        "d_max": d_max,
        "start": start,
        "r_end": r_end,
        "d_end": d_end,
    }
    try:
        limits(0, **schedule)
    except ValueError as error:
        raise ConfigError(f"norm='renorm': {error}") from None
    return Transform(
        initializer(init, scale=use_scale, bias=use_bias),
        without_batch_axis(
            batch_renorm, momentum=momentum, epsilon=epsilon, **schedule
        ),
        MOMENTS,
        epsilon=epsilon,
        name="renorm",
    )
