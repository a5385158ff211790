"""A validation split, the first training examples, and statistics of channels."""

import dataclasses

import numpy as np
import pytest

from bn_jax.data import DataError, ImageData, Split, channel_statistics, image_data


def make(count):
    """Number images from 0; labels cycle through three classes."""
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Split(images, np.arange(count, dtype=np.int32) % 3)


@pytest.fixture
def data():
    return ImageData(
        name="x",
        train=make(20),
        test=make(5),
        class_names=("a", "b", "c"),
        kind="files",
        source="x, 20 + 5",
    )


def numbers(split):
    return split.images.ravel().tolist()


def test_last_training_examples_are_set_aside(data):
    result = data.with_validation(6)
    assert numbers(result.train) == list(range(14))
    assert numbers(result.validation) == list(range(14, 20))
    np.testing.assert_array_equal(result.validation.labels, [2, 0, 1, 2, 0, 1])
    assert result.test is data.test
    assert result.source == "x, 20 + 5, the last 6 of training for validation"


def test_no_validation_changes_nothing(data):
    assert data.with_validation(0) is data
    assert data.validation is None


def test_validation_does_not_depend_on_the_number_of_training_examples(data):
    for count in (3, 8, 14):
        result = data.with_validation(6).with_train_examples(count)
        assert numbers(result.train) == list(range(count))
        assert numbers(result.validation) == list(range(14, 20))
    assert result.source.endswith("6 of training for validation")  # 14 are all
    result = data.with_validation(6).with_train_examples(8)
    assert result.source.endswith("for validation, the first 8 for training")
    with pytest.raises(DataError, match="which has 14; give at most 14"):
        data.with_validation(6).with_train_examples(15)


@pytest.mark.parametrize("count", [-1, 20, 21])
def test_validation_leaves_a_training_example(data, count):
    with pytest.raises(DataError, match=rf"validation={count} of x, 20 \+ 5") as caught:
        data.with_validation(count)
    assert "give at most 19" in str(caught.value)


def test_validation_is_set_aside_once(data):
    with pytest.raises(DataError, match="has 6 validation examples already"):
        data.with_validation(6).with_validation(3)


def test_validation_takes_no_whole_class(data):
    order = np.argsort(data.train.labels, kind="stable")  # 7, 7 and 6 of a class
    train = Split(data.train.images[order], data.train.labels[order])
    ordered = dataclasses.replace(data, train=train)
    assert len(ordered.with_validation(5).train.labels) == 15
    with pytest.raises(DataError, match=r"all training examples of class 2 \(c\)"):
        ordered.with_validation(6)


@pytest.mark.parametrize("count", [-1, 21])
def test_first_examples_are_at_hand(data, count):
    with pytest.raises(DataError, match=f"train_examples={count} of x"):
        data.with_train_examples(count)


def test_classes_and_shape_are_known(data):
    assert (data.num_classes, data.image_shape) == (3, (1, 1, 1))


def split_of(images):
    return Split(images, np.zeros(len(images), np.int32))


@pytest.mark.parametrize("values_per_chunk", [1, 200, 1 << 22])
@pytest.mark.parametrize("stored", ["memory", "mapped"])
def test_statistics_are_those_of_all_pixels(
    tmp_path, monkeypatch, values_per_chunk, stored
):
    monkeypatch.setattr(image_data, "_VALUES_PER_CHUNK", values_per_chunk)
    images = np.random.default_rng(0).integers(0, 256, (31, 4, 5, 3), dtype=np.uint8)
    images[..., 1] //= 2
    if stored == "mapped":
        np.save(tmp_path / "images.npy", images)
        images = np.load(tmp_path / "images.npy", mmap_mode="r")
    mean, std = channel_statistics(split_of(images))
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-13)


def test_statistics_hold_where_the_deviation_is_small():
    # One pixel of n differs by 1: the variance is (n - 1) / n**2.
    images = np.full((1000, 10, 10, 1), 254, np.uint8)
    images[0, 0, 0] = 255
    n = images.size
    mean, std = channel_statistics(split_of(images))
    np.testing.assert_allclose(mean, [254 + 1 / n], rtol=1e-15)
    np.testing.assert_allclose(std, [np.sqrt(n - 1) / n], rtol=1e-15)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 4, 4, 1), np.uint8),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 1), np.float32),
        np.zeros((2, 4, 4, 1), np.int64),
    ],
)
def test_statistics_are_of_bytes_alone(images):
    with pytest.raises(DataError, match="expected at least one, uint8 .N, H, W, C."):
        channel_statistics(split_of(images))


def test_constant_channel_is_refused():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 2), dtype=np.uint8)
    images[..., 1] = 7
    with pytest.raises(DataError, match="channel 1 is 7 in each of the 9 images"):
        channel_statistics(split_of(images))


def own(count=6, classes=3, shape=(8, 8, 1)):
    """Arrays as users have them: labels of 64 bits."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(images, np.arange(count) % classes)


def test_train_and_test_are_enough_of_arrays_of_ones_own():
    train, test = own(6), own(4)
    data = ImageData(train=train, test=test)
    assert data.class_names == ("0", "1", "2") and data.kind == "arrays"
    assert data.train.labels.dtype == np.int32
    np.testing.assert_array_equal(data.train.images, train.images)
    assert not data.train.images.flags.writeable and train.images.flags.writeable
    assert data.source.startswith("6 + 4 images, arrays, crc32 ")
    part = data.with_validation(1).with_train_examples(4)
    assert part.source.startswith(f"{data.source}, the last 1 of training")
    assert part.name == data.name and part.class_names == data.class_names


def test_name_of_arrays_tells_them_from_others():
    data = ImageData(train=own(6), test=own(4))
    again = ImageData(train=own(6), test=own(4))
    changed = own(6)
    changed.images[0, 0, 0] += 1
    other = ImageData(train=changed, test=own(4))
    assert (again.name, again.source) == (data.name, data.source)
    assert other.name != data.name and other.source != data.source
    named = ImageData(
        name="mine",
        train=own(6),
        test=own(4),
        class_names=("a", "b", "c"),
        source="mine, twice",
    )
    assert (named.name, named.source) == ("mine", "mine, twice")
    assert named.class_names == ("a", "b", "c")


def test_labels_in_a_column_are_taken_as_they_are():
    column = own()._replace(labels=own().labels[:, None])
    data = ImageData(train=column, test=column)
    np.testing.assert_array_equal(data.train.labels, own().labels)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (own()._replace(images=own().images / 255), own(), r"float64, .*255 \* images"),
        (own()._replace(images=own().images[0, 0]), own(), r"or \[N, H, W\] with"),
        # It would be 0 in the 32 bits in which labels are kept.
        (own(), own()._replace(labels=own().labels + 2**32), "the label 4294967296"),
        (own(shape=(3, 8, 8)), own(shape=(3, 8, 8)), r"looks like \[N, C, H, W\]"),
        (own(shape=(3, 9, 8)), own(shape=(3, 9, 8)), r"looks like \[N, C, H, W\]"),
        (own(), own(shape=(6, 8, 1)), "different shapes: .*'test': .6, 8, 1"),
        (own()._replace(labels=np.eye(6)), own(), r"one-hot, give labels.argmax\(-1\)"),
        (own()._replace(labels=np.zeros(6)), own(), "dtype float64, .*astype"),
        (own()._replace(labels=np.array([*"aabbcc"])), own(), "<U1.*numpy.unique"),
        (own()._replace(labels=np.zeros(5, int)), own(), r"\(5,\), .* one label for"),
        (own()._replace(labels=1 + own().labels), own(), "class from 0 to K - 1"),
        (own(classes=1), own(classes=1), "1 different labels"),
        (own(), own(classes=4), "test has the label 3 at position 3 .*0 to 2"),
        (own()._asdict(), own(), "train is of type dict, expected Split"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(train, test, message):
    with pytest.raises(DataError, match=message):
        ImageData(train=train, test=test)
