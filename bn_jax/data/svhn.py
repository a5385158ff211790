"""The cropped digits of SVHN, from the MATLAB files of its authors.

`train_32x32.mat` and `test_32x32.mat` hold X, uint8 [32, 32, 3, N], and y, [N, 1], in
which 10 stands for the digit 0 (Y. Netzer et al., Reading digits in natural images with
unsupervised feature learning, 2011; http://ufldl.stanford.edu/housenumbers). The extra
531,131 easier digits are not read.

Name, version, features and addresses are those of TFDS 4.9.10
(tensorflow_datasets/datasets/svhn_cropped).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bn_jax.data.checks import check_values
from bn_jax.data.image_data import DataError, Split
from bn_jax.data.spec import PARTS, DatasetSpec, SplitName

_URL = "http://ufldl.stanford.edu/housenumbers/"
_FILES: dict[SplitName, str] = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
_MEND = "Delete the file and fetch it again."


def _find(folder: Path, spec: DatasetSpec) -> dict[str, Path]:
    paths: dict[str, Path] = {split: folder / name for split, name in _FILES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {' and '.join(missing)}, expected a folder with the "
            f"{spec.files} of {spec.title}. Put them there, or give another folder."
        )
    return paths


def _read(paths: Mapping[str, Path], spec: DatasetSpec) -> tuple[Split, Split]:
    train, test = (_read_split(paths[split], split, spec) for split in _FILES)
    for part, array in zip(PARTS, (*train, *test), strict=True):
        path = paths["train" if part.startswith("train") else "test"]
        check_values(path, part, array, spec, mend=_MEND)
    return train, test


def _read_split(path: Path, split: SplitName, spec: DatasetSpec) -> Split:
    # Of all sets this one alone needs scipy.io.
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        values, digits = content["X"], content["y"]
    except Exception as error:  # a damaged file raises what it likes
        words = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {words}), expected a "
            f"MATLAB file with X and y. {_MEND}"
        ) from None
    count = spec.sizes[split]
    found = (values.dtype.name, values.shape, digits.dtype.kind in "iu", digits.shape)
    if found != ("uint8", (*spec.image_shape, count), True, (count, 1)):
        raise DataError(
            f"{path} holds X, {values.dtype} {values.shape}, and y, {digits.dtype} "
            f"{digits.shape}; expected uint8 {(*spec.image_shape, count)} and integers "
            f"{(count, 1)} for the {split} split of {spec.title}. Give the file as it "
            "is published."
        )
    digits = digits[:, 0]
    wrong = np.flatnonzero((digits < 1) | (digits > 10))
    if wrong.size:
        raise DataError(
            f"{path} holds the digit {digits[wrong[0]]} at position {wrong[0]:,}, "
            f"expected 1 to 9, or 10 for the digit 0. {_MEND}"
        )
    images = np.ascontiguousarray(values.transpose(3, 0, 1, 2))
    labels = (digits % 10).astype(np.int32)
    for array in (images, labels):
        array.setflags(write=False)
    return Split(images, labels)


SVHN_CROPPED = DatasetSpec(
    name="svhn_cropped",
    version="3.1.0",
    class_names=tuple("0123456789"),
    image_shape=(32, 32, 3),
    sizes={"train": 73_257, "test": 26_032},
    description="Digits of house numbers in street views, 32x32 colour, 10 classes.",
    homepage=_URL,
    id_digits=6,
    title="SVHN (cropped)",
    files="MATLAB files",
    urls={split: f"{_URL}{name}" for split, name in _FILES.items()},
    find=_find,
    read=_read,
)
