"""Models that receive their normalisation as an argument, by name or a user's own."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from bn_jax.linen import BatchNorm, BatchRenorm
from bn_jax.models import lenet, mlp, resnet
from bn_jax.models.contract import as_model, check_fits, logits_by_batch, name_of
from bn_jax.models.initialization import make_init
from bn_jax.names import Table
from bn_jax.variants import linen as variants

__all__ = [
    "MODELS",
    "as_model",
    "check_fits",
    "logits_by_batch",
    "make_init",
    "name_of",
]

# Functions of norm, num_classes, dtype and layout, and of options of their own.
MODELS: Table[nn.Module] = Table(
    "model",
    {"lenet": lenet.lenet, "mlp": mlp.mlp, "resnet": resnet.resnet},
    given=frozenset({"norm", "num_classes", "dtype", "layout"}),
)

NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "batch_norm": BatchNorm,
    "flax": nn.BatchNorm,
    "none": None,
    "renorm": BatchRenorm,
    "layer": variants.LayerNorm,
    "group": variants.GroupNorm,
    "instance": variants.InstanceNorm,
    "whitening": variants.Whitening,
    "quantile": variants.QuantileNorm,
}


def norm_by_name(
    name: str, *, momentum: float, epsilon: float, **options: Any
) -> Callable[..., nn.Module] | None:
    """Return the constructor of a normalisation, or None for "none".

    Args:
      name: one of `NORMS`, with further attributes if need be, such as
        "whitening:method=zca,max_group_size=16".
      momentum: weight of the OLD average in the moving averages, where there are any.
      epsilon: added to the variance, where there is one (of quantiles it would be
        something else).
      **options: further attributes of the layers.

    Raises:
      ValueError: if there is no normalisation of that name, or it has no such
        attribute.
    """
    kind, _, text = name.partition(":")
    if kind not in NORMS:
        raise ValueError(f"norm={name!r}; expected one of {', '.join(NORMS)}")
    norm = NORMS[kind]
    if norm is None:
        return None
    known = set(norm.__dataclass_fields__) - {"name", "parent"}  # type: ignore[attr-defined]
    usual = {"momentum": momentum}
    if kind != "quantile":
        usual["epsilon"] = epsilon
    attributes = {k: v for k, v in usual.items() if k in known} | options
    for part in filter(None, text.split(",")):
        attribute, _, value = part.partition("=")
        attributes[attribute] = _literal(value)
    unknown = sorted(attributes.keys() - known)
    if unknown:
        raise ValueError(
            f"norm={name!r} has no {', '.join(unknown)}; its attributes are "
            f"{', '.join(sorted(known))}"
        )
    return functools.partial(norm, **attributes)


def is_batch_norm(name: str) -> bool:
    """Return whether a normalisation, by name, keeps a batch's mean and variance."""
    return name.partition(":")[0] in ("batch_norm", "flax")


def _literal(text: str) -> Any:
    """Return the number, boolean or None that a text writes, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
