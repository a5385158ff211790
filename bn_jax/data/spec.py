"""What a data set is: sizes, classes, addresses, and who reads its files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from bn_jax.data.image_data import Split

SplitName = Literal["train", "test"]
Part = Literal["train_images", "train_labels", "test_images", "test_labels"]
PARTS: tuple[Part, ...] = get_args(Part)


def split_of(part: Part) -> SplitName:
    """Return the split that `part` belongs to."""
    return "train" if part.startswith("train") else "test"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One image set: as TFDS knows it, and as its authors publish it.

    `find(folder, spec)` gives the paths of the published files in a folder, under the
    keys of `urls`; `read(paths, spec)` gives the training and the test split. Both
    raise DataError. `read` checks what it reads against the spec.
    """

    # As in TFDS, so that a set prepared by it is read by us, and the other way round.
    name: str
    version: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # height, width, channels
    sizes: Mapping[SplitName, int]  # numbers of examples
    description: str
    homepage: str
    id_digits: int | None = None  # of its feature "id", such as train_00042
    superclasses: Mapping[str, tuple[str, ...]] | None = None  # "coarse_label"

    title: str  # for people
    files: str  # what the published files are, such as "IDX files"
    urls: Mapping[str, str]  # addresses of the published files
    find: Callable[[Path, "DatasetSpec"], Mapping[str, Path]]
    read: Callable[[Mapping[str, Path], "DatasetSpec"], tuple[Split, Split]]
    system_folder: str | None = None  # where a system package puts the files
    system_package: str | None = None  # its name
    crc32: Mapping[Part, int] | None = None  # of the decoded uint8 content, in order
    alike: tuple["DatasetSpec", ...] = ()  # other sets of its sizes

    def shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape of the decoded array of `part`."""
        count = self.sizes[split_of(part)]
        return (count, *self.image_shape) if part.endswith("images") else (count,)
