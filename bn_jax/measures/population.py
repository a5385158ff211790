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

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bn_jax.measures.layer_calls import (
    Predict,
    layer_calls,
    pooled,
    program,
    with_moments,
)
from bn_jax.measures.meshes import automatic, automatic_axes, like
from bn_jax.measures.models import resolve
from bn_jax.moments import Moments, check_non_negative, merge
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
    """Return `batch_stats` with the mean and variance of a whole data set.

    A layer that is called several times pools what its calls are given.

    Args:
      model: function of `(variables, inputs)` that applies a Flax model in prediction
        mode, a Linen or an NNX module: see `bn_jax.measures.models.resolve`. A mask or
        weights that the model gives to a layer count.
      variables: of the model, see there. A model without batch statistics gives an
        empty result.
      inputs: the data set, shape `[N, ...]`; or its batches, as a list or a loader:
        anything that can be iterated over again and again, and yields the same. Where a
        mesh shares an array out along N, each device works on its own examples.
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
      ValueError: if there are no examples, the batch size is missing or not positive,
        the mode is unknown, weights do not fit or are all 0, a layer's input has no
        axis of examples for them, batches can be iterated over only once, or a layer's
        calls cannot be seen.

    References:
      Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.
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
      pseudo_count: see `bn_jax.measures.adaptation`.
    """
    if mode not in ("layerwise", "one_pass"):
        raise ValueError(f"mode={mode!r}; expected layerwise or one_pass")
    predict, variables = resolve(model, variables)
    with automatic_axes():
        source = _source(inputs, weights, batch_size, num_examples)
        measured = _measure_all(
            predict, automatic(variables), source, mode=mode, pseudo_count=pseudo_count
        )
    return like(measured, variables)


def _measure_all(
    predict: Predict,
    variables: Any,
    source: _Stored | _Batches,
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
      each layer was given, by the layer's path.

    Raises:
      ValueError: if a layer's calls cannot be seen.
    """
    predict, variables = resolve(model, variables)
    outputs, measured = program(predict, variables, inputs, by_batch=True)(
        variables, inputs
    )
    return outputs, pooled([call.moments for call in measured])


class _Stored:
    """A data set that is one array."""

    def __init__(self, inputs: Array, weights: Array | None, batch_size: int) -> None:
        self._inputs, self._weights = inputs, weights
        self._batch_size = batch_size

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self._inputs)

    @property
    def weight(self) -> Any:
        """Number of examples, or their weight."""
        return self.num_examples if self._weights is None else jnp.sum(self._weights)

    def example(self) -> Array:
        """Return a batch."""
        return self._inputs[: self._batch_size]

    def measure(
        self,
        predict: Predict,
        variables: Any,
        *,
        number: int | None = None,
        kept: Any = None,
        keep: bool = False,
    ) -> tuple[Any, Any]:
        """Return the moments of what calls are given over the data set.

        Args:
          predict: see `exact_statistics`.
          variables: see `exact_statistics`.
          number: of the call that is measured, whose moments alone are returned; None
            measures all, each call normalising by its own batch.
          kept: what the call before was given, as the last pass returned it, or None.
          keep: whether to return what this call is given.

        Returns:
          A list of the calls' moments by layer, and what the call was given, or None.
        """
        return _of_stored(
            predict,
            variables,
            inputs=self._inputs,
            weights=self._weights,
            batch_size=self._batch_size,
            number=number,
            kept=kept,
            keep=keep,
        )


class _Batches:
    """A data set whose batches are iterated over, a pass at a time.

    How many examples there are is not known before, so nothing is kept between passes.
    """

    num_examples = None

    def __init__(self, batches: Any, num_examples: int | None) -> None:
        self._all, self._num_examples = batches, num_examples
        self.weight = 0  # number of examples that the last pass has seen

    def __iter__(self) -> Iterator[Array]:
        left = math.inf if self._num_examples is None else self._num_examples
        for batch in self._all:
            if not hasattr(batch, "shape"):
                raise ValueError(
                    f"a batch is a {type(batch).__name__}; expected an array of inputs "
                    "alone, [N, ...]: let the loader leave out labels"
                )
            if left <= 0:
                return
            if len(batch):
                yield automatic(batch if len(batch) <= left else batch[: int(left)])
            left -= len(batch)
        if left > 0 and self._num_examples is not None:
            raise ValueError(
                f"num_examples={self._num_examples}, but the batches hold "
                f"{self._num_examples - int(left)} examples; give at most as many"
            )

    def example(self) -> Array:
        """Return a batch.

        Raises:
          ValueError: if there is none.
        """
        for batch in self:
            return batch
        raise ValueError(
            "there are no examples to measure; if the batches come from an iterator "
            "that is used up, give a list of them"
        )

    def measure(
        self, predict: Predict, variables: Any, *, number: int | None = None, **_: Any
    ) -> tuple[Any, None]:
        """Return the moments of what calls are given; see `_Stored.measure`."""
        total, self.weight = None, 0
        for batch in self:
            self.weight += len(batch)
            of_batch = _of_batch(predict, variables, batch, number=number)
            total = of_batch if total is None else _merged(total, of_batch)
        return total, None


def _share(source: _Stored | _Batches, pseudo_count: float) -> Any:
    """Return how much measured statistics count beside old ones, or None for all."""
    weight = source.weight
    return weight / (weight + pseudo_count) if pseudo_count else None


def _source(
    inputs: Any,
    weights: Array | None,
    batch_size: int | None,
    num_examples: int | None,
) -> _Stored | _Batches:
    """Return the examples to measure."""
    if hasattr(inputs, "shape"):
        if batch_size is None:
            raise ValueError(
                f"batch_size is not given for an array of {len(inputs)} examples; give "
                "how many are measured at a time, such as 500"
            )
        inputs, weights = _check_data(inputs, weights, batch_size, num_examples)
        inputs, weights = automatic((inputs, weights))
        return _Stored(inputs, weights, batch_size)
    is_iterable = hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")
    if not is_iterable or isinstance(inputs, str | bytes | Mapping):
        raise ValueError(
            f"inputs are a {type(inputs).__name__}; expected an array of examples, "
            "[N, ...], or their batches in a list or a loader"
        )
    if weights is not None or batch_size is not None:
        raise ValueError(
            f"{'weights' if batch_size is None else 'batch_size'} is given for inputs "
            f"that are a {type(inputs).__name__}; it is for one array of examples, "
            "[N, ...]: batches are measured as they come"
        )
    if hasattr(inputs, "__iter__") and iter(inputs) is inputs:
        raise ValueError(
            f"inputs are a {type(inputs).__name__}, which can be iterated over only "
            "once, and each layer takes a pass; give a list of batches, or a loader "
            "that starts again at each `iter`"
        )
    return _Batches(inputs, num_examples)


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
    if not isinstance(batch_size, int | np.integer):
        raise ValueError(f"batch_size={batch_size!r}; expected an integer")
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


@functools.partial(jax.jit, static_argnames=("predict", "batch_size", "number", "keep"))
def _of_stored(
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
    """Return the moments of what calls are given; see `_Stored.measure`."""
    num_whole = len(inputs) // batch_size
    size = num_whole * batch_size

    def of_batch(batch: Any) -> tuple[Any, Any]:
        (inputs, weights), given = batch
        given = {} if given is None or number is None else {number - 1: given}
        moments, xs = _measured(
            predict, variables, inputs, weights, number=number, given=given
        )
        return moments, xs[number] if number is not None and keep else None

    def add(total: Any, batch: Any) -> tuple[Any, Any]:
        moments, x = of_batch(batch)
        return _merged(total, moments), x

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

    def add_at(total: Any, at: Any) -> tuple[Any, Any]:
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


@functools.partial(jax.jit, static_argnames=("predict", "number"))
def _of_batch(
    predict: Predict, variables: Any, inputs: Any, *, number: int | None
) -> Any:
    """Return the moments of what calls are given; see `_Stored.measure`."""
    moments, _ = _measured(predict, variables, inputs, None, number=number, given={})
    return moments


def _measured(
    predict: Predict,
    variables: Any,
    inputs: Any,
    weights: Array | None,
    *,
    number: int | None,
    given: Mapping[int, Array],
) -> tuple[list[Any], list[Array]]:
    """Return the moments of what calls are given in a batch, and what they are given.

    Args:
      predict: see `exact_statistics`.
      variables: see `exact_statistics`.
      inputs: of the batch.
      weights: of its examples.
      number: see `_Stored.measure`.
      given: inputs of calls that are known, by their number.
    """
    apply = program(predict, variables, inputs, weights, by_batch=number is None)
    _, measured = apply(variables, inputs, weights, given=given)
    chosen = measured if number is None else measured[number : number + 1]
    return [call.moments for call in chosen], [call.x for call in measured]


def _merged(a: Any, b: Any) -> Any:
    """Return the moments of each call over two sets of examples."""
    return jax.tree.map(merge, a, b, is_leaf=lambda leaf: isinstance(leaf, Moments))
