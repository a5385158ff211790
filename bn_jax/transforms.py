"""The names of all norms.

`NORMS` has the constructors of transforms by name, such as
`NORMS.make("whitening:method=zca")`; each binds the options of a norm and returns its
`Transform`. The mathematics is in `bn_jax.functional` and `bn_jax.variants`.
`bn_jax.linen.Norm` and `bn_jax.nnx.Norm` make a module of any transform.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax.averages import (
    BatchNormState,
    CountedState,
    cumulative_momentum,
    debiased_momentum,
)
from bn_jax.contract import (
    MOMENTS,
    Epsilon,
    Momentum,
    Transform,
    initializer,
)
from bn_jax.names import Table
from bn_jax.variants.mabn import mabn_transform as mabn
from bn_jax.variants.one_moment import center_transform as center
from bn_jax.variants.one_moment import scale_transform as scale
from bn_jax.variants.per_example import group_transform as group
from bn_jax.variants.per_example import instance_transform as instance
from bn_jax.variants.per_example import layer_transform as layer
from bn_jax.variants.pointwise import derf_transform as derf
from bn_jax.variants.pointwise import dyt_transform as dyt
from bn_jax.variants.quantile import quantile_transform as quantile
from bn_jax.variants.renorm import renorm_transform as renorm
from bn_jax.variants.whitening import whitening_transform as whitening

Average = Literal["exponential", "debiased", "cumulative"]


class FlaxBatchNorm(NamedTuple):
    """The attributes of Flax's own batch norm layer, which has no function of ours."""

    momentum: Any
    epsilon: Any
    use_scale: bool
    use_bias: bool
    use_fast_variance: bool


def batch_norm(
    *,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    average: Average = "exponential",
) -> Transform:
    """Return batch norm: `bn_jax.batch_norm`.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
      average: "exponential", with `momentum`; "debiased", the same without the weight
        of the initial mean 0 and variance 1; or "cumulative", the mean over all
        batches. The last two count the batches in their state.

    Raises:
      ValueError: if the average is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform = batch_norm(momentum=0.75)
      >>> params, state = transform.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = transform.apply(x, params, state, train=True)
      >>> y.round(3).ravel().tolist(), state.mean.tolist()
      ([-1.0, 1.0], [0.5])
    """
    takes = MOMENTS | {"ghost_batch_size"}
    init = initializer(functional_lib.init, scale=use_scale, bias=use_bias)
    if average == "exponential":
        apply = functools.partial(
            functional_lib.batch_norm, momentum=momentum, epsilon=epsilon
        )
        return Transform(init, apply, takes, epsilon=epsilon, name="batch_norm")
    if average not in ("debiased", "cumulative"):
        raise ValueError(
            f"average={average!r}; expected exponential, debiased or cumulative"
        )

    counted = CountedState._fields

    def init_counted(
        num_features: int | Sequence[int], dtype: Any = jnp.float32
    ) -> tuple[Any, CountedState]:
        params, averages = init(num_features, dtype)
        return params, CountedState(
            averages.mean, averages.var, jnp.zeros((), jnp.float32)
        )

    def apply_counted(
        x: Array, params: Any, state: CountedState, *, train: bool, **call: Any
    ) -> tuple[Array, CountedState]:
        checks.check_fields(params=(params, checks.AFFINE), state=(state, counted))
        momentum_now = cumulative_momentum(state.count)
        if average == "debiased":
            momentum_now = debiased_momentum(momentum, state.count)
        averages = BatchNormState(state.mean, state.var)
        y, moved = functional_lib.batch_norm(
            x,
            params,
            averages,
            train=train,
            momentum=momentum_now,
            epsilon=epsilon,
            **call,
        )
        if moved is averages:
            return y, state
        count = state.count + _weighs(**call)
        return y, CountedState(moved.mean, moved.var, count)

    return Transform(
        init_counted, apply_counted, takes, epsilon=epsilon, name="batch_norm"
    )


def _weighs(
    weights: Array | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    **others: Any,
) -> Array | int:
    """Return 1 if the batch, over all instances along the axis, weighs anything."""
    del others
    if weights is None:
        return 1
    weighs = jnp.any(jnp.asarray(weights) > 0).astype(jnp.float32)
    if axis_name is None:
        return weighs
    return lax.pmax(weighs, axis_name, axis_index_groups=axis_index_groups)


def flax(
    *,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool = True,
) -> FlaxBatchNorm:
    """Return Flax's own batch norm, to compare with.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
      use_fast_variance: whether the variance is E[x^2] - E[x]^2.
    """
    return FlaxBatchNorm(momentum, epsilon, use_scale, use_bias, use_fast_variance)


def none() -> None:
    """Return no norm."""


NORMS: Table[Transform | FlaxBatchNorm | None] = Table(
    "norm",
    {
        "batch_norm": batch_norm,
        "renorm": renorm,
        "mabn": mabn,
        "layer": layer,
        "group": group,
        "instance": instance,
        "whitening": whitening,
        "quantile": quantile,
        "center": center,
        "scale": scale,
        "dyt": dyt,
        "derf": derf,
        "flax": flax,
        "none": none,
    },
)


def resolve(spec: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name in a text, and the values of all options of that name.

    Args:
      spec: a name of `NORMS` with its options.
      options: values that go before those in the text. Those that are marked as
        traceable may be traced, or arrays.

    Raises:
      ConfigError: if there is no such name or option, or a value is out of range.
    """
    named = NORMS.parse(spec)
    known = NORMS.options(named.name)
    concrete = {
        key: _plain(value)
        for key, value in options.items()
        if key not in known or not (known[key].is_traceable and _is_open(value))
    }
    NORMS.written(named.name, concrete)  # refuses
    defaults = {key: option.default for key, option in known.items()}
    return named.name, {**defaults, **named.options, **options, **concrete}


def _is_open(value: Any) -> bool:
    """Return whether a value is traced, or an array of several numbers."""
    return isinstance(value, jax.core.Tracer) or bool(getattr(value, "shape", ()))


def _plain(value: Any) -> Any:
    """Return a known number of NumPy or JAX as Python's, and all else as it is."""
    if isinstance(value, jax.core.Tracer) or getattr(value, "shape", None) != ():
        return value
    return value.item()


# Arguments of layers' classes that are no choices of a norm's user.


@functools.cache
def named(spec: str) -> Transform | FlaxBatchNorm | None:
    """Make the norm that a text names, once, so that equal texts give equal layers."""
    return NORMS.make(spec)


def is_batch_norm(spec: str) -> bool:
    """Return whether a norm, by name, predicts by a moving mean and variance.

    Of such a norm there are exact statistics, and it can be folded.

    Raises:
      ConfigError: if there is no such name or option, or a value is out of range.
    """
    transform = NORMS.make(spec)
    if isinstance(transform, Transform):
        return transform.epsilon is not None
    return transform is not None


def keeps_statistics(spec: str) -> bool:
    """Return whether a norm, by name, keeps moving statistics.

    Raises:
      ConfigError: if there is no such name or option, or a value is out of range.

    Examples:
      >>> keeps_statistics("renorm"), keeps_statistics("layer")
      (True, False)
      >>> keeps_statistics("whitening:group_size=3")  # whatever the layers' features
      True
    """
    transform = NORMS.make(spec)
    if not isinstance(transform, Transform):
        return transform is not None
    return "update_state" in transform.takes
