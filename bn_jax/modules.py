"""What the modules of Linen and of NNX share: how a norm's layer is made and called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bn_jax import moments as moments_lib
from bn_jax import transforms
from bn_jax.contract import Transform
from bn_jax.fields import ConfigError, did_you_mean
from bn_jax.transforms import NORMS, FlaxBatchNorm

# Keywords of a call that concern the batch, and change nothing where there is none.
_ABOUT_THE_BATCH = frozenset({"axis_name", "axis_index_groups", "ghost_batch_size"})
# Arguments of layers' classes that are no choices of a norm's user.
_GIVEN = {"self", "num_features", "transform", "parent", "name", "rngs"}


class LayerSpec(NamedTuple):
    """What a layer is made of, for `bn_jax.linen.norm` and `bn_jax.nnx.norm`."""

    name: str | None  # of the norm; None of a transform that was given
    made: Transform | FlaxBatchNorm | None
    options: dict[str, Any]  # of the name
    attributes: dict[str, Any]  # of the layer


def layer_of(
    spec: str | Transform, options: Mapping[str, Any], attributes: Mapping[str, Any]
) -> LayerSpec:
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
        return LayerSpec(None, spec, {}, others | taken(spec, **sharing))
    name, values = transforms.resolve(spec, options)
    made = NORMS.rows[name](**values) if options else transforms.named(spec)
    if isinstance(made, Transform):
        sharing = taken(made, **sharing)
    elif made is not None:
        check_taken(name, frozenset({"axis_name", "axis_index_groups"}), sharing)
    return LayerSpec(name, made, values, others | sharing)


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


@functools.cache
def _attributes(kind: type) -> frozenset[str]:
    """Return the names of what a layer's class takes, and the norms' `batch_axis`."""
    init: Any = vars(kind)["__init__"]  # the signature of an NNX class is another
    return frozenset(inspect.signature(init).parameters) | {"batch_axis"}


@functools.cache
def _is_option(name: str) -> bool:
    """Return whether a name is that of an option of a norm, such as momentum."""
    return any(name in NORMS.options(row) for row in NORMS.rows)


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


def kept(
    module: Any, x: Array, feature_axis: int | Sequence[int], weights: Array | None
) -> Array | None:
    """Return which values of x a module keeps; None where it keeps all.

    Args:
      module: whose `zero_masked` says whether values of weight 0 become 0.
      x: input, as `as_batch` returns it.
      feature_axis: likewise.
      weights: likewise.
    """
    if not module.zero_masked or weights is None:
        return None
    return moments_lib.align_weights(weights, x, feature_axis) != 0


def options_of(
    module: Any,
    transform: Transform,
    x: Array,
    *,
    feature_axis: int | Sequence[int],
    is_example: bool,
    weights: Array | None,
    statistics: Any,
    train: bool,
    update_state: bool,
    is_dummy: bool,
) -> dict[str, Any]:
    """Return the keyword arguments with which a module applies a transform.

    Args:
      module: whose attributes are those of `Norm` but `transform`.
      transform: what is applied.
      x: what it is applied to.
      feature_axis: see `as_batch`.
      is_example: whether x was one example, whose batch axis is new.
      weights: see `as_batch`.
      statistics: see `Transform.apply`.
      train: see there.
      update_state: see there.
      is_dummy: whether the call initialises the module, or makes a table of its layers:
        no collective is called, and a batch of one gives no warning.

    Raises:
      ConfigError: if the transform does not take what is given.
    """
    options = taken(
        transform,
        weights=weights,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        ghost_batch_size=module.ghost_batch_size,
        statistics=statistics,
    )
    if train and is_dummy:
        options = {}
        if "statistics" in transform.takes:
            moments = moments_lib.measure(x, feature_axis=feature_axis, weights=weights)
            options = {"statistics": moments}
    if "update_state" in transform.takes:
        options["update_state"] = update_state
    return {
        "train": train,
        "feature_axis": feature_axis,
        "batch_axis": 0 if is_example else module.batch_axis,
        **options,
    }


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
