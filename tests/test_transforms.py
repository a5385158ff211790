"""`bn_jax.batch_norm` under JAX's transformations, and its derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from bn_jax import BatchNormParams, BatchNormState, batch_norm, init, normalize
from reference import normal

EPSILON = 1e-5


def loss(x, params, state, weights=None):
    """Return a loss with no symmetry that would hide a term, and the results."""
    y, state = batch_norm(x, params, state, train=True, weights=weights)
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    value = jnp.sum(jnp.sin(coefficients * y)) + jnp.sum(state.mean * state.var)
    return value, (y, state)


@pytest.fixture
def problem():
    """x of [6, 3], params and state, none of them at a special value."""
    params = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
    state = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))
    return normal((6, 3), mean=1.0, std=2.0), params, state


@functools.cache
def gradient_of(function):
    """Return the compiled value and gradient in x and params."""
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))


def assert_same_values_and_gradients(transformed, problem):
    """Compare a transformed loss with the loss itself."""
    got, expected = (gradient_of(f)(*problem) for f in (transformed, loss))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_jit_traces_once_and_agrees(problem):
    jitted = jax.jit(chex.assert_max_traces(loss, n=1))
    for _ in range(2):
        got = jitted(*problem)
    chex.assert_trees_all_close(got, loss(*problem), rtol=1e-5, atol=1e-6)
    assert_same_values_and_gradients(jax.jit(loss), problem)


def test_checkpoint_recomputes_without_moving_the_state_twice(problem):
    assert_same_values_and_gradients(jax.checkpoint(loss), problem)


def test_vmap_over_an_ensemble_equals_its_members(problem):
    arrays = jax.device_get(problem)
    ensemble = jax.tree.map(lambda a: np.stack([a, 2 * a, a + 1]), arrays)
    got = jax.device_get(jax.jit(jax.vmap(gradient_of(loss)))(*ensemble))
    for i in range(3):
        member = gradient_of(loss)(*jax.tree.map(lambda a, i=i: a[i], ensemble))
        got_i = jax.tree.map(lambda a, i=i: a[i], got)
        chex.assert_trees_all_close(got_i, member, rtol=1e-5, atol=1e-6)


def test_scan_equals_a_loop(problem):
    x, params, state = jax.device_get(problem)
    batches = np.stack([x, x**2, x - 3])
    step = jax.jit(functools.partial(batch_norm, train=True))
    last, ys = jax.lax.scan(lambda s, x: step(x, params, s)[::-1], state, batches)
    for x, y in zip(batches, ys, strict=True):
        expected, state = step(x, params, state)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(last, state, rtol=1e-5)


def test_forward_and_reverse_mode_agree(problem):
    def inner(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    @jax.jit
    def both_modes(x, params, state):
        def output(x, params):
            return batch_norm(x, params, state, train=True)

        tangents = jax.tree.map(jnp.cos, (x, params))
        primal, tangent = jax.jvp(output, (x, params), tangents)
        also_primal, pullback = jax.vjp(output, x, params)
        cotangents = jax.tree.map(jnp.sin, primal)
        products = inner(cotangents, tangent), inner(pullback(cotangents), tangents)
        return (primal, also_primal), products

    (primal, also_primal), (forward, reverse) = both_modes(*problem)
    chex.assert_trees_all_close(primal, also_primal, rtol=1e-6)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.25)])
def test_gradients_agree_with_finite_differences_in_both_modes(weights, x64):
    x = normal((4, 2), mean=1.0, dtype=jnp.float64)
    params = BatchNormParams(jnp.array([0.5, -2.0]), jnp.array([1.0, 3.0]))
    _, state = init(2, dtype=jnp.float64)
    weights = None if weights is None else jnp.array(weights)

    @jax.jit
    def results(x, params, weights):
        return batch_norm(x, params, state, train=True, weights=weights)

    check_grads(results, (x, params, weights), order=1)


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(function, cotangent, *primals):
    return jax.vjp(function, *primals)[1](cotangent)


def test_gradients_are_the_closed_form(x64):
    x = normal((8, 3), mean=2.0, std=3.0, dtype=jnp.float64)
    g = np.asarray(normal((8, 3), seed=1, dtype=jnp.float64))
    scale = np.array([0.5, -1.0, 2.0])
    state = init(3, dtype=jnp.float64)[1]

    def output(x, scale, bias):
        return batch_norm(x, BatchNormParams(scale, bias), state, train=True)[0]

    got = pulled_back(output, g, x, scale, np.ones(3))
    expected = reference.batch_norm_vjp(x, g, scale)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_float32_gradients_are_the_closed_form_where_the_mean_is_large(mean):
    x, g = normal((256, 4), mean=mean), normal((256, 4), seed=1)
    _, state = init(4)

    def output(x):
        return batch_norm(x, BatchNormParams(None, None), state, train=True)[0]

    (got,) = pulled_back(output, g, x)
    expected, *_ = reference.batch_norm_vjp(x, np.float64(g), 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_hessian_is_that_of_the_two_pass_formula(problem, x64):
    x, params, state = jax.tree.map(np.float64, problem)

    def two_pass(x):
        x_hat = (x - x.mean(0)) / jnp.sqrt(x.var(0) + EPSILON)
        return jnp.sum(jnp.sin(x_hat * params.scale + params.bias) ** 3)

    def ours(x):
        return jnp.sum(jnp.sin(batch_norm(x, params, state, train=True)[0]) ** 3)

    got, expected = (jax.jit(jax.hessian(f))(x) for f in (ours, two_pass))
    assert np.max(np.abs(expected)) > 0.1
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_prediction_has_the_gradient_of_an_affine_map(problem):
    x, params, state = problem

    def total(x):
        return jnp.sum(batch_norm(x, params, state, train=False)[0])

    slope = np.asarray(params.scale) / np.sqrt(np.asarray(state.var) + EPSILON)
    chex.assert_trees_all_close(
        jax.jit(jax.grad(total))(x), np.broadcast_to(slope, x.shape), rtol=1e-6
    )


def test_normalize_by_constants_has_no_gradient_through_the_statistics(problem):
    x, params, state = jax.device_get(problem)
    jacobian = jax.jit(jax.jacobian(lambda x: normalize(x, *state, params)[:, 0]))(x)
    slope = params.scale[0] / np.sqrt(state.var[0] + np.float32(EPSILON))
    expected = slope * np.eye(6, dtype=np.float32)
    chex.assert_trees_all_close(jacobian[:, :, 0], expected, rtol=1e-6)


def test_gradient_of_a_loss_blind_to_shift_and_scale_is_orthogonal_to_them(problem):
    # y is invariant to x + b and (but for epsilon) to a x: sum dx = sum x dx = 0.
    x, params, state = jax.device_get(problem)

    def total(x):
        return jnp.sum(jnp.sin(batch_norm(x, params, state, train=True)[0]))

    dx = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.max(np.abs(dx)) > 0.1
    np.testing.assert_allclose(np.sum(dx, 0), 0, atol=1e-5)
    np.testing.assert_allclose(np.sum((x - x.mean(0)) * dx, 0), 0, atol=1e-4)
