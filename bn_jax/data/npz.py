"""A user's own images and labels, from one npz file.

`numpy.savez(path, train_images=..., train_labels=..., test_images=...,
test_labels=...)` writes such a file; Keras's names (x_train, y_train, x_test, y_test)
do as well, and so do the files of MedMNIST, whose validation images are left aside.
Pickled objects are refused, not read.
"""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bn_jax.data.image_data import (
    DataError,
    ImageData,
    Split,
    as_labels,
    has_channels_first,
)
from bn_jax.data.spec import PARTS, Part

PREFIX = "npz:"

_KERAS: dict[Part, str] = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}
_CLASS_NAMES = "class_names"


def load(name: str) -> ImageData:
    """Load the images and labels of an npz file.

    The file holds `train_images`, `train_labels`, `test_images` and `test_labels`:
    images uint8 `[N, H, W, C]`, or `[N, H, W]` of one channel, of one size in both
    splits; labels integers `[N]` or `[N, 1]`, at least 2 classes numbered from 0. With
    `class_names`, an array of K texts, labels are from 0 to K - 1; without, each class
    has a training example. Other arrays in the file are ignored.

    Args:
        name: "npz:" and the path, taken as it stands but for a leading `~`.

    Returns:
        The images. `source` has a checksum of their content, by which a run that is
        resumed sees whether the file has changed.

    Raises:
        DataError: If the file is missing or holds anything else.
    """
    text = name.removeprefix(PREFIX)
    try:
        path = Path(text).expanduser()
        is_file = path.is_file()
    except (RuntimeError, ValueError) as error:  # no such user; a null byte
        raise DataError(f"dataset {name!r} has no path: {error}.") from None
    if not is_file:
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"dataset {name!r}: {path.absolute()} {found}, expected an npz file. Give "
            "its path after 'npz:', as in npz:PATH."
        )
    arrays = _read(path)
    pairs = {}
    for split in ("train", "test"):
        images = _as_images(path, f"{split}_images", arrays[f"{split}_images"])
        part = f"{split}_labels"
        labels = as_labels(f"{path} holds {part}", arrays[part], len(images))
        pairs[split] = (images, labels)
    shapes = {split: images.shape[1:] for split, (images, _) in pairs.items()}
    if shapes["train"] != shapes["test"]:
        raise DataError(
            f"{path} holds training images of shape {shapes['train']} and test images "
            f"of shape {shapes['test']}, expected one shape. Resize or crop them "
            "before saving."
        )
    if _CLASS_NAMES in arrays:
        class_names = _check_class_names(path, arrays[_CLASS_NAMES])
    else:
        class_names = _count_classes(path, pairs["train"][1])
    for split, (_, labels) in pairs.items():
        _check_range(path, f"{split}_labels", labels, len(class_names))
    train, test = (_as_split(*pair) for pair in pairs.values())
    crc32 = 0
    for array in (*train, *test):
        crc32 = zlib.crc32(array.data, crc32)
    return ImageData(
        name=name,
        train=train,
        test=test,
        class_names=class_names,
        kind="npz",
        source=(
            f"{len(train.labels):,} + {len(test.labels):,} images, npz file {path}, "
            f"crc32 {crc32:08x}"
        ),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read the four arrays, and the class names if there are any."""
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from None
    with stream:  # numpy leaves a damaged file open
        try:
            file = np.load(stream, allow_pickle=False)
        except (EOFError, OSError, ValueError, zipfile.BadZipFile):
            file = None
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(
                f"{path} is no npz file, expected a file that numpy.savez wrote. Save "
                "the images and labels with numpy.savez."
            )
        keys = {part: _key(path, part, file.files) for part in PARTS}
        missing = [
            f"{part} (or {_KERAS[part]})" for part, key in keys.items() if key is None
        ]
        if missing:
            raise DataError(
                f"{path} lacks {', '.join(missing)}; it holds "
                f"{', '.join(file.files) or 'nothing'}. Save the arrays under these "
                "names."
            )
        arrays: dict[str, np.ndarray] = {
            part: _array(path, file, key)
            for part, key in keys.items()
            if key is not None
        }
        if _CLASS_NAMES in file.files:
            arrays[_CLASS_NAMES] = _array(path, file, _CLASS_NAMES)
    return arrays


def _key(path: Path, part: Part, present: Iterable[str]) -> str | None:
    """Return under which of its two names the file has a part."""
    found = [key for key in (part, _KERAS[part]) if key in present]
    if len(found) == 2:
        raise DataError(
            f"{path} holds both {found[0]} and {found[1]}, expected one of them. Save "
            "it without the other."
        )
    return found[0] if found else None


def _array(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = file[key]
    except (
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        words = " ".join(str(error).split())
        if "allow_pickle" in words:
            raise DataError(
                f"{path} holds {key} as pickled objects, which are not read, as they "
                "can run any code; expected a plain array. Save an array of one shape "
                "and of integers (class_names: of texts, dtype=str)."
            ) from None
        raise DataError(
            f"{path} is damaged: {key} cannot be read ({type(error).__name__}: "
            f"{words}). Save the file again."
        ) from None
    if not isinstance(array, np.ndarray):  # numpy gives what is not an array as bytes
        raise DataError(
            f"{path} holds {key}, which is no array. Save it with numpy.savez."
        )
    return array


def _as_images(path: Path, part: str, images: np.ndarray) -> np.ndarray:
    """Check images, and add the axis of channels where there is none."""
    if images.dtype != np.uint8:
        mend = "Convert it with images.astype(numpy.uint8) if its values are 0 to 255."
        if images.dtype.kind == "f":
            mend = (
                "If the values are 0 to 1, save (255 * images).round().astype("
                "numpy.uint8); if 0 to 255, images.round().astype(numpy.uint8)."
            )
        raise DataError(
            f"{path} holds {part} of dtype {images.dtype}, expected uint8 from 0 to "
            f"255. {mend}"
        )
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{path} holds {part} of shape {images.shape}, expected [N, H, W, C] or "
            "[N, H, W] with at least one image and one pixel. Reshape it before saving."
        )
    if images.ndim == 3:
        return images[..., None]
    if has_channels_first(images.shape):
        raise DataError(
            f"{path} holds {part} of shape {images.shape}, which looks like [N, C, H, "
            "W]; expected [N, H, W, C]. Save numpy.moveaxis(images, 1, -1)."
        )
    return images


def _count_classes(path: Path, labels: np.ndarray) -> tuple[str, ...]:
    """Return the numbers of the classes as their names."""
    present = np.unique(labels)
    count = len(present)
    if count < 2 or present[-1] != count - 1:
        listed = ", ".join(str(label) for label in present[:5])
        raise DataError(
            f"{path} holds {count:,} different train_labels, from {present[0]} to "
            f"{present[-1]} ({listed}{', ...' if count > 5 else ''}); expected each "
            "class from 0 to K - 1 and at least 2. Number them so, with "
            "numpy.unique(labels, return_inverse=True)[1], or save class_names, too."
        )
    return tuple(str(label) for label in range(count))


def _check_class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        raise DataError(
            f"{path} holds class_names of dtype {names.dtype} and shape {names.shape}, "
            "expected at least 2 texts. Save numpy.array([...], dtype=str)."
        )
    return tuple(str(name) for name in names)


def _check_range(path: Path, part: str, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{path} holds the label {labels[wrong[0]]} at position {wrong[0]:,} of "
            f"{part} ({wrong.size:,} such), expected 0 to {classes - 1}, by the number "
            "of class_names or else of classes in train_labels. Number the classes "
            "from 0, or leave out such examples."
        )


def _as_split(images: np.ndarray, labels: np.ndarray) -> Split:
    split = Split(np.ascontiguousarray(images), labels.astype(np.int32, order="C"))
    for array in split:
        array.setflags(write=False)
    return split
