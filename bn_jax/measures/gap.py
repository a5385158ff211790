"""How far apart the statistics of batch norm layers are, and what that costs.

In training a layer normalises by its batch, in prediction by moving averages that lag
behind the parameters. Both are compared with the exact statistics of a whole data set,
which `bn_jax.measures.population` measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.measures.layer_calls import Predict, layer_calls
from bn_jax.measures.meshes import automatic, automatic_axes
from bn_jax.measures.models import check_array, resolve
from bn_jax.measures.population import batch_moments, with_exact_statistics
from bn_jax.variables import Statistics, statistics_of


class LayerGap(NamedTuple):
    """How far a layer's statistics are from the exact ones, at its worst feature.

    Variances are taken with epsilon added, as they normalise, so that a feature that
    never varies has a gap, too. The logarithm is the natural one.
    """

    mean: float  # |difference of means| over the exact deviation
    log_var: float  # |log of the ratio of variances|


class Gap(NamedTuple):
    """What `gap` returns; printed, a table.

    The keys of loss and accuracy are training, running and exact.
    """

    training: dict[str, LayerGap]  # by layer: the mean over the batches
    running: dict[str, LayerGap]  # by layer
    loss: dict[str, float]  # cross-entropy in nats
    accuracy: dict[str, float]  # share of the examples

    def __str__(self) -> str:
        rows = [f"{'statistics':24s}{'loss':>10s}{'accuracy':>10s}"]
        rows += [
            f"{name:24s}{loss:10.4f}{self.accuracy[name]:10.4f}"
            for name, loss in self.loss.items()
        ]
        if not self.running:
            rows += ["", "no layer has batch statistics, so that all are the same"]
        else:
            rows += ["", f"{'from the exact ones':24s}{'batch':>20s}{'running':>20s}"]
            rows.append(f"{'layer':24s}" + 2 * f"{'mean':>10s}{'log var':>10s}")
        for name, running in self.running.items():
            gaps = (*self.training[name], *running)
            rows.append(f"{name:24s}" + "".join(f"{value:10.3g}" for value in gaps))
        return "\n".join(rows)


def gap(
    model: Any,
    variables: Any,
    inputs: Array,
    labels: Array,
    *,
    measure_on: Any,
    batch_size: int,
) -> Gap:
    """Compare batch, running and exact statistics, by layer and in what they cost.

    Args:
      model: see `exact_statistics`; gives logits `[N, classes]`.
      variables: of the model, with the running averages.
      inputs: to evaluate on, shape `[N, ...]`.
      labels: of `inputs`, shape `[N]`, integers.
      measure_on: the training set, whose statistics are the exact ones. Give an array
        or an iterable of batches; see `exact_statistics`.
      batch_size: of the batches that normalise by themselves, of consecutive examples;
        a last smaller batch is one, too. Batches that are given are taken as they are.

    Returns:
      A report. "training" is by each batch's own statistics: loss and accuracy by those
      of the batches of `inputs`, the layers' gaps by those of `measure_on`.

    Raises:
      ValueError: if inputs or labels are not arrays, there is not one label for each
        input, labels are not classes, outputs are not logits, or as `exact_statistics`
        says.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> model, labels = BatchNorm(), jnp.array([0, 1])
      >>> x = jnp.array([[3.0, 0.0], [2.0, 1.0]])
      >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
      >>> gap(model, variables, x, labels, measure_on=x, batch_size=2).accuracy
      {'training': 1.0, 'running': 0.5, 'exact': 1.0}
    """
    check_array("inputs", inputs)
    check_array("labels", labels if labels is None else np.asarray(labels))
    if not hasattr(measure_on, "shape") and not hasattr(measure_on, "__iter__"):
        check_array("measure_on", measure_on)
    labels = jnp.asarray(labels)
    if labels.shape != (len(inputs),) or not len(inputs):
        raise ValueError(
            f"labels have shape {list(labels.shape)} for {len(inputs)} inputs; "
            "expected at least one input and one label for each: [N]"
        )
    predict, variables = resolve(model, variables)
    with automatic_axes():
        return _gap(
            predict,
            automatic(variables),
            automatic(inputs),
            automatic(labels),
            measure_on=measure_on,
            batch_size=batch_size,
        )


def _gap(
    predict: Predict,
    variables: Any,
    inputs: Array,
    labels: Array,
    *,
    measure_on: Any,
    batch_size: int,
) -> Gap:
    """Return the report; see `gap`."""
    is_stored = hasattr(measure_on, "shape")
    measure_on = automatic(measure_on if is_stored else list(measure_on))
    by_exact = with_exact_statistics(
        predict, variables, measure_on, batch_size=batch_size if is_stored else None
    )
    by_batch = jax.jit(functools.partial(batch_moments, predict, variables))

    ways: dict[str, Callable[[Array], Array]] = {
        "training": lambda x: by_batch(x)[0],
        "running": jax.jit(functools.partial(predict, variables)),
        "exact": jax.jit(functools.partial(predict, by_exact)),
    }
    loss, accuracy = {}, {}
    for name, logits_of in ways.items():
        outputs = [logits_of(x) for x in _batches(inputs, batch_size)]
        if not isinstance(outputs[0], Array):
            raise ValueError(
                f"the model gives a {type(outputs[0]).__name__}; expected logits, [N, "
                "classes], alone: give a function that returns them"
            )
        logits = jnp.concatenate(outputs)
        _check_labels(labels, logits)
        log_p = jax.nn.log_softmax(logits)
        of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)
        loss[name] = float(-of_label.mean())
        accuracy[name] = float(jnp.mean(logits.argmax(-1) == labels))

    batches = _batches(measure_on, batch_size) if is_stored else measure_on
    epsilons = {
        call.path: call.epsilon
        for call in layer_calls(predict, variables, inputs[:batch_size])
    }
    running, true = statistics_of(variables), statistics_of(by_exact)
    of_batches = [by_batch(x)[1] for x in batches]
    report = Gap({}, {}, loss, accuracy)
    for path, epsilon in epsilons.items():
        gap_of = functools.partial(_layer_gap, exact=true[path], epsilon=epsilon)
        gaps = [gap_of(Statistics(*batch[path][1:])) for batch in of_batches]
        name = "/".join(path)
        report.training[name] = LayerGap(
            mean=sum(g.mean for g in gaps) / len(gaps),
            log_var=sum(g.log_var for g in gaps) / len(gaps),
        )
        report.running[name] = gap_of(running[path])
    return report


def _check_labels(labels: Array, logits: Array) -> None:
    """Refuse labels that are not classes of the logits.

    Raises:
      ValueError: saying which labels there are.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"the model gives outputs of shape {list(logits.shape)}; expected logits, "
            "[N, classes]"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels have dtype {labels.dtype}; expected integers")
    least, greatest = int(labels.min()), int(labels.max())
    if least < 0 or greatest >= logits.shape[1]:
        raise ValueError(
            f"labels are from {least} to {greatest}, but the model has "
            f"{logits.shape[1]} classes; expected labels from 0 to "
            f"{logits.shape[1] - 1}"
        )


def _layer_gap(
    statistics: Statistics, *, exact: Statistics, epsilon: float
) -> LayerGap:
    (mean, var), (true_mean, true_var) = statistics, exact
    var, true_var = var + epsilon, true_var + epsilon
    return LayerGap(
        mean=float(jnp.max(jnp.abs(mean - true_mean) / jnp.sqrt(true_var))),
        log_var=float(jnp.max(jnp.abs(jnp.log(var / true_var)))),
    )


def _batches(inputs: Array, batch_size: int) -> list[Array]:
    """Cut `inputs` into batches; the last may be smaller."""
    return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]
