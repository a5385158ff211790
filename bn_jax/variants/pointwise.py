r"""Squashing functions in the place of a norm: no statistics at all.

$$y_{DyT} = \gamma \tanh(\alpha x) + \beta, \qquad
  y_{Derf} = \gamma\, \mathrm{erf}(\alpha x + s) + \beta,$$

with gamma and beta for each feature, and the scalars alpha and s for all of them, all
learned. Like a norm they bound what comes next, and they are nearly linear around 0;
unlike one they look at nothing but the value itself. The state is empty, and training
and prediction are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import erf

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.contract import EmptyState, Transform, initializer, without_batch_axis
from bn_jax.names import TRACEABLE


class DyTParams(NamedTuple):
    """What dynamic tanh learns."""

    scale: Array | None  # gamma, shape [C]
    bias: Array | None  # beta, shape [C]
    alpha: Array  # slope at 0, shape []


class DerfParams(NamedTuple):
    """What dynamic erf learns."""

    scale: Array | None  # gamma, shape [C]
    bias: Array | None  # beta, shape [C]
    alpha: Array  # factor of x, shape []
    shift: Array  # s, added to alpha x; shape []


def init_dyt(
    num_features: int | Sequence[int],
    *,
    alpha: float | Array = 0.5,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[DyTParams, EmptyState]:
    """Return gamma 1, beta 0 and alpha.

    Args:
      num_features: see `bn_jax.init`.
      alpha: its initial value, a scalar; the paper's default is 0.5.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters.

    Raises:
      ValueError: as `bn_jax.init` says.

    Examples:
      >>> params, _ = init_dyt(2)
      >>> params.scale.tolist(), params.bias.tolist(), params.alpha.item()
      ([1.0, 1.0], [0.0, 0.0], 0.5)
    """
    params, _ = functional_lib.init(num_features, scale=scale, bias=bias, dtype=dtype)
    return DyTParams(*params, jnp.asarray(alpha, dtype)), EmptyState()


def init_derf(
    num_features: int | Sequence[int],
    *,
    alpha: float | Array = 0.5,
    shift: float | Array = 0.0,
    scale: bool = True,
    bias: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[DerfParams, EmptyState]:
    """Return gamma 1, beta 0, alpha and s.

    Args:
      num_features: see `bn_jax.init`.
      alpha: its initial value, a scalar; the paper's is 0.5.
      shift: initial value of s, a scalar; the paper's is 0.
      scale: whether there is a gamma.
      bias: whether there is a beta.
      dtype: of the parameters.

    Raises:
      ValueError: as `bn_jax.init` says.

    Examples:
      >>> params, _ = init_derf(2)
      >>> params.scale.tolist(), params.alpha.item(), params.shift.item()
      ([1.0, 1.0], 0.5, 0.0)
    """
    params, _ = functional_lib.init(num_features, scale=scale, bias=bias, dtype=dtype)
    scalars = jnp.asarray(alpha, dtype), jnp.asarray(shift, dtype)
    return DerfParams(*params, *scalars), EmptyState()


def dyt(
    x: Array,
    params: DyTParams,
    state: EmptyState,
    *,
    train: bool,
    feature_axis: int | Sequence[int] = -1,
) -> tuple[Array, EmptyState]:
    """Apply dynamic tanh: gamma tanh(alpha x) + beta.

    Args:
      x: array of rank 2 or more, of a real floating-point dtype.
      params: gamma and beta, each of shape `[C]` or None, and the scalar alpha.
      state: empty.
      train: accepted because every transform takes it; it changes nothing.
      feature_axis: axis (or axes) of the features.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the state as it was.

    Raises:
      TypeError: if `x` is not of a real floating-point dtype, or `params` is no
        NamedTuple with its fields.
      ValueError: on a wrong rank, feature axis or feature count, or an alpha or s that
        is not a scalar.

    References:
      Zhu, Chen, He, LeCun and Liu, 2025, "Transformers without Normalization",
      arXiv:2503.10622.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init_dyt(1)
      >>> y, _ = dyt(jnp.array([[0.0], [200.0]]), params, state, train=True)
      >>> y.ravel().tolist()
      [0.0, 1.0]
    """
    del train
    x, wide = _checked(x, params, DyTParams._fields, feature_axis)
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    y = jnp.tanh(params.alpha * wide)
    y = functional_lib.scale_and_shift(y, params.scale, params.bias, axes)
    return y.astype(x.dtype), state


def derf(
    x: Array,
    params: DerfParams,
    state: EmptyState,
    *,
    train: bool,
    feature_axis: int | Sequence[int] = -1,
) -> tuple[Array, EmptyState]:
    """Apply dynamic erf: gamma erf(alpha x + s) + beta.

    Args:
      x: see `dyt`.
      params: gamma and beta, each of shape `[C]` or None, and the scalars alpha and s.
      state: empty.
      train: accepted because every transform takes it; it changes nothing.
      feature_axis: axis (or axes) of the features.

    Returns:
      `(y, state)`: y of x's shape and dtype, and the state as it was.

    Raises:
      TypeError: as `dyt` says.
      ValueError: as `dyt` says.

    References:
      Chen, Lu, Zhu, Sun and Liu, 2025, "Stronger Normalization-Free Transformers",
      arXiv:2512.10938.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, state = init_derf(1)
      >>> y, _ = derf(jnp.array([[0.0], [200.0]]), params, state, train=True)
      >>> y.ravel().tolist()
      [0.0, 1.0]
    """
    del train
    x, wide = _checked(x, params, DerfParams._fields, feature_axis)
    y = erf(params.alpha * wide + params.shift)
    axes = moments_lib.reduction_axes(x.ndim, feature_axis)
    y = functional_lib.scale_and_shift(y, params.scale, params.bias, axes)
    return y.astype(x.dtype), state


def _checked(
    x: Array,
    params: DyTParams | DerfParams,
    fields: Sequence[str],
    feature_axis: int | Sequence[int],
) -> tuple[Array, Array]:
    """Return x as an array, and in the dtype to compute in."""
    x = jnp.asarray(x)
    moments_lib.check_input(x, feature_axis)
    checks.check_real(x, "tanh and erf")
    checks.check_fields(params=(params, fields))
    checks.check_features(x, feature_axis, scale=params.scale, bias=params.bias)
    for name in set(fields) - set(checks.AFFINE):
        if jnp.shape(getattr(params, name)):
            raise ValueError(
                f"{name} has shape {list(jnp.shape(getattr(params, name)))}; expected "
                "a scalar, one for all features"
            )
    return x, x.astype(moments_lib.statistics_dtype(x.dtype))


def dyt_transform(
    *,
    alpha: Annotated[float, TRACEABLE] = 0.5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return dynamic tanh: `bn_jax.variants.pointwise.dyt`.

    Args:
      alpha: initial value of the learned slope.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = dyt_transform(), jnp.array([[0.0], [200.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.ravel().tolist()
      [0.0, 1.0]
    """
    return Transform(
        initializer(init_dyt, alpha=alpha, scale=use_scale, bias=use_bias),
        without_batch_axis(dyt),
        uses_batch=False,
        name="dyt",
    )


def derf_transform(
    *,
    alpha: Annotated[float, TRACEABLE] = 0.5,
    shift: Annotated[float, TRACEABLE] = 0.0,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return dynamic erf: `bn_jax.variants.pointwise.derf`.

    Args:
      alpha: initial value of the learned factor of x.
      shift: initial value of the learned number that is added to alpha x.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Examples:
      >>> import jax.numpy as jnp
      >>> transform, x = derf_transform(), jnp.array([[0.0], [-200.0]])
      >>> y, _ = transform.apply(x, *transform.init(1), train=True)
      >>> y.ravel().tolist()
      [0.0, -1.0]
    """
    return Transform(
        initializer(
            init_derf,
            alpha=alpha,
            shift=shift,
            scale=use_scale,
            bias=use_bias,
        ),
        without_batch_axis(derf),
        uses_batch=False,
        name="derf",
    )
