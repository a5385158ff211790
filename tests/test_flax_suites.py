"""Layers in Flax's tables and abstract evaluation, and beside dead units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax import linen as linen_lib
from bn_jax import nnx as nnx_lib
from reference import normal

KEY = jax.random.key(0)
ONE = jnp.ones((1, 3))
WITH_A_BATCH_OF_ONE = ["batch_norm", "center", "scale"]


class Block(nnx.Module):
    """A dense layer and a norm of choice."""

    def __init__(self, norm, **attributes):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx_lib.norm(norm, **attributes)(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x))


# Warnings are errors in this suite, so that what follows fails where one is given.


@pytest.mark.parametrize("norm", WITH_A_BATCH_OF_ONE)
def test_a_table_of_an_nnx_layer_in_training_takes_a_batch_of_one(norm):
    block = Block(norm)
    assert "norm" in nnx.tabulate(block, ONE)
    with pytest.warns(UserWarning, match="one value a feature"):
        block(ONE)  # the mark is on a copy of the block


def test_a_table_of_an_nnx_layer_needs_no_bound_axis_and_moves_no_average():
    block = Block("batch_norm", axis_name="batch")
    assert "norm" in nnx.tabulate(block, normal((4, 3)))
    np.testing.assert_array_equal(block.norm.mean[...], 0)


@pytest.mark.parametrize("norm", WITH_A_BATCH_OF_ONE)
def test_a_table_of_a_linen_layer_and_its_abstract_init_take_a_batch_of_one(norm):
    layer = linen_lib.norm(norm)(use_running_average=False)
    assert "batch_stats" in nn.tabulate(layer, KEY)(ONE)
    assert "batch_stats" in jax.eval_shape(layer.init, KEY, ONE)


@pytest.mark.parametrize("norm", WITH_A_BATCH_OF_ONE)
def test_abstract_construction_of_an_nnx_layer_does_not_warn(norm):
    assert nnx.state(nnx.eval_shape(lambda: Block(norm)))["norm"]


# Dead units.

ACTIVATIONS = (nn.relu, nn.tanh, nn.gelu, nn.silu, nn.softplus)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch_norm", "renorm"])
def test_gradients_are_finite_beside_features_that_are_constant(norm):
    layer = linen_lib.norm(norm)(use_running_average=False)
    x = normal((8, 3))
    dense = normal((3, 3))
    dead = {
        "constant input": (x.at[:, 0].set(7.0), jnp.eye(3), jnp.zeros(3)),
        "kernel 0": (x, dense.at[:, 0].set(0.0), jnp.zeros(3)),
        "dead relu": (x, dense, jnp.array([-1e3, 0.0, 0.0])),
    }

    def loss(trained, x, activation, before, rectified):
        h = x @ trained["kernel"] + trained["shift"]
        h = nn.relu(h) if rectified else h
        h = activation(h) if before else h
        y, _ = layer.apply(
            {"params": trained["norm"], "batch_stats": variables["batch_stats"]},
            h,
            mutable=["batch_stats"],
        )
        y = y if before else activation(y)
        return jnp.sum(jnp.sin(y * jnp.arange(1.0, 25).reshape(8, 3)))

    variables = layer.init(KEY, x)

    @jax.jit
    def gradients():
        return {
            (kind, activation.__name__, before): jax.grad(loss, argnums=(0, 1))(
                {"kernel": kernel, "shift": shift, "norm": variables["params"]},
                x,
                activation,
                before,
                kind == "dead relu",
            )
            for kind, (x, kernel, shift) in dead.items()
            for activation in ACTIVATIONS
            for before in (True, False)
        }

    found = jax.device_get(gradients())
    assert len(found) == 30
    for case, gradient in found.items():
        for leaf in jax.tree.leaves(gradient):
            assert np.isfinite(leaf).all(), case


# Export with symbolic sizes.


def exported(step, *arguments):
    """Return a function of an image batch, exported with symbolic sizes."""
    sizes = jax.export.symbolic_shape("b, h, w, 3")
    image = jax.ShapeDtypeStruct(sizes, jnp.float32)
    program = jax.export.export(jax.jit(functools.partial(step, *arguments)))(image)
    return program.call


def test_a_linen_network_in_training_exports_with_symbolic_sizes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            return nn.relu(linen_lib.BatchNorm(use_running_average=False)(x))

    x = normal((2, 5, 6, 3))
    variables = jax.jit(Net().init)(KEY, x)
    step = functools.partial(Net().apply, mutable=["batch_stats"])
    got = exported(step, variables)(x)
    expected = step(variables, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected
    )


def test_an_nnx_layer_in_training_exports_with_symbolic_sizes():
    graphdef, state = nnx.split(nnx_lib.BatchNorm(3, rngs=nnx.Rngs(0)))

    def step(state, x):
        layer = nnx.merge(graphdef, state, copy=True)
        return layer(x), layer.mean[...], layer.var[...]

    x = normal((2, 5, 6, 3))
    for got, expected in zip(exported(step, state)(x), step(state, x), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
