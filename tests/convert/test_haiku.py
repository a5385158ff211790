"""Parity with Haiku itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import convert, debiased_momentum, init
from convert_trainer import LAYER, LEARNING_RATE, C, Ours, check_parity, start
from marks import slow_but
from reference import normal

hk = pytest.importorskip("haiku", reason="needs the extra `peers`")

channels_first = functools.partial(np.moveaxis, source=-1, destination=1)


@functools.cache
def layer_of_haiku(momentum, data_format):
    def forward(x, train):
        bn = hk.BatchNorm(True, True, momentum, data_format=data_format)
        return bn(x, train)

    return hk.transform_with_state(forward)


@functools.partial(jax.jit, static_argnames=("bn", "train"))
def apply(bn, params, state, x, train):
    return bn.apply(params, state, None, x, train)


@functools.partial(jax.jit, static_argnames="bn")
def trained(bn, params, state, batch):
    def loss(params):
        y, new = bn.apply(params, state, None, batch.x, True)
        return jnp.mean((y - batch.target) ** 2), (y, new)

    grads, (y, state) = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), state, y


class Peer:
    def __init__(self, shape, momentum, feature_axis=-1):
        data_format = "channels_last" if feature_axis == -1 else "channels_first"
        self.bn = layer_of_haiku(momentum, data_format)
        self.options = {
            "momentum": momentum,
            "num_dims": len(shape),
            "feature_axis": feature_axis,
        }
        x = np.zeros(shape, np.float32)
        x = x if feature_axis == -1 else channels_first(x)
        init = jax.jit(self.bn.init, static_argnums=2)
        self.params, self.state = init(jax.random.key(0), x, True)

    def load(self, layer):
        params, state = convert.to_haiku(layer, **self.options)
        # Of Haiku's own structure and shapes, or apply would not take them.
        old = jax.tree.map(np.shape, (self.params, self.state))
        assert jax.tree.map(np.shape, (params, state)) == old
        self.params, self.state = jax.tree.map(jnp.asarray, (params, state))

    def layer(self):
        return convert.from_haiku(self.params, self.state)

    def predict(self, x):
        return apply(self.bn, self.params, self.state, x, False)[0]

    def step(self, batch):
        self.params, self.state, y = trained(self.bn, self.params, self.state, batch)
        return y


# Not 0.999: at 3 batches, its 1 - momentum**3 in float32 has 5 digits.
@pytest.mark.parametrize(
    ("shape", "momentum"),
    slow_but(
        [((16, C), 0.9), ((4, 3, 2, C), 0.99)],
        itertools.product([(16, C), (4, 3, 2, C)], [0.9, 0.99]),
    ),
    ids=str,
)
def test_predictions_steps_and_state_agree(shape, momentum, direction):
    peer = Peer(shape, momentum)
    layer = start(peer, direction, shape)
    assert layer.num_batches == 3
    check_parity(
        peer, Ours(layer, functools.partial(debiased_momentum, momentum)), shape
    )


def test_channels_first_agrees(direction):
    shape = (4, 3, 2, C)
    peer = Peer(shape, 0.9, feature_axis=1)
    layer = start(peer, direction, shape, transpose=channels_first)
    ours = Ours(layer, functools.partial(debiased_momentum, 0.9), feature_axis=1)
    check_parity(peer, ours, shape, transpose=channels_first)


def test_a_large_number_of_batches_gives_constant_momentum():
    peer = Peer((16, C), 0.9)
    layer = LAYER._replace(num_batches=10**6)
    peer.load(layer)
    check_parity(peer, Ours(layer, lambda t: 0.9), (16, C))


def test_a_layer_without_batches_starts_afresh():
    peer = Peer((16, C), 0.9)
    layer = LAYER._replace(num_batches=0)
    peer.load(layer)
    check_parity(peer, Ours(layer, functools.partial(debiased_momentum, 0.9)), (16, C))


def test_a_whole_model_goes_there_and_back():
    def forward(x, train):
        x = hk.BatchNorm(True, True, 0.9, name="one")(x, train)
        x = hk.Flatten()(hk.Conv2D(3, 2)(x))
        return hk.BatchNorm(False, True, 0.9, name="two")(x, train)

    net = hk.transform_with_state(forward)
    x = normal((4, 3, 3, 2), seed=1)
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, True)
    _, state = apply(net, params, state, x, True)
    entries = {"params": params, "state": state}
    features = np.size(params["two"]["offset"])
    one, two = init(2), init(features, scale=False)
    names = {"one": "a", "two": "b"}
    layers = convert.layers_from("haiku", entries, names, like={"a": one, "b": two})
    assert layers["a"].num_batches == 1
    back = convert.layers_into("haiku", entries, layers, names, momentum=0.9)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        back,
        entries,
    )
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, entries)


def test_the_default_epsilon_is_haikus():
    module = hk.transform(lambda: hk.BatchNorm(True, True, 0.9).eps)
    assert module.apply({}, None) == convert.DEFAULTS["haiku"].epsilon
