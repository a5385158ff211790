"""The data sets that statistics are measured over: one array, or batches.

What is measured of a pass over one is said by `Stored.measure`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bn_jax.measures.layer_calls import Predict, program
from bn_jax.measures.meshes import automatic
from bn_jax.moments import Moments, check_non_negative, merge


class Stored:
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
        """Return the moments of the calls' inputs over the data set.

        Args:
          predict: see `population.exact_statistics`.
          variables: see `population.exact_statistics`.
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


class Batches:
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
        """Return the moments of the calls' inputs; see `Stored.measure`."""
        total, self.weight = None, 0
        for batch in self:
            self.weight += len(batch)
            of_batch = _of_batch(predict, variables, batch, number=number)
            total = of_batch if total is None else _merged(total, of_batch)
        return total, None


def examples(
    inputs: Any,
    weights: Array | None,
    batch_size: int | None,
    num_examples: int | None,
) -> Stored | Batches:
    """Return the examples to measure.

    Args:
      inputs: see `population.exact_statistics`, as all others.
      weights: see `inputs`.
      batch_size: see `inputs`.
      num_examples: see `inputs`.

    Raises:
      ValueError: if they are not examples, or what else is given does not fit them.
    """
    if num_examples is not None and not isinstance(num_examples, int | np.integer):
        raise ValueError(f"num_examples={num_examples!r}; expected an integer")
    if hasattr(inputs, "shape"):
        if not inputs.shape:
            raise ValueError("inputs are a single number; expected examples, [N, ...]")
        if batch_size is None:
            raise ValueError(
                f"batch_size is not given for an array of {len(inputs)} examples; give "
                "how many are measured at a time, such as 500"
            )
        inputs, weights = _check_data(inputs, weights, batch_size, num_examples)
        inputs, weights = automatic((inputs, weights))
        return Stored(inputs, weights, batch_size)
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
    return Batches(inputs, num_examples)


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
    """Return the moments of the calls' inputs; see `Stored.measure`."""
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
    """Return the moments of the calls' inputs; see `Stored.measure`."""
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
    """Return the moments of the calls' inputs in a batch, and these inputs.

    Args:
      predict: see `population.exact_statistics`.
      variables: see `population.exact_statistics`.
      inputs: of the batch.
      weights: of its examples.
      number: see `Stored.measure`.
      given: inputs of calls that are known, by their number.
    """
    apply = program(predict, variables, inputs, weights, by_batch=number is None)
    _, measured = apply(variables, inputs, weights, given=given)
    chosen = measured if number is None else measured[number : number + 1]
    return [call.moments for call in chosen], [call.x for call in measured]


def _merged(a: Any, b: Any) -> Any:
    """Return the moments of each call over two sets of examples."""
    return jax.tree.map(merge, a, b, is_leaf=lambda leaf: isinstance(leaf, Moments))
