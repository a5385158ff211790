"""Moving averages over n steps, against their closed forms; merging diverged ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from bn_jax import (
    BatchNormState,
    batch_norm,
    cumulative_momentum,
    debiased_momentum,
    init,
    measure,
    merge,
    merge_states,
    update_average,
)
from bn_jax.averages import CountedState
from bn_jax.linen import BatchNorm
from reference import normal

BATCHES = [normal((16, 3), mean=5.0 + i, std=1.0 + i, seed=i) for i in range(12)]
MOMENTS = [reference.moments(x) for x in BATCHES]


@jax.jit
def after(state, x, momentum):
    params, _ = init(3)
    return batch_norm(x, params, state, train=True, momentum=momentum)[1]


def after_all(momentum_at, dtype=jnp.float32):
    _, state = init(3)
    for t, x in enumerate(BATCHES):
        state = after(state, x.astype(dtype), momentum_at(t))
    return state


@jax.jit
def moved(state, x, momentum):
    return update_average(state, measure(x), momentum=momentum)


@pytest.mark.parametrize("m", [0.0, 0.5, 0.9, 0.999])
def test_debiased_average_is_adams_from_the_first_step(m):
    # sum_i (1 - m) m^(n - i) v_i / (1 - m^n): no trace of the initial 0 and 1.
    for n in (1, 3, 12):
        weights = (1 - m) * m ** (n - 1 - np.arange(n)) / (1 - m**n)
        _, state = init(3)
        for t in range(n):
            state = moved(state, BATCHES[t], debiased_momentum(m, t))
        for name in ("mean", "var"):
            values = np.stack([getattr(b, name) for b in MOMENTS[:n]])
            np.testing.assert_allclose(
                getattr(state, name), weights @ values, rtol=1e-5
            )


def test_cumulative_average_is_the_mean_over_batches():
    state = after_all(cumulative_momentum)
    np.testing.assert_allclose(
        state.mean, np.mean([b.mean for b in MOMENTS], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        state.var, np.mean([b.var for b in MOMENTS], 0), rtol=1e-5
    )
    chex.assert_trees_all_close(
        state, after_all(functools.partial(debiased_momentum, 1.0)), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_do_not_freeze_a_slow_average(dtype):
    # In bfloat16, 0.999 rounds to 1; haiku's evaluation is then NaN.
    state = after_all(functools.partial(debiased_momentum, 0.999), dtype)
    assert state.mean.dtype == jnp.float32
    expected = after_all(functools.partial(debiased_momentum, 0.999))
    chex.assert_trees_all_close(state, expected, rtol=2e-2)


@pytest.mark.parametrize("average", ["debiased", "cumulative"])
def test_module_counts_its_batches(average):
    norm = BatchNorm(use_running_average=False, momentum=0.9, average=average)
    variables = norm.init(jax.random.key(0), BATCHES[0])
    train = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))
    for x in BATCHES:
        _, updates = train(variables, x)
        variables = {**variables, **updates}
    stats = variables["batch_stats"]
    at = cumulative_momentum
    if average == "debiased":
        at = functools.partial(debiased_momentum, 0.9)
    assert stats["count"] == len(BATCHES)
    expected = after_all(at)
    kept = BatchNormState(stats["mean"], stats["var"])
    chex.assert_trees_all_close(kept, expected, rtol=1e-5)


@pytest.mark.parametrize("average", ["debiased", "cumulative"])
def test_batch_that_weighs_nothing_is_not_counted(average):
    norm = BatchNorm(use_running_average=False, momentum=0.9, average=average)
    variables = norm.init(jax.random.key(0), BATCHES[0])
    train = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))
    for weights in (jnp.zeros(16), jnp.ones(16)):
        _, updates = train(variables, BATCHES[0], weights=weights)
        variables = {**variables, **updates}
    stats = variables["batch_stats"]
    assert stats["count"] == 1
    np.testing.assert_allclose(stats["mean"], MOMENTS[0].mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], MOMENTS[0].var, rtol=1e-5)


def test_unknown_average_is_refused():
    norm = BatchNorm(use_running_average=False, average="harmonic")
    with pytest.raises(ValueError, match="average='harmonic'; expected exponential"):
        norm.init(jax.random.key(0), BATCHES[0])


def test_moments_of_micro_batches_committed_once_are_those_of_the_big_batch():
    _, state = init(3)

    @jax.jit
    def accumulate(state, batches):
        moments = functools.reduce(merge, [measure(x) for x in batches])
        return update_average(state, moments, momentum=0.9)

    accumulated = accumulate(state, BATCHES[:4])
    at_once = moved(state, np.concatenate(BATCHES[:4]), 0.9)
    chex.assert_trees_all_close(accumulated, at_once, rtol=1e-5)


def test_merged_states_hold_the_variance_between_them():
    # Means 0 and 2 with variances 1 and 3: 2 within, 1 between.
    states = BatchNormState(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]]))
    merged = jax.jit(merge_states)
    chex.assert_trees_all_close(
        merged(states), BatchNormState(jnp.array([1.0]), jnp.array([3.0]))
    )
    # Weights 1 and 3: mean 1.5, within 2.5, between .25 * 2.25 + .75 * .25 = .75.
    chex.assert_trees_all_close(
        merged(states, jnp.array([1.0, 3.0])),
        BatchNormState(jnp.array([1.5]), jnp.array([3.25])),
    )


def test_merging_unsynced_devices_recovers_the_statistics_of_all_rows(devices):
    x = normal((8, 4, 3)) + 10 * np.arange(8, dtype=np.float32)[:, None, None]

    def unsynced(x):
        return after(init(3)[1], x, 0.0)

    states = jax.device_get(jax.pmap(unsynced, devices=devices)(x))
    together = jax.jit(unsynced)(x)
    chex.assert_trees_all_close(merge_states(states), together, rtol=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]]])
def test_weights_of_states_are_one_a_state(weights):
    states = BatchNormState(jnp.zeros((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"expected one for each of the 2 states"):
        merge_states(states, jnp.array(weights))


def test_states_that_are_not_stacked_are_refused():
    with pytest.raises(ValueError, match=r"means of shape \[2\] .*expected both stack"):
        merge_states(BatchNormState(jnp.zeros(2), jnp.ones(2)))
    with pytest.raises(TypeError, match="states is of type tuple; expected"):
        merge_states((jnp.zeros((2, 1)), jnp.ones((2, 1))))


def test_counted_states_are_merged_as_others():
    mean, var = jnp.array([[0.0], [2.0]]), jnp.ones((2, 1))
    merged = merge_states(CountedState(mean, var, jnp.array([7.0, 7.0])))
    chex.assert_trees_all_equal(merged, merge_states(BatchNormState(mean, var)))


def test_states_that_all_weigh_nothing_are_refused_where_that_is_known():
    states = BatchNormState(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="weights of all 2 states are 0.*positive"):
        merge_states(states, jnp.zeros(2))
    with pytest.raises(ValueError, match="weights of all 2 states are 0"):
        jax.jit(lambda s: merge_states(s, np.zeros(2, int)))(states)
    traced = jax.jit(merge_states)(states, jnp.zeros(2))  # as documented
    chex.assert_trees_all_equal(traced, BatchNormState(jnp.zeros(3), jnp.zeros(3)))


@pytest.mark.parametrize("momentum", [1.5, -0.1, float("nan"), np.float32(2)])
def test_debiased_momentum_outside_0_to_1_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum=.*old average, in \[0, 1\]"):
        debiased_momentum(momentum, 3)
    norm = BatchNorm(use_running_average=False, momentum=momentum, average="debiased")
    with pytest.raises(ValueError, match=r"momentum=.*old average, in \[0, 1\]"):
        norm.init(jax.random.key(0), BATCHES[0])


def test_debiased_momenta_of_several_averages_may_be_arrays():
    m = np.array([0.0, 0.5, 1.0], np.float32)
    # m (1 - m^2) / (1 - m^3) at t = 2: 0, .375 / .875, and 2 / 3 in the limit.
    expected = [0, 3 / 7, 2 / 3]
    for momenta in (m, jnp.asarray(m)):
        np.testing.assert_allclose(debiased_momentum(momenta, 2), expected, rtol=1e-6)
