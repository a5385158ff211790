import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import normal

from bn_jax import BatchNormParams, BatchNormState, batch_norm
from bn_jax.variants.renorm import batch_renorm, limits

X = normal((16, 3), mean=1.0, std=2.0)
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))


def loss(y):
    return jnp.sum(jnp.sin(jnp.arange(1.0, y.size + 1).reshape(y.shape) * y / y.size))


def test_without_room_for_a_correction_it_is_batch_norm():
    renorm = functools.partial(batch_renorm, r_max=1, d_max=0, momentum=0.9)
    chex.assert_trees_all_close(
        renorm(X, PARAMS, STATE, train=True),
        batch_norm(X, PARAMS, STATE, train=True),
        rtol=1e-6,
    )
    gradients = [
        jax.grad(lambda x, f=f: loss(f(x, PARAMS, STATE, train=True)[0]))(X)
        for f in (renorm, batch_norm)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5)


def test_without_limits_training_gives_what_prediction_gives():
    y, state = batch_renorm(X, PARAMS, STATE, train=True, r_max=1e6, d_max=1e6)
    predicted, same = batch_renorm(X, PARAMS, STATE, train=False, r_max=1, d_max=0)
    np.testing.assert_allclose(y, predicted, rtol=1e-4, atol=1e-5)
    assert same is STATE
    moved = batch_norm(X, PARAMS, STATE, train=True, momentum=0.99)[1]
    chex.assert_trees_all_close(state, moved)


@pytest.mark.parametrize("scale", [None, PARAMS.scale])
@pytest.mark.parametrize("bias", [None, PARAMS.bias])
def test_is_the_papers_formula_between_the_limits(scale, bias):
    r_max, d_max = 1.5, 0.6
    params = BatchNormParams(scale, bias)
    y, _ = batch_renorm(X, params, STATE, train=True, r_max=r_max, d_max=d_max)
    batch = reference.moments(X)
    sigma = np.sqrt(np.float64(STATE.var) + 1e-5)
    r = np.clip(np.sqrt(batch.var + 1e-5) / sigma, 1 / r_max, r_max)
    d = np.clip((batch.mean - np.float64(STATE.mean)) / sigma, -d_max, d_max)
    assert (np.abs(d) == d_max).any() and (np.abs(d) < d_max).any()
    assert (r == r_max).any() and (r < r_max).any()
    x_hat = reference.standardised(X, batch.mean, batch.var) * r + d
    expected = x_hat * (1 if scale is None else scale) + (0 if bias is None else bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_through_the_corrections():
    def y(x):
        return batch_renorm(x, PARAMS, STATE, train=True, r_max=2.0, d_max=2.0)[0]

    # With r and d constants, dy / dx is batch norm's with scale gamma r.
    sigma = np.sqrt(np.float64(STATE.var) + 1e-5)
    r = np.clip(np.sqrt(reference.moments(X).var + 1e-5) / sigma, 0.5, 2)
    g = np.float64(jax.grad(loss)(y(X)))
    expected, _, _ = reference.batch_norm_vjp(X, g, np.float64(PARAMS.scale) * r)
    gradient = jax.grad(lambda x: loss(y(x)))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_devices_share_the_corrections(devices):
    x = normal((8, 4, 3), mean=1.0)
    renorm = functools.partial(batch_renorm, train=True, r_max=1.5, d_max=0.5)
    step = jax.pmap(
        lambda x: renorm(x, PARAMS, STATE, axis_name="d"),
        axis_name="d",
        devices=devices,
    )
    y, state = jax.device_get(step(x))
    big_y, big_state = renorm(x.reshape(32, 3), PARAMS, STATE)
    chex.assert_trees_all_close(y.reshape(32, 3), big_y, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[3], state), big_state, rtol=1e-5
    )


def test_batch_that_counts_nothing_is_normalised_by_the_averages():
    y, state = batch_renorm(
        X, PARAMS, STATE, train=True, r_max=3, d_max=5, weights=jnp.zeros(16)
    )
    predicted, _ = batch_norm(X, PARAMS, STATE, train=False)
    chex.assert_trees_all_close((y, state), (predicted, STATE))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
def test_averages_move_when_told_whatever_normalises(train, update):
    renorm = functools.partial(batch_renorm, X, PARAMS, STATE, r_max=1.5, d_max=0.6)
    y, state = renorm(train=train, update_state=update)
    chex.assert_trees_all_equal(y, renorm(train=train)[0])
    if train if update is None else update:
        moved = batch_norm(X, PARAMS, STATE, train=True, momentum=0.99)[1]
        chex.assert_trees_all_close(state, moved)
    else:
        assert state is STATE


def test_schedule_is_the_papers():
    # Batch norm to step 5,000; r_max 3 at 40,000 and d_max 5 at 25,000, linearly.
    for step, expected in {
        0: (1, 0),
        5_000: (1, 0),
        15_000: (1 + 2 * 10 / 35, 2.5),
        25_000: (1 + 2 * 20 / 35, 5),
        40_000: (3, 5),
        10**6: (3, 5),
    }.items():
        np.testing.assert_allclose(limits(step), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r_max": 0.5}, "r_max=0.5.*at least 1"),
        ({"d_max": -1}, "d_max=-1.*at least 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        batch_renorm(X, PARAMS, STATE, train=True, **{"r_max": 1, "d_max": 0, **bad})
