"""The one contract that every norm fulfils, and the names of all that do.

A transform is a pair of pure functions, as in optax:

    params, state = transform.init(num_features)
    y, state = transform.apply(x, params, state, train=True)

The functions of this module bind the options of a norm and return its transform;
`NORMS` has them by name, such as `NORMS.make("whitening:method=zca")`. The mathematics
is in `bn_jax.functional` and `bn_jax.variants`. `bn_jax.linen.Norm` and
`bn_jax.nnx.Norm` make a module of any transform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, ConfigError, Range
from bn_jax.functional import BatchNormState, CountedState
from bn_jax.names import TRACEABLE, Table
from bn_jax.variants import one_moment, per_example, pointwise
from bn_jax.variants import quantile as quantile_lib
from bn_jax.variants import renorm as renorm_lib
from bn_jax.variants import whitening as whitening_lib
from bn_jax.variants.per_example import single_axis

Momentum = Annotated[float, SHARE, TRACEABLE]  # weight of the OLD average
Epsilon = Annotated[float, POSITIVE, TRACEABLE]
Average = Literal["exponential", "debiased", "cumulative"]
_AT_LEAST_2 = Range("a number at least 2", lambda v: v >= 2)

# What of a call concerns the batch alone, and changes nothing where there is none.
_ABOUT_THE_BATCH = frozenset({"axis_name", "axis_index_groups", "ghost_batch_size"})
_MOMENTS = frozenset(
    {"weights", "axis_name", "axis_index_groups", "statistics", "update_state"}
)


class Transform(NamedTuple):
    """A norm with its options bound.

    Attributes:
      init: `init(num_features, dtype=jnp.float32) -> (params, state)`, both NamedTuples
        of arrays; parameters may be None. The state is empty where nothing is averaged,
        and in float32 or wider where there is one.
      apply: `apply(x, params, state, *, train, feature_axis=-1, batch_axis=0, ...) ->
        (y, state)`: y of x's shape and dtype. The dots are what `takes` names.
      takes: further keyword arguments of `apply`, all with the meaning that they have
        for `bn_jax.batch_norm`: of weights, axis_name, axis_index_groups,
        ghost_batch_size, statistics, update_state.
      uses_batch: whether what becomes of an example depends on the others of its batch
        in training.
      epsilon: what is added to the variance, for a transform that predicts by
        (x - mean) / sqrt(var + epsilon) with the mean and var of its state; else None.
      name: for messages.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Array, Any]]
    takes: frozenset[str] = frozenset()
    uses_batch: bool = True
    epsilon: Any = None
    name: str = "norm"


class FlaxBatchNorm(NamedTuple):
    """The attributes of Flax's own batch norm layer, which is no function of ours."""

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
    """
    takes = _MOMENTS | {"ghost_batch_size"}
    init = _initializer(functional_lib.init, scale=use_scale, bias=use_bias)
    if average == "exponential":
        apply = _with_options(
            functional_lib.batch_norm, momentum=momentum, epsilon=epsilon
        )
        return Transform(init, apply, takes, epsilon=epsilon, name="batch_norm")
    if average not in ("debiased", "cumulative"):
        raise ValueError(
            f"average={average!r}; expected exponential, debiased or cumulative"
        )

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
        momentum_now = functional_lib.cumulative_momentum(state.count)
        if average == "debiased":
            momentum_now = functional_lib.debiased_momentum(momentum, state.count)
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


def renorm(
    *,
    r_max: Annotated[float, AT_LEAST_1, TRACEABLE] = 3.0,
    d_max: Annotated[float, NOT_NEGATIVE, TRACEABLE] = 5.0,
    start: Annotated[int, NOT_NEGATIVE] = 0,
    r_end: Annotated[int, NOT_NEGATIVE] = 0,
    d_end: Annotated[int, NOT_NEGATIVE] = 0,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return batch renormalisation: `bn_jax.variants.renorm.batch_renorm`.

    Args:
      r_max: largest correction of the deviation, at least 1.
      d_max: largest correction of the mean, in deviations, at least 0.
      start: step at which the limits begin to rise from 1 and 0; until then this is
        batch norm. The paper's is 5,000.
      r_end: step at which the first limit has risen to `r_max`; the paper's is 40,000.
      d_end: step at which the second has risen to `d_max`; the paper's is 25,000.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).

    Raises:
      ConfigError: if a limit is too small, or reached before it begins to rise.
    """
    schedule: dict[str, Any] = {
        "r_max": r_max,
        "d_max": d_max,
        "start": start,
        "r_end": r_end,
        "d_end": d_end,
    }
    try:
        renorm_lib.limits(0, **schedule)
    except ValueError as error:
        raise ConfigError(f"norm='renorm': {error}") from None
    return Transform(
        _initializer(renorm_lib.init, scale=use_scale, bias=use_bias),
        _without_batch_axis(
            renorm_lib.batch_renorm, momentum=momentum, epsilon=epsilon, **schedule
        ),
        _MOMENTS,
        epsilon=epsilon,
        name="renorm",
    )


def layer(
    *, epsilon: Epsilon = 1e-5, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return layer norm: `bn_jax.variants.per_example.layer_norm`.

    Args:
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.
    """
    apply = _with_options(per_example.layer_norm, epsilon=epsilon)
    return _stateless("layer", apply, use_scale, use_bias)


def group(
    *,
    num_groups: Annotated[int, AT_LEAST_1] = 2,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return group norm: `bn_jax.variants.per_example.group_norm`.

    Args:
      num_groups: number of contiguous groups of features, a divisor of their number.
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.
    """
    apply = _with_options(
        per_example.group_norm, num_groups=num_groups, epsilon=epsilon
    )
    return _stateless("group", apply, use_scale, use_bias)


def instance(
    *, epsilon: Epsilon = 1e-5, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return instance norm: `bn_jax.variants.per_example.instance_norm`.

    Args:
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma), one for each feature.
      use_bias: whether there is a bias (beta), one for each feature.
    """
    apply = _with_options(per_example.instance_norm, epsilon=epsilon)
    return _stateless("instance", apply, use_scale, use_bias)


def _stateless(
    name: str, apply: Callable[..., Any], use_scale: bool, use_bias: bool
) -> Transform:
    def init(
        num_features: int | Sequence[int], dtype: Any = jnp.float32
    ) -> tuple[Any, per_example.EmptyState]:
        params, _ = functional_lib.init(
            num_features, scale=use_scale, bias=use_bias, dtype=dtype
        )
        return params, per_example.EmptyState()

    return Transform(init, apply, uses_batch=False, name=name)


def whitening(
    *,
    method: whitening_lib.Method = "zca",
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

    def init(
        num_features: int, dtype: Any = jnp.float32
    ) -> tuple[Any, whitening_lib.WhiteningState]:
        return whitening_lib.init(
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
        num_features = x.shape[single_axis(x, "feature_axis", feature_axis)]
        return whitening_lib.whiten(
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
    return Transform(init, _without_batch_axis(apply), takes, name="whitening")


def quantile(
    *,
    target: quantile_lib.Target = "uniform",
    num_quantiles: Annotated[int, _AT_LEAST_2] = 64,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-3,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return the probability integral transform: `bn_jax.variants.quantile`.

    Args:
      target: "uniform" or "gaussian".
      num_quantiles: number of knots.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: distance below which knots are tied, as a share of the distance between
        the outer knots.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
    """
    shape: dict[str, Any] = {"target": target, "num_quantiles": num_quantiles}
    return Transform(
        _initializer(quantile_lib.init, scale=use_scale, bias=use_bias, **shape),
        _without_batch_axis(
            quantile_lib.quantile_norm, momentum=momentum, epsilon=epsilon, **shape
        ),
        frozenset({"axis_name", "update_state"}),
        name="quantile",
    )


def center(
    *, momentum: Momentum = 0.9, use_scale: bool = True, use_bias: bool = True
) -> Transform:
    """Return what removes the mean alone: `bn_jax.variants.one_moment.center`.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
    """
    return Transform(
        _initializer(one_moment.init_center, scale=use_scale, bias=use_bias),
        _without_batch_axis(one_moment.center, momentum=momentum),
        _MOMENTS,
        name="center",
    )


def scale(
    *,
    momentum: Momentum = 0.9,
    epsilon: Epsilon = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Transform:
    """Return what removes the deviation alone: `bn_jax.variants.one_moment.scale`.

    Args:
      momentum: weight of the OLD average, in [0, 1].
      epsilon: added to the variance, greater than 0.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
    """
    return Transform(
        _initializer(one_moment.init_scale, scale=use_scale, bias=use_bias),
        _without_batch_axis(one_moment.scale, momentum=momentum, epsilon=epsilon),
        _MOMENTS,
        name="scale",
    )


def dyt(
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
    """
    return Transform(
        _initializer(pointwise.init_dyt, alpha=alpha, scale=use_scale, bias=use_bias),
        _without_batch_axis(pointwise.dyt),
        uses_batch=False,
        name="dyt",
    )


def derf(
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
    """
    return Transform(
        _initializer(
            pointwise.init_derf,
            alpha=alpha,
            shift=shift,
            scale=use_scale,
            bias=use_bias,
        ),
        _without_batch_axis(pointwise.derf),
        uses_batch=False,
        name="derf",
    )


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
        traceable may be traced arrays.

    Raises:
      ConfigError: if there is no such name or option, or a value is out of range.
    """
    named = NORMS.parse(spec)
    known = NORMS.options(named.name)
    concrete = {
        key: value
        for key, value in options.items()
        if key not in known
        or not (known[key].is_traceable and isinstance(value, jax.Array))
    }
    NORMS.written(named.name, concrete)  # refuses
    defaults = {key: option.default for key, option in known.items()}
    return named.name, {**defaults, **named.options, **options}


class Layer(NamedTuple):
    """What a layer is made of, for `bn_jax.linen.norm` and `bn_jax.nnx.norm`."""

    name: str | None  # of the norm; None of a transform that was given
    made: Transform | FlaxBatchNorm | None
    options: dict[str, Any]  # of the name
    attributes: dict[str, Any]  # of the layer


def layer_of(
    spec: str | Transform, options: Mapping[str, Any], attributes: Mapping[str, Any]
) -> Layer:
    """Return what a layer is made of.

    Args:
      spec: a name of `NORMS` with its options, or a transform.
      options: values that go before those in `spec`, perhaps traced.
      attributes: of the layer. None is the same as none given.

    Raises:
      ConfigError: if there is no such name or option, a value is out of range, or the
        norm does not take an attribute that is given.
    """
    attributes = {k: v for k, v in attributes.items() if v is not None}
    sharing = {k: v for k, v in attributes.items() if k in _ABOUT_THE_BATCH}
    others = {k: v for k, v in attributes.items() if k not in _ABOUT_THE_BATCH}
    if not isinstance(spec, str):
        if options:
            raise ConfigError(
                f"got options {', '.join(options)} for a transform, whose options are "
                "bound; give a name instead, or bind them to the transform"
            )
        return Layer(None, spec, {}, others | taken(spec, **sharing))
    name, values = resolve(spec, options)
    made = NORMS.rows[name](**values) if options else _named(spec)
    if isinstance(made, Transform):
        sharing = taken(made, **sharing)
    elif made is not None:
        check_taken(name, frozenset({"axis_name", "axis_index_groups"}), sharing)
    return Layer(name, made, values, others | sharing)


@functools.cache
def _named(spec: str) -> Transform | FlaxBatchNorm | None:
    """Return what a text names: the same object each time, so that layers are equal."""
    return NORMS.make(spec)


def is_batch_norm(spec: str) -> bool:
    """Return whether a norm, by name, predicts by a moving mean and variance.

    Of such a norm there are exact statistics, and it can be folded.
    """
    transform = NORMS.make(spec)
    if isinstance(transform, Transform):
        return transform.epsilon is not None
    return transform is not None


def as_batch(
    x: Array,
    feature_axis: int | Sequence[int],
    mask: Array | None,
    weights: Array | None,
) -> tuple[Array, int | Sequence[int], Array | None]:
    """Return x, its feature axis and its weights, as `Transform.apply` takes them.

    Args:
      x: array of any rank; of rank 1 it is one example, as `jax.vmap` hands it on, and
        becomes a batch of one.
      feature_axis: axis (or axes) of the features of `x`.
      mask: booleans that broadcast to `x`; False leaves a value out of the statistics.
      weights: of the examples or positions; given instead of `mask`.

    Raises:
      ValueError: if both mask and weights are given, or there is no such axis.
    """
    if mask is not None and weights is not None:
        raise ValueError("mask and weights are both given; give one of them")
    moments_lib.feature_axes(x.ndim, feature_axis)
    is_example = x.ndim == 1
    if is_example:
        x = x[None]
    if mask is not None:
        weights = jnp.asarray(mask, bool)
    if weights is not None and (is_example or mask is not None):
        weights = jnp.asarray(weights)
        weights = weights.reshape((1,) * (x.ndim - weights.ndim) + weights.shape)
    return x, -1 if is_example else feature_axis, weights


def taken(transform: Transform, **options: Any) -> dict[str, Any]:
    """Return those keyword arguments of a call that are given and change anything.

    Args:
      transform: to be called with them.
      **options: by name; None means that one is not given.

    Raises:
      ValueError: if the transform does not take one that is given.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not transform.uses_batch:
        given = {k: v for k, v in given.items() if k not in _ABOUT_THE_BATCH}
    check_taken(transform.name, transform.takes, given)
    return given


def check_taken(name: str, takes: frozenset[str], given: Mapping[str, Any]) -> None:
    """Refuse what a norm does not take.

    Raises:
      ConfigError: naming it.
    """
    surplus = sorted(given.keys() - takes)
    if surplus:
        raise ConfigError(
            f"norm={name!r} takes no {' or '.join(surplus)} (got "
            f"{', '.join(f'{key}={_short(given[key])}' for key in surplus)}); leave it "
            "out, or choose batch_norm, which takes it"
        )


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"an array of shape {list(shape)}"


def _initializer(
    function: Callable[..., tuple[Any, Any]], **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """Return `init(num_features, dtype)` of a variant's own, with options bound."""

    def init(
        num_features: int | Sequence[int], dtype: Any = jnp.float32
    ) -> tuple[Any, Any]:
        return function(num_features, dtype=dtype, **options)

    return init


def _with_options(
    function: Callable[..., tuple[Array, Any]], **options: Any
) -> Callable[..., tuple[Array, Any]]:
    """Return `apply` of a variant's function, with options bound."""

    def apply(x: Array, params: Any, state: Any, **call: Any) -> tuple[Array, Any]:
        return function(x, params, state, **options, **call)

    return apply


def _without_batch_axis(
    function: Callable[..., tuple[Array, Any]], **options: Any
) -> Callable[..., tuple[Array, Any]]:
    """Return `apply` of a function that needs not know which axis has the examples."""

    def apply(
        x: Array, params: Any, state: Any, *, batch_axis: int = 0, **call: Any
    ) -> tuple[Array, Any]:
        del batch_axis
        return function(x, params, state, **options, **call)

    return apply
