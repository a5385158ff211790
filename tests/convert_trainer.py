"""Trains a layer of ours and one of another library side by side."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import (
    BatchNormParams,
    BatchNormState,
    batch_norm,
    measure,
    update_average,
)
from bn_jax.convert import BatchNormLayer, unbiased

C = 4
LEARNING_RATE = 0.5
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

LAYER = BatchNormLayer(
    BatchNormParams(jnp.array([0.5, -1.0, 2.0, 1.0]), jnp.array([1.0, 0, -3, 0.25])),
    BatchNormState(jnp.array([0.1, -0.2, 2.0, 0.0]), jnp.array([1.0, 2.0, 3.0, 0.5])),
    num_batches=3,
)


class Batch(NamedTuple):
    x: np.ndarray
    target: np.ndarray


def batches(shape, num_batches, *, seed=0):
    """Return batches with the features last, of unequal means and deviations."""
    rng = np.random.default_rng(seed)
    scale, mean = np.array([1.0, 0.3, 2.0, 1.5]), np.array([0.0, 1.0, -2.0, 0.5])
    return [
        Batch(
            (rng.normal(size=shape) * scale + mean).astype(np.float32),
            rng.normal(size=shape).astype(np.float32),
        )
        for _ in range(num_batches)
    ]


class Ours:
    """A layer trained by bn_jax, with the momentum of the step given by a function."""

    def __init__(
        self, layer, momentum_at, *, epsilon=1e-5, average=None, feature_axis=-1
    ):
        self.layer = layer
        self.momentum_at = momentum_at
        self.average = average
        self.options = {"epsilon": epsilon, "feature_axis": feature_axis}
        self.feature_axis = feature_axis

    def predict(self, x):
        params, state, _ = self.layer
        return self._predicted(x, params, state)

    @functools.partial(jax.jit, static_argnums=0)
    def _predicted(self, x, params, state):
        return batch_norm(x, params, state, train=False, **self.options)[0]

    def _forward(self, params, state, x, momentum):
        """Return y and the new state, with what the other library averages."""
        if self.average is None:
            return batch_norm(
                x, params, state, train=True, momentum=momentum, **self.options
            )
        moments = measure(x, feature_axis=self.feature_axis)
        if self.average == "unbiased":
            moments = unbiased(moments)
        new = update_average(state, moments, momentum=momentum)
        y, _ = batch_norm(
            x,
            params,
            state,
            train=True,
            update_state=False,
            statistics=new if self.average == "normalising" else None,
            **self.options,
        )
        return y, new

    @functools.partial(jax.jit, static_argnums=0)
    def _stepped(self, params, state, batch, momentum):
        """Return y, the new parameters and the new state."""

        def loss(params):
            y, new = self._forward(params, state, batch.x, momentum)
            return jnp.mean((y - batch.target) ** 2), (y, new)

        grads, (y, state) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
        return y, params, state

    def step(self, batch):
        params, state, num_batches = self.layer
        momentum = self.momentum_at(num_batches)
        y, params, state = self._stepped(params, state, batch, momentum)
        count = None if num_batches is None else num_batches + 1
        self.layer = BatchNormLayer(params, state, count)
        return y


def check_parity(peer, ours, shape, *, transpose=lambda x: x):
    """Compare predictions, 5 training steps and the state they lead to."""

    def close(a, b, what):
        np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=what)

    (held_out,) = batches(shape, 1, seed=7)
    held_out = transpose(held_out.x)
    close(peer.predict(held_out), ours.predict(held_out), "prediction at the start")
    for i, batch in enumerate(batches(shape, 5)):
        moved = Batch(*map(transpose, batch))
        close(peer.step(moved), ours.step(moved), f"output of step {i}")
    close(peer.predict(held_out), ours.predict(held_out), "prediction at the end")
    theirs = peer.layer()
    chex.assert_trees_all_close(theirs[:2], ours.layer[:2], **TOLERANCE)
    assert theirs.num_batches in (None, ours.layer.num_batches)
    assert np.abs(theirs.params.scale - LAYER.params.scale).max() > 0.01, "no learning"


def start(peer, direction, shape, *, layer=LAYER, transpose=lambda x: x):
    """Return the layer that both sides start from, made by the one or the other."""
    if direction == "to":
        peer.load(layer)
        return layer
    for batch in batches(shape, 3, seed=1):
        peer.step(Batch(*map(transpose, batch)))
    return peer.layer()
