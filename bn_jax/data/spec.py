"""The table of image sets: names, sizes, classes, addresses and checksums.

Constants only; the readers compare what they find against them.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal, get_args

SplitName = Literal["train", "test"]
Part = Literal["train_images", "train_labels", "test_images", "test_labels"]
PARTS: tuple[Part, ...] = get_args(Part)


def split_of(part: Part) -> SplitName:
    """Return the split that `part` belongs to."""
    return "train" if part.startswith("train") else "test"


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One image set as TFDS knows it."""

    name: str  # in TFDS
    title: str  # for people
    version: str  # in TFDS
    description: str
    homepage: str
    class_names: tuple[str, ...]
    url: str  # of the folder that holds the four gzipped IDX files; ends in "/"
    system_folder: str | None = None  # where a system package puts the IDX files
    crc32: Mapping[Part, int] | None = None  # of the decoded uint8 content, in order
    sizes: Mapping[SplitName, int] = dataclasses.field(
        default_factory=lambda: types.MappingProxyType(
            {"train": 60_000, "test": 10_000}
        )
    )
    image_shape: tuple[int, int, int] = (28, 28, 1)

    def shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape of the decoded array of `part`."""
        count = self.sizes[split_of(part)]
        return (count, *self.image_shape) if part.endswith("images") else (count,)


# Names, versions, class names and addresses are those of TFDS 4.9.10
# (tensorflow_datasets/image_classification/mnist.py), so that a set prepared by either
# is read by the other. The sha256 sums of the files at these addresses are TFDS's own
# (its url_checksums folder) and its download manager verifies them.
SPECS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="fashion_mnist",
            title="Fashion-MNIST",
            version="3.0.1",
            description="Zalando's article images, 28x28 grayscale, 10 classes.",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            class_names=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            system_folder="/usr/share/datasets/fashion-mnist",
            # Computed from Debian's dataset-fashion-mnist 0.0~git20200523.55506a9-1
            # (zlib.crc32 of each file's content past its header). Debian rewrote the
            # gzip headers; with the original file name and time (2017-08-31, 10:50:06
            # for training, 10:50:27 for test) put back, all four files have the md5
            # sums that Zalando's README publishes, so the content is Zalando's.
            crc32=types.MappingProxyType(
                {
                    "train_images": 0xAE65DCCD,
                    "train_labels": 0x2ED6E46A,
                    "test_images": 0x12728439,
                    "test_labels": 0x242BC73F,
                }
            ),
        ),
        DatasetSpec(
            name="mnist",
            title="MNIST",
            version="3.0.1",
            description="Handwritten digits, 28x28 grayscale, 10 classes.",
            homepage="http://yann.lecun.com/exdb/mnist/",
            class_names=tuple("0123456789"),
            url="https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        DatasetSpec(
            name="kmnist",
            title="Kuzushiji-MNIST",
            version="3.0.1",
            description="Cursive hiragana, 28x28 grayscale, 10 classes.",
            homepage="http://codh.rois.ac.jp/kmnist/index.html.en",
            class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
            url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
    )
}
