import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from bn_jax.models.resnet import ResNet
from bn_jax.training.parameters import (
    TRAINED,
    kernels,
    leaf_paths,
    of_norms,
    parse_rate_factors,
    scale_by,
)

SHAPE = jax.ShapeDtypeStruct


class Dense(nn.Module):
    """A layer whose kernel has another name."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1], 3))
        return x @ weight + self.param("bias", nn.initializers.zeros, (3,))


class Users(nn.Module):
    """What a user may have: parameters of its own, and Flax's layers."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x)
        x = nn.RMSNorm()(x).reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x).mean(1)
        x = nn.PReLU()(Dense()(x))
        x = x + nn.Embed(5, 3)(jnp.zeros((), jnp.int32))
        return x * self.param("scale", nn.initializers.ones, (3,))


def params_of(model, shape=(2, 28, 28, 1)):
    images = SHAPE(shape, jnp.float32)
    key = jax.random.key(0)
    init = jax.eval_shape(lambda x: model.init(key, x, train=False), images)
    return init["params"]


def layers(params, kind):
    """The layers that have parameters of a kind; all of a norm's are."""
    chosen = jax.tree.leaves(kind(params))
    paths = leaf_paths(params)
    found = {p.rpartition("/")[0] for p, c in zip(paths, chosen, strict=True) if c}
    if kind is of_norms:
        for path, of_norm in zip(paths, chosen, strict=True):
            assert of_norm == (path.rpartition("/")[0] in found), path
    return found


def test_norms_of_every_model_are_found():
    assert layers(params_of(LeNet(norm=BatchNorm)), of_norms) == {
        f"norm{i}" for i in range(1, 5)
    }
    assert layers(params_of(MLP((5, 5), norm=BatchNorm)), of_norms) == {
        "norm1",
        "norm2",
    }
    plain = layers(params_of(ResNet(8, norm=BatchNorm)), of_norms)
    assert plain == {"stem_norm"} | {
        f"stage{i}_block1/norm{k}" for i in (1, 2, 3) for k in (1, 2)
    }
    users = layers(params_of(Users()), of_norms)
    assert users == {"BatchNorm_0", "GroupNorm_0", "LayerNorm_0", "RMSNorm_0"}


@pytest.mark.parametrize(
    "model",
    [LeNet(), MLP((5, 5)), ResNet(8, residual="fixup"), ResNet(8, residual="skipinit")],
)
def test_models_without_norms_have_none(model):
    assert layers(params_of(model), of_norms) == set()


def test_norms_are_known_by_their_parameters():
    def is_norm(**shapes):
        params = {"layer": {k: SHAPE(v, jnp.float32) for k, v in shapes.items()}}
        return any(jax.tree.leaves(of_norms(params)))

    assert is_norm(scale=(4,)) and is_norm(bias=(4,))
    assert is_norm(alpha=(), shift=(), scale=(4,), bias=(4,))  # Derf
    assert is_norm(alpha=(1,), scale=(4,))  # DyT
    assert not is_norm(scale=()) and not is_norm(negative_slope=(4,))
    assert not is_norm(kernel=(4, 4), bias=(4,)) and not is_norm(w=(4, 4), scale=(4,))


def test_kernels_are_neither_norms_nor_biases():
    params = params_of(Users())
    chosen = [
        path
        for path, is_kernel in zip(
            leaf_paths(params), jax.tree.leaves(kernels(params)), strict=True
        )
        if is_kernel
    ]
    attention = "MultiHeadDotProductAttention_0"  # biases [2, 2], of heads
    assert chosen == [
        "Conv_0/kernel",
        "Dense_0/weight",
        "Embed_0/embedding",
        *(f"{attention}/{name}/kernel" for name in ("key", "out", "query", "value")),
    ]
    assert layers(params_of(ResNet(8, residual="fixup")), kernels) == {
        "stem",
        "head",
        *(f"stage{i}_block1/conv{k}" for i in (1, 2, 3) for k in (1, 2)),
    }


PARAMS = {
    "conv": {"bias": np.ones(2), "kernel": np.ones((3, 2))},
    "block": {"norm": {"bias": np.ones(2), "scale": np.ones(2)}},
    "head": {"bias": np.ones(4), "kernel": np.ones((2, 4))},
}


def learning(text, **given):
    """The paths of parameters whose updates are not zeroed, or which ones are."""
    freeze = TRAINED.make(text, **{"seed": 0, **given})
    updates, _ = freeze.update(PARAMS, freeze.init(PARAMS))
    return dict(zip(leaf_paths(PARAMS), jax.tree.leaves(updates), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all:gamma=false", "norm/bias conv head"),
        ("all:beta=false", "norm/scale conv head"),
        ("norms", "norm"),
        ("norms:gamma=false", "norm/bias"),
        ("norms:also=head", "norm head"),
        ("norms:also=head/bias,beta=false", "norm/scale head/bias"),
    ],
)
def test_what_is_frozen_does_not_move(text, expected):
    for path, update in learning(text).items():
        learns = any(f"{part}/" in f"{path}/" for part in expected.split())
        assert (update == learns).all(), path


def test_all_learn_without_any_transformation():
    assert TRAINED.make("all", seed=0) is None
    assert TRAINED.make("all:gamma=true", seed=0, beta=True) is None


def test_gamma_and_beta_may_be_traced():
    def of_norm(gamma, beta):
        updates = learning("norms:gamma=false", gamma=gamma, beta=beta)
        return updates["block/norm/scale"], updates["block/norm/bias"]

    gamma, beta = jnp.array([True, False]), jnp.array([True, True])
    scale, bias = jax.jit(jax.vmap(of_norm))(gamma, beta)
    np.testing.assert_array_equal(scale, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(bias, np.ones((2, 2)))


def test_as_many_others_learn_as_norms_have():
    chosen = {seed: learning("random", seed=seed) for seed in (0, 1)}
    for updates in chosen.values():
        assert not updates["block/norm/scale"].any()
        assert sum(int(update.sum()) for update in updates.values()) == 4
    flat = [np.concatenate([u.ravel() for u in v.values()]) for v in chosen.values()]
    assert not np.array_equal(*flat)
    # The choice of each seed is part of results that are kept: its key, and the order
    # of the parameters.
    others = {k: PARAMS[k] for k in ("conv", "head")}
    vector, unravel = ravel_pytree(others)
    key = jax.random.fold_in(jax.random.key(1), 4)
    expected = unravel(
        (jax.random.permutation(key, vector.size) < 4).astype(vector.dtype)
    )
    for layer in others:
        for name, leaf in expected[layer].items():
            np.testing.assert_array_equal(chosen[1][f"{layer}/{name}"], leaf)


def test_as_many_of_each_channel_learn_as_norms_have():
    # One norm has 2 parameters of each of 2 channels; one kernel has 2 outputs.
    chosen = [learning("random:per_channel=true", seed=seed) for seed in range(8)]
    for updates in chosen:
        assert {path for path, u in updates.items() if u.any()} == {"conv/kernel"}
        np.testing.assert_array_equal(updates["conv/kernel"].sum(axis=0), [2, 2])
    # Every weight has its turn, in each channel apart.
    kernels = np.stack([updates["conv/kernel"] for updates in chosen])
    assert kernels.any(axis=0).all()
    assert (kernels[:, :, 0] != kernels[:, :, 1]).any()


def test_parameters_of_each_channel_may_be_chosen_by_a_traced_seed():
    def chosen(seed):
        return learning("random:per_channel=true", seed=seed)["conv/kernel"]

    seeds = jnp.arange(3)
    together = jax.jit(jax.vmap(chosen))(seeds)
    for seed in seeds:
        np.testing.assert_array_equal(together[seed], chosen(int(seed)))


def test_rates_are_scaled_by_the_first_match():
    factors = parse_rate_factors(r"^conv/bias=3;/(bias|scale)$=0.5;(?=head)=0")
    scale = scale_by(factors)
    assert scale.init(PARAMS) == optax.EmptyState()
    updates, _ = scale.update(PARAMS, optax.EmptyState())
    expected = {
        "conv/bias": 3,
        "conv/kernel": 1,
        "block/norm/bias": 0.5,
        "block/norm/scale": 0.5,
        "head/bias": 0.5,
        "head/kernel": 0,
    }
    found = dict(zip(leaf_paths(updates), jax.tree.leaves(updates), strict=True))
    for path, factor in expected.items():
        np.testing.assert_array_equal(found[path], factor)
    assert parse_rate_factors("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bias", r"'bias'.*; expected REGEX=FACTOR"),
        ("bias=fast", r"'bias=fast' \(could not convert.*\); expected REGEX=FACTOR"),
        ("(bias=1", r"'\(bias=1' \(missing \)"),
        ("=2", r"'=2'; expected"),
        ("bias=-1", r"'bias=-1'; expected.*each factor 0 or greater"),
        ("bias=nan", r"'bias=nan'; expected"),
        ("bias=1;", r"'bias=1;': ''.*; expected"),
    ],
)
def test_bad_rate_factors_are_refused_in_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse_rate_factors(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("transformation", "params", "words"),
    [
        (
            scale_by(parse_rate_factors("norm=2;gamma$=2")),
            PARAMS,
            "has 'gamma$', which matches no parameter; expected one that matches some "
            "of block/norm/bias, block/norm/scale, conv/bias,",
        ),
        (
            TRAINED.make("norms:also=dense3", seed=0),
            PARAMS,
            "also=dense3'; expected a layer of the model: block, conv, head",
        ),
        (
            TRAINED.make("norms", seed=0),
            {"conv": PARAMS["conv"]},
            "no parameters: nothing would learn; expected a norm, or a layer in also",
        ),
        (
            TRAINED.make("random", seed=0),
            {"conv": PARAMS["conv"]},
            "no parameters: nothing would learn; expected a norm",
        ),
        *(
            (
                TRAINED.make("random:per_channel=true", seed=0),
                {"block": PARAMS["block"], **layers},
                "of each of 2 channels, 2 parameters, which cannot be shared out "
                "evenly to kernels with as many outputs; expected a kernel for each",
            )
            for layers in (
                {"head": PARAMS["head"]},  # 4 outputs
                {f"conv{i}": PARAMS["conv"] for i in range(3)},  # for one norm
                {"conv": {"kernel": np.ones((1, 2))}},  # 1 weight of each
            )
        ),
    ],
)
def test_what_the_model_lacks_is_refused_in_one_line(transformation, params, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        transformation.init(params)
    assert "\n" not in str(error.value)
