"""Prepare and read image sets in TFDS's own layout, without TensorFlow.

The only file that imports tensorflow_datasets; import it where it is needed, not at the
top of a module, so that IDX files, cached arrays and the sample load without TFDS.

TFDS's own builders of these sets read and encode images by TensorFlow. Ours yields
ready-made PNG bytes and writes array_record, which need none of it. Name, version,
features and the keys of the examples are the same, so each reads what the other wrote
(theirs as long as it is array_record). Only the training and the test split are
written and read; others, such as the extra digits of SVHN, are left alone.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import hashing

from bn_jax.data.checks import check_values
from bn_jax.data.image_data import DataError, Split
from bn_jax.data.spec import PARTS, DatasetSpec, SplitName

_FILE_FORMAT = "array_record"
_RECORDS_PER_READ = 4096  # bounds the memory of undecoded records to a few MiB


class DownloadError(Exception):
    """TFDS's download failed; the message is one line."""


# Registered, the names would clash with TFDS's own builders.
class SpecBuilder(  # type: ignore[call-arg]  # TFDS is untyped
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Builds one set of the table from its published files, given or downloaded.

    Attributes:
        spec: The set to build.
        paths: The published files, as `spec.find` gives them, or None to download them.
    """

    VERSION = None  # of the instance, from its spec

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        data_dir: Path,
        paths: Mapping[str, Path] | None = None,
    ) -> None:
        self.spec = spec
        self.paths = paths
        self.name = spec.name
        self.VERSION = tfds.core.Version(spec.version)
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.spec.description,
            homepage=self.spec.homepage,
            features=tfds.features.FeaturesDict(_features(self.spec)),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[SplitName, Iterator[tuple[int, dict[str, Any]]]]:
        paths = self.paths
        if paths is None:
            paths = _download(dl_manager, self.spec)
        train, test = self.spec.read(paths, self.spec)
        return {
            "train": self._generate_examples("train", train),
            "test": self._generate_examples("test", test),
        }

    def _generate_examples(
        self, name: SplitName, split: Split
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        spec = self.spec
        superclasses = spec.superclasses or {}
        coarse_of = {
            class_name: coarse
            for coarse, class_names in enumerate(superclasses.values())
            for class_name in class_names
        }
        # The keys are TFDS's: they decide the order of the records.
        for key, (image, label) in enumerate(zip(*split, strict=True)):
            example = {"image": _as_png(image), "label": int(label)}
            if spec.id_digits is not None:
                example["id"] = f"{name}_{key:0{spec.id_digits}}"
            if superclasses:
                example["coarse_label"] = coarse_of[spec.class_names[label]]
            yield key, example


def _features(spec: DatasetSpec) -> dict[str, Any]:
    """Return the features that TFDS's own builder of the set has."""
    features = {
        "image": tfds.features.Image(shape=spec.image_shape),
        "label": tfds.features.ClassLabel(names=spec.class_names),
    }
    if spec.id_digits is not None:
        features["id"] = tfds.features.Text()
    if spec.superclasses is not None:
        features["coarse_label"] = tfds.features.ClassLabel(
            names=list(spec.superclasses)
        )
    return features


def prepare(
    spec: DatasetSpec, *, data_dir: Path, paths: Mapping[str, Path] | None = None
) -> None:
    """Write a set in TFDS's layout below `data_dir`.

    Args:
        spec: The set to write.
        data_dir: TFDS's root folder; made where it does not exist.
        paths: The published files, as `spec.find` gives them; None downloads them by
            TFDS's download manager into `<data_dir>/downloads`.

    Raises:
        DataError: If the source is damaged, or `data_dir` cannot be written.
        DownloadError: If there were no paths and the download failed.
    """
    try:
        builder = SpecBuilder(spec, data_dir=data_dir, paths=paths)
        builder.download_and_prepare(
            file_format=_FILE_FORMAT,
            # TFDS's bucket holds tfrecord, which only TensorFlow reads.
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except OSError as error:
        # TFDS ends by renaming its unfinished folder, which fails where another process
        # has finished the same set in the meantime.
        if (data_dir / spec.name / spec.version / "dataset_info.json").exists():
            return
        raise DataError(
            f"{spec.title} cannot be prepared in {data_dir}: {error}. Give another "
            "data_dir, one that can be written."
        ) from None


def read(prepared: Path, spec: DatasetSpec) -> tuple[Split, Split]:
    """Read and check a set in TFDS's layout, written by ours or by TFDS's builder.

    Args:
        prepared: The folder that holds dataset_info.json.
        spec: What the set should be.

    Returns:
        The training and the test split, in the order of the published files.

    Raises:
        DataError: If the records are damaged, not what `spec` says, or not
            array_record.
    """
    mend = f"Delete the folder {prepared} and prepare the set again."
    try:
        builder = tfds.builder_from_directory(prepared)
        found_format = builder.info.file_format.value
        splits = builder.info.splits
        sizes = {name: splits[name].num_examples for name in spec.sizes}
        features = builder.info.features
        image_shape, classes = features["image"].shape, features["label"].num_classes
    except Exception as error:  # whatever TFDS raises on JSON that it cannot take
        raise DataError(
            f"{prepared} is not a TFDS set of images and labels "
            f"({type(error).__name__}: {error}). {mend}"
        ) from error
    if found_format != _FILE_FORMAT:
        raise DataError(
            f"{prepared} was prepared as {found_format}, which needs TensorFlow; "
            f"expected {_FILE_FORMAT}. Give another data_dir or the {spec.files} "
            "as data_files, or delete the folder and prepare the set again."
        )
    found = (sizes, image_shape, classes)
    expected = (dict(spec.sizes), spec.image_shape, len(spec.class_names))
    if found != expected:
        raise DataError(
            f"{prepared} holds splits, image shape and number of classes {found}, "
            f"expected {expected}. {mend}"
        )
    train, test = (_read_split(builder, prepared, name, spec) for name in spec.sizes)
    for part, array in zip(PARTS, (*train, *test), strict=True):
        check_values(prepared, part, array, spec, mend=mend)
    return train, test


def _read_split(
    builder: tfds.core.DatasetBuilder,
    prepared: Path,
    name: SplitName,
    spec: DatasetSpec,
) -> Split:
    count = spec.sizes[name]
    images = np.empty((count, *spec.image_shape), np.uint8)
    labels = np.empty(count, np.int32)
    order = _stored_order(name, count)
    try:
        # TFDS's own decoder does the same through Pillow, after a warning that OpenCV
        # would be faster.
        source = builder.as_data_source(
            name, decoders={"image": tfds.decode.SkipDecoding()}
        )
        for start in range(0, count, _RECORDS_PER_READ):
            stored = range(start, min(start + _RECORDS_PER_READ, count))
            for i, record in zip(
                stored, source.__getitems__(list(stored)), strict=True
            ):
                images[order[i]] = _from_png(record["image"], spec.image_shape)
                labels[order[i]] = record["label"]
    except Exception as error:  # array_record and protobuf raise what they like
        raise DataError(
            f"{prepared} holds damaged records of the {name} split "
            f"({type(error).__name__}: {error}), expected {count:,} examples. Delete "
            "the folder and prepare the set again."
        ) from error
    for array in (images, labels):
        array.setflags(write=False)
    return Split(images, labels)


def _stored_order(split_name: str, count: int) -> list[int]:
    """Return the key of each stored record.

    TFDS sorts examples by a hash of their key, salted by the split's name. Undoing it
    makes a run independent of where its data came from.
    """
    hasher = hashing.Hasher(split_name)
    return sorted(range(count), key=hasher.hash_key)


def _download(
    dl_manager: tfds.download.DownloadManager, spec: DatasetSpec
) -> dict[str, Path]:
    try:
        with _quiet_retries():
            paths = dl_manager.download(dict(spec.urls))
    except Exception as error:  # of requests, urllib3 or TFDS, by the kind of failure
        text = " ".join(str(error).split())
        raise DownloadError(f"{type(error).__name__}: {text}") from None
    return {key: Path(path) for key, path in paths.items()}


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Keep urllib3 from logging each of ten retries of each of four files."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _as_png(image: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    # Pillow takes a gray image without its axis of channels.
    gray = image.shape[-1] == 1
    Image.fromarray(image[..., 0] if gray else image).save(buffer, format="PNG")
    buffer.seek(0)
    return buffer


def _from_png(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if (height, width) != shape[:2]:  # nothing is unpacked then
            raise ValueError(f"an image of {height} x {width} pixels")
        return np.asarray(image).reshape(shape)
