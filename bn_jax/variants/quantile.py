r"""Quantile norm: the probability integral transform of each feature.

A value becomes its share among the batch's values, F(x), and then the quantile of a
target distribution of mean 0 and variance 1 at that share. F is known by its inverse at
K levels $p_k = (k + 1/2) / K$: the quantiles $q_k$ of the batch, here called knots.
Between them

$$y = \gamma \left(t_k + \frac{t_{k+1} - t_k}{q_{k+1} - q_k} (x - q_k)\right) + \beta,
  \qquad q_k \le x < q_{k+1}, \quad t_k = T^{-1}(p_k),$$

with $T^{-1}(p) = \sqrt{12} (p - 1/2)$ for the uniform target and the normal quantile
for the Gaussian one. Batch norm matches two moments; this matches the distribution.

- Below the first knot and above the last, y is $t_0$ and $t_{K-1}$, without a gradient:
  1 / K of the values. It is bounded, whatever prediction meets. The target's variance
  is thereby 1 - 3 / K^2 (uniform), or for K = 64 about 0.98 (Gaussian).
- Knots nearer to each other than epsilon times the distance of the outer ones count as
  tied. A value tied over several knots, such as the 0 of a ReLU, becomes the middle of
  their targets, and no gradient flows between tied knots: y of a constant feature is
  beta, and slopes are at most $(t_{k+1} - t_k) / \epsilon$ in units of that distance.
- The gradient flows through x and through the knots, which are values of the batch.
  Hence it sees that y does not change when x is scaled or shifted.
- Prediction uses the average of the knots over batches, that is of quantile functions:
  a sketch of the data's distribution with the location, scale and shape that the
  average batch has.
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.contract import (
    Epsilon,
    Momentum,
    Transform,
    initializer,
    without_batch_axis,
)
from bn_jax.fields import Range
from bn_jax.functional import BatchNormParams
from bn_jax.mapped_axes import AxisName, axis_size

Target = Literal["uniform", "gaussian"]


AT_LEAST_2 = Range("a number at least 2", lambda v: v >= 2)


class QuantileState(NamedTuple):
    """The moving average that prediction transforms by."""

    knots: Array  # quantiles, ascending, shape [num_quantiles, C], float32 or wider


def init(
    num_features: int,
    *,
    target: Target = "uniform",
    num_quantiles: int = 64,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, QuantileState]:
    """Return gamma 1, beta 0 and the target's own quantiles as knots.

    With them prediction is the identity between the outer knots.

    Args:
      num_features: C.
      target: see `quantile_norm`.
      num_quantiles: number of knots, 2 or more.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.

    Raises:
      ValueError: as `bn_jax.init` says.
      ValueError: if there are several feature axes, the target is unknown or there are
        too few knots.

    Examples:
      >>> _, state = init(1, num_quantiles=4)
      >>> (8 * (state.knots / 12**0.5 + 0.5)).round().ravel().tolist()  # of [0, 1]
      [1.0, 3.0, 5.0, 7.0]
    """
    params, (mean, _) = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    targets = target_quantiles(target, num_quantiles, mean.dtype)
    num_features = checks.check_one_integer(num_features)
    return params, QuantileState(jnp.tile(targets[:, None], (1, num_features)))


def quantile_norm(
    x: Array,
    params: BatchNormParams,
    state: QuantileState,
    *,
    train: bool,
    target: Target = "uniform",
    num_quantiles: int = 64,
    momentum: float | Array = 0.9,
    epsilon: float = 1e-3,
    feature_axis: int = -1,
    axis_name: AxisName | None = None,
    update_state: bool | None = None,
) -> tuple[Array, QuantileState]:
    """Transform each feature to a target distribution, by the batch's quantiles.

    The sort takes most of the time: more than a hundred times that of batch norm on a
    CPU.

    Args:
      x: batch of shape `[N, C]`, `[N, H, W, C]`, `[C, H, W, N]` or any other of rank 2
        or more, of dtype float32, bfloat16, float16 or float64.
      params: gamma and beta, each of shape `[C]` or None.
      state: moving average of the knots, shape `[K, C]`.
      train: static. True transforms by the quantiles of `x` and returns updated knots;
        False transforms by `state` and returns it as it was.
      target: distribution of y before gamma and beta, of mean 0 and variance 1:
        "uniform" on [-sqrt(3), sqrt(3)] or "gaussian".
      num_quantiles: K, number of knots, 2 or more. Of fewer values than knots the
        outer knots are tied.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: distance below which knots are tied, as a share of the distance between
        the outer knots; greater than 0.
      feature_axis: axis of the features; all other axes are ranked over.
      axis_name: name (or tuple of names) of the mapped axes whose instances, of one
        shape, share the quantiles: those of all their values, which each instance
        gathers and sorts.
      update_state: static. Whether the knots move by those of `x`; by default in
        training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype, `train` or
        `update_state` is a JAX array, or `params` or `state` is no NamedTuple with its
        fields.
      ValueError: on a wrong rank, feature axis, feature count, dtype of the state,
        empty batch, target, number of knots, momentum, epsilon or axis name; the
        message says which.

    References:
      Rosenblatt, 1952, "Remarks on a multivariate transformation" (the transform).
      Hazen, 1914 (levels (i + 1/2) / n of order statistics; Hyndman and Fan, 1996,
      "Sample quantiles in statistical packages", definition 5).

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init(1, num_quantiles=4)
      >>> x = jnp.array([[1.0], [10.0], [1000.0], [100.0]])
      >>> y, _ = quantile_norm(x, params, state, train=True, num_quantiles=4)
      >>> (8 * (y / 12**0.5 + 0.5)).round().ravel().tolist()  # eighths of [0, 1]
      [1.0, 3.0, 7.0, 5.0]
    """
    checks.check_static(train=train, update_state=update_state)
    checks.check_epsilon(epsilon)
    checks.check_momentum(momentum)
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_real(x, "ranks")
    axis = checks.single_axis(x, "feature_axis", feature_axis)
    checks.check_fields(params=(params, checks.AFFINE), state=(state, ("knots",)))
    checks.check_features(x, axis, **params._asdict())
    checks.check_state(state)
    dtype = moments_lib.statistics_dtype(x.dtype)
    targets = target_quantiles(target, num_quantiles, dtype)
    expected = (num_quantiles, x.shape[axis])
    if state.knots.shape != expected:
        raise ValueError(
            f"state.knots has shape {list(state.knots.shape)}; expected "
            f"[num_quantiles, C] = {list(expected)}: make it with "
            f"init({x.shape[axis]}, target={target!r}, num_quantiles={num_quantiles})"
        )
    update_state = train if update_state is None else update_state

    moved = jnp.moveaxis(x, axis, 0)
    rows = moved.reshape(x.shape[axis], -1).astype(dtype)
    new_state, knots = state, state.knots.T
    if train or update_state:
        checks.check_not_empty(x)
        of_batch = _quantiles(_gathered(rows, axis_name), num_quantiles)
        if update_state:
            average = momentum * state.knots + (1 - momentum) * of_batch.T
            new_state = QuantileState(average.astype(state.knots.dtype))
        if train:
            knots = of_batch

    transform = functools.partial(_interpolate, targets=targets, epsilon=epsilon)
    y = jax.vmap(transform)(rows, knots.astype(dtype))
    y = functional_lib.scale_and_shift(y, *params, (1,))
    y = jnp.moveaxis(y.astype(x.dtype).reshape(moved.shape), 0, axis)
    return y, new_state


def target_quantiles(target: Target, num_quantiles: int, dtype: Any) -> Array:
    """Return the target's quantiles at the levels (k + 1/2) / K, shape [K].

    Args:
      target: "uniform" or "gaussian", of mean 0 and variance 1.
      num_quantiles: K, 2 or more.
      dtype: of the result.

    Raises:
      ValueError: if the target is unknown or K below 2.

    Examples:
      >>> [f"{q:.2f}" for q in target_quantiles("gaussian", 3, "float32")]
      ['-0.97', '0.00', '0.97']
    """
    if num_quantiles < 2:
        raise ValueError(f"num_quantiles={num_quantiles}; expected 2 or more")
    levels = (np.arange(num_quantiles) + 0.5) / num_quantiles
    if target == "uniform":
        return jnp.asarray(12**0.5 * (levels - 0.5), dtype)
    if target == "gaussian":
        # A constant: computed by XLA, it would be fused into the loop over x.
        return jnp.asarray([NormalDist().inv_cdf(p) for p in levels], dtype)
    raise ValueError(f"target={target!r}; expected uniform or gaussian")


def _gathered(rows: Array, axis_name: AxisName | None) -> Array:
    """Return the rows `[C, M]` of all D instances side by side, `[C, D M]`.

    A sum of rows of zeros, as in `bn_jax.moments.merge_across` and for its reasons.
    """
    if axis_name is None:
        return rows
    num_instances = axis_size(axis_name)
    parts = jnp.zeros((rows.shape[0], num_instances, rows.shape[1]), rows.dtype)
    parts = parts.at[:, lax.axis_index(axis_name)].set(rows)
    return lax.psum(parts, axis_name).reshape(rows.shape[0], -1)


def _quantiles(rows: Array, num_quantiles: int) -> Array:
    """Return the quantiles of `[C, M]` at the levels (k + 1/2) / K, shape `[C, K]`.

    The order statistic i of n has the level (i + 1/2) / n; between them is a line.
    """
    n, steps = rows.shape[1], 2 * num_quantiles
    # A size that an exported program leaves open is a number of JAX.
    numbers: Any = jnp if export.is_symbolic_dim(n) else np
    # (k + 1/2) n / K - 1/2 by integers below 4 n or 4 K^2, of which no digit is lost.
    odd = 2 * numbers.arange(num_quantiles) + 1
    above = odd * (n % steps) - num_quantiles  # in parts of which `steps` are 1
    lower = odd * (n // steps) + above // steps
    share = jnp.asarray((above % steps) / steps, rows.dtype)
    places = numbers.clip(numbers.stack([lower, lower + 1], 1).ravel(), 0, n - 1)
    values = _order_statistics(rows, places)
    values = values.reshape(-1, num_quantiles, 2)
    return values[..., 0] + share * (values[..., 1] - values[..., 0])


@jax.custom_jvp
def _order_statistics(rows: Array, places: Array) -> Array:
    """Return the i-th smallest value of each row for each i in `places`, ascending.

    The derivative of an order statistic is that of the value it is equal to; of several
    equal ones, their mean. This needs no permutation from the sort, which would make
    the sort on a CPU four times as slow.
    """
    return _at(_sort(rows), places)


@_order_statistics.defjvp
def _order_statistics_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    rows, places = primals
    num_places = places.shape[0]

    def of_row(row: Array, ordered: Array, tangent: Array) -> tuple[Array, Array]:
        values = _at(ordered, places)
        count = _count_below(ordered, values, "right") - _count_below(ordered, values)
        # Of equal values the first place stands for all.
        first = _count_below(values, values)
        nearest = jnp.minimum(_count_below(values, row), num_places - 1)
        share = jnp.where(row == values[nearest], tangent / count[nearest], 0)
        return values, jnp.zeros_like(values).at[nearest].add(share)[first]

    return jax.vmap(of_row)(rows, _sort(rows), tangents[0])


def _at(ordered: Array, places: Array) -> Array:
    """Return the values at some places of the last axis, ascending and within it."""
    return ordered.at[..., places].get(
        mode="promise_in_bounds", wrap_negative_indices=False, indices_are_sorted=True
    )


def _sort(rows: Array) -> Array:
    """Sort each row.

    On a CPU, XLA sorts integers four times as fast as floats. The bits of a float that
    is not negative are in its order; those of a negative one are in the reverse.
    """
    bits = {4: jnp.int32, 8: jnp.int64}[rows.dtype.itemsize]
    largest = jnp.iinfo(bits).max

    def flipped(i: Array) -> Array:
        return jnp.where(i < 0, i ^ largest, i)

    keys = flipped(lax.bitcast_convert_type(rows, bits))
    keys = lax.sort(keys, dimension=1, is_stable=False)
    return lax.bitcast_convert_type(flipped(keys), rows.dtype)


def _count_below(
    ordered: Array, x: Array, side: Literal["left", "right"] = "left"
) -> Array:
    """Return how many of the ascending values are below x (or equal: "right")."""
    if export.is_symbolic_dim(ordered.shape[0]):  # the search's steps are not known
        below = jnp.less if side == "left" else jnp.less_equal
        return jnp.sum(below(ordered[:, None], x), 0)
    # Unrolled, XLA fuses the search into what reads its result, once for each reader.
    return jnp.searchsorted(ordered, x, side=side, method="scan")


def _interpolate(x: Array, knots: Array, *, targets: Array, epsilon: float) -> Array:
    """Return y of one feature: x of shape `[M]`, knots and targets of shape `[K]`."""
    last = knots.size - 1
    tie = epsilon * (knots[-1] - knots[0])
    first_tied = _count_below(knots, knots - tie)
    last_tied = _count_below(knots, knots + tie, "right") - 1
    targets = (targets[first_tied] + targets[last_tied]) / 2

    widths = jnp.diff(knots)
    tied = widths <= tie
    slopes = jnp.where(tied, 0, jnp.diff(targets) / jnp.where(tied, 1, widths))
    # About the middle knot first, so that no digit is lost where all are large.
    centre = lax.stop_gradient(knots[last // 2])
    knots = knots - centre
    offsets = targets[:-1] - slopes * knots[:-1]
    x = jnp.clip(x - centre, knots[0], knots[-1])
    interval = jnp.clip(_count_below(knots, x, "right") - 1, 0, last - 1)
    return offsets[interval] + slopes[interval] * x


def quantile_transform(
    *,
    target: Target = "uniform",
    num_quantiles: Annotated[int, AT_LEAST_2] = 64,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-3,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return quantile norm: `bn_jax.variants.quantile.quantile_norm`.

    Args:
      target: "uniform" or "gaussian".
      num_quantiles: number of knots, 2 or more.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: distance below which knots are tied, as a share of the distance between
        the outer knots; greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = quantile_transform(), jnp.array([[1.0], [9.0], [2.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> [f"{value:.2f}" for value in y.ravel()]
      ['-1.43', '1.43', '-0.02']
    """
    shape: dict[str, Any] = {"target": target, "num_quantiles": num_quantiles}
    return Transform(
        initializer(init, scale=use_scale, bias=use_bias, **shape),
        without_batch_axis(quantile_norm, momentum=momentum, epsilon=epsilon, **shape),
        frozenset({"axis_name", "update_state"}),
        name="quantile",
    )
