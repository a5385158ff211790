"""`bn_jax.nnx.BatchNorm` is `flax.nnx.BatchNorm`, but for where Flax is wrong."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reference
from bn_jax import linen
from bn_jax import nnx as ours
from bn_jax.averages import BatchNormState
from marks import slow_but
from nnx_layers import (
    MODULES,
    assert_close_in_own_precision,
    make,
    merge,
    train,
    variables,
)
from reference import normal

SHAPE = (6, 4, 4, 3)
MASK = np.random.default_rng(1).integers(0, 2, (6, 4, 4, 1)).astype(bool)
CASES = {
    "rank 2, neither": {"shape": (16, 3), "use_scale": False, "use_bias": False},
    "NHWC": {},
    "NCHW": {"axis": 1},
    "numbers, initializers, slow variance": {
        "momentum": 0.5,
        "epsilon": 1e-2,
        "scale_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.normal(1.0),
        "use_fast_variance": False,
    },
    "mask": {"mask": MASK},
    "axis from the end, no scale, mask of lower rank": {
        "axis": -3,
        "use_scale": False,
        "mask": MASK[0],
    },
    "first axis, no bias, mask of every value": {
        "axis": 0,
        "use_bias": False,
        "mask": MASK ^ (np.arange(3) == 1),
    },
    "dtype bf16": {"dtype": jnp.bfloat16},
    "param_dtype bf16": {"param_dtype": jnp.bfloat16},
    "x bf16": {"x_dtype": jnp.bfloat16},
    "x f16, dtype f16": {"x_dtype": jnp.float16, "dtype": jnp.float16},
    "x f16, dtype f32": {"x_dtype": jnp.float16, "dtype": jnp.float32},
    "all bf16": {
        "x_dtype": jnp.bfloat16,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
    },
    "promote_dtype that casts input and parameters": {
        "promote_dtype": lambda args, dtype: tuple(
            a if i in (1, 2) else a.astype(jnp.bfloat16) for i, a in enumerate(args)
        )
    },
}
# Each option is in one of these.
QUICK = [
    "rank 2, neither",
    "numbers, initializers, slow variance",
    "axis from the end, no scale, mask of lower rank",
    "first axis, no bias, mask of every value",
    "x f16, dtype f32",
    "all bf16",
    "promote_dtype that casts input and parameters",
]


@functools.partial(jax.jit, static_argnums=0)
def called(graphdef, state, x, **given):
    layer = merge(graphdef, state)
    return layer(x, **given), variables(layer)


def call(layer, x, **given):
    """The output of a call, and the layer's variables after it."""
    return jax.device_get(called(*nnx.split(layer), x, **given))


def signature(function):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
    ]


# Construction and signature.


def test_parameters_order_and_defaults_begin_with_flaxs():
    flax, mine = (signature(m.__init__) for m in (nnx.BatchNorm, ours.BatchNorm))
    assert mine[: len(flax)] == flax
    for _, kind, default in mine[len(flax) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty


def test_call_and_set_view_begin_with_flaxs_signature_and_add_keywords_alone():
    for method in ("__call__", "set_view"):
        flax, mine = (
            signature(getattr(m, method)) for m in (nnx.BatchNorm, ours.BatchNorm)
        )
        assert mine[: len(flax)] == flax
        for _, kind, default in mine[len(flax) :]:
            assert kind is inspect.Parameter.KEYWORD_ONLY and default is None


@pytest.mark.parametrize("used", [True, False])
def test_attributes_and_variables_are_flaxs(used):
    options = {"use_scale": used, "use_bias": not used, "axis_index_groups": [[0, 1]]}
    mine, flax = (make(m, **options) for m in MODULES)
    added = {
        "ghost_batch_size",
        "batch_axis",
        "average",
        "zero_masked",
        "scale_offset",
    }
    names = {n for n in vars(flax) if not n.startswith("_")}
    assert {n for n in vars(mine) if not n.startswith("_")} == names | added
    for name in names:
        got, expected = getattr(mine, name), getattr(flax, name)
        if isinstance(expected, nnx.Variable):
            assert type(got) is type(expected)
            chex.assert_trees_all_equal(got[...], expected[...])
        else:
            assert got == expected
    chex.assert_trees_all_equal_structs(nnx.state(mine), nnx.state(flax))


def test_metadata_reach_the_variables():
    options = {"scale_metadata": {"note": "gamma"}, "bias_metadata": {"note": "beta"}}
    mine, flax = (make(m, **options) for m in MODULES)
    assert (mine.scale.note, mine.bias.note) == ("gamma", "beta")
    assert (flax.scale.note, flax.bias.note) == ("gamma", "beta")


def test_construction_touches_no_collective_and_reads_no_batch():
    def construct():
        return nnx.state(make(axis_name="unbound", use_running_average=False))

    assert "psum" not in str(jax.make_jaxpr(lambda: nnx.to_pure_dict(construct()))())
    abstract = nnx.eval_shape(construct)
    assert abstract["mean"].get_value().shape == (3,)


# Values.


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_swapping_the_import_changes_no_number(case):
    options = dict(CASES[case])
    shape = options.pop("shape", SHAPE)
    x_dtype = options.pop("x_dtype", jnp.float32)
    batches = normal((3, *shape), mean=0.5, std=2.0, dtype=x_dtype)
    got, expected = (train(module, batches, **options) for module in MODULES)
    if options.get("dtype") in (jnp.bfloat16, jnp.float16):
        # There Flax evaluates wrongly: test_flax_rounds_the_running_averages_...
        got, expected = got[:-1], expected[:-1]
    assert_close_in_own_precision(got, expected)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax
def test_swapping_the_import_changes_no_number_in_float64(x64):
    batches = normal((2, 6, 3), mean=0.5, std=2.0, dtype=jnp.float64)
    got, expected = (train(m, batches, param_dtype=jnp.float64) for m in MODULES)
    # The running averages are float32 in both, and what evaluation makes of them.
    chex.assert_trees_all_close(got[2], expected[2], rtol=1e-9, atol=1e-9)
    assert_close_in_own_precision(got, expected)


@pytest.mark.parametrize("dtype", [jnp.int32, np.float64])
def test_integers_and_numpy_arrays_need_no_conversion(dtype):
    x = np.random.default_rng(0).integers(0, 9, (8, 3)).astype(dtype)
    got, expected = (make(m)(x) for m in MODULES)
    assert_close_in_own_precision(got, expected)


def test_a_promoted_result_is_rounded_once():
    def cast_input_alone(args, dtype):
        return (args[0].astype(jnp.bfloat16), *args[1:])

    x = normal((8, 3), mean=1.0)
    got, expected = (make(m, promote_dtype=cast_input_alone)(x) for m in MODULES)
    assert got.dtype == expected.dtype == jnp.float32  # by scale and bias
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_parameter_left_out_may_be_put_in_later():
    x = normal((8, 3), mean=1.0)
    for module in MODULES:
        layer = make(module, use_bias=False)
        layer.bias = nnx.Param(jnp.full(3, 7.0))
        np.testing.assert_allclose(np.mean(layer(x), axis=0), 7, rtol=1e-5)


def test_one_example_by_itself_is_evaluated_as_in_a_batch():
    x = normal((8, 3))
    mine, flax = (make(m, use_running_average=True) for m in MODULES)
    for layer in (mine, flax):
        layer.mean[...], layer.var[...] = jnp.array([1.0, 2, 3]), jnp.array([4.0, 5, 6])
    y = jax.jit(jax.vmap(mine))(x)
    chex.assert_trees_all_close(y, jax.jit(jax.vmap(flax))(x), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(y, call(mine, x)[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="feature_axis=-1"):
        mine(jnp.float32(1.0))


@pytest.mark.parametrize("axis", [-1, 0])
def test_one_example_at_a_time_shares_statistics_along_a_named_axis(axis):
    x = normal((8, 3), mean=1.0)
    mask, weights = np.arange(8) < 6, np.arange(8.0)

    def step(state, x, mask, weights, graphdef):
        layer = merge(graphdef, state)
        return layer(x, mask=mask, weights=weights), variables(layer)

    for given, expected_weights in (
        ((None, None), None),
        ((mask, None), mask),
        ((None, weights), weights),
    ):
        graphdef, state = nnx.split(make(axis=axis, axis_name="batch"))
        each = jax.jit(
            jax.vmap(
                lambda x, *given, g=graphdef, s=state: step(s, x, *given, g),
                axis_name="batch",
            )
        )
        y, states = jax.device_get(each(x, *given))
        expected, moved = call(make(), x, weights=expected_weights)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)
        one = jax.tree.map(lambda a: a[0], states)
        chex.assert_trees_all_close(one, moved, rtol=1e-5, atol=1e-6)


def test_running_averages_are_the_closed_form_after_n_steps():
    # From a_0, n equal batches of statistic b give m^n a_0 + (1 - m^n) b.
    x = normal((8, 3), mean=2.0, std=3.0)
    layer = make(momentum=0.8)
    for _ in range(5):
        layer(x)
    batch, kept = reference.moments(x), 0.8**5
    np.testing.assert_allclose(layer.mean[...], (1 - kept) * batch.mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], kept + (1 - kept) * batch.var, rtol=1e-5)
    layer.eval()
    expected = reference.standardised(x, layer.mean[...], layer.var[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_runs_through_the_running_averages_as_in_flax():
    x = normal((8, 3))

    def loss(x, layer):
        return jnp.sum(layer(x)) + 100 * jnp.sum(layer.mean[...] + layer.var[...])

    for module in MODULES:
        gradient = nnx.jit(nnx.grad(loss))(x, make(module))
        np.testing.assert_allclose(gradient, 0, atol=1e-5)  # y sums to beta


# Options that Flax lacks.


@pytest.mark.parametrize("axis,size", [(0, 2), (1, 3)])
def test_ghost_batches_are_normalised_each_by_itself(axis, size):
    x = normal((4, 6, 3), mean=1.0)
    y, moved = call(make(ghost_batch_size=size, batch_axis=axis), x)
    parts = np.split(y, 2, axis)
    for part, x_part in zip(parts, np.split(np.asarray(x), 2, axis), strict=True):
        expected, _ = reference.batch_norm(x_part)
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5)
    _, expected = call(make(), x)  # averages move by the moments of the whole batch
    chex.assert_trees_all_close(moved, expected, rtol=1e-5)


def test_weights_are_repeats_and_not_to_be_had_with_a_mask():
    x, weights = normal((4, 3), mean=1.0), np.array([1, 0, 2, 3])
    _, weighted = call(make(), x, weights=weights)
    _, repeated = call(make(), np.repeat(x, weights, axis=0))
    chex.assert_trees_all_close(weighted, repeated, rtol=1e-5)
    with pytest.raises(ValueError, match="mask and weights"):
        make()(x, weights=weights, mask=weights > 0)


def test_update_average_is_apart_from_what_normalises():
    x = normal((8, 3), mean=1.0)
    moved = make()
    trained = moved(x)
    frozen = make()
    chex.assert_trees_all_equal(frozen(x, update_average=False), trained)
    chex.assert_trees_all_equal(variables(frozen), variables(make()))
    predicted = frozen(x, use_running_average=True, update_average=True)
    expected = np.asarray(x) / np.sqrt(1 + 1e-5, dtype=np.float32)
    chex.assert_trees_all_close(predicted, expected, rtol=1e-6)
    chex.assert_trees_all_close(variables(frozen), variables(moved), rtol=1e-6)


OWN_OPTIONS = {
    "weights": ({}, {"weights": np.arange(8.0)[:, None]}),
    "mask that leaves a batch out": ({}, {"mask": np.zeros((8, 1, 1), bool)}),
    "zeroed mask": ({"zero_masked": True}, {"mask": np.arange(8)[:, None, None] > 4}),
    "given statistics": (
        {},
        {"statistics": BatchNormState(jnp.ones(3), jnp.full(3, 2.0))},
    ),
    "debiased": ({"average": "debiased"}, {}),
    "cumulative, weights": ({"average": "cumulative"}, {"weights": np.eye(8, 5)}),
    "ghosts": ({"ghost_batch_size": 2}, {}),
    "ghosts along another axis": ({"ghost_batch_size": 1, "batch_axis": 1}, {}),
    "offset": ({"scale_offset": 1.0, "use_bias": False}, {}),
}


@pytest.mark.parametrize("case", OWN_OPTIONS)
def test_options_of_our_own_are_those_of_linen(case):
    attributes, given = OWN_OPTIONS[case]
    batches = normal((2, 8, 5, 3), mean=1.0)

    @jax.jit
    def by_linen():
        layer = linen.BatchNorm(**attributes)
        held = layer.init(jax.random.key(0), batches[0], True)
        ys = []
        for x in batches:
            y, moved = layer.apply(held, x, False, mutable=["batch_stats"], **given)
            held = {**held, **moved}
            ys.append(y)
        return ys, held["batch_stats"], layer.apply(held, batches[0], True)

    @jax.jit
    def by_nnx():
        layer = make(**attributes)
        ys = [layer(x, **given) for x in batches]
        moved = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
        return ys, moved, layer(batches[0], True)

    chex.assert_trees_all_close(by_nnx(), by_linen(), rtol=1e-6, atol=1e-6)
