r"""Whitening: batch norm by the full covariance of the features.

The features are centred and multiplied by a matrix that makes their covariance the
identity, where batch norm makes the diagonal 1 and leaves the correlations:

$$y = \gamma W (x - \mu) + \beta, \qquad W (\Sigma + \epsilon I) W^T = I.$$

Such a W is fixed up to a rotation, and the methods differ in the rotation (Kessy et
al.). With $\Sigma + \epsilon I = V \Lambda V^T = L L^T$:

- "zca": $V \Lambda^{-1/2} V^T$, the one that moves x least. It is a smooth function of
  the covariance, also where eigenvalues repeat.
- "pca": $\Lambda^{-1/2} V^T$. Eigenvectors turn and swap from batch to batch where
  eigenvalues are near each other; training suffers from it (Huang et al., 2018). In
  float32 y is off by less than a share 1e-3, as that of the others, and its gradient by
  less than 1e-2 where eigenvalues differ by more than a share 1e-3.
- "cholesky": $L^{-1}$, smooth, and dependent on the order of the features.
- "iternorm": Newton's iteration towards zca, of matrix products alone. After few steps
  directions of small variance have not reached variance 1, by intent (Huang et al.,
  2019).

What is averaged for prediction is the covariance, not the matrix W. Training and
prediction then apply the same function to their moments, so that they agree when the
batch is the data. An average of W is not a function of the average covariance, and of
pca's W, which jumps from batch to batch, it is not whitening at all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.averages import BatchNormState, update_average
from bn_jax.contract import (
    DivisorError,
    Epsilon,
    Momentum,
    Transform,
    without_batch_axis,
)
from bn_jax.fields import AT_LEAST_1, ConfigError
from bn_jax.functional import BatchNormParams
from bn_jax.mapped_axes import AxisName
from bn_jax.moments import Moments, measure
from bn_jax.variants.whitening_matrices import matrix_function, product, transpose

Method = Literal["zca", "pca", "cholesky", "iternorm"]


class WhiteningState(NamedTuple):
    """The moving averages that prediction whitens by."""

    mean: Array  # shape [C], float32 or wider
    # Average of biased covariances, without epsilon; shape [groups, group_size,
    # group_size], float32 or wider.
    covariance: Array


def init(
    num_features: int,
    *,
    group_size: int | None = None,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BatchNormParams, WhiteningState]:
    """Return gamma 1, beta 0, moving mean 0 and moving covariance the identity.

    Args:
      num_features: C.
      group_size: features whitened together, a divisor of C; None for all C.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters. The state is in float32, or wider where dtype is.

    Raises:
      ValueError: as `bn_jax.init` says.
      ValueError: if there are several feature axes, or the group size does not divide
        C.

    Examples:
      >>> _, state = init(4, group_size=2)
      >>> state.covariance.shape, state.covariance[0].tolist()
      ((2, 2, 2), [[1.0, 0.0], [0.0, 1.0]])
    """
    params, (mean, _) = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    groups, size = _split(checks.check_one_integer(num_features), group_size)
    identity = jnp.eye(size, dtype=mean.dtype)
    return params, WhiteningState(mean, jnp.tile(identity, (groups, 1, 1)))


def whiten(
    x: Array,
    params: BatchNormParams,
    state: WhiteningState,
    *,
    train: bool,
    method: Method = "zca",
    group_size: int | None = None,
    num_iterations: int = 5,
    momentum: float | Array = 0.9,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    axis_name: AxisName | None = None,
    update_state: bool | None = None,
) -> tuple[Array, WhiteningState]:
    """Whiten by the batch in training, by the moving averages in prediction.

    In a direction in which x has variance v, y has variance v / (v + epsilon), by
    "iternorm" only after many iterations. So where the covariance is singular, as with
    no more values than features, y is finite, and 0 in the directions in which x does
    not vary.

    The features may be of unlike scales, without regard to epsilon: what rounds away is
    relative to each. A variance, epsilon included, is resolved down to about 1e-6 of
    what it would be if the features were not correlated (in float32). Singular
    covariances with epsilon below that are whitened as if epsilon were about there: y
    is as above, and gradients along the directions in which x does not vary are smaller
    than the formula's.

    Args:
      x: batch of shape `[N, C]`, `[N, H, W, C]`, `[C, H, W, N]` or any other of rank 2
        or more, of dtype float32, bfloat16, float16 or float64.
      params: gamma and beta, each of shape `[C]` or None, applied after whitening.
      state: moving mean, of shape `[C]`, and covariance, of shape `[groups, group_size,
        group_size]`.
      train: static. True whitens by the moments of `x` and returns updated averages;
        False whitens by `state` and returns it as it was.
      method: which of the whitening matrices; see the module.
      group_size: features whitened together: each of C / group_size contiguous groups
        is whitened by its own covariance. A divisor of C, with 1 batch norm; None for
        all C. The covariance of few examples is too noisy for many features.
      num_iterations: of "iternorm", at least 1; the error falls with each.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the diagonal of the covariance, greater than 0.
      feature_axis: axis of the features; all others are averaged over.
      axis_name: name (or tuple of names) of the mapped axes whose instances, of one
        shape, share their moments; None uses those of `x` alone.
      update_state: static. Whether the averages move by the moments of `x`; by
        default in training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state. The biased covariance
      both whitens and is averaged.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype, `train` or
        `update_state` is a JAX array, or `params` or `state` is no NamedTuple with its
        fields.
      ValueError: on a wrong rank, feature axis, feature count, dtype of the state,
        empty batch, method, number of iterations, group size, momentum, epsilon or axis
        name; the message says which.

    References:
      Kessy, Lewin and Strimmer, 2018, "Optimal whitening and decorrelation",
      arXiv:1512.00809.
      Huang et al., 2018, "Decorrelated Batch Normalization", arXiv:1804.08450 (zca,
      groups).
      Siarohin, Sangineto and Sebe, 2019, "Whitening and Coloring Batch Transform for
      GANs", arXiv:1806.00420 (cholesky).
      Huang et al., 2019, "Iterative Normalization: Beyond Standardization towards
      Efficient Whitening", arXiv:1904.03441.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init(2)
      >>> x = jnp.array([[3.0, 1.0], [-3.0, -1.0], [1.0, 3.0], [-1.0, -3.0]])
      >>> y, state = whiten(x, params, state, train=True)
      >>> (y.T @ y / 4).round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    checks.check_static(train=train, update_state=update_state)
    checks.check_epsilon(epsilon)
    checks.check_momentum(momentum)
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_real(x, "whitened features")
    axis = checks.single_axis(x, "feature_axis", feature_axis)
    checks.check_fields(
        params=(params, checks.AFFINE), state=(state, ("mean", "covariance"))
    )
    checks.check_features(x, axis, **params._asdict(), mean=state.mean)
    groups, size = _split(x.shape[axis], group_size)
    if state.covariance.shape != (groups, size, size):
        raise ValueError(
            f"state.covariance has shape {list(state.covariance.shape)}, but group_size"
            f"={group_size} of {x.shape[axis]} features needs {[groups, size, size]}; "
            f"make it with init({x.shape[axis]}, group_size={group_size})"
        )
    checks.check_state(state)
    whitening_matrix = matrix_function(method, num_iterations)
    update_state = train if update_state is None else update_state

    # Features first and all else in a row: what the products read without a copy. On
    # CPU those of a single group are four times as fast without its axis.
    features = (size,) if groups == 1 else (groups, size)
    moved = jnp.moveaxis(x, axis, 0)
    rows = moved.reshape(*features, -1)
    rows = rows.astype(moments_lib.statistics_dtype(x.dtype))

    def spread(per_feature: Array) -> Array:
        return per_feature.reshape(*features, 1)

    new_state = state
    if train or update_state:
        checks.check_not_empty(x)
        n, mean, _ = measure(x, feature_axis=axis, axis_name=axis_name)
        centred = rows - spread(mean)
        covariance = _covariance(centred, axis_name)
        if update_state:
            # It averages any two arrays; the covariance stands in the variance's place.
            stacked = covariance.reshape(groups, size, size)
            averages = update_average(
                BatchNormState(*state), Moments(n, mean, stacked), momentum=momentum
            )
            new_state = WhiteningState(*averages)
    if not train:
        centred = rows - spread(state.mean)
        covariance = state.covariance.reshape(*features, size)

    w = whitening_matrix(covariance, jnp.asarray(epsilon, covariance.dtype))
    scale, bias = params
    if scale is not None:
        w = w * spread(scale)
    y = product(w, centred)
    if bias is not None:
        y = y + spread(bias)
    y = jnp.moveaxis(y.astype(x.dtype).reshape(moved.shape), 0, axis)
    return y, new_state


# The products of covariances and their roots: full precision also where the default of
# the device is less (bfloat16 on TPU, TF32 on GPU).
def _covariance(centred: Array, axis_name: AxisName | None) -> Array:
    """Return the biased covariance of centred rows `[..., size, M]`."""
    covariance = product(centred, transpose(centred)) / centred.shape[-1]
    return covariance if axis_name is None else lax.pmean(covariance, axis_name)


def _split(num_features: int, group_size: int | None) -> tuple[int, int]:
    """Return the number of groups, and of features in each; refuse a remainder."""
    if group_size is None:
        return 1, num_features
    if group_size < 1 or num_features % group_size:
        raise DivisorError(
            f"group_size={group_size}",
            num_features,
            otherwise=", or leave it out to whiten all together",
        )
    return num_features // group_size, group_size


def whitening_transform(
    *,
    method: Method = "zca",
    group_size: Annotated[int | None, AT_LEAST_1] = None,
    max_group_size: Annotated[int | None, AT_LEAST_1] = None,
    num_iterations: Annotated[int, AT_LEAST_1] = 5,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return batch whitening: `bn_jax.variants.whitening.whiten`.

    Args:
      method: "zca", "pca", "cholesky" or "iternorm".
      group_size: features whitened together, a divisor of their number; None for all.
      max_group_size: instead of it, for layers of different numbers of features: groups
        are of the greatest divisor that is not above.
      num_iterations: of "iternorm".
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the diagonal of the covariance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Raises:
      ConfigError: if both group sizes are given.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 2.0], [-3.0, -2.0], [1.0, -2.0], [-1.0, 2.0]])
      >>> transform = whitening_transform()
      >>> y, _ = transform.apply(x, *transform.init(2), train=True)
      >>> abs(y.T @ y / 4).round(3).tolist()  # its covariance
      [[1.0, 0.0], [0.0, 1.0]]
    """
    if group_size is not None and max_group_size is not None:
        raise ConfigError(
            f"norm='whitening': max_group_size={max_group_size} with group_size="
            f"{group_size}; give one of them"
        )

    def size_for(num_features: int) -> int | None:
        if max_group_size is None:
            return group_size
        num_features = checks.check_one_integer(num_features)
        sizes = range(min(max_group_size, num_features), 0, -1)
        return next(size for size in sizes if num_features % size == 0)

    def init_groups(
        num_features: int, dtype: Any = jnp.float32
    ) -> tuple[Any, WhiteningState]:
        return init(
            num_features,
            group_size=size_for(num_features),
            scale=use_scale,
            bias=use_bias,
            dtype=dtype,
        )

    def apply(
        x: Array, params: Any, state: Any, *, feature_axis: int = -1, **call: Any
    ) -> tuple[Array, Any]:
        x = jnp.asarray(x)
        moments_lib.check_input(x, feature_axis)
        num_features = x.shape[checks.single_axis(x, "feature_axis", feature_axis)]
        return whiten(
            x,
            params,
            state,
            method=method,
            group_size=size_for(num_features),
            num_iterations=num_iterations,
            momentum=momentum,
            epsilon=epsilon,
            feature_axis=feature_axis,
            **call,
        )

    takes = frozenset({"axis_name", "update_state"})
    return Transform(init_groups, without_batch_axis(apply), takes, name="whitening")
