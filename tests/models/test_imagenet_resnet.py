"""The ResNets for ImageNet; tests/convert/test_networks.py compares torchvision's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.models import imagenet_resnet
from bn_jax.models.imagenet_resnet import ImageNetResNet
from marks import slow_but

IMAGES = np.random.default_rng(7).random((8, 16, 16, 2), np.float32)
LABELS = np.arange(8) % 3
BN = functools.partial(BatchNorm, momentum=0.9)
SMALL = functools.partial(
    ImageNetResNet, depth=18, norm=BN, width=2, num_classes=3, layout="NHWC"
)
pool = jax.jit(imagenet_resnet.max_pool_3x3, static_argnums=1)


@functools.cache
def init(model):
    """Initial variables, drawn by programs that kernels of one shape share."""
    images = jax.ShapeDtypeStruct((1, *IMAGES.shape[1:]), jnp.float32)
    return model.lazy_init(jax.random.key(0), images, train=False)


def shapes_of(model, shape=(64, 64, 3)):
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.ones((1, *shape)))


def loss(model, variables, params):
    logits, updates = model.apply(
        {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
    )
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, LABELS[:, None], 1)), updates


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, variables):
    of_params = functools.partial(loss, model, variables)
    return jax.value_and_grad(of_params, has_aux=True)(variables["params"])


@pytest.mark.parametrize(
    ("depth", "num_params"),
    slow_but(
        [(18, 11_689_512), (50, 25_557_032)],
        # As torchvision's documentation has them.
        [
            (18, 11_689_512),
            (34, 21_797_672),
            (50, 25_557_032),
            (101, 44_549_160),
            (152, 60_192_808),
        ],
    ),
)
def test_parameter_counts_are_torchvisions(depth, num_params):
    params = shapes_of(ImageNetResNet(depth, norm=BN))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params
    kernels = jax.tree_util.tree_leaves_with_path(params)
    kernels = [path for path, leaf in kernels if leaf.ndim > 1]
    shortcuts = [path for path in kernels if "shortcut" in jax.tree_util.keystr(path)]
    assert len(kernels) - len(shortcuts) == depth


@pytest.mark.parametrize(("depth", "expected"), [(18, False), (50, True)])
def test_the_first_stage_projects_where_it_widens(depth, expected):
    params = shapes_of(ImageNetResNet(depth, norm=BN, width=2))["params"]
    assert ("shortcut" in params["stage1"]["block1"]) == expected
    for stage in ("stage2", "stage3", "stage4"):
        assert "shortcut" in params[stage]["block1"]
        assert "shortcut" not in params[stage]["block2"]


@pytest.mark.parametrize("layout", ["NHWC", "CHWN"])
def test_max_pooling_takes_the_largest_around_every_other_pixel(layout):
    # All below 0, as a border of 0 must not win; windows are centred on rows 0, 2 and
    # columns 0, 2, 4 of
    #   -15 -14 -13 -12 -11
    #   -10  -9  -8  -7  -6
    #    -5  -4  -3  -2  -1
    x = np.arange(-15.0, 0, dtype=np.float32).reshape(1, 3, 5, 1)
    x = x.transpose(["NHWC".index(axis) for axis in layout])
    y = np.asarray(pool(x, layout))
    y = y.transpose([layout.index(axis) for axis in "NHWC"])
    assert y[0, :, :, 0].tolist() == [[-9, -7, -6], [-4, -2, -1]]


@pytest.mark.slow  # the step of other models is trained by default
def test_a_step_lowers_the_loss_and_moves_the_statistics():
    model = SMALL()
    variables = init(model)
    (before, updates), gradients = gradient(model, variables)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients) if leaf.ndim > 1)
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(updates["batch_stats"]),
        strict=True,
    ):
        assert np.abs(new - old).max() > 1e-4
    params = jax.tree.map(lambda p, g: p - 0.02 * g, variables["params"], gradients)
    (after, _), _ = gradient(model, {**variables, "params": params})
    assert after < before - 1e-3


@pytest.mark.slow
def test_layouts_give_the_same_loss_gradients_and_statistics():
    variables = init(SMALL())
    results = [gradient(SMALL(layout=layout), variables) for layout in ("NHWC", "CHWN")]
    scale = max(1, *(float(jnp.abs(a).max()) for a in jax.tree.leaves(results[0])))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.slow
def test_layouts_give_bottlenecks_the_same_predictions():
    variables = init(SMALL(depth=50))
    predict = functools.partial(
        jax.jit(ImageNetResNet.apply, static_argnames=("self", "train")), train=False
    )
    first, second = (
        predict(SMALL(depth=50, layout=layout), variables, IMAGES)
        for layout in ("NHWC", "CHWN")
    )
    np.testing.assert_allclose(first, second, atol=1e-5 * np.abs(second).max())


@pytest.mark.slow
def test_initial_values_are_distributed_as_torchvisions():
    # Of 3 x 3 kernels the deviation is sqrt(2 / fan_out), fan_out = 9 * 64, and some
    # values of a normal distribution are beyond 3 of them. Weights and biases of the
    # head are uniform in +-1 / sqrt(128), whose deviation is that over sqrt(3).
    block = imagenet_resnet.convolution(64, 3, layout="NHWC", use_bias=False)
    x = np.ones((1, 4, 4, 32), np.float32)
    kernel = jax.jit(block.init)(jax.random.key(0), x)["params"]["kernel"]
    he = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose(kernel.std(), he, rtol=0.02)
    assert np.abs(kernel).max() > 3 * he
    head = init(SMALL(width=16, num_classes=200))["params"]["head"]
    bound = 1 / np.sqrt(128)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(head[name].std(), bound / np.sqrt(3), rtol=0.1)
        assert 0.9 * bound < np.abs(head[name]).max() <= bound


@pytest.mark.slow
def test_zero_init_residual_starts_the_last_scale_of_each_block_from_0():
    params = init(SMALL(zero_init_residual=True))["params"]
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "scale" and not leaf.any()
    ]
    expected = [f"stage{s}/block{b}/norm2/scale" for s in range(1, 5) for b in (1, 2)]
    assert sorted(paths) == expected
    scale = init(SMALL())["params"]["stage1"]["block1"]["norm2"]["scale"]
    assert scale.tolist() == [1, 1]


def test_zero_init_residual_keeps_the_norms_own_options():
    model = SMALL(norm=functools.partial(BN, epsilon=0.5), zero_init_residual=True)
    tabulated = {}

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            tabulated["/".join(context.module.path)] = context.module.epsilon
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes_of(model)
    assert set(tabulated.values()) == {0.5}
    assert "stage4/block2/norm2" in tabulated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "depth=20; expected one of 18, 34, 50, 101, 152"),
        ({"layout": "NCHW"}, "layout='NCHW'"),
        ({"norm": None, "zero_init_residual": True}, "no scale_init; give norm=batch"),
        (
            {"norm": nn.LayerNorm, "zero_init_residual": True, "depth": 7},
            "depth=7; expected",
        ),
    ],
)
def test_bad_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(ImageNetResNet(**options))


def test_names_and_options_make_it():
    model = models.MODELS.make("imagenet_resnet:depth=34,width=8", norm=BN)
    assert (model.depth, model.width, model.norm) == (34, 8, BN)
    with pytest.raises(ConfigError, match="depth=20; expected one of 18, 34"):
        models.MODELS.make("imagenet_resnet:depth=20")
    with pytest.raises(ConfigError, match="takes no scale_init"):
        models.MODELS.make("imagenet_resnet:zero_init_residual=true", norm=None)


def test_images_without_pixels_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="ImageNetResNet does not fit") as refusal:
        models.check_fits(SMALL(), (0, 16, 3))
    assert "\n" not in str(refusal.value)
    models.check_fits(SMALL(), (1, 1, 3), num_classes=3)
