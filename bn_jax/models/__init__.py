"""Models that receive their normalisation as an argument, and the names of those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from bn_jax.linen import norm as make_norm
from bn_jax.transforms import NORMS


def norm_by_name(
    name: str, *, momentum: float, epsilon: float, **attributes: Any
) -> Callable[..., nn.Module] | None:
    """Return the constructor of a normalisation, or None for "none".

    Args:
      name: one of `bn_jax.transforms.NORMS` with its options.
      momentum: weight of the OLD average in the moving averages, where there are any.
      epsilon: added to the variance, where there is one (of quantiles it would be
        something else).
      **attributes: further attributes of the layers.

    Raises:
      ConfigError: as `bn_jax.linen.norm` says.
    """
    named = NORMS.parse(name)
    known = NORMS.options(named.name)
    usual: dict[str, Any] = {"momentum": momentum, "epsilon": epsilon}
    if named.name == "quantile":
        del usual["epsilon"]
    options = {k: v for k, v in usual.items() if k in known and k not in named.options}
    return make_norm(name, options=options, **attributes)


def is_batch_norm(name: str) -> bool:
    """Return whether a normalisation, by name, keeps a batch's mean and variance."""
    return name.partition(":")[0] in ("batch_norm", "flax")
