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


def trained_like(model):
    """Variables with no value left at its start, so that none can be ignored."""
    init = jax.jit(functools.partial(model.init, train=False))
    leaves, tree = jax.tree.flatten(init(jax.random.key(0), IMAGES[:1]))
    rng = np.random.default_rng(1)
    leaves = [leaf + np.float32(0.1 * rng.random(leaf.shape)) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


def loss_and_statistics(model, variables, params, images=IMAGES):
    logits, updates = model.apply(
        {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
    )
    return jnp.mean(logits**2), updates


def gradients(model, variables, images=IMAGES):
    loss = functools.partial(loss_and_statistics, model, variables, images=images)
    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


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
    model = LeNet(norm=BN, layout=layout)
    variables = trained_like(model)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply)(variables, IMAGES)
    expected = jax.jit(chapter_lenet)(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_parameter_counts_are_the_chapters():
    # Weights 150 + 2,400 + 30,720 + 10,080 + 840, biases 226 before a norm and 10 of
    # the last layer, and gamma and beta of 226 features.
    with_norm = trained_like(LeNet(norm=BN))
    assert count(with_norm) == 44_190 + 226 + 10 + 2 * 226
    assert count(trained_like(LeNet(norm=BN, bias_before_norm=False))) == (
        count(with_norm) - 226
    )
    assert count(trained_like(LeNet(bias_before_norm=False))) == 44_190 + 226 + 10


@pytest.mark.slow
def test_layouts_give_the_same_loss_gradients_and_statistics():
    variables = trained_like(LeNet(norm=BN))
    results = [
        gradients(LeNet(norm=BN, layout=layout), variables)
        for layout in ("NHWC", "CHWN")
    ]
    chex.assert_trees_all_close(*results, atol=1e-5)


@pytest.mark.parametrize(
    "axis_type",
    slow_but([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit]),
    ids=str,
)
def test_images_sharded_over_a_mesh_are_the_big_batch(axis_type, devices):
    model = LeNet(norm=BN, layout="CHWN")
    variables = trained_like(model)
    mesh = jax.make_mesh((4,), ("d",), (axis_type,), devices=devices[:4])
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("d")))
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        sharded = jax.jit(gradients, static_argnums=0)(model, everywhere, images)
    expected = gradients(model, variables)
    chex.assert_trees_all_close(jax.device_get(sharded), expected, atol=1e-5)


def test_flaxs_own_norm_gives_the_same_gradients_and_statistics():
    variables = trained_like(LeNet(norm=BN))
    ours = gradients(LeNet(norm=BN), variables)
    theirs = gradients(
        LeNet(norm=functools.partial(nn.BatchNorm, momentum=0.9)), variables
    )
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_bias_before_a_norm_changes_nothing_and_receives_no_gradient():
    model = LeNet(norm=BN)
    variables = trained_like(model)
    params = traverse_util.flatten_dict(variables["params"])
    before_norm = [(layer, "bias") for layer in ("conv1", "conv2", "dense1", "dense2")]
    moved = {**params, **{path: params[path] + 3 for path in before_norm}}
    loss, _ = loss_and_statistics(model, variables, variables["params"])
    moved_loss, _ = loss_and_statistics(
        model, variables, traverse_util.unflatten_dict(moved)
    )
    np.testing.assert_allclose(moved_loss, loss, atol=1e-5)
    flat = traverse_util.flatten_dict(gradients(model, variables)[0])
    for path in before_norm:
        assert jnp.abs(flat[path]).max() < 1e-6
        assert jnp.abs(flat[(path[0], "kernel")]).max() > 1e-4


def test_kernels_start_from_xaviers_uniform_distribution():
    params = LeNet().init(jax.random.key(0), IMAGES[:1], train=False)["params"]
    for layer, fans in {"conv2": 25 * (6 + 16), "dense1": 256 + 120}.items():
        bound = np.sqrt(6 / fans)
        kernel = params[layer]["kernel"]
        assert jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
        assert not params[layer]["bias"].any()


def test_prediction_of_an_image_does_not_depend_on_its_company():
    model = LeNet(norm=BN)
    variables = trained_like(model)
    together = model.apply(variables, IMAGES, train=False)
    alone = model.apply(variables, IMAGES[3:4], train=False)
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
