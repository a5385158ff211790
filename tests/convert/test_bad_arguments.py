"""Converters that are given something else altogether say what they expected."""

import inspect

import numpy as np
import pytest

from bn_jax import convert

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
