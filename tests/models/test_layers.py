import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from bn_jax.models import layers

# (c_in, c_out, height, width, kernel height, kernel width, batch): LeNet's two, and
# sizes that no block divides.
SHAPES = [
    (1, 6, 28, 28, 5, 5, 3),
    (6, 16, 12, 12, 5, 5, 2),
    (1, 2, 7, 9, 3, 3, 2),
    (3, 4, 8, 5, 3, 2, 1),
    (2, 3, 5, 5, 5, 5, 4),
    (2, 1, 4, 6, 1, 1, 2),
]


def reference(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("CHWN", "HWIO", "CHWN")
    )


def inputs(shape):
    c_in, c_out, h, w, kh, kw, n = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (c_in, h, w, n))
    kernel = jax.random.normal(keys[1], (kh, kw, c_in, c_out))
    cotangent = jax.random.normal(keys[2], reference(x, kernel).shape)
    return x, kernel, cotangent


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_by_blocks_equals_xlas_in_values_and_gradients(shape):
    x, kernel, cotangent = inputs(shape)
    y, pull = jax.vjp(layers.conv2d_by_blocks, x, kernel)
    y_ref, pull_ref = jax.vjp(reference, x, kernel)
    np.testing.assert_allclose(y, y_ref, atol=1e-4)
    for ours, theirs in zip(pull(cotangent), pull_ref(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_conv_by_blocks_supports_forward_mode_and_vmap():
    x, kernel, _ = inputs(SHAPES[2])
    _, tangent = jax.jvp(layers.conv2d_by_blocks, (x, kernel), (x, kernel))
    # The product rule of a bilinear map at (x, k) along (x, k) is twice its value.
    np.testing.assert_allclose(tangent, 2 * reference(x, kernel), atol=1e-4)
    kernels = jnp.stack([kernel, 2 * kernel])
    mapped = jax.vmap(layers.conv2d_by_blocks, (None, 0))(x, kernels)
    np.testing.assert_allclose(mapped[1], 2 * reference(x, kernel), atol=1e-4)


def test_conv_agrees_between_layouts():
    x, kernel, _ = inputs(SHAPES[1])
    batch_last = layers.conv2d(x, kernel, "CHWN")
    channels_last = layers.conv2d(layers.to_nhwc(x, "CHWN"), kernel, "NHWC")
    np.testing.assert_allclose(
        layers.to_nhwc(batch_last, "CHWN"), channels_last, atol=1e-4
    )


def test_conv_module_is_flaxs_valid_convolution_in_either_layout():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    theirs = nn.Conv(4, (3, 3), padding="VALID", bias_init=nn.initializers.normal())
    variables = theirs.init(jax.random.key(1), x)
    for layout in ("NHWC", "CHWN"):
        ours = layers.Conv(4, (3, 3), layout=layout)
        y = ours.apply(variables, layers.from_nhwc(x, layout))
        np.testing.assert_allclose(
            layers.to_nhwc(y, layout), theirs.apply(variables, x), atol=1e-5
        )


@pytest.mark.parametrize("layout", ["NHWC", "CHWN"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_avg_pool_is_flaxs(layout, size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    y = layers.avg_pool_2x2(layers.from_nhwc(x, layout), layout)
    expected = nn.avg_pool(x, (2, 2), strides=(2, 2))
    np.testing.assert_allclose(layers.to_nhwc(y, layout), expected, atol=1e-6)


def test_layouts_are_permutations_that_undo_each_other():
    x = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert layers.from_nhwc(x, "CHWN").shape == (5, 3, 4, 2)
    for layout in ("NHWC", "CHWN"):
        np.testing.assert_array_equal(
            layers.to_nhwc(layers.from_nhwc(x, layout), layout), x
        )


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(
            layers.conv2d, jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1))
        ),
        functools.partial(layers.avg_pool_2x2, jnp.ones((1, 3, 3, 1))),
        functools.partial(layers.from_nhwc, jnp.ones((1, 3, 3, 1))),
        layers.feature_axis,
    ],
)
def test_unknown_layout_is_refused_with_those_that_there_are(call):
    with pytest.raises(ValueError, match=r"layout='NCHW'.*NHWC.*CHWN"):
        call("NCHW")
