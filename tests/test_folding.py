import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.folding import fold
from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from marks import slow_but
from reference import normal

IMAGES = jnp.asarray(np.random.default_rng(3).random((8, 28, 28, 1), np.float32))


def drawn(model, x, draw):
    """Variables of a model whose every value is drawn, by `draw(shape)`."""
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), x
    )
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), leaf.dtype), shapes)


def moved(model, x):
    """Variables with no value where `init` puts it, variances positive."""
    rng = np.random.default_rng(5)
    return drawn(model, x, lambda shape: rng.uniform(0.1, 1.1, shape))


def predict(model, variables, x):
    return model.apply(variables, x, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("layout", ["CHWN", "NHWC"])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_lenet_is_the_same_network_without_norms(norm, layout, bias):
    model = LeNet(norm=norm, layout=layout, bias_before_norm=bias)
    variables = moved(model, IMAGES[:1])
    folded = fold(functools.partial(predict, model), variables, IMAGES[:2])
    plain = LeNet(norm=None, layout=layout)
    shapes = plain.init(jax.random.key(0), IMAGES[:1], train=False)["params"]
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(
        predict(plain, {"params": folded}, IMAGES),
        predict(model, variables, IMAGES),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", slow_but([False], [True, False]))
def test_norms_without_scale_or_bias_fold_too(scale, bias):
    norm = functools.partial(BatchNorm, use_scale=scale, use_bias=bias, epsilon=0.1)
    x = normal((4, 3))
    model = MLP(widths=(3, 3), norm=norm)
    variables = moved(model, x)
    folded = fold(functools.partial(predict, model), variables, x)
    np.testing.assert_allclose(
        predict(MLP(widths=(3, 3)), {"params": folded}, x),
        predict(model, variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


class ActivationBetween(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(3, name="dense")(x))
        return BatchNorm(use_running_average=not train, name="norm")(x)


class UsedElsewhere(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Dense(3, name="dense")(x)
        return y + BatchNorm(use_running_average=not train, name="norm")(y)


class CalledTwice(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        dense = nn.Dense(3, name="dense")
        x = dense(dense(x))
        return BatchNorm(use_running_average=not train, name="norm")(x)


class TwoNorms(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(BatchNorm, use_running_average=not train)
        x = nn.Dense(3, name="dense")(x)
        return norm(name="a")(x) * norm(name="b")(x)


class OtherAxis(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(jnp.stack([x, 2 * x, x * x], axis=1))
        return BatchNorm(use_running_average=not train, axis=1, name="norm")(x)


class OtherSize(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(jnp.stack([x, 2 * x], axis=1))
        return BatchNorm(use_running_average=not train, axis=1, name="norm")(x)


class SmallOutputs(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return 1e-5 * UsedElsewhere(name="inner")(x, train)


class UsedByTheOutputAlone(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Dense(3, name="dense")(x)
        return BatchNorm(use_running_average=not train, name="norm")(y), y


class ManyAxes(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.DenseGeneral((2, 3), name="dense")(x)
        return BatchNorm(use_running_average=not train, name="norm")(x)


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.jit(Plain, static_argnums=2)(name="inner")(x, train)


class Plain(nn.Module):
    norm: Any = BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(x)
        return self.norm(use_running_average=not train, name="norm")(x=x)


class SharedKernel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        dense = nn.Dense(3, name="dense")
        x = BatchNorm(use_running_average=not train, name="norm")(dense(x))
        return x @ dense.variables["params"]["kernel"]


class HalvedBias(nn.Module):
    """A layer that uses half its bias, and a last one without a norm after it."""

    @nn.compact
    def __call__(self, x, train):
        class Halved(nn.Module):
            @nn.compact
            def __call__(self, x):
                kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
                bias = self.param("bias", nn.initializers.ones, (3,))
                return x @ kernel + bias / 2

        x = Halved(name="dense")(x)
        x = BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="last")(nn.relu(x))


class DeviationPlusEpsilon(nn.Module):
    """A norm that divides by another deviation than batch norm."""

    @nn.compact
    def __call__(self, x, train):
        class Other(nn.Module):
            axis: int = -1
            epsilon: float = 1e-2

            @nn.compact
            def __call__(self, x):
                mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
                var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
                scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
                y = (x - mean.value) / (jnp.sqrt(var.value) + self.epsilon)
                return scale * y

        return nn.Dense(2)(Other(name="norm")(nn.Dense(3, name="dense")(x)))


class KernelsMagnitude(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        class Positive(nn.Module):
            @nn.compact
            def __call__(self, x):
                kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
                return x @ jnp.abs(kernel)

        x = Positive(name="dense")(x)
        return BatchNorm(use_running_average=not train, name="norm")(x)


class NotCalled(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = BatchNorm(use_running_average=not train, name="norm")
        return norm(nn.Dense(3, name="dense")(x)) if self.is_initializing() else x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ActivationBetween, "norm is not given the output of a layer with a kernel"),
        (UsedElsewhere, "the output of dense is used elsewhere"),
        (SmallOutputs, "the output of inner/dense is used elsewhere"),
        (UsedByTheOutputAlone, "the output of dense is used elsewhere"),
        (ManyAxes, r"dense has features=\(2, 3\).*bias of shape \[2, 3\]"),
        (Lifted, "inner/norm is inside a lifted transform .* at inner"),
        (SharedKernel, "a kernel before one .* is shared"),
        (HalvedBias, "norm does not give .* where the kernel of dense is 0"),
        (DeviationPlusEpsilon, "norm does not give .* where the kernel of dense is 0"),
        (KernelsMagnitude, "a kernel before one is not used as it is"),
        (NotCalled, "no call of norm was seen"),
        (CalledTwice, "dense is called 2 times"),
        (TwoNorms, "dense is followed by several norms"),
        (OtherAxis, "norms norm is over another axis"),
        (OtherSize, r"statistics of shape \[2\], not one for each of the 3 outputs"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(module, message):
    x = normal((4, 3))
    model = module()
    variables = moved(model, x)
    with pytest.raises(ValueError, match=f"cannot fold.*{message}"):
        fold(functools.partial(predict, model), variables, x)


class Deep(nn.Module):
    """Three dense layers, each followed by a norm and a relu, in a dtype."""

    norm: Any = BatchNorm
    dtype: Any = jnp.float32
    use_scale: bool = True

    @nn.compact
    def __call__(self, x, train):
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        for _ in range(3):
            x = nn.Dense(16, **kinds)(x)
            if self.norm is not None:
                norm = functools.partial(self.norm, use_scale=self.use_scale, **kinds)
                x = norm(use_running_average=not train, momentum=0.0)(x)
            x = nn.relu(x)
        return x


@pytest.mark.parametrize(
    ("norm", "dtype", "scale", "mean"),
    [
        (BatchNorm, jnp.float32, True, 1000.0),
        (nn.BatchNorm, jnp.bfloat16, True, 0.0),
        pytest.param(nn.BatchNorm, jnp.float32, False, 0.0, marks=pytest.mark.slow),
        pytest.param(BatchNorm, jnp.bfloat16, False, 0.0, marks=pytest.mark.slow),
        pytest.param(BatchNorm, jnp.float16, True, 0.0, marks=pytest.mark.slow),
    ],
)
def test_several_layers_fold_in_every_precision(norm, dtype, scale, mean):
    x = normal((64, 16), mean=mean, dtype=dtype)
    model = Deep(norm, dtype, scale)
    variables = drawn(model, x, np.random.default_rng(1).standard_normal)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    variables = {**variables, **jax.jit(train)(variables, x)[1]}
    folded = fold(functools.partial(predict, model), variables, x)
    before = predict(model, variables, x)
    after = predict(Deep(None, dtype), {"params": folded}, x)
    assert after.dtype == before.dtype == dtype
    # A few roundings a layer, of inputs so many deviations from 0.
    allowed = 3 * 4 * float(jnp.finfo(dtype).eps) * (1 + mean)
    np.testing.assert_allclose(
        *map(np.float64, (after, before)), atol=allowed * before.max(), rtol=0
    )


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
def test_layer_of_large_inputs_folds_though_subtracting_its_mean_cancels(norm):
    # x is 1e4 + N(0, 1): the layer's output loses four digits to its mean.
    x = normal((64, 16), mean=1e4)
    model = Plain(norm)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(1), x)
    z = np.float64(x) @ np.float64(variables["params"]["dense"]["kernel"])
    stats = {"norm": {"mean": jnp.float32(z.mean(0)), "var": jnp.float32(z.var(0))}}
    variables = {**variables, "batch_stats": stats}
    folded = fold(functools.partial(predict, model), variables, x)
    # Float32 holds 1e4 to 1e-3, over a deviation of about 1.
    np.testing.assert_allclose(
        x @ folded["dense"]["kernel"] + folded["dense"]["bias"],
        predict(model, variables, x),
        atol=2e-2,
    )


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        (OtherAxis, jnp.bfloat16),
        (SharedKernel, jnp.float16),
        pytest.param(OtherAxis, jnp.float16, marks=pytest.mark.slow),
        pytest.param(SharedKernel, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_wrong_folding_is_refused_in_half_precision_too(module, dtype):
    x = normal((4, 3), dtype=dtype)
    model = module()
    variables = moved(model, x)
    params = jax.tree.map(lambda a: a.astype(dtype), variables["params"])
    variables = {**variables, "params": params}
    outputs = jax.eval_shape(functools.partial(predict, model), variables, x)
    assert outputs.dtype == dtype
    with pytest.raises(ValueError, match="cannot fold.*norm is over another axis"):
        fold(functools.partial(predict, model), variables, x)


def test_outputs_that_are_not_finite_are_their_own_reason():
    x = normal((4, 3))
    variables = moved(Plain(), x)
    for bad in (np.nan, np.inf):
        spoilt = np.array(x)
        spoilt[1, 0] = bad
        with pytest.raises(ValueError, match="outputs .* not finite") as refusal:
            fold(functools.partial(predict, Plain()), variables, jnp.asarray(spoilt))
        assert "axis" not in str(refusal.value)


class Quantised(nn.Module):
    """Rounds its output to thousandths, as no exact check can undo."""

    @nn.compact
    def __call__(self, x, train):
        class Rounded(nn.Module):
            @nn.compact
            def __call__(self, x):
                kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
                return x @ (jnp.round(kernel * 1024) / 1024)

        x = Rounded(name="dense")(x)
        return BatchNorm(use_running_average=not train, name="norm")(x)


def test_small_change_may_be_rounding_and_is_called_so():
    x = normal((4, 3))
    variables = moved(Quantised(), x)
    with pytest.raises(ValueError, match="it is rounding: fold in wider dtypes"):
        fold(functools.partial(predict, Quantised()), variables, x)


def test_refusing_leaves_what_nn_jit_has_cached_alone():
    x = normal((4, 3))
    variables = moved(Lifted(), x)
    before = predict(Lifted(), variables, x)
    with pytest.raises(ValueError, match="lifted transform"):
        fold(functools.partial(predict, Lifted()), variables, x)
    np.testing.assert_array_equal(predict(Lifted(), variables, x), before)


class FlaxLayers(nn.Module):
    """Flax's own linear layers, with or without norms after them, and a shortcut."""

    norm: bool

    @nn.compact
    def __call__(self, x, train):
        def norm(x, name):
            layer = nn.BatchNorm(use_running_average=not train, name=name)
            return layer(x) if self.norm else x

        x = norm(nn.Conv(4, (3, 3), strides=2, name="a")(x), "norm_a")
        shortcut = nn.relu(x)
        depthwise = nn.Conv(4, (2, 2), feature_group_count=4, name="b")
        x = shortcut + norm(depthwise(shortcut), "norm_b")
        x = nn.relu(norm(nn.ConvTranspose(3, (2, 2), name="c")(x), "norm_c"))
        return norm(nn.Dense(5, name="d")(x), "norm_d")


@pytest.mark.slow
def test_flax_own_layers_fold_beside_a_shortcut():
    x = normal((2, 6, 6, 2))
    variables = moved(FlaxLayers(True), x)
    folded = fold(functools.partial(predict, FlaxLayers(True)), variables, x)
    assert sorted(folded) == ["a", "b", "c", "d"]
    np.testing.assert_allclose(
        predict(FlaxLayers(False), {"params": folded}, x),
        predict(FlaxLayers(True), variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
def test_model_without_norms_folds_to_itself():
    model = LeNet()
    variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
    folded = fold(functools.partial(predict, model), variables, IMAGES[:2])
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), folded, variables["params"])
    )
