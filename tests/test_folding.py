import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from bn_jax.folding import fold
from bn_jax.linen import BatchNorm
from bn_jax.linen import norm as linen_norm
from bn_jax.models.lenet import LeNet
from bn_jax.models.mlp import MLP
from bn_jax.nnx import BatchNorm as NnxBatchNorm
from bn_jax.nnx import norm as nnx_norm
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
    plain = LeNet(norm=None, layout=layout)
    folded = fold(
        functools.partial(predict, model), variables, IMAGES[:2], without_norms=plain
    )
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
    plain = MLP(widths=(3, 3))
    folded = fold(functools.partial(predict, model), variables, x, without_norms=plain)
    np.testing.assert_allclose(
        predict(plain, {"params": folded}, x),
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


class Plain(nn.Module):
    norm: Any = BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(x)
        return self.norm(use_running_average=not train, name="norm")(x=x)


class Step(nn.Module):
    """One step of a scan, with or without a norm."""

    norm: bool = True

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3, use_bias=not self.norm, name="dense")(x)
        norm = BatchNorm(use_running_average=True, name="norm")
        return nn.tanh(norm(x) if self.norm else x), None


class Scanned(nn.Module):
    norm: bool = True
    axis: int = 0

    @nn.compact
    def __call__(self, x, train):
        block = nn.scan(
            Step,
            length=2,
            split_rngs={"params": True},
            variable_axes={"params": 0, "batch_stats": self.axis},
        )
        return block(self.norm, name="inner")(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        block = nn.vmap(
            Step,
            in_axes=None,
            axis_size=2,
            split_rngs={"params": True},
            variable_axes={True: 0},
        )
        return block(name="inner")(x, None)[0]


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
        (Mapped, "inner/norm does not read its statistics .* as inside nn.vmap"),
        (lambda: Scanned(axis=1), "inner/norm does not .* another axis than the first"),
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
        fold(model, variables, x, without_norms=model)


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
        pytest.param(nn.BatchNorm, jnp.bfloat16, True, 0.0, marks=pytest.mark.slow),
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
    plain = Deep(None, dtype)
    folded = fold(model, variables, x, without_norms=plain)
    before = predict(model, variables, x)
    after = predict(plain, {"params": folded}, x)
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
    plain = nn.Dense(3, name="dense")
    folded = fold(
        model,
        variables,
        x,
        without_norms=lambda v, x: plain.apply({"params": v["params"]["dense"]}, x),
    )
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
        fold(model, variables, x, without_norms=model)


def test_outputs_that_are_not_finite_are_their_own_reason():
    x = normal((4, 3))
    variables = moved(Plain(), x)
    for bad in (np.nan, np.inf):
        spoilt = np.array(x)
        spoilt[1, 0] = bad
        with pytest.raises(ValueError, match="outputs .* not finite") as refusal:
            fold(Plain(), variables, jnp.asarray(spoilt), without_norms=Plain())
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
        fold(Quantised(), variables, x, without_norms=Quantised())


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
    folded = fold(FlaxLayers(True), variables, x, without_norms=FlaxLayers(False))
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
    folded = fold(model, variables, IMAGES[:2], without_norms=model)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), folded, variables["params"])
    )


# What the folded parameters are put into.


class Lifted(nn.Module):
    """Layers inside `nn.jit` and `nn.remat`, with or without norms, or biases."""

    norm: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train):
        class Block(nn.Module):
            norm: bool
            use_bias: bool

            @nn.compact
            def __call__(self, x):
                x = nn.Conv(3, (2, 2), use_bias=self.use_bias, name="conv")(x)
                norm = nn.BatchNorm(use_running_average=not train, name="norm")
                return nn.relu(norm(x) if self.norm else x)

        kinds = {"norm": self.norm, "use_bias": self.use_bias}
        x = nn.remat(Block)(**kinds, name="first")(x)
        return nn.jit(Block)(**kinds, name="second")(x).mean((1, 2))


@functools.cache
def lifted():
    """A compiled predict function that was called before, variables and images."""
    x = normal((2, 5, 5, 2))
    model = Lifted(use_bias=False)
    variables = moved(model, x)
    predict = jax.jit(functools.partial(model.apply, train=False))
    return predict, variables, x, predict(variables, x)


def test_layers_without_a_bias_fold_inside_of_transforms():
    predict, variables, x, expected = lifted()
    plain = Lifted(norm=False)
    folded = fold(predict, variables, x, without_norms=plain)
    got = plain.apply({"params": folded}, x, train=False)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_a_scan_stacks_fold_each_by_itself():
    x = normal((4, 3))
    variables = moved(Scanned(), x)
    plain = Scanned(norm=False)
    folded = fold(Scanned(), variables, x, without_norms=plain)
    shapes = plain.init(jax.random.key(0), x, train=False)["params"]
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(
        predict(plain, {"params": folded}, x),
        predict(Scanned(), variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_train_states_and_frozen_variables_fold():
    class State(NamedTuple):
        params: Any
        batch_stats: Any

    predict, variables, x, _ = lifted()
    plain = jax.jit(functools.partial(Lifted(norm=False).apply, train=False))
    expected = fold(predict, variables, x, without_norms=plain)
    state = State(variables["params"], variables["batch_stats"])
    for model, held in (
        (Lifted(use_bias=False), state),
        (lambda state, x: predict(state._asdict(), x), state),
        (predict, freeze(variables)),
    ):
        folded = fold(model, held, x, without_norms=plain)
        chex.assert_trees_all_equal(folded, expected)


def test_model_whose_layers_have_no_bias_is_refused_as_it_would_leave_it_out():
    predict, variables, x, _ = lifted()
    without_bias = Lifted(norm=False, use_bias=False)
    message = "does not use .* first/conv/bias, second/conv/bias; .*use_bias=True"
    with pytest.raises(ValueError, match=message):
        fold(predict, variables, x, without_norms=without_bias)


def test_model_that_is_another_without_norms_is_refused():
    model, x = Plain(), normal((4, 3))
    variables = moved(model, x)
    other = nn.Dense(3, name="dense")

    def doubled(variables, x):
        return 2 * other.apply({"params": variables["params"]["dense"]}, x)

    with pytest.raises(ValueError, match="outputs of size .* in the model without nor"):
        fold(model, variables, x, without_norms=doubled)
    with pytest.raises(ValueError, match="cannot be run on the folded .*dense/kernel"):
        fold(model, variables, x, without_norms=nn.Dense(4))
    with pytest.raises(
        ValueError, match=r"outputs have shapes \[\[4\]\], and \[\[4, 3"
    ):
        fold(
            model,
            variables,
            x,
            without_norms=lambda v, x: doubled(v, x).sum(1),
        )


class LocalConvolution(nn.Module):
    norm: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.ConvLocal(3, (2,), use_bias=not self.norm, name="local")(x)
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        return norm(x) if self.norm else x


def test_local_convolution_whose_biases_are_more_is_refused():
    x = normal((4, 3, 2))
    variables = moved(LocalConvolution(True), x)
    with pytest.raises(ValueError, match="cannot be run on the folded .*local/bias"):
        fold(
            LocalConvolution(True),
            variables,
            x,
            without_norms=LocalConvolution(False),
        )


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs, *, use_bias=True):
        self.conv = nnx.Conv(2, 3, (2, 2), use_bias=use_bias, rngs=rngs)
        self.norm = None if norm is None else norm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.last = None if norm is None else norm(4, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        x = nnx.relu(x if self.norm is None else self.norm(x)).mean((1, 2))
        x = self.dense(x)
        return x if self.last is None else self.last(x)


def moved_nnx(norm):
    model = NnxNet(norm, nnx.Rngs(0), use_bias=False)
    rng = np.random.default_rng(2)
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)
    state = nnx.state(model, kinds)
    nnx.update(
        model,
        jax.tree.map(lambda v: jnp.float32(rng.uniform(0.5, 1.5, v.shape)), state),
    )
    return model


@pytest.mark.parametrize(
    "norm", slow_but([nnx.BatchNorm], [NnxBatchNorm, nnx.BatchNorm])
)
def test_nnx_modules_fold(norm):
    model, x = moved_nnx(norm), normal((2, 5, 5, 2))
    plain = NnxNet(None, nnx.Rngs(1))
    folded = fold(model, None, x, without_norms=plain)
    nnx.update(plain, folded)
    model.eval()
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_nnx_module_whose_layers_have_no_bias_is_refused():
    model, x = moved_nnx(nnx.BatchNorm), normal((2, 5, 5, 2))
    plain = NnxNet(None, nnx.Rngs(1), use_bias=False)
    with pytest.raises(ValueError, match="none besides, conv/bias missing; expected"):
        fold(model, None, x, without_norms=plain)


class Mixed(nn.Module):
    """A layer with batch norm, and one with another norm, or none."""

    norm: Any
    batch_norm: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, use_bias=self.use_bias, name="first")(x)
        if self.batch_norm:
            x = BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.Dense(4, use_bias=self.use_bias, name="second")(nn.relu(x))
        return x if self.norm is None else self.norm(name="other")(x)


GROUP = linen_norm("group")


@pytest.mark.parametrize(
    ("norm", "kind"),
    slow_but(
        [(GROUP, "group"), (nn.LayerNorm, "LayerNorm")],
        [
            (GROUP, "group"),
            (linen_norm("instance:use_scale=false,use_bias=false"), "instance"),
            (linen_norm("dyt"), "dyt"),
            (nn.LayerNorm, "LayerNorm"),
            (functools.partial(nn.GroupNorm, 2, use_bias=False), "GroupNorm"),
        ],
    ),
)
@pytest.mark.filterwarnings("ignore:x of shape .* has one value a group")
def test_norms_of_each_example_are_refused_by_name_where_they_are_left_out(norm, kind):
    x = normal((4, 3))
    for batch_norm in (True, False):
        model = Mixed(norm, batch_norm)
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), x
        )
        for plain in (
            Mixed(None, batch_norm=False, use_bias=True),
            functools.partial(Mixed(None, False, True).apply, train=False),
        ):
            reason = "is a curve" if kind == "dyt" else "depend on the input"
            words = rf"^cannot fold other \({kind}\): .* {reason}, so"
            with pytest.raises(ValueError, match=words):
                fold(model, variables, x, without_norms=plain)


def test_norms_of_each_example_stay_where_batch_norm_is_folded():
    x = normal((4, 3))
    model = Mixed(nn.LayerNorm, use_bias=True)
    plain = Mixed(nn.LayerNorm, batch_norm=False, use_bias=True)
    variables = moved(model, x)
    folded = fold(model, variables, x, without_norms=plain)
    assert "other" in folded
    # A model that lacks biases is refused for that, not for the norm that it has.
    without_bias = Mixed(nn.LayerNorm, batch_norm=False, use_bias=False)
    with pytest.raises(ValueError, match="does not use the folded .* first/bias"):
        fold(model, variables, x, without_norms=without_bias)


def test_group_norm_of_an_nnx_module_is_refused_by_name():
    group = nnx_norm("group:num_groups=1")
    model, x = NnxNet(group, nnx.Rngs(0), use_bias=False), normal((2, 5, 5, 2))
    plain = NnxNet(None, nnx.Rngs(1))
    words = r"^cannot fold last \(group\), norm \(group\): .* depend on the input"
    with pytest.raises(ValueError, match=words):
        fold(model, None, x, without_norms=plain)
