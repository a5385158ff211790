"""Models that receive their normalisation as an argument, and the names of those."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from bn_jax.linen import BatchNorm

NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "batch_norm": BatchNorm,
    "flax": nn.BatchNorm,
    "none": None,
}


def norm_by_name(
    name: str, *, momentum: float, epsilon: float, **options: Any
) -> Callable[..., nn.Module] | None:
    """Return the constructor of a normalisation, or None for "none".

    Args:
      name: one of `NORMS`.
      momentum: weight of the OLD average in the moving averages.
      epsilon: added to the variance.
      **options: further attributes of the layers.

    Raises:
      ValueError: if there is no normalisation of that name.
    """
    if name not in NORMS:
        raise ValueError(f"norm={name!r}; expected one of {', '.join(NORMS)}")
    norm = NORMS[name]
    if norm is None:
        return None
    return functools.partial(norm, momentum=momentum, epsilon=epsilon, **options)
