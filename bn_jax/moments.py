r"""Weighted mean and variance of a set of examples, per feature, which merge exactly.

`measure` takes them of an array, `merge` joins those of two disjoint sets, and
`merge_across` those of the devices (or vmapped instances) along a named axis. What is
done with them is in `bn_jax.functional`, which normalises, and `bn_jax.averages`.

The variance is computed about a shift $c$, here a first estimate of the mean:

$$\delta = E[x - c], \qquad \mu = c + \delta, \qquad
  \sigma^2 = E[(x - c)^2] - \delta^2.$$

The identity holds for every constant $c$, so derivatives of every order are right with
no gradient taken through $c$. In floating point its error grows with
$(c - \mu)^2 / \sigma^2$, which a first estimate makes negligible; $c = 0$, the usual
one-pass form, loses all digits of a float32 where $|\mu| / \sigma$ passes some 3000.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from bn_jax import shards
from bn_jax.mapped_axes import (
    AxisIndexGroups,
    AxisName,
    axis_size,
    check_groups,
    group_size,
    place_in_group,
)


class Moments(NamedTuple):
    """Total weight, mean and biased variance of a set of examples, per feature.

    A set of total weight 0 has mean and variance 0 and weighs nothing in a merge.
    """

    # Total weight; shape [] or [C], real, float32 or wider. (Shadows tuple.count.)
    count: Array  # type: ignore[assignment]
    mean: Array  # shape [C], float32 or wider (complex where the data are)
    var: Array  # divided by count, not count - 1; shape [C], float32 or wider, real


def statistics_dtype(dtype: Any) -> Any:
    """Return the dtype of the statistics of data of `dtype`: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def feature_axes(rank: int, feature_axis: int | Sequence[int]) -> tuple[int, ...]:
    """Return the feature axes of an array as sorted, non-negative integers.

    Args:
      rank: number of axes of the array.
      feature_axis: one axis or several, negative ones counted from the end.

    Raises:
      ValueError: if an axis is not an integer, out of range or given twice.
    """
    given: tuple[Any, ...] = (feature_axis,)
    if isinstance(feature_axis, Iterable) and not isinstance(feature_axis, str):
        given = tuple(feature_axis)
    try:
        given = tuple(map(operator.index, given))
    except TypeError:
        given = ()
    axes = tuple(sorted(a + rank if a < 0 else a for a in given))
    if not axes or len(set(axes)) < len(axes) or axes[0] < 0 or axes[-1] >= rank:
        raise ValueError(
            f"feature_axis={feature_axis!r} does not name distinct axes of an array of "
            f"rank {rank}; give integers in [{-rank}, {rank - 1}]"
        )
    return axes


def reduction_axes(rank: int, feature_axis: int | Sequence[int]) -> tuple[int, ...]:
    """Return the axes that statistics are taken over: all but the feature axes.

    Raises:
      ValueError: as `feature_axes` says.
    """
    kept = feature_axes(rank, feature_axis)
    return tuple(a for a in range(rank) if a not in kept)


def check_input(x: Array, feature_axis: int | Sequence[int]) -> None:
    """Refuse an array that has no features or no batch to normalise.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype.
      ValueError: if `x` has rank below 2, no axis to reduce, or a bad `feature_axis`.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x has dtype {x.dtype}; statistics need a floating-point dtype: convert "
            "it first, e.g. x.astype(jnp.float32)"
        )
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected rank 2 or more, such as [N, C] or "
            "[N, H, W, C]: add the batch axis with x[None]"
        )
    if not reduction_axes(x.ndim, feature_axis):
        raise ValueError(
            f"feature_axis={feature_axis!r} names every axis of x of shape "
            f"{list(x.shape)}; leave at least the batch axis to take statistics over"
        )


def measure(
    x: Array,
    *,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Measure the moments of `x` over all axes but the feature axes.

    The variance of complex numbers is that of their distance to the mean.

    Args:
      x: array of rank 2 or more, such as `[N, C]`, `[N, H, W, C]` or `[N, C, H, W]`, of
        a floating-point or complex dtype. bfloat16 and float16 are widened to float32
        first.
      feature_axis: axis (or axes) of the features; all others are reduced.
      weights: non-negative, finite weights, or booleans as a mask. Of x's rank with
        some axes of size 1, or of x's rank less its feature axes: `[N]` for x of
        `[N, C]`, `[N, 1, 1]` or `[N, H, W]` for `[N, H, W, C]`. A value of weight 0
        counts as absent, even where it is not finite; in the gradient with respect to
        that weight it counts as 0.
      axis_name: name, or tuple of names, of mapped axes over all of whose instances to
        measure; see `merge_across`.
      axis_index_groups: partition of that axis, to measure over each group.

    Returns:
      The moments; mean and biased variance have the shape of the feature axes. Without
      weights the count is the number of values a feature.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype.
      ValueError: on a bad rank, feature axis, weights, axis name or groups.

    References:
      Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance"
      (shifted data).

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0], [3.0], [99.0]])
      >>> count, mean, var = measure(x, weights=jnp.array([True, True, False]))
      >>> count.item(), mean.tolist(), var.tolist()
      (2.0, [2.0], [1.0])
    """
    x = jnp.asarray(x)
    check_input(x, feature_axis)
    check_groups(axis_name, axis_index_groups)
    if weights is not None:
        weights = align_weights(weights, x, feature_axis)
    axes = reduction_axes(x.ndim, feature_axis)
    parts = shards.num_parts(x.shape[axes[0]])
    if parts == 1:
        moments = moments_over(x, axes, weights)
    else:
        moments = merge_stacked(gathered(moments_of_parts(x, axes, weights, parts)))
    return across(moments, axis_name, axis_index_groups)


def moments_of_parts(
    x: Array,
    axes: tuple[int, ...],
    weights: Array | None,
    parts: int,
    *,
    axis: int | None = None,
) -> Moments:
    """Return the moments of contiguous parts of `x`, stacked along a leading axis.

    Args:
      x: as `moments_over` takes it.
      axes: likewise.
      weights: likewise.
      parts: how many, a divisor of x's size along `axis`.
      axis: that is cut, one of `axes`; the first, unless said otherwise.
    """
    axis = axes[0] if axis is None else axis
    weights = shards.cut_weights(weights, x, axis, parts)
    of_part = functools.partial(moments_over, axes=axes)
    return jax.vmap(lambda x, w: of_part(x, weights=w), axis)(
        shards.cut(x, axis, parts), weights
    )


def moments_over(
    x: Array, axes: tuple[int, ...], weights: Array | None = None
) -> Moments:
    """Return the moments of `x` over some of its axes: `measure` without its checks.

    Args:
      x: array of a floating-point or complex dtype.
      axes: to reduce, non-negative.
      weights: as `align_weights` returns them.
    """
    x = x.astype(statistics_dtype(x.dtype))
    real_dtype = jnp.finfo(x.dtype).dtype
    if weights is None:
        n = jnp.asarray(math.prod(x.shape[a] for a in axes), real_dtype)
        w = None
    else:
        w = weights.astype(real_dtype)
        n = _total_weight(w, x.shape, axes)
        x = jnp.where(w > 0, x, 0)

    def mean_of(values: Array) -> Array:
        weighted = values if w is None else w * values
        return jnp.sum(weighted, axes) / jnp.where(n > 0, n, 1)

    c = rough_mean(x, axes) if w is None else lax.stop_gradient(mean_of(x))
    x_c = x - jnp.expand_dims(c, axes)
    delta = mean_of(x_c)
    # Of numbers beyond the square root of the largest both terms are infinite, and so
    # shall be the variance, not NaN.
    square = _squared_abs(delta)
    var = mean_of(_squared_abs(x_c)) - jnp.where(jnp.isinf(square), 0, square)
    # Rounding may leave a constant feature below 0. Lifting it by a constant, rather
    # than by a maximum, keeps the derivatives of the formula.
    var = var + lax.stop_gradient(jnp.maximum(-var, 0))
    return Moments(n, c + delta, var)


def rough_mean(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the mean over a sixteenth of the values or more, without a gradient.

    Moments may be taken about any number c. With var = E[(x - c)^2] - (E[x - c])^2,
    rounding grows with ((mean - c) / deviation)^2. The mean of a share s of the values
    is at most sqrt(1 / s) deviations away (by Cauchy and Schwarz), whichever they are:
    for 16 times the rounding at worst, it spares one pass over memory.
    """
    first = axes[0]
    # On an explicit mesh a slice has to leave each device as much.
    mesh = jax.typeof(x).sharding.mesh
    devices = math.prod(mesh.shape[name] for name in shards.explicit_axes(x, first))
    rows = -(-x.shape[first] // (16 * devices)) * devices
    share = lax.slice_in_dim(x, 0, rows, axis=first)
    n = math.prod(share.shape[a] for a in axes) or 1
    return lax.stop_gradient(jnp.sum(share, axes) / n)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets of examples.

    Args:
      a: as `measure` returns them.
      b: of the other set, of the same features.

    Raises:
      ValueError: if they are of different features, or a count is negative or not
        finite, where it is known.

    Examples:
      >>> import jax.numpy as jnp
      >>> a = measure(jnp.array([[1.0], [3.0]]))
      >>> b = measure(jnp.array([[5.0], [7.0]]))
      >>> count, mean, var = merge(a, b)
      >>> count.item(), mean.tolist(), var.tolist()
      (4.0, [4.0], [5.0])
    """
    check_same_features(a=a.mean, b=b.mean)

    def stack(*leaves: Array) -> Array:
        return jnp.stack(jnp.broadcast_arrays(*leaves))  # a count may be shared

    return merge_stacked(jax.tree.map(stack, a, b))


def merge_stacked(moments: Moments) -> Moments:
    """Return the moments of the union of D disjoint sets of examples.

    The mean of the union is the weighted mean of the means, and its variance the mean
    of the variances plus the variance of the means: the law of total variance.

    Args:
      moments: of D sets, stacked along a leading axis: mean and var of shape `[D, C]`,
        count of shape `[D]` or `[D, C]`.

    Returns:
      Moments with mean and var of shape `[C]`, count of shape `[]` or `[C]`.

    Raises:
      TypeError: if the means are of neither a floating-point nor a complex dtype.
      ValueError: if they are not stacked, or counts do not fit or, where they are
        known, are negative or not finite.

    References:
      Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance".

    Examples:
      >>> import jax.numpy as jnp
      >>> means = jnp.array([[0.0], [4.0]])
      >>> sets = Moments(count=jnp.array([1.0, 3.0]), mean=means, var=jnp.zeros((2, 1)))
      >>> count, mean, var = merge_stacked(sets)
      >>> count.item(), mean.tolist(), var.tolist()
      (4.0, [3.0], [3.0])
    """
    n, mean, var = moments
    n = n.reshape(n.shape + (1,) * (mean.ndim - n.ndim))
    features = range(1, mean.ndim)
    check_input(mean, features)
    n = align_weights(n, mean, features)
    within = moments_over(var, (0,), n).mean
    count, mean, between = moments_over(mean, (0,), n)
    return Moments(count, mean, within + between)


def gathered(moments: Moments) -> Moments:
    """Return stacked moments, whole on each device of a mesh, by one exchange."""

    def flat(parts: tuple[Array, ...]) -> Array:
        return ravel_pytree(parts)[0]

    parts = _as_real(moments)
    rows = shards.gathered(jax.vmap(flat)(parts))
    _, unravel = ravel_pytree(jax.tree.map(lambda part: part[0], parts))
    return _from_real(jax.vmap(unravel)(rows))


def _as_real(moments: Moments) -> tuple[Array, ...]:
    """Return moments as real numbers alone, so that one array can hold them all."""
    count, mean, var = moments
    imaginary = (mean.imag,) if jnp.iscomplexobj(mean) else ()
    return (count, var, mean.real, *imaginary)


def _from_real(parts: tuple[Array, ...]) -> Moments:
    """Return the moments of which `_as_real` made these parts."""
    count, var, mean, *imaginary = parts
    return Moments(count, lax.complex(mean, *imaginary) if imaginary else mean, var)


def across(
    moments: Moments,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
) -> Moments:
    """Return `merge_across`, or the moments themselves if no axis is named."""
    if axis_name is None:
        return moments
    return merge_across(moments, axis_name, axis_index_groups)


def merge_across(
    moments: Moments,
    axis_name: AxisName,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Merge the moments of every instance along a named axis, in one collective.

    Counts may differ between instances, and an empty one weighs nothing. Sums of
    squares would lose the variance where the mean is large, so each instance puts its
    moments into a row of its own, the rows are added up, and all merge the same rows.
    A sum, unlike a gather, serves several names at once under every transform, and
    `jax.shard_map` knows that its result is the same on all devices.

    Args:
      moments: of this instance's examples, as `measure` returns them.
      axis_name: name, or tuple of names, of axes bound by `jax.pmap`, `jax.vmap` or
        `jax.shard_map`.
      axis_index_groups: partition of the axis into groups of one size, of which each
        merges its own moments; under `jax.pmap` and `jax.shard_map(check_vma=False)`.

    Returns:
      Moments of the same shapes, the same on all instances that were merged.

    Raises:
      ValueError: if an axis name is not bound, if the groups are not such a
        partition, or if the transform does not allow groups.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])  # of two instances
      >>> def of_all(x):
      ...     return merge_across(measure(x), "instances")
      >>> _, mean, var = jax.vmap(of_all, axis_name="instances")(x)
      >>> mean.tolist(), var.tolist()
      ([[4.0], [4.0]], [[5.0], [5.0]])
    """
    num_rows = axis_size(axis_name)
    row = lax.axis_index(axis_name)
    if axis_index_groups is not None:
        num_rows = group_size(axis_index_groups, num_rows)
        row = place_in_group(axis_index_groups)[row]
    flat, unravel = ravel_pytree(_as_real(moments))
    rows = jnp.zeros((num_rows, *flat.shape), flat.dtype).at[row].set(flat)
    try:
        rows = lax.psum(rows, axis_name, axis_index_groups=axis_index_groups)
    except NotImplementedError as error:
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} is not supported here ({error}); "
            "use jax.pmap or jax.shard_map(..., check_vma=False), or name two axes and "
            "share statistics along one of them"
        ) from error
    return merge_stacked(_from_real(jax.vmap(unravel)(rows)))


def _squared_abs(x: Array) -> Array:
    """Return |x|^2, real."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def align_weights(weights: Array, x: Array, feature_axis: int | Sequence[int]) -> Array:
    """Return `weights` with x's rank, each axis of x's size or 1.

    Raises:
      ValueError: if their shape does not fit, or as `check_non_negative` and
        `feature_axes` say.
    """
    axes = reduction_axes(x.ndim, feature_axis)
    w = jnp.asarray(weights)
    if w.ndim == len(axes):
        w = jnp.expand_dims(w, feature_axes(x.ndim, feature_axis))
    if w.ndim != x.ndim or any(
        s not in (1, t) for s, t in zip(w.shape, x.shape, strict=False)
    ):
        raise ValueError(
            f"weights of shape {list(jnp.shape(weights))} do not fit x of shape "
            f"{list(x.shape)}; expected x's shape, or x's shape without its feature "
            "axes, where any axis may be 1: one weight an example of [N, H, W, C] is "
            "weights[:, None, None]"
        )
    check_non_negative(weights)
    return w


def check_same_features(**means: Array) -> None:
    """Refuse means of different features, which would broadcast.

    Raises:
      ValueError: naming their shapes.
    """
    shapes = {name: list(jnp.shape(mean)) for name, mean in means.items()}
    if len(set(map(tuple, shapes.values()))) > 1:
        given = ", those of ".join(f"{name} {of}" for name, of in shapes.items())
        raise ValueError(
            f"the means of {given} have different shapes; give statistics of the same "
            "features"
        )


def check_non_negative(weights: ArrayLike) -> None:
    """Refuse weights that are negative, NaN or infinite, where they are known.

    Raises:
      ValueError: saying the least or the greatest; or if they are complex, known or
        not.
    """
    if jnp.iscomplexobj(weights):
        raise ValueError(
            f"weights have dtype {jnp.result_type(weights)}; expected real numbers: "
            "give their real part"
        )
    if isinstance(weights, jax.core.Tracer) or not jnp.size(weights):
        return
    with jax.ensure_compile_time_eval():
        known = jnp.asarray(weights)
        least, greatest = jnp.min(known).item(), jnp.max(known).item()
    if not least >= 0:
        raise ValueError(
            f"weights must be non-negative numbers, but the least is {least}; give 0 "
            "to leave a value out"
        )
    if greatest == math.inf:
        raise ValueError(
            "weights must be finite numbers, but the greatest is inf; to leave all "
            "others out, give it 1 and them 0"
        )


def _total_weight(w: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Return the sum of `w` over `axes` as if it were broadcast to `shape`.

    The result is a scalar where all features have the same weights.
    """
    repeats = math.prod(shape[a] // w.shape[a] for a in axes)
    n = jnp.sum(w, axes) * repeats
    return n.reshape(()) if n.size == 1 else n
