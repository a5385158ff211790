"""`bn_jax.nnx.BatchNorm` in models: modes, transforms, checkpoints, devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, PartitionSpec

from bn_jax import nnx as ours
from nnx_layers import MODULES, loss_and_output, make, merge, snapshot, variables
from reference import normal


@nnx.jit
def step(layer, x):
    """The output and gradients of a training step, which moves the averages."""
    gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
    return y, gradients


@nnx.jit
def call(layer, x):
    return layer(x)


class Block(nnx.Module):
    """A dense layer with a batch norm of choice."""

    def __init__(self, norm, *, rngs, size=3):
        self.dense = nnx.Linear(size, size, rngs=rngs)
        self.norm = norm(size, rngs=rngs)

    def __call__(self, x):
        return jax.nn.sigmoid(self.norm(self.dense(x)))


def test_train_eval_set_attributes_and_view_reach_the_layer():
    x = normal((8, 3), mean=1.0)
    block = nnx.jit(lambda: Block(ours.BatchNorm, rngs=nnx.Rngs(0)))()
    before = jax.device_get(variables(block))
    block.eval()
    assert block.norm.use_running_average is True
    prediction = call(block, x)
    chex.assert_trees_all_equal(variables(block), before)
    block.train()
    assert block.norm.use_running_average is False
    assert np.max(np.abs(np.subtract(call(block, x), prediction))) > 0.1
    assert np.all(np.not_equal(block.norm.mean[...], before["norm"]["mean"]))
    block.set_attributes(ours.BatchNorm, use_running_average=True, momentum=0.5)
    assert (block.norm.use_running_average, block.norm.momentum) == (True, 0.5)
    viewed = nnx.view(block, use_running_average=False)
    assert viewed.norm.use_running_average is False
    assert block.norm.use_running_average is True
    assert viewed.norm.mean is block.norm.mean
    assert "use_running_average" in nnx.view_info(block)


def test_use_running_average_in_the_call_goes_before_and_is_given_somewhere():
    x = normal((8, 3), mean=1.0)
    for module in MODULES:
        for attribute in (True, False, None):
            layer = make(module, use_running_average=attribute)
            y = layer(x, True)
            expected = np.asarray(x) / np.sqrt(1 + 1e-5, dtype=np.float32)
            chex.assert_trees_all_close(y, expected, rtol=1e-6)
            layer(x, use_running_average=False)
            assert np.all(np.asarray(layer.mean[...]) != 0)
        with pytest.raises(ValueError, match="use_running_average"):
            layer(x)


def test_nnx_jit_is_the_same_and_traces_once():
    x = normal((3, 8, 3), mean=1.0)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(layer, x):
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
        return y, gradients

    jitted, eager = make(), make()
    for batch in np.asarray(x):
        got = step(jitted, batch)
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(eager, batch)
        chex.assert_trees_all_close(got, (y, gradients), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(variables(jitted), variables(eager), rtol=1e-5)


def test_an_ensemble_under_nnx_vmap_is_its_members_apart():
    x = normal((4, 8, 3), mean=1.0)  # 4 members, each with a batch of its own

    @nnx.jit
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def create(rngs):
        return ours.BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs)

    ensemble = create(nnx.Rngs(0))
    assert np.unique(ensemble.scale[...]).size == 12
    graphdef, before = snapshot(ensemble)
    before = jax.device_get(before)
    got = nnx.jit(nnx.vmap(step))(ensemble, x)
    got = jax.device_get((got, variables(ensemble)))
    for i in range(4):
        member = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], before))
        expected = step(member, x[i]), variables(member)
        one = jax.tree.map(lambda a, i=i: a[i], got)
        chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-5)


def test_recomputation_moves_the_averages_once():
    x = normal((8, 3), mean=1.0)

    @nnx.remat
    def recomputed(block, x):
        return block(x)

    def loss(block, x, forward):
        return jnp.mean(jnp.sin(jnp.arange(24.0).reshape(8, 3) * forward(block, x)))

    @functools.partial(jax.jit, static_argnums=0)
    def one_step(forward):
        block = Block(ours.BatchNorm, rngs=nnx.Rngs(0))
        gradients = nnx.grad(loss)(block, x, forward)
        return nnx.to_pure_dict(gradients), variables(block)

    results = [one_step(forward) for forward in (recomputed, lambda block, x: block(x))]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_layers_stacked_under_nnx_scan_are_the_layers_in_turn():
    x = normal((8, 3), mean=1.0)

    @nnx.jit
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return Block(ours.BatchNorm, rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    blocks = create(nnx.Rngs(0))
    graphdef, before = jax.device_get(snapshot(blocks))
    got, expected = forward(x, blocks), x
    moved = jax.device_get(variables(blocks))
    for i in range(2):
        block = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], before))
        expected = call(block, expected)
        one = jax.tree.map(lambda a, i=i: a[i], moved)
        chex.assert_trees_all_close(one, variables(block), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_split_and_merge_keep_all():
    x = normal((8, 3), mean=1.0)
    layer = make(momentum=0.5, ghost_batch_size=4, use_bias=False)
    call(layer, x)
    graphdef, params, averages = nnx.split(layer, nnx.Param, nnx.BatchStat)
    assert set(params) == {"scale"} and set(averages) == {"mean", "var"}
    merged = nnx.merge(graphdef, params, averages)
    chex.assert_trees_all_equal(call(merged, x), call(layer, x))
    chex.assert_trees_all_equal(variables(merged), variables(layer))


def by_state(source, target, path):
    nnx.update(target, nnx.state(source))


def by_pure_dict(source, target, path):
    state = nnx.state(target)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(source)))
    nnx.update(target, state)


def by_file(source, target, path):
    path.write_bytes(serialization.to_bytes(variables(source)))
    loaded = serialization.from_bytes(variables(target), path.read_bytes())
    nnx.update(target, jax.tree.map(jnp.asarray, loaded))


@pytest.mark.parametrize("move", [by_state, by_pure_dict, by_file])
@pytest.mark.parametrize("source_module,target_module", [MODULES, MODULES[::-1]])
def test_checkpoints_move_between_flax_and_ours(
    move, source_module, target_module, tmp_path
):
    x = normal((8, 3), mean=1.0)
    source = Block(source_module, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(source, optax.sgd(0.5), wrt=nnx.Param)
    for _ in range(2):
        _, gradients = step(source, x)
        optimizer.update(source, gradients)
    target = Block(target_module, rngs=nnx.Rngs(1))
    move(source, target, tmp_path / "checkpoint")
    chex.assert_trees_all_equal(variables(target), variables(source))
    for mode in ("eval", "train"):
        getattr(source, mode)()
        getattr(target, mode)()
        chex.assert_trees_all_close(
            call(target, x), call(source, x), rtol=1e-5, atol=1e-5
        )
    chex.assert_trees_all_close(
        variables(target), variables(source), rtol=1e-5, atol=1e-5
    )


# Shared statistics.


def sharded_step(way, layer, devices):
    """Return a function of x `[8, N, C]`: one step of the layer on 8 devices."""
    graphdef, state = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state)
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
        # All have the same averages; under pmap each device hands on its own.
        return y, nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(layer))

    if way == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), devices=devices)
        return lambda x: mapped(state, x)

    def one_shard(state, x):
        return jax.tree.map(lambda a: a[None], step(state, x[0]))

    mesh = jax.make_mesh((8,), ("batch",), (AxisType.Auto,), devices=devices)
    shard, whole = PartitionSpec("batch"), PartitionSpec()
    mapped = jax.shard_map(
        one_shard,
        mesh=mesh,
        in_specs=(whole, shard),
        out_specs=shard,
        check_vma=False,  # gradients are each device's own share, as under pmap
    )
    return lambda x: jax.jit(mapped)(state, x)


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_eight_devices_share_the_statistics_of_the_one_big_batch(way, devices):
    x = np.asarray(normal((8, 4, 3), mean=1.0))
    x = x * np.arange(1, 9, dtype=np.float32)[:, None, None]
    scale_init = nnx.initializers.normal(1.0)
    layer = make(axis_name="batch", scale_init=scale_init)
    y, gradients, states = jax.device_get(sharded_step(way, layer, devices)(x))

    big = make(scale_init=scale_init)

    def total(layer, x):
        y = layer(x).reshape(8, -1, 3)
        coefficients = jnp.arange(1.0, 13).reshape(4, 3) / 12
        losses = jnp.mean(jnp.sin(coefficients * y) * y, axis=(1, 2))
        return jnp.sum(losses), y

    gradient = nnx.jit(nnx.grad(total, has_aux=True))
    big_gradients, big_y = gradient(big, x.reshape(-1, 3))
    chex.assert_trees_all_close(y, big_y, rtol=1e-5, atol=1e-5)
    summed = jax.tree.map(lambda a: a.sum(0), gradients)
    chex.assert_trees_all_close(
        summed, nnx.to_pure_dict(big_gradients), rtol=1e-4, atol=1e-5
    )
    for i in range(8):
        state = jax.tree.map(lambda a, i=i: a[i], states)
        chex.assert_trees_all_close(state, variables(big), rtol=1e-5, atol=1e-6)


def test_nnx_pmap_of_a_replicated_layer_equals_the_big_batch(devices):
    x = np.asarray(normal((8, 4, 3), mean=1.0))
    layer, big = make(axis_name="batch"), make()

    @nnx.pmap(
        in_axes=(nnx.StateAxes({...: None}), 0),
        out_axes=0,
        axis_name="batch",
        devices=devices,
    )
    def step(layer, x):
        return layer(x)

    y = jax.device_get(step(layer, x))
    expected = call(big, x.reshape(-1, 3))
    chex.assert_trees_all_close(y.reshape(-1, 3), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(variables(layer)), variables(big), rtol=1e-5, atol=1e-6
    )


def test_an_unbound_axis_is_named_and_prediction_needs_none():
    x = normal((8, 3))
    layer = make(axis_name="batch")
    with pytest.raises(ValueError, match="'batch' is not bound.*pmap"):
        layer(x)
    layer.eval()
    assert layer(x).shape == x.shape


def test_groups_share_statistics_inside_themselves_alone():
    x = np.asarray(normal((4, 2, 3), mean=1.0))
    layer = make(axis_name="batch", axis_index_groups=[[0, 2], [1, 3]])
    graphdef, state = nnx.split(layer)
    step = jax.pmap(
        lambda x: merge(graphdef, state)(x),
        axis_name="batch",
        devices=jax.devices("cpu")[:4],
    )
    y = jax.device_get(step(x))
    for group in ([0, 2], [1, 3]):
        expected = call(make(), x[group])
        chex.assert_trees_all_close(y[group], expected, rtol=1e-5, atol=1e-5)


# A model trains.


class LeNet(nnx.Module):
    """LeNet with sigmoids, and a batch norm before each but the last."""

    def __init__(self, norm, *, rngs):
        def layers(layer, *sizes):
            return nnx.List(
                [layer(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
            )

        def conv(a, b):
            return nnx.Conv(a, b, (5, 5), padding="VALID", rngs=rngs)

        def dense(a, b):
            return nnx.Linear(a, b, rngs=rngs)

        self.convs = layers(conv, 1, 6, 16)
        self.denses = layers(dense, 256, 120, 84)
        self.norms = nnx.List(
            [norm(c, momentum=0.9, rngs=rngs) for c in (6, 16, 120, 84)]
        )
        self.head = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x):
        norms = iter(self.norms)
        for conv in self.convs:
            x = jax.nn.sigmoid(next(norms)(conv(x)))
            x = nnx.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for dense in self.denses:
            x = jax.nn.sigmoid(next(norms)(dense(x)))
        return self.head(x)


@pytest.mark.slow
def test_a_small_lenet_learns_synthetic_images():
    rng = np.random.default_rng(0)
    prototypes = rng.random((10, 28, 28, 1))
    labels = np.arange(160) % 10
    images = prototypes[labels] + 0.3 * rng.standard_normal((160, 28, 28, 1))
    batches = jnp.float32(images).reshape(5, 32, 28, 28, 1), labels.reshape(5, 32)

    def step(model, optimizer, images, labels):
        def loss(model):
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses, accuracy = {}, {}
    for module in MODULES:
        model = nnx.jit(lambda norm=module: LeNet(norm, rngs=nnx.Rngs(0)))()
        optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
        jitted = nnx.jit(step)
        model.train()
        losses[module] = [
            float(jitted(model, optimizer, *batch))
            for _ in range(6)
            for batch in zip(*batches, strict=True)
        ]
        model.eval()
        logits = nnx.jit(lambda model, x: model(x))(model, jnp.float32(images))
        accuracy[module] = np.mean(np.argmax(logits, -1) == labels)
    mine, flax = (losses[m] for m in MODULES)
    np.testing.assert_allclose(mine[:5], flax[:5], rtol=1e-3)
    assert mine[0] > 2 and mine[-1] < 0.25
    assert accuracy[ours.BatchNorm] > 0.98
