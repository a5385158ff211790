"""One semantics: the big batch equals every way of cutting and compiling it."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax import BatchNormParams, BatchNormState, batch_norm
from marks import slow_but
from reference import normal

PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))
WEIGHTS = jnp.array([0.0, 0.5, 1.0, 2.0] * 4)


def run(x, params, weights=None, **options):
    """Return y and the state: what a step sees of batch norm."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jax.tree.map(lambda a: a.astype(dtype), STATE)
    return batch_norm(x, params, state, train=True, weights=weights, **options)


def total(forward, x, params, weights):
    """Return a loss with no symmetry that would hide a term, and the results."""
    y, state = forward(x, params, weights)
    y = y.reshape(16, 3).astype(jnp.float32 if y.dtype == jnp.bfloat16 else y.dtype)
    coefficients = jnp.arange(1.0, y.size + 1, dtype=y.dtype).reshape(y.shape) / y.size
    loss = jnp.sum(jnp.sin(coefficients * y)) + jnp.sum(state.mean * state.var)
    return loss, (y, state)


@functools.partial(jax.jit, static_argnums=0)
def everything(forward, x, params, weights):
    """Return loss, y, state and the gradients in x and the parameters."""
    gradient = jax.value_and_grad(
        functools.partial(total, forward), argnums=(0, 1), has_aux=True
    )
    return gradient(x, params, weights)


def first(states):
    """Return the first instance's state, after checking that all hold the same."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[0], states)


def by_examples(x, params, weights):
    one = functools.partial(run, params=params, axis_name="example")
    y, states = jax.vmap(
        lambda x, w: one(x[None], weights=None if w is None else w[None]),
        axis_name="example",
    )(x, weights)
    return y, first(states)


def by_nested_vmap(x, params, weights):
    x = x.reshape(2, 4, 2, 3)
    weights = None if weights is None else weights.reshape(2, 4, 2)
    f = functools.partial(run, axis_name=("a", "b"))
    inner = jax.vmap(lambda x, w: f(x, params, w), axis_name="b")
    y, states = jax.vmap(inner, axis_name="a")(x, weights)
    return y, first(states)


def by_pmap(x, params, weights, num_devices):
    devices = jax.devices("cpu")[:num_devices]
    assert len(devices) == num_devices

    def shard(x, params, weights):
        return run(x, params, weights, axis_name="d")

    cut = jax.tree.map(lambda a: a.reshape(num_devices, -1, *a.shape[1:]), (x, weights))
    in_axes = (0, None, None if weights is None else 0)
    y, states = jax.pmap(shard, axis_name="d", in_axes=in_axes, devices=devices)(
        cut[0], params, cut[1]
    )
    return y, jax.tree.map(lambda a: a[0], states)


def by_shards(x, params, weights, check_vma):
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=jax.devices("cpu"))
    data = PartitionSpec("d")

    def shard(x, weights):
        return run(x, params, weights, axis_name="d")

    # With check_vma, P() is accepted only if the state is known to be replicated.
    return jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=data,
        out_specs=(data, PartitionSpec()),
        check_vma=check_vma,
    )(x, weights)


def in_checkpoint(x, params, weights):
    return jax.checkpoint(run)(x, params, weights)


def in_scan(x, params, weights):
    def step(carry, _):
        return carry, run(x, params, weights)

    _, (y, state) = jax.lax.scan(step, None, length=2)
    return y[1], jax.tree.map(lambda a: a[1], state)


WAYS = {
    "vmap over examples": by_examples,
    "nested vmap": by_nested_vmap,
    "pmap 2": functools.partial(by_pmap, num_devices=2),
    "pmap 4": functools.partial(by_pmap, num_devices=4),
    "pmap 8": functools.partial(by_pmap, num_devices=8),
    "shard_map": functools.partial(by_shards, check_vma=False),
    "shard_map, check_vma": functools.partial(by_shards, check_vma=True),
    "checkpoint": in_checkpoint,
    "scan": in_scan,
}


@pytest.mark.parametrize(
    "weighted",
    [pytest.param(False, marks=pytest.mark.slow, id="plain"), True],
    ids=["plain", "weighted"],
)
@pytest.mark.parametrize(
    "way",
    slow_but(
        ["vmap over examples", "pmap 8", "shard_map, check_vma", "checkpoint", "scan"],
        WAYS,
    ),
)
def test_values_state_and_gradients_are_the_big_batchs(way, weighted):
    weights = WEIGHTS if weighted else None
    x = normal((16, 3), mean=1.0, std=2.0)
    ours = everything(WAYS[way], x, PARAMS, weights)
    expected = everything(run, x, PARAMS, weights)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", slow_but(["pmap 4", "shard_map"], WAYS))
def test_float64_agrees_to_1e_12(way, x64):
    x = normal((16, 3), mean=1.0, std=2.0, dtype=jnp.float64)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), PARAMS)
    ours = everything(WAYS[way], x, params, None)
    expected = everything(run, x, params, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float64)}
    chex.assert_trees_all_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", slow_but(["nested vmap", "pmap 2"], WAYS))
def test_bfloat16_agrees_within_its_precision(way):
    x = normal((16, 3), mean=1.0, std=2.0, dtype=jnp.bfloat16)
    (_, (y, state)), _ = everything(WAYS[way], x, PARAMS, None)
    (_, (big_y, big_state)), _ = everything(run, x, PARAMS, None)
    chex.assert_trees_all_close(y, big_y, rtol=2**-7, atol=2**-7)
    chex.assert_trees_all_close(state, big_state, rtol=1e-5)


@pytest.mark.parametrize(
    ("axis_type", "weighted"),
    slow_but(
        [(AxisType.Auto, False), (AxisType.Explicit, True)],
        itertools.product([AxisType.Auto, AxisType.Explicit], [False, True]),
    ),
    ids=str,
)
def test_jit_over_a_sharded_batch_is_the_big_batch(axis_type, weighted, devices):
    weights = WEIGHTS if weighted else None
    mesh = jax.make_mesh((8,), ("d",), (axis_type,), devices=devices)
    x = normal((16, 3), mean=1.0, std=2.0)
    placed = jax.device_put((x, weights), NamedSharding(mesh, PartitionSpec("d")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    assert len(placed[0].addressable_shards) == 8
    with jax.set_mesh(mesh):
        ours = jax.device_get(everything(run, placed[0], params, placed[1]))
    expected = jax.device_get(everything(run, x, PARAMS, weights))
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_groups_under_shard_map_are_the_big_batches_of_their_rows(devices):
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=devices)
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    data = PartitionSpec("d")
    x = normal((16, 3), mean=1.0)

    def shard(x):
        return run(x, PARAMS, axis_name="d", axis_index_groups=groups)[0]

    def mapped(check_vma):
        return jax.shard_map(
            shard, mesh=mesh, in_specs=data, out_specs=data, check_vma=check_vma
        )

    y = np.asarray(jax.jit(mapped(False))(x)).reshape(8, 2, 3)
    for group in groups:
        rows = np.asarray(x).reshape(8, 2, 3)[group].reshape(-1, 3)
        np.testing.assert_allclose(
            y[group].reshape(-1, 3), run(rows, PARAMS)[0], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="axis_index_groups.*check_vma=False"):
        mapped(True)(x)


@pytest.mark.slow
@pytest.mark.parametrize(("check_vma", "factor"), [(False, 1), (True, 8)])
def test_check_vma_decides_whether_a_gradient_is_summed_over_devices(
    check_vma, factor, devices
):
    # The docstring's sentence: with check_vma=True the gradient of a replicated
    # parameter is the sum over devices already, else each device's own share.
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=devices)
    x = normal((16, 3), mean=1.0)

    def local_loss(params, x):
        y = run(x, params, axis_name="d")[0]
        return jnp.mean(jnp.sin(y))

    def mean_of_gradients(params, x):
        return jax.lax.pmean(jax.grad(local_loss)(params, x).scale, "d")

    got = jax.shard_map(
        mean_of_gradients,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )(PARAMS, x)
    whole = jax.grad(lambda p: jnp.mean(jnp.sin(run(x, p)[0])))(PARAMS).scale
    chex.assert_trees_all_close(jax.device_get(got), factor * whole, rtol=1e-4)
