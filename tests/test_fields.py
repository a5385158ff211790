"""Dataclasses of options: tuples, fields taken from another, and their flags."""

import dataclasses

import pytest
from absl import flags

from bn_jax import fields
from bn_jax.fields import ConfigError
from experiments import flag_fields


@dataclasses.dataclass(frozen=True)
class Options:
    rate: float = fields.option(1.0, "A rate.", valid=fields.POSITIVE)
    rates: tuple[float, ...] = fields.option(
        (0.1, 1.0), "Some rates.", valid=fields.POSITIVE
    )
    names: tuple[str, ...] = fields.option(
        ("a", "b"), "Some names.", choices=("a", "b", "c")
    )
    count: int = fields.option(3, "How many.", valid=fields.AT_LEAST_1)

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class More(Options):
    count: int = fields.option_of(Options, "count", 7)
    other: float = fields.option_of(Options, "rate")


@pytest.fixture
def flag_values():
    """Define flags for the length of a test."""
    before = set(flags.FLAGS)

    def define(kind):
        flag_fields.define(kind)
        return flags.FLAGS

    yield define
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rates", (0.1, 0.0), "of each value a number greater than 0 and finite"),
        ("rates", (0.1, "1"), "of each value a value of type float"),
        ("rates", (), "one or more values, none of them twice"),
        ("rates", (0.1, 0.1), "one or more values, none of them twice"),
        ("rates", [0.1], "one or more values, none of them twice"),
        ("rates", 0.1, "one or more values, none of them twice"),
        ("names", ("a", "d"), "of each value one of a, b, c"),
        ("count", 0, "a number at least 1"),
    ],
)
def test_bad_value_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError) as caught:
        Options(**{field: value})
    assert str(caught.value) == f"{field}={value!r}; expected {expected}"


def test_whole_numbers_are_floats_too():
    assert Options(rates=(1, 0.5)).rates == (1, 0.5)


def test_field_of_another_keeps_its_range_and_may_have_another_default():
    assert (More().count, More().other) == (7, 1.0)
    for name in ("count", "other"):
        with pytest.raises(ConfigError, match=f"{name}=0.*expected a number"):
            More(**{name: 0})


def test_flags_of_tuples_are_lists_with_commas(flag_values):
    values = flag_values(More)
    values(["program", "--rates=3,1e-2", "--names=c, a", "--count=2"])
    assert flag_fields.read(More, values) == More(
        rates=(3.0, 0.01), names=("c", "a"), count=2
    )
    assert "<a|b|c>,...: Some names." in values["names"].help
    # As --flagfile and --help write them.
    assert values["rates"].serialize() == "--rates=3.0,0.01"


def test_defaults_of_an_entry_point_give_way_to_flags(flag_values):
    values = flag_values(Options)
    values(["program", "--names=b"])
    given = flag_fields.read(
        Options, values, defaults={"names": ("c",), "rates": (5.0,)}
    )
    assert given == Options(names=("b",), rates=(5.0,))


def test_list_that_is_no_list_of_numbers_is_refused(flag_values):
    values = flag_values(Options)
    expected = "rates=1,fast: expected values of type float.*such as 0.1,1.0"
    with pytest.raises(flags.IllegalFlagValueError, match=expected):
        values(["program", "--rates=1,fast"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("load", "load"),
        ("l", None),  # an initial alone says little
        ("weights", None),
    ],
)
def test_name_is_guessed_from_its_initials_or_its_letters(given, meant):
    known = ["epochs", "load", "learning_rate"]
    assert fields.nearest(given, known) == meant
    assert fields.did_you_mean(given, known) == (
        f" (did you mean {meant}?)" if meant else ""
    )
