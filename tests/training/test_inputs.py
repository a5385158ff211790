import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.models.mlp import MLP
from bn_jax.training import inputs
from bn_jax.training.config import TrainConfig
from bn_jax.training.inputs import ChannelStatistics, NormalisedInput, Standardise
from bn_jax.training.task import Task, make_network

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
IMAGES[..., 2] //= 8  # a channel of its own scale
TASK = Task.of(
    TrainConfig(inputs="standardised"),
    data_lib.ImageData(
        name="three",
        train=data_lib.Split(IMAGES, np.zeros(7, np.int32)),
        test=data_lib.Split(IMAGES[:1], np.zeros(1, np.int32)),
        class_names=("zero", "one"),
        kind="npz",
        source="three channels",
    ),
)
STATISTICS = TASK.statistics


class NHWC(nn.Module):
    """Our batch norm, called as norms are from a table."""

    use_running_average: bool
    axis: int
    batch_axis: int

    @nn.compact
    def __call__(self, x):
        return BatchNorm(self.use_running_average, axis=self.axis, name="norm")(x)


def test_statistics_are_per_channel_of_the_unit_range():
    values = IMAGES.reshape(-1, 3) / 255
    np.testing.assert_allclose(STATISTICS.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(STATISTICS.deviation, values.std(0), atol=1e-12)
    assert Task.from_dict(json.loads(json.dumps(TASK.to_dict()))) == TASK


def test_statistics_are_taken_where_they_are_needed_alone(tiny_data):
    task = Task.of(TrainConfig(), tiny_data)
    assert task == Task(10, (28, 28, 1)) == Task.from_dict(task.to_dict())


def test_channel_that_never_varies_becomes_0():
    scale = Standardise(ChannelStatistics((0.5, 1.0), (0.1, 0.0)))
    scaled = scale(jnp.full((1, 2, 2, 2), 255, jnp.uint8))
    np.testing.assert_allclose(scaled[0, 0, 0], [5, 0], rtol=1e-6)


def test_unit_is_a_255th_to_the_last_bit():
    for name in ("unit", "norm"):
        scale = inputs.make(name, STATISTICS)
        np.testing.assert_array_equal(
            jax.jit(scale)(IMAGES), jnp.asarray(IMAGES).astype(jnp.float32) / 255
        )


def test_none_leaves_bytes():
    scaled = inputs.make("none", STATISTICS)(IMAGES)
    assert scaled.dtype == jnp.float32
    np.testing.assert_array_equal(scaled, IMAGES)


def test_standardised_channels_have_mean_0_and_deviation_1():
    scaled = jax.jit(inputs.make("standardised", STATISTICS))(IMAGES)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-6)


def test_functions_of_the_same_numbers_are_equal():
    # So that one may be a static argument of a compiled program.
    again = inputs.make("standardised", ChannelStatistics(*map(tuple, STATISTICS)))
    assert again == inputs.make("standardised", STATISTICS)
    assert hash(again) == hash(Standardise(STATISTICS))
    assert again != Standardise(ChannelStatistics((0.0,), (1.0,)))
    assert inputs.make("unit", STATISTICS) is inputs.make("unit", STATISTICS)


def test_norm_on_the_input_leaves_the_model_as_it_was():
    model = MLP((6,), norm=functools.partial(BatchNorm, momentum=0.9))
    wrapped = NormalisedInput(model, NHWC)
    images = IMAGES.astype(np.float32) / 255
    init = functools.partial(jax.jit, static_argnames="train")
    key = jax.random.key(0)
    own = init(model.init)(key, images, train=False)
    variables = init(wrapped.init)(key, images, train=False)
    for collection in ("params", "batch_stats"):
        of_norm = variables[collection].pop("input_norm")["norm"]
        assert (
            of_norm.keys()
            == {
                "params": {"scale", "bias"},
                "batch_stats": {"mean", "var"},
            }[collection]
        )
        assert all(leaf.shape == (3,) for leaf in of_norm.values())
        jax.tree.map(
            np.testing.assert_array_equal, variables[collection], own[collection]
        )
        variables[collection]["input_norm"] = {"norm": of_norm}

    # Shift and scale of the images' channels do not matter in training.
    apply = jax.jit(wrapped.apply, static_argnames=("train", "mutable"))
    training = {"train": True, "mutable": ("batch_stats",)}
    outputs, updates = apply(variables, images, **training)
    other = images * np.float32([2, 0.5, 1]) + 3
    moved, _ = apply(variables, other, **training)
    np.testing.assert_allclose(outputs, moved, atol=1e-2)
    np.testing.assert_allclose(
        updates["batch_stats"]["input_norm"]["norm"]["mean"],
        0.01 * images.mean((0, 1, 2)),
        rtol=1e-4,
    )
    assert wrapped == NormalisedInput(model, NHWC) and hash(wrapped)


@pytest.mark.parametrize("norm", ["batch_norm", "layer", "none"])
def test_inputs_are_normalised_by_batch_norm_whatever_the_norm_inside(norm):
    config = TrainConfig(model="mlp:widths=4", norm=norm, inputs="norm")
    network = make_network(config, TASK)
    stats = network.init(jax.random.key(0))["batch_stats"]
    assert set(stats["input_norm"]) == {"mean", "var"}
    assert ("norm1" in stats) == (norm == "batch_norm")


def test_other_inputs_do_not_wrap_the_model():
    for name in ("unit", "none", "standardised"):
        config = TrainConfig(model="mlp:widths=4", inputs=name)
        network = make_network(config, TASK)
        assert isinstance(network.model, MLP)
        assert network.scale == inputs.make(name, STATISTICS)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inputs.make("units", STATISTICS), r"did you mean unit"),
        (lambda: inputs.make("unit:by=2", STATISTICS), r"unit takes no options"),
    ],
)
def test_bad_inputs_are_refused_in_one_line(call, words):
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
