"""Image sets as numpy arrays: those of the table, a user's own, an embedded sample.

`load` gives the whole set in memory or memory-mapped; batching, scaling and
augmentation belong to the training loop. Only `tfds_builder`, imported when a TFDS set
has to be made or read for the first time, needs tensorflow_datasets.
"""

from bn_jax import extras

extras.need("train", "PIL")

from bn_jax.data.image_data import DataError, ImageData, Split, channel_statistics
from bn_jax.data.sources import DATASETS, check_name, load, prepare

__all__ = [
    "DATASETS",
    "DataError",
    "ImageData",
    "Split",
    "channel_statistics",
    "check_name",
    "load",
    "prepare",
]
