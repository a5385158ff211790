"""Ghost batches: contiguous parts of a batch, each normalised by its own statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from bn_jax import BatchNormParams, BatchNormState, batch_norm, init
from reference import normal

PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))


def eager_ghosts(x, size, **options):
    return batch_norm(x, PARAMS, STATE, train=True, ghost_batch_size=size, **options)


ghosts = jax.jit(
    eager_ghosts, static_argnames=("size", "feature_axis", "batch_axis", "axis_name")
)


@jax.jit
def whole_batch(x, weights=None):
    return batch_norm(x, PARAMS, STATE, train=True, weights=weights)


def test_ghost_recovers_batch_norm_when_one_group():
    x = normal((8, 2, 3), mean=1.0)
    chex.assert_trees_all_close(ghosts(x, 8), whole_batch(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_each_contiguous_part_is_normalised_by_itself(size):
    x = normal((8, 2, 3), mean=1.0)
    y, _ = ghosts(x, size)
    for start in range(0, 8, size):
        part = slice(start, start + size)
        expected, _ = reference.batch_norm(x[part], PARAMS.scale, PARAMS.bias)
        np.testing.assert_allclose(np.asarray(y)[part], expected, rtol=1e-5, atol=1e-5)


def test_averages_move_by_the_moments_of_the_whole_batch():
    # Parts with means far apart: the variance between them belongs to the batch.
    x = normal((8, 3)) + 100 * np.repeat(np.arange(4, dtype=np.float32), 2)[:, None]
    _, state = ghosts(x, 2)
    _, whole = whole_batch(x)
    chex.assert_trees_all_close(state, whole, rtol=1e-5)


def test_ghosts_are_cut_along_the_batch_axis_wherever_it_is():
    x = normal((6, 4, 3), mean=1.0)
    y, state = ghosts(x, 2)
    batch_last = ghosts(np.transpose(x), 2, feature_axis=0, batch_axis=-1)
    chex.assert_trees_all_close(
        (np.transpose(batch_last[0]), batch_last[1]), (y, state), atol=1e-5
    )


def test_weights_and_gradients_are_those_of_the_parts():
    x = normal((12, 3), mean=1.0)
    weights = jnp.array([1.0, 2.0, 0.0, 0.5] + [1.0, 0, 0, 0] + [0.0, 0, 0, 0])
    coefficients = np.arange(1, 37, dtype=np.float32).reshape(12, 3) / 36

    def by_ghosts(x):
        return ghosts(x, 4, weights=weights)[0]

    def by_hand(x):
        parts = [whole_batch(x[i : i + 4], weights[i : i + 4]) for i in (0, 4, 8)]
        return jnp.concatenate([y for y, _ in parts])

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def total(x, f):
        return jnp.sum(jnp.sin(coefficients * f(x)))

    chex.assert_trees_all_close(total(x, by_ghosts), total(x, by_hand), rtol=1e-4)


def test_a_ghost_of_a_devices_size_is_unsynced_training(devices):
    x = normal((16, 3), mean=1.0)

    y, _ = jax.pmap(whole_batch, devices=devices)(x.reshape(8, 2, 3))
    chex.assert_trees_all_close(
        jax.device_get(y).reshape(16, 3), ghosts(x, 2)[0], rtol=1e-5, atol=1e-6
    )


def test_ghosts_within_sync_share_statistics_with_the_same_part_of_other_devices():
    x = normal((4, 6, 3), mean=1.0)  # 4 devices, 3 ghosts of 2
    step = jax.pmap(
        lambda x: ghosts(x, 2, axis_name="d"),
        axis_name="d",
        devices=jax.devices("cpu")[:4],
    )
    y, state = jax.device_get(step(x))
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        expected, _ = whole_batch(np.asarray(x)[:, part])
        chex.assert_trees_all_close(y[:, part], expected, rtol=1e-5, atol=1e-6)
    whole = whole_batch(x)[1]
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[2], state), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "axis", "message"),
    [
        (3, 0, "ghost_batch_size=3 does not divide the batch of 8.*drop the last 2"),
        (0, 0, "ghost_batch_size=0; expected a positive"),
        (16, 0, "ghost_batch_size=16 does not divide the batch of 8"),
        (2, -1, "batch_axis=-1 .* feature axis"),
        (2, 5, "batch_axis=5 .* no axis"),
    ],
)
def test_size_that_leaves_a_remainder_and_a_wrong_axis_are_refused(size, axis, message):
    params, state = init(3)
    with pytest.raises(ValueError, match=message):
        batch_norm(
            jnp.ones((8, 3)),
            params,
            state,
            train=True,
            ghost_batch_size=size,
            batch_axis=axis,
        )


def test_ghost_of_one_value_a_feature_warns_and_of_many_positions_does_not():
    # What counts is the ghost, not the batch: y is beta throughout.
    with pytest.warns(UserWarning, match="one value a feature.*ghost_batch_size") as w:
        y, _ = eager_ghosts(normal((8, 3)), 1)
    assert w[0].filename == __file__ and len(w) == 1
    chex.assert_trees_all_equal(y, np.broadcast_to(PARAMS.bias, (8, 3)))
    ghosts(normal((8, 2, 3)), 1)  # warnings are errors in this suite
    ghosts(normal((8, 3)), 1, statistics=STATE)


def test_ghosts_of_one_that_share_statistics_along_an_axis_do_not_warn():
    def step(x):
        return ghosts(x, 1, axis_name="d")[0]

    x = normal((4, 8, 3))
    y = np.asarray(jax.jit(jax.vmap(step, axis_name="d"))(x))
    expected, _ = whole_batch(np.asarray(x)[:, 2])
    chex.assert_trees_all_close(y[:, 2], expected, rtol=1e-5, atol=1e-6)
