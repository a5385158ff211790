"""Batch normalisation in JAX: the pure functions.

Every norm by name is in `bn_jax.transforms`. The Flax modules are in `bn_jax.linen` and
`bn_jax.nnx`, models in `bn_jax.models`, data in `bn_jax.data`.
"""

from bn_jax.averages import (
    BatchNormState,
    cumulative_momentum,
    debiased_momentum,
    merge_states,
    update_average,
)
from bn_jax.functional import BatchNormParams, batch_norm, init, normalize
from bn_jax.moments import Moments, measure, merge, merge_across, merge_stacked
from bn_jax.version import __version__

__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "Moments",
    "__version__",
    "batch_norm",
    "cumulative_momentum",
    "debiased_momentum",
    "init",
    "measure",
    "merge",
    "merge_across",
    "merge_stacked",
    "merge_states",
    "normalize",
    "update_average",
]
