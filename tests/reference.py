"""Batch normalisation in float64 NumPy, from the formulas, and data to try it on.

Nothing here calls bn_jax: it is what the tests compare bn_jax with.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Expected(NamedTuple):
    """Moments in float64; mean and var of the shape of the feature axes."""

    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def reduced(rank, feature_axis):
    """Return the axes of an array of `rank` that are not feature axes."""
    kept = np.atleast_1d(feature_axis) % rank
    return tuple(a for a in range(rank) if a not in kept)


def moments(x, weights=None, feature_axis=-1):
    """Return the moments in two passes; `weights` broadcast to x's shape."""
    x = np.asarray(x, np.float64)
    axes = reduced(x.ndim, feature_axis)
    w = np.broadcast_to(1.0 if weights is None else np.float64(weights), x.shape)
    x = np.where(w > 0, x, 0)
    n = w.sum(axes, keepdims=True)
    mean = (w * x).sum(axes, keepdims=True) / n
    var = (w * (x - mean) ** 2).sum(axes, keepdims=True) / n
    return Expected(n.squeeze(axes), mean.squeeze(axes), var.squeeze(axes))


def assert_moments_close(actual, expected, *, rtol=1e-5, atol=1e-6):
    """Compare (count, mean, var); a count shared by the features may be a scalar."""
    actual, expected = (
        dict(zip(("count", "mean", "var"), map(np.float64, m), strict=True))
        for m in (actual, expected)
    )
    assert actual["mean"].shape == actual["var"].shape == expected["mean"].shape
    for m in (actual, expected):
        m["count"] = np.broadcast_to(m["count"], expected["mean"].shape)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def standardised(x, mean, var, feature_axis=-1, epsilon=1e-5):
    """Return (x - mean) / sqrt(var + epsilon)."""
    x = np.asarray(x, np.float64)
    axes = reduced(x.ndim, feature_axis)
    mean, var = (np.expand_dims(np.float64(a), axes) for a in (mean, var))
    return (x - mean) / np.sqrt(var + epsilon)


def batch_norm(x, scale=1.0, bias=0.0, weights=None, feature_axis=-1, epsilon=1e-5):
    """Return the output of training mode and the batch's moments."""
    batch = moments(x, weights, feature_axis)
    axes = reduced(np.ndim(x), feature_axis)
    scale, bias = (
        np.expand_dims(np.broadcast_to(np.float64(a), batch.mean.shape), axes)
        for a in (scale, bias)
    )
    x_hat = standardised(x, batch.mean, batch.var, feature_axis, epsilon)
    return scale * x_hat + bias, batch


def batch_norm_vjp(x, g, scale, epsilon=1e-5):
    r"""Return the gradients of sum(g * y) with respect to x, scale and bias.

    x has shape `[N, C]`.

    The chain rule of Ioffe and Szegedy (2015), section 3, with its terms collected:
    dx = scale / sqrt(var + eps) (g - E[g] - x_hat E[g x_hat]).
    """
    batch = moments(x)
    x_hat = standardised(x, batch.mean, batch.var, epsilon=epsilon)
    multiplier = np.float64(scale) / np.sqrt(batch.var + epsilon)
    dx = multiplier * (g - g.mean(0) - x_hat * (g * x_hat).mean(0))
    return dx, (g * x_hat).sum(0), g.sum(0)


def normal(shape, *, mean=0.0, std=1.0, seed=0, dtype=jnp.float32):
    """Return an array of independent normal numbers."""
    draws = np.random.default_rng(seed).normal(mean, std, shape)
    widest = jax.dtypes.canonicalize_dtype(np.float64)
    return jnp.asarray(draws.astype(widest).astype(dtype))
