import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.population import exact_statistics

IMAGES = jax.random.uniform(jax.random.key(3), (50, 28, 28, 1))


def predict(model, variables, x):
    return model.apply(variables, x, train=False)


def whole_batch_statistics(model, variables, inputs):
    """What one training-mode batch of all examples keeps, with the old average out."""
    _, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


@pytest.mark.parametrize(
    ("norm", "layout", "batch_size"),
    [
        (BatchNorm, "CHWN", 16),
        (BatchNorm, "NHWC", 25),
        (nn.BatchNorm, "CHWN", 99),
    ],
)
def test_equals_one_batch_of_all_examples_whatever_the_batch_size(
    norm, layout, batch_size
):
    model = LeNet(norm=functools.partial(norm, momentum=0.0), layout=layout)
    variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
    exact = exact_statistics(
        functools.partial(predict, model), variables, IMAGES, batch_size=batch_size
    )
    expected = whole_batch_statistics(model, variables, IMAGES)
    chex.assert_trees_all_close(exact, expected, rtol=1e-5, atol=1e-6)


class TwoNorms(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            BatchNorm, use_running_average=not train, momentum=0.0, axis=-1
        )
        # Created in the order b, a: the order of calls counts, not that of names.
        x = jax.nn.relu(norm(name="b")(x))
        return norm(name="a")(nn.Dense(3)(x))


def test_layers_are_measured_in_the_order_of_their_calls():
    model = TwoNorms()
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (40, 4))
    variables = model.init(jax.random.key(1), x, train=False)
    exact = exact_statistics(
        functools.partial(predict, model), variables, x, batch_size=9
    )
    chex.assert_trees_all_close(
        exact, whole_batch_statistics(model, variables, x), rtol=1e-5, atol=1e-5
    )


def test_prediction_with_exact_statistics_is_training_mode_on_the_whole_set():
    model = LeNet(norm=BatchNorm)
    variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
    exact = exact_statistics(
        functools.partial(predict, model), variables, IMAGES, batch_size=20
    )
    predicted = predict(model, {**variables, "batch_stats": exact}, IMAGES)
    trained, _ = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_close(predicted, trained, atol=1e-5)


def test_model_without_batch_norm_has_none():
    model = LeNet()
    variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
    predict_one = functools.partial(predict, model)
    assert exact_statistics(predict_one, variables, IMAGES, batch_size=10) == {}


@pytest.mark.parametrize(("examples", "batch_size"), [(0, 5), (5, 0)])
def test_no_examples_or_no_batch_is_refused(examples, batch_size):
    with pytest.raises(ValueError, match=f"{examples} examples.*{batch_size}"):
        exact_statistics(
            lambda variables, x: x, {}, jnp.ones((examples, 2)), batch_size=batch_size
        )
