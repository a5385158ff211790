"""A run on disk: its folder, its checkpoints, and the processes that share it."""

from bn_jax import extras

extras.need("train", "flax", "optax", "orbax", "filelock", "tqdm")

# No name of `__all__`, as the API pages would have it twice.
from bn_jax.runs import sweeps as sweeps
from bn_jax.runs.run import Run, load, train, train_or_load
from bn_jax.runs.sweeps import sweep

__all__ = ["Run", "load", "sweep", "train", "train_or_load"]
