"""Complex inputs, as Flax has them: the variance is of the distance to the mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bn_jax import batch_norm, init, measure, merge_across
from bn_jax.linen import BatchNorm
from reference import normal

X = normal((16, 3), mean=1.0) + 1j * normal((16, 3), mean=-2.0, std=3.0, seed=1)


def test_variance_is_the_mean_squared_distance_to_the_complex_mean():
    got = measure(X)
    x = np.complex128(X)
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.var, np.var(x, axis=0), rtol=1e-5)
    assert got.var.dtype == got.count.dtype == jnp.float32


def test_result_is_standardised_and_the_state_keeps_the_complex_mean():
    params, state = init(3, dtype=jnp.complex64)
    y, state = batch_norm(X, params, state, train=True, momentum=0.0)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(state.mean, X.mean(0), rtol=1e-5)
    predicted, _ = batch_norm(X, params, state, train=False)
    np.testing.assert_allclose(predicted, y, rtol=1e-4, atol=1e-6)


def test_module_is_flaxs_in_values_and_state():
    results = []
    for module in (BatchNorm, nn.BatchNorm):
        norm = module(use_running_average=False, use_fast_variance=False)
        y, variables = norm.init_with_output(jax.random.key(0), X)
        _, updates = norm.apply(variables, X, mutable=["batch_stats"])
        results.append((y, updates["batch_stats"]))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_devices_share_complex_moments(devices):
    shards = X.reshape(8, 2, 3)
    step = jax.pmap(
        lambda x: merge_across(measure(x), "d"), axis_name="d", devices=devices
    )
    merged = jax.device_get(step(shards))
    expected = measure(X)
    chex.assert_trees_all_close(
        (merged.mean[5], merged.var[5]), (expected.mean, expected.var), rtol=1e-5
    )
