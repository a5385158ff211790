"""Pickles are read without running what they name."""

import collections
import pickle

import numpy as np
import pytest

from bn_jax.data import plain_pickle


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_values_and_arrays_are_read(protocol):
    value = {"a": [1, (2.5, "b", None, True)], b"c": {"d": {}}}
    assert plain_pickle.loads(pickle.dumps(value, max(protocol, 3))) == value


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_those_that_numpy_wrote(order):
    array = np.arange(24, dtype=np.uint8).reshape((4, 6), order=order)
    found = plain_pickle.loads(pickle.dumps({"x": array}, 4))["x"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3),
        np.zeros(3, np.int8),
        np.array([{}, []], dtype=object),
        np.zeros(2, [("a", "u1"), ("b", "u1")]),
    ],
    ids=["float", "int8", "object", "record"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(plain_pickle.PickleError, match="no array of unsigned bytes"):
        plain_pickle.loads(pickle.dumps({"x": array}, 4))


class Malicious:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_is_refused_and_not_made(tmp_path, protocol):
    marker = tmp_path / "ran"
    content = pickle.dumps({"data": Malicious(open, str(marker), "w")}, protocol)
    with pytest.raises(plain_pickle.PickleError, match=r"names \w+.open, which was no"):
        plain_pickle.loads(content)
    assert not marker.exists()
    file = pickle.loads(content)["data"]  # the pickle does what it is feared to do
    file.close()
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(collections.OrderedDict(a=1), 2),
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"(S'true'\nios\nsystem\n.",  # INST
        b"cnumpy\nfrombuffer\n.",
        b"cbn_jax.data.plain_pickle\n_Unpickler\n.",
    ],
)
def test_every_other_name_is_refused(content):
    with pytest.raises(plain_pickle.PickleError, match="which was not called"):
        plain_pickle.loads(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        pickle.dumps([1, 2], 4)[:-3],
        b"cnumpy\nndarray\n.",  # the name alone
        b"\x82\x01.",  # an extension
        b"Pid\n.",  # a persistent id
        b"cnumpy\ndtype\n(tR}S'args'\nI1\nsb.",
    ],
)
def test_damage_is_one_line(content):
    with pytest.raises(plain_pickle.PickleError) as caught:
        plain_pickle.loads(content)
    assert "\n" not in str(caught.value)


def test_array_whose_shape_does_not_match_is_refused():
    content = pickle.dumps({"x": np.zeros((2, 3), np.uint8)}, 4)
    assert content.count(b"K\x02K\x03\x86") == 1
    content = content.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")
    with pytest.raises(plain_pickle.PickleError, match="no array of unsigned bytes"):
        plain_pickle.loads(content)
