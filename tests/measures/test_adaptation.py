import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax.linen import BatchNorm
from bn_jax.measures.adaptation import adapted_statistics
from bn_jax.measures.population import exact_statistics, with_exact_statistics
from marks import slow_but
from reference import normal

X = normal((24, 3), mean=2.0, std=3.0, seed=4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(BatchNorm, use_running_average=not train)
        return norm(name="b")(jnp.tanh(norm(name="a")(x)))


@functools.cache
def net():
    variables = jax.jit(Net().init)(jax.random.key(0), X)
    rng = np.random.default_rng(0)
    stats = jax.tree.map(
        lambda v: jnp.float32(rng.uniform(0.5, 1.5, v.shape)), variables["batch_stats"]
    )
    return Net(), {**variables, "batch_stats": stats}


def expected(variables, x, pseudo_count):
    """The formula in float64, layer after layer, on all examples at once."""
    x, found = np.float64(x), {}
    for name in ("a", "b"):
        old = variables["batch_stats"][name]
        share = len(x) / (len(x) + pseudo_count)
        mean = share * x.mean(0) + (1 - share) * np.float64(old["mean"])
        var = share * x.var(0) + (1 - share) * np.float64(old["var"])
        found[name] = {"mean": mean, "var": var}
        x = np.tanh((x - mean) / np.sqrt(var + 1e-5))
    return found


@pytest.mark.parametrize("pseudo_count", [0, 16.5])
def test_statistics_are_mixed_layer_after_layer(pseudo_count):
    model, variables = net()
    got = adapted_statistics(
        model, variables, X, pseudo_count=pseudo_count, batch_size=7
    )
    chex.assert_trees_all_close(
        got, expected(variables, X, pseudo_count), rtol=1e-5, atol=1e-6
    )


def test_batches_of_a_loader_count_by_their_examples():
    model, variables = net()
    got = adapted_statistics(model, variables, [X[:5], X[5:]], pseudo_count=16.5)
    chex.assert_trees_all_close(got, expected(variables, X, 16.5), rtol=1e-5, atol=1e-6)


def test_weights_are_the_number_of_examples():
    model, variables = net()
    got = adapted_statistics(
        model,
        variables,
        X,
        pseudo_count=8,
        batch_size=24,
        weights=jnp.where(jnp.arange(24) < 12, 2.0, 0.0),
    )
    chex.assert_trees_all_close(
        got, expected(variables, X[:12], 4), rtol=1e-5, atol=1e-6
    )


def test_no_pseudo_count_gives_the_exact_statistics_bit_for_bit():
    model, variables = net()
    chex.assert_trees_all_equal(
        adapted_statistics(model, variables, X, pseudo_count=0, batch_size=8),
        exact_statistics(model, variables, X, batch_size=8),
    )


def test_averages_that_are_not_finite_are_replaced_whole():
    model, variables = net()
    broken = jax.tree.map(lambda v: v * jnp.nan, variables["batch_stats"])
    got = exact_statistics(model, {**variables, "batch_stats": broken}, X, batch_size=8)
    chex.assert_trees_all_equal(
        got, exact_statistics(model, variables, X, batch_size=8)
    )


@pytest.mark.parametrize("mode", slow_but(["one_pass"], ["layerwise", "one_pass"]))
def test_many_pseudo_counts_keep_the_old_statistics(mode):
    model, variables = net()
    got = adapted_statistics(
        model, variables, X, pseudo_count=1e9, batch_size=8, mode=mode
    )
    chex.assert_trees_all_close(got, variables["batch_stats"], rtol=1e-5, atol=1e-5)


def test_nnx_modules_adapt():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    got = adapted_statistics(model, None, X, pseudo_count=24, batch_size=24)
    np.testing.assert_allclose(got["mean"][...], X.mean(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(got["var"][...], (X.var(0) + 1) / 2, rtol=1e-5)


@pytest.mark.parametrize("pseudo_count", [-1, float("inf"), float("nan"), None, "1"])
def test_pseudo_counts_that_are_none_are_refused(pseudo_count):
    with pytest.raises(ValueError, match="pseudo_count=.*expected a number of example"):
        adapted_statistics(*net(), X, pseudo_count=pseudo_count, batch_size=8)
    with pytest.raises(ValueError, match="pseudo_count=.*expected a number of example"):
        with_exact_statistics(*net(), X, pseudo_count=pseudo_count, batch_size=8)
