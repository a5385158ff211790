"""Every norm by name fulfils one contract, as a function and as a module."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

from bn_jax import batch_norm, folding, transforms
from bn_jax import linen as linen_lib
from bn_jax import nnx as nnx_lib
from bn_jax.contract import Transform
from bn_jax.fields import ConfigError
from bn_jax.measures.population import exact_statistics
from bn_jax.transforms import NORMS
from marks import slow_but
from reference import normal

X = normal((8, 3, 6), mean=1.0, std=2.0)  # [N, positions, C]
KEY = jax.random.key(0)
SPECS = (
    "batch_norm",
    "batch_norm:average=debiased",
    "renorm:r_max=1.5,d_max=0.5",
    "renorm:start=1,r_end=2,d_end=3",
    "mabn:num_batches=2,warm_up=2",
    "layer",
    "group:num_groups=3",
    "instance",
    "whitening:group_size=2",
    "whitening:method=iternorm,max_group_size=4",
    "quantile:num_quantiles=8",
    "center",
    "scale",
    "dyt",
    "derf",
)
SHARED = [spec for spec in SPECS if "axis_name" in NORMS.make(spec).takes]
STATEFUL = SHARED
# Their statistics, averages and layouts are those of another spec of the same name.
SAME_STATISTICS = (
    "renorm:r_max=1.5,d_max=0.5",
    "whitening:method=iternorm,max_group_size=4",
)


def one_of_a_kind(specs):
    return slow_but([spec for spec in specs if spec not in SAME_STATISTICS], specs)


def test_each_name_is_tested():
    assert {s.partition(":")[0] for s in SPECS} == set(NORMS) - {"flax", "none"}


def random_params(params):
    """Return parameters that are neither 0 nor 1, so that none can be forgotten."""
    leaves, structure = jax.tree.flatten(params)
    values = [normal(leaf.shape, mean=1.0, seed=i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_dtypes_and_the_states_structure_are_kept(spec):
    transform = NORMS.make(spec)

    def scan(params, state, batches):
        def step(state, x):
            return transform.apply(x, params, state, train=True)[::-1]

        return jax.lax.scan(step, state, batches)

    def predict(params, state, x):
        y, same = transform.apply(x, params, state, train=False)
        chex.assert_trees_all_equal_structs(same, state)
        leaves = zip(*map(jax.tree.leaves, (same, state)), strict=True)
        assert all(one is other for one, other in leaves)
        return y

    for dtype in (jnp.float32, jnp.bfloat16):
        params, state = jax.eval_shape(lambda dtype=dtype: transform.init(6, dtype))
        for name, leaf in params._asdict().items():
            is_average = name == "moving_products"
            assert leaf.dtype == (jnp.float32 if is_average else dtype)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
        batches = jax.ShapeDtypeStruct((2, *X.shape), dtype)
        last, ys = jax.eval_shape(scan, params, state, batches)
        chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
        assert (ys.shape, ys.dtype) == (batches.shape, dtype)
        y = jax.eval_shape(predict, params, state, batches)
        assert (y.shape, y.dtype) == (batches.shape, dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_linen_nnx_and_the_function_give_the_same(spec):
    transform = NORMS.make(spec)
    first, initial = transform.init(6)
    params = random_params(first)

    def by_function(x):
        y, state = transform.apply(x, params, initial, train=True)
        predicted, _ = transform.apply(x, params, state, train=False)
        return y, state._asdict(), predicted

    def by_linen(x):
        layer = linen_lib.norm(spec)()
        variables = {"params": params._asdict(), "batch_stats": initial._asdict()}
        y, moved = layer.apply(variables, x, False, mutable=["batch_stats"])
        stats = moved.get("batch_stats", {})
        predicted = layer.apply({**variables, "batch_stats": stats}, x, True)
        return y, dict(stats), predicted

    def by_nnx(x):
        layer = nnx_lib.norm(spec)(6, rngs=nnx.Rngs(0))
        for name, value in params._asdict().items():
            getattr(layer, name).set_value(value)
        y = layer(x)
        predicted = layer(x, use_running_average=True)  # moves no average
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), predicted

    def create(x):
        return linen_lib.norm(spec)(use_running_average=True).init(KEY, x)

    (expected, *others), created = jax.jit(
        lambda x: ((by_function(x), by_linen(x), by_nnx(x)), create(x))
    )(X)
    for other in others:
        chex.assert_trees_all_close(other, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(created.get("params", {}), first._asdict())
    chex.assert_trees_all_equal(created.get("batch_stats", {}), initial._asdict())


@pytest.mark.parametrize("spec", one_of_a_kind(SPECS))
def test_layout_ensembles_and_traced_options_change_no_number(spec):
    transform = NORMS.make(spec)
    first, state = transform.init(6)
    params = random_params(first)
    name = spec.partition(":")[0]
    values = {
        "momentum": 0.75,
        "epsilon": 0.125,
        **{key: 1.25 for key in ("r_max", "d_max", "alpha", "shift")},
    }
    traceable = {
        key: values[key] for key, o in NORMS.options(name).items() if o.is_traceable
    }
    assert {"momentum", "epsilon"} & set(NORMS.options(name)) <= set(traceable)

    def module(x, options):
        layer = linen_lib.norm(spec, options=options)(use_running_average=False)
        variables = {"params": params._asdict(), "batch_stats": state._asdict()}
        return layer.apply(variables, x, mutable=["batch_stats"])

    @jax.jit
    def run(x, traced):
        y, moved = transform.apply(x, params, state, train=True)
        channels_first = transform.apply(
            jnp.transpose(x, (2, 1, 0)),
            params,
            state,
            train=True,
            feature_axis=0,
            batch_axis=2,
        )
        members = jax.vmap(lambda x: transform.apply(x, params, state, train=True))(
            jnp.stack([x, 2 * x])
        )
        return (
            (y, moved),
            (jnp.transpose(channels_first[0], (2, 1, 0)), channels_first[1]),
            jax.tree.map(lambda a: a[0], members),
            module(x, traced),
            module(x, traceable),
        )

    plain, transposed, member, traced, static = run(X, traceable)
    chex.assert_trees_all_close(transposed, plain, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(member, plain, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(traced, static, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    slow_but(
        ["batch_norm:average=debiased", "instance"],
        SPECS,
    ),
)
def test_a_step_is_exported_for_batches_and_images_of_any_size(spec):
    transform = NORMS.make(spec)
    params, state = transform.init(6)

    @jax.jit
    def step(x):
        def loss(x):
            y, moved = transform.apply(x, params, state, train=True)
            return jnp.sum(jnp.sin(y)), (y, moved)

        return jax.grad(loss, has_aux=True)(x)

    shape = export.symbolic_shape("b, h, w, 6")
    exported = export.export(step)(jax.ShapeDtypeStruct(shape, jnp.float32))
    for size in ((2, 3, 4, 6), (40, 1, 2, 6)):
        x = normal(size, mean=1.0, std=2.0)
        got, expected = exported.call(x), step(x)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def complex_reference(spec, x):
    """Return y in float64 of the norms that take complex numbers; None of others."""
    x = np.complex128(x)
    mean, var = x.mean((0, 1)), x.var((0, 1)) + 1e-5
    name, _, options = spec.partition(":")
    if name == "batch_norm" or "start=1" in options:  # as long as no limit has risen
        return (x - mean) / np.sqrt(var)
    if name == "renorm":
        r = np.clip(np.sqrt(var / (1 + 1e-5)), 1 / 1.5, 1.5)
        d = mean / np.sqrt(1 + 1e-5)
        d = d * np.minimum(1, 0.5 / np.abs(d))  # as long, in the same direction
        return (x - mean) / np.sqrt(var) * r + d
    if name in ("center", "scale"):
        return x - mean if name == "center" else x / np.sqrt(var)
    if name in ("layer", "group", "instance"):
        groups = x.reshape(8, 3, {"layer": 1, "group": 3, "instance": 6}[name], -1)
        axes = {"axis": (1, 3), "keepdims": True}
        y = (groups - groups.mean(**axes)) / np.sqrt(groups.var(**axes) + 1e-5)
        return y.reshape(x.shape)
    return None


@pytest.mark.parametrize("spec", SPECS)
def test_complex_numbers_are_normalised_or_refused(spec):
    x = X + 1j * normal(X.shape, mean=-2.0, std=3.0, seed=1)
    transform = NORMS.make(spec)
    params, state = transform.init(6)
    step = jax.jit(functools.partial(transform.apply, train=True))
    expected = complex_reference(spec, x)
    if expected is None:
        with pytest.raises(TypeError, match="complex64.*real and imaginary parts as"):
            step(x, params, state)
        return
    y, moved = step(x, params, state)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    if "mean" in state._fields and "average" not in spec:
        average = 0.1 * np.complex128(x).mean((0, 1))
        np.testing.assert_allclose(moved.mean, average, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_scale_and_bias_may_be_left_out(spec):
    text = spec + (":" if ":" not in spec else ",") + "use_scale=false,use_bias=false"
    layer = linen_lib.norm(text)(use_running_average=True)
    shapes = jax.eval_shape(layer.init, KEY, X)
    assert not {"scale", "bias"} & shapes.get("params", {}).keys()
    without = nnx_lib.norm(text)(6, rngs=nnx.Rngs(0))
    assert without.scale is None and without.bias is None


@pytest.mark.parametrize("spec", one_of_a_kind(SHARED))
def test_eight_devices_share_the_statistics_of_the_big_batch(spec, devices):
    layer = linen_lib.norm(spec, axis_name="d")(use_running_average=False)
    alone = linen_lib.norm(spec)(use_running_average=False)

    @jax.jit
    def init_and_step(x):
        variables = layer.init(KEY, x)  # needs no axis
        return variables, alone.apply(variables, x, mutable=["batch_stats"])

    variables, expected = init_and_step(X)
    _, initial = NORMS.make(spec).init(6)
    chex.assert_trees_all_equal(variables["batch_stats"], initial._asdict())
    step = functools.partial(layer.apply, variables, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="axis_name='d' is not bound"):
        jax.eval_shape(step, X)

    shards = np.reshape(X, (8, 1, 3, 6))
    y, moved = jax.device_get(jax.pmap(step, axis_name="d", devices=devices)(shards))
    got = y.reshape(X.shape), jax.tree.map(lambda a: a[5], moved)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in SHARED])
def test_axis_names_and_ghost_batches_change_nothing_without_a_batch(spec):
    layer = linen_lib.norm(spec, axis_name="nowhere", ghost_batch_size=3)()
    alone = linen_lib.norm(spec)()

    @jax.jit
    def outputs(x):
        variables = alone.init(KEY, x)
        return layer.apply(variables, x), alone.apply(variables, x)

    np.testing.assert_array_equal(*outputs(X))


@pytest.mark.parametrize("spec", one_of_a_kind(STATEFUL))
def test_averages_move_apart_from_what_normalises(spec):
    layer = linen_lib.norm(spec)()

    @jax.jit
    def runs(x):
        variables = layer.init(KEY, x, use_running_average=True)
        run = functools.partial(layer.apply, variables, x, mutable=["batch_stats"])
        return (
            variables,
            run(use_running_average=False),
            run(use_running_average=False, update_average=False),
            run(use_running_average=True, update_average=True),
            run(use_running_average=True),
        )

    variables, trained, frozen, also_trained, predicted = runs(X)
    chex.assert_trees_all_equal(frozen[0], trained[0])
    chex.assert_trees_all_equal(frozen[1]["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_close(also_trained[1], trained[1], rtol=1e-6)
    chex.assert_trees_all_equal(also_trained[0], predicted[0])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("train", [True, False])
def test_params_and_state_of_another_kind_are_refused(spec, train):
    transform = NORMS.make(spec)
    params, state = transform.init(6)
    wrong_params = (None, params._asdict(), tuple(params), list(params), state)
    wrong_states = (None, state._asdict(), tuple(state), list(state), params)
    for wrong in wrong_params:
        message = f"params is of type {type(wrong).__name__}; expected .* scale, bias"
        with pytest.raises(TypeError, match=message):
            transform.apply(X, wrong, state, train=train)
    if not state:  # nothing of it is read
        return
    for wrong in wrong_states:
        fields = ", ".join(state._fields)
        message = f"state is of type {type(wrong).__name__}; .* fields {fields}"
        with pytest.raises(TypeError, match=message):
            transform.apply(X, params, wrong, train=train)


@pytest.mark.parametrize("make", [linen_lib.norm, nnx_lib.norm])
@pytest.mark.parametrize(
    ("spec", "attributes", "message"),
    [
        ("batch_nrom", {}, r"norm='batch_nrom'; expected one of .*mean batch_norm"),
        ("layer", {"options": {"momentum": 0.5}}, "no option 'momentum'; layer takes"),
        ("scale", {"options": {"momentum": 1.5}}, r"momentum=1.5; expected.*\[0, 1\]"),
        ("whitening:method=svd", {}, "method=svd; expected one of zca, pca"),
        (
            "whitening:group_size=4,max_group_size=8",
            {},
            "max_group_size=8 with group_size=4; give one",
        ),
        ("renorm:start=5,r_end=4", {}, "r_end=4 is before start=5"),
        ("scale", {"options": {"momentum": jnp.float32(2)}}, r"momentum=2; expected"),
        (
            "quantile",
            {"ghost_batch_size": 4},
            "takes no ghost_batch_size.*leave it out",
        ),
        ("whitening", {"axis_index_groups": [[0]], "axis_name": "d"}, "axis_index_gr"),
        ("flax", {"ghost_batch_size": 4}, "'flax' takes no ghost_batch_size"),
        (transforms.center(), {"options": {"momentum": 0.5}}, "options momentum for a"),
    ],
)
def test_what_a_norm_does_not_take_is_refused_in_one_line(
    make, spec, attributes, message
):
    with pytest.raises(ConfigError, match=message) as refusal:
        make(spec, **attributes)
    assert "\n" not in str(refusal.value)


def test_layers_refuse_what_their_transform_does_not_take():
    layer = linen_lib.Norm(transforms.layer())
    variables = jax.jit(layer.init)(KEY, X)
    with pytest.raises(ValueError, match="'layer' takes no weights.*shape .8, 1"):
        layer.apply(variables, X, weights=jnp.ones((8, 1)))
    with pytest.raises(ValueError, match=r"num_features=\(3, 6\).*one integer"):
        linen_lib.norm("whitening")(axis=(1, 2)).init(KEY, X, True)
    with pytest.raises(ValueError, match="use_running_average"):
        linen_lib.norm("center")().init(KEY, X)
    with pytest.raises(ValueError, match="given nowhere"):
        nnx_lib.norm("center")(6, use_running_average=None)(X)


@pytest.mark.parametrize("norm", [linen_lib.norm, nnx_lib.norm])
@pytest.mark.parametrize("spec", [None, linen_lib.BatchNorm, 3])
def test_what_is_neither_a_name_nor_a_transform_is_refused(norm, spec):
    with pytest.raises(ConfigError, match="a norm is given as .*NORMS, such as"):
        norm(spec)


@pytest.mark.parametrize("choice", ["use_running_average", "update_average"])
def test_traced_choices_are_refused(choice):
    linen, nnx_layer = linen_lib.BatchNorm(), nnx_lib.BatchNorm(6, rngs=nnx.Rngs(0))
    variables = linen.init(KEY, X, True)
    given = {"use_running_average": True}

    def in_linen(value):
        return linen.apply(variables, X, **given | {choice: value})

    def in_nnx(value):
        return nnx_layer(X, **given | {choice: value})

    for call in (in_linen, in_nnx):
        with pytest.raises(TypeError, match=f"{choice} must be a Python bool"):
            jax.jit(call)(True)


@pytest.mark.parametrize("spec", ["group", linen_lib.BatchNorm])
def test_layer_of_what_is_no_transform_is_refused(spec):
    with pytest.raises(TypeError, match="transform is .*; expected one, such as"):
        linen_lib.Norm(spec).init(KEY, X)
    with pytest.raises(TypeError, match="transform is .*; expected one, such as"):
        nnx_lib.Norm(6, spec)


def test_mask_that_does_not_broadcast_is_refused_by_its_own_shape():
    x, mask = jnp.ones((8, 3, 3, 6)), jnp.ones(8, bool)
    layer = linen_lib.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"mask of shape \[8\] does not broadcast to"):
        layer.init(KEY, x, mask=mask)
    layer.init(KEY, x, mask=mask[:, None, None, None])
    layer.init(KEY, x, mask=jnp.ones((3, 6), bool))


def test_nnx_layer_of_several_feature_axes_is_refused():
    with pytest.raises(ValueError, match=r"num_features=\(2, 3\).*one integer"):
        nnx_lib.BatchNorm((2, 3), rngs=nnx.Rngs(0))


def test_weights_reach_the_transforms_that_take_them():
    weights = np.arange(8) % 3
    rows = np.repeat(np.asarray(X), weights, axis=0)
    for spec in ("center", "scale", "renorm"):
        layer = linen_lib.norm(spec)(use_running_average=False)

        @jax.jit
        def moves(x, weights, rows, layer=layer):
            variables = layer.init(KEY, x)
            run = functools.partial(layer.apply, variables, mutable=["batch_stats"])
            return run(x, weights=weights)[1], run(rows)[1]

        moved, repeated = moves(X, np.float32(weights)[:, None], rows)
        chex.assert_trees_all_close(moved, repeated, rtol=1e-5, atol=1e-6)


def test_one_example_at_a_time_shares_its_norm_along_an_axis():
    x = np.asarray(X[:, 0])
    for spec in ("center", "renorm"):
        each = linen_lib.norm(spec, axis_name="n")(use_running_average=False)
        whole = linen_lib.norm(spec)(use_running_average=False)

        @jax.jit
        def run(x, each=each, whole=whole):
            variables = each.init(KEY, x[0])
            step = functools.partial(each.apply, variables, mutable=["batch_stats"])
            expected = whole.apply(variables, x, mutable=["batch_stats"])
            return jax.vmap(step, axis_name="n")(x), expected

        (y, moved), expected = run(x)
        got = y, jax.tree.map(lambda a: a[0], moved)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_by_name_is_the_drop_in_layer_with_momentum_a_tenth():
    made = linen_lib.norm("batch_norm:epsilon=0.25", options={"use_bias": False})
    layer = made(use_running_average=False, axis=0, batch_axis=2, name="norm1")
    assert isinstance(layer, linen_lib.BatchNorm)
    assert (layer.momentum, layer.epsilon, layer.use_bias) == (0.9, 0.25, False)
    flax = linen_lib.norm("flax:use_fast_variance=false")(axis=1, batch_axis=0)
    assert flax == nn.BatchNorm(momentum=0.9, axis=1, use_fast_variance=False)
    assert linen_lib.norm("none") is None and nnx_lib.norm("none") is None
    in_nnx = nnx_lib.norm("batch_norm:average=cumulative")(6, rngs=nnx.Rngs(0))
    assert isinstance(in_nnx, nnx_lib.BatchNorm)
    x = np.asarray(X)
    step = nnx.jit(lambda layer, x: layer(x))
    step(in_nnx, x)
    step(in_nnx, 3 * x)
    assert in_nnx.count[...] == 2
    np.testing.assert_allclose(in_nnx.mean[...], 2 * x.mean((0, 1)), rtol=1e-5)


def test_norms_that_predict_by_a_mean_and_a_variance_are_told_by_name():
    told = {spec for spec in (*SPECS, "flax", "none") if transforms.is_batch_norm(spec)}
    assert told == {s for s in SPECS if s[:6] in ("batch_", "renorm")} | {"flax"}


def test_layers_of_one_name_are_equal():
    # So that what is compiled for one, as a static argument, serves the other.
    one, other = (linen_lib.norm("whitening")(axis=0) for _ in range(2))
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize(("features", "size"), [(6, 6), (16, 16), (84, 14), (13, 13)])
def test_groups_are_of_the_greatest_divisor_up_to_the_largest_size(features, size):
    _, state = NORMS.make("whitening:max_group_size=16").init(features)
    assert state.covariance.shape == (features // size, size, size)


@pytest.mark.parametrize("spec", slow_but(["batch_norm:average=debiased"], STATEFUL))
def test_a_transform_leaves_numpy_states_as_they_are(spec):
    transform = NORMS.make(spec)
    given = jax.tree.map(np.array, (X, *transform.init(6)))
    for array in jax.tree.leaves(given):
        array.setflags(write=False)
    once, again = (transform.apply(*given, train=True) for _ in range(2))
    chex.assert_trees_all_equal(once, again)
    assert any((a != b).any() for a, b in zip(once[1], given[2], strict=True))


def test_options_may_be_given_as_flaxs_layers_take_them():
    layer = linen_lib.norm("batch_norm", momentum=0.5, use_bias=False)()
    assert (layer.momentum, layer.use_bias) == (0.5, False)
    layer = linen_lib.norm("renorm", momentum=0.5)(use_running_average=False)
    x = jnp.array([[2.0], [4.0]])
    _, variables = layer.init_with_output(jax.random.key(0), x)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert updates["batch_stats"]["mean"] == 1.5
    with pytest.raises(ConfigError, match="'group' has no option 'momentum'; group t"):
        linen_lib.norm("group", momentum=0.5)
    with pytest.raises(ConfigError, match="momentum is given twice"):
        linen_lib.norm("renorm", options={"momentum": 0.5}, momentum=0.5)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_constructors_take_options_as_flaxs_layers_do(kind):
    def made(spec, **options):
        if kind == "linen":
            return linen_lib.norm(spec)(use_running_average=False, **options)
        return nnx_lib.norm(spec)(6, rngs=nnx.Rngs(0), **options)

    def y_of(layer):
        if kind == "linen":
            return layer.init_with_output(KEY, X)[0]
        return layer(X)

    for option in ({"epsilon": 4.0}, {"use_bias": False}):
        given = made("layer", **option)
        bound = ",".join(f"{k}={str(v).lower()}" for k, v in option.items())
        np.testing.assert_array_equal(y_of(given), y_of(made(f"layer:{bound}")))
    assert not np.allclose(y_of(made("layer", epsilon=4.0)), y_of(made("layer")))
    with pytest.raises(ConfigError, match="'layer' has no option 'momentum'; layer ta"):
        made("layer", momentum=0.9)
    with pytest.raises(ConfigError, match="options momentum for a transform, whose"):
        made(transforms.center(), momentum=0.9)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_what_a_layer_does_not_take_is_refused_with_what_it_takes(kind):
    def made(spec, **given):
        if kind == "linen":
            return linen_lib.norm(spec)(**given)
        return nnx_lib.norm(spec)(6, rngs=nnx.Rngs(0), **given)

    module = linen_lib if kind == "linen" else nnx_lib
    with pytest.raises(
        ConfigError, match="'layer' takes no fast; expected some of epsilon, use_scale,"
    ):
        made("layer", fast=True)
    with pytest.raises(ConfigError, match=r"no momentun \(did you mean momentum\?\); "):
        made("batch_norm", momentun=0.9)
    with pytest.raises(
        ConfigError, match="'center' takes no fast; expected some of ax"
    ):
        made(transforms.center(), fast=True)
    with pytest.raises(ConfigError, match="'flax' takes no fast; expected some of "):
        made("flax", fast=True)
    with pytest.raises(
        ConfigError, match="'batch_norm' has no option 'num_groups'; ba"
    ):
        made("batch_norm", num_groups=2)
    with pytest.raises(
        ConfigError, match="'group' takes no fast; expected some of num"
    ):
        module.norm("group:num_groups=3", fast=True)
    assert made("batch_norm", momentum=0.5).momentum == 0.5
    assert made("flax", momentum=0.5, batch_axis=0).momentum == 0.5


def test_options_may_be_numbers_of_numpy_and_jax():
    for momentum in (np.float64(0.5), jnp.float32(0.5), np.array(0.5)):
        assert linen_lib.norm("batch_norm", options={"momentum": momentum})() == (
            linen_lib.norm("batch_norm:momentum=0.5")()
        )
    groups = linen_lib.norm("group", options={"num_groups": np.int64(3)})()
    by_text = linen_lib.norm("group:num_groups=3")()
    variables = by_text.init(KEY, X)
    chex.assert_trees_all_equal(groups.apply(variables, X), by_text.apply(variables, X))


@pytest.mark.parametrize("make", [linen_lib.norm, nnx_lib.norm])
def test_a_step_leaves_the_callers_numpy_variables_as_they_are(make):
    for spec in ("batch_norm:average=cumulative", "renorm"):
        if make is linen_lib.norm:
            layer = make(spec)(use_running_average=False)
            variables = jax.tree.map(np.array, jax.jit(layer.init)(KEY, X))
            step = functools.partial(layer.apply, mutable=["batch_stats"])
        else:
            graphdef, state = nnx.split(make(spec)(6, rngs=nnx.Rngs(0)))
            variables = jax.tree.map(np.array, state)

            def step(state, x, graphdef=graphdef):
                nnx.merge(graphdef, state)(x)

        arrays = jax.tree.leaves(variables)
        before = list(map(np.copy, arrays))
        step(variables, X)
        chex.assert_trees_all_equal(arrays, before)


class TwoNorms(nn.Module):
    """A dense layer and two norms, for what looks at models from outside."""

    spec: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="dense")(x)
        for i in (1, 2):
            norm = linen_lib.norm(self.spec)
            x = norm(use_running_average=not train, name=f"norm{i}")(x)
            x = nn.Dense(6, name=f"dense{i}")(x)
        return x


@pytest.mark.parametrize(
    "spec",
    slow_but(["batch_norm", "renorm"], ["batch_norm", "renorm", "quantile", "group"]),
)
def test_tabulate_shows_layers_and_no_helpers(spec):
    table = TwoNorms(spec).tabulate(
        KEY, X, show_repeated=True, compute_flops=True, console_kwargs={"width": 240}
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    paths = {line.split("│")[1].strip() for line in plain.splitlines() if "│" in line}
    assert paths - {""} == {"dense", "norm1", "norm2", "dense1", "dense2"}


@functools.cache
def variables_of(spec):
    return jax.jit(TwoNorms(spec).init)(KEY, X)


def predict(variables, x, spec):
    return TwoNorms(spec).apply(variables, x)


def test_exact_statistics_of_renorm_are_batch_norms():
    expected, got = (
        exact_statistics(
            functools.partial(predict, spec=spec), variables_of(spec), X, batch_size=8
        )
        for spec in ("batch_norm", "renorm")
    )
    assert variables_of("batch_norm")["batch_stats"].keys() == got.keys()
    for layer, stats in got.items():
        assert stats.pop("count") == 0  # no batch was averaged
        chex.assert_trees_all_close(stats, expected[layer], rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("center", "mean"),
        ("scale", "var"),
        ("mabn", "count and squares and var"),
        ("whitening", "covariance and mean"),
        ("quantile", "knots"),
    ],
)
def test_exact_statistics_and_folding_refuse_other_statistics_in_words(spec, kept):
    variables = variables_of(spec)
    of_spec = functools.partial(predict, spec=spec)
    with pytest.raises(ValueError, match=f"norm1, norm='{spec}', predicts by {kept};"):
        exact_statistics(of_spec, variables, X, batch_size=8)
    if spec != "quantile":
        with pytest.raises(ValueError, match=f"norm1, norm='{spec}', predicts by"):
            folding.fold(of_spec, variables, X, without_norms=of_spec)


def test_statistics_beside_norms_are_none_of_ours_to_refuse():
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.SpectralNorm(nn.Dense(6))
            x = layer(x, update_stats=False)
            return linen_lib.BatchNorm(use_running_average=True, name="norm")(x)

    model = Spectral()
    variables = jax.jit(model.init)(KEY, X)
    got = exact_statistics(model.apply, variables, X, batch_size=8)
    assert not np.allclose(got["norm"]["var"], 1)


def test_a_transform_of_the_users_own_makes_layers():
    def apply(x, params, state, *, train, feature_axis=-1, batch_axis=0):
        del train, feature_axis, batch_axis
        return x * params.scale + params.bias, state

    mine = Transform(transforms.center().init, apply, name="affine")
    layer = linen_lib.norm(mine)(use_running_average=False)
    y, variables = layer.init_with_output(KEY, X)
    np.testing.assert_array_equal(y, X)
    assert variables["params"].keys() == {"scale", "bias"}
    np.testing.assert_array_equal(nnx_lib.norm(mine)(6)(X), X)


def test_names_agree_with_batch_norms_own_defaults():
    by_name = NORMS.make("batch_norm")
    initial = by_name.init(6)
    named = jax.jit(functools.partial(by_name.apply, train=True))
    itself = jax.jit(functools.partial(batch_norm, train=True, momentum=0.9))
    chex.assert_trees_all_equal(named(X, *initial), itself(X, *initial))


INITIALISED = [spec for spec in SPECS if "average" not in spec]


@pytest.mark.parametrize("spec", one_of_a_kind(INITIALISED))
def test_scale_and_bias_start_from_initializers_in_linen_and_nnx(spec):
    starts = {
        "scale_init": nn.initializers.zeros,
        "bias_init": nn.initializers.constant(0.5),
    }
    linen = linen_lib.norm(spec, **starts)(use_running_average=True)
    nnx_layer = nnx_lib.norm(spec, **starts)(6, rngs=nnx.Rngs(0))
    y, variables = linen.init_with_output(KEY, X)
    for found in (variables["params"], nnx.to_pure_dict(nnx.state(nnx_layer))):
        np.testing.assert_array_equal(found["scale"], np.zeros(6))
        np.testing.assert_array_equal(found["bias"], np.full(6, 0.5))
    np.testing.assert_array_equal(y, np.full(X.shape, 0.5))


def test_initializers_draw_a_key_for_scale_before_one_for_bias_as_flax_does():
    starts = {
        "scale_init": nnx.initializers.normal(),
        "bias_init": nnx.initializers.normal(),
    }
    ours = nnx_lib.norm("group", **starts)(6, rngs=nnx.Rngs(3))
    flax = nnx.BatchNorm(6, rngs=nnx.Rngs(3), **starts)
    np.testing.assert_array_equal(ours.scale[...], flax.scale[...])
    np.testing.assert_array_equal(ours.bias[...], flax.bias[...])


def test_initializer_of_what_a_norm_does_not_have_is_refused():
    spec, zeros = "group:use_scale=false", nn.initializers.zeros
    with pytest.raises(ConfigError, match="scale_init is given for norm='group', whic"):
        linen_lib.norm(spec, scale_init=zeros)().init(KEY, X)
    with pytest.raises(ConfigError, match="scale_init is given for norm='group', whic"):
        nnx_lib.norm(spec, scale_init=zeros)(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="bias_init is given, but no rngs.*nnx.Rngs"):
        nnx_lib.norm("group", bias_init=zeros)(6)
    # Flax's own attributes may say what is not there.
    batch_norm = linen_lib.BatchNorm(True, use_scale=False, scale_init=zeros)
    assert sorted(batch_norm.init(KEY, X)["params"]) == ["bias"]


@pytest.mark.parametrize("value", ["yes", 1, None, np.ones(2, bool)])
def test_choices_that_are_no_booleans_are_refused(value):
    x, nnx_layer = jnp.ones((4, 6)), nnx_lib.BatchNorm(6, rngs=nnx.Rngs(0))
    expected = f"={re.escape(repr(value))}; expected True or False"
    with pytest.raises(TypeError, match="train" + expected):
        batch_norm(x, *transforms.batch_norm().init(6), train=value)
    with pytest.raises(TypeError, match="scale" + expected):
        transforms.group(use_scale=value).init(6)
    with pytest.raises(TypeError, match="scale" + expected):
        nnx_lib.BatchNorm(6, use_scale=value, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="zero_masked" + expected):
        linen_lib.BatchNorm(True, zero_masked=value).init(KEY, x)
    if value is None:
        return
    with pytest.raises(TypeError, match="update_state" + expected):
        batch_norm(x, *transforms.batch_norm().init(6), train=True, update_state=value)
    with pytest.raises(TypeError, match="use_running_average" + expected):
        linen_lib.BatchNorm(value).init(KEY, x)
    with pytest.raises(TypeError, match="use_running_average" + expected):
        nnx_layer(x, use_running_average=value)
    with pytest.raises(TypeError, match="update_average" + expected):
        nnx_layer(x, update_average=value)


@pytest.mark.parametrize("train", [np.bool_(True), np.array(True)])
def test_booleans_of_numpy_are_choices(train):
    params, state = transforms.batch_norm().init(6)
    y, _ = batch_norm(X, params, state, train=train)
    np.testing.assert_array_equal(y, batch_norm(X, params, state, train=True)[0])


def test_layer_says_for_how_many_features_it_is_made():
    images, wrong = jnp.ones((4, 5, 5, 6)), jnp.ones((4, 6, 5, 5))
    for layer in (
        nnx_lib.BatchNorm(6, rngs=nnx.Rngs(0)),
        nnx_lib.norm("group:num_groups=3")(6),
        nnx_lib.BatchNorm(6, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)),
    ):
        layer(images)
        with pytest.raises(ValueError, match="is made for 6 features.* has 5 on axis"):
            layer(wrong)
    linen = linen_lib.BatchNorm(True, use_scale=False, use_bias=False, name="bn")
    variables = linen.init(KEY, images)
    with pytest.raises(ValueError, match="^BatchNorm is made for 6 features.* has 5 "):
        linen.apply(variables, wrong)


def test_statistics_to_normalise_by_of_other_features_are_refused():
    params, state = transforms.batch_norm().init(6)
    _, other = transforms.batch_norm().init(5)
    with pytest.raises(ValueError, match=r"statistics.mean has shape \[5\].*measure"):
        batch_norm(X, params, state, train=True, statistics=other)
