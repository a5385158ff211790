"""What normalises, whether the averages move, and what learns: three choices."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import reference
from bn_jax import BatchNormParams, BatchNormState, batch_norm, measure
from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.nnx import BatchNorm as NnxBatchNorm
from bn_jax.variables import moving_param_mask, norm_param_mask
from reference import normal

X = normal((8, 3), mean=2.0)
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))
GIVEN = BatchNormState(jnp.array([2.0, 1.0, 0.0]), jnp.array([4.0, 5.0, 6.0]))


@pytest.mark.parametrize("given", [None, GIVEN])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
def test_what_normalises_and_what_moves_are_chosen_apart(given, train, update):
    y, state = batch_norm(
        X, PARAMS, STATE, train=train, statistics=given, update_state=update
    )
    by = given or (reference.moments(X) if train else STATE)
    expected = reference.standardised(X, by.mean, by.var)
    np.testing.assert_allclose(
        y, expected * PARAMS.scale + PARAMS.bias, rtol=1e-4, atol=1e-5
    )
    if train if update is None else update:
        moved = batch_norm(X, PARAMS, STATE, train=True)[1]
        chex.assert_trees_all_close(state, moved)
    else:
        assert state is STATE


def test_gradients_flow_through_given_moments_of_the_same_batch():
    def by_batch(x):
        return jnp.sum(jnp.sin(batch_norm(x, PARAMS, STATE, train=True)[0]))

    def by_given(x):
        y, _ = batch_norm(x, PARAMS, STATE, train=True, statistics=measure(x))
        return jnp.sum(jnp.sin(y))

    gradients = (jax.jit(jax.grad(loss))(X) for loss in (by_given, by_batch))
    chex.assert_trees_all_close(*gradients, rtol=1e-5)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
def test_module_moves_its_averages_and_counter_when_told(running, update):
    norm = BatchNorm(momentum=0.9, average="debiased")
    variables = norm.init(jax.random.key(0), X, use_running_average=True)
    _, updates = norm.apply(
        variables,
        X,
        running,
        update_average=update,
        mutable=["batch_stats"],
    )
    if not running if update is None else update:
        batch = reference.moments(X)  # the first batch is the debiased average
        expected = {"mean": batch.mean, "var": batch.var, "count": 1.0}
    else:
        expected = variables["batch_stats"]
    chex.assert_trees_all_close(
        dict(updates["batch_stats"]), expected, rtol=1e-5, atol=1e-6
    )


def test_mask_singles_out_the_scale_and_bias_of_norms():
    model = LeNet(norm=BatchNorm)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 28, 28, 1)),
    )
    mask = norm_param_mask(variables)
    frozen = optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask))
    params = variables["params"]
    gradients = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    updates, _ = jax.jit(frozen.update)(gradients, frozen.init(params))
    for layer, values in updates.items():
        for name, value in values.items():
            assert np.any(value) != layer.startswith("norm"), (layer, name)


class State(NamedTuple):
    params: Any
    batch_stats: Any


def test_mask_has_the_kind_of_the_parameters():
    params = {"norm": {"scale": 1.0, "bias": 0.0}, "dense": {"kernel": 2.0}}
    stats = {"norm": {"mean": 0.0, "var": 1.0}}
    expected = {"norm": {"scale": True, "bias": True}, "dense": {"kernel": False}}
    variables = {"params": params, "batch_stats": stats}
    assert norm_param_mask(State(params, stats)) == expected
    frozen = norm_param_mask(freeze(variables))
    assert isinstance(frozen, FrozenDict) and frozen.unfreeze() == expected


def test_mask_of_an_nnx_module_goes_with_its_optimizer():
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), NnxBatchNorm(3, rngs=nnx.Rngs(0))
    )
    mask = norm_param_mask(model)
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask)),
        wrt=nnx.Param,
    )
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(after["layers"][1], before["layers"][1])
    np.testing.assert_allclose(
        after["layers"][0]["kernel"], before["layers"][0]["kernel"] - 1, rtol=1e-6
    )


def test_mask_of_what_are_no_variables_is_refused():
    with pytest.raises(ValueError, match="variables are a mapping of dense; expected"):
        norm_param_mask({"dense": {"kernel": 2.0}})


def test_mask_that_would_single_out_nothing_is_refused():
    params = {"norm": {"scale": 1.0}}
    with pytest.raises(ValueError, match="have no batch_stats, by which"):
        norm_param_mask({"params": params})
    with pytest.raises(ValueError, match="have no params"):
        norm_param_mask({"batch_stats": {"norm": {"mean": 0.0, "var": 1.0}}})
    with pytest.raises(ValueError, match="have no params"):
        moving_param_mask({})
