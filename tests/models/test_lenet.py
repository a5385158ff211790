import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from marks import slow_but

IMAGES = jax.random.uniform(jax.random.key(7), (16, 28, 28, 1))
BN = functools.partial(BatchNorm, momentum=0.9)
MODEL = LeNet(norm=BN, layout="CHWN")


@functools.cache
def initial():
    """Variables of `MODEL`, which do not depend on the layout."""
    model = LeNet(norm=BN, layout="NHWC")
    init = jax.jit(functools.partial(model.init, train=False))
    return jax.device_get(init(jax.random.key(0), IMAGES[:1]))


def trained_like():
    """Variables with no value left at its start, so that none can be ignored."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + np.float32(0.1 * rng.random(leaf.shape)), initial()
    )


def loss_and_statistics(model, variables, params, images):
    logits, updates = model.apply(
        {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
    )
    return jnp.mean(logits**2), updates


@functools.partial(jax.jit, static_argnums=0)
def gradient_step(model, variables, images):
    """The loss, statistics and gradients."""
    loss = functools.partial(loss_and_statistics, model, variables, images=images)
    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def chapter_lenet(variables, x):
    """The chapter's training-mode forward pass, written out a second time."""
    p = variables["params"]

    def bn_sigmoid(x, norm, axes):
        standard = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)
        return 1 / (1 + jnp.exp(-(standard * norm["scale"] + norm["bias"])))

    def conv_bn_pool(x, conv, norm):
        x = lax.conv_general_dilated(
            x,
            conv["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = bn_sigmoid(x + conv["bias"], norm, (0, 1, 2))
        return (
            x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]
        ) / 4

    x = conv_bn_pool(x, p["conv1"], p["norm1"])
    x = conv_bn_pool(x, p["conv2"], p["norm2"])
    x = x.reshape(len(x), 256)
    for dense, norm in (("dense1", "norm3"), ("dense2", "norm4")):
        x = bn_sigmoid(x @ p[dense]["kernel"] + p[dense]["bias"], p[norm], 0)
    return x @ p["dense3"]["kernel"] + p["dense3"]["bias"]


@pytest.mark.parametrize("layout", slow_but(["CHWN"], ["NHWC", "CHWN"]))
def test_lenet_is_the_chapters(layout):
    model, variables = LeNet(norm=BN, layout=layout), trained_like()
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply)(variables, IMAGES)
    expected = jax.jit(chapter_lenet)(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def num_parameters(model):
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), IMAGES[:1])
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_parameter_counts_are_the_chapters():
    # Weights 150 + 2,400 + 30,720 + 10,080 + 840, biases 226 before a norm and 10 of
    # the last layer, and gamma and beta of 226 features.
    with_norm = 44_190 + 226 + 10 + 2 * 226
    assert num_parameters(LeNet(norm=BN)) == with_norm
    assert num_parameters(LeNet(norm=BN, bias_before_norm=False)) == with_norm - 226
    assert num_parameters(LeNet(bias_before_norm=False)) == 44_190 + 226 + 10


@pytest.mark.slow
def test_layouts_give_the_same_loss_gradients_and_statistics():
    results = [
        gradient_step(LeNet(norm=BN, layout=layout), trained_like(), IMAGES)
        for layout in ("NHWC", "CHWN")
    ]
    chex.assert_trees_all_close(*results, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_images_sharded_over_a_mesh_are_the_big_batch(axis_type, devices):
    variables = trained_like()
    mesh = jax.make_mesh((4,), ("d",), (axis_type,), devices=devices[:4])
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("d")))
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        sharded = gradient_step(MODEL, everywhere, images)
    expected = gradient_step(MODEL, variables, IMAGES)
    chex.assert_trees_all_close(jax.device_get(sharded), expected, atol=1e-5)


@pytest.mark.slow
def test_flaxs_own_norm_gives_the_same_gradients_and_statistics():
    flaxs = MODEL.clone(norm=functools.partial(nn.BatchNorm, momentum=0.9))
    ours = gradient_step(MODEL, trained_like(), IMAGES)
    theirs = gradient_step(flaxs, trained_like(), IMAGES)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_bias_before_a_norm_changes_nothing_and_receives_no_gradient():
    variables = trained_like()
    params = traverse_util.flatten_dict(variables["params"])
    before_norm = [(layer, "bias") for layer in ("conv1", "conv2", "dense1", "dense2")]
    moved = {**params, **{path: params[path] + 3 for path in before_norm}}
    moved = {**variables, "params": traverse_util.unflatten_dict(moved)}
    (loss, _), gradients = gradient_step(MODEL, variables, IMAGES)
    (moved_loss, _), _ = gradient_step(MODEL, moved, IMAGES)
    np.testing.assert_allclose(moved_loss, loss, atol=1e-5)
    flat = traverse_util.flatten_dict(jax.device_get(gradients))
    for path in before_norm:
        assert np.abs(flat[path]).max() < 1e-6
        assert np.abs(flat[(path[0], "kernel")]).max() > 1e-4


def test_kernels_start_from_xaviers_uniform_distribution():
    params = initial()["params"]
    for layer, fans in {"conv2": 25 * (6 + 16), "dense1": 256 + 120}.items():
        bound = np.sqrt(6 / fans)
        kernel = params[layer]["kernel"]
        assert np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
        assert not params[layer]["bias"].any()


def test_prediction_of_an_image_does_not_depend_on_its_company():
    variables = trained_like()
    predict = jax.jit(functools.partial(MODEL.apply, train=False))
    together = predict(variables, IMAGES)
    alone = predict(variables, IMAGES[3:4])
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
