"""Parity with Flax itself: Linen, NNX, and bn_jax's own Linen module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

import bn_jax.linen
from bn_jax import convert, cumulative_momentum, debiased_momentum, init
from convert_trainer import LAYER, LEARNING_RATE, C, Ours, check_parity, start

SHAPE = (4, 3, 2, C)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply_linen(bn, variables, x, running):
    return bn.apply(variables, x, running, mutable=[] if running else ["batch_stats"])


@functools.partial(jax.jit, static_argnums=0)
def train_linen(bn, variables, batch):
    def loss(params):
        y, new = apply_linen(bn, {**variables, "params": params}, batch.x, False)
        return jnp.mean((y - batch.target) ** 2), (y, new)

    params = variables["params"]
    grads, (y, new) = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    return {"params": params, **new}, y


class Linen:
    def __init__(self, module, *, count=False):
        self.bn = module
        self.count = count
        init = jax.jit(functools.partial(module.init, use_running_average=True))
        self.variables = init(jax.random.key(0), jnp.zeros(SHAPE))

    def load(self, layer):
        variables = convert.to_flax(layer, count=self.count)
        expected = jax.tree.structure(self.variables)
        assert jax.tree.structure(variables) == expected
        self.variables = jax.tree.map(jnp.asarray, variables)

    def layer(self):
        return convert.from_flax(self.variables)

    def predict(self, x):
        return apply_linen(self.bn, self.variables, x, True)[0]

    def step(self, batch):
        self.variables, y = train_linen(self.bn, self.variables, batch)
        return y


@nnx.jit
def predict_nnx(bn, x):
    return bn(x, use_running_average=True)


@nnx.jit
def train_nnx(bn, batch):
    def loss(bn):
        y = bn(batch.x, use_running_average=False)
        return jnp.mean((y - batch.target) ** 2), y

    grads, y = nnx.grad(loss, has_aux=True)(bn)
    params = nnx.state(bn, nnx.Param)
    nnx.update(bn, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads))
    return y


class NNX:
    def __init__(self):
        self.bn = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def load(self, layer):
        state = nnx.state(self.bn)
        nnx.replace_by_pure_dict(
            state, jax.tree.map(jnp.asarray, convert.to_nnx(layer))
        )
        nnx.update(self.bn, state)

    def layer(self):
        return convert.from_nnx(nnx.state(self.bn))

    def predict(self, x):
        return predict_nnx(self.bn, x)

    def step(self, batch):
        return train_nnx(self.bn, batch)


@pytest.mark.parametrize(
    "peer",
    [
        lambda: Linen(nn.BatchNorm()),
        lambda: Linen(bn_jax.linen.BatchNorm()),
        NNX,
    ],
    ids=["flax.linen", "bn_jax.linen", "flax.nnx"],
)
def test_predictions_steps_and_state_agree(peer, direction):
    peer = peer()
    check_parity(peer, Ours(start(peer, direction, SHAPE), lambda t: 0.99), SHAPE)


@pytest.mark.parametrize(
    ("average", "momentum_at"),
    [
        ("debiased", functools.partial(debiased_momentum, 0.99)),
        ("cumulative", cumulative_momentum),
    ],
)
def test_the_count_of_our_linen_module_is_kept(average, momentum_at, direction):
    peer = Linen(bn_jax.linen.BatchNorm(average=average), count=True)
    layer = start(peer, direction, SHAPE)
    assert layer.num_batches == 3
    check_parity(peer, Ours(layer, momentum_at), SHAPE)


@pytest.mark.parametrize("name", ["flax", "nnx"])
def test_the_defaults_are_flaxs(name):
    bn = nn.BatchNorm() if name == "flax" else nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    assert (bn.momentum, bn.epsilon) == convert.DEFAULTS[name]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="one")(nn.Dense(C)(x))
        return Block(name="block")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, use_bias=False, name="two")(x)


@pytest.mark.parametrize("flattened", [None, "/", "tuples"])
def test_a_whole_model_is_filled_and_its_other_layers_kept(flattened):
    x = np.ones((2, 3), np.float32)
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    unbiased = LAYER._replace(params=LAYER.params._replace(bias=None))
    layers = {"a": LAYER, "b": unbiased}
    names = {"one": "a", "block/two": "b"}
    given = variables
    if flattened is not None:
        sep = None if flattened == "tuples" else flattened
        given = traverse_util.flatten_dict(variables, sep=sep)
    new = convert.layers_into("flax", given, layers, names)
    read = convert.layers_from("flax", new, names, like={"b": init(C, bias=False)})
    for name, layer in layers.items():
        jax.tree.map(np.testing.assert_array_equal, read[name][:2], layer[:2])
    if flattened is None:
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        assert new["params"]["Dense_0"] is variables["params"]["Dense_0"] or (
            new["params"]["Dense_0"]["kernel"]
            is variables["params"]["Dense_0"]["kernel"]
        )
        jax.jit(Net().apply)(new, x)


def test_a_whole_nnx_model_is_read_by_the_names_of_its_attributes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, C, rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(C, rngs=rngs)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)))
    layers = convert.layers_from("nnx", state, {"norms/0": "bn"})
    assert layers["bn"].state.var.tolist() == [1] * C
