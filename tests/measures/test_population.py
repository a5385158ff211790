import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.linen import BatchNorm
from bn_jax.measures import population, sources
from bn_jax.measures.population import batch_moments, exact_statistics
from bn_jax.models import layers
from bn_jax.models.lenet import LeNet
from marks import slow_but
from reference import normal

IMAGES = normal((50, 7, 6, 1), mean=0.5, std=0.3, seed=3)


class SmallConv(nn.Module):
    """A convolution and a dense layer, each with its norm, like the start of LeNet."""

    norm: type[nn.Module]
    layout: str

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.0)
        x = layers.from_nhwc(x, self.layout)
        x = layers.Conv(3, (2, 2), layout=self.layout)(x)
        x = nn.sigmoid(norm(axis=layers.feature_axis(self.layout))(x))
        x = layers.to_nhwc(x, self.layout)
        return norm(axis=-1)(nn.Dense(4)(x.reshape(len(x), -1)))


def predict(model, variables, x):
    return model.apply(variables, x, train=False)


def init(model, x):
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), x)


def ones(model, x):
    """Variables for what is refused whatever the values."""
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(1), x
    )
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def train_on_all(model, variables, inputs):
    return model.apply(variables, inputs, train=True, mutable=["batch_stats"])


def whole_batch_statistics(model, variables, inputs):
    """What one training-mode batch of all examples keeps, with the old average out."""
    return train_on_all(model, variables, inputs)[1]["batch_stats"]


@pytest.mark.slow
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
    model = SmallConv(norm, layout)
    variables = init(model, IMAGES[:1])
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


@functools.cache
def mlp():
    """Return how to predict, the variables and 40 examples.

    One function, so that what is compiled for one test serves the next.
    """
    model, x = TwoNorms(), normal((40, 4), mean=5.0, std=3.0)
    return functools.partial(predict, model), init(model, x), x


def test_layers_are_measured_in_the_order_of_their_calls():
    predict_one, variables, x = mlp()
    exact = exact_statistics(predict_one, variables, x, batch_size=16)
    chex.assert_trees_all_close(
        exact, whole_batch_statistics(TwoNorms(), variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(SmallConv(BatchNorm, "CHWN"), (40, 7, 6, 1), id="small"),
        pytest.param(
            LeNet(norm=BatchNorm), (40, 28, 28, 1), id="lenet", marks=pytest.mark.slow
        ),
    ],
)
def test_prediction_with_exact_statistics_is_training_mode_on_the_whole_set(
    model, shape
):
    images = normal(shape, mean=0.5, std=0.3, seed=3)
    variables = init(model, images[:1])
    predict_one = functools.partial(predict, model)
    exact = exact_statistics(predict_one, variables, images, batch_size=20)
    predicted = jax.jit(predict_one)({**variables, "batch_stats": exact}, images)
    trained, _ = train_on_all(model, variables, images)
    chex.assert_trees_all_close(predicted, trained, atol=1e-5)


@pytest.mark.parametrize("mode", ["layerwise", "one_pass"])
def test_model_without_batch_norm_has_none(mode):
    model, x = nn.Dense(2), jnp.ones((5, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert exact_statistics(model.apply, variables, x, batch_size=2, mode=mode) == {}


@pytest.mark.parametrize(("examples", "batch_size"), [(0, 5), (5, 0)])
def test_no_examples_or_no_batch_is_refused(examples, batch_size):
    with pytest.raises(ValueError, match=f"{examples} examples.*{batch_size}"):
        exact_statistics(
            lambda variables, x: x, {}, jnp.ones((examples, 2)), batch_size=batch_size
        )


@pytest.mark.slow
def test_one_pass_is_layerwise_in_the_first_layer_and_pools_the_second():
    predict_one, variables, x = mlp()
    pooled = exact_statistics(predict_one, variables, x, batch_size=9, mode="one_pass")
    layerwise = exact_statistics(predict_one, variables, x, batch_size=9)
    chex.assert_trees_all_close(pooled["b"], layerwise["b"], rtol=1e-5)
    # By hand: what layer a is given in training mode, batch by batch, as one set. Of
    # 40 examples in nines, 4 batches take every fourth, and 4 examples are left over.
    given = []
    for batch in [*(x[:36][start::4] for start in range(4)), x[36:]]:
        standard = (batch - batch.mean(0)) / jnp.sqrt(batch.var(0) + 1e-5)
        dense = variables["params"]["Dense_0"]
        given.append(jax.nn.relu(standard) @ dense["kernel"] + dense["bias"])
    given = jnp.concatenate(given)
    np.testing.assert_allclose(pooled["a"]["mean"], given.mean(0), rtol=1e-4)
    np.testing.assert_allclose(pooled["a"]["var"], given.var(0), rtol=1e-4)
    assert abs(pooled["a"]["var"] / layerwise["a"]["var"] - 1).max() > 1e-3


def test_one_pass_over_one_batch_is_layerwise():
    predict_one, variables, x = mlp()
    results = [
        exact_statistics(predict_one, variables, x, batch_size=40, mode=mode)
        for mode in ("one_pass", "layerwise")
    ]
    chex.assert_trees_all_close(*results, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layerwise", "one_pass"])
@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
def test_integer_weights_equal_repeated_images_wherever_the_examples_lie(mode, norm):
    model = SmallConv(norm, "CHWN")  # the convolution's batch axis is the last
    variables = init(model, IMAGES[:1])
    weights = jnp.array([0, 1, 2, 3] * 3)
    measured = functools.partial(
        exact_statistics, functools.partial(predict, model), variables, mode=mode
    )
    # In one pass batches matter, so let there be one.
    size = 5 if mode == "layerwise" else 99
    weighted = measured(IMAGES[:12], weights=weights, batch_size=size)
    repeated = measured(jnp.repeat(IMAGES[:12], weights, axis=0), batch_size=size)
    chex.assert_trees_all_close(weighted, repeated, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
def test_integers_that_a_layer_takes_are_measured_too(norm):
    x = jnp.array([[0], [6], [8], [10]])  # mean 6, variance 200 / 4 - 36

    def predict(variables, x):
        return norm(use_running_average=True).apply(variables, x)

    variables = {"batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
    variables["params"] = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    exact = exact_statistics(predict, variables, x, batch_size=3)
    chex.assert_trees_all_close(
        exact, {"mean": jnp.array([6.0]), "var": jnp.array([14.0])}, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_averages_of_32_bits_are_measured_where_jax_computes_in_64(dtype):
    x = np.random.default_rng(0).normal(5, 2, (8, 3)).astype(dtype)
    model = nn.Sequential([BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), x.astype(np.float32))
    with jax.enable_x64(True):
        found = exact_statistics(model, variables, x, batch_size=4)["layers_0"]
    np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], x.var(0), rtol=1e-5)


def test_first_examples_only_when_told():
    predict_one, variables, x = mlp()
    measured = functools.partial(
        exact_statistics, predict_one, variables, batch_size=8, mode="one_pass"
    )
    chex.assert_trees_all_close(
        measured(x, num_examples=20), measured(x[:20]), rtol=1e-6
    )


class Reused(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = BatchNorm(use_running_average=not train, momentum=0.0, name="norm")
        return norm(3 * norm(x) + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "batch_size"), [("one_pass", 20), ("layerwise", 20), ("layerwise", 6)]
)
def test_reused_layer_pools_its_calls_whatever_its_running_averages(mode, batch_size):
    model, x = Reused(), normal((20, 2), mean=5.0)
    running = {"norm": {"mean": jnp.full(2, 50.0), "var": jnp.full(2, 9.0)}}
    pooled = exact_statistics(
        functools.partial(predict, model),
        {**init(model, x), "batch_stats": running},
        x,
        batch_size=batch_size,
        mode=mode,
    )
    second = 3 * (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) + 1
    both = jnp.concatenate([x, second])
    np.testing.assert_allclose(pooled["norm"]["mean"], both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pooled["norm"]["var"], both.var(0), rtol=1e-5)


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(BatchNorm, use_running_average=not train)
        shared = norm(name="shared")
        return norm(name="last")(shared(x) * shared(2 * x + 1))


def test_layer_after_a_reused_one_sees_its_final_statistics():
    model, x = TwoTowers(), normal((20, 2), mean=5.0)
    exact = exact_statistics(
        functools.partial(predict, model), init(model, x), x, batch_size=8
    )
    x = np.float64(x)
    both = np.concatenate([x, 2 * x + 1])
    a, b = np.split((both - both.mean(0)) / np.sqrt(both.var(0) + 1e-5), 2)
    np.testing.assert_allclose(exact["shared"]["var"], both.var(0), rtol=1e-5)
    np.testing.assert_allclose(exact["last"]["mean"], (a * b).mean(0), rtol=1e-4)
    np.testing.assert_allclose(exact["last"]["var"], (a * b).var(0), rtol=1e-4)


class Masked(nn.Module):
    """Gives its norm the input by keyword and a mask: the examples above 5."""

    norm: type[nn.Module]
    axis_name: str = "unbound"

    @nn.compact
    def __call__(self, x, train):
        norm = self.norm(
            use_running_average=not train, axis_name=self.axis_name, name="norm"
        )
        return norm(x=x, mask=x[:, :1] > 5)


@pytest.mark.parametrize(
    ("norm", "mode"),
    [
        (BatchNorm, "one_pass"),
        (nn.BatchNorm, "layerwise"),
        pytest.param(BatchNorm, "layerwise", marks=pytest.mark.slow),
        pytest.param(nn.BatchNorm, "one_pass", marks=pytest.mark.slow),
    ],
)
def test_mask_that_a_model_gives_its_norm_counts_along_with_weights(norm, mode):
    x = jnp.array([[0.0], [6.0], [0.0], [8.0], [9.0]])
    model = Masked(norm)
    measured = functools.partial(
        exact_statistics,
        functools.partial(predict, model),
        init(model, x),
        x,
        batch_size=2,
        mode=mode,
    )
    chex.assert_trees_all_close(  # of 6, 8, 9: 23 / 3, and 181 / 3 - (23 / 3)^2
        measured()["norm"],
        {"mean": jnp.array([23 / 3]), "var": jnp.array([14 / 9])},
        rtol=1e-5,
    )
    chex.assert_trees_all_close(  # of 6 and three times 8: 7.5, and 57 - 7.5^2
        measured(weights=jnp.array([5, 1, 5, 3, 0]))["norm"],
        {"mean": jnp.array([7.5]), "var": jnp.array([0.75])},
        rtol=1e-5,
    )


def test_batch_that_is_masked_out_is_normalised_by_running_averages():
    x = jnp.array([[0.0], [4.0]])
    model = Masked(BatchNorm)
    measured = functools.partial(batch_moments, functools.partial(predict, model))
    outputs, moments = jax.jit(measured)(init(model, x), x)
    np.testing.assert_allclose(outputs, x, rtol=1e-4)
    assert moments[("norm",)].count == 0


@pytest.mark.parametrize("mode", slow_but(["layerwise"], ["layerwise", "one_pass"]))
def test_data_sharded_over_devices_give_the_same(mode, devices):
    predict_one, variables, x = mlp()
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=devices)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    assert len(sharded.addressable_shards) == 8
    measured = functools.partial(exact_statistics, predict_one, variables, mode=mode)
    chex.assert_trees_all_close(
        jax.device_get(measured(sharded, batch_size=16)),
        jax.device_get(measured(x, batch_size=16)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("max_kept", [0, 2**28])
def test_what_is_kept_between_passes_changes_no_number(max_kept, monkeypatch):
    monkeypatch.setattr(population, "_MAX_KEPT_BYTES", max_kept)
    predict_one, variables, x = mlp()
    got = exact_statistics(predict_one, variables, x, batch_size=16)
    one_batch = whole_batch_statistics(TwoNorms(), variables, x)
    chex.assert_trees_all_close(got, one_batch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["layerwise", "one_pass"])
def test_each_device_works_on_its_own_examples(mode, devices):
    predict_one, variables, x = mlp()
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=devices)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    program = sources._of_stored.lower(
        predict_one,
        jax.device_put(variables, NamedSharding(mesh, PartitionSpec())),
        inputs=sharded,
        weights=None,
        batch_size=8,
        number=None if mode == "one_pass" else 0,
        keep=mode == "layerwise",
    ).compile()
    text = program.as_text()
    assert "all-reduce(" in text
    assert "all-gather(" not in text and "all-to-all(" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ema"}, "mode='ema'; expected layerwise or one_pass"),
        ({"weights": jnp.ones(3)}, r"weights have shape \[3\].*40 examples"),
        ({"weights": -jnp.ones(40)}, "non-negative|least is -1"),
        ({"weights": jnp.zeros(40, bool)}, "weights of all 40 examples are 0"),
        ({"num_examples": 0}, "0 examples"),
        ({"num_examples": -5}, "num_examples=-5 of 40 examples"),
        ({"num_examples": 41}, "num_examples=41 of 40 examples"),
        ({"num_examples": 1.5}, "num_examples=1.5; expected an integer"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        exact_statistics(*mlp(), batch_size=8, **options)


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, axis=-1)(x.reshape(-1, 2))


def test_weights_without_an_axis_of_examples_are_refused():
    model, x = Flattened(), jnp.ones((4, 6))
    with pytest.raises(ValueError, match="no axis of the 4 examples"):
        exact_statistics(
            functools.partial(predict, model),
            ones(model, x),
            x,
            batch_size=4,
            weights=jnp.ones(4),
        )


def measure_exactly(predict, variables, x):
    return exact_statistics(predict, variables, x, batch_size=len(x))


def test_statistics_of_a_layer_that_is_not_called_are_refused():
    predict_one, variables, x = mlp()
    stats = variables["batch_stats"]
    variables = {**variables, "batch_stats": {**stats, "unused": stats["a"]}}
    with pytest.raises(ValueError, match="no call of unused was seen"):
        measure_exactly(predict_one, variables, x)
