"""Statistics of another domain than that of the training set."""

from __future__ import annotations

from typing import Any

from jax import Array

from bn_jax.measures.population import Mode, with_exact_statistics
from bn_jax.variables import batch_stats_of


def adapted_statistics(
    model: Any,
    variables: Any,
    inputs: Any,
    *,
    pseudo_count: float,
    batch_size: int | None = None,
    mode: Mode = "layerwise",
    weights: Array | None = None,
    num_examples: int | None = None,
) -> Any:
    r"""Return `batch_stats` for inputs of another domain, without labels.

    Of N examples, each layer gets

    $$\mu = \frac{n \mu_{old} + N \mu_{new}}{n + N}, \qquad
      \sigma^2 = \frac{n \sigma^2_{old} + N \sigma^2_{new}}{n + N},$$

    where the old mean and variance are those in `variables`, which count as n examples.
    With n = 0 this is AdaBN, the exact statistics of the new domain. With few examples,
    those of the old domain make up for their noise. As in the second paper, the
    difference of the means adds nothing to the variance.

    Args:
      model: see `bn_jax.measures.population.exact_statistics`, and so are all others
        but one.
      variables: see `model`.
      inputs: of the new domain; see `model`.
      pseudo_count: n, 0 or more.
      batch_size: see `model`.
      mode: see `model`. "layerwise" measures each layer with the statistics of those
        before it adapted, as in one batch of all examples.
      weights: see `model`; N is their sum.
      num_examples: see `model`.

    Returns:
      A collection like that of `exact_statistics`.

    Raises:
      ValueError: if the pseudo-count is negative or infinite, or as `exact_statistics`
        says.

    References:
      Li et al., 2017, "Revisiting Batch Normalization For Practical Domain Adaptation",
      arXiv:1603.04779. Schneider et al., 2020, "Improving robustness against common
      corruptions by covariate shift adaptation", arXiv:2006.16971.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> model, x = BatchNorm(), jnp.array([[2.0], [8.0]])
      >>> old = model.init(jax.random.key(0), x, use_running_average=True)
      >>> new = adapted_statistics(model, old, x, pseudo_count=2, batch_size=2)
      >>> new["mean"].tolist(), new["var"].tolist()
      ([2.5], [5.0])
    """
    adapted = with_exact_statistics(
        model,
        variables,
        inputs,
        batch_size=batch_size,
        mode=mode,
        weights=weights,
        num_examples=num_examples,
        pseudo_count=pseudo_count,
    )
    return batch_stats_of(adapted)
