import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.training import diagnosis, loop
from bn_jax.training.feed import Batch
from bn_jax.training.state import Network, TrainState


class Scale(nn.Module):
    """Multiplies by the square root of a parameter, whose gradient at 0 is infinite."""

    @nn.compact
    def __call__(self, x):
        return x * jnp.sqrt(self.param("factor", nn.initializers.ones, (10,)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scale(name="inner")(x)


class ThreeScales(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Scale(name="first")(x.reshape(len(x), -1))
        x = Block(name="block")(x)
        return Scale(name="last")(x)


BATCH = Batch(np.full((2, 10, 1, 1), 255, np.uint8), np.arange(2, dtype=np.int32))


def found(**factors):
    """What is found where these factors are not 1."""

    def factor(name):
        return {"factor": jnp.ones(10).at[3].set(factors.get(name, 1.0))}

    params = {
        "first": factor("first"),
        "block": {"inner": factor("inner")},
        "last": factor("last"),
    }
    state = TrainState(
        step=jnp.zeros((), int), params=params, batch_stats={}, opt_state=()
    )
    network = Network(ThreeScales(), (10, 1, 1))
    return first_not_finite(network, state)


def first_not_finite(network, state):
    forward = functools.partial(loop.forward, network)
    return diagnosis.first_not_finite(forward, state, BATCH)


@pytest.mark.parametrize("value", [jnp.inf, -1.0])
def test_first_layer_with_activations_that_are_not_finite_is_named(value):
    activations = "the first activations that are not finite are those of"
    assert found(first=value) == f"{activations} first"
    # A layer ends before the block that it is in.
    assert found(inner=value) == f"{activations} block/inner"
    assert found(last=value) == f"{activations} last"
    assert found(last=value, inner=value) == f"{activations} block/inner"


def test_loss_that_is_not_finite_is_named_where_activations_are():
    # Each image has a logit, and so a loss, of 3e38, which float32 holds; not so their
    # sum.
    expected = "all activations are finite, but not the loss that they make"
    assert found(first=3e38, inner=3e38) == expected


def test_gradient_that_is_not_finite_is_named_where_activations_are():
    # The derivative of the root of 0 is infinite.
    expected = "all activations are finite, but not the gradient of block/inner/factor"
    assert found(inner=0.0) == expected


def test_finite_activations_and_gradients_leave_the_step():
    expected = "activations and gradients are finite, but not the step that they make"
    assert found() == expected


class Lifted(nn.Module):
    """A layer that is hidden by `nn.remat`, and one that gives two arrays."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.remat(Scale)(name="first")(x.reshape(len(x), -1))
        return nn.jit(Twice)(name="last")(x)[1]


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x * self.param("factor", nn.initializers.ones, (10,))


def test_layers_inside_of_transforms_are_named():
    for name in ("first", "last"):
        params = {layer: {"factor": jnp.ones(10)} for layer in ("first", "last")}
        params[name] = {"factor": jnp.ones(10).at[3].set(jnp.inf)}
        state = TrainState(
            step=jnp.zeros((), int), params=params, batch_stats={}, opt_state=()
        )
        network = Network(Lifted(), (10, 1, 1))
        words = first_not_finite(network, state)
        assert words.endswith(f"not finite are those of {name}")
