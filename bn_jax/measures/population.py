"""Statistics of a whole data set for the batch norm layers of a Flax model.

Moving averages follow parameters that move, and lag behind them. After training one can
instead measure what each layer sees over the training set (`exact_statistics`) and
predict with that. How far apart the statistics are is told by `bn_jax.measures.gap`.

A model is given as `predict(variables, inputs)`, which applies it in prediction mode;
where a layer is to normalise by its batch, its call is replaced, so that dropout stays
off and no average moves. Which layers and calls there are is seen by `layer_calls`;
what may be given as a model and its variables, by `resolve`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from jax import Array

from bn_jax.measures.layer_calls import (
    Predict,
    layer_calls,
    pooled,
    program,
    with_moments,
)
from bn_jax.measures.meshes import automatic, automatic_axes, like
from bn_jax.measures.models import resolve
from bn_jax.measures.sources import Batches, Stored, examples
from bn_jax.moments import Moments
from bn_jax.variables import Path, batch_stats_of

# What a layer is given is kept from one pass to the next up to this size.
_MAX_KEPT_BYTES = 2**28

Mode = Literal["layerwise", "one_pass"]


def exact_statistics(
    model: Any,
    variables: Any,
    inputs: Any,
    *,
    batch_size: int | None = None,
    mode: Mode = "layerwise",
    weights: Array | None = None,
    num_examples: int | None = None,
) -> Any:
    """Return `batch_stats` with the mean and biased variance of a whole data set.

    A layer that is called several times pools what its calls are given.

    Args:
      model: function of `(variables, inputs)` that applies a Flax model in prediction
        mode, a Linen or an NNX module: see `bn_jax.measures.models.resolve`. A mask or
        weights that the model gives to a layer count.
      variables: of the model, see there. A model without batch statistics gives an
        empty result.
      inputs: the data set, shape `[N, ...]`; or its batches, as a list or a loader:
        anything that can be iterated over again and again, and yields the same. Where a
        mesh shares an array out along N, each device works on its own examples. Scaled
        as in training: bytes, uint8, are refused unless the model is seen to scale
        them itself, as by `x / 255`; other integers are taken as they are.
      batch_size: number of examples measured at a time, where inputs are an array. Of T
        batches the first holds the examples 0, T, 2T and so on; a last smaller one, of
        the examples left over at the end, counts by its size.
      mode: "layerwise" measures call after call, each with the exact statistics of
        those before it in place: what one batch of all examples would give, whatever
        the batch size and the moving averages, in as many passes as there are calls.
        "one_pass" lets each call normalise by its batch and pools what it is given,
        the variance between batches included: one pass, and a result that depends on
        the batches after the first layer.
      weights: of the examples, non-negative, shape `[N]`, where inputs are an array.
      num_examples: measure the first so many examples only.

    Returns:
      A collection like `variables["batch_stats"]`; of a TrainState, like its field; of
      NNX, a state of the variables of type `nnx.BatchStat`, which `nnx.update(module,
      ...)` puts in place.

    Raises:
      ValueError: if the model or variables are none that `resolve` takes; inputs are
        bytes and the model does not scale them first; there are no examples, or fewer
        than num_examples; the batch size is missing or not a positive integer; the mode
        is unknown; weights do not fit, are negative or all 0, or a layer's input has no
        axis of examples for them; batches are not arrays, come with weights or a batch
        size, or can be iterated over only once; a layer's calls cannot be seen, or it
        predicts by other statistics than a mean and a variance; or `jax.vmap` maps a
        layer over the batch in mode "one_pass".

    References:
      Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> model, x = BatchNorm(), jnp.array([[1.0], [3.0], [5.0], [7.0]])
      >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
      >>> exact = exact_statistics(model, variables, x, batch_size=2)
      >>> exact["mean"].tolist(), exact["var"].tolist()
      ([4.0], [5.0])
    """
    measured = with_exact_statistics(
        model,
        variables,
        inputs,
        batch_size=batch_size,
        mode=mode,
        weights=weights,
        num_examples=num_examples,
    )
    return batch_stats_of(measured)


def with_exact_statistics(
    model: Any,
    variables: Any,
    inputs: Any,
    *,
    batch_size: int | None = None,
    mode: Mode = "layerwise",
    weights: Array | None = None,
    num_examples: int | None = None,
    pseudo_count: float = 0.0,
) -> Any:
    """Return variables with exact statistics in place; see `exact_statistics`.

    Args:
      model: see `exact_statistics`, and so are all others but the last.
      variables: see `model`. Those of an NNX module are its state.
      inputs: see `model`.
      batch_size: see `model`.
      mode: see `model`.
      weights: see `model`.
      num_examples: see `model`.
      pseudo_count: 0 or more, see `bn_jax.measures.adaptation`.

    Returns:
      Variables of the kind that was given; a dict of `params` and `batch_stats` for a
      Linen module with a TrainState.

    Raises:
      ValueError: if the pseudo-count is negative or not finite, or as
        `exact_statistics` says.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> model, x = BatchNorm(), jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
      >>> variables = with_exact_statistics(model, variables, x, batch_size=1)
      >>> model.apply(variables, x, use_running_average=True).round(3).ravel().tolist()
      [-1.0, 1.0]
    """
    if mode not in ("layerwise", "one_pass"):
        raise ValueError(f"mode={mode!r}; expected layerwise or one_pass")
    if not isinstance(pseudo_count, int | float) or not 0 <= pseudo_count < math.inf:
        raise ValueError(
            f"pseudo_count={pseudo_count!r}; expected a number of examples, 0 or more, "
            "for which the old statistics count"
        )
    predict, variables = resolve(model, variables)
    with automatic_axes():
        source = examples(inputs, weights, batch_size, num_examples)
        measured = _measure_all(
            predict, automatic(variables), source, mode=mode, pseudo_count=pseudo_count
        )
    return like(measured, variables)


def _measure_all(
    predict: Predict,
    variables: Any,
    source: Stored | Batches,
    *,
    mode: Mode,
    pseudo_count: float,
) -> Any:
    """Return variables with exact statistics in place."""
    example = source.example()
    if mode == "one_pass":
        moments, _ = source.measure(predict, variables)
        share = _share(source, pseudo_count)
        return with_moments(variables, pooled(moments), share=share)
    calls = program(predict, variables, example).calls
    # A pass measures one call. What that call is given is kept, if memory allows, so
    # that the next pass starts from there; what a pass does not need, XLA leaves out.
    # Where a layer is called again, its first call has other statistics from then on.
    of_calls, kept, current = [], None, variables
    seen: set[Path] = set()
    for number, of_call in enumerate(calls):
        paths = {call.path for call in of_call}
        keep = number + 1 < len(calls) and not paths & seen
        if source.num_examples is None:
            keep = False
        else:
            size = sum(math.prod(call.shape) for call in of_call) / len(example)
            keep &= 4 * size * source.num_examples <= _MAX_KEPT_BYTES
        seen |= paths
        (moments,), kept = source.measure(
            predict, current, kept=kept, number=number, keep=keep
        )
        of_calls.append(moments)
        share = _share(source, pseudo_count)
        current = with_moments(variables, pooled(of_calls), share=share)
    return current


def refusal(model: Any, variables: Any, example: Any) -> str | None:
    """Return why `exact_statistics` would refuse a model, or None if it takes it.

    Args:
      model: see `exact_statistics`.
      variables: of the model.
      example: one input, shape `[1, ...]`.
    """
    try:
        layer_calls(*resolve(model, variables), example)
    except ValueError as error:
        return str(error)
    return None


def batch_moments(
    model: Any, variables: Any, inputs: Any
) -> tuple[Any, dict[Path, Moments]]:
    """Apply a model with each layer normalising by this batch.

    Args:
      model: see `exact_statistics`.
      variables: of the model.
      inputs: one batch, shape `[N, ...]`.

    Returns:
      The outputs of what is training mode for batch norm alone, and the moments of what
      each layer was given, by the layer's path, in the shape of its variables.

    Raises:
      ValueError: if `jax.vmap` maps a layer over the batch, or as `exact_statistics`
        says of model, variables and layers.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from bn_jax.linen import BatchNorm
      >>> model = nn.Sequential([BatchNorm(use_running_average=True)])
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, moments = batch_moments(model, model.init(jax.random.key(0), x), x)
      >>> y.round(3).ravel().tolist(), moments[("layers_0",)].mean.tolist()
      ([-1.0, 1.0], [2.0])
    """
    predict, variables = resolve(model, variables)
    outputs, measured = program(predict, variables, inputs, by_batch=True)(
        variables, inputs
    )
    return outputs, pooled([call.moments for call in measured])


def _share(source: Stored | Batches, pseudo_count: float) -> Any:
    """Return how much measured statistics count beside old ones, or None for all."""
    weight = source.weight
    return weight / (weight + pseudo_count) if pseudo_count else None
