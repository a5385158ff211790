"""Parity with Equinox itself, faults included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import convert, debiased_momentum
from convert_trainer import (
    LAYER,
    LEARNING_RATE,
    TOLERANCE,
    C,
    Ours,
    batches,
    check_parity,
    start,
)
from marks import slow_but

eqx = pytest.importorskip("equinox", reason="needs the extra `peers`")

SHAPE = (4, 3, 2, C)
channels_first = functools.partial(np.moveaxis, source=-1, destination=1)


def apply(bn, state, x, inference):
    one = functools.partial(bn, inference=inference)
    return jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        x, state
    )


@eqx.filter_jit
def predict(bn, state, x):
    return apply(bn, state, x, True)[0]


@eqx.filter_jit
def train(bn, state, batch):
    @functools.partial(eqx.filter_grad, has_aux=True)
    def grad(bn):
        y, new = apply(bn, state, batch.x, False)
        return jnp.mean((y - batch.target) ** 2), (y, new)

    grads, (y, state) = grad(bn)
    bn = eqx.apply_updates(bn, jax.tree.map(lambda g: -LEARNING_RATE * g, grads))
    return bn, state, y


class Peer:
    def __init__(self, mode, momentum=0.9):
        self.mode = mode
        self.momentum = momentum if mode == "batch" else None
        self.bn, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            C, "batch", momentum=momentum, mode=mode
        )

    def load(self, layer):
        new = convert.to_equinox(layer, mode=self.mode, momentum=self.momentum)
        new = {name: jnp.asarray(value) for name, value in new.items()}
        self.bn = eqx.tree_at(
            lambda bn: (bn.weight, bn.bias), self.bn, (new["weight"], new["bias"])
        )
        bn, state = self.bn, self.state
        if self.mode == "ema":
            state = state.set(bn.ema_first_time_index, new["first_time"])
            averages = (new["running_mean"], new["running_var"])
            self.state = state.set(bn.ema_state_index, averages)
        else:
            counter = jnp.array(int(new["counter"]))
            state = state.set(bn.batch_counter, counter)
            averages = (new["hidden_mean"], new["hidden_var"])
            self.state = state.set(bn.batch_state_index, averages)

    def layer(self):
        bn, state = self.bn, self.state
        entries = {"weight": bn.weight, "bias": bn.bias}
        if self.mode == "ema":
            entries["first_time"] = state.get(bn.ema_first_time_index)
            averages = state.get(bn.ema_state_index)
            entries["running_mean"], entries["running_var"] = averages
        else:
            entries["counter"] = state.get(bn.batch_counter)
            averages = state.get(bn.batch_state_index)
            entries["hidden_mean"], entries["hidden_var"] = averages
        return convert.from_equinox(entries, mode=self.mode, momentum=self.momentum)

    def predict(self, x):
        return predict(self.bn, self.state, x)

    def step(self, batch):
        self.bn, self.state, y = train(self.bn, self.state, batch)
        return y


# Not 0.999: at 3 batches, its 1 - momentum**3 in float32 has 5 digits.
@pytest.mark.parametrize("momentum", slow_but([0.9], [0.9, 0.99]))
def test_mode_batch_agrees(momentum, direction):
    peer = Peer("batch", momentum)
    layer = start(peer, direction, SHAPE, transpose=channels_first)
    momentum_at = functools.partial(debiased_momentum, momentum)
    ours = Ours(layer, momentum_at, feature_axis=1)
    check_parity(peer, ours, SHAPE, transpose=channels_first)


@pytest.mark.parametrize("num_batches", [0, None])
def test_mode_ema_agrees(num_batches, direction):
    peer = Peer("ema")
    layer = LAYER._replace(num_batches=num_batches)
    layer = start(peer, direction, SHAPE, layer=layer, transpose=channels_first)

    def momentum_at(t):
        return 0.0 if t == 0 else 0.9

    ours = Ours(layer, momentum_at, average="normalising", feature_axis=1)
    check_parity(peer, ours, SHAPE, transpose=channels_first)


def test_mode_batch_without_its_excess_is_the_debiased_average():
    """What it means to keep: the average of variances, free of the initial value."""
    momentum, peer = 0.9, Peer("batch", 0.9)
    expected = np.zeros(C)
    for t, batch in enumerate(batches(SHAPE, 3)):
        peer.step(batch._make(map(channels_first, batch)))
        weight = float(debiased_momentum(momentum, t))
        expected = weight * expected + (1 - weight) * batch.x.var((0, 1, 2))
    layer = peer.layer()
    # It starts at 1: after 3 batches .729 of it is left, divided by 1 - .729.
    np.testing.assert_allclose(
        layer.state.var, expected + 0.729 / 0.271, rtol=1e-5, atol=1e-5
    )
    mended = convert.without_equinox_excess(layer, momentum=momentum)
    np.testing.assert_allclose(mended.state.var, expected, **TOLERANCE)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_the_defaults_are_equinoxs(mode):
    bn = eqx.nn.BatchNorm(C, "batch", mode=mode)
    assert (bn.momentum, bn.eps) == convert.DEFAULTS[f"equinox_{mode}"]
