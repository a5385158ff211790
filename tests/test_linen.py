"""`bn_jax.linen.BatchNorm` is `flax.linen.BatchNorm`, but for where Flax is wrong."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import reference
from bn_jax import linen as ours
from marks import slow_but
from reference import normal

KEY = jax.random.key(0)
SHAPE = (6, 4, 4, 3)
MASK = np.random.default_rng(1).integers(0, 2, (6, 4, 4, 1)).astype(bool)
CASES = {
    "NHWC": {},
    "NCHW": {"axis": 1},
    "two axes": {"axis": (1, -1)},
    "two axes out of order, neither": {
        "axis": (-1, 2),
        "use_scale": False,
        "use_bias": False,
    },
    "rank 2, numbers, initializers, slow variance": {
        "shape": (16, 3),
        "momentum": 0.5,
        "epsilon": 1e-2,
        "scale_init": nn.initializers.normal(1.0),
        "bias_init": nn.initializers.normal(1.0),
        "use_fast_variance": False,
    },
    "reductions not forced": {"force_float32_reductions": False},
    "mask": {"mask": MASK},
    "NCHW, no scale, mask of lower rank": {
        "axis": 1,
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
    "x f16": {"x_dtype": jnp.float16},
    "x f16, dtype f32": {"x_dtype": jnp.float16, "dtype": jnp.float32},
    "all bf16": {
        "x_dtype": jnp.bfloat16,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
    },
}
# Each option is in one of these.
QUICK = [
    "two axes out of order, neither",
    "rank 2, numbers, initializers, slow variance",
    "reductions not forced",
    "NCHW, no scale, mask of lower rank",
    "first axis, no bias, mask of every value",
    "param_dtype bf16",
    "all bf16",
]


def train(module, batches, mask=None, use_running_average=None):
    """Return all that a few steps of gradient descent with the module bring about."""

    def loss(params, x, stats):
        y, new = module.apply(
            {"params": params, "batch_stats": stats},
            x,
            use_running_average,
            mask=mask,
            mutable=["batch_stats"],
        )
        coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
        return jnp.mean(jnp.sin(coefficients * y) * y), (y, new["batch_stats"])

    def step(variables, x):
        params, stats = variables["params"], variables["batch_stats"]
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        gradients, (y, stats) = gradient(params, x, stats)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients[0])
        variables = {"params": params, "batch_stats": stats}
        return variables, (y, gradients, variables)

    @jax.jit
    def run(batches):
        first = module.init_with_output(KEY, batches[0], use_running_average, mask=mask)
        variables = {"params": {}, **first[1]}
        # In float64 Flax's first state is float32 all the same, later ones are not.
        dtype = jnp.promote_types(batches.dtype, jnp.float32)
        stats = jax.tree.map(lambda a: a.astype(dtype), variables["batch_stats"])
        return first, jax.lax.scan(step, {**variables, "batch_stats": stats}, batches)

    return run(batches)


def assert_close_in_own_precision(actual, expected):
    """Compare to 1e-5, or two roundings of the coarsest dtype where that is more.

    Parameters in bfloat16 lend their rounding to all but the statistics.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    coarsest = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(expected))

    def compare(path, a, b):
        path = jax.tree_util.keystr(path)
        tolerance = 1e-5 if "batch_stats" in path else max(1e-5, 2 * coarsest)
        np.testing.assert_allclose(
            *map(np.float64, (a, b)), rtol=tolerance, atol=tolerance, err_msg=path
        )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def signature(function):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def test_attributes_order_and_defaults_begin_with_flaxs():
    def fields(module):
        return [
            (f.name, f.default, f.default_factory, f.init, f.kw_only)
            for f in dataclasses.fields(module)
        ]

    # Flax ends with parent and name, which it gives every module; ours come before.
    flax, mine = fields(nn.BatchNorm), fields(ours.BatchNorm)
    assert mine[: len(flax) - 2] == flax[:-2] and mine[-2:] == flax[-2:]
    assert all(default is not dataclasses.MISSING for _, default, *_ in mine[:-2])


def test_call_begins_with_flaxs_signature_and_adds_keywords_alone():
    flax, mine = (signature(m.__call__) for m in (nn.BatchNorm, ours.BatchNorm))
    assert mine[: len(flax)] == flax
    for _, kind, default in mine[len(flax) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY and default is None


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_swapping_the_import_changes_no_number(case):
    options = dict(CASES[case])
    shape = options.pop("shape", SHAPE)
    x_dtype = options.pop("x_dtype", jnp.float32)
    mask = options.pop("mask", None)
    batches = normal((3, *shape), mean=0.5, std=2.0, dtype=x_dtype)
    got, expected = (
        train(module(use_running_average=False, **options), batches, mask)
        for module in (ours.BatchNorm, nn.BatchNorm)
    )
    assert_close_in_own_precision(got, expected)


def test_swapping_the_import_changes_no_number_in_float64(x64):
    batches = normal((3, *SHAPE), mean=0.5, std=2.0, dtype=jnp.float64)
    options = {"use_running_average": False, "param_dtype": jnp.float64}
    got, expected = (
        train(module(**options), batches) for module in (ours.BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)


def test_use_running_average_may_be_given_in_the_call():
    x = normal((8, 3))
    in_call = train(ours.BatchNorm(), x[None], use_running_average=False)
    as_attribute = train(ours.BatchNorm(use_running_average=False), x[None])
    chex.assert_trees_all_equal(in_call, as_attribute)


def test_use_running_average_is_given_once():
    x = normal((8, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        ours.BatchNorm().init(KEY, x)
    with pytest.raises(ValueError, match="use_running_average"):
        ours.BatchNorm(use_running_average=True).init(KEY, x, False)


def test_variables_move_between_flax_and_ours():
    x = normal((8, 3), mean=1.0)
    modules = [m(use_running_average=False) for m in (nn.BatchNorm, ours.BatchNorm)]

    @jax.jit
    def in_both_modes(variables):
        return [
            [
                m.clone(use_running_average=running).apply(
                    variables, x, mutable="batch_stats"
                )
                for running in (True, False)
            ]
            for m in modules
        ]

    for source in modules:
        results = in_both_modes(jax.jit(source.init)(KEY, x))
        chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)


def test_prediction_writes_no_statistics():
    x = normal((8, 3))
    module = ours.BatchNorm(use_running_average=True)
    variables = module.init(KEY, x)
    assert module.apply(variables, x).shape == x.shape  # nothing is mutable
    _, new = module.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(new["batch_stats"], variables["batch_stats"])


def test_init_in_training_mode_neither_moves_statistics_nor_needs_the_axis():
    x = normal((8, 3), mean=5.0)
    module = ours.BatchNorm(use_running_average=False, axis_name="batch")
    variables = module.init(KEY, x)
    expected = {"mean": np.zeros(3), "var": np.ones(3)}
    chex.assert_trees_all_equal(variables["batch_stats"], expected)
    with pytest.raises(ValueError, match="'batch' is not bound.*pmap"):
        module.apply(variables, x, mutable=["batch_stats"])


def test_init_with_a_dummy_batch_of_one_does_not_warn_but_a_step_does():
    module = ours.BatchNorm(use_running_average=False)
    x = jnp.ones((1, 3))
    variables = module.init(KEY, x)  # warnings are errors in this suite
    with pytest.warns(UserWarning, match="one value a feature"):
        module.apply(variables, x, mutable=["batch_stats"])


def test_a_layer_used_twice_updates_its_statistics_twice():
    class Twice(nn.Module):
        batch_norm: nn.Module

        def __call__(self, x, use_running_average, *, mask):
            del use_running_average, mask  # train passes what batch norm takes
            return self.batch_norm(2 * self.batch_norm(x) + 1)

    x = normal((8, 3), mean=1.0)
    got, expected = (
        train(Twice(module(use_running_average=False)), x[None])
        for module in (ours.BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_recomputation_moves_the_statistics_once():
    x = normal((8, 3), mean=1.0)
    got, expected = (
        train(module(use_running_average=False), x[None])[1]
        for module in (nn.remat(ours.BatchNorm), ours.BatchNorm)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def normalise(module, x, mask=None, momentum=0.0, **options):
    """Return the output and statistics of one training step from the start.

    Of momentum 0, which is the default here, it keeps only itself.
    """
    module = module(use_running_average=False, momentum=momentum, **options)

    def step(x, mask):
        variables = module.init(KEY, jnp.zeros((2, x.shape[-1])))
        y, new = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, new["batch_stats"]

    if module.axis_name is not None:
        step = jax.vmap(step, axis_name=module.axis_name)
    return jax.jit(step)(x, mask)


def test_axis_name_equals_flax_and_the_big_batch_where_shards_are_equal():
    x = normal((4, 6, 3), mean=1.0)
    sharded, flaxs = (
        normalise(module, x, momentum=0.9, axis_name="batch")
        for module in (ours.BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(sharded, flaxs, rtol=1e-5, atol=1e-5)
    y, _ = normalise(ours.BatchNorm, np.reshape(x, (-1, 3)))
    chex.assert_trees_all_close(sharded[0].reshape(-1, 3), y, rtol=1e-5, atol=1e-5)


# What follows is the docstring's list of where Flax is wrong: a test for each.


def test_flax_loses_the_variance_of_a_large_mean_and_ours_holds_it():
    x = normal((256, 64), mean=1e4)
    flax_y, _ = jax.device_get(normalise(nn.BatchNorm, x))
    y, stats = jax.device_get(normalise(ours.BatchNorm, x))
    # Where E[x^2] - E[x]^2 cancels to 0, y is (x - mean) / sqrt(1e-5) = 316 (x - mean).
    assert np.max(np.std(flax_y, axis=0)) > 290
    np.testing.assert_allclose(np.std(y, axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(stats["var"], reference.moments(x).var, rtol=1e-3)


def test_flax_averages_unequal_masks_as_equal_and_ours_weighs_them():
    # Present are {0, 2} and {10}: mean 12 / 3 = 4, variance (16 + 4 + 36) / 3 = 56 / 3.
    # Flax averages the means 1 and 10 to 5.5, and mean squares 2 and 100 to
    # 51 - 5.5^2 = 20.75.
    x = np.float32([[[0], [2]], [[10], [99]]])
    mask = np.array([[[True], [True]], [[True], [False]]])
    _, flax_stats = normalise(nn.BatchNorm, x, mask, axis_name="batch")
    y, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    chex.assert_trees_all_close(flax_stats["mean"], np.full((2, 1), 5.5))
    chex.assert_trees_all_close(flax_stats["var"], np.full((2, 1), 20.75))
    chex.assert_trees_all_close(stats["mean"], np.full((2, 1), 4.0), rtol=1e-6)
    chex.assert_trees_all_close(stats["var"], np.full((2, 1), 56 / 3), rtol=1e-6)
    expected = np.array([0.0, 2.0, 10.0]) - 4.0
    np.testing.assert_allclose(
        np.ravel(y)[:3], expected / np.sqrt(56 / 3 + 1e-5), rtol=1e-5
    )


def test_flax_gives_nan_for_an_empty_mask_and_ours_the_running_averages():
    x, mask = np.float32([[1], [3]]), np.zeros((2, 1), bool)
    flax_y, flax_stats = normalise(nn.BatchNorm, x, mask)
    y, stats = normalise(ours.BatchNorm, x, mask)
    assert np.isnan(flax_y).all() and np.isnan(flax_stats["mean"]).all()
    chex.assert_trees_all_equal(stats, {"mean": np.zeros(1), "var": np.ones(1)})
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_flax_gives_nan_on_all_shards_for_one_empty_and_ours_ignores_it():
    x = np.float32([[[1], [3]], [[7], [9]]])
    mask = np.array([[[True], [True]], [[False], [False]]])
    flax_y, _ = normalise(nn.BatchNorm, x, mask, axis_name="batch")
    _, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    assert np.isnan(flax_y).all()
    chex.assert_trees_all_close(
        stats, {"mean": np.full((2, 1), 2.0), "var": np.ones((2, 1))}, rtol=1e-6
    )


def test_flax_can_be_told_to_round_statistics_to_bf16_and_ours_stay_float32():
    # 256 and 258 in bfloat16, whose numbers there are 2 apart: mean 257 rounds to 256,
    # and the squares 65536 and 66560 (66564 rounded) give 66048 - 65536 = 512.
    x = jnp.array([[256.0], [258.0]], jnp.bfloat16)
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16}
    _, flax_stats = normalise(nn.BatchNorm, x, **options)
    _, stats = normalise(ours.BatchNorm, x, **options)
    assert flax_stats["mean"].item() == 256 and flax_stats["var"].item() == 512
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    chex.assert_trees_all_close(stats, {"mean": np.array([257.0]), "var": np.ones(1)})


def test_flax_gradients_are_nan_beside_a_masked_nan_and_ours_finite():
    x = np.float32([[1], [3], [np.nan]])
    mask = np.array([[True], [True], [False]])

    def gradient(module):
        def total(x):
            y, _ = normalise(module, x, mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.jit(jax.grad(total))(x)

    assert np.isnan(np.asarray(gradient(nn.BatchNorm))[:2]).all()
    assert np.isfinite(gradient(ours.BatchNorm)).all()


def test_numpy_input_needs_no_conversion():
    x = np.random.default_rng(0).normal(size=(8, 3))  # float64
    got, expected = (
        module(use_running_average=False).init_with_output(KEY, x)
        for module in (ours.BatchNorm, nn.BatchNorm)
    )
    assert_close_in_own_precision(got, expected)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("options", [{}, {"param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_input_is_promoted_as_flax_does(dtype, options, running):
    x = jnp.array([[0, 1, 1], [1, 200, 0], [0, 3, 1]]).astype(dtype)
    variables = nn.BatchNorm(use_running_average=running, **options).init(KEY, x)
    got, expected = (
        module(use_running_average=running, **options).apply(
            variables, x, mutable=["batch_stats"]
        )
        for module in (ours.BatchNorm, nn.BatchNorm)
    )
    assert_close_in_own_precision(got, expected)
    own = ours.BatchNorm(use_running_average=running, **options).init(KEY, x)
    chex.assert_trees_all_equal(own, variables)


@pytest.mark.parametrize("average", ["debiased", "cumulative"])
def test_averages_without_their_count_are_refused(average):
    """A count of 0 would let the first batch replace averages that were restored."""
    module = ours.BatchNorm(use_running_average=False, average=average)
    restored = {"mean": jnp.full(3, 7.0), "var": jnp.ones(3)}
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": restored,
    }
    x = jnp.asarray(np.random.default_rng(0).normal(5.0, 1.0, (8, 3)))
    with pytest.raises(ValueError, match="hold mean and var, but no count, .*10..6"):
        module.apply(variables, x, mutable=["batch_stats"])
    variables["batch_stats"] = {**restored, "count": jnp.float32(10**6)}
    _, updates = module.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 7.0, atol=0.05)
