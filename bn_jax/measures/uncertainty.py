"""Predictive uncertainty from the noise of batch statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.measures.layer_calls import layer_calls, with_moments
from bn_jax.measures.meshes import automatic, automatic_axes
from bn_jax.measures.models import check_array, resolve
from bn_jax.measures.population import batch_moments


def monte_carlo_batch_norm(
    model: Any,
    variables: Any,
    inputs: Array,
    train_inputs: Array,
    key: Array,
    *,
    num_passes: int,
    batch_size: int,
) -> Array:
    """Predict several times, each by the statistics of a random training batch.

    Each pass draws a batch of training examples, lets it through the model with every
    layer normalised by it, and predicts `inputs` with the statistics so found. The
    spread over passes is an estimate of the model's uncertainty.

    Args:
      model: see `bn_jax.measures.population.exact_statistics`.
      variables: of the model.
      inputs: to predict, shape `[N, ...]`.
      train_inputs: the training set, shape `[M, ...]`.
      key: decides the batches; the same key gives the same passes.
      num_passes: T, at least 1.
      batch_size: examples of a batch, drawn without replacement; at most M.

    Returns:
      Outputs of shape `[T, N, ...]`.

    Raises:
      ValueError: if inputs or train_inputs are not arrays, there is no pass, a batch is
        empty or larger than the training set, or as `batch_moments` says.

    References:
      Teye, Azizpour and Smith, 2018, "Bayesian Uncertainty Estimation for Batch
      Normalized Deep Networks", arXiv:1802.06455.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> model, key = BatchNorm(), jax.random.key(0)
      >>> train, x = jnp.array([[0.0], [4.0], [8.0]]), jnp.array([[4.0]])
      >>> variables = model.init(key, x, use_running_average=True)
      >>> y = monte_carlo_batch_norm(
      ...     model, variables, x, train, key, num_passes=16, batch_size=2)
      >>> y.shape, sorted(set(y.round().ravel().tolist()))
      ((16, 1, 1), [-1.0, 0.0, 1.0])
    """
    check_array("inputs", inputs)
    check_array("train_inputs", train_inputs)
    sizes = range(1, len(train_inputs) + 1)
    if num_passes not in range(1, 2**31) or batch_size not in sizes:
        raise ValueError(
            f"num_passes={num_passes!r} and batch_size={batch_size!r}; expected at "
            f"least one pass and a batch of 1 to {len(train_inputs)} training examples"
        )

    predict, variables = resolve(model, variables)
    variables = automatic(variables)
    inputs, train_inputs, key = automatic((inputs, jnp.asarray(train_inputs), key))

    def one_pass(key: Array) -> Any:
        drawn = jax.random.choice(key, len(train_inputs), (batch_size,), replace=False)
        _, moments = batch_moments(predict, variables, train_inputs[drawn])
        return predict(with_moments(variables, moments), inputs)

    with automatic_axes():
        layer_calls(predict, variables, inputs)  # refuses what it cannot take
        outputs: Array = lax.map(one_pass, jax.random.split(key, num_passes))
    return outputs
