"""`bn_jax.linen.BatchNorm` under Flax's lifted transforms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from bn_jax import BatchNormState
from bn_jax.linen import BatchNorm
from reference import normal

KEY = jax.random.key(0)
X = normal((8, 3), mean=2.0, std=3.0)


class Block(nn.Module):
    """Dense and batch norm, with a carry that a scan can thread."""

    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(3, name="dense")(x)
        norm = BatchNorm(use_running_average=not self.train, momentum=0.9, name="norm")
        return jnp.tanh(norm(x)), None


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
    (y, _), updates = module.apply(variables, x, None, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def init(module, *args, **options):
    return jax.device_get(
        jax.jit(functools.partial(module.init, **options))(KEY, *args)
    )


def moved(norm, variables, x=X, **given):
    """The output of a step, and the statistics after it."""
    step = functools.partial(norm.apply, mutable=["batch_stats"])
    y, updates = jax.device_get(jax.jit(step)(variables, x, **given))
    return y, updates["batch_stats"]


def test_vmapped_ensemble_is_its_members_one_by_one():
    ensemble = nn.vmap(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=4,
    )()
    variables = init(ensemble, X, None)
    y, stats = jax.device_get(apply(ensemble, variables, X))
    assert variables["params"]["norm"]["scale"].shape == (4, 3)
    for i in range(4):
        member = jax.tree.map(lambda a, i=i: a[i], variables)
        expected = apply(Block(), member, X)
        got = (y[i], jax.tree.map(lambda a, i=i: a[i], stats))
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_scan_over_layers_is_the_layers_one_after_another():
    stack = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = init(stack, X, None)
    y, stats = jax.device_get(apply(stack, variables, X))
    x = X
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], variables)
        x, expected = apply(Block(), layer, x)
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], stats), expected, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_layer_moves_its_statistics_once_and_has_the_same_gradients(lift):
    variables = init(Block(), X, None)

    def loss(params, module):
        y, stats = apply(module, {**variables, "params": params}, X)
        return jnp.sum(jnp.sin(y * jnp.arange(1, 25).reshape(8, 3))), stats

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    plain = gradient(variables["params"], Block())
    lifted = gradient(variables["params"], lift(Block)())
    chex.assert_trees_all_close(lifted, plain, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """One layer called twice, along an axis that init does not bind."""

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(use_running_average=False, momentum=0.5, axis_name="d")
        return norm(2 * norm(x) + 1)


def test_reused_layer_moves_twice_and_its_init_needs_no_axis(devices):
    variables = init(Twice(), X)
    step = functools.partial(Twice().apply, variables, mutable=["batch_stats"])
    shards = normal((8, 2, 3), mean=4.0)
    _, updates = jax.pmap(step, axis_name="d", devices=devices)(shards)
    stats = jax.tree.map(lambda a: np.asarray(a)[7], updates["batch_stats"])
    # The first call sees the data's mean m, the second 2 * 0 + 1: from 0, with
    # momentum .5, the average is .5 * (.5 m) + .5 * 1.
    expected = 0.25 * np.asarray(shards).reshape(16, 3).mean(0) + 0.5
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], expected, rtol=1e-5)


def test_checkpoint_moves_from_flaxs_layer_to_ours_and_back():
    @functools.partial(jax.jit, static_argnums=0)
    def trained(module):
        norm = module(use_running_average=False)
        variables = norm.init(KEY, X)
        for _ in range(3):
            _, updates = norm.apply(variables, X, mutable=["batch_stats"])
            variables = {**variables, **updates}
        return variables

    for source, target in ((nn.BatchNorm, BatchNorm), (BatchNorm, nn.BatchNorm)):
        written = serialization.to_bytes(trained(source))
        blank = init(target(use_running_average=True), X)
        loaded = serialization.from_bytes(blank, written)
        y = jax.jit(target(use_running_average=True).apply)(loaded, X)
        predict = jax.jit(source(use_running_average=True).apply)
        expected = predict(trained(source), X)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_mask_and_weights_together_are_refused():
    norm = BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="mask and weights are both given"):
        norm.init(KEY, X, mask=jnp.ones((8, 1), bool), weights=jnp.ones(8))


def test_real_weights_reach_the_statistics():
    norm = BatchNorm(use_running_average=False, momentum=0.0)
    variables = init(norm, X)
    weights = np.array([1, 2, 0, 0, 1, 3, 0, 1])
    _, weighted = moved(norm, variables, weights=weights)
    _, repeated = moved(norm, variables, np.repeat(X, weights, axis=0))
    chex.assert_trees_all_close(weighted, repeated, rtol=1e-5)


def test_ghost_batches_are_the_functions():
    ghost = BatchNorm(use_running_average=False, ghost_batch_size=2)
    y, _ = moved(ghost, init(BatchNorm(use_running_average=False), X))
    np.testing.assert_allclose(y.reshape(4, 2, 3).mean(1), 0, atol=1e-5)


def test_examples_one_by_one_along_an_axis_are_the_batch_as_with_flax():
    @functools.partial(jax.jit, static_argnums=0)
    def step_and_prediction(module):
        norm = module(axis_name="examples", momentum=0.9)
        variables = norm.init(KEY, X[0], use_running_average=True)
        step = functools.partial(
            norm.apply, variables, use_running_average=False, mutable=["batch_stats"]
        )
        y, updates = jax.vmap(step, axis_name="examples")(X)
        prediction = norm.apply(variables, X[0], use_running_average=True)
        return y, updates["batch_stats"], prediction

    ours, flaxs = step_and_prediction(BatchNorm), step_and_prediction(nn.BatchNorm)
    chex.assert_trees_all_close(ours, flaxs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("running", [True, False])
def test_given_statistics_normalise_in_place_of_the_others(running):
    norm = BatchNorm(momentum=0.9, use_running_average=running)
    given = BatchNormState(np.float32([1, 2, 3]), np.float32([4, 5, 6]))
    y, _ = moved(norm, init(norm, X), statistics=given)
    expected = (np.asarray(X) - given.mean) / np.sqrt(given.var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
