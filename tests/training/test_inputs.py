import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.models.mlp import MLP
from bn_jax.training import inputs
from bn_jax.training.inputs import ChannelStatistics, Standardise, channel_statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
IMAGES[..., 2] = 255  # never varies
STATISTICS = channel_statistics(IMAGES)


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
    assert STATISTICS.deviation[2] == 0


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
    np.testing.assert_allclose(scaled.std((0, 1, 2)), [1, 1, 0], atol=1e-6)


def test_functions_of_the_same_numbers_are_equal():
    # So that one may be a static argument of a compiled program.
    again = inputs.make("standardised", channel_statistics(IMAGES.copy()))
    assert again == inputs.make("standardised", STATISTICS)
    assert hash(again) == hash(Standardise(STATISTICS))
    assert again != Standardise(ChannelStatistics((0.0,), (1.0,)))
    assert inputs.make("unit", STATISTICS) is inputs.make("unit", STATISTICS)


def test_norm_on_the_input_leaves_the_model_as_it_was():
    model = MLP((6,), norm=functools.partial(BatchNorm, momentum=0.9))
    wrapped = inputs.with_norm("norm", model, NHWC)
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
    assert wrapped == inputs.with_norm("norm", model, NHWC) and hash(wrapped)


def test_other_names_do_not_wrap():
    model = MLP((6,))
    assert inputs.with_norm("unit", model, None) is model


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inputs.make("units", STATISTICS), r"did you mean unit"),
        (lambda: inputs.make("unit:by=2", STATISTICS), r"unit takes no options"),
        (lambda: inputs.with_norm("norm", MLP((6,)), None), r"norm='none'; expected a"),
        (
            lambda: inputs.with_norm("norm", object(), NHWC),
            r"class object; expected a L",
        ),
    ],
)
def test_bad_inputs_are_refused_in_one_line(call, words):
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
