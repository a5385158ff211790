"""What is asked of a model, ours or the user's: statistics, gaps, uncertainty."""

from bn_jax import extras

extras.need("flax", "flax")
