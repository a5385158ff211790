import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.linen import BatchNorm
from bn_jax.models import make_init, resnet
from bn_jax.models.resnet import ResNet
from marks import slow_but

IMAGES = jax.random.uniform(jax.random.key(7), (8, 14, 14, 1))
LABELS = jnp.arange(8)
BN = functools.partial(BatchNorm, momentum=0.9)
# Depth 8 has each kind of block: at stride 1 and 2.
SMALL = functools.partial(ResNet, 8, width=4)
KINDS = {
    "norm": {"norm": BN},
    "plain": {},
    "fixup": {"residual": "fixup"},
    "skipinit": {"residual": "skipinit"},
}


@functools.partial(jax.jit, static_argnums=0)
def init(model):
    """Initial variables, which do not depend on the layout."""
    model = model.clone(layout="NHWC")
    return model.init(jax.random.key(0), IMAGES[:1], train=False)


shortcut = jax.jit(resnet.shortcut, static_argnums=(1, 2, 3))


def moved(variables):
    """Variables with no value left at its start, so that none can be ignored."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + np.float32(0.1 * rng.random(leaf.shape)),
        jax.device_get(variables),
    )


def loss(model, variables, params):
    logits, updates = model.apply(
        {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
    )
    log_p = jax.nn.log_softmax(logits)
    mean = -jnp.mean(jnp.take_along_axis(log_p, LABELS[:, None], 1))
    return mean, (logits, updates)


@functools.partial(jax.jit, static_argnums=0)
def gradient_step(model, variables, params):
    gradient = jax.value_and_grad(functools.partial(loss, model), 1, has_aux=True)
    return gradient(variables, params)


@functools.partial(jax.jit, static_argnums=0)
def descend(model):
    """The initial variables, and losses and updates of 15 steps from there."""
    variables = init(model)

    def step(params, _):
        (value, (_, updates)), gradients = gradient_step(model, variables, params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        return params, (value, updates)

    return variables, jax.lax.scan(step, variables["params"], length=15)[1]


@pytest.mark.parametrize("depth", slow_but([8, 20], [8, 20, 56, 110]))
def test_parameter_counts_are_the_papers(depth):
    # At n = (depth - 2) / 6: kernels 9 * 3 * 16 of the stem; 2n of 9 * 16^2; 9 * 16 *
    # 32 and 2n - 1 of 9 * 32^2; 9 * 32 * 64 and 2n - 1 of 9 * 64^2. Scales and biases
    # of 16 + 2n (16 + 32 + 64) features. The head, 64 * 10 + 10. In sum 97,216n -
    # 21,926: 269,722 for 20 layers, 853,018 for 56 and 1,727,962 for 110, which the
    # paper's table 6 rounds to 0.27M, 0.85M and 1.7M.
    n = (depth - 2) // 6
    variables = jax.eval_shape(
        functools.partial(ResNet(depth, norm=BN).init, train=False),
        jax.random.key(0),
        jnp.ones((1, 32, 32, 3)),
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == 97_216 * n - 21_926
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1]
    assert len(kernels) == depth


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["norm", "fixup"])  # one of each class of blocks
def test_layouts_give_the_same_logits_gradients_and_statistics(kind):
    variables = moved(init(SMALL(**KINDS[kind])))
    results = [
        gradient_step(
            SMALL(**KINDS[kind], layout=layout), variables, variables["params"]
        )
        for layout in ("NHWC", "CHWN")
    ]
    scale = max(1, *(float(jnp.abs(a).max()) for a in jax.tree.leaves(results[0])))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "layout"),
    slow_but(
        [("norm", "CHWN")],
        [("fixup", "NHWC"), *((kind, "CHWN") for kind in KINDS)],
    ),
)
def test_steps_lower_the_loss_and_norms_move_their_statistics(kind, layout):
    variables, (losses, updates) = jax.device_get(
        descend(SMALL(**KINDS[kind], layout=layout))
    )
    assert losses[-1] < losses[0] - 0.05
    assert ("batch_stats" in updates) == (kind == "norm")
    if kind == "norm":
        for old, new in zip(
            jax.tree.leaves(variables["batch_stats"]),
            jax.tree.leaves(updates["batch_stats"]),
            strict=True,
        ):
            assert np.abs(new[-1] - old).max() > 1e-4


def test_convolutions_have_a_bias_where_no_norm_follows():
    def biased(**options):
        params = jax.eval_shape(init, SMALL(**options))["params"]
        convs = [params["stem"], *params["stage2_block1"].values()]
        return {"bias" in c for c in convs if isinstance(c, dict) and "kernel" in c}

    assert biased(norm=BN) == biased(residual="fixup") == {False}
    assert biased() == biased(residual="skipinit") == {True}


@pytest.mark.parametrize("layout", slow_but(["CHWN"], ["NHWC", "CHWN"]))
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_fixup_and_skipinit_start_as_their_shortcuts(stride, layout):
    shape = {"N": 2, "H": 6, "W": 5, "C": 4}
    x = np.random.default_rng(0).random([shape[axis] for axis in layout], np.float32)
    expected = shortcut(x, 4 * stride, stride, layout)
    if stride == 1:
        np.testing.assert_array_equal(expected, x)
    for block in (
        resnet.FixupBlock(4 * stride, stride, layout, num_blocks=9),
        resnet.ResidualBlock(4 * stride, stride, layout, skip_init=True),
    ):
        variables = jax.jit(block.init)(jax.random.key(1), x)
        apply = jax.jit(block.apply)
        np.testing.assert_array_equal(apply(variables, x), expected)
        # And they do not stay so.
        later = apply(moved(variables), x)
        assert np.abs(np.subtract(later, expected)).max() > 1e-3


@pytest.mark.slow
def test_a_resnet_of_110_layers_takes_a_step():
    model = ResNet(110, width=2, norm=BN)
    images, labels = IMAGES[:4, :4, :4], LABELS[:4]
    variables = make_init(model, images.shape[1:])(jax.random.key(0))

    def loss(params):
        logits, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        log_p = jax.nn.log_softmax(logits)
        mean = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))
        return mean, updates

    gradients, updates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    kernels = [leaf for leaf in jax.tree.leaves(gradients) if leaf.ndim > 1]
    assert len(kernels) == 110
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in kernels)
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(updates["batch_stats"]),
        strict=True,
    ):
        assert jnp.abs(new - old).max() > 1e-4


def test_shortcut_subsamples_and_adds_channels_of_zeros():
    x = np.arange(1, 16, dtype=np.float32).reshape(1, 3, 5, 1)
    y = np.asarray(shortcut(x, 2, 2, "NHWC"))
    assert y.shape == (1, 2, 3, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 3, 5], [11, 13, 15]])
    assert not y[..., 1].any()


def test_windows_at_stride_2_are_centred_on_the_shortcuts_pixels():
    x = np.random.default_rng(0).random((1, 6, 8, 1), np.float32)
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    conv = resnet.conv3x3(1, layout="NHWC", strides=2, use_bias=False)
    y = jax.jit(conv.apply)({"params": {"kernel": centre}}, x)
    np.testing.assert_array_equal(y, shortcut(x, 1, 2, "NHWC"))


@pytest.mark.slow
def test_kernels_start_from_hes_distribution_and_fixups_from_a_smaller_one():
    # Standard deviations sqrt(2 / (9 * 16)), and over sqrt(9) of 9 blocks.
    he = np.sqrt(2 / 144)
    plain = init(ResNet(20, norm=BN))["params"]["stage1_block2"]
    np.testing.assert_allclose(plain["conv1"]["kernel"].std(), he, rtol=0.06)
    np.testing.assert_allclose(plain["conv2"]["kernel"].std(), he, rtol=0.06)
    params = init(ResNet(20, residual="fixup"))["params"]
    block = params["stage1_block2"]
    np.testing.assert_allclose(block["conv1"]["kernel"].std(), he / 3, rtol=0.06)
    assert not block["conv2"]["kernel"].any()
    assert not params["head"]["kernel"].any()


@pytest.mark.slow
def test_prediction_of_an_image_does_not_depend_on_its_company():
    model = SMALL(norm=BN)
    variables = moved(init(model))
    predict = jax.jit(functools.partial(model.apply, train=False))
    together = predict(variables, IMAGES)
    assert together.shape == (8, 10)
    np.testing.assert_allclose(
        predict(variables, IMAGES[3:4])[0], together[3], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, "depth=18; expected 6n"),
        ({"depth": 2}, "depth=2; expected 6n"),
        ({"residual": "rezero"}, "residual='rezero'.*plain.*fixup.*skipinit"),
        ({"residual": "fixup", "norm": BN}, "place of a norm.*give norm=none"),
        ({"layout": "NCHW"}, "layout='NCHW'"),
    ],
)
def test_bad_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**options).init(jax.random.key(0), IMAGES, train=False)
