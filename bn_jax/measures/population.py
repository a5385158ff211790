"""Statistics of a whole data set for the batch norm layers of a Flax model.

Moving averages follow parameters that move, and lag behind them. After training one can
instead measure what each layer sees over the training set (`exact_statistics`) and
predict with that. How far apart the statistics are is told by `bn_jax.measures.gap`.

A model is given as `predict(variables, inputs)`, which applies it in prediction mode;
where a layer is to normalise by its batch, its call is replaced, so that dropout stays
off and no average moves. Which layers and calls there are is seen by `layer_calls`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.functional import BatchNormParams, normalize
from bn_jax.measures.layer_calls import (
    LayerCall,
    Path,
    Predict,
    check_all_called,
    intercepted,
    layer_calls,
)
from bn_jax.moments import (
    Moments,
    check_non_negative,
    measure,
    merge,
    statistics_dtype,
)

# What a layer is given is kept from one pass to the next up to this size.
_MAX_KEPT_BYTES = 2**28

Mode = Literal["layerwise", "one_pass"]


def exact_statistics(
    predict: Predict,
    variables: Any,
    inputs: Array,
    *,
    batch_size: int,
    mode: Mode = "layerwise",
    weights: Array | None = None,
    num_examples: int | None = None,
) -> dict[str, Any]:
    """Return `batch_stats` with the mean and variance of a whole data set.

    A layer that is called several times pools what its calls are given.

    Args:
      predict: function of `(variables, inputs)` that applies a Flax model in prediction
        mode. A mask or weights that the model gives to a layer count.
      variables: of the model. A model without batch statistics gives an empty result.
      inputs: the data set, shape `[N, ...]`. Where a mesh of automatic axes shares it
        out along N, each device works on its own examples; explicit axes are refused
        by JAX.
      batch_size: number of examples measured at a time. Of T batches the first holds
        the examples 0, T, 2T and so on; a last smaller one, of the examples left over
        at the end, counts by its size.
      mode: "layerwise" measures call after call, each with the exact statistics of
        those before it in place: what one batch of all examples would give, whatever
        the batch size and the moving averages, in as many passes as there are calls.
        "one_pass" lets each call normalise by its batch and pools what it is given,
        the variance between batches included: one pass, and a result that depends on
        the batches after the first layer.
      weights: of the examples, non-negative, shape `[N]`.
      num_examples: measure the first so many examples only.

    Returns:
      A collection like `variables["batch_stats"]`.

    Raises:
      ValueError: if there are no examples, the batch size is not positive, the mode is
        unknown, weights do not fit or are all 0, a layer's input has no axis of
        examples for them, or a layer's calls cannot be seen.

    References:
      Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.
    """
    if mode not in ("layerwise", "one_pass"):
        raise ValueError(f"mode={mode!r}; expected layerwise or one_pass")
    inputs, weights = _check_data(inputs, weights, batch_size, num_examples)
    calls = layer_calls(predict, variables, inputs[:batch_size])
    paths = [call.path for call in calls]
    check_all_called(variables, paths)
    pooled = functools.partial(
        _pooled_moments, predict, inputs=inputs, weights=weights, batch_size=batch_size
    )
    if mode == "one_pass":
        of_calls, _ = pooled(variables)
        moments = _by_layer(paths, of_calls)
        return with_statistics(variables, moments)["batch_stats"]
    # A pass measures one call. What that call is given is kept, if memory allows, so
    # that the next pass starts from there; what a pass does not need, XLA leaves out.
    of_calls, kept, current = [], None, variables
    for number, call in enumerate(calls):
        size = math.prod(call.shape) / min(batch_size, len(inputs)) * len(inputs)
        keep = number + 1 < len(calls) and 4 * size <= _MAX_KEPT_BYTES
        (moments_of_call,), kept = pooled(current, kept=kept, number=number, keep=keep)
        of_calls.append(moments_of_call)
        current = with_statistics(variables, _by_layer(paths, of_calls))
    return with_statistics(current, {})["batch_stats"]


def refusal(predict: Predict, variables: Any, example: ArrayLike) -> str | None:
    """Return why `exact_statistics` would refuse a model, or None if it takes it.

    Args:
      predict: see `exact_statistics`.
      variables: of the model.
      example: one input, shape `[1, ...]`.
    """
    try:
        check_all_called(
            variables, [call.path for call in layer_calls(predict, variables, example)]
        )
    except ValueError as error:
        return str(error)
    return None


def batch_moments(
    predict: Predict, variables: Any, inputs: Array
) -> tuple[Any, dict[Path, Moments]]:
    """Apply a model with each layer normalising by this batch.

    Args:
      predict: see `exact_statistics`.
      variables: of the model.
      inputs: one batch, shape `[N, ...]`.

    Returns:
      The outputs of what is training mode for batch norm alone, and the moments of what
      each layer was given, by the layer's path.

    Raises:
      ValueError: if a layer's calls cannot be seen.
    """
    paths = [call.path for call in layer_calls(predict, variables, inputs)]
    check_all_called(variables, paths)
    outputs, measured = _apply_and_measure(
        predict, variables, inputs, None, by_batch=True
    )
    return outputs, _by_layer(paths, [call.moments for call in measured])


def with_statistics(variables: Any, moments: Mapping[Path, Moments]) -> dict[str, Any]:
    """Return `variables` with the layers' means and variances in place."""
    flat = dict(traverse_util.flatten_dict(variables.get("batch_stats", {})))
    for path, (_, mean, var) in moments.items():
        flat[(*path, "mean")] = mean
        flat[(*path, "var")] = var
    return {**variables, "batch_stats": traverse_util.unflatten_dict(flat)}


def mean_and_var(batch_stats: Any, path: Path) -> tuple[Array, Array]:
    """Return the statistics of the layer at `path`."""
    flat = traverse_util.flatten_dict(batch_stats)
    return flat[(*path, "mean")], flat[(*path, "var")]


def _check_data(
    inputs: Array, weights: Array | None, batch_size: int, num_examples: int | None
) -> tuple[Array, Array | None]:
    """Return the examples to measure and their weights."""
    if num_examples is not None and not 0 <= num_examples <= len(inputs):
        raise ValueError(
            f"num_examples={num_examples} of {len(inputs)} examples; give at most as "
            "many as there are, or leave it out for all"
        )
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != (len(inputs),):
            raise ValueError(
                f"weights have shape {list(weights.shape)}; expected one for each of "
                f"the {len(inputs)} examples: [{len(inputs)}]"
            )
        check_non_negative(weights)
    inputs = inputs[:num_examples]
    if batch_size < 1 or len(inputs) < 1:
        raise ValueError(
            f"got {len(inputs)} examples and batch_size={batch_size}; expected at "
            "least one example and a positive batch size"
        )
    if weights is None:
        return inputs, None
    weights = weights[:num_examples]
    if not isinstance(weights, jax.core.Tracer) and not jnp.any(weights):
        raise ValueError(
            f"the weights of all {len(inputs)} examples are 0, which leaves nothing to "
            "measure; give at least one example a positive weight"
        )
    return inputs, weights


def _by_layer(paths: Sequence[Path], moments: Sequence[Moments]) -> dict[Path, Moments]:
    """Return the pooled moments of each layer's calls, as far as they are known."""
    pooled: dict[Path, Moments] = {}
    for path, m in zip(paths, moments, strict=False):
        pooled[path] = merge(pooled[path], m) if path in pooled else m
    return pooled


@functools.partial(jax.jit, static_argnames=("predict", "batch_size", "number", "keep"))
def _pooled_moments(
    predict: Predict,
    variables: Any,
    *,
    inputs: Array,
    weights: Array | None,
    batch_size: int,
    number: int | None = None,
    kept: Any = None,
    keep: bool = False,
) -> tuple[list[Moments], Any]:
    """Return the moments of what calls are given over the data set.

    Args:
      predict: see `exact_statistics`.
      variables: see `exact_statistics`.
      inputs: see `exact_statistics`.
      weights: see `exact_statistics`.
      batch_size: see `exact_statistics`.
      number: of the call that is measured; None measures all, each call normalising by
        its own batch.
      kept: what the call before was given, as the last pass returned it, or None.
      keep: whether to return what this call is given.

    Returns:
      The moments, and what the call was given, or None.
    """
    num_whole = len(inputs) // batch_size
    size = num_whole * batch_size

    def of_batch(batch: Any) -> tuple[list[Moments], Any]:
        (inputs, weights), given = batch
        _, measured = _apply_and_measure(
            predict,
            variables,
            inputs,
            weights,
            by_batch=number is None,
            given={} if given is None or number is None else {number - 1: given},
        )
        if number is None:
            return [call.moments for call in measured], None
        call = measured[number]
        return [call.moments], call.x if keep else None

    def add(total: list[Moments], batch: Any) -> tuple[list[Moments], Any]:
        moments, x = of_batch(batch)
        return list(map(merge, total, moments)), x

    def batch_at(t: Array) -> Any:
        # Every num_whole-th example: of data sharded in contiguous parts, each device
        # then holds its share of every batch. Batches of consecutive examples would lie
        # on one device each, and all be sent to all.
        def of_array(a: Array) -> Array:
            a = a[:size].reshape(batch_size, num_whole, *a.shape[1:])
            return lax.dynamic_index_in_dim(a, t, axis=1, keepdims=False)

        return jax.tree.map(of_array, (inputs, weights))

    kept_of_whole, kept_of_rest = (None, None) if kept is None else kept
    rest = (jax.tree.map(lambda a: a[size:], (inputs, weights)), kept_of_rest)
    if not num_whole:
        moments, x = of_batch(rest)
        return moments, (None, x)

    def add_at(total: list[Moments], at: Any) -> tuple[list[Moments], Any]:
        t, given = at
        return add(total, (batch_at(t), given))

    whole = (jnp.arange(num_whole), kept_of_whole)
    first, _ = jax.eval_shape(
        lambda t, given: of_batch((batch_at(t), given)),
        *jax.tree.map(lambda a: a[0], whole),
    )
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    total, xs = lax.scan(add_at, zero, whole)
    if size == len(inputs):
        return total, (xs, None)
    total, x = add(total, rest)
    return total, (xs, x)


class _Measured(NamedTuple):
    """What a call of a batch norm layer was given."""

    moments: Moments
    x: Array


def _apply_and_measure(
    predict: Predict,
    variables: Any,
    inputs: Array,
    weights: Array | None,
    *,
    by_batch: bool,
    given: Mapping[int, Array] | None = None,
) -> tuple[Any, list[_Measured]]:
    """Apply a model and measure what each call of a batch norm layer is given.

    With `by_batch` each call is normalised by its own moments. Weights, of the
    examples, lie along that axis of a layer's input which has the batch's size; which
    one is found by tracing the model with another batch size. `given` are known inputs
    of calls, by their number.
    """
    larger: list[LayerCall] = []
    if weights is not None:
        one_more = (len(inputs) + 1, *inputs.shape[1:])
        larger = layer_calls(
            predict, variables, jax.ShapeDtypeStruct(one_more, inputs.dtype)
        )
    measured: list[_Measured] = []

    def each_call(module: Any, x: Array, own_weights: Array | None) -> Any:
        w = own_weights
        if weights is not None:
            w = _along_examples(weights, x, larger[len(measured)])
            w = w if own_weights is None else w * own_weights
        wide = x.astype(statistics_dtype(x.dtype))  # layers take integers, too
        moments = measure(wide, feature_axis=module.axis, weights=w)
        measured.append(_Measured(moments, x))
        return _normalized(module, variables, x, moments) if by_batch else None

    outputs = intercepted(predict, variables, inputs, each_call, given or {})
    return outputs, measured


def _normalized(module: Any, variables: Any, x: Array, moments: Moments) -> Array:
    """Normalise by the moments, as the layer does in training mode."""
    own: Mapping[str, Any] = variables.get("params", {})
    for name in module.path:
        own = own.get(name, {})
    params = BatchNormParams(own.get("scale"), own.get("bias"))
    dtype = nn.dtypes.canonicalize_dtype(x, *params, dtype=module.dtype)
    mean, var = mean_and_var(variables["batch_stats"], module.path)
    present = moments.count > 0  # a batch that is masked out has no moments
    x = x.astype(moments.mean.dtype)
    return normalize(
        x,
        jnp.where(present, moments.mean, mean),
        jnp.where(present, moments.var, var),
        params,
        epsilon=module.epsilon,
        feature_axis=module.axis,
    ).astype(dtype)


def _along_examples(weights: Array, x: Array, larger: LayerCall) -> Array:
    """Return weights of the examples with x's rank.

    Args:
      weights: shape `[N]`.
      x: the input of a call.
      larger: the same call were there one example more.
    """
    axes = [a for a in range(x.ndim) if x.shape[a] != larger.shape[a]]
    if len(axes) != 1 or x.shape[axes[0]] != len(weights):
        raise ValueError(
            f"the input of layer {'/'.join(larger.path)}, of shape {list(x.shape)}, "
            f"has no axis of the {len(weights)} examples to lay weights along; measure "
            "it without weights"
        )
    return jnp.expand_dims(weights, [a for a in range(x.ndim) if a != axes[0]])
