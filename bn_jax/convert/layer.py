"""A batch norm layer as bn_jax has it, and what state dicts leave out."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from bn_jax.averages import BatchNormState
from bn_jax.functional import BatchNormParams

# The BatchRenorm of SBX, CrossQ and PureJaxQL: see `from_batch_renorm`.
RenormLibrary = Literal["sbx", "crossq", "purejaxql"]
Library = (
    Literal["torch", "keras", "flax", "nnx", "haiku", "equinox_ema", "equinox_batch"]
    | RenormLibrary
)
Entries = Mapping[Any, Any]
Like = tuple[Any, ...]  # (params, state), as bn_jax.init returns, or a BatchNormLayer


class BatchNormLayer(NamedTuple):
    """A batch norm layer as bn_jax has it."""

    params: BatchNormParams
    state: BatchNormState
    num_batches: int | None = None  # batches in the averages; None where not known


class Hyperparameters(NamedTuple):
    """What a state dict leaves out."""

    momentum: float | None  # weight of the OLD average; None where it must be given
    epsilon: float


# Of the constructors in torch 2.13, keras 3.15, flax 0.12, dm-haiku 0.0.17 and
# equinox 0.13; the parity tests compare them. Those of araffin/sbx 9bdc9c1,
# adityab/CrossQ 2811ad1 and mttga/purejaxql c5aa074 are read from their sources.
DEFAULTS: Mapping[str, Hyperparameters] = types.MappingProxyType(
    {
        "torch": Hyperparameters(momentum=0.9, epsilon=1e-5),
        "keras": Hyperparameters(momentum=0.99, epsilon=1e-3),
        "flax": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "nnx": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "haiku": Hyperparameters(momentum=None, epsilon=1e-5),
        "equinox_ema": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "equinox_batch": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "sbx": Hyperparameters(momentum=0.99, epsilon=1e-3),
        "crossq": Hyperparameters(momentum=0.999, epsilon=1e-3),
        "purejaxql": Hyperparameters(momentum=0.999, epsilon=1e-3),
    }
)


def check_is_layer(layer: Any) -> None:
    """Refuse what is not a layer of ours.

    Raises:
      TypeError: naming what was given.
    """
    if not isinstance(layer, BatchNormLayer):
        raise TypeError(
            f"layer is of type {type(layer).__name__}; expected a BatchNormLayer, as "
            "from_torch and the like return it"
        )
