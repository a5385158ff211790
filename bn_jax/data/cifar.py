"""CIFAR-10 and CIFAR-100, from the archives of their authors.

Each is published in two forms that are read here, from the archive or the folder that
it unpacks to. The binary version is a row of bytes for each image: the label (of
CIFAR-100 the superclass, then the class), then 32x32 values of red, of green and of
blue. The Python version holds the same in pickles (A. Krizhevsky, Learning multiple
layers of features from tiny images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html). Nothing is unpacked to disk.

Names, versions, features and addresses are those of TFDS 4.9.10
(tensorflow_datasets/image_classification/cifar.py), class names those of the files
batches.meta.txt and fine_label_names.txt in the archives.
"""

import functools
import gzip
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bn_jax.data import plain_pickle
from bn_jax.data.checks import check_values
from bn_jax.data.image_data import DataError, Split
from bn_jax.data.spec import PARTS, DatasetSpec, SplitName

_MAX_REST = 1024  # megabytes after the last file of an archive
_GZIP_MAGIC = b"\x1f\x8b"
_MEND = "Delete it and fetch it again."


class _Version(NamedTuple):
    """One form in which a set is published."""

    archive: str
    folder: str  # that the archive unpacks to
    files: Mapping[SplitName, tuple[str, ...]]  # of each split, in order
    # parse(content, number of images, values of each) -> (values [N, values], labels);
    # a ValueError says in words what is wrong.
    parse: Callable[[bytes, int, int], tuple[np.ndarray, np.ndarray]]

    def names(self) -> tuple[str, ...]:
        """Return the names of all files."""
        return self.files["train"] + self.files["test"]


def _parse_binary(
    content: bytes, count: int, values: int, *, label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    row = label_bytes + values
    if len(content) != count * row:
        raise ValueError(
            f"holds {len(content):,} bytes, expected {count:,} images of {row:,} bytes "
            f"= {count * row:,}"
        )
    rows = np.frombuffer(content, np.uint8).reshape(count, row)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


def _parse_pickle(
    content: bytes, count: int, values: int, *, label_key: bytes
) -> tuple[np.ndarray, np.ndarray]:
    batch = plain_pickle.loads(content)
    images, labels = (
        batch.get(key) if isinstance(batch, dict) else None
        for key in (b"data", label_key)
    )
    if not isinstance(images, np.ndarray) or images.shape != (count, values):
        found = f"of shape {images.shape}" if isinstance(images, np.ndarray) else "none"
        raise ValueError(
            f"holds {found} as its array 'data', expected bytes of shape "
            f"{(count, values)}"
        )
    if (
        not isinstance(labels, list)
        or len(labels) != count
        or not all(type(label) is int and abs(label) < 2**31 for label in labels)
    ):
        raise ValueError(
            f"lacks {label_key.decode()!r}, expected a list of {count:,} integers"
        )
    return images, np.array(labels)


_CIFAR10 = (
    _Version(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        files={
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        parse=functools.partial(_parse_binary, label_bytes=1),
    ),
    _Version(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        files={
            "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test": ("test_batch",),
        },
        parse=functools.partial(_parse_pickle, label_key=b"labels"),
    ),
)
_CIFAR100 = (
    _Version(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        parse=functools.partial(_parse_binary, label_bytes=2),
    ),
    _Version(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        files={"train": ("train",), "test": ("test",)},
        parse=functools.partial(_parse_pickle, label_key=b"fine_labels"),
    ),
)


def _find(
    path: Path, spec: DatasetSpec, *, versions: tuple[_Version, ...]
) -> dict[str, Path]:
    """Find an archive, or a folder with the files of one; `path` may be either."""
    if path.is_file():
        return {"archive": path}
    for version in versions:
        for folder in (path / version.folder, path):
            if any((folder / name).is_file() for name in version.names()):
                return {"archive": folder}
        if (path / version.archive).is_file():
            return {"archive": path / version.archive}
    archives = " or ".join(version.archive for version in versions)
    folders = " or ".join(version.folder for version in versions)
    problem = (
        f"holds no files of {spec.title}" if path.is_dir() else "is no file or folder"
    )
    raise DataError(
        f"{path} {problem}; expected {archives}, or the folder {folders} that it "
        "unpacks to. Put one there, or give another path."
    )


def _read(
    paths: Mapping[str, Path], spec: DatasetSpec, *, versions: tuple[_Version, ...]
) -> tuple[Split, Split]:
    """Read an archive, or a folder with the files of one; the content tells which."""
    path = paths["archive"]
    height, width, channels = spec.image_shape
    splits = {
        name: Split(
            np.empty((count, *spec.image_shape), np.uint8), np.empty(count, np.int32)
        )
        for name, count in spec.sizes.items()
    }
    # Where the images of each file go: the archive has the files in any order.
    places = {
        name: (version, split, i, len(version.files[split]))
        for version in versions
        for split in splits
        for i, name in enumerate(version.files[split])
    }
    found: set[str] = set()
    chosen = None
    # A file has the values of its images, and labels and names of files beside them.
    most = 2 * max(spec.sizes.values()) * math.prod(spec.image_shape) + (1 << 20)
    for name, content in _contents(path, list(places), most):
        version, split, i, parts = places[name]
        chosen = chosen or version
        if version is not chosen:
            continue
        count = spec.sizes[split] // parts
        try:
            values, labels = version.parse(content, count, math.prod(spec.image_shape))
        except ValueError as error:
            raise DataError(f"{name} in {path} {error}. {_MEND}") from None
        rows = slice(i * count, (i + 1) * count)
        planes = values.reshape(count, channels, height, width)
        splits[split].images[rows] = planes.transpose(0, 2, 3, 1)
        splits[split].labels[rows] = labels
        found.add(name)
    expected = (chosen or versions[0]).names()
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}, expected the {len(expected)} files of "
            f"{spec.title}. Give the archive or folder as it is published."
        )
    train, test = splits["train"], splits["test"]
    for part, array in zip(PARTS, (*train, *test), strict=True):
        check_values(path, part, array, spec, mend=_MEND)
        array.setflags(write=False)
    return train, test


def _contents(
    path: Path, names: list[str], max_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each of `names` that a folder or archive holds."""
    try:
        if path.is_dir():
            for name in names:
                if (path / name).is_file():
                    yield name, (path / name).read_bytes()
            return
        with open(path, "rb") as file:
            # The content tells gzip, not the name: browsers unpack files.
            is_gzip = file.read(2) == _GZIP_MAGIC
        with gzip.open(path) if is_gzip else open(path, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if name not in names or not member.isfile():
                        continue
                    if member.size > max_bytes:
                        raise DataError(
                            f"{path} holds {name} of {member.size:,} bytes, expected "
                            f"at most {max_bytes:,}. {_MEND}"
                        )
                    yield name, archive.extractfile(member).read()  # type: ignore[union-attr]
            # To the end, where gzip has its checksum.
            for _ in range(_MAX_REST):
                if not stream.read(1 << 20):
                    return
            raise DataError(f"{path} does not end after its last file. {_MEND}")
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        words = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {words}), expected a "
            f"whole archive. {_MEND}"
        ) from None


_spec = functools.partial(
    DatasetSpec,
    version="3.0.2",
    image_shape=(32, 32, 3),
    sizes={"train": 50_000, "test": 10_000},
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    id_digits=5,
)

CIFAR10 = _spec(
    name="cifar10",
    title="CIFAR-10",
    description="Photographs of animals and vehicles, 32x32 colour, 10 classes.",
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    files="CIFAR files",
    urls={"archive": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"},
    find=functools.partial(_find, versions=_CIFAR10),
    read=functools.partial(_read, versions=_CIFAR10),
)

_SUPERCLASSES = {
    superclass: tuple(class_names.split())
    for superclass, class_names in {
        "aquatic_mammals": "beaver dolphin otter seal whale",
        "fish": "aquarium_fish flatfish ray shark trout",
        "flowers": "orchid poppy rose sunflower tulip",
        "food_containers": "bottle bowl can cup plate",
        "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
        "household_electrical_devices": "clock keyboard lamp telephone television",
        "household_furniture": "bed chair couch table wardrobe",
        "insects": "bee beetle butterfly caterpillar cockroach",
        "large_carnivores": "bear leopard lion tiger wolf",
        "large_man-made_outdoor_things": "bridge castle house road skyscraper",
        "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
        "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
        "medium_mammals": "fox porcupine possum raccoon skunk",
        "non-insect_invertebrates": "crab lobster snail spider worm",
        "people": "baby boy girl man woman",
        "reptiles": "crocodile dinosaur lizard snake turtle",
        "small_mammals": "hamster mouse rabbit shrew squirrel",
        "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
        "vehicles_1": "bicycle bus motorcycle pickup_truck train",
        "vehicles_2": "lawn_mower rocket streetcar tank tractor",
    }.items()
}

CIFAR100 = _spec(
    name="cifar100",
    title="CIFAR-100",
    description="Photographs, 32x32 colour, 100 classes in 20 superclasses.",
    # Classes and superclasses are numbered in the order of the alphabet.
    class_names=tuple(sorted(sum(_SUPERCLASSES.values(), ()))),
    superclasses=_SUPERCLASSES,
    files="CIFAR files",
    urls={"archive": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"},
    find=functools.partial(_find, versions=_CIFAR100),
    read=functools.partial(_read, versions=_CIFAR100),
)
