"""Statistics of a whole data set for the batch norm layers of a Flax model.

Moving averages follow parameters that move, and lag behind them. After training one can
instead measure what each layer sees over the whole training set, and predict with that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax

from bn_jax.moments import Moments, measure, merge

Path = tuple[str, ...]
Predict = Callable[[Any, Array], Any]


def exact_statistics(
    predict: Predict, variables: Any, inputs: Array, *, batch_size: int
) -> dict[str, Any]:
    """Return `batch_stats` with the exact mean and variance of a whole data set.

    Layers are measured one after another, each with its predecessors' exact statistics
    in place, so that the result is what one batch of all examples would give: it does
    not depend on the batch size, beyond rounding.

    Args:
      predict: function of `(variables, inputs)` that applies a Flax model in prediction
        mode; its batch norm layers may be ours, Flax's own or any with the collection
        `batch_stats{mean,var}` and an attribute `axis`.
      variables: of the model. A model without batch statistics gives an empty result.
      inputs: the data set, shape `[N, ...]`.
      batch_size: number of examples measured at a time; a last smaller batch counts by
        its size.

    Returns:
      A collection like `variables["batch_stats"]`.

    Raises:
      ValueError: if there are no examples, or the batch size is not positive.

    References:
      Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.
    """
    if batch_size < 1 or len(inputs) < 1:
        raise ValueError(
            f"got {len(inputs)} examples and batch_size={batch_size}; expected at "
            "least one example and a positive batch size"
        )
    statistics = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    layers = {path[:-1] for path in statistics if path[-1] == "mean"}

    def with_statistics() -> Any:
        batch_stats = traverse_util.unflatten_dict(statistics)
        return {**variables, "batch_stats": batch_stats}

    first = inputs[:batch_size]
    for path in _call_order(predict, with_statistics(), first, layers):
        moments = _layer_moments(predict, with_statistics(), inputs, path, batch_size)
        statistics[(*path, "mean")] = moments.mean
        statistics[(*path, "var")] = moments.var
    return traverse_util.unflatten_dict(statistics)


@functools.partial(jax.jit, static_argnames=("predict", "path", "batch_size"))
def _layer_moments(
    predict: Predict, variables: Any, inputs: Array, path: Path, batch_size: int
) -> Moments:
    """Return the moments of what the layer at `path` is given over the data set."""

    def of_batch(x: Array) -> Moments:
        calls = [
            measure(layer_input, feature_axis=module.axis)
            for module, layer_input in _layer_calls(predict, variables, x)
            if module.path == path
        ]
        return functools.reduce(merge, calls)

    num_whole = len(inputs) // batch_size
    whole, rest = jnp.split(inputs, [num_whole * batch_size])
    parts = []
    if num_whole:
        batches = whole.reshape(num_whole, batch_size, *inputs.shape[1:])
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_batch, batches[0]),
        )
        total, _ = lax.scan(
            lambda total, x: (merge(total, of_batch(x)), None), zero, batches
        )
        parts.append(total)
    if len(rest):
        parts.append(of_batch(rest))
    return functools.reduce(merge, parts)


def _call_order(
    predict: Predict, variables: Any, x: Array, layers: set[Path]
) -> list[Path]:
    """Return the paths in `layers` in the order in which the model calls them."""
    order: dict[Path, None] = {}

    def trace(variables: Any, x: Array) -> None:
        for module, _ in _layer_calls(predict, variables, x):
            if module.path in layers:
                order[module.path] = None

    jax.eval_shape(trace, variables, x)
    return list(order)


def _layer_calls(
    predict: Predict, variables: Any, x: Array
) -> Iterator[tuple[Any, Array]]:
    """Yield each call of a module with its first input, in order."""
    calls: list[tuple[Any, Array]] = []

    def record(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name == "__call__" and args:
            calls.append((context.module, args[0]))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        predict(variables, x)
    yield from calls
