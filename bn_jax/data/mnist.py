"""MNIST and the two sets in its form: Fashion-MNIST and Kuzushiji-MNIST.

Names, versions, class names and addresses are those of TFDS 4.9.10
(tensorflow_datasets/image_classification/mnist.py). The sha256 sums of the files at
these addresses are TFDS's own (its url_checksums folder); its download manager verifies
them.
"""

import functools

from bn_jax.data import idx
from bn_jax.data.spec import DatasetSpec

_spec = functools.partial(
    DatasetSpec,
    version="3.0.1",
    image_shape=(28, 28, 1),
    sizes={"train": 60_000, "test": 10_000},
    files="IDX files",
    find=idx.find,
    read=idx.read,
)

FASHION_MNIST = _spec(
    name="fashion_mnist",
    title="Fashion-MNIST",
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
    urls=idx.urls("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
    system_folder="/usr/share/datasets/fashion-mnist",
    system_package="dataset-fashion-mnist",
    # Computed from Debian's dataset-fashion-mnist 0.0~git20200523.55506a9-1
    # (zlib.crc32 of each file's content past its header). Debian rewrote the gzip
    # headers; with the original file name and time (2017-08-31, 10:50:06 for training,
    # 10:50:27 for test) put back, all four files have the md5 sums that Zalando's
    # README publishes, so the content is Zalando's.
    crc32={
        "train_images": 0xAE65DCCD,
        "train_labels": 0x2ED6E46A,
        "test_images": 0x12728439,
        "test_labels": 0x242BC73F,
    },
)

MNIST = _spec(
    name="mnist",
    title="MNIST",
    description="Handwritten digits, 28x28 grayscale, 10 classes.",
    homepage="http://yann.lecun.com/exdb/mnist/",
    class_names=tuple("0123456789"),
    urls=idx.urls("https://storage.googleapis.com/cvdf-datasets/mnist/"),
    alike=(FASHION_MNIST,),
)

KMNIST = _spec(
    name="kmnist",
    title="Kuzushiji-MNIST",
    description="Cursive hiragana, 28x28 grayscale, 10 classes.",
    homepage="http://codh.rois.ac.jp/kmnist/index.html.en",
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    urls=idx.urls("http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
    alike=(FASHION_MNIST,),
)
