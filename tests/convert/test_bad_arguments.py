"""Converters that are given something else altogether say what they expected."""

import inspect

import numpy as np
import pytest

from bn_jax import convert, init

BAD = [None, {}, [], "x", (), np.ones(3), {"weight": None}, {"a": [1, 2]}, 3]
FUNCTIONS = sorted(
    name
    for name in convert.__all__
    if inspect.isfunction(getattr(convert, name)) and name != "without_equinox_excess"
)


def called(name, bad, **known):
    """Call a function with one bad value for each argument that is not known."""
    function = getattr(convert, name)
    needed = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty
    ]
    values = {p.name: known.get(p.name, bad) for p in needed}
    keywords = {p.name: values.pop(p.name) for p in needed if p.kind is p.KEYWORD_ONLY}
    return function(*values.values(), **keywords)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_arguments_bad(name):
    for bad in BAD:
        with pytest.raises((TypeError, ValueError), match="expected|give|fit") as error:
            called(name, bad)
        assert "'NoneType' object" not in str(error.value)
        assert "object has no attribute" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("from_torch", {}, "entries are of type .*; expected a mapping from names"),
        ("from_flax", {}, "entries are of type .*; expected a mapping from names"),
        ("from_equinox", {"mode": "ema"}, "entries are of type .*; expected a mapp"),
        ("from_batch_renorm", {"library": "sbx"}, "entries are of type .*; expect"),
        ("layers_from", {"library": "torch", "names": {}}, "entries are of type"),
        ("layers_from", {"library": "torch", "entries": {}}, "names is of type"),
        ("to_torch", {}, "layer is of type .*; expected a BatchNormLayer, as from_"),
        ("to_haiku", {"momentum": 0.9, "num_dims": 2}, "layer is of type .*; expec"),
        ("to_batch_renorm", {"library": "sbx"}, "layer is of type .*; expected a Ba"),
        ("without_equinox_excess", {"momentum": 0.9}, "layer is of type .*; expecte"),
        ("unbiased", {}, "moments is of type .*; expected a NamedTuple with the fie"),
        ("biased_average", {"values_per_feature": 8}, "state is of type .*; expected"),
    ],
)
def test_one_argument_bad(name, known, message):
    for bad in (None, [], "x", (), np.ones(3), 3):
        with pytest.raises(TypeError, match=message):
            called(name, bad, **known)


LAYER = convert.from_nnx({"scale": [2.0], "bias": [3.0], "mean": [1.0], "var": [4.0]})


@pytest.mark.parametrize("like", [LAYER.params, 5, [LAYER.params, LAYER.state], (1, 2)])
def test_like_is_parameters_and_a_state(like):
    entries = convert.to_nnx(LAYER)
    with pytest.raises(TypeError, match="expected .params, state.|expected a NamedTup"):
        convert.from_nnx(entries, like=like)
    with pytest.raises(TypeError, match="expected .params, state.|expected a NamedTup"):
        convert.layers_from("nnx", {"n": entries}, {"n": "m"}, like={"m": like})


def test_layers_and_likes_are_given_by_name():
    entries = {"n": convert.to_nnx(LAYER)}
    with pytest.raises(TypeError, match="like is of type BatchNormLayer; expected a m"):
        convert.layers_from("nnx", entries, {"n": "m"}, like=LAYER)
    with pytest.raises(TypeError, match="layers is of type list; expected a mapping"):
        convert.layers_into("nnx", entries, [LAYER], {"n": "m"})


def test_options_of_a_renorm_are_named():
    with pytest.raises(TypeError, match="options is of type tuple.*RenormOptions"):
        convert.to_batch_renorm("sbx", LAYER._replace(num_batches=1), (1, 3.0, 5.0))


def test_more_batches_than_int32_counts_are_refused():
    many = LAYER._replace(num_batches=2**31)
    with pytest.raises(ValueError, match="num_batches is 2147483648, but haiku count"):
        convert.to_haiku(many, momentum=0.9, num_dims=2)
    with pytest.raises(ValueError, match="equinox_batch counts batches in int32"):
        convert.to_equinox(many, mode="batch", momentum=0.9)


def test_haiku_has_one_feature_axis():
    of_two = convert.BatchNormLayer(*init((2, 3)), num_batches=1)
    with pytest.raises(ValueError, match=r"features of shape \[2, 3\]; expected one"):
        convert.to_haiku(of_two, momentum=0.9, num_dims=3)
    with pytest.raises(ValueError, match="feature_axis=0.5 is no axis"):
        convert.to_haiku(
            LAYER._replace(num_batches=1), momentum=0.9, num_dims=2, feature_axis=0.5
        )
