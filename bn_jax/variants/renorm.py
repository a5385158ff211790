r"""Batch renormalisation: training that sees what prediction will use.

The batch's standardised values are corrected towards the moving averages by

$$r = \sigma_B / \sigma \in [1 / r_{max}, r_{max}], \qquad
  d = (\mu_B - \mu) / \sigma \in [-d_{max}, d_{max}],$$

both taken as constants by the gradient. With r_max 1 and d_max 0 this is batch norm;
without limits, training normalises by the moving averages, as prediction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.functional import BatchNormParams, BatchNormState, batch_norm
from bn_jax.moments import AxisIndexGroups, AxisName, measure


def batch_renorm(
    x: Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    train: bool,
    r_max: float | Array,
    d_max: float | Array,
    momentum: float | Array = 0.99,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    update_state: bool | None = None,
) -> tuple[Array, BatchNormState]:
    """Normalise by the batch, corrected towards the moving averages.

    Args:
      x: as for `batch_norm`.
      params: as for `batch_norm`.
      state: as for `batch_norm`.
      train: static. False is `batch_norm` in prediction.
      r_max: largest correction of the deviation, at least 1; may be traced.
      d_max: largest correction of the mean, in deviations, at least 0; may be traced.
      momentum: weight of the OLD average, in [0, 1].
      epsilon: as for `batch_norm`.
      feature_axis: as for `batch_norm`.
      weights: as for `batch_norm`.
      axis_name: as for `batch_norm`.
      axis_index_groups: as for `batch_norm`.
      update_state: static. Whether the averages move by the moments of `x`; by
        default in training.

    Returns:
      `(y, state)`, as `batch_norm`.

    Raises:
      ValueError: if r_max is below 1 or d_max below 0, or as `batch_norm` says.

    References:
      Ioffe, 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in
      Batch-Normalized Models", arXiv:1702.03275.
    """
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if isinstance(value, int | float) and not value >= least:
            raise ValueError(f"{name}={value!r}; expected a number of at least {least}")
    options: dict[str, Any] = {
        "momentum": momentum,
        "epsilon": epsilon,
        "feature_axis": feature_axis,
        "weights": weights,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "update_state": update_state,
    }
    if not train:
        return batch_norm(x, params, state, train=False, **options)
    # batch_norm measures again; compiled, the two are one.
    moments = measure(
        x,
        feature_axis=feature_axis,
        weights=weights,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    sigma = jnp.sqrt(state.var + epsilon)
    r = jnp.clip(jnp.sqrt(moments.var + epsilon) / sigma, 1 / r_max, r_max)
    d = jnp.clip((moments.mean - state.mean) / sigma, -d_max, d_max)
    present = moments.count > 0  # else batch_norm normalises by the averages
    r = lax.stop_gradient(jnp.where(present, r, 1))
    d = lax.stop_gradient(jnp.where(present, d, 0))

    # gamma (r x_hat + d) + beta, as a batch norm with other parameters.
    gamma, beta = params
    scale = r if gamma is None else gamma * r
    bias = d if gamma is None else gamma * d
    corrected = BatchNormParams(scale, bias if beta is None else bias + beta)
    return batch_norm(x, corrected, state, train=True, **options)


def limits(
    step: ArrayLike,
    *,
    start: int = 5_000,
    r_max: float = 3.0,
    r_end: int = 40_000,
    d_max: float = 5.0,
    d_end: int = 25_000,
) -> tuple[Array, Array]:
    """Return `(r_max, d_max)` at a step: the paper's schedule, batch norm at first.

    The defaults are the paper's.

    Args:
      step: number of the training step.
      start: step at which the limits begin to rise, linearly, from 1 and 0.
      r_max: final limit of the deviation's correction, reached at step `r_end`.
      r_end: see `r_max`.
      d_max: final limit of the mean's correction, reached at step `d_end`.
      d_end: see `d_max`.
    """
    t = jnp.asarray(step, jnp.float32)
    rise_r = jnp.clip((t - start) / (r_end - start), 0, 1)
    rise_d = jnp.clip((t - start) / (d_end - start), 0, 1)
    return 1 + (r_max - 1) * rise_r, d_max * rise_d
