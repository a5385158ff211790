"""Where in a model numbers first stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

from bn_jax import tracing
from bn_jax.training.feed import Batch
from bn_jax.training.losses import losses
from bn_jax.training.state import TrainState


def first_not_finite(
    forward: Callable[..., tuple[Array, Any]], state: TrainState, batch: Batch
) -> str:
    """Return, in words, what a training step from `state` first makes not finite.

    Args:
      forward: `loop.forward` of the network.
      state: before the step.
      batch: of the step.
    """
    order: list[str] = []  # names of the layers, by site

    def note(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.path:
            return y

        def marked(leaf: Array) -> Array:
            order.append("/".join(context.module.path))
            return tracing.mark(leaf, (), site=len(order) - 1)

        return jax.tree.map(marked, y)

    def apply(params: Any) -> Array:
        with nn.intercept_methods(note):
            images, key = jnp.asarray(batch.images), jax.random.key(0)
            logits, _ = forward(params, state.batch_stats, images, key)
        return jnp.asarray(logits)

    traced = tracing.trace(apply, state.params)
    sites: list[int] = []  # of the layers' ends, in their order

    def loss_and_finite(params: Any) -> tuple[Array, list[Array]]:
        (logits,), seen = tracing.evaluate(traced, jax.tree.leaves(params), {})
        sites[:] = [marked.site for marked in seen]
        finite = [jnp.all(jnp.isfinite(marked.x)) for marked in seen]
        return losses(logits, jnp.asarray(batch.labels)).mean(), finite

    gradient_of = jax.jit(jax.value_and_grad(loss_and_finite, has_aux=True))
    try:
        (loss, finite), gradients = gradient_of(state.params)
    except ValueError as error:
        return f"where it began cannot be told: {error}"
    for site, of_layer in zip(sites, finite, strict=True):
        if not of_layer:
            name = order[site]
            return f"the first activations that are not finite are those of {name}"
    if not jnp.isfinite(loss):
        return "all activations are finite, but not the loss that they make"
    for name, gradient in traverse_util.flatten_dict(gradients, sep="/").items():
        if not jnp.all(jnp.isfinite(gradient)):
            return f"all activations are finite, but not the gradient of {name}"
    return "activations and gradients are finite, but not the step that they make"
