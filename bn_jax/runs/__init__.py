"""A run on disk: its folder, its checkpoints, and the processes that share it."""

from bn_jax import extras

extras.need("train", "flax", "optax", "orbax", "filelock", "tqdm")

from bn_jax.runs import sweeps
from bn_jax.runs.run import Run, load, train, train_or_load
from bn_jax.runs.sweeps import sweep

__all__ = ["Run", "load", "sweep", "sweeps", "train", "train_or_load"]
