"""Training: a pure step, its loop on one device or several, and sweeps."""

from bn_jax import extras

extras.need("train", "flax", "optax")
