"""Image sets as numpy arrays: Fashion-MNIST, MNIST, KMNIST and an embedded sample.

`load` gives the whole set in memory or memory-mapped; batching, scaling and
augmentation belong to the training loop. Only `tfds_builder`, imported when a TFDS set
has to be made or read for the first time, needs tensorflow_datasets.
"""

from bn_jax.data.image_data import DataError, ImageData, Split
from bn_jax.data.sources import DATASETS, load, prepare

__all__ = ["DATASETS", "DataError", "ImageData", "Split", "load", "prepare"]
