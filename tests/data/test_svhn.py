"""SVHN from its MATLAB files, whole and damaged."""

import json

import numpy as np
import pytest
import scipy.io

from bn_jax.data import DataError, load, prepare, tfds_builder

NAME = "svhn_cropped"


@pytest.fixture
def digits(shrink, tmp_path):
    """The content of the two files, by split, and `write` to write them."""
    spec = shrink(NAME, train=12, test=5)
    rng = np.random.default_rng(0)
    content = {
        split: {
            "X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": rng.permutation(np.arange(count) % 10 + 1)[:, None].astype(np.uint8),
        }
        for split, count in spec.sizes.items()
    }
    folder = tmp_path / "files"
    folder.mkdir()

    def write():
        for split, values in content.items():
            path = folder / f"{split}_32x32.mat"
            scipy.io.savemat(path, values, do_compression=True)
        return folder

    return content, write


def assert_is(data, content):
    for split, values in content.items():
        found = getattr(data, split)
        for i, image in enumerate(found.images):
            np.testing.assert_array_equal(image, values["X"][..., i])
        expected = [0 if y == 10 else y for y in values["y"][:, 0]]
        np.testing.assert_array_equal(found.labels, expected)
        assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)
        assert found.images.flags.c_contiguous
        assert not found.images.flags.writeable


def test_files_are_read_and_ten_means_zero(digits):
    content, write = digits
    data = load(NAME, data_files=write())
    assert_is(data, content)
    assert 10 in content["train"]["y"]
    assert (data.kind, data.num_classes) == ("files", 10)
    assert "SVHN (cropped), 12 + 5 images, MATLAB files in " in data.source


def test_prepared_set_with_extra_digits_is_read(digits, tmp_path):
    content, write = digits
    prepared = prepare(NAME, data_files=write())
    # TFDS's own builder adds a split of 531,131 images, which is left alone.
    path = prepared / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"].append({**info["splits"][0], "name": "extra"})
    path.write_text(json.dumps(info))
    for cached in (prepared / "bn_jax_arrays").iterdir():
        cached.unlink()
    (prepared / "bn_jax_arrays").rmdir()
    data = load(NAME)
    assert_is(data, content)
    assert data.kind == "tfds"
    builder = tfds_builder.tfds.builder(NAME, data_dir=tmp_path / "tfds")
    skip = {"image": tfds_builder.tfds.decode.SkipDecoding()}
    ids = {record["id"] for record in builder.as_data_source("test", decoders=skip)}
    assert ids == {b"test_00000%d" % i for i in range(5)}


def error_of(folder):
    with pytest.raises(DataError) as caught:
        load(NAME, data_files=folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file_is_named(digits):
    folder = digits[1]()
    (folder / "test_32x32.mat").unlink()
    assert "lacks test_32x32.mat, expected a folder with" in error_of(folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty"])
def test_damaged_file_is_named(digits, damage):
    folder = digits[1]()
    path = folder / "train_32x32.mat"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"truncated": content[:-1000], "text": b"<html>" * 30, "empty": b""}
    path.write_bytes(changed.get(damage, content))
    assert "train_32x32.mat cannot be read" in error_of(folder)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("X", np.zeros((32, 32, 3, 11), np.uint8), r"expected uint8 (32, 32, 3, 12)"),
        ("X", np.zeros((32, 32, 3, 12)), "holds X, float64 (32, 32, 3, 12)"),
        ("y", np.ones((11, 1), np.uint8), "and y, uint8 (11, 1)"),
        ("y", np.ones((12, 1)), "and y, float64 (12, 1)"),
        ("y", np.zeros((12, 1), np.uint8), "holds the digit 0 at position 0"),
        ("y", np.full((12, 1), 11, np.uint8), "holds the digit 11 at position 0"),
        ("Z", 0, "(KeyError: 'y')"),
    ],
)
def test_other_content_is_refused(digits, key, value, problem):
    content, write = digits
    if key == "Z":
        del content["train"]["y"]
    else:
        content["train"][key] = value
    assert problem in error_of(write())
