"""What batch norm and its variants refuse: arguments that do not fit, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bn_jax import moments as moments_lib


def check_epsilon(epsilon: float | Array) -> None:
    """Refuse a known number that is not positive."""
    if not isinstance(epsilon, jax.Array) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r}; expected a number greater than 0")


def check_static(**choices: bool | None) -> None:
    """Refuse a choice that only the running program would know."""
    for name, choice in choices.items():
        if isinstance(choice, jax.Array):
            raise TypeError(
                f"{name} must be a Python bool, known when the function is traced, but "
                f"is {choice}; pass it through static_argnames or functools.partial"
            )


def check_not_empty(x: Array) -> None:
    """Refuse a batch that has no moments."""
    if x.size == 0:
        raise ValueError(
            f"x of shape {list(x.shape)} is empty; training mode needs at least one "
            "example: skip the batch, or pad it and give the padding weight 0"
        )


def check_features(
    x: Array, feature_axis: int | Sequence[int], **per_feature: Array | None
) -> None:
    """Refuse parameters or statistics that do not fit the features of `x`."""
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


def check_momentum(momentum: Any) -> None:
    """Refuse a number that weighs no average, where it is known."""
    if isinstance(momentum, jax.Array) or jnp.ndim(momentum):
        return
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum!r}; expected the weight of the old average, in [0, 1]"
        )


def check_state(state: Any) -> None:
    """Refuse a NamedTuple of averages in a dtype that momentum near 1 would freeze."""
    for name, value in state._asdict().items():
        if value.dtype != moments_lib.statistics_dtype(value.dtype):
            raise ValueError(
                f"state.{name} has dtype {value.dtype}, too narrow to average in; keep "
                "it in float32, as bn_jax.init makes it"
            )
