"""The core over magnitudes, sizes, constants, infinities and NaN, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from bn_jax import BatchNormParams, batch_norm, init, measure

SIZES = st.sampled_from([1, 2, 3, 7, 64, 257, 1000])  # few, as each is compiled


def normal(size, *, mean=0.0, seed=0):
    """Return float32 numbers of shape [size, 3], in NumPy."""
    return np.float32(np.random.default_rng(seed).normal(mean, 1.0, (size, 3)))


@jax.jit
def step(x, weights):
    _, state = init(x.shape[-1])
    nothing = BatchNormParams(None, None)
    return batch_norm(x, nothing, state, train=True, momentum=0.0, weights=weights)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.grad, has_aux=True)
def gradient_and_step(x, weights, feature):
    y, state = step(x, weights)
    return jnp.sum(y[:, feature] ** 3), (y, state)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    size=SIZES,
    exponent=st.integers(-30, 15),
    mean=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64_over_45_orders_of_magnitude(size, exponent, mean, seed):
    x = normal(size, mean=mean, seed=seed) * np.float32(10.0**exponent)
    weights = np.random.default_rng(seed).integers(1, 4, (size, 1)) / 2
    y, state = step(x, np.float32(weights))
    expected, batch = reference.batch_norm(x, weights=weights)
    # The mean of float32 numbers is rounded to one; y moves by that over deviation.
    largest = np.abs(np.float64(x)).max()
    ulp = 2.0**-23 * largest
    deviation = np.sqrt(batch.var + 1e-5)
    np.testing.assert_allclose(state.mean, batch.mean, rtol=0, atol=4 * ulp)
    np.testing.assert_allclose(
        state.var, batch.var, rtol=1e-4, atol=max(16 * ulp**2, 1e-36)
    )
    error = np.abs(np.float64(y) - expected)
    # Where a lone row's variance is the square of a rounding, so is y arbitrary.
    assert (error <= 1e-4 * np.abs(expected) + 1e-5 + 8 * ulp / deviation).all()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(size=SIZES, exponent=st.integers(16, 30), seed=st.integers(0, 2**31))
def test_variance_beyond_float32_is_infinite_and_never_nan(size, exponent, seed):
    x = normal(size, mean=1.0, seed=seed) * np.float32(10.0**exponent)
    y, state = step(x, np.ones((size, 1), np.float32))
    _, batch = reference.batch_norm(x)
    var = np.float64(state.var)
    assert np.isfinite(y).all() and not np.isnan(var).any()
    right = np.isclose(var, batch.var, rtol=1e-4)
    assert (right | np.isinf(var) | (size == 1)).all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    size=SIZES,
    sign=st.sampled_from([-1.0, 1.0]),
    exponent=st.floats(-30, 30),
)
def test_constant_gives_beta(size, sign, exponent):
    constant = np.float32(sign * 10**exponent)
    y, state = step(np.full((size, 3), constant), np.ones((size, 1), np.float32))
    assert not np.isnan(state.var).any()
    # The mean may be a rounding away, and the variance the square of that: y is at
    # most that rounding over sqrt(epsilon), or 1.
    assert np.abs(y).max() <= min(1.01, 2.0**-22 * abs(constant) / np.sqrt(1e-5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_not_finite_shows_in_its_feature_and_no_other(value, weighted):
    x = normal(8)
    x[5, 1] = value
    weights = np.ones((8, 1), np.float32) if weighted else None
    gradient, (y, state) = jax.device_get(gradient_and_step(x, weights, 0))
    assert np.isnan(y[:, 1]).all() and not np.isfinite(state.var[1])
    others = [0, 2]
    expected, _ = reference.batch_norm(x[:, others])
    np.testing.assert_allclose(y[:, others], expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient[:, 0]).all() and not gradient[:, 2].any()
    assert np.isnan(jax.jit(measure)(x).mean[1]) or np.isinf(value)
