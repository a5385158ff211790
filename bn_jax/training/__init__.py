"""Training: a pure step, an epoch in one scan, and what a run writes to disk."""

from bn_jax import extras

extras.need("train", "flax", "optax")
