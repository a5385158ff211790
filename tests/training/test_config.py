import dataclasses
import json
import math
import re

import pytest
from absl import flags

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.models import MODELS
from bn_jax.training import members
from bn_jax.training.config import RunOptions, TrainConfig, traceable, value_of
from bn_jax.training.optimizers import OPTIMIZERS
from bn_jax.transforms import NORMS
from experiments import flag_fields


def test_defaults_are_the_chapters():
    config = TrainConfig()
    assert (config.learning_rate, config.epochs, config.batch_size) == (1.0, 10, 256)
    assert config.optimizer == "sgd"
    assert config.value("norm.momentum") == 0.9
    assert config.value("norm.epsilon") == 1e-5


def test_choices_are_those_that_there_are():
    fields = {f.name: f.metadata for f in dataclasses.fields(TrainConfig)}
    assert fields["norm"]["table"] is NORMS
    assert fields["model"]["table"] is MODELS
    assert fields["optimizer"]["table"] is OPTIMIZERS
    for name in data_lib.DATASETS:
        assert name in fields["dataset"]["help"]
        assert TrainConfig(dataset=name).dataset == name


def test_json_holds_a_config():
    config = TrainConfig(
        model="mlp:widths=7x5", norm="flax:momentum=0.5", learning_rate=0.3, seed=5
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "text", "canonical"),
    [
        ("norm", "batch_norm:epsilon=1e-05,momentum=0.90", "batch_norm"),
        (
            "norm",
            "batch_norm: epsilon=0.001, momentum=.99",
            "batch_norm:momentum=0.99,epsilon=0.001",
        ),
        (
            "model",
            "lenet:activation=relu,norm_layers=0011,bias_before_norm=1",
            "lenet:norm_layers=0011,activation=relu",
        ),
        ("model", "mlp:widths=100x100x100", "mlp"),
        ("model", "mlp:norm_layers=none,widths=3", "mlp:widths=3"),
        ("optimizer", "sgd:nesterov=False,momentum=0.9", "sgd:momentum=0.9"),
        ("schedule", "steps:factor=0.5,at=0.5x0.750", "steps:factor=0.5"),
        ("trained", "norms:gamma=FALSE,also=dense3", "norms:also=dense3,gamma=false"),
        ("augment", "crop_and_flip:size=none,padding=2", "crop_and_flip:padding=2"),
        ("inputs", "unit:", "unit"),
    ],
)
def test_texts_that_mean_the_same_are_one_config(field, text, canonical):
    one, other = (TrainConfig(**{field: t}) for t in (text, canonical))
    assert getattr(one, field) == canonical
    assert one == other and hash(one) == hash(other)
    assert one.to_dict() == other.to_dict()


def test_value_is_that_of_a_field_or_an_option_given_or_not():
    config = TrainConfig(
        seed=3,
        model="lenet:norm_layers=0011",
        norm="batch_norm:momentum=0.99",
        trained="norms:also=dense3,gamma=false",
    )
    expected = {
        "seed": 3,
        "norm": "batch_norm:momentum=0.99",
        "norm.momentum": 0.99,
        "norm.epsilon": 1e-5,
        "model.norm_layers": "0011",
        "model.bias_before_norm": True,
        "trained.also": "dense3",
        "trained.gamma": False,
        "optimizer.momentum": 0.0,
        "augment": "none",
    }
    values = config.to_dict()
    for name, value in expected.items():
        assert config.value(name) == value_of(values, name) == value
        assert type(config.value(name)) is type(value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colour", "'colour' is no field; expected one of dataset, train_examples,"),
        ("colour.red", "'colour' is no field"),
        ("seed.start", "'seed' is no field with options; those are inputs, augment,"),
        ("norm.mean", "norm='batch_norm' has no option 'mean'; batch_norm takes mom"),
        ("inputs.mean", "inputs='unit' has no option 'mean'; unit takes no options"),
    ],
)
def test_name_of_no_value_is_refused(name, message):
    config = TrainConfig()
    for read in (
        config.value,
        lambda name: value_of(config.to_dict(), name),
        lambda name: config.replaced(name, 1),
        lambda name: config.replaced_by_text(name, "1"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(name)


def test_replaced_changes_one_value():
    config = TrainConfig(norm="batch_norm:epsilon=0.1", seed=2)
    expected = dataclasses.replace(config, norm="batch_norm:momentum=0.5,epsilon=0.1")
    assert config.replaced("norm.momentum", 0.5) == expected
    assert config.replaced_by_text("norm.momentum", "0.5") == expected
    assert config.replaced("norm.epsilon", 1e-5) == TrainConfig(seed=2)
    assert config.replaced("seed", 0).seed == config.replaced_by_text("seed", "0").seed
    assert config.replaced_by_text("norm", "none").norm == "none"
    with pytest.raises(ConfigError, match=r"momentum=2; expected a number in \[0, 1\]"):
        config.replaced("norm.momentum", 2.0)


def test_traced_values_are_read_where_they_are_used():
    config = TrainConfig(norm="batch_norm:epsilon=0.1")
    traced = config.with_traced({"learning_rate": 7, "norm.momentum": 8})
    traced = traced.with_traced({"norm.epsilon": 9})
    assert traced.learning_rate == 7
    assert traced.traced("norm") == {"momentum": 8, "epsilon": 9}
    assert traced.traced("model") == {}
    assert (config.learning_rate, config.traced("norm")) == (1.0, {})
    assert traced.norm == config.norm


def test_program_takes_numbers_as_arguments():
    # Not the switches of layers that have a bias where they have no norm.
    assert traceable(TrainConfig(norm="batch_norm:momentum=0.5", seed=4)) == {
        "learning_rate": 1.0,
        "model.norm_layers": "1111",
        "norm.momentum": 0.5,
        "norm.epsilon": 1e-5,
        "trained.gamma": True,
        "trained.beta": True,
        "optimizer.momentum": 0.0,
        "seed": 4,
    }
    config = TrainConfig(
        model="mlp", norm="none", optimizer="adam", trained="random", learning_rate=0.1
    )
    assert traceable(config) == {"learning_rate": 0.1, "seed": 0}
    assert "model.norm_layers" not in traceable(
        TrainConfig(model="lenet:bias_before_norm=false")
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("norm", "batchnorm", "one of batch_norm, renorm, .*mean batch_norm"),
        ("norm", 5, "of type str"),
        ("model", "lenet5", "one of lenet, mlp, resnet"),
        ("optimizer", "momentum", "one of sgd, adam, adamw, rmsprop, lamb, lion"),
        ("schedule", "sine", "one of constant, cosine, linear, steps"),
        ("trained", "norm", "one of all, norms, random"),
        ("augment", "flip", "one of none, crop_and_flip"),
        ("inputs", "bytes", "one of unit, none, standardised, norm"),
        ("validation", -1, "0 or greater"),
        ("train_examples", -1, "0 or greater"),
        ("weight_decay", -0.1, "0 or greater"),
        ("decay", "biases", "one of kernels, all"),
        ("clip_norm", -1.0, "0 or greater"),
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("rate_factors", "(=1", "REGEX=FACTOR"),
        ("accumulate", 0, "at least 1"),
        ("accumulate_stats", "twice", "one of each, once"),
        ("average_weights", 1.0, r"in \[0, 1\)"),
        ("precision", "float32", "one of default, highest, bfloat16"),
        ("epochs", 0, "at least 1"),
        ("epochs", 1.5, "of type int"),
        ("batch_size", -1, "at least 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", float("nan"), "greater than 0"),
        ("learning_rate", float("inf"), "finite"),
        ("learning_rate", "fast", "of type float"),
        ("seed", -1, r"from 0 to 2\*\*32 - 1"),
        ("seed", 2**32, r"from 0 to 2\*\*32 - 1"),
        ("batch_stats", "groups:0", "synced, per_device or groups:K"),
        ("batch_stats", "groups", "synced, per_device or groups:K"),
        ("merged_stats", "mean", "one of exact, first"),
    ],
)
def test_value_out_of_range_is_named_with_what_was_expected(field, value, expected):
    value_text = re.escape(repr(value))
    with pytest.raises(
        ConfigError, match=f"{field}={value_text}; expected .*{expected}"
    ) as error:
        TrainConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_unknown_data_set_is_named_with_those_that_there_are():
    with pytest.raises(
        ConfigError, match="one of auto, fashion_mnist, mnist, kmnist, .*sample"
    ):
        TrainConfig(dataset="cifar")
    with pytest.raises(ConfigError, match="^dataset=5; expected a value of type str$"):
        TrainConfig(dataset=5)


def test_integers_that_stand_for_floats_are_floats():
    """Else members of a sweep, stacked in the type of the first, were cut to 0."""
    config = TrainConfig(learning_rate=1, weight_decay=0)
    assert type(config.learning_rate) is type(config.weight_decay) is float
    stacked = members.stack_values([config, TrainConfig(learning_rate=0.5)])
    assert stacked["learning_rate"].tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight_decay", math.inf, "a number 0 or greater and finite"),
        ("clip_norm", math.inf, "a number 0 or greater and finite"),
        ("label_smoothing", math.nan, "a number in "),
        ("norm", "dyt:alpha=nan", "a number"),
    ],
)
def test_numbers_that_train_nothing_are_refused(field, value, expected):
    with pytest.raises(ConfigError, match=f"(inf|nan); expected {expected}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "name", "option", "expected"),
    [
        ("norm", "batch_norm", "momentum=1.01", r"a number in \[0, 1\]"),
        ("norm", "batch_norm", "momentum=-0.1", r"a number in \[0, 1\]"),
        ("norm", "flax", "momentum=high", r"a number in \[0, 1\]"),
        ("norm", "batch_norm", "epsilon=0", "a number greater than 0"),
        ("norm", "group", "num_groups=2.5", "an integer at least 1"),
        ("model", "lenet", "first_padding=-1", "an integer 0 or greater"),
        ("model", "lenet", "bias_before_norm=2", "true or false"),
        ("model", "lenet", "norm_layers=11", "four digits"),
        ("model", "mlp", "widths=0x3", "values with x between, each an integer at l"),
        ("model", "resnet", "depth=21", "6n \\+ 2"),
        ("optimizer", "sgd", "momentum=2", r"a number in \[0, 1\]"),
        ("optimizer", "adam", "b1=1", r"a number in \[0, 1\)"),
        ("schedule", "cosine", "end=2", r"a number in \[0, 1\]"),
        ("schedule", "steps", "at=0.5x1.5", "values with x between"),
        ("trained", "norms", "gamma=maybe", "true or false"),
        ("augment", "crop_and_flip", "padding=-1", "an integer 0 or greater"),
    ],
)
def test_option_of_a_name_out_of_range_is_named(field, name, option, expected):
    message = f"{field}='{name}:{option}': {option}; expected .*{expected}.*{name} take"
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(**{field: f"{name}:{option}"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "text", "takes"),
    [
        ("norm", "group:groups=2", "group takes num_groups=2"),
        ("norm", "none:momentum=0.9", "none takes no options"),
        ("model", "mlp:depth=3", "mlp takes widths=100x100x100"),
        ("model", "lenet:norm=none", "lenet takes norm_layers=1111"),
        ("optimizer", "sgd:learning_rate=1", "sgd takes momentum=0"),
        ("schedule", "constant:end=1", "constant takes warmup_epochs=0"),
        ("trained", "random:seed=1", "random takes per_channel=false"),
        ("augment", "none:flip=true", "none takes no options"),
        ("inputs", "unit:by=2", "unit takes no options"),
    ],
)
def test_option_that_a_name_does_not_take_is_named(field, text, takes):
    with pytest.raises(ConfigError, match=f"{field}={text!r}: no option '") as error:
        TrainConfig(**{field: text})
    assert takes in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", ["momentum", "momentum=1,momentum=1"])
def test_options_are_keys_with_values_each_once(options):
    with pytest.raises(ConfigError, match="KEY=VALUE with each key once; batch_norm t"):
        TrainConfig(norm=f"batch_norm:{options}")


def test_option_that_is_misspelled_is_recognised():
    with pytest.raises(ConfigError, match="no option 'nestrov' .did you mean nesterov"):
        TrainConfig(optimizer="sgd:nestrov=true")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("devices", "0", "all, or a number of devices"),
        ("devices", 2.0, "a text, all, or a number of devices"),
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
    with pytest.raises(
        ConfigError, match="epochs=0.*seed=1.5.*'nowhere'.*norm='x'.*momentum=2"
    ):
        TrainConfig(
            norm="x",
            epochs=0,
            optimizer="sgd:momentum=2",
            seed=1.5,
            dataset="nowhere",
        )


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
    flag_values(["program", "--epochs=3", "--model=lenet:bias_before_norm=false"])
    config = flag_fields.read(
        TrainConfig, flag_values, defaults={"epochs": 1, "seed": 8}
    )
    expected = TrainConfig(epochs=3, seed=8, model="lenet:bias_before_norm=false")
    assert config == expected


def test_flags_give_the_options_of_a_run(flag_values):
    flag_values(["program", "--devices=4", "--input=stream", "--noresume"])
    options = flag_fields.read(RunOptions, flag_values)
    assert options == RunOptions(devices="4", input="stream", resume=False)


def test_every_field_has_a_flag_with_help(flag_values):
    for kind in (TrainConfig, RunOptions):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"] in flag_values[field.name].help


def test_number_of_devices_may_be_an_integer():
    assert RunOptions(devices=8) == RunOptions(devices="8")
    for devices in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match=f"devices='?{devices}'?; expected .*all"):
            RunOptions(devices=devices)


def test_text_of_another_type_is_refused_with_what_it_may_say():
    with pytest.raises(ConfigError, match="every=2; expected a text, a number of epo"):
        RunOptions(checkpoint_every=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainConfig(lr=0.1, epocs=3),
            r"TrainConfig has no field lr \(did you mean learning_rate\?\), epocs "
            r"\(did you mean epochs\?\)$",
        ),
        (
            lambda: dataclasses.replace(TrainConfig(), normm="none"),
            r"no field normm \(did you mean norm\?\)$",
        ),
        (
            lambda: RunOptions(device=2),
            r"RunOptions has no field device \(did you mean devices\?\)$",
        ),
        (lambda: RunOptions(xyz=2), "no field xyz; expected some of devices, parallel"),
    ],
)
def test_unknown_fields_are_refused_with_the_one_meant(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_options_of_another_kind_are_refused():
    assert RunOptions.given(None) == RunOptions(devices="1")
    assert RunOptions.given(RunOptions(devices=2)).devices == "2"
    with pytest.raises(
        TypeError, match="options are a dict; expected a RunOptions, su"
    ):
        RunOptions.given({"devices": 2})
