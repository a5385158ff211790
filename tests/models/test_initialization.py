import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bn_jax import models
from bn_jax.linen import BatchNorm
from bn_jax.models import initialization
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from bn_jax.models.resnet import ResNet
from marks import rounding_of_plain_code

BN = functools.partial(BatchNorm, momentum=0.9)


class Lifted(nn.Module):
    """Parameters in a scan, which draws those of all layers together."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        LeNet(norm=BN),
        MLP((5, 5, 5), norm=BN),
        ResNet(14, width=3, norm=BN),
        Lifted(),
    ],
    ids=["lenet", "mlp", "resnet", "lifted"],
)
@pytest.mark.parametrize("limit", [0, 1_000], ids=["one by one", "at once"])
def test_initial_variables_are_those_of_model_init_bit_for_bit(
    model, limit, monkeypatch
):
    monkeypatch.setattr(initialization, "_MAX_COMPILED_TOGETHER", limit)
    shape = (28, 28, 1) if isinstance(model, LeNet) else (3, 3, 1)
    init = models.make_init(model, shape)
    expected = jax.jit(functools.partial(model.init, train=False))
    for seed in (0, 1):
        key = jax.random.key(seed)
        variables = expected(key, jnp.zeros((1, *shape)))
        rtol = rounding_of_plain_code() if isinstance(model, Lifted) else 0
        chex.assert_trees_all_close(
            init(key), {"batch_stats": {}, **variables}, rtol=rtol
        )
