"""Bytes that a model was not trained on are refused, where its numbers would be off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax.linen import BatchNorm
from bn_jax.measures.gap import gap
from bn_jax.measures.population import batch_moments, exact_statistics
from bn_jax.measures.uncertainty import monte_carlo_batch_norm
from bn_jax.nnx import BatchNorm as NnxBatchNorm
from bn_jax.training.inputs import to_float
from bn_jax.training.state import Network

IMAGES = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4, 1)
LABELS = np.arange(6) % 3


class Net(nn.Module):
    """What comes before the first kernel differs."""

    first: object = lambda x: x

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(2, (3, 3))(self.first(x))
        x = BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class OwnNnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = NnxBatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x)).mean((1, 2))


def variables_of(model):
    return model.init(jax.random.key(0), IMAGES / 255)


TOOLS = {
    "gap": lambda model, v, x: gap(model, v, x, LABELS, measure_on=x, batch_size=3),
    "gap, measured": lambda model, v, x: gap(
        model, v, IMAGES / 255, LABELS, measure_on=x, batch_size=3
    ),
    "exact_statistics": lambda model, v, x: exact_statistics(model, v, x, batch_size=3),
    "batches": lambda model, v, x: exact_statistics(model, v, [x[:3], x[3:]]),
    "batch_moments": batch_moments,
    "monte_carlo": lambda model, v, x: monte_carlo_batch_norm(
        model, v, x, x, jax.random.key(0), num_passes=1, batch_size=3
    ),
    "monte_carlo, predicted": lambda model, v, x: monte_carlo_batch_norm(
        model, v, x, IMAGES / 255, jax.random.key(0), num_passes=1, batch_size=3
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_bytes_are_refused_where_the_model_does_not_scale_them(tool):
    model = Net()
    with pytest.raises(ValueError, match=r"inputs are bytes, .* inputs / 255, or in"):
        TOOLS[tool](model, variables_of(model), IMAGES)


FIRST = {
    "reshape": lambda x: x.reshape(len(x), 2, 8, 1),
    "jit": jax.jit(lambda x: jnp.flip(x.astype(jnp.float32), 1)),
    "pooling": lambda x: nn.max_pool(x.astype(jnp.float32), (2, 2)),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c, y), 0, x)[1],
    "as integers": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    # What a model does with numbers in [0, 1] that it was trained on.
    "centred": lambda x: 2 * x - 1.0,
    "standardised": lambda x: (x - jnp.array([0.485])) / jnp.array([0.229]),
    "mean pooling": lambda x: nn.avg_pool(x.astype(jnp.float32), (2, 2)),
    "norm": lambda x: BatchNorm(use_running_average=True)(x),
}


@pytest.mark.parametrize("first", FIRST)
def test_bytes_are_followed_to_what_is_first_computed_with_them(first):
    model = Net(FIRST[first])
    with pytest.raises(ValueError, match="inputs are bytes"):
        batch_moments(model, variables_of(model), IMAGES)


SCALED = {
    "divided": lambda x: x / 255,
    "multiplied": lambda x: x.astype(jnp.float32) * (1 / 255),
    "standardised": jax.jit(lambda x: (x.astype(jnp.float32) - 33) / 78),
    "by channel": lambda x: (x - np.array([123.7], np.float32)) / jnp.array([58.4]),
    "by example": lambda x: jax.lax.map(lambda image: image / 255, x),
    "doubled": lambda x: 2.0 * x.astype(jnp.float32) / 255 - 1,
    "of computed constants": lambda x: (
        (x.astype(jnp.float32) - 255 * jnp.asarray([0.485]))
        / (255 * jnp.asarray([0.229]))
    ),
    "negative": lambda x: -x.astype(jnp.float32) / 255,
    "embedded": lambda x: nn.Embed(256, 2)(x[..., 0]),
}


@pytest.mark.parametrize("first", SCALED)
def test_models_that_scale_bytes_themselves_take_them(first):
    model = Net(SCALED[first])
    variables = variables_of(model) if first != "embedded" else None
    if variables is None:
        variables = model.init(jax.random.key(0), IMAGES)
    found = exact_statistics(model, variables, IMAGES, batch_size=3)
    given = SCALED[first]
    if first != "embedded":
        wanted = exact_statistics(
            Net(), variables, np.asarray(given(jnp.asarray(IMAGES))), batch_size=3
        )
        np.testing.assert_allclose(
            found["BatchNorm_0"]["mean"], wanted["BatchNorm_0"]["mean"], rtol=1e-5
        )


def test_model_that_draws_random_numbers_is_refused():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

    x = np.ones((4, 3), np.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Noisy().init(keys, x)
    with pytest.raises(ValueError, match="random numbers in prediction.*not train"):
        exact_statistics(Noisy(), variables, x, batch_size=2)


def test_nnx_modules_and_functions_are_looked_through_too():
    module = OwnNnx(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inputs are bytes"):
        exact_statistics(module, None, IMAGES, batch_size=3)
    model = Net()
    predict = jax.jit(lambda variables, x: model.apply(variables, x))
    with pytest.raises(ValueError, match="inputs are bytes"):
        exact_statistics(predict, variables_of(model), IMAGES, batch_size=3)


@pytest.mark.parametrize("scale", [None, to_float])
def test_our_networks_take_bytes_and_nothing_else(scale):
    model = Net()
    options = {} if scale is None else {"scale": scale}
    network = Network(model, (4, 4, 1), **options)
    variables = variables_of(model)
    found = exact_statistics(network.predict, variables, IMAGES, batch_size=3)
    scaled = IMAGES / 255 if scale is None else IMAGES.astype(np.float32)
    wanted = exact_statistics(model, variables, scaled, batch_size=3)
    np.testing.assert_allclose(
        found["BatchNorm_0"]["var"], wanted["BatchNorm_0"]["var"], rtol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"expected bytes, .*give its model, network\."
    ):
        exact_statistics(network.predict, variables, IMAGES / 255, batch_size=3)
