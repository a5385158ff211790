"""A batch that lies on the devices of a mesh: the same numbers, by one exchange."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax import batch_norm, init, measure
from bn_jax.contract import EmptyState
from bn_jax.variants.per_example import layer_norm
from marks import slow_but
from reference import normal

EXCHANGES = re.compile(
    r"= \S.* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
# Shape, feature axis, batch axis, further options.
CASES = {
    "dense": ((32, 3), -1, 0, {}),
    "NHWC": ((16, 4, 4, 3), -1, 0, {}),
    "CHWN": ((3, 4, 4, 16), 0, 3, {}),
    "CHWN, batch axis not said": ((3, 8, 4, 16), 0, 0, {}),
    "ghosts of two devices": ((32, 3), -1, 0, {"ghost_batch_size": 8}),
    "ghosts of half a device": ((32, 3), -1, 0, {"ghost_batch_size": 2}),
    "does not divide": ((12, 3), -1, 0, {}),
}


@pytest.fixture
def mesh(devices):
    return jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=devices)


def everything(case, weighted=False):
    """Return a function of x, gamma and beta: y, the state, and gradients."""
    shape, feature_axis, batch_axis, options = CASES[case]
    _, state = init(3)
    weights = None
    if weighted:
        weights = np.random.default_rng(1).integers(0, 3, shape[batch_axis])
        places = [1] * len(shape)
        places[batch_axis] = -1
        weights = jnp.float32(weights).reshape(places)

    def loss(x, params):
        y, new = batch_norm(
            x,
            params,
            state,
            train=True,
            feature_axis=feature_axis,
            batch_axis=batch_axis,
            weights=weights,
            **options,
        )
        numbers = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
        return jnp.sum(jnp.sin(numbers * y)) + jnp.sum(new.mean * new.var), (y, new)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def placed(x, mesh, axis):
    spec = [None] * x.ndim
    spec[axis] = ("a", "b") if x.shape[axis] % 8 == 0 else "a"
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize(
    ("case", "weighted"),
    slow_but(
        [("NHWC", False), ("CHWN", True), ("ghosts of two devices", False)],
        [(c, w) for c in CASES for w in (False, True) if not (w and "not said" in c)],
    ),
)
def test_values_state_and_gradients_are_those_of_one_device(case, weighted, mesh):
    shape, _, batch_axis, _ = CASES[case]
    batch_axis = len(shape) - 1 if "CHWN" in case else batch_axis
    params = init(3)[0]._replace(bias=jnp.array([1.0, 0.0, -3.0]))
    x = normal(shape, mean=2.0, std=3.0)
    step = everything(case, weighted)
    expected = jax.device_get(jax.jit(step)(x, params))
    with jax.set_mesh(mesh):
        found = jax.jit(step)(placed(x, mesh, batch_axis), params)
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", slow_but(["CHWN"], ["dense", "NHWC", "CHWN"]))
def test_a_layer_costs_one_exchange_forward_and_one_backward(case, mesh):
    shape, feature_axis, batch_axis, _ = CASES[case]
    params, state = init(3)

    def step(params, x, dy):
        y, pull, new = jax.vjp(
            lambda params, x: batch_norm(
                x,
                params,
                state,
                train=True,
                feature_axis=feature_axis,
                batch_axis=batch_axis,
            ),
            params,
            x,
            has_aux=True,
        )
        return y, pull(dy), new

    x = placed(jnp.zeros(shape), mesh, batch_axis)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(params, x, x).compile().as_text()
    assert collections.Counter(EXCHANGES.findall(text)) == {
        "all-gather": 1,
        "all-reduce": 1,
    }


def test_moments_of_large_means_keep_their_digits(mesh):
    x = normal((64, 3), mean=1e4)
    with jax.set_mesh(mesh):
        _, mean, var = jax.jit(measure)(placed(x, mesh, 0))
    wide = np.float64(x)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-6)
    # A part's mean is a float32, of which 1e4 has a multiple of .001.
    np.testing.assert_allclose(var, wide.var(0), rtol=2e-4)


def test_complex_moments_of_a_sharded_batch(mesh):
    x = normal((16, 3), mean=1.0) + 1j * normal((16, 3), seed=1)
    expected = jax.device_get(jax.jit(measure)(x))
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(measure)(placed(x, mesh, 0)))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_compilation_and_over_an_ensemble(mesh):
    x = normal((2, 16, 3), mean=1.0)
    params, state = init(3)
    step = functools.partial(batch_norm, train=True)
    expected = jax.vmap(lambda x: step(x, params, state))(x)
    with jax.set_mesh(mesh):
        eager = [step(x[i], params, state) for i in range(2)]
        stacked = jax.jit(jax.vmap(lambda x: step(x, params, state)))(
            placed(x, mesh, 1)
        )
    eager = jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager)
    for found in (eager, stacked):
        chex.assert_trees_all_close(
            jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-5
        )


def test_norms_of_single_examples_exchange_nothing(mesh):
    x = placed(jnp.zeros((16, 8, 8, 4)), mesh, 0)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x: layer_norm(x, init(4)[0], EmptyState(), train=True)[0])
        assert not EXCHANGES.findall(step.lower(x).compile().as_text())
