r"""Moving average batch norm: small batches with the statistics of several.

Batch norm has two statistics of a batch in its forward pass, mean and variance, and two
more in its backward pass. This norm keeps one of each, for which it takes averages over
the last batches, so that none depends on two or three examples alone:

$$z = \frac{x}{\sqrt{S + \epsilon}}, \qquad y = \gamma\, r\, z + \beta, \qquad
  \frac{\partial L}{\partial x} = \frac{g - P\, z}{\sqrt{S + \epsilon}}, \qquad
  g = \gamma\, r\, \frac{\partial L}{\partial y},$$

where S is the mean of x^2 over the last batches, P that of g z, and r corrects towards
the moving average that prediction divides by, as in batch renormalisation. No mean is
subtracted: the authors centre the kernel before each norm instead, as the option
`centred_kernels` of our LeNet does.

P is known only when the backward pass has computed g, and a function cannot return what
its own derivative needs first. So the values of g z of the last batches are a
*parameter*, `moving_products`, whose gradient is what it has to lose: one step of plain
gradient descent at rate 1 makes it the new values. Averages of gradients, over devices
or micro-batches, keep that right. Our training takes this step whatever the optimizer;
in a loop of your own, `optax.multi_transform({True: optax.sgd(1.0), False: ...}, mask)`
does, with the mask of `bn_jax.variables.moving_param_mask`. Any other step makes the
averages wrong.

The authors' code holds r at 1 for the first thousand batches, and its moving average
has its momentum from the first batch on. Here r is 1 during the warm-up, and the moving
average weighs all batches until then equally; afterwards it has its momentum.

References:
  Yan et al., 2020, "Towards Stabilizing Batch Statistics in Backward Propagation of
  Batch Normalization", arXiv:2001.06838.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.averages import cumulative_momentum
from bn_jax.contract import (
    Epsilon,
    Momentum,
    Transform,
    initializer,
    without_batch_axis,
)
from bn_jax.fields import AT_LEAST_1, ConfigError
from bn_jax.mapped_axes import AxisName, axis_size
from bn_jax.names import TRACEABLE


class MABNParams(NamedTuple):
    """Gamma, beta and the statistics of the last backward passes."""

    scale: Array | None  # gamma, shape [C]
    bias: Array | None  # beta, shape [C]
    moving_products: Array  # of g z, the oldest first; shape [B, C], float32 or wider


class MABNState(NamedTuple):
    """The statistics of the last forward passes, and what prediction divides by."""

    var: Array  # moving average of S, shape [C], float32 or wider
    squares: Array  # means of x^2, the oldest first; shape [B, C], float32 or wider
    # Number of batches; shape [], float32. (Shadows tuple.count.)
    count: Array  # type: ignore[assignment]


def init(
    num_features: int | Sequence[int],
    *,
    num_batches: int = 16,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[MABNParams, MABNState]:
    """Return gamma 1, beta 0, moving average 1 and no batch.

    Args:
      num_features: C.
      num_batches: B, whose statistics are kept.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of gamma and beta. All else is in float32, or wider where dtype is.

    Raises:
      ValueError: if num_features is not an integer, or num_batches less than 1.

    Examples:
      >>> params, state = init(1, num_batches=2)
      >>> params.moving_products.tolist(), state.var.tolist(), state.count.item()
      ([[0.0], [0.0]], [1.0], 0.0)
    """
    num_features = checks.check_one_integer(num_features)
    checks.check_known("num_batches", num_batches, AT_LEAST_1)
    params, (_, var) = functional_lib.init(
        num_features, scale=scale, bias=bias, dtype=dtype
    )
    none = jnp.zeros((num_batches, num_features), var.dtype)
    state = MABNState(var, none, jnp.zeros((), jnp.float32))
    return MABNParams(*params, none), state


def mabn(
    x: Array,
    params: MABNParams,
    state: MABNState,
    *,
    train: bool,
    warm_up: int = 100,
    r_max: float | Array = 5.0,
    momentum: float | Array = 0.9,
    epsilon: float | Array = 1e-5,
    feature_axis: int = -1,
    axis_name: AxisName | None = None,
    update_state: bool | None = None,
) -> tuple[Array, MABNState]:
    """Divide by the root of the mean square over the last batches.

    For `warm_up` batches it divides by that of the batch alone, and the gradient is the
    exact one; the moving average is until then the mean over all batches.

    Args:
      x: batch of rank 2 or more, of a real floating-point dtype.
      params: gamma and beta, each of shape `[C]` or None, and the products `[B, C]`,
        which have to take steps of their own: see the module.
      state: moving average `[C]`, squares `[B, C]` and the number of batches.
      train: static. False divides by the root of the moving average and returns the
        state as it was.
      warm_up: number of batches, at least B.
      r_max: largest correction towards the moving average, at least 1.
      momentum: weight of the OLD average, in [0, 1], after the warm-up.
      epsilon: added to the mean square, greater than 0.
      feature_axis: axis of the features; all others are averaged over.
      axis_name: name (or tuple of names) of the mapped axes whose instances, of one
        shape, share their statistics.
      update_state: static. Whether the state moves by `x`; by default in training.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the new state.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype, `train` or
        `update_state` is a JAX array, or `params` or `state` is no NamedTuple with its
        fields.
      ValueError: on a wrong rank, feature axis, feature count, number of rows, dtype of
        the state, empty batch, warm-up, limit, momentum, epsilon or axis name; the
        message says which.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init(1)
      >>> x = jnp.array([[1.0], [7.0]])
      >>> y, state = mabn(x, params, state, train=True)
      >>> [f"{value:.3f}" for value in y.ravel()], state.var.tolist()
      (['0.200', '1.400'], [25.0])
    """
    checks.check_static(train=train, update_state=update_state)
    checks.check_epsilon(epsilon)
    checks.check_momentum(momentum)
    checks.check_known("r_max", r_max, AT_LEAST_1)
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_real(x, "moving averages of squares")
    checks.check_fields(
        params=(params, MABNParams._fields), state=(state, MABNState._fields)
    )
    gamma, beta, products = params
    checks.check_features(x, feature_axis, scale=gamma, bias=beta, var=state.var)
    checks.check_state(state)
    _check_kept(products, state)
    _check_warm_up(warm_up, num_batches=len(products))
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    wide = x.astype(moments_lib.statistics_dtype(x.dtype))
    moves = train if update_state is None else update_state
    is_warm = state.count >= warm_up

    if train or moves:
        checks.check_not_empty(x)
        if axis_name is not None:
            axis_size(axis_name)  # raises where it is not bound
        square = _mean(lax.stop_gradient(wide) ** 2, axes, axis_name)
        squares = jnp.concatenate([state.squares[1:], square[None]])
        divisor = jnp.where(is_warm, squares.mean(0), square)
    if train:
        checks.warn_of_one_value(
            x.shape,
            feature_axis,
            axis_name,
            None,
            outcome="until it is warm, y is beta + gamma or beta - gamma",
            stacklevel=3,
        )
        z = _divided(
            axes,
            axis_name,
            wide,
            divisor + epsilon,
            products.astype(wide.dtype),
            is_warm,
        )
        r = jnp.sqrt((divisor + epsilon) / (state.var + epsilon))
        r = jnp.where(is_warm, jnp.clip(r, 1 / r_max, r_max), 1)
        y = z * jnp.expand_dims(r, axes)
    else:
        y = wide * jnp.expand_dims(lax.rsqrt(state.var + epsilon), axes)
    y = functional_lib.scale_and_shift(y, gamma, beta, axes).astype(x.dtype)
    if not moves:
        return y, state
    m = jnp.where(is_warm, momentum, cumulative_momentum(state.count))
    var = (m * state.var + (1 - m) * divisor).astype(state.var.dtype)
    return y, MABNState(var, squares.astype(state.squares.dtype), state.count + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divided(
    axes: Sequence[int],
    axis_name: AxisName | None,
    x: Array,
    square: Array,
    products: Array,
    is_warm: Array,
) -> Array:
    """Return z = x / sqrt(square), and in the backward pass new products.

    Args:
      axes: all but the feature axis.
      axis_name: of the instances that share their statistics.
      x: batch.
      square: what to divide by the root of; shape `[C]`, taken as constant.
      products: means of g z of the last batches, `[B, C]`; see the module.
      is_warm: whether their mean serves, or that of this batch alone; shape [].
    """
    return x * jnp.expand_dims(lax.rsqrt(square), axes)


def _forward(
    axes: Sequence[int], axis_name: AxisName | None, x: Array, square: Array, *rest: Any
) -> tuple[Array, Any]:
    z = _divided(axes, axis_name, x, square, *rest)
    return z, (z, square, *rest)


def _backward(
    axes: Sequence[int], axis_name: AxisName | None, residuals: Any, g: Array
) -> Any:
    z, square, products, is_warm = residuals
    product = _mean(g * z, axes, axis_name)
    moved = jnp.concatenate([products[1:], product[None]])
    p = jnp.where(is_warm, moved.mean(0), product)
    gradient = g - jnp.expand_dims(p, axes) * z
    gradient = gradient * jnp.expand_dims(lax.rsqrt(square), axes)
    return gradient, jnp.zeros_like(square), products - moved, None


_divided.defvjp(_forward, _backward)


def _mean(values: Array, axes: Sequence[int], axis_name: AxisName | None) -> Array:
    mean = values.mean(axes)
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _check_kept(products: Array, state: MABNState) -> None:
    """Refuse products or squares that are not one row of features for each batch."""
    expected = (len(products), *state.var.shape)
    for name, value in {
        "params.moving_products": products,
        "state.squares": state.squares,
    }.items():
        if value.shape != expected:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; expected {list(expected)}, a "
                "row of features for each batch: make both with one num_batches"
            )


def _check_warm_up(warm_up: int, *, num_batches: int) -> None:
    if warm_up < num_batches:
        raise ValueError(
            f"warm_up={warm_up} is less than num_batches={num_batches}; expected as "
            "many at least, as averages are taken over so many batches"
        )


def mabn_transform(
    *,
    num_batches: Annotated[int, AT_LEAST_1] = 16,
    warm_up: Annotated[int, AT_LEAST_1] = 100,
    r_max: Annotated[float, AT_LEAST_1, TRACEABLE] = 5.0,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return moving average batch norm: `bn_jax.variants.mabn.mabn`.

    It wants kernels that are centred, as those of `lenet:centred_kernels=true`, and a
    step of its own for the parameter `moving_products`, as our training takes it.

    Args:
      num_batches: over which statistics are averaged, forward and backward.
      warm_up: number of batches, at least `num_batches`, before the averages are used.
      r_max: largest correction towards the moving average, at least 1.
      momentum: weight of the OLD average after the warm-up, in [0, 1]; the authors
        take .98.
      epsilon: added to the mean square, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Raises:
      ConfigError: if the warm-up is too short, or num_batches less than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = mabn_transform(), jnp.array([[3.0], [-3.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.round(3).ravel().tolist()
      [1.0, -1.0]
    """
    try:
        checks.check_known("num_batches", num_batches, AT_LEAST_1)
        _check_warm_up(warm_up, num_batches=num_batches)
    except ValueError as error:
        raise ConfigError(f"norm='mabn': {error}") from None
    return Transform(
        initializer(init, num_batches=num_batches, scale=use_scale, bias=use_bias),
        without_batch_axis(
            mabn, warm_up=warm_up, r_max=r_max, momentum=momentum, epsilon=epsilon
        ),
        frozenset({"axis_name", "update_state"}),
        name="mabn",
    )
