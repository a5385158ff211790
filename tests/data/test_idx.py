import dataclasses
import gzip
import struct
import tracemalloc

import jax
import numpy as np
import pytest

from bn_jax.data import DataError, idx, load
from bn_jax.data.sources import SPECS
from bn_jax.data.spec import PARTS

NAME = "fashion_mnist"


def error_of(tiny):
    with pytest.raises(DataError) as caught:
        load(NAME, data_files=tiny.idx_dir)
    return str(caught.value)


@pytest.mark.parametrize("spelling", ["gzip", "plain", "dotted", "unpacked but .gz"])
def test_every_spelling_reads_the_same_arrays(tiny, assert_is_tiny, spelling):
    for part in PARTS:
        path, content = tiny.file(part), tiny.content(part)
        if spelling == "plain":
            path.with_suffix("").write_bytes(content)
            path.unlink()
        elif spelling == "dotted":
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
        elif spelling == "unpacked but .gz":
            path.write_bytes(content)
    data = load(NAME, data_files=tiny.idx_dir)
    assert_is_tiny(data)
    assert data.kind == "files"
    assert data.source == f"Fashion-MNIST, 30 + 20 images, IDX files in {tiny.idx_dir}"


def test_all_missing_files_are_named_at_once(tiny):
    for part in ("train_labels", "test_images"):
        tiny.file(part).unlink()
    message = error_of(tiny)
    assert "lacks 2 of the 4" in message
    assert "train-labels-idx1-ubyte[.gz], t10k-images-idx3-ubyte[.gz]" in message
    assert "train-images" not in message


def test_missing_folder_is_named(tiny):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(NAME, data_files=tiny.idx_dir / "nowhere")


def corrupt_gzip_middle(content):
    middle = len(content) // 2
    flipped = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    return content[:middle] + flipped + content[middle + 8 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], corrupt_gzip_middle],
    ids=["truncated", "bytes flipped"],
)
@pytest.mark.parametrize("part", PARTS)
def test_damaged_gzip_is_named(tiny, part, damage):
    path = tiny.file(part)
    path.write_bytes(damage(path.read_bytes()))
    message = error_of(tiny)
    assert str(path) in message
    assert "truncated or damaged gzip file" in message
    assert "Delete the file and fetch it again." in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda content: content[:-3],
            "is truncated: its header declares 30 = 30 bytes of values, and it holds",
        ),
        (lambda content: content + b"abcd", "has trailing bytes: its header declares"),
        (lambda content: content[:6], "is truncated: it holds 6 bytes"),
        (lambda content: b"", "its magic number is 0x, expected 0x00000801"),
        (lambda content: b"<html>", "its magic number is 0x3c68746d"),
        (lambda content: b"\0\0\x0d\1" + content[4:], "magic number is 0x00000d01"),
        (lambda content: content[:8] + b"\x0a" + content[9:], "the label 10 at pos"),
        (
            lambda content: content[:8] + bytes([(content[8] + 1) % 10]) + content[9:],
            "the crc32 of the content is",
        ),
        (
            lambda content: struct.pack(">II", 0x801, 29) + content[8:-1],
            "holds 29 values, expected 30 for Fashion-MNIST",
        ),
    ],
)
def test_fault_in_a_label_file_is_named(tiny, change, problem):
    tiny.rewrite("train_labels", change(tiny.content("train_labels")))
    message = error_of(tiny)
    assert str(tiny.file("train_labels")) in message
    assert problem in message


def test_no_more_is_unpacked_than_the_header_promises(tiny):
    tiny.rewrite("train_labels", tiny.content("train_labels") + bytes(10**8))
    tracemalloc.start()
    message = error_of(tiny)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "has trailing bytes" in message
    assert peak < 10**7


def test_devices_of_a_cpu_take_images_without_a_copy(tiny):
    data = load(NAME, data_files=tiny.idx_dir)
    for images in (data.train.images, data.test.images):
        on_device = jax.device_put(images, jax.devices("cpu")[0])
        assert on_device.unsafe_buffer_pointer() == images.ctypes.data
        assert not images.flags.writeable  # so that they stay as they are there


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_files_of_another_set_are_refused_by_its_name(tiny, name, monkeypatch):
    spec = dataclasses.replace(SPECS[name], sizes=tiny.spec.sizes, alike=(SPECS[NAME],))
    assert SPECS[name].alike[0].title == "Fashion-MNIST"
    monkeypatch.setitem(SPECS, name, spec)
    with pytest.raises(
        DataError, match=f"holds Fashion-MNIST's train images, expected {spec.title}'s"
    ):
        load(name, data_files=tiny.idx_dir)


def test_images_of_another_size_are_refused(tiny):
    content = struct.pack(">IIII", 0x803, 30, 32, 32) + bytes(30 * 32 * 32)
    tiny.rewrite("train_images", content)
    message = error_of(tiny)
    assert str(tiny.file("train_images")) in message
    assert "holds 30 x 32 x 32 values, expected 30 x 28 x 28" in message


def test_changed_pixel_is_found_by_the_checksum(tiny):
    content = bytearray(tiny.content("test_images"))
    content[-1] ^= 1
    tiny.rewrite("test_images", bytes(content))
    message = error_of(tiny)
    assert str(tiny.file("test_images")) in message
    assert "does not hold Fashion-MNIST's test images" in message


def swap(tiny, one, other):
    one_content, other_content = tiny.content(one), tiny.content(other)
    tiny.rewrite(one, other_content)
    tiny.rewrite(other, one_content)


def test_labels_in_the_place_of_images_are_recognised(tiny):
    swap(tiny, "train_images", "train_labels")
    message = error_of(tiny)
    assert str(tiny.file("train_images")) in message
    assert "holds labels, but its name says images" in message


def test_train_and_test_swapped_is_recognised(tiny):
    swap(tiny, "train_images", "test_images")
    swap(tiny, "train_labels", "test_labels")
    message = error_of(tiny)
    assert str(tiny.file("train_images")) in message
    assert "were the training and test files swapped" in message


def test_full_set_has_the_published_content(full):
    # 6,000 and 1,000 images of each class, as Zalando's README says.
    train, test = full
    assert train.images.shape == (60_000, 28, 28, 1)
    assert test.images.shape == (10_000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(train.labels), [6_000] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [1_000] * 10)


def test_folder_with_the_name_of_a_file_counts_as_missing(tiny):
    path = tiny.file("train_images")
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="lacks 1 of the 4"):
        idx.find(tiny.idx_dir, tiny.spec)


def test_gzip_content_decides_not_the_suffix(tiny, assert_is_tiny):
    for part in PARTS:
        path = tiny.file(part)
        path.with_suffix("").write_bytes(gzip.compress(tiny.content(part)))
        path.unlink()
    assert_is_tiny(load(NAME, data_files=tiny.idx_dir))
