import dataclasses
import json

import pytest
from absl import flags

from bn_jax import data as data_lib
from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.training import config as config_lib
from bn_jax.training.config import RunOptions, TrainConfig
from experiments import flag_fields


def test_defaults_are_the_chapters():
    config = TrainConfig()
    assert (config.learning_rate, config.epochs, config.batch_size) == (1.0, 10, 256)
    assert (config.momentum, config.epsilon, config.optimizer) == (0.9, 1e-5, "sgd")


def test_choices_are_those_that_there_are():
    choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(TrainConfig)}
    assert config_lib.NORMS == tuple(models.NORMS)
    assert choices["dataset"] == data_lib.DATASETS


def test_json_holds_a_config():
    config = TrainConfig(norm="flax", learning_rate=0.3, seed=5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("norm", "batchnorm", "one of batch_norm, flax, none, renorm, layer"),
        ("dataset", "cifar", "one of auto, fashion_mnist, mnist, kmnist, sample"),
        ("optimizer", "lion", "one of sgd, momentum, adam"),
        ("schedule", "linear", "one of constant, cosine"),
        ("epochs", 0, "at least 1"),
        ("epochs", 1.5, "of type int"),
        ("batch_size", -1, "at least 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", float("nan"), "greater than 0"),
        ("learning_rate", float("inf"), "finite"),
        ("learning_rate", "fast", "of type float"),
        ("momentum", 1.01, r"in \[0, 1\]"),
        ("momentum", -0.1, r"in \[0, 1\]"),
        ("optimizer_momentum", 2.0, r"in \[0, 1\]"),
        ("epsilon", 0.0, "greater than 0"),
        ("first_padding", -1, "0 or greater"),
        ("seed", -1, r"from 0 to 2\*\*32 - 1"),
        ("seed", 2**32, r"from 0 to 2\*\*32 - 1"),
        ("batch_stats", "groups:0", "synced, per_device or groups:K"),
        ("batch_stats", "groups", "synced, per_device or groups:K"),
        ("merged_stats", "mean", "one of exact, first"),
        ("bias_before_norm", 1, "of type bool"),
    ],
)
def test_value_out_of_range_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError, match=f"{field}={value!r}; expected .*{expected}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("devices", "0", "all, or a number of devices"),
        ("devices", 2, "of type str"),
        ("parallel", "pjit", "one of pmap, jit"),
        ("input", "disk", "one of auto, memory, stream"),
        ("checkpoint_every", "0steps", "such as 1epoch, 2epochs or 500steps, or never"),
        ("checkpoint_every", "5", "such as 1epoch, 2epochs or 500steps, or never"),
        ("resume", "yes", "of type bool"),
    ],
)
def test_option_out_of_range_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError, match=f"{field}={value!r}; expected .*{expected}"):
        RunOptions(**{field: value})


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("never", None),
        ("1epoch", 23),
        ("2epochs", 46),
        ("1step", 1),
        ("500steps", 500),
    ],
)
def test_checkpoints_are_counted_in_steps_of_an_epochs_number(every, steps):
    assert RunOptions(checkpoint_every=every).checkpoint_steps(23) == steps


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ConfigError, match="norm='x'.*epochs=0.*momentum=2"):
        TrainConfig(norm="x", epochs=0, momentum=2)


def test_missing_and_unknown_fields_are_named():
    values = TrainConfig().to_dict()
    del values["norm"]
    with pytest.raises(
        ConfigError, match=r"missing: \['norm'\], unknown: \['colour'\]"
    ):
        TrainConfig.from_dict({**values, "colour": "red"})


@pytest.fixture
def flag_values():
    """The program's flags, with ours defined for this test alone."""
    before = set(flags.FLAGS)
    flag_fields.define(TrainConfig)
    flag_fields.define(RunOptions)
    yield flags.FLAGS
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_flags_override_the_entry_points_defaults_which_override_the_configs(
    flag_values,
):
    flag_values(["program", "--epochs=3", "--nobias_before_norm"])
    config = flag_fields.read(
        TrainConfig, flag_values, defaults={"epochs": 1, "seed": 8}
    )
    expected = TrainConfig(epochs=3, seed=8, bias_before_norm=False)
    assert config == expected


def test_flags_give_the_options_of_a_run(flag_values):
    flag_values(["program", "--devices=4", "--input=stream", "--noresume"])
    options = flag_fields.read(RunOptions, flag_values)
    assert options == RunOptions(devices="4", input="stream", resume=False)


def test_every_field_has_a_flag_with_help(flag_values):
    for kind in (TrainConfig, RunOptions):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"] in flag_values[field.name].help
