import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.linen import BatchNorm
from bn_jax.models.lenet import LeNet
from bn_jax.population import exact_statistics, gap

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


def mlp():
    model = TwoNorms()
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (40, 4))
    return model, model.init(jax.random.key(1), x, train=False), x


def test_one_pass_is_layerwise_in_the_first_layer_and_pools_the_second():
    model, variables, x = mlp()
    predict_one = functools.partial(predict, model)
    pooled = exact_statistics(predict_one, variables, x, batch_size=9, mode="one_pass")
    layerwise = exact_statistics(predict_one, variables, x, batch_size=9)
    chex.assert_trees_all_close(pooled["b"], layerwise["b"], rtol=1e-5)
    # By hand: what layer a is given in training mode, batch by batch, as one set.
    given = []
    for start in range(0, 40, 9):
        batch = x[start : start + 9]
        standard = (batch - batch.mean(0)) / jnp.sqrt(batch.var(0) + 1e-5)
        dense = variables["params"]["Dense_0"]
        given.append(jax.nn.relu(standard) @ dense["kernel"] + dense["bias"])
    given = jnp.concatenate(given)
    np.testing.assert_allclose(pooled["a"]["mean"], given.mean(0), rtol=1e-4)
    np.testing.assert_allclose(pooled["a"]["var"], given.var(0), rtol=1e-4)
    assert abs(pooled["a"]["var"] / layerwise["a"]["var"] - 1).max() > 1e-3


def test_one_pass_over_one_batch_is_layerwise():
    model, variables, x = mlp()
    results = [
        exact_statistics(
            functools.partial(predict, model), variables, x, batch_size=40, mode=mode
        )
        for mode in ("one_pass", "layerwise")
    ]
    chex.assert_trees_all_close(*results, rtol=1e-5)


@pytest.mark.parametrize("mode", ["layerwise", "one_pass"])
@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
def test_integer_weights_equal_repeated_images_wherever_the_examples_lie(mode, norm):
    model = LeNet(norm=norm, layout="CHWN")  # the convolutions' batch axis is the last
    variables = model.init(jax.random.key(0), IMAGES[:1], train=False)
    weights = jnp.array([0, 1, 2, 3] * 3)
    measured = functools.partial(
        exact_statistics, functools.partial(predict, model), variables, mode=mode
    )
    # In one pass batches matter, so let there be one.
    size = 5 if mode == "layerwise" else 99
    weighted = measured(IMAGES[:12], weights=weights, batch_size=size)
    repeated = measured(jnp.repeat(IMAGES[:12], weights, axis=0), batch_size=size)
    chex.assert_trees_all_close(weighted, repeated, rtol=1e-4, atol=1e-6)


def test_first_examples_only_when_told():
    model, variables, x = mlp()
    measured = functools.partial(
        exact_statistics, functools.partial(predict, model), variables, batch_size=8
    )
    chex.assert_trees_all_close(
        measured(x, num_examples=20), measured(x[:20]), rtol=1e-6
    )


class Reused(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = BatchNorm(use_running_average=not train, momentum=0.0, name="norm")
        return norm(3 * norm(x) + 1)


def test_reused_layer_pools_its_calls():
    model, x = Reused(), 5 + jax.random.normal(jax.random.key(0), (20, 2))
    variables = model.init(jax.random.key(1), x, train=False)
    pooled = exact_statistics(
        functools.partial(predict, model), variables, x, batch_size=20, mode="one_pass"
    )
    second = 3 * (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) + 1
    both = jnp.concatenate([x, second])
    np.testing.assert_allclose(pooled["norm"]["mean"], both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pooled["norm"]["var"], both.var(0), rtol=1e-5)


@pytest.mark.parametrize("mode", ["layerwise", "one_pass"])
def test_data_sharded_over_devices_give_the_same(mode, devices):
    model, variables, x = mlp()
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=devices)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    assert len(sharded.addressable_shards) == 8
    measured = functools.partial(
        exact_statistics, functools.partial(predict, model), variables, mode=mode
    )
    chex.assert_trees_all_close(
        jax.device_get(measured(sharded, batch_size=16)),
        jax.device_get(measured(x, batch_size=16)),
        rtol=1e-5,
        atol=1e-6,
    )


class Classifier(nn.Module):
    """Logits that are the standardised inputs themselves."""

    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, name="norm")(x)


def test_gap_tells_how_far_statistics_are_and_what_they_cost():
    x = jnp.array([[0.0, 2.0], [4.0, 6.0], [0.0, 2.0], [4.0, 6.0]])
    model = Classifier()
    variables = model.init(jax.random.key(0), x, train=False)
    # Running mean 0 and variance 1; exact mean (2, 4), variance 4: gaps 4 / 2, log 4.
    # Each batch of two holds both rows, so its own statistics are the exact ones.
    report = gap(
        functools.partial(predict, model),
        variables,
        x,
        jnp.array([0, 1, 0, 0]),
        measure_on=x,
        batch_size=2,
    )
    assert report.running["norm"] == pytest.approx((2.0, np.log(4.0)), rel=1e-5)
    assert report.training["norm"] == pytest.approx((0.0, 0.0), abs=1e-5)
    # Exact: both logits of a row are equal, -1 or 1: loss log 2, label 0 wins the tie.
    assert report.loss["exact"] == pytest.approx(np.log(2), rel=1e-5)
    assert report.loss["training"] == pytest.approx(np.log(2), rel=1e-5)
    # Running: logits (0, 2) and (4, 6), so label 1 is 2 ahead.
    behind, ahead = np.log(1 + np.exp(2)), np.log(1 + np.exp(-2))
    assert report.loss["running"] == pytest.approx((3 * behind + ahead) / 4, rel=1e-4)
    assert report.accuracy["running"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ema"}, "mode='ema'; expected layerwise or one_pass"),
        ({"weights": jnp.ones(3)}, r"weights have shape \[3\].*40 examples"),
        ({"weights": -jnp.ones(40)}, "non-negative|least is -1"),
        ({"num_examples": 0}, "0 examples"),
    ],
)
def test_bad_choices_are_refused(options, message):
    model, variables, x = mlp()
    with pytest.raises(ValueError, match=message):
        exact_statistics(
            functools.partial(predict, model), variables, x, batch_size=8, **options
        )


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, axis=-1)(x.reshape(-1, 2))


def test_weights_without_an_axis_of_examples_are_refused():
    model, x = Flattened(), jnp.ones((4, 6))
    variables = model.init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match="no axis of the 4 examples"):
        exact_statistics(
            functools.partial(predict, model),
            variables,
            x,
            batch_size=4,
            weights=jnp.ones(4),
        )
