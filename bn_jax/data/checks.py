"""Checks of decoded content against the table, shared by the readers."""

import zlib
from pathlib import Path

import numpy as np

from bn_jax.data.image_data import DataError
from bn_jax.data.spec import DatasetSpec, Part


def check_values(
    where: Path, part: Part, values: np.ndarray, spec: DatasetSpec, *, mend: str
) -> None:
    """Check the range of labels, and the checksum where the table knows it.

    Args:
        where: The file or folder that `values` were read from, for the message.
        part: Which part of the set they are.
        values: Images or labels, in the order of the IDX files.
        spec: What they should be.
        mend: The last sentence of the message.

    Raises:
        DataError: If they are not what `spec` says.
    """
    if part.endswith("labels"):
        classes = len(spec.class_names)
        wrong = np.flatnonzero((values < 0) | (values >= classes))
        if wrong.size:
            raise DataError(
                f"{where} holds the label {values[wrong[0]]} at position {wrong[0]:,} "
                f"of the {part.replace('_', ' ')} ({wrong.size:,} such), expected "
                f"labels from 0 to {classes - 1}. {mend}"
            )
    if spec.crc32 is None and not spec.alike:
        return
    found = zlib.crc32(values.astype(np.uint8, copy=False).data)
    for other in spec.alike:
        if other.crc32 is not None and found == other.crc32[part]:
            raise DataError(
                f"{where} holds {other.title}'s {part.replace('_', ' ')}, expected "
                f"{spec.title}'s. Give the folder of {spec.title}'s files, or "
                f"the dataset {other.name}."
            )
    if spec.crc32 is None:
        return
    expected = spec.crc32[part]
    if found != expected:
        raise DataError(
            f"{where} does not hold {spec.title}'s {part.replace('_', ' ')}: the crc32 "
            f"of the content is {found:08x}, expected {expected:08x}. {mend}"
        )
