"""`bn_jax.nnx.BatchNorm` is `flax.nnx.BatchNorm`, but for where Flax is wrong."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx, serialization
from jax.sharding import AxisType, PartitionSpec
from reference import jit_unoptimised, normal

from bn_jax import nnx as ours

MODULES = (ours.BatchNorm, nnx.BatchNorm)
SHAPE = (6, 4, 4, 3)
MASK = np.random.default_rng(1).integers(0, 2, (6, 4, 4, 1)).astype(bool)
CASES = {
    "rank 2": {"shape": (16, 3)},
    "NHWC": {},
    "NCHW, no scale": {"axis": 1, "use_scale": False},
    "first axis, no bias": {"axis": 0, "use_bias": False},
    "axis from the end, neither": {"axis": -3, "use_scale": False, "use_bias": False},
    "numbers and initializers": {
        "momentum": 0.5,
        "epsilon": 1e-2,
        "scale_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.normal(1.0),
    },
    "slow variance": {"use_fast_variance": False},
    "mask": {"mask": MASK},
    "mask of lower rank, NCHW": {"axis": 1, "mask": MASK[0]},
    "mask of every value": {"mask": MASK ^ (np.arange(3) == 1)},
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


def loss_and_output(layer, x, mask=None):
    """Return a loss with no symmetry that would hide a term, and the output."""
    y = layer(x) if mask is None else layer(x, mask=mask)
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.mean(jnp.sin(coefficients * y) * y), y


def train(module, batches, mask=None, **options):
    """Return all that a few steps of gradient descent with a layer bring about."""
    num_features = batches.shape[1:][options.get("axis", -1)]
    layer = module(num_features, rngs=nnx.Rngs(0), **options)
    graphdef, first = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state)
        gradient = nnx.grad(loss_and_output, argnums=(0, 1), has_aux=True)
        gradients, y = gradient(layer, x, mask)
        params = nnx.state(layer, nnx.Param)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients[0])
        nnx.update(layer, params)
        state = nnx.state(layer)
        return state, (y, *map(nnx.to_pure_dict, gradients[:1]), gradients[1])

    @jit_unoptimised
    def run(state, batches):
        state, steps = jax.lax.scan(step, state, batches)
        layer = nnx.merge(graphdef, state)
        layer.eval()
        return nnx.to_pure_dict(state), steps, layer(batches[0])

    return nnx.to_pure_dict(first), *run(first, batches)


def assert_close_in_own_precision(actual, expected):
    """Compare to 1e-5, or two roundings of the coarsest dtype where that is more.

    Parameters in bfloat16 lend their rounding to all but the running averages.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    coarsest = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(expected))

    def compare(path, a, b):
        path = jax.tree_util.keystr(path)
        is_average = "'mean'" in path or "'var'" in path
        tolerance = 1e-5 if is_average else max(1e-5, 2 * coarsest)
        np.testing.assert_allclose(
            *map(np.float64, (a, b)), rtol=tolerance, atol=tolerance, err_msg=path
        )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def variables(layer):
    """Return the layer's values as nested dictionaries of arrays."""
    return nnx.to_pure_dict(nnx.state(layer))


def snapshot(layer):
    """Return graphdef and state; the latter holds copies, not the layer's variables."""
    return nnx.split(nnx.clone(layer))


def merge(graphdef, state):
    """Return a layer with variables of its own."""
    return nnx.merge(graphdef, state, copy=True)


def make(module=ours.BatchNorm, num_features=3, **options):
    return module(num_features, rngs=nnx.Rngs(0), **options)


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
    added = {"ghost_batch_size", "batch_axis"}
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


@pytest.mark.parametrize("case", CASES)
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
        np.testing.assert_allclose(jnp.mean(layer(x), axis=0), 7, rtol=1e-5)


def test_one_example_by_itself_is_evaluated_as_in_a_batch():
    x = normal((4, 3))
    mine, flax = (make(m, use_running_average=True) for m in MODULES)
    for layer in (mine, flax):
        layer.mean[...], layer.var[...] = jnp.array([1.0, 2, 3]), jnp.array([4.0, 5, 6])
    y = jax.vmap(mine)(x)
    chex.assert_trees_all_close(y, jax.vmap(flax)(x), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(y, mine(x), rtol=1e-6, atol=1e-6)
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
        each = jax.vmap(
            lambda x, *given, g=graphdef, s=state: step(s, x, *given, g),
            axis_name="batch",
        )
        y, states = each(x, *given)
        batch = make()
        expected = batch(x, weights=expected_weights)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)
        one = jax.tree.map(lambda a: a[0], states)
        chex.assert_trees_all_close(one, variables(batch), rtol=1e-5, atol=1e-6)


def test_running_averages_are_the_closed_form_after_n_steps():
    # From a_0, n equal batches of statistic b give m^n a_0 + (1 - m^n) b.
    x = normal((16, 3), mean=2.0, std=3.0)
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
        gradient = nnx.grad(loss)(x, make(module))
        np.testing.assert_allclose(gradient, 0, atol=1e-5)  # y sums to beta


# Options that Flax lacks.


@pytest.mark.parametrize("axis,size", [(0, 2), (1, 3)])
def test_ghost_batches_are_normalised_each_by_itself(axis, size):
    x = normal((4, 6, 3), mean=1.0)
    layer, whole = make(ghost_batch_size=size, batch_axis=axis), make()
    parts = np.split(layer(x), 2, axis)
    for part, x_part in zip(parts, np.split(x, 2, axis), strict=True):
        expected, _ = reference.batch_norm(x_part)
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5)
    whole(x)  # the averages move by the moments of the whole batch
    chex.assert_trees_all_close(variables(layer), variables(whole), rtol=1e-5)


def test_weights_are_repeats_and_not_to_be_had_with_a_mask():
    x, weights = normal((4, 3), mean=1.0), np.array([1, 0, 2, 3])
    weighted, repeated = make(), make()
    weighted(x, weights=weights)
    repeated(jnp.repeat(x, weights, axis=0))
    chex.assert_trees_all_close(variables(weighted), variables(repeated), rtol=1e-5)
    with pytest.raises(ValueError, match="mask and weights"):
        weighted(x, weights=weights, mask=weights > 0)


def test_update_average_is_apart_from_what_normalises():
    x = normal((8, 3), mean=1.0)
    moved = make()
    trained = moved(x)
    frozen = make()
    chex.assert_trees_all_equal(frozen(x, update_average=False), trained)
    chex.assert_trees_all_equal(variables(frozen), variables(make()))
    predicted = frozen(x, use_running_average=True, update_average=True)
    chex.assert_trees_all_close(predicted, x / jnp.sqrt(1 + 1e-5), rtol=1e-6)
    chex.assert_trees_all_close(variables(frozen), variables(moved), rtol=1e-6)


# Modes, transforms, checkpoints.


class Block(nnx.Module):
    """A dense layer with a batch norm of choice."""

    def __init__(self, norm, *, rngs, size=3):
        self.dense = nnx.Linear(size, size, rngs=rngs)
        self.norm = norm(size, rngs=rngs)

    def __call__(self, x):
        return jax.nn.sigmoid(self.norm(self.dense(x)))


def test_train_eval_set_attributes_and_view_reach_the_layer():
    x = normal((8, 3), mean=1.0)
    block = Block(ours.BatchNorm, rngs=nnx.Rngs(0))
    before = variables(block)
    block.eval()
    assert block.norm.use_running_average is True
    prediction = block(x)
    chex.assert_trees_all_equal(variables(block), before)
    block.train()
    assert block.norm.use_running_average is False
    assert np.max(np.abs(block(x) - prediction)) > 0.1
    assert np.all(block.norm.mean[...] != before["norm"]["mean"])
    block.set_attributes(ours.BatchNorm, use_running_average=True, momentum=0.5)
    assert (block.norm.use_running_average, block.norm.momentum) == (True, 0.5)
    viewed = nnx.view(block, use_running_average=False)
    assert viewed.norm.use_running_average is False
    assert block.norm.use_running_average is True
    assert viewed.norm.mean is block.norm.mean
    assert "use_running_average" in nnx.view_info(block)


def test_use_running_average_in_the_call_goes_before_and_is_given_somewhere():
    x = normal((8, 3), mean=1.0)
    for module in MODULES:
        for attribute in (True, False, None):
            layer = make(module, use_running_average=attribute)
            y = layer(x, True)
            chex.assert_trees_all_close(y, x / jnp.sqrt(1 + 1e-5), rtol=1e-6)
            layer(x, use_running_average=False)
            assert np.all(layer.mean[...] != 0)
        with pytest.raises(ValueError, match="use_running_average"):
            layer(x)


def test_nnx_jit_is_the_same_and_traces_once():
    x = normal((3, 8, 3), mean=1.0)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(layer, x):
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
        return y, gradients

    jitted, eager = make(), make()
    for batch in x:
        got = step(jitted, batch)
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(eager, batch)
        chex.assert_trees_all_close(got, (y, gradients), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(variables(jitted), variables(eager), rtol=1e-5)


def test_an_ensemble_under_nnx_vmap_is_its_members_apart():
    x = normal((4, 8, 3), mean=1.0)  # 4 members, each with a batch of its own

    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def create(rngs):
        return ours.BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs)

    @nnx.vmap
    def step(layer, x):
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
        return y, gradients

    ensemble = create(nnx.Rngs(0))
    assert np.unique(ensemble.scale[...]).size == 12
    graphdef, before = snapshot(ensemble)
    got = step(ensemble, x)
    for i in range(4):
        member = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], before))
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(member, x[i])
        one = jax.tree.map(lambda a, i=i: a[i], (got, variables(ensemble)))
        chex.assert_trees_all_close(
            one, ((y, gradients), variables(member)), rtol=1e-5, atol=1e-5
        )


def test_recomputation_moves_the_averages_once():
    x = normal((8, 3), mean=1.0)

    @nnx.remat
    def recomputed(block, x):
        return block(x)

    def loss(block, x, forward):
        return jnp.mean(jnp.sin(jnp.arange(24.0).reshape(8, 3) * forward(block, x)))

    results = []
    for forward in (recomputed, lambda block, x: block(x)):
        block = Block(ours.BatchNorm, rngs=nnx.Rngs(0))
        gradients = nnx.grad(loss)(block, x, forward)
        results.append((nnx.to_pure_dict(gradients), variables(block)))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_layers_stacked_under_nnx_scan_are_the_layers_in_turn():
    x = normal((8, 3), mean=1.0)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return Block(ours.BatchNorm, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    blocks = create(nnx.Rngs(0))
    graphdef, before = snapshot(blocks)
    got, expected = forward(x, blocks), x
    for i in range(2):
        block = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], before))
        expected = block(expected)
        one = jax.tree.map(lambda a, i=i: a[i], variables(blocks))
        chex.assert_trees_all_close(one, variables(block), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_split_and_merge_keep_all():
    x = normal((8, 3), mean=1.0)
    layer = make(momentum=0.5, ghost_batch_size=4, use_bias=False)
    layer(x)
    graphdef, params, averages = nnx.split(layer, nnx.Param, nnx.BatchStat)
    assert set(params) == {"scale"} and set(averages) == {"mean", "var"}
    merged = nnx.merge(graphdef, params, averages)
    chex.assert_trees_all_equal(merged(x), layer(x))
    chex.assert_trees_all_equal(variables(merged), variables(layer))


def by_state(source, target, path):
    nnx.update(target, nnx.state(source))


def by_pure_dict(source, target, path):
    state = nnx.state(target)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(source)))
    nnx.update(target, state)


def by_file(source, target, path):
    path.write_bytes(serialization.to_bytes(variables(source)))
    loaded = serialization.from_bytes(variables(target), path.read_bytes())
    nnx.update(target, jax.tree.map(jnp.asarray, loaded))


@pytest.mark.parametrize("move", [by_state, by_pure_dict, by_file])
@pytest.mark.parametrize("source_module,target_module", [MODULES, MODULES[::-1]])
def test_checkpoints_move_between_flax_and_ours(
    move, source_module, target_module, tmp_path
):
    x = normal((8, 3), mean=1.0)
    source = Block(source_module, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(source, optax.sgd(0.5), wrt=nnx.Param)
    for _ in range(2):
        gradients, _ = nnx.grad(loss_and_output, has_aux=True)(source, x)
        optimizer.update(source, gradients)
    target = Block(target_module, rngs=nnx.Rngs(1))
    move(source, target, tmp_path / "checkpoint")
    chex.assert_trees_all_equal(variables(target), variables(source))
    for mode in ("eval", "train"):
        getattr(source, mode)()
        getattr(target, mode)()
        chex.assert_trees_all_close(target(x), source(x), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        variables(target), variables(source), rtol=1e-5, atol=1e-5
    )


# Shared statistics.


def sharded_step(way, layer):
    """Return a function of x `[8, N, C]`: one step of the layer on 8 devices."""
    graphdef, state = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state)
        gradients, y = nnx.grad(loss_and_output, has_aux=True)(layer, x)
        # All have the same averages; under pmap each device hands on its own.
        return y, nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(layer))

    if way == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0))
        return lambda x: mapped(state, x)

    def one_shard(state, x):
        return jax.tree.map(lambda a: a[None], step(state, x[0]))

    mesh = jax.make_mesh((8,), ("batch",), (AxisType.Auto,))
    shard, whole = PartitionSpec("batch"), PartitionSpec()
    mapped = jax.shard_map(
        one_shard,
        mesh=mesh,
        in_specs=(whole, shard),
        out_specs=shard,
        check_vma=False,  # gradients are each device's own share, as under pmap
    )
    return lambda x: jax.jit(mapped)(state, x)


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_eight_devices_share_the_statistics_of_the_one_big_batch(way):
    x = normal((8, 4, 3), mean=1.0) * jnp.arange(1.0, 9)[:, None, None]
    scale_init = nnx.initializers.normal(1.0)
    layer = make(axis_name="batch", scale_init=scale_init)
    y, gradients, states = jax.device_get(sharded_step(way, layer)(x))

    big = make(scale_init=scale_init)

    def total(layer, x):
        y = layer(x).reshape(8, -1, 3)
        coefficients = jnp.arange(1.0, 13).reshape(4, 3) / 12
        losses = jnp.mean(jnp.sin(coefficients * y) * y, axis=(1, 2))
        return jnp.sum(losses), y

    big_gradients, big_y = nnx.grad(total, has_aux=True)(big, x.reshape(-1, 3))
    chex.assert_trees_all_close(y, big_y, rtol=1e-5, atol=1e-5)
    summed = jax.tree.map(lambda a: a.sum(0), gradients)
    chex.assert_trees_all_close(
        summed, nnx.to_pure_dict(big_gradients), rtol=1e-4, atol=1e-5
    )
    for i in range(8):
        state = jax.tree.map(lambda a, i=i: a[i], states)
        chex.assert_trees_all_close(state, variables(big), rtol=1e-5, atol=1e-6)


def test_nnx_pmap_of_a_replicated_layer_equals_the_big_batch():
    x = normal((8, 4, 3), mean=1.0)
    layer, big = make(axis_name="batch"), make()

    @nnx.pmap(in_axes=(nnx.StateAxes({...: None}), 0), out_axes=0, axis_name="batch")
    def step(layer, x):
        return layer(x)

    y = jax.device_get(step(layer, x))
    chex.assert_trees_all_close(
        y.reshape(-1, 3), big(x.reshape(-1, 3)), rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_close(
        jax.device_get(variables(layer)), variables(big), rtol=1e-5, atol=1e-6
    )


def test_an_unbound_axis_is_named_and_prediction_needs_none():
    x = normal((8, 3))
    layer = make(axis_name="batch")
    with pytest.raises(ValueError, match="'batch' is not bound.*pmap"):
        layer(x)
    layer.eval()
    assert layer(x).shape == x.shape


def test_groups_share_statistics_inside_themselves_alone():
    x = normal((4, 2, 3), mean=1.0)
    layer = make(axis_name="batch", axis_index_groups=[[0, 2], [1, 3]])
    graphdef, state = nnx.split(layer)
    step = jax.pmap(
        lambda x: merge(graphdef, state)(x),
        axis_name="batch",
        devices=jax.devices()[:4],
    )
    y = jax.device_get(step(x))
    for group in ([0, 2], [1, 3]):
        rows = x[jnp.array(group)]
        chex.assert_trees_all_close(y[group], make()(rows), rtol=1e-5, atol=1e-5)


# What follows is the docstring's list of where Flax is wrong: a test for each.


def normalise(module, x, mask=None, **options):
    """Return the output and statistics of one training step that keeps only itself."""
    layer = make(module, x.shape[-1], momentum=0.0, **options)
    graphdef, state = nnx.split(layer)

    def step(x, mask):
        layer = merge(graphdef, state)
        y = layer(x, mask=mask)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    if layer.axis_name is not None:
        step = jax.vmap(step, axis_name=layer.axis_name)
    return jax.jit(step)(x, mask)


def test_flax_loses_the_variance_of_a_large_mean_and_ours_holds_it():
    x = normal((256, 64), mean=1e4)
    flax_y, _ = normalise(nnx.BatchNorm, x)
    y, stats = normalise(ours.BatchNorm, x)
    # Where E[x^2] - E[x]^2 cancels to 0, y is (x - mean) / sqrt(1e-5) = 316 (x - mean).
    assert np.max(np.std(flax_y, axis=0)) > 290
    np.testing.assert_allclose(np.std(y, axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(stats["var"], reference.moments(x).var, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_flax_rounds_the_running_averages_in_evaluation_and_ours_do_not(dtype):
    # In bfloat16, whose numbers are 2 apart there, a mean of 259 is 260; in float16 one
    # of 4098 (4 apart) is 4096 with x 4096. Then x - mean is 0 in place of +-1 or -2.
    mean, x, y = (259, 260, 2.0) if dtype == jnp.bfloat16 else (4098, 4096, -4.0)
    results = []
    for module in MODULES:
        layer = make(module, 1, dtype=dtype, use_running_average=True)
        layer.mean[...], layer.var[...] = jnp.full(1, float(mean)), jnp.full(1, 0.25)
        results.append(layer(jnp.full((1, 1), x, dtype)))
        assert layer.mean[...].item() == mean
    got, flax = results
    assert got.dtype == flax.dtype == dtype
    assert flax.item() == 0 and got.item() == y  # y is exact in dtype


def test_flax_averages_unequal_masks_as_equal_and_ours_weighs_them():
    # Present are {0, 2} and {10}: mean 12 / 3 = 4, variance (16 + 4 + 36) / 3 = 56 / 3.
    # Flax averages the means 1 and 10 to 5.5, and mean squares 2 and 100 to
    # 51 - 5.5^2 = 20.75.
    x = jnp.array([[[0.0], [2.0]], [[10.0], [99.0]]])
    mask = jnp.array([[[True], [True]], [[True], [False]]])
    _, flax_stats = normalise(nnx.BatchNorm, x, mask, axis_name="batch")
    y, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    chex.assert_trees_all_close(flax_stats["mean"], jnp.full((2, 1), 5.5))
    chex.assert_trees_all_close(flax_stats["var"], jnp.full((2, 1), 20.75))
    chex.assert_trees_all_close(stats["mean"], jnp.full((2, 1), 4.0), rtol=1e-6)
    chex.assert_trees_all_close(stats["var"], jnp.full((2, 1), 56 / 3), rtol=1e-6)
    expected = np.array([0.0, 2.0, 10.0]) - 4.0
    np.testing.assert_allclose(
        y.ravel()[:3], expected / np.sqrt(56 / 3 + 1e-5), rtol=1e-5
    )


def test_flax_gives_nan_for_an_empty_mask_and_ours_the_running_averages():
    x, mask = jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1), bool)
    flax_y, flax_stats = normalise(nnx.BatchNorm, x, mask)
    y, stats = normalise(ours.BatchNorm, x, mask)
    assert np.isnan(flax_y).all() and np.isnan(flax_stats["mean"]).all()
    chex.assert_trees_all_equal(stats, {"mean": jnp.zeros(1), "var": jnp.ones(1)})
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_flax_gives_nan_on_all_shards_for_one_empty_and_ours_ignores_it():
    x = jnp.array([[[1.0], [3.0]], [[7.0], [9.0]]])
    mask = jnp.array([[[True], [True]], [[False], [False]]])
    flax_y, _ = normalise(nnx.BatchNorm, x, mask, axis_name="batch")
    _, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    assert np.isnan(flax_y).all()
    chex.assert_trees_all_close(
        stats, {"mean": jnp.full((2, 1), 2.0), "var": jnp.ones((2, 1))}, rtol=1e-6
    )


def test_flax_gradients_are_nan_beside_a_masked_nan_and_ours_finite():
    x = jnp.array([[1.0], [3.0], [jnp.nan]])
    mask = jnp.array([[True], [True], [False]])

    def gradient(module):
        def total(x):
            y, _ = normalise(module, x, mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.jit(jax.grad(total))(x)

    assert np.isnan(gradient(nnx.BatchNorm)[:2]).all()
    assert np.isfinite(gradient(ours.BatchNorm)).all()


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax
@pytest.mark.filterwarnings("ignore:Casting complex values")  # Flax
def test_flax_drops_the_imaginary_part_of_the_mean_and_ours_keeps_it():
    x = jnp.array([[1 + 1j], [3 + 5j]])
    _, flax_stats = normalise(nnx.BatchNorm, x)
    _, stats = normalise(ours.BatchNorm, x)
    assert flax_stats["mean"].item() == 2
    assert stats["mean"].item() == 2 + 3j
    assert stats["var"].item() == 5 and stats["var"].dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax
def test_flax_freezes_averages_in_bf16_and_ours_refuse_them_in_training():
    # One step from 256 to 0.99 * 256 + 0.01 * 300 = 256.44, which bfloat16 rounds.
    x = jnp.array([[299.0], [301.0]])
    mine, flax = (make(m, 1) for m in MODULES)
    for layer in (mine, flax):
        layer.mean.set_value(jnp.array([256.0], jnp.bfloat16))
        layer.var.set_value(jnp.array([1.0], jnp.bfloat16))
    flax(x)
    assert flax.mean[...].item() == 256
    with pytest.raises(ValueError, match="mean has dtype bfloat16, too narrow"):
        mine(x)
    mine.eval()
    np.testing.assert_allclose(mine(x), x - 256.0, rtol=1e-5)


# A model trains.


class LeNet(nnx.Module):
    """LeNet with sigmoids, and a batch norm before each but the last."""

    def __init__(self, norm, *, rngs):
        def layers(layer, *sizes):
            return nnx.List(
                [layer(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
            )

        def conv(a, b):
            return nnx.Conv(a, b, (5, 5), padding="VALID", rngs=rngs)

        def dense(a, b):
            return nnx.Linear(a, b, rngs=rngs)

        self.convs = layers(conv, 1, 6, 16)
        self.denses = layers(dense, 256, 120, 84)
        self.norms = nnx.List(
            [norm(c, momentum=0.9, rngs=rngs) for c in (6, 16, 120, 84)]
        )
        self.head = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x):
        norms = iter(self.norms)
        for conv in self.convs:
            x = jax.nn.sigmoid(next(norms)(conv(x)))
            x = nnx.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for dense in self.denses:
            x = jax.nn.sigmoid(next(norms)(dense(x)))
        return self.head(x)


def test_a_small_lenet_learns_synthetic_images():
    rng = np.random.default_rng(0)
    prototypes = rng.random((10, 28, 28, 1))
    labels = np.arange(160) % 10
    images = prototypes[labels] + 0.3 * rng.standard_normal((160, 28, 28, 1))
    batches = jnp.float32(images).reshape(5, 32, 28, 28, 1), labels.reshape(5, 32)

    def step(model, optimizer, images, labels):
        def loss(model):
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses, accuracy = {}, {}
    for module in MODULES:
        model = nnx.jit(lambda norm=module: LeNet(norm, rngs=nnx.Rngs(0)))()
        optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
        jitted = nnx.jit(step)
        model.train()
        losses[module] = [
            float(jitted(model, optimizer, *batch))
            for _ in range(6)
            for batch in zip(*batches, strict=True)
        ]
        model.eval()
        logits = nnx.jit(lambda model, x: model(x))(model, jnp.float32(images))
        accuracy[module] = np.mean(np.argmax(logits, -1) == labels)
    mine, flax = (losses[m] for m in MODULES)
    np.testing.assert_allclose(mine[:5], flax[:5], rtol=1e-3)
    assert mine[0] > 2 and mine[-1] < 0.25
    assert accuracy[ours.BatchNorm] > 0.98
