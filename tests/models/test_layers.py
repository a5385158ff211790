import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.linen import BatchNorm
from bn_jax.models import blocks, layers
from marks import slow_but

# (c_in, c_out, height, width, kernel height and width, stride, padding): LeNet's two,
# ResNet's, and sizes that no block divides, or that leave pixels no output sees.
ODD = (3, 4, 7, 9, (3, 3), 2, "SAME")  # odd sizes, a stride and padding
CASES = [
    (1, 6, 28, 28, (5, 5), 1, "VALID"),
    (6, 5, 12, 12, (5, 5), 1, "VALID"),
    (3, 4, 8, 5, (3, 2), 1, "SAME"),
    (16, 16, 8, 8, (3, 3), 1, "SAME"),
    (64, 3, 5, 4, (3, 3), 1, "SAME"),
    (2, 3, 9, 11, (5, 7), 1, "VALID"),
    (3, 2, 3, 3, (5, 5), 1, "SAME"),
    (3, 16, 9, 7, (1, 5), 1, ((1, 0), (0, 2))),
    (16, 32, 8, 8, (3, 3), 2, "SAME"),
    ODD,
    (1, 2, 8, 7, (5, 5), 2, "VALID"),
    (3, 2, 8, 7, (1, 1), 3, "VALID"),
    (3, 1, 11, 10, (3, 5), 3, "SAME"),
    (2, 2, 6, 9, (2, 3), (2, 1), ((2, 1), (0, 3))),
]
# One for each way to cut blocks and to take their patches.
QUICK = [CASES[i] for i in (2, 4, 5, 9, 11, 13)]
BATCH = 4


def inputs(case, dtype=np.float32):
    c_in, c_out, h, w, size, _, _ = case
    rng = np.random.default_rng(0)
    shapes = (c_in, h, w, BATCH), (*size, c_in, c_out)
    x, kernel = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    return x, kernel


@functools.cache
def convolutions(case, layout="CHWN"):
    """Ours, and XLA's by the same arguments."""
    strides, padding = case[-2:]
    pair = (strides, strides) if isinstance(strides, int) else strides
    return functools.partial(
        layers.conv2d, layout=layout, strides=strides, padding=padding
    ), functools.partial(
        lax.conv_general_dilated,
        window_strides=pair,
        padding=padding,
        dimension_numbers=(layout, "HWIO", layout),
    )


@functools.partial(jax.jit, static_argnums=0)
def everything(conv, x, kernel):
    """Value and gradients, by a cotangent with no symmetry that would hide a term."""
    y, pull = jax.vjp(conv, x, kernel)
    return y, *pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def assert_close(ours, theirs, rtol=1e-5):
    """Relative to the largest element: small ones are differences of large ones."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("case",), slow_but([(c,) for c in QUICK], [(c,) for c in CASES]), ids=str
)
def test_conv_equals_xlas_in_values_and_gradients(case, x64):
    ours, theirs = convolutions(case)
    x, kernel = inputs(case, np.float64)
    assert_close(everything(ours, x, kernel), everything(theirs, x, kernel), 1e-12)


@pytest.mark.slow
def test_conv_in_float32_equals_xlas_and_stays_float32():
    ours, theirs = convolutions(CASES[3])
    x, kernel = inputs(CASES[3])
    got = everything(ours, x, kernel)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.float32)}
    assert_close(got, everything(theirs, x, kernel))


@pytest.mark.parametrize(
    ("case", "b"),
    slow_but([(CASES[2], 4), (ODD, 3)], [(CASES[2], 4), (ODD, 2), (ODD, 3)]),
    ids=str,
)
def test_size_of_the_blocks_changes_no_number(case, b, x64, monkeypatch):
    ours, theirs = convolutions(case)
    x, kernel = inputs(case, np.float64)
    monkeypatch.setattr(blocks, "_block_size", lambda *unused: b)
    fresh = functools.partial(ours)  # traced anew, with this b
    assert_close(everything(fresh, x, kernel), everything(theirs, x, kernel), 1e-12)


@pytest.mark.slow
def test_batch_last_on_cpu_is_by_blocks_without_a_convolution():
    ours, _ = convolutions(ODD)
    compiled = jax.jit(ours).lower(*inputs(ODD)).compile().as_text()
    assert "convolution(" not in compiled
    assert " dot(" in compiled or "custom-call" in compiled


def test_conv_under_forward_mode_is_the_product_rule():
    ours, theirs = convolutions(ODD)
    x, kernel = inputs(ODD)

    @jax.jit
    def tangent_and_value(*at):
        return jax.jvp(ours, at, at)[1], theirs(*at)

    # The tangent of a bilinear map at (x, k) along (x, k) is twice its value.
    tangent, value = tangent_and_value(x, kernel)
    assert_close(tangent, 2 * np.asarray(value))


def test_second_derivatives_are_xlas():
    x, kernel = inputs(ODD)

    def second(conv):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel)))

        def squared_gradient(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel))

        return jax.jit(jax.grad(squared_gradient, (0, 1)))(x, kernel)

    ours, theirs = convolutions(ODD)
    assert_close(second(ours), second(theirs), 5e-5)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_images_and_kernels_is_one_call_each(in_axes):
    ours, theirs = convolutions(ODD)
    x, kernel = inputs(ODD)
    factors = np.float32([1, -2]).reshape(2, 1, 1, 1, 1)
    xs = x if in_axes[0] is None else factors * x
    kernels = kernel if in_axes[1] is None else factors * kernel + 1
    mapped = jax.vmap(functools.partial(everything, ours), in_axes)(xs, kernels)
    for i in range(2):
        one_x = x if in_axes[0] is None else xs[i]
        one_kernel = kernel if in_axes[1] is None else kernels[i]
        one = everything(theirs, one_x, one_kernel)
        assert_close([np.asarray(a)[i] for a in mapped], one)


@pytest.mark.parametrize("layout", slow_but(["CHWN"], ["NHWC", "CHWN"]))
def test_pmap_and_jit_over_a_sharded_batch_are_the_big_batch(layout, devices):
    ours, _ = convolutions(ODD, layout)
    x, kernel = inputs(ODD)
    x = x.transpose(["CHWN".index(axis) for axis in layout])
    batch_axis = layout.index("N")
    y, dx, dkernel = jax.device_get(everything(ours, x, kernel))
    cotangent = np.sin(np.arange(y.size, dtype=y.dtype)).reshape(y.shape)

    def pulled(x, kernel, cotangent):
        y, pull = jax.vjp(ours, x, kernel)
        return y, *pull(cotangent)

    def cut(a):
        shape = a.shape[:batch_axis] + (2, -1) + a.shape[batch_axis + 1 :]
        return np.moveaxis(a.reshape(shape), batch_axis, 0)

    def joined(a):
        return np.concatenate(a, axis=batch_axis)

    mapped = jax.pmap(pulled, in_axes=(0, None, 0), devices=devices[:2])
    ys, dxs, dkernels = jax.device_get(mapped(cut(x), kernel, cut(cotangent)))
    assert_close((joined(ys), joined(dxs), dkernels.sum(0)), (y, dx, dkernel))

    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=devices[:2])
    by_batch = NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, "d"))
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        sharded = jax.jit(pulled)(
            jax.device_put(x, by_batch),
            jax.device_put(kernel, replicated),
            jax.device_put(cotangent, by_batch),
        )
    assert sharded[0].sharding.is_equivalent_to(by_batch, 4)
    assert_close(jax.device_get(sharded), (y, dx, dkernel))


def test_sharded_batch_is_never_gathered(devices):
    ours, _ = convolutions(ODD)
    x, kernel = inputs(ODD)
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=devices[:2])
    spec = PartitionSpec(None, None, None, "d")
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, spec))
        kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
        compiled = everything.lower(ours, x, kernel).compile().as_text()
    assert "all-gather" not in compiled
    assert "all-reduce" in compiled  # of the kernel's gradient


def test_explicitly_sharded_batch_keeps_its_sharding(devices):
    conv, _ = convolutions(ODD)
    x, kernel = inputs(ODD)

    @jax.jit
    def convolved(x, kernel):
        y, pull = jax.vjp(conv, x, kernel)
        return y, *pull(jnp.sin(y))

    axis_types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types, devices=devices[:4])
    by_batch = PartitionSpec(None, None, None, "d")
    with jax.set_mesh(mesh):
        of_shards = convolved(
            jax.device_put(x, NamedSharding(mesh, by_batch)),
            jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())),
        )
    y, dx, dkernel = (jax.typeof(array).sharding.spec for array in of_shards)
    assert y == dx == by_batch
    assert dkernel == PartitionSpec(*[None] * 4)
    assert_close(jax.device_get(of_shards), convolved(x, kernel))


@pytest.mark.parametrize(
    ("batch_size", "laid_along"), [(2, "d"), (3, None), (4, ("d", "m"))]
)
def test_batch_is_laid_along_the_mesh_axes_that_divide_it(
    devices, batch_size, laid_along
):
    ours, _ = convolutions(ODD)
    x, kernel = inputs(ODD)
    x = x[..., :batch_size]
    axis_types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types, devices=devices[:4])
    with jax.set_mesh(mesh):
        results = everything(ours, x, kernel)
    expected = NamedSharding(mesh, PartitionSpec(None, None, None, laid_along))
    assert results[0].sharding.is_equivalent_to(expected, 4)
    assert_close(jax.device_get(results), everything(ours, x, kernel))


def test_empty_batch_gives_empty_activations():
    ours, theirs = convolutions(ODD)
    x, kernel = inputs(ODD)
    expected = jax.eval_shape(theirs, x[..., :0], kernel)
    assert jax.jit(ours)(x[..., :0], kernel).shape == expected.shape


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_conv_agrees_between_layouts(padding, strides):
    x, kernel = inputs(ODD)
    conv = functools.partial(layers.conv2d, padding=padding, strides=strides)
    conv = jax.jit(conv, static_argnums=2)
    batch_last = np.asarray(conv(x, kernel, "CHWN"))
    channels_last = conv(layers.to_nhwc(x, "CHWN"), kernel, "NHWC")
    assert_close(layers.to_nhwc(batch_last, "CHWN"), channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"strides": 2, "padding": "SAME"}], ids=["default", "general"]
)
def test_conv_module_is_flaxs_in_either_layout(options):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    flax_options = {"padding": "VALID", **options}
    theirs = nn.Conv(4, (3, 3), bias_init=nn.initializers.normal(), **flax_options)
    variables = theirs.init(jax.random.key(1), x)
    for layout in ("NHWC", "CHWN"):
        ours = layers.Conv(4, (3, 3), layout=layout, **options)
        y = jax.jit(ours.apply)(variables, layers.from_nhwc(x, layout))
        np.testing.assert_allclose(
            layers.to_nhwc(y, layout), theirs.apply(variables, x), atol=1e-5
        )


@functools.partial(jax.jit, static_argnums=1)
def pooled(x, layout):
    """By our function in a layout, and by Flax's."""
    y = layers.avg_pool_2x2(layers.from_nhwc(x, layout), layout)
    return layers.to_nhwc(y, layout), nn.avg_pool(x, (2, 2), strides=(2, 2))


@pytest.mark.parametrize("layout", ["NHWC", "CHWN"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_avg_pool_is_flaxs(layout, size):
    x = np.random.default_rng(0).random((2, *size, 3), np.float32)
    np.testing.assert_allclose(*pooled(x, layout), atol=1e-6)


def test_layouts_are_permutations_that_undo_each_other():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    from_nhwc = jax.jit(layers.from_nhwc, static_argnums=1)
    assert from_nhwc(x, "CHWN").shape == (5, 3, 4, 2)
    for layout in ("NHWC", "CHWN"):
        there = np.asarray(from_nhwc(x, layout))
        np.testing.assert_array_equal(layers.to_nhwc(there, layout), x)


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(layers.conv2d, np.ones((1, 3, 3, 1)), np.ones((2, 2, 1, 1))),
        functools.partial(layers.avg_pool_2x2, np.ones((1, 3, 3, 1))),
        functools.partial(layers.from_nhwc, np.ones((1, 3, 3, 1))),
        layers.feature_axis,
    ],
)
def test_unknown_layout_is_refused_with_those_that_there_are(call):
    with pytest.raises(ValueError, match=r"layout='NCHW'.*NHWC.*CHWN"):
        call("NCHW")


@pytest.mark.parametrize(
    ("kernel_shape", "options", "message"),
    [
        ((3, 3, 2, 4), {}, r"3 channels in layout CHWN.*takes 2.*give x in"),
        ((3, 3, 3), {}, r"kernel of shape \(3, 3, 3\); expected four axes"),
        ((3, 3, 3, 4), {"padding": "same"}, "padding='same'; expected VALID, SAME"),
        ((3, 3, 3, 4), {"padding": ((1, 1),)}, "expected VALID, SAME"),
        ((3, 3, 3, 4), {"padding": ((1, -1), (0, 0))}, "no number below 0"),
        ((3, 3, 3, 4), {"strides": 0}, "strides=0; expected one or two integers from"),
        ((3, 3, 3, 4), {"strides": (1, 2, 1)}, "expected one or two integers"),
        ((3, 7, 3, 4), {}, r"\(3, 7\) pixels on an image of \(5, 6\).*pad more"),
        (
            (7, 7, 3, 4),
            {"padding": ((1, 0), (0, 0))},
            r"\(7, 7\) pixels on an image of \(6, 6\).*\(\(1, 0\), \(0, 0\)\)",
        ),
    ],
)
def test_bad_convolution_is_refused_with_what_was_given(kernel_shape, options, message):
    with pytest.raises(ValueError, match=message):
        layers.conv2d(np.ones((3, 5, 6, 2)), np.ones(kernel_shape), "CHWN", **options)


@pytest.mark.parametrize("norm", [None, BatchNorm])
def test_train_that_is_no_boolean_is_refused_in_our_models(norm):
    with pytest.raises(TypeError, match="train='yes'; expected True or False"):
        layers.norm_layer(norm, train="yes", axis=-1, batch_axis=0, name="norm")
