"""Decoded arrays kept beside a prepared TFDS set, memory-mapped when loaded again.

Reading 70,000 records takes seconds, mapping four files does not. The folder appears
whole or not at all. A damaged file is reported and not replaced: it may be a sign of a
failing disk, and removing the folder is the whole mend.
"""

import json
import os
import shutil
import uuid
import zlib
from pathlib import Path

import numpy as np

from bn_jax.data.checks import check_values
from bn_jax.data.image_data import DataError, Split
from bn_jax.data.spec import PARTS, DatasetSpec

FOLDER = "bn_jax_arrays"

_MANIFEST = "manifest.json"
_FORMAT = 1


def write(prepared: Path, train: Split, test: Split) -> None:
    """Write the arrays into the folder of a prepared set.

    Args:
        prepared: The TFDS folder, such as `<data_dir>/fashion_mnist/3.0.1`.
        train: The training split.
        test: The test split.

    Raises:
        OSError: If the folder cannot be written.
    """
    arrays = dict(zip(PARTS, (*train, *test), strict=True))
    manifest = {
        "format": _FORMAT,
        "arrays": {
            part: {
                "shape": array.shape,
                "dtype": array.dtype.name,
                "crc32": zlib.crc32(array),
            }
            for part, array in arrays.items()
        },
    }
    # A sibling of the target, so that the rename is atomic. tempfile.mkdtemp would make
    # a folder that other users of a shared data_dir cannot read.
    unfinished = prepared / f"{FOLDER}.incomplete-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        for part, array in arrays.items():
            np.save(unfinished / f"{part}.npy", array, allow_pickle=False)
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        try:
            os.rename(unfinished, prepared / FOLDER)
        except OSError:
            # Another process that prepared the same set may have been first.
            if not (prepared / FOLDER).is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(prepared: Path, spec: DatasetSpec) -> tuple[Split, Split] | None:
    """Map the arrays beside a prepared set into memory.

    Args:
        prepared: The TFDS folder, such as `<data_dir>/fashion_mnist/3.0.1`.
        spec: What the arrays should be.

    Returns:
        The training and the test split, or None where no arrays were written yet.

    Raises:
        DataError: If a file is missing or differs from what was written.
    """
    folder = prepared / FOLDER
    if not folder.exists():
        return None
    manifest = _read_manifest(folder)
    try:
        arrays = [
            _map(folder, f"{part}.npy", manifest["arrays"][part]) for part in PARTS
        ]
    except (KeyError, TypeError):
        raise _damaged(folder / _MANIFEST, "lacks an entry for each array") from None
    for part, array in zip(PARTS, arrays, strict=True):
        if array.shape != spec.shape(part):
            raise _damaged(
                folder / f"{part}.npy",
                f"has shape {array.shape}, expected {spec.shape(part)}",
            )
        dtype = np.dtype(np.uint8 if part.endswith("images") else np.int32)
        if array.dtype != dtype:
            raise _damaged(
                folder / f"{part}.npy", f"is of {array.dtype}, expected {dtype}"
            )
        mend = f"Delete the folder {folder}; the next load makes it anew."
        check_values(folder / f"{part}.npy", part, array, spec, mend=mend)
    train_images, train_labels, test_images, test_labels = arrays
    return Split(train_images, train_labels), Split(test_images, test_labels)


def _read_manifest(folder: Path) -> dict:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _damaged(path, f"is not a manifest of format {_FORMAT}")
    return manifest


def _map(folder: Path, file: str, entry: dict) -> np.ndarray:
    path = folder / file
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f"cannot be read ({error})") from None
    found = {"shape": list(array.shape), "dtype": array.dtype.name}
    expected = {key: entry[key] for key in found}
    if found != expected:
        raise _damaged(path, f"holds {found}, its manifest says {expected}")
    crc32 = zlib.crc32(array)
    if crc32 != entry["crc32"]:
        raise _damaged(
            path, f"has crc32 {crc32:08x}, its manifest says {entry['crc32']:08x}"
        )
    return array


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is damaged: it {problem}. Delete the folder {path.parent}; the next "
        "load makes it anew from the records beside it."
    )
