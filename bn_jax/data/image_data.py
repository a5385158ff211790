"""What every source of images yields, and the error that every source raises."""

import dataclasses
import math
import zlib
from typing import Literal, NamedTuple

import numpy as np

# Of source: a prepared TFDS set, the set's own files as its authors publish them, a
# user's npz file, the embedded sample, a user's arrays.
Kind = Literal["tfds", "files", "npz", "sample", "arrays"]

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
    """Images with their labels; C-contiguous, read-only, perhaps memory-mapped.

    A user's own may be of any integer type; `ImageData` checks and converts them. Of
    one-hot labels give `labels.argmax(-1)`.
    """

    images: np.ndarray  # shape=[N, H, W, C] (a user's own also [N, H, W]), dtype=uint8
    labels: np.ndarray  # shape=[N] (a user's own also [N, 1]), dtype=int32


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """Labelled images for training and testing, and where they came from.

    Of arrays of your own, `train` and `test` are enough: classes are then numbered, and
    a checksum in name and source tells them from others, so that a run of them is not
    resumed with other images.

    Raises:
        DataError: If arrays of your own are not images as bytes, of one shape, with an
            integer label each (of one-hot labels give `labels.argmax(-1)`); or if a
            class has no name or, where classes are numbered, no training example.

    Examples:
        >>> import numpy as np
        >>> images = np.zeros((4, 8, 8, 1), np.uint8)
        >>> split = Split(images, labels=np.array([0, 1, 2, 1]))
        >>> data = ImageData(train=split, test=split)
        >>> data.class_names, data.source
        (('0', '1', '2'), '4 + 4 images, arrays, crc32 ...')
    """

    train: Split
    test: Split
    name: str = ""  # of the set that was loaded, never "auto"
    class_names: tuple[str, ...] = ()
    kind: Kind = "arrays"
    source: str = ""  # one short phrase for logs and results
    fallback_reason: str | None = None  # why "auto" took the sample
    validation: Split | None = None  # set aside from the training examples

    def __post_init__(self) -> None:
        """Check a user's own arrays, and name what was not named."""
        if self.kind != "arrays":
            return
        given = {"train": self.train, "test": self.test, "validation": self.validation}
        splits = {k: _checked(k, v) for k, v in given.items() if v is not None}
        shapes = {k: split.images.shape[1:] for k, split in splits.items()}
        if len(set(shapes.values())) > 1:
            raise DataError(
                f"images of different shapes: {shapes}, expected one shape. Resize or "
                "crop them"
            )
        names = tuple(self.class_names) or _numbered(splits["train"].labels)
        for name, split in splits.items():
            _check_range(name, split.labels, len(names))
        checked = {k: _as_stored(split) for k, split in splits.items()}
        values: dict[str, object] = {**checked, "class_names": names}
        if not (self.name and self.source):
            crc32 = 0
            for array in (array for split in checked.values() for array in split):
                crc32 = zlib.crc32(array.data, crc32)
            sizes = " + ".join(f"{len(split.labels):,}" for split in checked.values())
            what = f"arrays, crc32 {crc32:08x}"
            values["name"] = self.name or what
            values["source"] = self.source or f"{sizes} images, {what}"
        for name, value in values.items():
            object.__setattr__(self, name, value)

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


def has_channels_first(shape: tuple[int, ...]) -> bool:
    """Return whether a shape looks like `[N, C, H, W]`, not `[N, H, W, C]`."""
    _, first, height, width = shape
    return (first == 3 and min(height, width) > 4) or (
        first == 1 and height == width > 4
    )


def as_labels(holder: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Check the labels of `count` images, and drop a second axis of size 1.

    Args:
        holder: What has them, such as "train has labels": how a message begins.
        labels: Integers, shape=[N] or [N, 1].
        count: How many there should be.

    Returns:
        The labels, shape=[N], of the dtype they came in.

    Raises:
        DataError: If they are of another shape, or no integers.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        mend = "Give one label for each image."
        if labels.ndim == 2 and len(labels) == count:
            mend = "If each row is one-hot, give labels.argmax(-1)."
        raise DataError(
            f"{holder} of shape {labels.shape}, expected ({count},) or ({count}, 1) "
            f"for its {count:,} images. {mend}"
        )
    if labels.dtype.kind not in "iu":
        mend = "Number the classes and give labels.astype(numpy.int64)."
        if labels.dtype.kind in "US":
            mend = (
                "Number the classes: names, numbers = numpy.unique(labels, "
                "return_inverse=True); give the numbers as labels, and the names as "
                "class_names."
            )
        raise DataError(
            f"{holder} of dtype {labels.dtype}, expected integers from 0. {mend}"
        )
    return labels


def _checked(name: str, split: Split) -> Split:
    """Return images `[N, H, W, C]` and labels `[N]` of a user's own, as they came.

    Raises:
        DataError: If they are not bytes, or not integers, of such shapes.
    """
    if not isinstance(split, tuple) or len(split) != 2:
        raise DataError(
            f"{name} is of type {type(split).__name__}, expected Split(images, labels)"
        )
    images, labels = (np.asarray(array) for array in split)
    if images.dtype != np.uint8:
        mend = "Give images.astype(numpy.uint8) if the values are 0 to 255."
        if images.dtype.kind == "f":
            mend = (
                "If the values are 0 to 1, give (255 * images).round().astype("
                "numpy.uint8); if 0 to 255, images.round().astype(numpy.uint8)."
            )
        raise DataError(
            f"{name} has images of dtype {images.dtype}, expected uint8 from 0 to 255. "
            f"{mend}"
        )
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{name} has images of shape {images.shape}, expected [N, H, W, C] or "
            "[N, H, W] with at least one image and one pixel. Reshape them"
        )
    if images.ndim == 3:
        images = images[..., None]
    elif has_channels_first(images.shape):
        raise DataError(
            f"{name} has images of shape {images.shape}, which looks like [N, C, H, "
            "W], expected [N, H, W, C]. Give numpy.moveaxis(images, 1, -1)"
        )
    return Split(images, as_labels(f"{name} has labels", labels, len(images)))


def _numbered(labels: np.ndarray) -> tuple[str, ...]:
    """Return the numbers of the classes as their names.

    Raises:
        DataError: If training labels are not each number from 0 to K - 1.
    """
    present = np.unique(labels)
    count = len(present)
    if count < 2 or present[-1] != count - 1:
        listed = ", ".join(str(label) for label in present[:5])
        raise DataError(
            f"train has {count:,} different labels, from {present[0]} to {present[-1]} "
            f"({listed}{', ...' if count > 5 else ''}), expected each class from 0 to "
            "K - 1 and at least 2. Number them so, with numpy.unique(labels, "
            "return_inverse=True)[1], or give class_names"
        )
    return tuple(map(str, present.tolist()))


def _check_range(name: str, labels: np.ndarray, classes: int) -> None:
    """Refuse labels that are no number of a class.

    Raises:
        DataError: Naming the first of them.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{name} has the label {labels[wrong[0]]} at position {wrong[0]:,} "
            f"({wrong.size:,} such), expected 0 to {classes - 1}, by the class names "
            "or else the labels of the training examples. Number the classes from 0, "
            "or leave such examples out"
        )


def _as_stored(split: Split) -> Split:
    """Return C-contiguous, read-only arrays, of labels in int32."""
    images = np.ascontiguousarray(split.images).view()
    labels = split.labels.astype(np.int32, order="C")
    for array in (images, labels):
        array.setflags(write=False)
    return Split(images, labels)


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
