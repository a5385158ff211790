"""Layers inside JAX's and Flax's transforms, and predict functions compiled before.

The reference is training mode of the same model on the whole set at once: with a
momentum of 0 it leaves the statistics of each layer's input, the layers before it
normalised by theirs.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.linen import BatchNorm
from bn_jax.measures.population import batch_moments, exact_statistics
from marks import slow_but
from reference import normal

X = normal((24, 2), mean=1.0, std=2.0, seed=1)
PER_STEP = {"split_rngs": {"params": True}, "variable_axes": {True: 0}}


class Block(nn.Module):
    """A layer that does not hand on what it is given; one step of a scan."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        norm = self.norm(use_running_average=not train, momentum=0.0, name="norm")
        return nn.tanh(norm(nn.Dense(2)(x))), None


LIFTS = {
    "jit": nn.jit(Block, static_argnums=2),
    "remat": nn.remat(Block, static_argnums=2),
    "scan": nn.scan(Block, length=2, in_axes=nn.broadcast, **PER_STEP),
    "scan from the end": nn.scan(
        Block, length=2, in_axes=nn.broadcast, reverse=True, **PER_STEP
    ),
    "scan along the last axis": nn.scan(
        Block,
        length=3,
        in_axes=nn.broadcast,
        split_rngs={"params": True},
        variable_axes={"params": 0, "batch_stats": 1},
    ),
    "scan of remat": nn.scan(
        nn.remat(Block, static_argnums=2), length=2, in_axes=nn.broadcast, **PER_STEP
    ),
    "vmap": nn.vmap(Block, in_axes=None, axis_size=2, **PER_STEP),
}


class Lifted(nn.Module):
    lift: str
    norm: type[nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x, _ = LIFTS[self.lift](self.norm, name="inner")(x, train)
        if self.lift == "vmap":
            x = x[0] + 2 * x[1]
        return self.norm(use_running_average=not train, momentum=0.0, name="last")(x)


@functools.cache
def made(lift, norm=BatchNorm):
    """A compiled predict function that was called before, and variables."""
    model = Lifted(lift, norm)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), X
    )
    predict = jax.jit(functools.partial(model.apply, train=False))
    predict(variables, X[:16])
    return model, predict, variables


def of_whole_set(model, variables):
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, updates = jax.jit(train)(variables, X)
    return updates["batch_stats"]


CASES = [(lift, norm) for lift in LIFTS for norm in (BatchNorm, nn.BatchNorm)]
QUICK = [
    ("scan along the last axis", BatchNorm),
]


@pytest.mark.parametrize(("lift", "norm"), slow_but(QUICK, CASES))
def test_layers_are_measured_inside_of_transforms(lift, norm):
    model, predict, variables = made(lift, norm)
    got = exact_statistics(predict, variables, X, batch_size=16)
    expected = of_whole_set(model, variables)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("lift", slow_but(["scan"], list(LIFTS)))
def test_layers_are_normalised_by_the_batch_inside_of_transforms(lift):
    model, predict, variables = made(lift)
    outputs, moments = jax.jit(functools.partial(batch_moments, predict))(variables, X)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    expected, updates = jax.jit(train)(variables, X)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    of_inner = updates["batch_stats"]["inner"]["norm"]
    np.testing.assert_allclose(
        moments["inner", "norm"].mean, of_inner["mean"], rtol=1e-4, atol=1e-5
    )
    one_pass = exact_statistics(predict, variables, X, batch_size=24, mode="one_pass")
    chex.assert_trees_all_close(one_pass, updates["batch_stats"], rtol=1e-4, atol=1e-5)


def test_layers_are_seen_where_gradients_are_taken():
    """As in a model of energies, whose forces are gradients."""
    model, _, variables = made("jit")

    def forces(variables, x):
        return jax.grad(lambda x: model.apply(variables, x, train=False).sum())(x)

    got = exact_statistics(jax.jit(forces), variables, X, batch_size=8)
    expected = of_whole_set(model, variables)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-5)


def predict_one_by_one(variables, inputs):
    model, _, _ = made("jit")
    return jax.vmap(lambda x: model.apply(variables, x, train=False))(inputs)


def test_examples_that_are_mapped_are_measured_together():
    model, _, variables = made("jit")
    got = exact_statistics(predict_one_by_one, variables, X, batch_size=16)
    expected = of_whole_set(model, variables)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-5)


def test_examples_that_are_mapped_are_not_normalised_one_by_one():
    _, _, variables = made("jit")
    with pytest.raises(ValueError, match="layer inner/norm .*jax.vmap.*layerwise"):
        exact_statistics(
            predict_one_by_one, variables, X, batch_size=16, mode="one_pass"
        )


def test_layer_inside_a_branch_is_refused():
    _, predict, variables = made("jit")

    def either(variables, x):
        return jax.lax.cond(x.sum() > 0, predict, lambda _, x: x, variables, x)

    with pytest.raises(ValueError, match="inside cond, where its input cannot be seen"):
        exact_statistics(either, variables, X, batch_size=8)


def test_statistics_that_predict_changes_are_refused():
    _, predict, variables = made("jit")

    def shifted(variables, x):
        return predict(jax.tree.map(lambda leaf: leaf + 0.5, variables), x)

    with pytest.raises(ValueError, match="layer inner/norm are not those in variables"):
        exact_statistics(shifted, variables, X, batch_size=8)


def test_statistics_that_predict_closes_over_are_refused():
    _, predict, variables = made("jit")
    with pytest.raises(ValueError, match="layer inner/norm are not those in variables"):
        exact_statistics(lambda _, x: predict(variables, x), variables, X, batch_size=8)


def test_model_that_closes_over_traced_values_is_traced_anew():
    _, predict, variables = made("jit")

    @jax.jit
    def first_mean(factor):
        def scaled(variables, x):
            return predict(variables, factor * x)

        exact = exact_statistics(scaled, variables, jnp.asarray(X), batch_size=8)
        return exact["inner"]["norm"]["mean"]

    of_scaled = [first_mean(factor) for factor in (1.0, jnp.float32(3.0))]
    bias = variables["params"]["inner"]["Dense_0"]["bias"]
    np.testing.assert_allclose(
        of_scaled[1] - bias, 3 * (of_scaled[0] - bias), rtol=1e-4, atol=1e-5
    )
