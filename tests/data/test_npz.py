"""A user's own images from an npz file, and each way in which one can be wrong."""

import zipfile

import numpy as np
import pytest

from bn_jax.data import DataError, load


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 4,
        "test_images": rng.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(7) % 3,
    }


@pytest.fixture
def load_saved(tmp_path):
    """Save arrays and load them."""

    def call(arrays, save=np.savez, name="images.npz"):
        save(tmp_path / name, **arrays)
        return load(f"npz:{tmp_path / name}")

    return call


@pytest.fixture
def error_of(load_saved, tmp_path):
    def call(arrays):
        with pytest.raises(DataError) as caught:
            load_saved(arrays)
        message = str(caught.value)
        assert str(tmp_path / "images.npz") in message
        assert "\n" not in message
        return message

    return call


KERAS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


def assert_is(data, arrays):
    for name in ("train", "test"):
        split = getattr(data, name)
        np.testing.assert_array_equal(split.images, arrays[f"{name}_images"])
        np.testing.assert_array_equal(split.labels, arrays[f"{name}_labels"])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        for array in split:
            assert array.flags.c_contiguous
            assert not array.flags.writeable


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keys", ["ours", "Keras's"])
def test_arrays_are_read(arrays, load_saved, tmp_path, save, keys):
    saved = arrays
    if keys == "Keras's":
        saved = {KERAS[key]: array for key, array in arrays.items()}
    data = load_saved({**saved, "val_images": np.zeros(3)}, save)
    assert_is(data, arrays)
    assert (data.kind, data.name) == ("npz", f"npz:{tmp_path / 'images.npz'}")
    assert (data.num_classes, data.image_shape) == (4, (6, 5, 3))
    assert data.class_names == ("0", "1", "2", "3")
    assert f"12 + 7 images, npz file {tmp_path / 'images.npz'}" in data.source


def test_other_layouts_are_read(arrays, load_saved):
    saved = dict(
        arrays,
        train_images=np.asfortranarray(arrays["train_images"][..., 0]),
        test_images=arrays["test_images"][..., 0],
        train_labels=arrays["train_labels"][:, None].astype(np.uint8),
        test_labels=arrays["test_labels"].astype(">i8"),
    )
    data = load_saved(saved)
    arrays["train_images"] = arrays["train_images"][..., :1]
    arrays["test_images"] = arrays["test_images"][..., :1]
    assert_is(data, arrays)


def test_class_names_count_the_classes(arrays, load_saved):
    names = np.array(["a", "b", "cc", "d", "e"])
    assert load_saved({**arrays, "class_names": names}).class_names == tuple(names)


def test_source_tells_whether_the_content_changed(arrays, load_saved):
    source = load_saved(arrays).source
    assert load_saved(arrays, np.savez_compressed).source == source
    arrays["test_images"][-1, -1, -1, -1] ^= 1
    assert load_saved(arrays).source != source


def test_path_is_taken_as_it_stands(arrays, load_saved, tmp_path, monkeypatch):
    (tmp_path / "npz:a=1,b").mkdir()
    assert_is(load_saved(arrays, name="npz:a=1,b/c d:x=2.npz"), arrays)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is(load("npz:~/npz:a=1,b/c d:x=2.npz"), arrays)


def test_data_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="names its own file, but data_files"):
        load("npz:a.npz", data_files=tmp_path)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.npz", "nowhere.npz does not exist, expected an npz file"),
        ("", "is a folder, expected an npz file"),
        ("~nobody-of-this-name/a.npz", "has no path"),
        ("a\0b.npz", "has no path|does not exist"),
    ],
)
def test_missing_file_is_named(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=problem):
        load(f"npz:{path}")


@pytest.mark.parametrize("content", ["text", "empty", "npy", "pickle", "truncated"])
def test_other_files_are_refused(arrays, tmp_path, content):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    whole = path.read_bytes()
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content == "pickle":
        path.write_bytes(b"\x80\x04]\x94.")
    else:
        path.write_bytes(
            {"text": b"<html>", "empty": b"", "truncated": whole[:-300]}[content]
        )
    with pytest.raises(DataError, match=r"images\.npz is no npz file, expected"):
        load(f"npz:{path}")


def test_flipped_byte_is_named(arrays, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: train_images cannot be read"):
        load(f"npz:{path}")


def test_member_that_is_no_array_is_named(arrays, tmp_path):
    path = tmp_path / "images.npz"
    labels = arrays.pop("train_labels")
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_labels.npy", labels.tobytes())
    with pytest.raises(DataError, match="train_labels, which is no array"):
        load(f"npz:{path}")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize(
    "key", ["train_images", "train_labels", "test_labels", "class_names"]
)
def test_pickled_objects_are_refused_and_not_run(arrays, error_of, tmp_path, key):
    marker = tmp_path / "ran"
    arrays[key] = np.array([Malicious(str(marker)), None], dtype=object)
    assert f"holds {key} as pickled objects" in error_of(arrays)
    assert not marker.exists()


def test_all_missing_keys_are_named_with_what_is_there(arrays, error_of):
    del arrays["train_labels"], arrays["test_images"]
    message = error_of(arrays)
    assert "lacks train_labels (or y_train), test_images (or x_test)" in message
    assert "it holds train_images, test_labels" in message


def test_both_names_of_an_array_are_refused(arrays, error_of):
    arrays["x_test"] = arrays["test_images"]
    assert "holds both test_images and x_test" in error_of(arrays)


@pytest.mark.parametrize(
    ("key", "change", "problems"),
    [
        (
            "train_images",
            lambda x: x / np.float32(255),
            [
                "train has images of dtype float32, expected uint8",
                "(255 * images).round()",
            ],
        ),
        (
            "test_images",
            lambda x: x.astype(np.int64),
            [
                "test has images of dtype int64, expected uint8",
                "images.astype(numpy.uint8)",
            ],
        ),
        ("train_images", lambda x: x[:, 0, 0], ["of shape (12, 3), expected [N, H"]),
        ("train_images", lambda x: x[None], ["of shape (1, 12, 6, 5, 3), expected"]),
        ("train_images", lambda x: x[:0], ["of shape (0, 6, 5, 3)", "at least one im"]),
        ("test_images", lambda x: x[:0], ["of shape (0, 6, 5, 3)", "at least one im"]),
        ("train_images", lambda x: x[:, :, :0], ["of shape (12, 6, 0, 3)"]),
        (
            "test_images",
            lambda x: x[:, :5],
            ["{'train': (6, 5, 3), 'test': (5, 5, 3)}, expected one shape"],
        ),
        (
            "train_images",
            lambda x: np.zeros((12, 3, 8, 8), np.uint8),
            ["looks like [N, C, H, W]", "numpy.moveaxis(images, 1, -1)"],
        ),
        ("train_labels", lambda y: y[1:], ["of shape (11,), expected (12,)"]),
        ("test_labels", lambda y: y[0], ["test has labels of shape ()"]),
        (
            "train_labels",
            lambda y: np.eye(4, dtype=int)[y],
            ["of shape (12, 4), expected (12,)", "labels.argmax(-1)"],
        ),
        ("train_labels", lambda y: y * 1.0, ["dtype float64, expected integers"]),
        ("train_labels", lambda y: y > 1, ["dtype bool, expected integers"]),
        ("train_labels", lambda y: y.astype(str), ["dtype <U21, expected integers"]),
        ("train_labels", lambda y: y + 1, ["from 1 to 4", "return_inverse"]),
        ("train_labels", lambda y: y - 1, ["from -1 to 2", "from 0 to K - 1"]),
        (
            "train_labels",
            lambda y: np.where(y == 0, -1, y),
            ["train has the label -1 at position 0 (3 such), expected 0 to 3"],
        ),
        ("train_labels", lambda y: y * 1000, ["4 different", "(0, 1000, 2000, 3000)"]),
        ("train_labels", lambda y: y * 0, ["at least 2"]),
        ("test_labels", lambda y: y + 2, ["the label 4 at position 2", "0 to 3"]),
        ("test_labels", lambda y: y - 1, ["the label -1 at position 0", "(3 such)"]),
        ("test_labels", lambda y: y.astype("u8") + 2**63, ["the label 92233720368547"]),
    ],
)
def test_unfit_array_is_refused(arrays, error_of, key, change, problems):
    arrays[key] = change(arrays[key])
    message = error_of(arrays)
    for problem in problems:
        assert problem in message


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a", "b", "c"], "train has the label 3 at position 3"),
        ([1, 2, 3, 4], "class_names of dtype int64"),
        ([["a", "b", "c", "d"]], "class_names of dtype <U1 and shape (1, 4)"),
        (["a"], "expected at least 2 texts"),
    ],
)
def test_unfit_class_names_are_refused(arrays, error_of, names, problem):
    assert problem in error_of({**arrays, "class_names": np.array(names)})
