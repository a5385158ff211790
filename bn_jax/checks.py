"""What batch norm and its variants refuse: arguments that do not fit, and why."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax import Array

from bn_jax import moments as moments_lib
from bn_jax.fields import POSITIVE, SHARE, Range
from bn_jax.mapped_axes import (
    AxisIndexGroups,
    AxisName,
    axis_size,
    check_groups,
    group_size,
)

_WEIGHT_OF_THE_OLD = Range("the weight of the old average, in [0, 1]", SHARE.holds)
_NUMBER_OF_BATCHES = Range(
    "the number of batches in the old average, 0 or more",
    lambda v: 0 <= v < math.inf,
)

# Fields of parameters with gamma and beta, and of statistics.
AFFINE = ("scale", "bias")
AVERAGES = ("mean", "var")

# Choices that may be left open, and then follow from others.
_MAY_BE_NONE = frozenset({"update_state", "update_average"})

# How to come by what no init returns.
_MADE_BY = {
    "states": "pass a bn_jax.BatchNormState of stacked arrays",
    "options": "pass a bn_jax.convert.RenormOptions",
    "moments": "pass those that bn_jax.measure returns",
    "statistics": "pass a bn_jax.BatchNormState or what bn_jax.measure returns",
}


def check_batch_norm(
    x: Array,
    params: Any,
    state: Any,
    *,
    train: bool,
    epsilon: float | Array,
    feature_axis: int | Sequence[int],
    weighted: bool,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    ghost_batch_size: int | None,
    batch_axis: int,
    statistics: Any,
    update_state: bool | None,
) -> None:
    """Refuse a call of `bn_jax.batch_norm` that does not fit.

    What is read of the batch, such as its axis names, is checked only where it is read.
    Weights are checked where they are aligned, and momentum where it is applied.

    Args:
      x: see `batch_norm`, and so are all others but `weighted`.
      params: see `x`.
      state: see `x`.
      train: see `x`.
      epsilon: see `x`.
      feature_axis: see `x`.
      weighted: whether there are weights.
      axis_name: see `x`.
      axis_index_groups: see `x`.
      ghost_batch_size: see `x`.
      batch_axis: see `x`.
      statistics: see `x`.
      update_state: see `x`.

    Raises:
      TypeError: as `batch_norm` says.
      ValueError: as `batch_norm` says.
    """
    check_static(train=train, update_state=update_state)
    check_epsilon(epsilon)
    check_fields(params=(params, AFFINE), state=(state, AVERAGES))
    moments_lib.check_input(x, feature_axis)
    check_features(x, feature_axis, **params._asdict(), **state._asdict())
    check_state(state)
    if statistics is not None:
        check_fields(statistics=(statistics, AVERAGES))
        check_statistics(
            x,
            feature_axis,
            {"statistics.mean": statistics.mean, "statistics.var": statistics.var},
        )
    by_batch = train and statistics is None
    if not by_batch and not (train if update_state is None else update_state):
        return
    check_not_empty(x)
    check_groups(axis_name, axis_index_groups)
    together = list(x.shape)  # what is normalised by the same moments
    if by_batch and ghost_batch_size is not None:
        check_ghosts(x, ghost_batch_size, batch_axis, feature_axis)
        together[batch_axis] = ghost_batch_size
    if by_batch and not weighted:
        warn_of_one_value(
            together,
            feature_axis,
            axis_name,
            axis_index_groups,
            outcome="y equals beta whatever x is, and nothing before this layer learns",
            stacklevel=4,
        )


def check_known(name: str, value: Any, valid: Range) -> None:
    """Refuse a number that is out of range, where it is known.

    Args:
      name: of the argument, for the message.
      value: a number of Python, NumPy or JAX, or an array of them. A traced one passes,
        and so does one of which other processes hold a part.
      valid: the range.

    Raises:
      ValueError: if a number is complex or out of range, or the value is not a number.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        return
    given = value.tolist() if hasattr(value, "tolist") else value
    for number in given if isinstance(given, list) else [given]:
        if isinstance(number, list):
            check_known(name, number, valid)
        elif not _holds(valid, number):
            raise ValueError(f"{name}={number!r}; expected {valid.words}")


def _holds(valid: Range, number: Any) -> bool:
    # A bool is a number of Python's; None and a text are none.
    return isinstance(number, int | float) and valid.holds(number)


def check_fields(**given: tuple[Any, Sequence[str]]) -> None:
    """Refuse parameters or a state that are no NamedTuple with certain fields.

    Args:
      **given: by name of the argument, what was given and the fields.

    Raises:
      TypeError: naming what was given and what was expected.
    """
    for name, (value, fields) in given.items():
        # A plain tuple has methods named count and index, an array mean and var.
        if set(getattr(value, "_fields", ())) >= set(fields):
            continue
        mend = _MADE_BY.get(name, f"pass the {name} that the norm's init returns")
        if isinstance(value, Mapping):
            mend += f", with the values of a dict put in by {name}._replace(**values)"
        elif hasattr(value, "_fields"):
            mend += "; params come before state"
        raise TypeError(
            f"{name} is of type {type(value).__name__}; expected a NamedTuple with the "
            f"fields {', '.join(fields)}: {mend}"
        )


def check_epsilon(epsilon: float | Array) -> None:
    """Refuse a known number that is not positive and finite.

    Raises:
      ValueError: naming it.
    """
    check_known("epsilon", epsilon, POSITIVE)


def check_static(**choices: Any) -> None:
    """Refuse a choice that is not a boolean, or that only the running program knows.

    Args:
      **choices: by name, booleans of Python or NumPy. `update_state` and
        `update_average` may be None.

    Raises:
      TypeError: if one is a JAX array, or no boolean.
    """
    for name, choice in choices.items():
        if isinstance(choice, bool) or (choice is None and name in _MAY_BE_NONE):
            continue
        if isinstance(choice, jax.Array):
            raise TypeError(
                f"{name} must be a Python bool, known when the function is traced, but "
                f"is {choice}; pass it through static_argnames or functools.partial"
            )
        is_number = getattr(choice, "shape", None) == ()
        if not (is_number and choice.dtype == bool):  # NumPy's are fine
            raise TypeError(f"{name}={choice!r}; expected True or False")


def check_not_empty(x: Array) -> None:
    """Refuse a batch that has no moments.

    Raises:
      ValueError: if it is empty.
    """
    if x.size == 0:
        raise ValueError(
            f"x of shape {list(x.shape)} is empty; training mode needs at least one "
            "example: skip the batch, or pad it and give the padding weight 0"
        )


def single_axis(x: Array, name: str, axis: int) -> int:
    """Return an axis of `x` as a non-negative integer.

    Args:
      x: array of any shape.
      name: of the argument that gave the axis, for the message.
      axis: one integer, counted from the end where negative.

    Raises:
      ValueError: if it is not one axis of `x`.
    """
    if not isinstance(axis, SupportsIndex) or not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{name}={axis!r} is not an axis of x of shape {list(x.shape)}; give one "
            f"integer in [{-x.ndim}, {x.ndim - 1}]"
        )
    return operator.index(axis) % x.ndim


def check_real(x: Array, norm: str) -> None:
    """Refuse complex numbers.

    Args:
      x: array.
      norm: what does not take them, for the message.

    Raises:
      TypeError: if `x` is complex.
    """
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"x has dtype {x.dtype}, and {norm} are of real numbers; give the real and "
            "imaginary parts as features"
        )


def check_features(
    x: Array, feature_axis: int | Sequence[int], **per_feature: Array | None
) -> None:
    """Refuse parameters or statistics that do not fit the features of `x`.

    Raises:
      ValueError: if one has another shape than the feature axes, or as
        `bn_jax.moments.feature_axes` says.
    """
    axes = moments_lib.feature_axes(x.ndim, feature_axis)
    expected = tuple(x.shape[a] for a in axes)
    for name, value in per_feature.items():
        if value is not None and jnp.shape(value) != expected:
            raise ValueError(
                f"{name} has shape {list(jnp.shape(value))}, but x of shape "
                f"{list(x.shape)} has {list(expected)} features on feature_axis="
                f"{feature_axis!r}; make them with bn_jax.init("
                f"{expected[0] if len(expected) == 1 else expected}) or name the axis "
                "that holds the features"
            )


def check_statistics(
    x: Array, feature_axis: int | Sequence[int], per_feature: Mapping[str, Array]
) -> None:
    """Refuse statistics to normalise by that do not fit the features of `x`.

    Args:
      x: input.
      feature_axis: see `batch_norm`.
      per_feature: the statistics by name, such as "statistics.mean", for the message.

    Raises:
      ValueError: if one has another shape than the feature axes, or as
        `bn_jax.moments.feature_axes` says.
    """
    axes = moments_lib.feature_axes(x.ndim, feature_axis)
    expected = [x.shape[a] for a in axes]
    for name, value in per_feature.items():
        if list(jnp.shape(value)) != expected:
            raise ValueError(
                f"{name} has shape {list(jnp.shape(value))}, but x of shape "
                f"{list(x.shape)} has {expected} features on its axis "
                f"{feature_axis!r}; measure them of an array with the same features"
            )


def check_layer_fits(
    layer: str, x: Array, axis: int | Sequence[int], **per_feature: Array | None
) -> None:
    """Refuse an input of other features than a module was made for.

    Args:
      layer: name of the module.
      x: its input.
      axis: of the features, as the module was given it.
      **per_feature: arrays by name, each of shape `[C]`, or None.

    Raises:
      ValueError: saying how many features the module has, and how many x has.
    """
    axes = moments_lib.feature_axes(x.ndim, axis)
    given = tuple(x.shape[a] for a in axes)
    for name, value in per_feature.items():
        if value is not None and jnp.shape(value) != given:
            own, found = (_features(shape) for shape in (jnp.shape(value), given))
            raise ValueError(
                f"{layer} is made for {own} features, as its {name} is, but its input "
                f"of shape {list(x.shape)} has {found} on axis={axis!r}; give it the "
                f"inputs that it was made for, make it anew for {found}, or name as "
                "axis= the axis that holds the features"
            )


def _features(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def check_momentum(momentum: Any) -> None:
    """Refuse a momentum outside [0, 1], where it is known.

    Raises:
      ValueError: naming it.
    """
    check_known("momentum", momentum, _WEIGHT_OF_THE_OLD)


def check_num_batches(num_batches: Any) -> None:
    """Refuse a number of batches that is negative or not finite, where it is known.

    Raises:
      ValueError: naming it.
    """
    check_known("num_batches", num_batches, _NUMBER_OF_BATCHES)


def check_state(state: Any) -> None:
    """Refuse a NamedTuple of averages in a dtype that momentum near 1 would freeze.

    Raises:
      TypeError: if one is not an array.
      ValueError: if one is not in float32 or wider.
    """
    for name, value in state._asdict().items():
        if not hasattr(value, "dtype"):
            raise TypeError(
                f"state.{name} is a {type(value).__name__}; expected an array: give "
                f"jnp.asarray(state.{name}, jnp.float32)"
            )
        if value.dtype != moments_lib.statistics_dtype(value.dtype):
            raise ValueError(
                f"state.{name} has dtype {value.dtype}, too narrow to average in; keep "
                "it in float32, as bn_jax.init makes it"
            )


def check_ghosts(
    x: Array, size: int, batch_axis: int, feature_axis: int | Sequence[int]
) -> None:
    """Refuse ghost batches that are not parts of the batch.

    Raises:
      ValueError: if `batch_axis` is not an axis, or is a feature axis, or if `size`
        does not divide the size of x along it.
    """
    axis = batch_axis + x.ndim if batch_axis < 0 else batch_axis
    if axis not in moments_lib.reduction_axes(x.ndim, feature_axis):
        raise ValueError(
            f"batch_axis={batch_axis} of x of shape {list(x.shape)} is no axis, or a "
            f"feature axis (feature_axis={feature_axis!r}); name the axis of examples"
        )
    examples = x.shape[axis]
    if not isinstance(size, SupportsIndex) or size < 1:
        raise ValueError(
            f"ghost_batch_size={size!r}; expected a positive integer that divides the "
            f"batch of {examples} examples"
        )
    if examples % size:
        mend = f", or drop the last {examples % size}" if size < examples else ""
        raise ValueError(
            f"ghost_batch_size={size} does not divide the batch of {examples} "
            f"examples; give a divisor{mend}"
        )


def warn_of_one_value(
    shape: Sequence[int],
    feature_axis: int | Sequence[int],
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    *,
    outcome: str,
    stacklevel: int,
) -> None:
    """Warn, when traced, of a batch (or ghost) whose deviation is 0.

    It has one value a feature, over all instances along the axis.

    Args:
      shape: of the batch or ghost.
      feature_axis: its features.
      axis_name: of the instances that share statistics, or None.
      axis_index_groups: partition of them, or None.
      outcome: what y is then, in words.
      stacklevel: of the user's call, counted as `warnings.warn` does from here.

    Raises:
      ValueError: if an axis name is not bound, or the groups are not a partition.
    """
    axes = moments_lib.reduction_axes(len(shape), feature_axis)
    n = math.prod(shape[a] for a in axes)
    if axis_name is not None:
        size = axis_size(axis_name)
        groups = axis_index_groups
        n *= size if groups is None else group_size(groups, size)
    if n == 1:
        warnings.warn(
            f"a norm in training mode was given one value a feature (shape "
            f"{list(shape)}): {outcome}; use a larger batch or ghost_batch_size, or "
            "train=False",
            stacklevel=stacklevel,
        )


def check_num_features(num_features: Any) -> tuple[int, ...]:
    """Return the sizes of the feature axes, of which one may be given as an integer.

    Raises:
      ValueError: if it is neither an integer nor a sequence of them, or one is
        negative.
    """
    shape: tuple[int, ...] = ()
    try:
        shape = (operator.index(num_features),)
    except TypeError:
        with contextlib.suppress(TypeError):
            shape = tuple(map(operator.index, num_features))
    if min(shape, default=-1) < 0:
        raise ValueError(
            f"num_features={num_features!r}; expected the number of features, or the "
            "sizes of the feature axes where there are several"
        )
    return shape


def check_one_integer(num_features: Any) -> int:
    """Return a number of features; refuse several feature axes.

    Raises:
      ValueError: if it is not an integer.
    """
    try:
        return operator.index(num_features)
    except TypeError:
        raise ValueError(
            f"num_features={num_features!r}; this norm has one feature axis: expected "
            "one integer"
        ) from None
