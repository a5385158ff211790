"""What every source of images yields, and the error that every source raises."""

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

# Of source: a prepared TFDS set, the set's own files as its authors publish them, a
# user's npz file, the embedded sample.
Kind = Literal["tfds", "files", "npz", "sample"]

_VALUES_PER_CHUNK = 1 << 22  # bounds the memory of the squares to 8 MiB


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
    """Labelled images for training and testing, and where they came from."""

    name: str  # of the set that was loaded, never "auto"
    train: Split
    test: Split
    class_names: tuple[str, ...]
    kind: Kind
    source: str  # one short phrase for logs and results
    fallback_reason: str | None = None  # why "auto" took the sample
    validation: Split | None = None  # set aside from the training examples

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def with_train_examples(self, count: int) -> "ImageData":
        """Return the data with the first `count` training examples; 0 for all.

        Call `with_validation` before: the validation examples are then the same for
        every `count`, and so are the first training examples.

        Raises:
          DataError: if there are fewer, or `count` is negative.
        """
        present = len(self.train.labels)
        if count in (0, present):
            return self
        if not 0 < count <= present:
            raise DataError(
                f"train_examples={count} of {self.source}, which has {present}; give "
                f"at most {present}, or 0 for all"
            )
        train = Split(self.train.images[:count], self.train.labels[:count])
        source = f"{self.source}, the first {count:,} for training"
        return dataclasses.replace(self, train=train, source=source)

    def with_validation(self, count: int) -> "ImageData":
        """Return the data with the last `count` training examples for validation.

        They are taken from the end, without shuffling: the split depends on no seed,
        and the training examples that remain are the same first ones as without
        validation. In a set whose examples are sorted by class the last ones are of one
        class; such a split is refused where it takes a class from training.

        Args:
          count: How many to set aside; 0 for none.

        Raises:
          DataError: If `count` is negative, if examples were already set aside, or if
            no training example, or none of some class, would remain.
        """
        if count == 0:
            return self
        present = len(self.train.labels)
        if self.validation is not None:
            raise DataError(
                f"validation={count} of {self.source}, which has "
                f"{len(self.validation.labels)} validation examples already; set them "
                "aside once"
            )
        if not 0 < count < present:
            raise DataError(
                f"validation={count} of {self.source}, which has {present} training "
                f"examples; give at most {present - 1}, or 0 for none"
            )
        train, validation = (
            Split(self.train.images[part], self.train.labels[part])
            for part in (slice(present - count), slice(present - count, None))
        )
        lost = np.setdiff1d(validation.labels, train.labels)
        if lost.size:
            raise DataError(
                f"validation={count} of {self.source} takes all training examples of "
                f"class {lost[0]} ({self.class_names[lost[0]]}), as the last {count} "
                "are set aside; expected some of each class to remain. Shuffle the "
                "training examples of the file once, or give fewer"
            )
        source = f"{self.source}, the last {count:,} of training for validation"
        return dataclasses.replace(
            self, train=train, validation=validation, source=source
        )


def channel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel of the images.

    Sums are integers, so the mean is rounded once and the deviation twice, however the
    images are stored. Memory-mapped images are read in chunks.

    Args:
        split: The images, usually those for training, uint8 `[N, H, W, C]`; labels are
            not read.

    Returns:
        The mean and the biased standard deviation, on the scale 0 to 255, shape=[C],
        dtype=float64.

    Raises:
        DataError: If the images are of another shape or dtype, or a channel is
            constant. No divisor is right for it: training would
            see zeros, and a test image that differs would be scaled by chance.

    Examples:
        >>> import numpy as np
        >>> images = np.array([0, 2], np.uint8).reshape(2, 1, 1, 1)
        >>> mean, deviation = channel_statistics(Split(images, labels=np.zeros(2)))
        >>> mean.tolist(), deviation.tolist()
        ([1.0], [1.0])
    """
    images = split.images
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise DataError(
            f"images of shape {list(images.shape)} and dtype {images.dtype}, expected "
            "at least one, uint8 [N, H, W, C]. Give them as bytes, before any scaling"
        )
    height, width, channels = images.shape[1:]
    per_image = height * width * channels
    step = max(1, _VALUES_PER_CHUNK // per_image)
    sums, squares = np.zeros((2, per_image), np.int64)
    for start in range(0, len(images), step):
        chunk = images[start : start + step].reshape(-1, per_image)
        sums += chunk.sum(axis=0, dtype=np.int64)
        squares += np.square(chunk, dtype=np.uint16).sum(axis=0, dtype=np.int64)
    n = len(images) * height * width
    means, deviations = [], []
    for channel in range(channels):
        # Python's integers do not overflow, and their quotients are rounded once.
        total = int(sums[channel::channels].sum())
        n_squared_var = n * int(squares[channel::channels].sum()) - total**2
        if n_squared_var == 0:
            raise DataError(
                f"channel {channel} is {total // n} in each of the {len(images):,} "
                "images, expected values that vary, as each channel is divided by its "
                "standard deviation. Leave the channel out, or scale the inputs in "
                "another way"
            )
        means.append(total / n)
        deviations.append(math.sqrt(n_squared_var / n**2))
    return np.array(means), np.array(deviations)
