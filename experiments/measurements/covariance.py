"""What a normalising transform makes of the covariance of features."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import linen
from bn_jax.data import ImageData
from bn_jax.training.config import TrainConfig
from bn_jax.training.task import Task, make_network
from experiments.scores import Row

GROUP = 15  # of the 120 features: the largest divisor up to 16
SHOWN = 24  # features of the covariances that are kept


def covariances(row: Row, variables: Any, data: ImageData) -> Row:
    """Measure what a run's norm makes of an untrained layer's output; for seed 0 alone.

    Returns:
      `covariance` and `covariance_before`, the latter as a correlation, of the first
      features; and the distance of the former, of all features, to the identity.
    """
    del variables
    if row["config"]["seed"]:
        return {}
    x = dense_features(data)
    y = transformed(row["config"]["norm"], x)
    covariance = np.cov(y, rowvar=False, bias=True)
    return {
        "covariance_distance": distance(covariance),
        "distance_within_groups": distance_within(covariance, GROUP),
        "covariance": _shown(covariance),
        "covariance_before": _shown(np.corrcoef(x, rowvar=False)),
    }


def _shown(covariance: np.ndarray) -> list[list[float]]:
    part: list[list[float]] = covariance[:SHOWN, :SHOWN].round(3).tolist()
    return part


def distance(covariance: np.ndarray) -> float:
    """Return the Frobenius norm of a covariance minus the identity, over sqrt(C)."""
    c = len(covariance)
    return float(np.linalg.norm(covariance - np.eye(c)) / math.sqrt(c))


def distance_within(covariance: np.ndarray, size: int) -> float:
    """Return the mean distance of the blocks that belong to one group of features."""
    starts = range(0, len(covariance), size)
    blocks = [covariance[i : i + size, i : i + size] for i in starts]
    return sum(map(distance, blocks)) / len(blocks)


def dense_features(data: ImageData) -> np.ndarray:
    """Return the first dense layer's output, in an untrained LeNet, for 256 images."""
    network = make_network(TrainConfig(), Task.of(TrainConfig(), data))
    _, state = network.apply(
        network.init(jax.random.key(0)),
        jnp.asarray(data.train.images[:256]),
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "dense1",
    )
    return np.asarray(state["intermediates"]["dense1"]["__call__"][0], np.float64)


def transformed(norm: str, x: np.ndarray) -> np.ndarray:
    """Return the output of an untrained norm, by name, for a batch `[N, C]`."""
    constructor = linen.norm(norm)
    assert constructor is not None
    layer = constructor(use_running_average=False)
    features = jnp.asarray(x, jnp.float32)
    variables = layer.init(jax.random.key(0), features)
    y, _ = layer.apply(variables, features, mutable=["batch_stats"])
    return np.asarray(y, np.float64)
