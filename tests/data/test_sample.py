import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bn_jax.data import DataError, Split, load, sample


def test_sample_is_balanced_and_shaped_like_the_full_set():
    data = load("sample")
    for split, per_class in ((data.train, 600), (data.test, 100)):
        assert split.images.shape == (10 * per_class, 28, 28, 1)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.flags.c_contiguous
        np.testing.assert_array_equal(np.bincount(split.labels), [per_class] * 10)
    assert (data.name, data.kind, data.fallback_reason) == ("sample", "sample", None)
    assert "6,000 + 1,000 images" in data.source
    assert len(data.class_names) == 10


def test_sample_is_the_first_of_each_class_of_the_full_set(full):
    for embedded, whole, per_class in zip(sample.read(), full, (600, 100), strict=True):
        for label in range(10):
            np.testing.assert_array_equal(
                embedded.images[embedded.labels == label],
                whole.images[whole.labels == label][:per_class],
            )


def test_written_sheet_is_read_back(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def make(count):
        labels = rng.permutation(np.arange(count, dtype=np.int32) % 10)
        # One grey level to a column of an image, so that the sheet compresses fast.
        images = rng.integers(0, 256, (count, 1, 28, 1), dtype=np.uint8)
        return Split(images.repeat(28, axis=1), labels)

    train, test = make(6_100), make(1_050)
    monkeypatch.setattr(sample, "SHEET", tmp_path / "sheet.png")
    sample.write(sample.SHEET, train, test)
    written = zlib.crc32(np.asarray(Image.open(sample.SHEET)).tobytes())
    monkeypatch.setattr(sample, "_CRC32", written)
    for found, whole, per_class in zip(
        sample.read(), (train, test), (600, 100), strict=True
    ):
        expected = sample.select(whole, per_class)
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_changed_pixel_is_refused(tmp_path, monkeypatch):
    sheet = np.array(Image.open(sample.SHEET))
    sheet[500, 500] ^= 1
    monkeypatch.setattr(sample, "SHEET", tmp_path / "sheet.png")
    Image.fromarray(sheet).save(sample.SHEET)
    with pytest.raises(DataError, match="sheet.png, the embedded sample, has changed"):
        load("sample")


def png_header(width, height):
    """The start of a PNG, whose header promises so many pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + size
    length, crc32 = struct.pack(">I", len(size)), struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + length + chunk + crc32


@pytest.mark.parametrize("side", [3000, 60_000])
def test_header_that_promises_more_pixels_is_refused(side, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SHEET", tmp_path / "sheet.png")
    sample.SHEET.write_bytes(png_header(side, side))
    with pytest.raises(DataError, match="Install bn_jax again"):
        load("sample")


def test_select_cycles_through_the_classes():
    # Labels 9, 8, ..., 0 three times over, images numbered 0 to 29: class c is first
    # image 9 - c, then image 19 - c.
    labels = np.tile(np.arange(9, -1, -1, dtype=np.int32), 3)
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)
    chosen = sample.select(Split(images, labels), 2)
    np.testing.assert_array_equal(chosen.labels, list(range(10)) * 2)
    np.testing.assert_array_equal(
        chosen.images.ravel(), [*range(9, -1, -1), *range(19, 9, -1)]
    )


def test_select_names_the_class_that_is_too_small():
    split = Split(np.zeros((19, 28, 28, 1), np.uint8), np.arange(19) % 10)
    with pytest.raises(DataError, match="class 9 has 1 images, the sample needs 2"):
        sample.select(split, 2)


def test_sheet_is_small_and_names_source_and_license():
    assert sample.SHEET.stat().st_size < 4_000_000
    with Image.open(sample.SHEET) as image:
        assert image.mode == "L"
        assert "zalandoresearch/fashion-mnist" in image.text["Source"]
        assert "MIT" in image.text["License"]
        assert "Zalando SE" in image.text["Copyright"]
    license_text = sample.SHEET.with_name("FASHION_MNIST_LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in license_text
    assert "Permission is hereby granted" in license_text


@pytest.mark.parametrize("damage", ["absent", "truncated", "flipped", "other size"])
def test_damaged_sheet_is_named(tmp_path, monkeypatch, damage):
    path = tmp_path / "sheet.png"
    content = sample.SHEET.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + b"damage" + content[middle + 6 :])
    elif damage == "other size":
        Image.new("L", (28, 28)).save(path)
    monkeypatch.setattr(sample, "SHEET", path)
    with pytest.raises(DataError, match=r"sheet\.png, the embedded sample, .*again"):
        sample.read()
