"""What every model of the table does, and how its options are written."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import linen, models
from bn_jax.fields import ConfigError
from bn_jax.folding import fold
from bn_jax.linen import BatchNorm
from bn_jax.measures.layer_calls import layer_calls
from bn_jax.measures.population import exact_statistics
from bn_jax.models import layers
from marks import slow_but

IMAGES = np.random.default_rng(3).random((8, 16, 16, 2), np.float32)
BN = functools.partial(BatchNorm, momentum=0.9)
NAMES = [
    "lenet",
    "mlp:widths=6x5",
    "resnet:depth=8,width=2",
    "imagenet_resnet:depth=18,width=4",
]


def make(name, **given):
    return models.MODELS.make(name, **{"norm": BN, "num_classes": 3, **given})


@functools.cache
def moved(name, norm=BN):
    """Variables with no value left at its start, variances positive."""
    model = make(name, norm=norm, layout="NHWC")  # which changes no variable
    init = jax.jit(functools.partial(model.init, train=False))
    variables = jax.device_get(init(jax.random.key(0), IMAGES[:1]))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + np.float32(0.3 * rng.random(leaf.shape)), variables
    )


@functools.partial(jax.jit, static_argnums=0)
def predict(model, variables, x):
    return model.apply(variables, x, train=False)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, x, rngs=None):
    return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)


# LeNet's folding has tests of its own.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_model_folds(name):
    model, variables = make(name), moved(name)
    apply = functools.partial(model.apply, train=False)
    without = make(name, norm=None)
    folded = fold(apply, variables, IMAGES[:2], without_norms=without)
    plain = predict(without, {"params": folded}, IMAGES)
    expected = predict(model, variables, IMAGES)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(plain, expected, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exact_statistics_are_those_of_one_batch_of_all_examples(name):
    # After a step of momentum 0 the averages are the batch's statistics.
    momentum_0 = make(name, norm=functools.partial(BatchNorm, momentum=0.0))
    variables = moved(name)
    expected = train(momentum_0, variables, IMAGES)[1]["batch_stats"]
    apply = functools.partial(make(name).apply, train=False)
    exact = exact_statistics(apply, variables, IMAGES, batch_size=4)
    chex.assert_trees_all_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (
        len(layer_calls(apply, variables, IMAGES))
        == len(jax.tree.leaves(expected)) // 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet", "resnet:depth=8,width=2"])
def test_ghost_batches_are_cut_along_the_examples_in_every_layout(name):
    variables = moved(name)
    ghosts = functools.partial(BN, ghost_batch_size=4)
    model = make(name, layout="NHWC")
    halves = [train(model, variables, IMAGES[i : i + 4])[0] for i in (0, 4)]
    expected = np.concatenate(halves)
    scale = np.abs(expected).max()
    for layout in ("NHWC", "CHWN"):
        logits, _ = train(make(name, norm=ghosts, layout=layout), variables, IMAGES)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "name", slow_but(NAMES[1:2], [*NAMES, "resnet:depth=8,width=2,residual=fixup"])
)
def test_bfloat16_computes_near_float32_and_keeps_float32_at_both_ends(name):
    norm = None if "fixup" in name else BN
    full = make(name, norm=norm, layout="NHWC")
    half = make(name, norm=norm, dtype=jnp.bfloat16)
    init = functools.partial(half.init, train=False)
    shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), IMAGES[:1]))
    assert {leaf.dtype for leaf in shapes} == {jnp.dtype("float32")}
    variables = moved(name, norm)
    (a, _), (b, _) = jax.device_get(
        [train(model, variables, IMAGES) for model in (full, half)]
    )
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.2 * np.abs(a).max()
    jaxpr = jax.make_jaxpr(functools.partial(half.apply, train=False))
    products = [
        line
        for line in str(jaxpr(variables, IMAGES)).splitlines()
        if "dot_general[" in line or "conv_general_dilated[" in line
    ]
    assert products and all(":bf16[" in line for line in products)


class Normalise(nn.Module):
    @nn.compact
    def __call__(self, x, norm, axis, batch_axis):
        layer = layers.norm_layer(
            norm, train=True, axis=axis, batch_axis=batch_axis, name="norm"
        )
        return layer(x)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def normalised(x, norm, axis, batch_axis):
    """The output of a new norm."""
    key = jax.random.key(0)
    return Normalise().init_with_output(key, x, norm, axis, batch_axis)[0]


def test_norms_of_flax_that_know_no_axis_get_features_last():
    x = np.random.default_rng(0).normal(size=(4, 3, 3, 6)).astype(np.float32)
    swapped = x.transpose(3, 1, 2, 0)
    for norm in (nn.LayerNorm, functools.partial(nn.GroupNorm, num_groups=2)):
        direct, _ = jax.jit(norm().init_with_output)(jax.random.key(0), x)
        expected = normalised(x, norm, -1, 0)
        np.testing.assert_array_equal(expected, direct)
        y = np.asarray(normalised(swapped, norm, 0, 3))
        np.testing.assert_allclose(y.transpose(3, 1, 2, 0), expected, atol=1e-6)
    with pytest.raises(TypeError, match="norm='layer'; expected a constructor"):
        normalised(x, "layer", -1, 0)


def test_digits_choose_the_layers_with_a_norm():
    def norms(name):
        shapes = jax.eval_shape(
            functools.partial(make(name).init, train=False), jax.random.key(0), IMAGES
        )
        return sorted(shapes["batch_stats"])

    assert norms("lenet:norm_layers=0101") == ["norm2", "norm4"]
    assert norms("mlp:widths=4x4x4,norm_layers=110") == ["norm1", "norm2"]


def test_traced_switches_of_an_mlp_are_its_digits():
    name = "mlp:widths=6x5,bias_before_norm=true"
    variables = moved(name)

    @jax.jit
    def by_array(switches):
        model = make(name, norm_layers=switches)
        return model.apply(variables, IMAGES, train=False)

    for digits in ("10", "01"):
        switches = np.array([digit == "1" for digit in digits])
        expected = predict(make(f"{name},norm_layers={digits}"), variables, IMAGES)
        np.testing.assert_allclose(by_array(switches), expected, atol=1e-6)


def test_dropout_of_an_mlp_drops_in_training_alone():
    model, variables = make("mlp:widths=6x5,dropout_rate=0.5"), moved("mlp:widths=6x5")
    plain = make("mlp:widths=6x5")
    np.testing.assert_array_equal(
        predict(model, variables, IMAGES), predict(plain, variables, IMAGES)
    )
    dropped, _ = train(model, variables, IMAGES, {"dropout": jax.random.key(0)})
    expected, _ = train(plain, variables, IMAGES)
    assert np.abs(np.subtract(dropped, expected)).max() > 1e-2


def test_gammas_of_lenet_may_start_from_draws():
    def gammas(name, norm="batch_norm"):
        model = make(name, norm=linen.norm(norm))
        variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
        return [variables["params"][f"norm{i}"]["scale"] for i in (1, 2, 3, 4)]

    for gamma in gammas("lenet"):
        np.testing.assert_array_equal(gamma, 1.0)
    for gamma in gammas("lenet:gamma=uniform"):
        assert 0 <= gamma.min() < gamma.max() < 1
    # 120 draws have a mean of .5, with a deviation of .026.
    assert gammas("lenet:gamma=uniform")[2].mean() == pytest.approx(0.5, abs=0.1)
    (last,) = gammas("lenet:gamma=uniform", "layer")[3:]
    assert 0 <= last.min() < last.max() < 1
    for norm in (None, lambda name: None):
        with pytest.raises(ConfigError, match="gamma=uniform draws.*no scale_init"):
            make("lenet:gamma=uniform", norm=norm)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_have_the_names_that_options_take(name):
    model = make(f"mlp:widths=4,activation={name}")
    assert model.activation is layers.ACTIVATIONS[name]
    assert make("lenet").activation is jax.nn.sigmoid


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet5", "model='lenet5'; expected one of lenet, mlp, resnet, image"),
        ("lenet:norm_layers=011", "norm_layers=011; expected four digits"),
        ("lenet:norm_layers=0112", "norm_layers=0112; expected four digits"),
        ("lenet:dropout_rate=1", "dropout_rate=1; expected a number in"),
        ("lenet:first_padding=-1", "first_padding=-1; expected an integer 0 or"),
        ("lenet:activation=softplus", "activation=softplus; expected one of sigmoid"),
        ("mlp:widths=5x", "widths=5x; expected values with x between"),
        ("mlp:widths=5x0", "widths=5x0; expected values with x between.*at least 1"),
        ("mlp:widths=5x5,norm_layers=111", "norm_layers has 3 digits; expected 2"),
        ("resnet:depth=18", "depth=18; expected 6n"),
        ("imagenet_resnet:depth=20", "depth=20; expected one of 18, 34, 50"),
        ("resnet:width=0", "width=0; expected an integer at least 1"),
        ("resnet:residual=rezero", "residual=rezero; expected one of plain, fixup"),
        (
            "resnet:residual=fixup",
            "residual=fixup takes the place of a norm.*norm=none",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        make(name)
    assert "\n" not in str(refusal.value)
