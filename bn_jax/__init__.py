"""Batch normalisation as a pure function of JAX."""

from bn_jax.version import __version__

__all__ = ["__version__"]
