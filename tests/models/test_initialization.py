import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bn_jax import models
from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from bn_jax.models.resnet import ResNet

BN = functools.partial(BatchNorm, momentum=0.9)


class Lifted(nn.Module):
    """Parameters in a scan, where none can be drawn apart from the others."""

    @nn.compact
    def __call__(self, x, train):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(4)(x), None

        scan = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan()(nn.Dense(4)(x.reshape(len(x), -1)))[0]


class FromData(nn.Module):
    """A constant array, and a parameter of another parameter."""

    @nn.compact
    def __call__(self, x, train):
        numbers = jnp.array([1.0, 2.0, 3.0])
        a = self.param("a", lambda key: numbers + jax.random.normal(key, (3,)))
        b = self.param("b", lambda key: a + jax.random.normal(key, (3,)))
        c = self.param("c", lambda key: -numbers + jax.random.normal(key, (3,)))
        return nn.Dense(3)(a + b + c + x.reshape(len(x), -1))


@pytest.mark.parametrize(
    "model",
    [
        LeNet(norm=BN),
        MLP((5, 5, 5), norm=BN),
        ResNet(14, width=3, norm=BN),
        Lifted(),
        FromData(),
    ],
    ids=["lenet", "mlp", "resnet", "lifted", "from_data"],
)
def test_initial_variables_are_those_of_model_init_bit_for_bit(model):
    shape = (28, 28, 1) if isinstance(model, LeNet) else (3, 3, 1)
    if isinstance(model, FromData):
        shape = (1, 1, 3)
    init = models.make_init(model, shape)
    expected = jax.jit(functools.partial(model.init, train=False))
    for seed in (0, 1):
        key = jax.random.key(seed)
        variables = expected(key, jnp.zeros((1, *shape)))
        chex.assert_trees_all_equal(init(key), {"batch_stats": {}, **variables})


def programs_of_random_numbers(depth):
    init = models.make_init(ResNet(depth, width=3, norm=BN), (4, 4, 1))
    return str(jax.make_jaxpr(init)(jax.random.key(0))).count("random_bits[")


def test_deeper_resnet_compiles_no_more_programs_of_random_numbers():
    # One for each shape: the stem, three stages, two first blocks, and the head.
    assert programs_of_random_numbers(20) == programs_of_random_numbers(32) == 7
