r"""Batch norm layers to and from PyTorch, Keras 3, Haiku, Equinox and Flax.

Also batch renorm layers of SBX, CrossQ and PureJaxQL.

Everything goes through one form, `BatchNormLayer`: parameters, moving averages, and the
number of batches in them. `from_*` and `to_*` convert a single layer, `layers_from` and
`layers_into` all batch norm layers of a model, by name. None of the libraries is
imported: entries are mappings from names to whatever `numpy.asarray` takes, and come
back as NumPy arrays that share no memory with what was given. Conversion is for outside
of `jit`. Whole ResNets, convolutions and dense layers included, are converted by
`bn_jax.convert.networks`.

Entries hold no hyperparameters: see `DEFAULTS`, and mind that bn_jax's momentum is the
weight of the OLD average, PyTorch's that of the new value (`momentum_from_torch`).

What each library averages, for a layer to go on training as it did:

- Keras, Flax: as bn_jax with constant momentum.
- Haiku, Equinox in mode "batch": free of the initial value, as bn_jax with
  `debiased_momentum(momentum, num_batches)`. Both compute 1 - momentum**num_batches in
  float32, which costs them digits where it is small: 3 batches with momentum 0.999
  leave them a relative error of up to 2e-5.
- Equinox in mode "ema": as bn_jax, but the first batch is taken whole, and training
  normalises by the updated average: see `from_equinox`.
- PyTorch: as bn_jax with constant momentum, or with `cumulative_momentum(num_batches)`
  for its momentum None; but of variances divided by n - 1, where n is the number of
  values a feature has in the batch (N, or N times H times W). The moving variance is
  taken as it is, so that predictions stay the same, and then there are two ways on:

  - Train on PyTorch's average. Its state and predictions are matched step by step by
    `batch_norm(..., update_state=False)` and
    `update_average(state, unbiased(measure(x)), momentum=...)`.
  - Train on bn_jax's average. `biased_average(state, values_per_feature=n)` is what it
    would hold had every batch had n values: predictions change by a factor of up to
    $\sqrt{n / (n - 1)}$. While n stays the same, it does not matter
    whether a layer is trained before or after the conversion:
    `unbiased_average` gives PyTorch's state again after any number of steps.
"""

from bn_jax.convert.averages import (
    biased_average,
    momentum_from_torch,
    momentum_to_torch,
    unbiased,
    unbiased_average,
    without_equinox_excess,
)
from bn_jax.convert.layer import (
    DEFAULTS,
    BatchNormLayer,
    Hyperparameters,
)
from bn_jax.convert.libraries import (
    from_equinox,
    from_flax,
    from_haiku,
    from_keras,
    from_nnx,
    from_torch,
    to_equinox,
    to_flax,
    to_haiku,
    to_keras,
    to_nnx,
    to_torch,
)
from bn_jax.convert.models import (
    layers_from,
    layers_into,
)
from bn_jax.convert.renorm import RenormOptions, from_batch_renorm, to_batch_renorm

__all__ = [
    "BatchNormLayer",
    "DEFAULTS",
    "Hyperparameters",
    "RenormOptions",
    "biased_average",
    "from_batch_renorm",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_nnx",
    "from_torch",
    "layers_from",
    "layers_into",
    "momentum_from_torch",
    "momentum_to_torch",
    "to_batch_renorm",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_nnx",
    "to_torch",
    "unbiased",
    "unbiased_average",
    "without_equinox_excess",
]
