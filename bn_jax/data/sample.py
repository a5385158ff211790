"""The embedded, balanced sample of Fashion-MNIST: 6,000 training and 1,000 test images.

One grayscale PNG sheet of tiles, 100 to a row: the training images in the upper rows,
the test images below. The class of a tile is its column modulo 10, so labels need no
file. They are the first images of each class in the full set's own order. Images and
license: Zalando SE, see FASHION_MNIST_LICENSE.
"""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from bn_jax.data.image_data import DataError, Split

TRAIN_PER_CLASS = 600
TEST_PER_CLASS = 100
SHEET = Path(__file__).with_name("fashion_mnist_sample.png")

_CLASSES = 10
_COLUMNS = 100
_CRC32 = 0x9BFEE192  # of the pixels
_TILE = 28
# What PNG calls its textual keywords; License is not among the predefined ones.
_METADATA = {
    "Title": "Fashion-MNIST, the first images of each class (bn_jax's sample)",
    "Copyright": "2017, Zalando SE",
    "Source": "https://github.com/zalandoresearch/fashion-mnist",
    "License": "MIT (Expat), see FASHION_MNIST_LICENSE",
}


def select(split: Split, per_class: int) -> Split:
    """Take the first `per_class` images of each class, classes cycling 0, 1, ..., 9.

    Args:
        split: Holds at least `per_class` images of each of the 10 classes.
        per_class: How many of each.

    Returns:
        `10 * per_class` images; image `i` is the `i // 10`-th of class `i % 10`.

    Raises:
        DataError: If a class has too few images.
    """
    columns = []
    for label in range(_CLASSES):
        (positions,) = np.nonzero(split.labels == label)
        if len(positions) < per_class:
            raise DataError(
                f"class {label} has {len(positions)} images, the sample needs "
                f"{per_class} of each class; give the full set."
            )
        columns.append(positions[:per_class])
    order = np.stack(columns, axis=1).reshape(-1)
    return Split(split.images[order], split.labels[order])


def write(path: Path, train: Split, test: Split) -> None:
    """Write the sheet, made from the full set.

    Args:
        path: The PNG file to write.
        train: The full training set.
        test: The full test set.
    """
    tiles = np.concatenate(
        [
            select(train, TRAIN_PER_CLASS).images,
            select(test, TEST_PER_CLASS).images,
        ]
    )
    rows = tiles.reshape(-1, _COLUMNS, _TILE, _TILE).transpose(0, 2, 1, 3)
    sheet = Image.fromarray(rows.reshape(-1, _COLUMNS * _TILE))
    info = PngImagePlugin.PngInfo()
    for key, text in _METADATA.items():
        info.add_text(key, text)
    sheet.save(path, format="PNG", optimize=True, pnginfo=info)


def read() -> tuple[Split, Split]:
    """Read the embedded sheet.

    Returns:
        The training and the test split.

    Raises:
        DataError: If the sheet is missing or damaged.
    """
    count = _CLASSES * (TRAIN_PER_CLASS + TEST_PER_CLASS)
    expected = (count // _COLUMNS * _TILE, _COLUMNS * _TILE)
    try:
        with Image.open(SHEET) as image:
            # Nothing is unpacked of a header that promises more.
            sheet = np.asarray(image) if image.size == expected[::-1] else None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{SHEET}, the embedded sample, cannot be read: {error}. Install bn_jax "
            "again."
        ) from None
    if sheet is None or zlib.crc32(sheet.tobytes()) != _CRC32:
        raise DataError(
            f"{SHEET}, the embedded sample, has changed since it was made. Install "
            "bn_jax again."
        )
    rows = sheet.reshape(-1, _TILE, _COLUMNS, _TILE).transpose(0, 2, 1, 3)
    images = rows.reshape(count, _TILE, _TILE, 1)
    labels = np.arange(count, dtype=np.int32) % _CLASSES
    for array in (images, labels):
        array.setflags(write=False)
    boundary = _CLASSES * TRAIN_PER_CLASS
    return (
        Split(images[:boundary], labels[:boundary]),
        Split(images[boundary:], labels[boundary:]),
    )
