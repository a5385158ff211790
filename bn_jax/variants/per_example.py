r"""Layer, group and instance norm: each example is normalised by its own moments.

The features are cut into contiguous groups, and the moments taken over the features of
a group and all positions, for every example n and group g alone:

$$y = \gamma \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} + \beta.$$

One group is layer norm, a group for each feature instance norm. There is no batch in
it, hence an empty state, no difference between training and prediction, and no
collective.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.contract import DivisorError, EmptyState, Epsilon, Transform
from bn_jax.fields import AT_LEAST_1, counted
from bn_jax.functional import BatchNormParams, normalize


def group_norm(
    x: Array,
    params: BatchNormParams,
    state: EmptyState,
    *,
    train: bool,
    num_groups: int,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    batch_axis: int = 0,
) -> tuple[Array, EmptyState]:
    """Normalise each example by the moments of each group of its features.

    Args:
      x: batch of shape `[N, C]`, `[N, H, W, C]`, `[C, H, W, N]` or any other of rank 2
        or more, of dtype float32, bfloat16, float16, float64 or complex.
      params: gamma and beta, each of shape `[C]` or None.
      state: empty.
      train: accepted because every transform takes it; it changes nothing.
      num_groups: number of contiguous groups of C / num_groups features, a divisor of
        C.
      epsilon: added to the biased variance, greater than 0.
      feature_axis: axis of the features.
      batch_axis: axis of the examples.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the state as it was.

    Raises:
      TypeError: if `x` is of neither a floating-point nor a complex dtype, or `params`
        is no NamedTuple with its fields.
      ValueError: on a wrong rank, axis, feature count, number of groups or epsilon.

    References:
      Wu and He, 2018, "Group Normalization", arXiv:1803.08494.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import init
      >>> params, _ = init(4)
      >>> x = jnp.array([[1.0, 3.0, 0.0, 0.0]])
      >>> y, _ = group_norm(x, params, EmptyState(), train=True, num_groups=2)
      >>> y.round(3).tolist()
      [[-1.0, 1.0, 0.0, 0.0]]
    """
    del train
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    feature = checks.single_axis(x, "feature_axis", feature_axis)
    batch = checks.single_axis(x, "batch_axis", batch_axis)
    if batch == feature:
        raise ValueError(
            f"batch_axis={batch_axis} and feature_axis={feature_axis} are the same "
            f"axis of x of shape {list(x.shape)}; name the axis of examples"
        )
    checks.check_fields(params=(params, checks.AFFINE))
    checks.check_features(x, feature, **params._asdict())
    num_features = x.shape[feature]
    checks.check_known("num_groups", num_groups, AT_LEAST_1)
    if num_features % num_groups:
        raise DivisorError(
            f"num_groups={num_groups}", num_features, of=f"x of shape {list(x.shape)}"
        )
    of_example = math.prod(s for a, s in enumerate(x.shape) if a != batch)
    if of_example == num_groups and x.shape[batch] != 0:
        warnings.warn(
            f"x of shape {list(x.shape)} in {counted(num_groups, 'group')} has one "
            "value a group: y equals beta whatever x is, and nothing before this layer "
            "learns; use fewer groups",
            stacklevel=2,
        )

    split = (num_groups, num_features // num_groups)
    groups = x.reshape(*x.shape[:feature], *split, *x.shape[feature + 1 :])
    groups = groups.astype(moments_lib.statistics_dtype(x.dtype))
    # The axis of groups stands at `feature`, and pushes those behind it by one.
    kept = (feature, batch if batch < feature else batch + 1)
    others = moments_lib.reduction_axes(groups.ndim, kept)
    _, mean, var = moments_lib.moments_over(groups, others)
    y = normalize(groups, mean, var, epsilon=epsilon, feature_axis=kept)
    y = y.reshape(x.shape)
    others = moments_lib.reduction_axes(x.ndim, feature)
    return functional_lib.scale_and_shift(y, *params, others).astype(x.dtype), state


def layer_norm(
    x: Array,
    params: BatchNormParams,
    state: EmptyState,
    *,
    train: bool,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    batch_axis: int = 0,
) -> tuple[Array, EmptyState]:
    """Normalise each example by its moments over features and positions.

    This is `group_norm` with one group: over all axes but the batch, with a gamma and
    a beta for each feature.

    Args:
      x: see `group_norm`.
      params: see `group_norm`.
      state: see `group_norm`.
      train: see `group_norm`.
      epsilon: see `group_norm`.
      feature_axis: see `group_norm`.
      batch_axis: see `group_norm`.

    Returns:
      `(y, state)`, as `group_norm`.

    Raises:
      TypeError: as `group_norm` says.
      ValueError: as `group_norm` says.

    References:
      Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv:1607.06450.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import init
      >>> params, _ = init(2)
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> y, _ = layer_norm(x, params, EmptyState(), train=True)
      >>> y.round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """
    return group_norm(
        x,
        params,
        state,
        train=train,
        num_groups=1,
        epsilon=epsilon,
        feature_axis=feature_axis,
        batch_axis=batch_axis,
    )


def instance_norm(
    x: Array,
    params: BatchNormParams,
    state: EmptyState,
    *,
    train: bool,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    batch_axis: int = 0,
) -> tuple[Array, EmptyState]:
    """Normalise each feature of each example by its moments over the positions.

    This is `group_norm` with a group for each feature. Of an example `[C]` without
    positions nothing is left but beta, which is warned of when traced.

    Args:
      x: see `group_norm`.
      params: see `group_norm`.
      state: see `group_norm`.
      train: see `group_norm`.
      epsilon: see `group_norm`.
      feature_axis: see `group_norm`.
      batch_axis: see `group_norm`.

    Returns:
      `(y, state)`, as `group_norm`.

    Raises:
      TypeError: as `group_norm` says.
      ValueError: as `group_norm` says.

    References:
      Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization: The Missing
      Ingredient for Fast Stylization", arXiv:1607.08022.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import init
      >>> params, _ = init(2)
      >>> x = jnp.array([[[1.0, 30.0], [3.0, 10.0]]])  # one example of two positions
      >>> y, _ = instance_norm(x, params, EmptyState(), train=True)
      >>> y.round(3).tolist()
      [[[-1.0, 1.0], [1.0, -1.0]]]
    """
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    feature = checks.single_axis(x, "feature_axis", feature_axis)
    return group_norm(
        x,
        params,
        state,
        train=train,
        num_groups=x.shape[feature],
        epsilon=epsilon,
        feature_axis=feature_axis,
        batch_axis=batch_axis,
    )


def layer_transform(
    *, epsilon: Epsilon = 1e-5, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return layer norm: `bn_jax.variants.per_example.layer_norm`.

    Args:
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = layer_transform(), jnp.array([[1.0, 3.0]])
      >>> y, _ = transform.apply(x, *transform.init(2), train=True)
      >>> y.round(3).tolist()
      [[-1.0, 1.0]]
    """
    apply = functools.partial(layer_norm, epsilon=epsilon)
    return _stateless("layer", apply, use_scale, use_bias)


def group_transform(
    *,
    num_groups: Annotated[int, AT_LEAST_1] = 2,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return group norm: `bn_jax.variants.per_example.group_norm`.

    Args:
      num_groups: number of contiguous groups of features, a divisor of their number;
        Wu and He take 32.
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform = group_transform(num_groups=2)
      >>> x = jnp.array([[1.0, 3.0, 5.0, 5.0]])
      >>> y, _ = transform.apply(x, *transform.init(4), train=True)
      >>> y.round(3).tolist()
      [[-1.0, 1.0, 0.0, 0.0]]
    """
    apply = functools.partial(group_norm, num_groups=num_groups, epsilon=epsilon)
    return _stateless("group", apply, use_scale, use_bias)


def instance_transform(
    *, epsilon: Epsilon = 1e-5, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return instance norm: `bn_jax.variants.per_example.instance_norm`.

    Args:
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform = instance_transform()
      >>> x = jnp.array([[[1.0], [3.0]]])  # one example of two positions
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.round(3).tolist()
      [[[-1.0], [1.0]]]
    """
    apply = functools.partial(instance_norm, epsilon=epsilon)
    return _stateless("instance", apply, use_scale, use_bias)


def _stateless(
    name: str, apply: Callable[..., Any], use_scale: bool, use_bias: bool
) -> Transform:
    def init(
        num_features: int | Sequence[int], dtype: Any = jnp.float32
    ) -> tuple[Any, EmptyState]:
        params, _ = functional_lib.init(
            num_features, scale=use_scale, bias=use_bias, dtype=dtype
        )
        return params, EmptyState()

    return Transform(init, apply, uses_batch=False, name=name)
