"""The initial variables of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

# Above this number of kernels, one program that draws all of them takes longer to
# compile than the forward pass takes to be traced.
_MAX_COMPILED_TOGETHER = 32


def make_init(
    model: Any, image_shape: tuple[int, ...]
) -> Callable[[Array], dict[str, Any]]:
    """Return a function of a key that draws a model's initial variables.

    Small models are drawn by one compiled program, the same for all keys. XLA compiles
    the random numbers of each kernel in it anew, so that 110 layers would take minutes;
    deep models are drawn kernel by kernel, by programs that kernels of one shape share.
    Flax's initializers give the same bits either way.

    Args:
      model: as `as_model` returns it, called as `model(images, train=...)`.
      image_shape: `[H, W, C]`. One that does not fit the model raises Flax's or JAX's
        own error here; `check_fits` says it in one line.

    Returns:
      A function that returns `{"params": ..., "batch_stats": ...}`; `batch_stats` is
      empty in a model without statistics.

    Examples:
      >>> import jax
      >>> from bn_jax.models.mlp import MLP
      >>> init = make_init(MLP(widths=[3]), (2, 2, 1))
      >>> dense = init(jax.random.key(0))["params"]["dense1"]
      >>> dense["kernel"].shape, dense["bias"].tolist()
      ((4, 3), [0.0, 0.0, 0.0])
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))

    def at_once(key: Array) -> Any:
        return model.init(key, jnp.zeros(images.shape, images.dtype), train=False)

    def one_by_one(key: Array) -> Any:
        return model.lazy_init(key, images, train=False)

    shapes = jax.eval_shape(at_once, jax.random.key(0))
    kernels = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1]
    is_deep = isinstance(model, nn.Module) and len(kernels) > _MAX_COMPILED_TOGETHER
    init = one_by_one if is_deep else jax.jit(at_once)
    return lambda key: {"batch_stats": {}, **init(key)}
