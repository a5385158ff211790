"""A user's own images and labels, from one npz file.

`numpy.savez(path, train_images=..., train_labels=..., test_images=...,
test_labels=...)` writes such a file; Keras's names (x_train, y_train, x_test, y_test)
do as well, and so do the files of MedMNIST, whose validation images are left aside.
Pickled objects are refused, not read.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bn_jax.data.image_data import DataError, ImageData, Split
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
    class_names: tuple[str, ...] = ()
    if _CLASS_NAMES in arrays:
        class_names = _check_class_names(path, arrays[_CLASS_NAMES])
    try:
        data = ImageData(
            train=Split(arrays["train_images"], arrays["train_labels"]),
            test=Split(arrays["test_images"], arrays["test_labels"]),
            class_names=class_names,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    source = data.source.replace("arrays", f"npz file {path}", 1)
    return dataclasses.replace(data, name=name, kind="npz", source=source)


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


def _check_class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        raise DataError(
            f"{path} holds class_names of dtype {names.dtype} and shape {names.shape}, "
            "expected at least 2 texts. Save numpy.array([...], dtype=str)."
        )
    return tuple(str(name) for name in names)
