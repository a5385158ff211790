"""Statistics shared along a named axis equal those of the one big batch."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import reference
from bn_jax import (
    BatchNormParams,
    BatchNormState,
    batch_norm,
    init,
    measure,
    merge_across,
)
from marks import slow_but
from reference import assert_moments_close, normal

NAME = "shards"
WAYS = [("vmap", 4), ("pmap", 2), ("pmap", 4), ("pmap", 8), ("shard_map", 8)]
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))


def mapped(way, num_shards, f):
    """Map `f` over the leading axis, of size `num_shards`, of its arguments."""
    if way == "vmap":
        return jax.jit(jax.vmap(f, axis_name=NAME))
    devices = jax.devices("cpu")[:num_shards]
    assert len(devices) == num_shards
    if way == "pmap":
        return jax.pmap(f, axis_name=NAME, devices=devices)  # noqa: TID251

    def one_shard(*args):
        out = f(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    mesh = jax.make_mesh((num_shards,), (NAME,), (AxisType.Auto,), devices=devices)
    spec = PartitionSpec(NAME)
    return jax.jit(jax.shard_map(one_shard, mesh=mesh, in_specs=spec, out_specs=spec))


def shards_and_weights(num_shards, mean=1.0):
    """Return x of [D, 4, 3] and unequal weights: one shard empty, one with one row."""
    x = normal((num_shards, 4, 3), mean=mean, std=2.0)
    weights = np.random.default_rng(1).integers(0, 3, (num_shards, 4)) / 2
    weights[0] = 0
    weights[-1] = [0, 0, 1, 0]
    return x, jnp.float32(weights)


def loss(y, state):
    """Return a loss with no symmetry that would hide a term."""
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.sum(jnp.sin(coefficients * y)) + jnp.sum(state.mean * state.var)


def shard_loss(y, state, num_shards):
    """Return the part of `loss` that one shard of the big batch brings."""
    offset = jax.lax.axis_index(NAME) * y.size
    numbers = offset + jnp.arange(1.0, y.size + 1)
    coefficients = numbers.reshape(y.shape) / (y.size * num_shards)
    state_part = jnp.sum(state.mean * state.var) / num_shards
    return jnp.sum(jnp.sin(coefficients * y)) + state_part


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def of_all_rows(x, params, weights):
    rows = x.reshape(-1, x.shape[-1])
    flat = None if weights is None else weights.reshape(-1)
    y, state = batch_norm(rows, params, STATE, train=True, weights=flat)
    return loss(y, state), (y.reshape(x.shape), state)


def big_batch(x, weights):
    """Return values and gradients of all shards' rows in one batch."""
    return of_all_rows(x, PARAMS, weights)


@jax.jit
def trained(x):
    return batch_norm(x, PARAMS, STATE, train=True)


def merged_moments(x, weights):
    return merge_across(measure(x, weights=weights), NAME)


@functools.cache
def merging(way, num_shards):
    return mapped(way, num_shards, merged_moments)


@pytest.mark.parametrize("way,num_shards", WAYS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merge_across_unequal_shards_equals_measuring_at_once(way, num_shards, mean):
    x, weights = shards_and_weights(num_shards, mean)
    merged = jax.device_get(merging(way, num_shards)(x, weights))
    rows, row_weights = np.reshape(x, (-1, 3)), np.reshape(weights, (-1, 1))
    expected = reference.moments(rows, row_weights)
    for i in range(num_shards):
        shard = jax.tree.map(lambda a, i=i: a[i], merged)
        assert_moments_close(shard, expected, rtol=1e-3 if mean else 1e-5)


@pytest.mark.parametrize(
    "way,num_shards,weighted",
    slow_but(
        [("vmap", 4, False), ("pmap", 4, True), ("shard_map", 8, True)],
        [*((*way, True) for way in WAYS), ("vmap", 4, False), ("pmap", 8, False)],
    ),
)
def test_values_state_and_gradients_are_those_of_one_big_batch(
    way, num_shards, weighted
):
    x, weights = shards_and_weights(num_shards)
    if not weighted:
        weights = None

    def total(x, params):
        def step(x, params, state, weights):
            y, state = batch_norm(
                x, params, state, train=True, weights=weights, axis_name=NAME
            )
            return shard_loss(y, state, num_shards), y, state

        same = jax.tree.map(lambda a: jnp.stack([a] * num_shards), (params, STATE))
        losses, y, state = mapped(way, num_shards, step)(x, *same, weights)
        return jnp.sum(losses), (y, state)

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (value, (y, states)), gradients = jax.device_get(gradient(x, PARAMS))
    (expected, (big_y, big_state)), big_gradients = big_batch(x, weights)
    chex.assert_trees_all_close(
        (value, y, gradients), (expected, big_y, big_gradients), rtol=1e-4, atol=1e-5
    )
    for i in range(num_shards):
        state = jax.tree.map(lambda a, i=i: np.asarray(a)[i], states)
        chex.assert_trees_all_close(state, big_state, rtol=1e-5)


@pytest.mark.parametrize("way,num_shards", [("vmap", 4), ("pmap", 4), ("shard_map", 8)])
def test_a_gradient_taken_inside_the_map_counts_the_other_shards(way, num_shards):
    x, weights = shards_and_weights(num_shards)

    def shard_gradient(x, weights):
        def local(x):
            out = batch_norm(
                x, PARAMS, STATE, train=True, weights=weights, axis_name=NAME
            )
            return shard_loss(*out, num_shards)

        return jax.grad(local)(x)

    gradient = mapped(way, num_shards, shard_gradient)(x, weights)
    _, (expected, _) = big_batch(x, weights)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_jit_over_a_sharded_batch_is_the_big_batch(devices):
    x, weights = shards_and_weights(8)
    rows, row_weights = x.reshape(-1, 3), weights.reshape(-1)
    mesh = jax.make_mesh((8,), (NAME,), (AxisType.Auto,), devices=devices)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(NAME))

    @jax.jit
    def step(x, weights):
        return batch_norm(x, PARAMS, STATE, train=True, weights=weights)

    got = step(*jax.device_put((rows, row_weights), sharding))
    assert got[0].sharding.num_devices == 8
    expected = step(rows, row_weights)
    chex.assert_trees_all_close(
        *map(jax.device_get, (got, expected)), rtol=1e-5, atol=1e-6
    )


def test_replicated_state_may_leave_shard_map_as_one(devices):
    mesh = jax.make_mesh((8,), (NAME,), (AxisType.Auto,), devices=devices)
    shard, whole = PartitionSpec(NAME), PartitionSpec()

    def step(x):
        return batch_norm(x, PARAMS, STATE, train=True, axis_name=NAME)

    x = normal((16, 3))
    out = (shard, whole)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=shard, out_specs=out, check_vma=False
    )
    y, state = jax.jit(sharded)(x)
    chex.assert_trees_all_close((y, state), trained(x), rtol=1e-5, atol=1e-6)


def test_all_shards_empty_keep_the_state():
    x = normal((4, 2, 3))

    def step(x, weights):
        return batch_norm(x, PARAMS, STATE, train=True, weights=weights, axis_name=NAME)

    y, states = jax.device_get(mapped("vmap", 4, step)(x, jnp.zeros((4, 2))))
    expected, _ = batch_norm(x, PARAMS, STATE, train=False)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)
    for i in range(4):
        chex.assert_trees_all_equal(jax.tree.map(lambda a, i=i: a[i], states), STATE)


def test_groups_share_statistics_inside_themselves_alone():
    x = normal((4, 2, 3), mean=1.0)
    groups = [[0, 2], [1, 3]]

    def step(x):
        return batch_norm(
            x,
            PARAMS,
            STATE,
            train=True,
            axis_name=NAME,
            axis_index_groups=groups,
        )

    y, states = jax.device_get(mapped("pmap", 4, step)(x))
    for group in groups:
        big_y, big_state = jax.device_get(trained(np.asarray(x)[group]))
        for i, shard in enumerate(group):
            chex.assert_trees_all_close(y[shard], big_y[i], rtol=1e-5, atol=1e-6)
            state = jax.tree.map(lambda a, s=shard: a[s], states)
            chex.assert_trees_all_close(state, big_state, rtol=1e-5)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1, 2], [3]], [[0, 1], [2, 2]]])
def test_groups_that_do_not_split_the_axis_evenly_are_refused(groups):
    def step(x):
        return merge_across(measure(x), NAME, groups)

    with pytest.raises(ValueError, match="axis_index_groups"):
        mapped("pmap", 4, step)(normal((4, 2, 3)))


def test_groups_under_vmap_are_refused_with_the_mend():
    def step(x):
        return merge_across(measure(x), NAME, [[0, 1], [2, 3]])

    with pytest.raises((ValueError, NotImplementedError), match="pmap|shard_map"):
        mapped("vmap", 4, step)(normal((4, 2, 3)))


def test_several_axis_names_share_statistics_over_all_of_them():
    x = normal((2, 3, 4, 3), mean=1.0)

    def step(x):
        return batch_norm(x, PARAMS, STATE, train=True, axis_name=("outer", "inner"))

    nested = jax.vmap(jax.vmap(step, axis_name="inner"), axis_name="outer")
    y, states = jax.device_get(jax.jit(nested)(x))
    big_y, big_state = trained(x)
    chex.assert_trees_all_close(y, big_y, rtol=1e-5, atol=1e-6)
    for outer in range(2):
        for inner in range(3):
            state = jax.tree.map(lambda a, i=outer, j=inner: a[i, j], states)
            chex.assert_trees_all_close(state, big_state, rtol=1e-5)


def test_one_of_two_mapped_axes_leaves_the_other_apart():
    x = normal((2, 3, 4, 3), mean=1.0)

    def step(x):
        return batch_norm(x, PARAMS, STATE, train=True, axis_name="inner")

    nested = jax.vmap(jax.vmap(step, axis_name="inner"), axis_name="outer")
    y, _ = jax.device_get(jax.jit(nested)(x))
    for i in range(2):
        expected, _ = trained(np.asarray(x)[i])
        chex.assert_trees_all_close(y[i], expected, rtol=1e-5, atol=1e-6)


def test_two_axes_of_a_mesh_share_statistics_over_all_devices(devices):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2, devices=devices)
    spec = PartitionSpec(("a", "b"))

    def step(x):
        return batch_norm(x, PARAMS, STATE, train=True, axis_name=("a", "b"))[0]

    x = normal((16, 3), mean=1.0)
    y = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    expected, _ = trained(x)
    chex.assert_trees_all_close(jax.device_get(y), expected, rtol=1e-5, atol=1e-6)


def test_one_value_a_feature_is_judged_over_all_shards():
    def step(x):
        return batch_norm(x, *init(3), train=True, axis_name=NAME)[0]

    y = mapped("vmap", 4, step)(normal((4, 1, 3)))  # warnings are errors: none
    np.testing.assert_allclose(np.std(y, axis=0), 1, atol=1e-3)
    with pytest.warns(UserWarning, match="one value a feature"):
        mapped("vmap", 1, step)(normal((1, 1, 3)))


def test_one_value_a_feature_is_judged_over_the_group():
    def step(x, groups):
        return batch_norm(
            x, *init(3), train=True, axis_name=NAME, axis_index_groups=groups
        )[0]

    x = normal((4, 1, 3))
    mapped("pmap", 4, lambda x: step(x, [[0, 1], [2, 3]]))(x)
    with pytest.warns(UserWarning, match="one value a feature"):
        mapped("pmap", 4, lambda x: step(x, [[0], [1], [2], [3]]))(x)


def test_prediction_needs_no_axis():
    x = normal((4, 3))
    y, state = batch_norm(x, PARAMS, STATE, train=False, axis_name="unbound")
    assert state is STATE
    expected, _ = batch_norm(x, PARAMS, STATE, train=False)
    chex.assert_trees_all_equal(y, expected)


def test_an_axis_costs_one_collective():
    def step(x):
        return batch_norm(x, PARAMS, STATE, train=True, axis_name=NAME)

    text = str(jax.make_jaxpr(step, axis_env=[(NAME, 4)])(jnp.ones((2, 3))))
    assert len(re.findall(r"\b(?:psum\w*|all_gather|pmean)\[", text)) == 1
