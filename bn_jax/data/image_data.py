"""What every source of images yields, and the error that every source raises."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["tfds", "idx", "sample"]  # of source


class DataError(ValueError):
    """Data that is missing, damaged or not what it should be.

    The message names the file or folder, what was found there, what was expected, and
    what to do.
    """


class DataNotFoundError(DataError):
    """A data set of which nothing is at hand, and which could not be fetched.

    Attributes:
        reason: What was looked for and why it failed, without the mend.
    """

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"{reason} {mend}")
        self.reason = reason


class Split(NamedTuple):
    """Images with their labels; C-contiguous, read-only, perhaps memory-mapped."""

    images: np.ndarray  # shape=[N, H, W, C], dtype=uint8
    labels: np.ndarray  # shape=[N], dtype=int32


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A training and a test set of labelled images, and where they came from."""

    name: str  # of the set that was loaded, never "auto"
    train: Split
    test: Split
    class_names: tuple[str, ...]
    kind: Kind
    source: str  # one short phrase for logs and results
    fallback_reason: str | None = None  # why "auto" took the sample

    def with_train_examples(self, count: int) -> "ImageData":
        """Return the data with the first `count` training examples; 0 for all.

        Raises:
          DataError: if there are fewer.
        """
        present = len(self.train.labels)
        if count in (0, present):
            return self
        if count > present:
            raise DataError(
                f"train_examples={count} of {self.source}, which has {present}; give "
                f"at most {present}, or 0 for all"
            )
        train = Split(self.train.images[:count], self.train.labels[:count])
        source = f"{self.source}, the first {count:,} for training"
        return dataclasses.replace(self, train=train, source=source)
