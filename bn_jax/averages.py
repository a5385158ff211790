"""The moving averages that prediction normalises by, and how they move.

They begin at mean 0 and variance 1, and each batch moves them by `update_average`. Its
momentum may change from batch to batch: `cumulative_momentum` makes them the mean over
all batches, `debiased_momentum` takes the initial values out of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from bn_jax import checks
from bn_jax.moments import Moments, check_same_features, merge_stacked


class BatchNormState(NamedTuple):
    """The moving averages that prediction normalises by."""

    mean: Array  # shape [C], float32 or wider (complex where the data are)
    var: Array  # average of biased variances, shape [C], float32 or wider


class CountedState(NamedTuple):
    """The moving averages, and the number of batches in them."""

    mean: Array  # shape [C], float32 or wider (complex where the data are)
    var: Array  # average of biased variances, shape [C], float32 or wider
    # Shape [], float32. (Shadows tuple.count.)
    count: Array  # type: ignore[assignment]


def update_average(
    state: BatchNormState, moments: Moments, *, momentum: float | Array = 0.9
) -> BatchNormState:
    """Return the moving averages after one more batch.

    Args:
      state: the averages so far.
      moments: of the batch. A batch of total weight 0 leaves the averages as they are.
      momentum: weight of the OLD average, in [0, 1], shape `[]` or `[C]`; the batch has
        1 - momentum. It may change from step to step: see `cumulative_momentum`,
        `debiased_momentum`.

    Returns:
      Averages of the shapes and dtypes of `state`; the mean is complex where that of
      the batch is.

    Raises:
      TypeError: if `state` or `moments` is no NamedTuple with its fields.
      ValueError: if momentum is outside [0, 1], where that is known, the state is
        narrower than float32, or the moments are of other features.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import init, measure
      >>> _, state = init(1)  # mean 0, variance 1
      >>> batch = measure(jnp.array([[2.0], [8.0]]))  # mean 5, variance 9
      >>> state = update_average(state, batch, momentum=0.75)
      >>> state.mean.tolist(), state.var.tolist()
      ([1.25], [3.0])
    """
    checks.check_momentum(momentum)
    checks.check_fields(
        state=(state, checks.AVERAGES), moments=(moments, Moments._fields)
    )
    checks.check_state(state)
    check_same_features(state=state.mean, moments=moments.mean)

    def moved(old: Array, new: Array) -> Array:
        average = momentum * old + (1 - momentum) * new
        # The dtype of the state stays, but a mean of complex numbers is complex.
        dtype = jnp.result_type(old, 1j) if jnp.iscomplexobj(new) else old.dtype
        return jnp.where(moments.count > 0, average, old).astype(dtype)

    return BatchNormState(
        moved(state.mean, moments.mean), moved(state.var, moments.var)
    )


def cumulative_momentum(num_batches: ArrayLike) -> Array:
    """Return t / (t + 1), with which the moving average is the mean of all batches.

    Args:
      num_batches: t, number of batches in the old average, 0 at the first.

    Returns:
      t / (t + 1) in float32, of t's shape.

    Raises:
      ValueError: if num_batches is negative or not finite, where that is known.

    Examples:
      >>> [cumulative_momentum(t).item() for t in (0, 1, 3)]
      [0.0, 0.5, 0.75]
    """
    checks.check_num_batches(num_batches)
    t = jnp.asarray(num_batches, jnp.float32)
    return t / (t + 1)


def debiased_momentum(momentum: ArrayLike, num_batches: ArrayLike) -> Array:
    r"""Return the momentum that makes a moving average free of its initial value.

    With it the average after t batches is the one of constant momentum m, started from
    0, over $1 - m^t$: at the first batch that batch alone. Its weight of the old
    average is $m (1 - m^t) / (1 - m^{t+1})$.

    Args:
      momentum: m, weight of the OLD average in the long run, in [0, 1].
      num_batches: t, number of batches in the old average, 0 at the first.

    Returns:
      The weight in float32, of the shape that both arguments broadcast to.

    Raises:
      ValueError: if momentum is outside [0, 1], or num_batches negative or not finite,
        where that is known.

    References:
      Kingma and Ba, 2015, "Adam", arXiv:1412.6980, section 3.

    Examples:
      >>> [f"{debiased_momentum(0.5, t):.3f}" for t in (0, 1, 100)]
      ['0.000', '0.333', '0.500']
    """
    checks.check_momentum(momentum)
    checks.check_num_batches(num_batches)
    m = jnp.asarray(momentum, jnp.float32)
    t = jnp.asarray(num_batches, jnp.float32)
    log_m = jnp.log(m)
    ratio = jnp.expm1(t * log_m) / jnp.expm1((t + 1) * log_m)
    # Their limits: m = 1 averages all batches, m = 0 keeps the last.
    return jnp.where(m < 1, jnp.where(m > 0, m * ratio, 0), cumulative_momentum(t))


def merge_states(
    states: BatchNormState, weights: Array | None = None
) -> BatchNormState:
    """Merge moving averages that diverged, such as those of devices without sync.

    The merged variance is the mean of the variances plus the variance of the means;
    the mean of the variances alone would miss what the devices differ by.

    Args:
      states: stacked along a leading axis: mean and var of shape `[D, C]`.
      weights: of the states, shape `[D]`, such as their batch sizes; equal by default.
        At least one must be positive: traced weights, which cannot be checked, give
        mean 0 and variance 0 where all are 0.

    Returns:
      Averages of shape `[C]`, in float32 or wider.

    Raises:
      TypeError: if `states` are no NamedTuple with mean and var, or the means are of
        neither a floating-point nor a complex dtype.
      ValueError: if the states are not stacked, or weights are negative, not finite,
        complex, all 0, or not one for each state.

    Examples:
      >>> import jax.numpy as jnp
      >>> states = BatchNormState(mean=jnp.array([[0.0], [2.0]]), var=jnp.ones((2, 1)))
      >>> merged = merge_states(states)
      >>> merged.mean.tolist(), merged.var.tolist()
      ([1.0], [2.0])
    """
    checks.check_fields(states=(states, checks.AVERAGES))
    mean, var = states.mean, states.var
    if jnp.ndim(mean) < 2 or jnp.shape(mean) != jnp.shape(var):
        raise ValueError(
            f"states have means of shape {list(jnp.shape(mean))} and variances of "
            f"{list(jnp.shape(var))}; expected both stacked, [D, C]: put D states "
            "together by jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)"
        )
    num_states = len(mean)
    w = jnp.ones(num_states) if weights is None else jnp.asarray(weights)
    if w.shape != (num_states,):
        raise ValueError(
            f"weights have shape {list(w.shape)}; expected one for each of the "
            f"{num_states} states: [{num_states}]"
        )
    if weights is not None and not isinstance(weights, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            weigh_nothing = not jnp.any(jnp.asarray(weights))
        if weigh_nothing:
            raise ValueError(
                f"the weights of all {num_states} states are 0, which leaves nothing "
                "to merge; give at least one a positive weight, or leave weights out"
            )
    _, mean, var = merge_stacked(Moments(w, mean, var))
    return BatchNormState(mean, var)
