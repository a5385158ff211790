import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm, norm
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from bn_jax.models.nnx_model import NnxModel
from bn_jax.nnx import norm as nnx_norm

X = jax.random.uniform(jax.random.key(0), (6, 4, 4, 1))


class NnxNet(nnx.Module):
    def __init__(self, rngs, inputs=16):
        self.dense = nnx.Linear(inputs, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x.reshape(len(x), -1))))


class Untold(nn.Module):
    def __call__(self, x):
        return x


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x.reshape(len(x), -1))
        return x + jax.random.normal(self.make_rng("dropout"), x.shape) if train else x


class Remembers(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.variable("cache", "last", lambda: x[0])
        return nn.Dense(3)(x.reshape(len(x), -1))


class Strided(nn.Module):
    """Its convolution has no outputs on small images."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(2, (5, 5), padding="VALID")(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_a_linen_module_is_a_model_and_an_nnx_module_is_wrapped():
    model = MLP()
    assert models.as_model(model) is model
    assert models.name_of(model) == "MLP"
    for source in (NnxNet, NnxNet(nnx.Rngs(0)), lambda rngs: NnxNet(rngs)):
        model = models.as_model(source)
        assert isinstance(model, NnxModel)
        assert models.as_model(model) is model
        assert models.name_of(model) == "NnxNet"
        models.check_fits(model, (4, 4, 1), num_classes=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (MLP, r"got the class MLP; give an instance of it, MLP\(...\)"),
        (Untold(), "the call of Untold takes no `train`; expected .*train=True"),
        ("lenet", "got 'lenet'; expected a Linen module, an NNX module, or"),
    ],
)
def test_what_is_no_model_is_refused(source, message):
    with pytest.raises(TypeError, match=message):
        models.as_model(source)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (LeNet(), (8, 8, 1), r"LeNet does not fit images of 8 x 8 x 1: kernel of"),
        (Strided(), (3, 3, 1), "Strided does not fit images of 3 x 3 x 1: .*larger"),
        (NnxModel(NnxNet), (5, 5, 1), "NnxNet does not fit images of 5 x 5 x 1"),
        (MLP(num_classes=7), (4, 4, 1), r"MLP returns \(2, 7\) .* shape \(2, 3\)"),
        (Remembers(), (4, 4, 1), "Remembers has the variables cache; expected none"),
    ],
)
def test_model_that_does_not_fit_is_refused_in_one_line(model, shape, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        models.check_fits(model, shape, num_classes=3)
    assert "\n" not in str(refusal.value)


class OfTwoKinds(nn.Module):
    """A batch norm of 5 features before group norms of 8 and 10."""

    groups: int

    @nn.compact
    def __call__(self, x, train):
        group = norm("group", num_groups=self.groups)
        x = norm("center")(use_running_average=not train)(nn.Dense(5)(x))
        x = group(name="first")(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(group(name="second")(nn.Dense(10)(x)))


# The common divisors of 6, 16, 120 and 84 are 1 and 2, as are those of 8 and 10.
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            LeNet(norm=norm("group:num_groups=3")),
            "num_groups=3 does not divide the 16 features of layer norm2; the group "
            "norms of LeNet have 6, 16, 84, 120 features, so give one of 1, 2",
        ),
        (
            OfTwoKinds(4),
            "num_groups=4 does not divide the 10 features of layer second; the group "
            "norms of OfTwoKinds have 8, 10 features, so give one of 1, 2",
        ),
        (
            LeNet(norm=norm("whitening:group_size=4")),
            "group_size=4 does not divide the 6 features of layer norm1; the "
            "whitening norms of LeNet have 6, 16, 84, 120 features, so give one of "
            "1, 2, or leave it out to whiten all together",
        ),
    ],
)
def test_number_of_groups_is_advised_that_fits_all_layers(model, message):
    with pytest.raises(ConfigError) as refusal:
        models.check_fits(model, (28, 28, 1))
    assert str(refusal.value) == message
    models.check_fits(LeNet(norm=norm("group:num_groups=2")), (28, 28, 1))
    models.check_fits(OfTwoKinds(2), (28, 28, 1))


def test_groups_of_an_nnx_module_are_refused_as_by_the_function():
    def made(rngs):
        return nnx.Sequential(
            nnx.Linear(3, 6, rngs=rngs), nnx_norm("group:num_groups=4")(6, rngs=rngs)
        )

    with pytest.raises(ConfigError, match="num_groups=4 does not .*; give a divisor"):
        models.check_fits(NnxModel(made), (3,))


@pytest.mark.parametrize(
    "name",
    [
        "lenet",
        "mlp:widths=5",
        "resnet:depth=8,width=2",
        "imagenet_resnet:depth=18,width=2",
    ],
)
@pytest.mark.parametrize("shape", [(16, 16, 3), (33, 20, 2)])
def test_models_take_images_of_any_size_and_channels(name, shape):
    model = models.MODELS.make(name, norm=BatchNorm, num_classes=4)
    models.check_fits(model, shape, num_classes=4)


class DropoutInside(nn.Module):
    """Dropout in a lifted transform, before a norm whose statistics it would change."""

    rate: float
    lift: bool = False

    @nn.compact
    def __call__(self, x, train):
        dropout = nn.jit(nn.Dropout) if self.lift else nn.Dropout
        x = dropout(self.rate, deterministic=not train)(x.reshape(len(x), -1))
        return BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


@pytest.mark.parametrize("lift", [False, True])
def test_logits_by_batch_are_those_of_training_without_dropout(lift):
    model, without = DropoutInside(0.5, lift), DropoutInside(0.0, lift)
    variables = without.init(jax.random.key(0), X, train=False)
    train = functools.partial(
        model.apply,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )
    dropped = train(variables, X)[0]
    logits = models.logits_by_batch(model, variables, X)
    expected, _ = without.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)
    # Training still drops: nothing of it has been cached.
    np.testing.assert_array_equal(train(variables, X)[0], dropped)
    assert jnp.abs(dropped - logits).max() > 1e-2


def test_logits_by_batch_of_an_nnx_module_drop_nothing():
    model = NnxModel(NnxNet)
    variables = model.init(jax.random.key(0), X)
    logits = models.logits_by_batch(model, variables, X)
    assert jnp.all(logits != 0)
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)


def test_noise_that_cannot_be_switched_off_is_refused():
    variables = Noisy().init(jax.random.key(0), X, train=False)
    with pytest.raises(ValueError, match="Noisy draws random numbers .* nn.Dropout"):
        models.logits_by_batch(Noisy(), variables, X)
