"""The names of all norms, and how layers are made of them.

`NORMS` has the constructors of transforms by name, such as
`NORMS.make("whitening:method=zca")`; each binds the options of a norm and returns its
`Transform`. The mathematics is in `bn_jax.functional` and `bn_jax.variants`.
`bn_jax.linen.Norm` and `bn_jax.nnx.Norm` make a module of any transform.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax import checks
from bn_jax import functional as functional_lib
from bn_jax import moments as moments_lib
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
    with_options,
)
from bn_jax.fields import ConfigError, did_you_mean
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

# What of a call concerns the batch alone, and changes nothing where there is none.
_ABOUT_THE_BATCH = frozenset({"axis_name", "axis_index_groups", "ghost_batch_size"})


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
        apply = with_options(
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


class Layer(NamedTuple):
    """What a layer is made of, for `bn_jax.linen.norm` and `bn_jax.nnx.norm`."""

    name: str | None  # of the norm; None of a transform that was given
    made: Transform | FlaxBatchNorm | None
    options: dict[str, Any]  # of the name
    attributes: dict[str, Any]  # of the layer


def layer_of(
    spec: str | Transform, options: Mapping[str, Any], attributes: Mapping[str, Any]
) -> Layer:
    """Return the parts of a layer.

    Args:
      spec: a name of `NORMS` with its options, or a transform.
      options: values that go before those in `spec`, perhaps traced.
      attributes: of the layer, or options. None leaves one out.

    Raises:
      ConfigError: if there is no such name or option, a value is out of range or given
        twice, the norm takes no such axis names or ghost batches, options are given for
        a transform, or what is given is neither a name nor a transform.
    """
    attributes = {k: v for k, v in attributes.items() if v is not None}
    sharing = {k: v for k, v in attributes.items() if k in _ABOUT_THE_BATCH}
    others = {k: v for k, v in attributes.items() if k not in _ABOUT_THE_BATCH}
    if not isinstance(spec, str | Transform):
        raise ConfigError(
            f"a norm is given as {spec!r}; expected a name of bn_jax.transforms.NORMS, "
            'such as "batch_norm", or a transform'
        )
    as_attributes = {k: v for k, v in others.items() if _is_option(k)}
    twice = as_attributes.keys() & options.keys()
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is given twice; give it once")
    options = {**options, **as_attributes}
    others = {k: v for k, v in others.items() if not _is_option(k)}
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


def check_attributes(
    spec: str | Transform, given: Mapping[str, Any], kind: type
) -> bool:
    """Refuse attributes that a layer does not have.

    Args:
      spec: of the norm, by which it is named.
      given: attributes of the layer, or options of norms.
      kind: the layer's class.

    Returns:
      Whether some of them are options of the transform, not attributes of the layer.

    Raises:
      ConfigError: naming those that are neither, and what there is.
    """
    attributes = _attributes(kind)
    options = [key for key in given if key not in attributes and _is_option(key)]
    unknown = [key for key in given if key not in attributes and key not in options]
    if unknown:
        name = spec.name if isinstance(spec, Transform) else NORMS.parse(spec).name
        shown = sorted(attributes - _GIVEN)
        if isinstance(spec, str):
            shown = [*(o for o in NORMS.options(name) if o not in shown), *shown]
        faults = [f"{key}{did_you_mean(key, shown)}" for key in unknown]
        raise ConfigError(
            f"norm={name!r} takes no {', '.join(faults)}; expected some of "
            f"{', '.join(shown)}"
        )
    return bool(options)


# Arguments of layers' classes that are no choices of a norm's user.
_GIVEN = {"self", "num_features", "transform", "parent", "name", "rngs"}


@functools.cache
def _attributes(kind: type) -> frozenset[str]:
    """Return the names of what a layer's class takes, and the norms' `batch_axis`."""
    init: Any = vars(kind)["__init__"]  # the signature of an NNX class is another
    return frozenset(inspect.signature(init).parameters) | {"batch_axis"}


@functools.cache
def _is_option(name: str) -> bool:
    """Return whether a name is that of an option of a norm, such as momentum."""
    return any(name in NORMS.options(row) for row in NORMS.rows)


@functools.cache
def _named(spec: str) -> Transform | FlaxBatchNorm | None:
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


def check_transform(given: Any) -> None:
    """Refuse what is not a transform.

    Raises:
      TypeError: naming it.
    """
    if not isinstance(given, Transform):
        raise TypeError(
            f"transform is {given!r}; expected one, such as bn_jax.transforms.group(): "
            "of a name, the function norm of the module makes a layer"
        )


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
      ValueError: if both mask and weights are given, a mask does not broadcast, or
        there is no such axis.
    """
    if mask is not None and weights is not None:
        raise ValueError("mask and weights are both given; give one of them")
    moments_lib.feature_axes(x.ndim, feature_axis)
    is_example = x.ndim == 1
    if is_example:
        x = x[None]
    if mask is not None:
        weights = jnp.asarray(mask, bool)
        sizes = zip(weights.shape[::-1], x.shape[::-1], strict=False)
        if weights.ndim > x.ndim or any(m not in (1, n) for m, n in sizes):
            raise ValueError(
                f"mask of shape {list(weights.shape)} does not broadcast to x of shape "
                f"{list(x.shape)}; of one value an example make [N, 1, ...], or give "
                "weights, which may be [N, 1, 1] for [N, H, W, C]"
            )
    if weights is not None and (is_example or mask is not None):
        weights = jnp.asarray(weights)
        weights = weights.reshape((1,) * (x.ndim - weights.ndim) + weights.shape)
    return x, -1 if is_example else feature_axis, weights


def kept(
    x: Array, feature_axis: int | Sequence[int], weights: Array | None
) -> Array | None:
    """Return where values weigh anything, broadcasting to x; None for everywhere.

    Raises:
      ValueError: as `bn_jax.moments.align_weights` says.
    """
    if weights is None:
        return None
    return moments_lib.align_weights(weights, x, feature_axis) != 0


def zero_unless(kept: Array | None, x: Array) -> Array:
    """Return x with 0 where nothing is kept, and no gradient there."""
    return x if kept is None else jnp.where(kept, x, 0)


def offset_init(initializer: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """Return an initializer of values less the offset that `with_offset` adds."""
    if not offset:
        return initializer

    def init(*args: Any) -> Any:
        # They may be in a box, as with `nn.with_partitioning`.
        return jax.tree.map(lambda value: value - offset, initializer(*args))

    return init


def with_offset(params: Any, offset: float) -> Any:
    """Return parameters of which the scale is gamma, stored less an offset."""
    if not offset or params.scale is None:
        return params
    return params._replace(scale=params.scale + offset)


def check_initializers(
    transform: Transform, params: Any, initializers: Mapping[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Return the initializers that are given, by the name of their parameter.

    Args:
      transform: whose parameters they are of.
      params: as its init returns them.
      initializers: functions of a key, a shape and a dtype, by the name of a parameter.
        None stands for the transform's own values.

    Raises:
      ConfigError: if one is given for a parameter that the transform does not have.
    """
    given = {name: init for name, init in initializers.items() if init is not None}
    for name in given:
        if getattr(params, name, None) is None:
            raise ConfigError(
                f"{name}_init is given for norm={transform.name!r}, which has no "
                f"{name} here; leave it out, or choose a norm that has one"
            )
    return given


def taken(transform: Transform, **options: Any) -> dict[str, Any]:
    """Return those keyword arguments of a call that are given and change anything.

    Args:
      transform: to be called with them.
      **options: by name; None means that one is not given.

    Raises:
      ConfigError: if the transform does not take one that is given.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not transform.uses_batch:
        given = {k: v for k, v in given.items() if k not in _ABOUT_THE_BATCH}
    check_taken(transform.name, transform.takes, given)
    return given


def of_dummy_batch(
    transform: Transform,
    x: Array,
    feature_axis: int | Sequence[int],
    weights: Array | None,
) -> dict[str, Any]:
    """Return the keyword arguments of a call in training on a dummy batch.

    It initialises a module, or makes a table of its layers: no collective is called,
    and a batch of one gives no warning.
    """
    if "statistics" not in transform.takes:
        return {}
    moments = moments_lib.measure(x, feature_axis=feature_axis, weights=weights)
    return {"statistics": moments}


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
