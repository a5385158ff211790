import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from bn_jax.contract import EmptyState
from bn_jax.variants.pointwise import (
    DerfParams,
    DyTParams,
    derf,
    dyt,
    init_derf,
    init_dyt,
)
from reference import normal

X = normal((16, 3), mean=1.0, std=2.0)
SCALE, BIAS = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0])
OF_DYT = DyTParams(SCALE, BIAS, jnp.float32(0.3))
OF_DERF = DerfParams(SCALE, BIAS, jnp.float32(0.3), jnp.float32(-0.2))
BOTH = pytest.mark.parametrize(("norm", "params"), [(dyt, OF_DYT), (derf, OF_DERF)])
EMPTY = EmptyState()


def expected_of(norm, x):
    x = np.float64(x)
    return np.tanh(0.3 * x) if norm is dyt else erf(0.3 * x - 0.2)


@BOTH
@pytest.mark.parametrize("train", [True, False])
def test_is_the_formula_whatever_the_mode(norm, params, train):
    y, state = norm(X, params, EMPTY, train=train)
    expected = expected_of(norm, X) * np.float64(SCALE) + np.float64(BIAS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert state is EMPTY
    bare = params._replace(scale=None, bias=None)
    y, _ = norm(X.T, bare, EMPTY, train=train, feature_axis=0)
    np.testing.assert_allclose(y, expected_of(norm, X).T, rtol=1e-5, atol=1e-6)


def test_initial_values_are_the_papers():
    params, state = init_dyt(3)
    assert params.alpha == 0.5 and params.alpha.shape == () and state == EMPTY
    params, _ = init_derf(3)
    assert (params.alpha, params.shift) == (0.5, 0)
    y, _ = derf(X, params, EMPTY, train=True)
    np.testing.assert_allclose(y, erf(0.5 * np.float64(X)), rtol=1e-5, atol=1e-6)


@BOTH
def test_result_is_bounded_odd_about_the_shift_and_of_one_value_alone(norm, params):
    bare = params._replace(scale=None, bias=None)
    far = jnp.array([[-1e30, 0.0, 1e30]]).T * jnp.ones(3)
    y, _ = norm(far, bare, EMPTY, train=True)
    np.testing.assert_array_equal(y[::2], [[-1] * 3, [1] * 3])
    one, _ = norm(X[:1], bare, EMPTY, train=True)
    np.testing.assert_allclose(one, norm(X, bare, EMPTY, train=True)[0][:1], rtol=1e-6)


def test_gradients_are_the_closed_form():
    # d tanh(u) = (1 - tanh(u)^2) du;  d erf(u) = 2 / sqrt(pi) exp(-u^2) du.
    x, alpha = np.float64(X), 0.3
    gamma = np.float64(SCALE)
    slope = 1 - np.tanh(alpha * x) ** 2
    by_x, by_params = jax.grad(
        lambda x, p: jnp.sum(dyt(x, p, EMPTY, train=True)[0]), (0, 1)
    )(X, OF_DYT)
    np.testing.assert_allclose(by_x, gamma * alpha * slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_params.alpha, np.sum(gamma * x * slope), rtol=1e-4)
    np.testing.assert_allclose(by_params.bias, np.full(3, 16.0), rtol=1e-6)

    slope = 2 / np.sqrt(np.pi) * np.exp(-((alpha * x - 0.2) ** 2))
    by_x, by_params = jax.grad(
        lambda x, p: jnp.sum(derf(x, p, EMPTY, train=True)[0]), (0, 1)
    )(X, OF_DERF)
    np.testing.assert_allclose(by_x, gamma * alpha * slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_params.shift, np.sum(gamma * slope), rtol=1e-4)
    np.testing.assert_allclose(by_params.alpha, np.sum(gamma * x * slope), rtol=1e-4)


@BOTH
def test_bad_input_is_refused(norm, params):
    with pytest.raises(TypeError, match="complex64.*real and imaginary"):
        norm(X.astype(jnp.complex64), params, EMPTY, train=True)
    with pytest.raises(TypeError, match="int32"):
        norm(X.astype(jnp.int32), params, EMPTY, train=True)
    with pytest.raises(ValueError, match=r"scale has shape \[3\].*\[2\] features"):
        norm(X[:, :2], params, EMPTY, train=True)
    with pytest.raises(ValueError, match="rank 2 or more"):
        norm(X[0], params, EMPTY, train=True)
    per_feature = params._replace(alpha=jnp.ones(3))
    with pytest.raises(ValueError, match=r"alpha has shape \[3\]; expected a scalar"):
        norm(X, per_feature, EMPTY, train=True)


def test_parameters_of_dyt_are_not_those_of_derf():
    params, _ = init_dyt(3)
    with pytest.raises(TypeError, match="params is of type DyTParams.*alpha, shift"):
        derf(X, params, EMPTY, train=True)
