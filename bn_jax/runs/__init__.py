"""A run on disk: its folder, its checkpoints, and the processes that share it."""

from bn_jax.runs.run import Run, load, train
from bn_jax.runs.sweeps import sweep

__all__ = ["Run", "load", "sweep", "train"]
