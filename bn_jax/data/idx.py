"""A strict reader of the four IDX files of an MNIST-like set, gzipped or plain.

An IDX file is a magic number (two zero bytes, a type code, the number of dimensions),
the dimensions as big-endian uint32, and the values (Y. LeCun,
http://yann.lecun.com/exdb/mnist/). Only unsigned bytes are read here, nothing is
written.
"""

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import numpy as np

from bn_jax.data.checks import check_values
from bn_jax.data.image_data import DataError, Split
from bn_jax.data.spec import PARTS, DatasetSpec, Part, split_of

STEMS: dict[Part, str] = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_MEND = "Delete the file and fetch it again."


def urls(folder: str) -> dict[str, str]:
    """Return the address of the gzipped file of each part.

    Args:
        folder: The address of the folder that holds them; ends in "/".
    """
    return {part: f"{folder}{STEMS[part]}.gz" for part in PARTS}


def find(folder: Path, spec: DatasetSpec) -> dict[str, Path]:
    """Find the four IDX files in `folder`.

    Args:
        folder: Holds the files under their usual names, with or without `.gz`, with
            `-idx3-ubyte` or `.idx3-ubyte`.
        spec: The set; all have the same names of files.

    Returns:
        The path of each part.

    Raises:
        DataError: If `folder` is not a folder, or lacks files; all of them are named.
    """
    del spec
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; expected a folder with the four IDX files "
            f"{_names(PARTS)}. Give the folder that holds them."
        )
    found: dict[str, Path] = {}
    for part, stem in STEMS.items():
        for spelling in (stem, stem.replace("-idx", ".idx")):
            for path in (folder / f"{spelling}.gz", folder / spelling):
                if part not in found and path.is_file():
                    found[part] = path
    missing = [part for part in PARTS if part not in found]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the 4 IDX files: {_names(missing)}. "
            "Put them there, gzipped or plain, or give another folder."
        )
    return found


def read(paths: Mapping[str, Path], spec: DatasetSpec) -> tuple[Split, Split]:
    """Read and check the four IDX files of a set.

    Args:
        paths: The file of each part, as `find` gives them.
        spec: What the files should hold.

    Returns:
        The training and the test split.

    Raises:
        DataError: If a file cannot be read or does not hold what `spec` says.
    """
    train_images, train_labels, test_images, test_labels = (
        _read_part(paths[part], part, spec) for part in PARTS
    )
    return (
        Split(train_images, _as_labels(train_labels)),
        Split(test_images, _as_labels(test_labels)),
    )


def _names(parts: list[Part] | tuple[Part, ...]) -> str:
    return ", ".join(f"{STEMS[part]}[.gz]" for part in parts)


def _as_labels(values: np.ndarray) -> np.ndarray:
    labels = values.astype(np.int32)
    labels.setflags(write=False)
    return labels


def _read_part(path: Path, part: Part, spec: DatasetSpec) -> np.ndarray:
    """Read one file into its uint8 array, shaped as `spec` says."""
    with _opened(path) as stream:
        dims = _read_header(path, part, stream)
        _check_dims(path, part, dims, spec)
        declared = math.prod(dims)
        # One more, where gzip has its checksum; not all that a few bytes unpack to.
        content = _aligned_bytes(declared + 1)
        length = _read_into(content, stream)
    _check_length(path, dims, length)
    values = content[:declared]
    values.setflags(write=False)
    check_values(path, part, values, spec, mend=_MEND)
    return values.reshape(spec.shape(part))


def _aligned_bytes(size: int) -> np.ndarray:
    """Return an array of bytes that JAX takes to a CPU's devices without a copy."""
    alignment = 64  # of the arrays that XLA computes with
    content = np.empty(size + alignment, np.uint8)
    first = -content.ctypes.data % alignment
    return content[first : first + size]


def _read_into(content: np.ndarray, stream: IO[bytes]) -> int:
    """Read until an array of bytes is full or the stream ends; return the length."""
    view, length = content.data, 0
    while read := stream.readinto(view[length:]):  # type: ignore[attr-defined]
        length += read
    return length


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacking it if it is gzipped."""
    is_gzip = False
    try:
        # The content tells gzip, not the name: browsers unpack files and keep ".gz".
        with open(path, "rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        with gzip.open(path) if is_gzip else open(path, "rb") as stream:
            yield cast(IO[bytes], stream)
    except (EOFError, OSError, zlib.error) as error:
        if is_gzip:
            raise DataError(
                f"{path} is a truncated or damaged gzip file of "
                f"{path.stat().st_size:,} bytes: {error}. {_MEND}"
            ) from None
        words = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{path} cannot be read: {words}. Check its permissions."
        ) from None


def _read_header(path: Path, part: Part, stream: IO[bytes]) -> tuple[int, ...]:
    """Return the dimensions that the header declares."""
    ndim = 3 if part.endswith("images") else 1
    offset = 4 + 4 * ndim
    content = stream.read(offset)
    expected = bytes((0, 0, _UNSIGNED_BYTE, ndim))
    found = content[:4]
    if found != expected:
        kinds = {3: "images", 1: "labels"}
        other = 4 - ndim
        if found == bytes((0, 0, _UNSIGNED_BYTE, other)):
            raise DataError(
                f"{path} holds {kinds[other]}, but its name says {kinds[ndim]}: were "
                "the files swapped? Give each file the name of its content."
            )
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes in {ndim} dimension(s): its "
            f"magic number is 0x{found.hex()}, expected 0x{expected.hex()}. {_MEND}"
        )
    if len(content) < offset:
        raise DataError(
            f"{path} is truncated: it holds {len(content)} bytes, expected a header of "
            f"{offset} bytes and the values. {_MEND}"
        )
    return struct.unpack(f">{ndim}I", content[4:])


def _check_length(path: Path, dims: tuple[int, ...], length: int) -> None:
    declared = math.prod(dims)
    if length == declared:
        return
    problem, held = "is truncated", f"{length:,}"
    if length > declared:
        problem, held = "has trailing bytes", "more"
    raise DataError(
        f"{path} {problem}: its header declares {_times(dims)} = {declared:,} bytes of "
        f"values, and it holds {held}. {_MEND}"
    )


def _check_dims(
    path: Path, part: Part, dims: tuple[int, ...], spec: DatasetSpec
) -> None:
    height, width, _ = spec.image_shape
    rest = (height, width) if part.endswith("images") else ()
    expected = (spec.sizes[split_of(part)], *rest)
    if dims == expected:
        return
    other = spec.sizes["test" if split_of(part) == "train" else "train"]
    mend = (
        "This is the size of the other split: were the training and test files "
        "swapped? Give each file the name of its content."
        if dims == (other, *rest)
        else f"Is this {spec.title}? Give the folder of {spec.title}'s files."
    )
    raise DataError(
        f"{path} holds {_times(dims)} values, expected {_times(expected)} for "
        f"{spec.title}. {mend}"
    )


def _times(dims: tuple[int, ...]) -> str:
    return " x ".join(f"{dim:,}" for dim in dims)
