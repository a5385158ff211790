"""Models that receive their normalisation as an argument, by name or a user's own."""

from __future__ import annotations

from bn_jax import extras

extras.need("flax", "flax")

from flax import linen as nn

from bn_jax.models import imagenet_resnet, lenet, mlp, resnet
from bn_jax.models.contract import (
    as_model,
    axis_names,
    check_fits,
    logits_by_batch,
    name_of,
)
from bn_jax.models.initialization import make_init
from bn_jax.names import Table

__all__ = [
    "MODELS",
    "as_model",
    "axis_names",
    "check_fits",
    "logits_by_batch",
    "make_init",
    "name_of",
]

# Functions of norm, num_classes, dtype and layout, and of options of their own.
MODELS: Table[nn.Module] = Table(
    "model",
    {
        "lenet": lenet.lenet,
        "mlp": mlp.mlp,
        "resnet": resnet.resnet,
        "imagenet_resnet": imagenet_resnet.imagenet_resnet,
    },
    given=frozenset({"norm", "num_classes", "dtype", "layout"}),
)
