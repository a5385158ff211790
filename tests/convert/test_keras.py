"""Parity with Keras 3 itself, on its JAX backend."""

import os

import jax
import jax.numpy as jnp
import pytest

from bn_jax import convert, init
from convert_trainer import LEARNING_RATE, C, Ours, check_parity, start

# Keras reads it once, on import.
os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", minversion="3", reason="needs the extra `peers`")

# Keras 3.15's own variables, in numpy().
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

MOMENTUM, EPSILON = convert.DEFAULTS["keras"]


class Peer:
    def __init__(self, shape, **options):
        self.bn = keras.layers.BatchNormalization(**options)
        self.bn.build(shape)
        self.apply = jax.jit(self.bn.stateless_call, static_argnames="training")
        self.gradient = jax.jit(jax.grad(self.loss, has_aux=True))

    def load(self, layer):
        self.bn.set_weights(list(convert.to_keras(layer).values()))

    def layer(self):
        return convert.from_keras({w.name: w.numpy() for w in self.bn.weights})

    def values(self):
        trainable = [v.value for v in self.bn.trainable_variables]
        return trainable, [v.value for v in self.bn.non_trainable_variables]

    def predict(self, x):
        return self.apply(*self.values(), x, training=False)[0]

    def loss(self, trainable, rest, batch):
        y, new = self.bn.stateless_call(trainable, rest, batch.x, training=True)
        return jnp.mean((y - batch.target) ** 2), (y, new)

    def step(self, batch):
        grads, (y, rest) = self.gradient(*self.values(), batch)
        for variable, grad in zip(self.bn.trainable_variables, grads, strict=True):
            variable.assign(variable.value - LEARNING_RATE * grad)
        for variable, value in zip(self.bn.non_trainable_variables, rest, strict=True):
            variable.assign(value)
        return y


@pytest.mark.parametrize(
    "shape",
    [pytest.param((16, C), marks=pytest.mark.slow), (4, 3, 2, C)],
    ids=str,
)
def test_predictions_steps_and_state_agree(shape, direction):
    peer = Peer(shape)
    layer = start(peer, direction, shape)
    check_parity(peer, Ours(layer, lambda t: MOMENTUM, epsilon=EPSILON), shape)


def test_the_defaults_are_keras_s():
    bn = keras.layers.BatchNormalization()
    assert (bn.momentum, bn.epsilon) == (MOMENTUM, EPSILON)


def test_a_whole_model_goes_there_and_back():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            keras.layers.Conv2D(3, 2),
            keras.layers.BatchNormalization(name="one"),
            keras.layers.BatchNormalization(name="two", scale=False),
        ],
        name="net",
    )
    entries = {w.path: w.numpy() for w in model.weights}
    names = {"net/one": "a", "net/two": "b"}
    like = {"b": init(3, scale=False)}
    layers = convert.layers_from("keras", entries, names, like=like)
    assert layers["b"].params.scale is None
    moved = layers["b"]._replace(state=layers["b"].state._replace(mean=jnp.arange(3.0)))
    new = convert.layers_into("keras", entries, {**layers, "b": moved}, names)
    assert list(new) == list(entries)
    model.set_weights(list(new.values()))
    assert model.get_layer("two").moving_mean.numpy().tolist() == [0, 1, 2]
