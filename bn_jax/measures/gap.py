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
from jax import Array

from bn_jax.measures.layer_calls import Predict, layer_calls
from bn_jax.measures.population import batch_moments, exact_statistics, mean_and_var


class LayerGap(NamedTuple):
    """How far a layer's statistics are from the exact ones, at its worst feature.

    Variances are taken with epsilon added, as they normalise, so that a feature that
    never varies has a gap, too.
    """

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
      predict: see `exact_statistics`; gives logits `[N, classes]`.
      variables: of the model, with the running averages.
      inputs: to evaluate on, shape `[N, ...]`.
      labels: of `inputs`, shape `[N]`, integers.
      measure_on: the training set, whose statistics are the exact ones.
      batch_size: of the batches that normalise by themselves, of consecutive examples;
        a last smaller batch is one, too.

    Returns:
      A report. "training" is by each batch's own statistics.

    Raises:
      ValueError: if there is not one label for each input, or as `exact_statistics`
        says.
    """
    if labels.shape != (len(inputs),) or not len(inputs):
        raise ValueError(
            f"labels have shape {list(labels.shape)} for {len(inputs)} inputs; "
            "expected at least one input and one label for each: [N]"
        )
    exact = exact_statistics(predict, variables, measure_on, batch_size=batch_size)
    by_exact = {**variables, "batch_stats": exact}
    by_batch = jax.jit(functools.partial(batch_moments, predict, variables))

    ways: dict[str, Callable[[Array], Array]] = {
        "training": lambda x: by_batch(x)[0],
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

    calls = layer_calls(predict, variables, measure_on[:batch_size])
    epsilons = {call.path: call.epsilon for call in calls}
    running, true = (
        {path: mean_and_var(stats, path) for path in epsilons}
        for stats in (variables.get("batch_stats", {}), exact)
    )
    of_batches = [by_batch(x)[1] for x in _batches(measure_on, batch_size)]
    report = Gap({}, {}, loss, accuracy)
    for path, epsilon in epsilons.items():
        gap_of = functools.partial(_layer_gap, exact=true[path], epsilon=epsilon)
        gaps = [gap_of((batch[path].mean, batch[path].var)) for batch in of_batches]
        name = "/".join(path)
        report.training[name] = LayerGap(
            mean=sum(g.mean for g in gaps) / len(gaps),
            log_var=sum(g.log_var for g in gaps) / len(gaps),
        )
        report.running[name] = gap_of(running[path])
    return report


def _layer_gap(
    statistics: tuple[Array, Array], *, exact: tuple[Array, Array], epsilon: float
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
