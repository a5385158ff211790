"""The loss of a classifier, example by example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array


def losses(
    logits: Array, labels: Array, *, label_smoothing: float | Array = 0.0
) -> Array:
    """Return the cross-entropy of each example, in nats.

    With smoothing s the target of an example of class y among K classes is
    (1 - s) onehot(y) + s / K, and its loss -(1 - s) log p_y - s mean_k(log p_k).

    Args:
      logits: `[..., K]`, of any float dtype.
      labels: `[...]`, integers less than K.
      label_smoothing: s, in [0, 1].

    Returns:
      Losses `[...]` of float32, or float64 where the logits are.

    References:
      Szegedy et al., 2016, "Rethinking the Inception architecture for computer vision".
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    of_label = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if isinstance(label_smoothing, (int, float)) and label_smoothing == 0:
        return of_label
    of_all = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    return (1 - label_smoothing) * of_label + label_smoothing * of_all
