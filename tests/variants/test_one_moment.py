import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from bn_jax import BatchNormParams, Moments, measure
from bn_jax.variants.one_moment import (
    CenterState,
    ScaleState,
    center,
    init_center,
    init_scale,
    scale,
)
from reference import normal

X = normal((16, 3), mean=1.0, std=2.0)
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
NONE = BatchNormParams(None, None)
MEAN = CenterState(jnp.array([0.1, 0.2, 0.3]))
VAR = ScaleState(jnp.array([1.0, 2.0, 3.0]))
BOTH = pytest.mark.parametrize(("norm", "state"), [(center, MEAN), (scale, VAR)])


def expected_of(norm, x, mean, var):
    x = np.float64(x)
    return x - mean if norm is center else x / np.sqrt(np.float64(var) + 1e-5)


@BOTH
@pytest.mark.parametrize("params", [PARAMS, NONE])
def test_is_the_formula_in_training_and_prediction(norm, state, params):
    batch = reference.moments(X)
    gamma, beta = (1, 0) if params is NONE else map(np.float64, params)
    y, moved = norm(X, params, state, train=True)
    expected = expected_of(norm, X, batch.mean, batch.var) * gamma + beta
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    name = state._fields[0]
    average = 0.9 * np.float64(state[0]) + 0.1 * getattr(batch, name)
    np.testing.assert_allclose(moved[0], average, rtol=1e-5)
    y, same = norm(X, params, state, train=False)
    expected = expected_of(norm, X, np.float64(state[0]), state[0]) * gamma + beta
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert same is state


def test_one_after_the_other_they_are_batch_norm():
    centred, _ = center(X, NONE, MEAN, train=True)
    y, _ = scale(centred, PARAMS, VAR, train=True)
    expected, _ = reference.batch_norm(X, PARAMS.scale, PARAMS.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_the_closed_form_after_n_steps():
    # From a_0, n equal batches of statistic b give m^n a_0 + (1 - m^n) b.
    batch, kept = reference.moments(X), 0.8**5
    (_, mean), (_, var) = init_center(3), init_scale(3)
    for _ in range(5):
        _, mean = center(X, NONE, mean, train=True, momentum=0.8)
        _, var = scale(X, NONE, var, train=True, momentum=0.8)
    np.testing.assert_allclose(mean.mean, (1 - kept) * batch.mean, rtol=1e-5)
    np.testing.assert_allclose(var.var, kept + (1 - kept) * batch.var, rtol=1e-5)


def test_a_shift_of_x_does_not_matter_to_center():
    y, _ = center(X, PARAMS, MEAN, train=True)
    shifted, _ = center(X + 8.0, PARAMS, MEAN, train=True)
    np.testing.assert_allclose(shifted, y, atol=1e-5)
    scaled, _ = center(4 * X, NONE, MEAN, train=True)
    np.testing.assert_allclose(scaled, 4 * center(X, NONE, MEAN, train=True)[0])


def test_a_factor_of_x_does_not_matter_to_scale():
    y, _ = scale(X, PARAMS, VAR, train=True)
    scaled, _ = scale(4 * X, PARAMS, VAR, train=True, epsilon=16e-5)
    np.testing.assert_allclose(scaled, y, rtol=1e-5, atol=1e-6)
    # A shift moves y by shift / sqrt(var + epsilon): the mean stays.
    shifted, _ = scale(X + 8.0, NONE, VAR, train=True)
    plain, _ = scale(X, NONE, VAR, train=True)
    shift = 8 / np.sqrt(reference.moments(X).var + 1e-5)
    np.testing.assert_allclose(shifted - plain, np.tile(shift, (16, 1)), rtol=1e-4)


@BOTH
def test_gradients_are_those_of_finite_differences(norm, state, x64):
    x, params, state = jax.tree.map(
        lambda a: jnp.asarray(np.float64(a)), (X[:5], PARAMS, state)
    )

    @jax.jit
    def y(x, params):
        return jnp.sin(norm(x, params, state, train=True)[0])

    check_grads(y, (x, params), order=1, rtol=1e-3)


def test_gradient_of_center_is_the_closed_form():
    # dx = gamma (g - E[g]).
    g = normal((16, 3), seed=1)
    _, vjp = jax.vjp(lambda x: center(x, PARAMS, MEAN, train=True)[0], X)
    expected = np.float64(PARAMS.scale) * (g - np.float64(g).mean(0))
    np.testing.assert_allclose(vjp(g)[0], expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_absent_values_and_batches_are_treated_as_by_batch_norm(norm, state):
    present = np.arange(16) != 3
    x = X.at[3].set(jnp.nan)
    y, moved = norm(x, PARAMS, state, train=True, weights=present)
    expected, expected_state = norm(X[present], PARAMS, state, train=True)
    np.testing.assert_allclose(y[present], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(moved, expected_state, rtol=1e-5)
    assert jnp.isfinite(y).all()
    y, same = norm(X, PARAMS, state, train=True, weights=jnp.zeros(16))
    chex.assert_trees_all_close(
        (y, same), norm(X, PARAMS, state, train=False), rtol=1e-6
    )


@BOTH
def test_given_statistics_normalise_instead(norm, state):
    y, moved = norm(X, PARAMS, state, train=True, statistics=measure(X))
    expected = norm(X, PARAMS, state, train=True)
    chex.assert_trees_all_close((y, moved), expected, rtol=1e-5)


@BOTH
def test_one_value_a_feature_is_warned_of(norm, state):
    with pytest.warns(UserWarning, match="one value a feature") as caught:
        norm(X[:1], PARAMS, state, train=True)
    assert caught[0].filename == __file__


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"momentum": 1.5}, r"momentum=1.5.*in \[0, 1\]"),
        ({"x": X[0]}, "expected rank 2 or more"),
        ({"x": X[:0]}, "is empty"),
        ({"x": X[:, :2]}, r"scale has shape \[3\].*\[2\] features"),
        ({"statistics": Moments(8, np.zeros(2), np.ones(2))}, r"has shape \[2\]"),
        ({"weights": jnp.ones(4)}, r"weights of shape \[4\]"),
        ({"axis_name": "nowhere"}, "axis_name='nowhere' is not bound"),
        ({"axis_index_groups": [[0]]}, "axis_name is None"),
    ],
)
def test_bad_arguments_are_refused(norm, state, bad, message):
    options = {"x": X, "params": PARAMS, "state": state, "train": True, **bad}
    with pytest.raises(ValueError, match=message):
        norm(**options)


def test_bad_epsilon_dtype_and_traced_choice_are_refused():
    with pytest.raises(ValueError, match="epsilon=0"):
        scale(X, PARAMS, VAR, train=True, epsilon=0)
    with pytest.raises(TypeError, match="int32"):
        center(X.astype(jnp.int32), PARAMS, MEAN, train=True)
    with pytest.raises(TypeError, match="train must be a Python bool"):
        jax.jit(lambda t: center(X, PARAMS, MEAN, train=t))(True)
