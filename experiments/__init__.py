"""Entry points: each file is one experiment, run with `python -m experiments.NAME`."""

from bn_jax import extras

extras.need("train", "absl", "optax", "flax", "matplotlib")
