"""Checksums of what a network computes."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bn_jax.nnx
from bn_jax import models
from bn_jax.linen import BatchNorm
from bn_jax.training import fingerprints
from bn_jax.training.state import Network

SHAPE = (4, 4, 1)


class Net(nn.Module):
    activation: object = nn.relu
    momentum: float = 0.9
    epsilon: float = 1e-5
    dropout: float = 0.1
    kernel: object = nn.initializers.lecun_normal()
    axis_name: str | None = None
    offset: object = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(3, kernel_init=self.kernel)(x.reshape(len(x), -1))
        x = BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
        )(x)
        if self.offset is not None:
            x = x + jnp.asarray(self.offset)
        return nn.Dropout(self.dropout, deterministic=not train)(self.activation(x))


class OwnNnx(nnx.Module):
    def __init__(self, rngs, momentum=0.9):
        self.dense = nnx.Linear(16, 3, rngs=rngs)
        self.norm = bn_jax.nnx.BatchNorm(3, momentum=momentum, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x.reshape(len(x), -1)))
        return self.dropout(nnx.relu(x))


def checksums(model):
    return fingerprints.checksums(Network(models.as_model(model), SHAPE), 4)


@pytest.mark.parametrize(
    ("attributes", "differing"),
    [
        ({}, set()),
        ({"momentum": 0.99}, {"training"}),
        ({"dropout": 0.2}, {"training"}),
        ({"epsilon": 1e-3}, {"training", "prediction"}),
        ({"activation": nn.tanh}, {"training", "prediction"}),
        ({"offset": (1.0, 2.0, 3.0)}, {"training", "prediction"}),
        ({"kernel": nn.initializers.ones}, {"initialisation"}),
        ({"axis_name": "data"}, {"training", "axes"}),
    ],
)
def test_an_attribute_changes_the_programs_that_it_is_used_in(attributes, differing):
    one, other = checksums(Net()), checksums(Net(**attributes))
    assert {mode for mode in one if one[mode] != other[mode]} == differing


def test_constants_count_by_their_values():
    one, same, other = (
        checksums(Net(offset=offset))
        for offset in ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.5))
    )
    assert one == same
    assert one["prediction"] != other["prediction"]


def test_nnx_modules_are_the_same_whatever_values_and_keys_they_hold():
    made = [checksums(OwnNnx(rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    for mode in ("training", "prediction"):
        assert made[0][mode] == made[1][mode] == checksums(OwnNnx)[mode]
    other = checksums(lambda rngs: OwnNnx(rngs, momentum=0.99))
    assert other["training"] != made[0]["training"]
    assert other["prediction"] == made[0]["prediction"]


def test_precision_of_the_users_choice_changes_nothing():
    with jax.default_matmul_precision("highest"):
        highest = checksums(Net())
    assert highest == checksums(Net())


def test_numbers_of_a_program_are_by_value_and_not_by_how_python_prints_them():
    def times(value):
        return fingerprints._crc32(jax.make_jaxpr(lambda x: x * value)(1.0))

    assert times(np.float32(0.1)) != times(np.float32(np.nextafter(0.1, 1, dtype="f4")))


SCRIPT = """
from flax import nnx
from bn_jax import models
from bn_jax.linen import norm
from bn_jax.training import fingerprints
from bn_jax.training.state import Network
from bn_jax.models.mlp import MLP
import bn_jax.nnx

class Own(nnx.Module):
    def __init__(self, rngs):
        self.norm = bn_jax.nnx.BatchNorm(1, rngs=rngs)
        self.dense = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return nnx.softmax(self.dense(self.norm(x).reshape(len(x), -1)))

mlp = MLP(widths=[3, 2], norm=norm("whitening:method=zca"))
for model in (mlp, Own):
    print(fingerprints.checksums(Network(models.as_model(model), (4, 4, 1)), 4))
"""


def test_another_process_finds_the_same_checksums():
    printed = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, flags in (
            ("1", ""),
            ("2", "--xla_force_host_platform_device_count=8"),
        )
    }
    assert len(printed) == 1
    assert printed.pop().count("'training'") == 2


def test_gradients_count_where_predictions_are_the_same():
    def reversed_by(sign):
        @jax.custom_vjp
        def through(x):
            return x

        through.defvjp(lambda x: (x, None), lambda _, g: (sign * g,))
        return checksums(Net(activation=through))

    one, other = reversed_by(1.0), reversed_by(-1.0)
    assert {mode for mode in one if one[mode] != other[mode]} == {"training"}


def test_settings_for_debugging_and_speed_change_nothing():
    with jax.disable_jit():
        assert checksums(Net()) == checksums(Net())

    def scanned(unroll):
        def each(carry, x):
            return carry + x, None

        def fold_up(x):
            total, _ = jax.lax.scan(each, jnp.zeros_like(x), x[None], unroll=unroll)
            return total

        return checksums(Net(activation=fold_up))

    assert scanned(1) == scanned(2)
