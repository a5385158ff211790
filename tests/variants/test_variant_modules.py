import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import jit_unoptimised, normal

from bn_jax.functional import BatchNormParams
from bn_jax.linen import BatchNorm, BatchRenorm
from bn_jax.models.lenet import LeNet
from bn_jax.variants import quantile, whitening
from bn_jax.variants.linen import (
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    QuantileNorm,
    Whitening,
)
from bn_jax.variants.per_example import group_norm, instance_norm, layer_norm

X = normal((6, 4, 3, 8), mean=1.0, std=2.0)  # [C, H, W, N]
PARAMS = BatchNormParams(jnp.arange(1.0, 7.0), jnp.arange(-3.0, 3.0))
AXES = {"axis": 0, "batch_axis": 3}
STATEFUL = [
    Whitening,
    functools.partial(Whitening, method="iternorm", group_size=3),
    QuantileNorm,
    functools.partial(QuantileNorm, target="gaussian", num_quantiles=16),
]
EVERY = [*STATEFUL, GroupNorm, LayerNorm, InstanceNorm]


@pytest.mark.parametrize(
    ("norm", "function"),
    [
        (GroupNorm, functools.partial(group_norm, num_groups=2)),
        (LayerNorm, layer_norm),
        (InstanceNorm, instance_norm),
    ],
)
def test_modules_of_single_examples_are_their_functions(norm, function):
    module = norm(use_running_average=False, **AXES)
    variables = module.init(jax.random.key(0), X)
    assert set(variables) == {"params"}
    chex.assert_trees_all_equal_shapes(variables["params"], PARAMS._asdict())
    y = module.apply({"params": PARAMS._asdict()}, X)
    expected, _ = function(X, PARAMS, feature_axis=0, batch_axis=3)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("group_size", [None, 2])
def test_whitening_is_its_function(group_size):
    options = {"method": "cholesky", "group_size": group_size, "momentum": 0.8}
    module = Whitening(epsilon=0.1, **options, **AXES)
    check_module(
        module,
        functools.partial(whitening.whiten, epsilon=0.1, **options),
        whitening.init(6, group_size=group_size)[1],
    )


@pytest.mark.parametrize("target", ["uniform", "gaussian"])
def test_quantile_norm_is_its_function(target):
    shape = {"target": target, "num_quantiles": 16}
    check_module(
        QuantileNorm(momentum=0.8, epsilon=0.01, **shape, **AXES),
        functools.partial(quantile.quantile_norm, momentum=0.8, epsilon=0.01, **shape),
        quantile.init(6, **shape)[1],
    )


def check_module(module, function, initial):
    """Compare a module's collections and results in both modes with its function."""
    variables = module.init(jax.random.key(0), X, use_running_average=False)
    chex.assert_trees_all_equal(variables["batch_stats"], initial._asdict())
    variables = {**variables, "params": PARAMS._asdict()}
    y, moved = module.apply(
        variables, X, use_running_average=False, mutable=["batch_stats"]
    )
    expected, state = function(X, PARAMS, initial, train=True, feature_axis=0)
    chex.assert_trees_all_equal((y, moved["batch_stats"]), (expected, state._asdict()))
    variables = {**variables, **moved}
    y = module.apply(variables, X, use_running_average=True)
    expected, _ = function(X, PARAMS, state, train=False, feature_axis=0)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("norm", EVERY)
def test_scale_and_bias_can_be_left_out(norm):
    module = norm(use_running_average=False, use_scale=False, use_bias=False, **AXES)
    assert "params" not in module.init(jax.random.key(0), X)


@pytest.mark.parametrize("norm", STATEFUL)
def test_initialising_needs_no_axis_and_moves_no_average(norm):
    module = norm(use_running_average=False, axis_name="d", **AXES)
    variables = module.init(jax.random.key(0), X)
    _, initial = (
        quantile.init(
            6,
            target=module.target,
            num_quantiles=module.num_quantiles,
        )
        if isinstance(module, QuantileNorm)
        else whitening.init(6, group_size=module.group_size)
    )
    chex.assert_trees_all_equal(variables["batch_stats"], initial._asdict())
    with pytest.raises(ValueError, match="axis_name='d' is not bound"):
        module.apply(variables, X, mutable=["batch_stats"])


@pytest.mark.parametrize("norm", STATEFUL)
def test_devices_share_their_statistics(norm, devices):
    module = norm(use_running_average=False, axis_name="d", **AXES)
    variables = module.init(jax.random.key(0), X)
    parts = jnp.stack(jnp.split(X, 4, axis=3))
    run = functools.partial(module.apply, variables, mutable=["batch_stats"])
    y, moved = jax.device_get(jax.pmap(run, axis_name="d", devices=devices[:4])(parts))
    alone = norm(use_running_average=False, **AXES)
    expected = alone.apply(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_close(
        (np.concatenate(y, axis=3), jax.tree.map(lambda a: a[3], moved)),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("norm", [*STATEFUL[::2], GroupNorm])
def test_lenet_takes_it_for_its_norm(norm):
    model = LeNet(norm=norm, layout="CHWN", norm_layers=(True, False, True, False))
    images = normal((4, 28, 28, 1), seed=1)
    init = jit_unoptimised(functools.partial(model.init, train=True))
    variables = init(jax.random.key(0), images)

    def loss(params):
        logits, moved = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(logits[:, 0] ** 2), moved

    gradient, moved = jit_unoptimised(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient))
    norms = {"norm1", "norm3"} if norm in STATEFUL else set()
    assert set(moved.get("batch_stats", {})) == norms


def test_choice_of_statistics_is_given_once():
    module = QuantileNorm(axis=0)
    with pytest.raises(ValueError, match="use_running_average"):
        module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"axis=9 is not an axis|axis=9"):
        QuantileNorm(axis=9).init(jax.random.key(0), X, use_running_average=True)


@pytest.mark.parametrize(("features", "size"), [(6, 6), (16, 16), (84, 14), (13, 13)])
def test_groups_are_of_the_greatest_divisor_up_to_the_largest_size(features, size):
    layer = Whitening(use_running_average=False, max_group_size=16)
    variables = layer.init(jax.random.key(0), jnp.ones((4, features)))
    covariance = variables["batch_stats"]["covariance"]
    assert covariance.shape == (features // size, size, size)


def test_two_group_sizes_are_refused():
    layer = Whitening(use_running_average=False, max_group_size=8, group_size=4)
    with pytest.raises(
        ValueError, match="max_group_size=8 with group_size=4; give one"
    ):
        layer.init(jax.random.key(0), jnp.ones((4, 16)))


def test_renorm_module_has_the_limits_of_the_call():
    x = jax.random.normal(jax.random.key(0), (32, 5)) * 4 + 1
    fixed = BatchRenorm(use_running_average=False, r_max=2.0, d_max=0.5)
    free = BatchNorm(use_running_average=False)
    variables = free.init(jax.random.key(1), x)
    assert jax.tree.structure(fixed.init(jax.random.key(1), x)) == jax.tree.structure(
        variables
    )
    y, _ = fixed.apply(variables, x, mutable=["batch_stats"])
    expected, _ = free.apply(
        variables, x, renorm_limits=(2.0, 0.5), mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(y, expected)
    plain, _ = free.apply(variables, x, mutable=["batch_stats"])
    assert jnp.abs(y - plain).max() > 0.1
