"""Statistics of a whole data set for the batch norm layers of a Flax model.

Moving averages follow parameters that move, and lag behind them. After training one can
instead measure what each layer sees over the training set (`exact_statistics`), predict
with that, and see how far apart the statistics are (`gap`).

Layers are found by their collection `batch_stats{mean,var}`: ours, Flax's own, or any
with attributes `axis` and `epsilon`. A model is given as `predict(variables, inputs)`,
which applies it in prediction mode; where a layer is to normalise by its batch, its
call is replaced, so that dropout stays off and no average moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax

from bn_jax.functional import BatchNormParams, normalize
from bn_jax.moments import Moments, check_non_negative, measure, merge

Path = tuple[str, ...]
Predict = Callable[[Any, Array], Any]
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

    Args:
      predict: function of `(variables, inputs)` that applies a Flax model in prediction
        mode.
      variables: of the model. A model without batch statistics gives an empty result.
      inputs: the data set, shape `[N, ...]`; it may be sharded over devices.
      batch_size: number of examples measured at a time; a last smaller batch counts by
        its size.
      mode: "layerwise" measures layer after layer, each with its predecessors' exact
        statistics in place: what one batch of all examples would give, whatever the
        batch size, in as many passes as there are layers. "one_pass" lets each layer
        normalise by its batch and pools what it is given, the variance between batches
        included: one pass, and a result that depends on the batches after the first
        layer. A layer that is called several times pools its calls.
      weights: of the examples, non-negative, shape `[N]`.
      num_examples: measure the first so many examples only.

    Returns:
      A collection like `variables["batch_stats"]`.

    Raises:
      ValueError: if there are no examples, the batch size is not positive, the mode is
        unknown, weights do not fit, or a layer's input has no axis of examples for
        them.

    References:
      Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.
    """
    inputs, weights = _check_data(inputs, weights, batch_size, num_examples)
    statistics = dict(traverse_util.flatten_dict(variables.get("batch_stats", {})))

    def with_statistics() -> Any:
        batch_stats = traverse_util.unflatten_dict(statistics)
        return {**variables, "batch_stats": batch_stats}

    def measured(paths: tuple[Path, ...], by_batch: bool) -> None:
        moments = _pooled_moments(
            predict, with_statistics(), inputs, weights, paths, batch_size, by_batch
        )
        for path, (_, mean, var) in moments.items():
            statistics[(*path, "mean")] = mean
            statistics[(*path, "var")] = var

    layers = tuple(_layers_in_order(predict, variables, inputs[:batch_size]))
    if mode == "layerwise":
        for path in layers:
            measured((path,), by_batch=False)
    elif mode == "one_pass":
        measured(layers, by_batch=True)
    else:
        raise ValueError(f"mode={mode!r}; expected layerwise or one_pass")
    return traverse_util.unflatten_dict(statistics)


def batch_moments(
    predict: Predict, variables: Any, inputs: Array
) -> tuple[Any, dict[Path, Moments]]:
    """Apply a model with each layer normalising by this batch.

    Args:
      predict: as for `exact_statistics`.
      variables: of the model.
      inputs: one batch, shape `[N, ...]`.

    Returns:
      The outputs of what is training mode for batch norm alone, and the moments of what
      each layer was given, by the layer's path.
    """
    return _apply_and_measure(predict, variables, inputs, None, by_batch=True)


class LayerGap(NamedTuple):
    """How far a layer's statistics are from the exact ones, at its worst feature."""

    mean: float  # |difference of means| over the exact deviation
    log_var: float  # |log of the ratio of variances|


class Gap(NamedTuple):
    """What `gap` returns. The keys of loss and accuracy: training, running, exact."""

    training: dict[str, LayerGap]  # by layer: the mean over the batches
    running: dict[str, LayerGap]  # by layer
    loss: dict[str, float]  # cross-entropy in nats
    accuracy: dict[str, float]  # share of the examples


def gap(
    predict: Predict,
    variables: Any,
    inputs: Array,
    labels: Array,
    *,
    measure_on: Array,
    batch_size: int,
) -> Gap:
    """Compare batch, running and exact statistics, by layer and in what they cost.

    Args:
      predict: as for `exact_statistics`; gives logits `[N, classes]`.
      variables: of the model, with the running averages.
      inputs: to evaluate on, shape `[N, ...]`.
      labels: of `inputs`, shape `[N]`, integers.
      measure_on: the training set, whose statistics are the exact ones.
      batch_size: of the batches that normalise by themselves; a last smaller batch is
        one, too.

    Returns:
      A report. "training" is by each batch's own statistics.
    """
    exact = exact_statistics(predict, variables, measure_on, batch_size=batch_size)
    by_exact = {**variables, "batch_stats": exact}

    def by_batch(x: Array) -> Any:
        return batch_moments(predict, variables, x)

    ways = {
        "training": jax.jit(lambda x: by_batch(x)[0]),
        "running": jax.jit(functools.partial(predict, variables)),
        "exact": jax.jit(functools.partial(predict, by_exact)),
    }
    loss, accuracy = {}, {}
    for name, logits_of in ways.items():
        logits = jnp.concatenate([logits_of(x) for x in _batches(inputs, batch_size)])
        log_p = jax.nn.log_softmax(logits)
        of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)
        loss[name] = float(-of_label.mean())
        accuracy[name] = float(jnp.mean(logits.argmax(-1) == labels))

    true = _means_and_variances(exact)
    of_batches = [
        {path: (m.mean, m.var) for path, m in moments.items()}
        for _, moments in map(jax.jit(by_batch), _batches(measure_on, batch_size))
    ]
    return Gap(
        training={
            "/".join(path): LayerGap(
                *(
                    sum(gaps) / len(of_batches)
                    for gaps in zip(
                        *(_layer_gap(batch[path], true[path]) for batch in of_batches),
                        strict=True,
                    )
                )
            )
            for path in true
        },
        running={
            "/".join(path): _layer_gap(statistics, true[path])
            for path, statistics in _means_and_variances(
                variables.get("batch_stats", {})
            ).items()
        },
        loss=loss,
        accuracy=accuracy,
    )


def _means_and_variances(batch_stats: Any) -> dict[Path, tuple[Array, Array]]:
    """Return each layer's mean and variance by its path."""
    flat = traverse_util.flatten_dict(batch_stats)
    return {
        path[:-1]: (mean, flat[(*path[:-1], "var")])
        for path, mean in flat.items()
        if path[-1] == "mean"
    }


def _layer_gap(statistics: tuple[Array, Array], exact: tuple[Array, Array]) -> LayerGap:
    (mean, var), (true_mean, true_var) = statistics, exact
    return LayerGap(
        mean=float(jnp.max(jnp.abs(mean - true_mean) / jnp.sqrt(true_var))),
        log_var=float(jnp.max(jnp.abs(jnp.log(var / true_var)))),
    )


def _check_data(
    inputs: Array, weights: Array | None, batch_size: int, num_examples: int | None
) -> tuple[Array, Array | None]:
    """Return the examples to measure and their weights."""
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != (len(inputs),):
            raise ValueError(
                f"weights have shape {list(weights.shape)}; expected one for each of "
                f"the {len(inputs)} examples: [{len(inputs)}]"
            )
        check_non_negative(weights)
        weights = weights[:num_examples]
    inputs = inputs[:num_examples]
    if batch_size < 1 or len(inputs) < 1:
        raise ValueError(
            f"got {len(inputs)} examples and batch_size={batch_size}; expected at "
            "least one example and a positive batch size"
        )
    return inputs, weights


def _batches(inputs: Array, batch_size: int) -> list[Array]:
    """Cut `inputs` into batches; the last may be smaller."""
    return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]


@functools.partial(
    jax.jit, static_argnames=("predict", "paths", "batch_size", "by_batch")
)
def _pooled_moments(
    predict: Predict,
    variables: Any,
    inputs: Array,
    weights: Array | None,
    paths: tuple[Path, ...],
    batch_size: int,
    by_batch: bool,
) -> dict[Path, Moments]:
    """Return the moments of what the layers at `paths` are given over the data set."""

    def of_batch(batch: tuple[Array, Array | None]) -> dict[Path, Moments]:
        x, w = batch
        _, moments = _apply_and_measure(predict, variables, x, w, by_batch=by_batch)
        return {path: moments[path] for path in paths}

    def add(
        total: dict[Path, Moments], batch: tuple[Array, Array | None]
    ) -> tuple[dict[Path, Moments], None]:
        added = of_batch(batch)
        return {path: merge(total[path], added[path]) for path in paths}, None

    data = (inputs, weights)
    num_whole = len(inputs) // batch_size
    size = num_whole * batch_size
    rest = jax.tree.map(lambda a: a[size:], data)
    total = None
    if num_whole:
        whole = jax.tree.map(
            lambda a: a[:size].reshape(num_whole, batch_size, *a.shape[1:]), data
        )
        first = jax.eval_shape(of_batch, jax.tree.map(lambda a: a[0], whole))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        total, _ = lax.scan(add, zero, whole)
    if size < len(inputs):
        total = of_batch(rest) if total is None else add(total, rest)[0]
    assert total is not None
    return total


def _layers_in_order(predict: Predict, variables: Any, x: Array) -> list[Path]:
    """Return the paths of the batch norm layers in the order of their first calls."""
    order: list[Path] = []

    def trace(variables: Any, x: Array) -> None:
        order.extend(_apply_and_measure(predict, variables, x, None, by_batch=False)[1])

    jax.eval_shape(trace, variables, x)
    return order


def _apply_and_measure(
    predict: Predict,
    variables: Any,
    inputs: Array,
    weights: Array | None,
    *,
    by_batch: bool,
) -> tuple[Any, dict[Path, Moments]]:
    """Apply a model and measure what each batch norm layer is given, in call order.

    With `by_batch` each call is normalised by its own moments. Weights, of the
    examples, lie along that axis of a layer's input which has the batch's size; which
    one is found by tracing the model with another batch size.
    """
    flat = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    layers = {path[:-1] for path in flat if path[-1] == "mean"}
    shapes = None
    if weights is not None:
        shapes = iter(_input_shapes(predict, variables, inputs, layers))
    measured: dict[Path, Moments] = {}

    def each_call(module: Any, x: Array) -> Any:
        w = None
        if weights is not None and shapes is not None:
            w = _along_examples(weights, x, next(shapes), module.path)
        moments = measure(x, feature_axis=module.axis, weights=w)
        before = measured.get(module.path)
        measured[module.path] = moments if before is None else merge(before, moments)
        if not by_batch:
            return NotImplemented
        return _normalized(module, variables, x, moments)

    outputs = _intercepted(predict, variables, inputs, layers, each_call)
    return outputs, measured


def _normalized(module: Any, variables: Any, x: Array, moments: Moments) -> Array:
    """Return what a layer's call in training mode returns."""
    own: Mapping[str, Any] = variables.get("params", {})
    for name in module.path:
        own = own.get(name, {})
    params = BatchNormParams(own.get("scale"), own.get("bias"))
    dtype = nn.dtypes.canonicalize_dtype(x, *params, dtype=module.dtype)
    x = x.astype(moments.mean.dtype)
    return normalize(
        x,
        moments.mean,
        moments.var,
        params,
        epsilon=module.epsilon,
        feature_axis=module.axis,
    ).astype(dtype)


def _input_shapes(
    predict: Predict, variables: Any, inputs: Array, layers: set[Path]
) -> list[tuple[int, ...]]:
    """Return the shape of each call's input were there one example more."""
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, x: Array) -> Any:
        shapes.append(x.shape)
        return NotImplemented

    one_more = jax.ShapeDtypeStruct((len(inputs) + 1, *inputs.shape[1:]), inputs.dtype)
    jax.eval_shape(
        lambda v, x: _intercepted(predict, v, x, layers, note), variables, one_more
    )
    return shapes


def _along_examples(
    weights: Array, x: Array, larger: tuple[int, ...], path: Path
) -> Array:
    """Return weights of the examples with x's rank."""
    axes = [a for a in range(x.ndim) if x.shape[a] != larger[a]]
    if len(axes) != 1 or x.shape[axes[0]] != len(weights):
        raise ValueError(
            f"the input of layer {'/'.join(path)}, of shape {list(x.shape)}, has no "
            f"axis of the {len(weights)} examples to lay weights along; measure it "
            "without weights"
        )
    return jnp.expand_dims(weights, [a for a in range(x.ndim) if a != axes[0]])


def _intercepted(
    predict: Predict,
    variables: Any,
    inputs: Array,
    layers: set[Path],
    each_call: Callable[[Any, Array], Any],
) -> Any:
    """Apply a model; what `each_call` returns replaces a layer's output.

    NotImplemented leaves the output to the layer.
    """

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name != "__call__" or context.module.path not in layers:
            return next_fun(*args, **kwargs)
        y = each_call(context.module, args[0])
        return next_fun(*args, **kwargs) if y is NotImplemented else y

    with nn.intercept_methods(intercept):
        return predict(variables, inputs)
