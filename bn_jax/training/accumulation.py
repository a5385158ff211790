"""Gradients of a batch in several micro-batches, one after another.

Micro-batch j of n holds the examples j, j + n, ..., so that it takes an equal part of
each device's share. Each is normalised by its own statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.training.feed import Batch

# Of parameters, moving averages, a batch and a key: gradients, the moved averages, and
# metrics, which are means over the batch.
Gradients = Callable[[Any, Any, Batch, Array], tuple[Any, Any, Any]]


def accumulated(gradients_of: Gradients, num_parts: int, moves: str) -> Gradients:
    """Return a function like `gradients_of` that takes a batch in micro-batches.

    Args:
      gradients_of: of a micro-batch, with a key of its own.
      num_parts: how many, a divisor of the batch.
      moves: what moves the averages: "each" micro-batch, one after another, or "once"
        the moments of all, merged exactly, as ghost batches do.
    """

    def of_parts(
        params: Any, old_stats: Any, batch: Batch, key: Array
    ) -> tuple[Any, Any, Any]:
        parts: Batch = jax.tree.map(
            lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, num_parts)

        def add(stats: Any, part: tuple[Batch, Array]) -> tuple[Any, Any]:
            of_part, key = part
            start = old_stats if moves == "once" else stats
            gradients, stats, metrics = gradients_of(params, start, of_part, key)
            return stats, (gradients, stats, metrics)

        last, (gradients, stats, metrics) = lax.scan(add, old_stats, (parts, keys))
        if moves == "once":
            first = jax.tree.map(lambda x: x[0], parts)
            last = _moved_once(
                old_stats,
                stats,
                lambda start: gradients_of(params, start, first, keys[0])[1],
            )
        gradients, metrics = jax.tree.map(lambda x: x.mean(0), (gradients, metrics))
        return gradients, last, metrics

    return of_parts


def _moved_once(old: Any, moved: Any, move: Callable[[Any], Any]) -> Any:
    r"""Return averages moved by the moments of all micro-batches at once.

    Each micro-batch i has moved the averages a to $a_i = m a + (1 - m) b_i$. Of means,
    the mean over i is what the merged moments give. Of variances, it lacks the variance
    of the means between micro-batches, $(1 - m) V_i[b_i] = V_i[a_i] / (1 - m)$.

    Args:
      old: the averages before, by layer; each layer holds `mean` and `var`.
      moved: those that each micro-batch made of them, with a leading axis.
      move: what the first micro-batch makes of averages: its derivative by them is m.
    """
    ones = jax.tree.map(jnp.ones_like, old)
    _, momentum = jax.jvp(move, (old,), (ones,))

    def is_layer(node: Any) -> bool:
        return isinstance(node, dict) and "mean" in node

    def of_layer(moved: dict[str, Array], momentum: dict[str, Array]) -> Any:
        weight = 1 - momentum["mean"]
        between = jnp.var(moved["mean"], axis=0) / jnp.where(weight > 0, weight, 1)
        return {"mean": moved["mean"].mean(0), "var": moved["var"].mean(0) + between}

    return jax.tree.map(of_layer, moved, momentum, is_leaf=is_layer)
