"""What a normalising transform makes of the covariance of features."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import linen, transforms
from bn_jax.data import ImageData
from bn_jax.training.config import TrainConfig, value_of
from bn_jax.training.task import Task, make_network
from experiments.estimate import Statistic, exactly
from experiments.scores import Row, Runs, final

GROUP = 15  # of the 120 features: the largest divisor up to 16
SHOWN = 24  # features of the covariances that are kept
BATCH = 256

# Distances of the covariance to the identity, of a row of `covariances`.
on_batch = final("distance_on_batch")
on_other = final("distance_on_other")
within_groups_on_other = final("distance_within_groups_on_other")


def covariances(row: Row, variables: Any, data: ImageData) -> Row:
    """Measure what a run's norm makes of the output of an untrained layer.

    Seeds differ in the network's weights and in the images: one batch, whose statistics
    the norm takes, and another one that is normalised by these.

    Returns:
      The distance to the identity of the covariance of all features, and that within
      groups of `GROUP`; both on the `batch` and on `other` images. For seed 0 also the
      covariance of the first features on other images, and before the norm, as a
      correlation. Nothing, of a run without a norm after that layer.
    """
    del variables
    seed = row["config"]["seed"]
    if value_of(row["config"], "model.norm_layers")[2] == "0":
        return {}
    x, others = dense_features(data, seed)
    on_batch, on_others = normalised(row["config"]["norm"], x, others)
    found: Row = {}
    for where, y in (("batch", on_batch), ("other", on_others)):
        covariance = np.cov(y, rowvar=False, bias=True)
        found[f"distance_on_{where}"] = distance(covariance)
        found[f"distance_within_groups_on_{where}"] = distance_within(covariance, GROUP)
    if seed == 0:
        found["covariance"] = _shown(covariance)
        found["covariance_before"] = _shown(np.corrcoef(others, rowvar=False))
    return found


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


@functools.lru_cache(maxsize=32)  # all norms of a seed have the same
def dense_features(data: ImageData, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first dense layer's output for two batches, in an untrained LeNet.

    The batches are `BATCH` images each, `[N, C]`, at another place for each seed.
    """
    network = make_network(TrainConfig(), Task.of(TrainConfig(), data))
    start = 2 * BATCH * seed % (len(data.train.images) - 2 * BATCH)
    _, state = network.model.apply(
        network.init(jax.random.key(seed)),
        network.scale(jnp.asarray(data.train.images[start : start + 2 * BATCH])),
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "dense1",
    )
    found = np.asarray(state["intermediates"]["dense1"]["__call__"][0], np.float64)
    return found[:BATCH], found[BATCH:]


def normalised(
    norm: str, x: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise a batch by an untrained norm, and others by the batch's statistics.

    Args:
      norm: by name.
      x: batch `[N, C]`.
      others: examples `[M, C]`.
    """
    name = transforms.NORMS.parse(norm).name
    takes_momentum = "momentum" in transforms.NORMS.options(name)
    # With a momentum of 0 the moving statistics are those of the batch.
    options = {"momentum": 0.0} if takes_momentum else {}
    constructor = linen.norm(norm, options=options)
    assert constructor is not None
    layer = constructor(use_running_average=None)
    x, others = (jnp.asarray(batch, jnp.float32) for batch in (x, others))
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    y, state = layer.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    on_others = layer.apply({**variables, **state}, others, use_running_average=True)
    return np.asarray(y, np.float64), np.asarray(on_others, np.float64)


def largest_ratio(arms: Sequence[str]) -> Statistic:
    """Return the largest ratio of an arm's distance to that of the arm before it.

    The distance is that within groups, on the batch; the largest is over arms and
    seeds, and is taken as exact.
    """
    score = final("distance_within_groups_on_batch")

    def ratio(runs: Runs) -> float:
        return max(
            score(row) / score(before)
            for of_seed in zip(*(runs[arm] for arm in arms), strict=True)
            for before, row in itertools.pairwise(of_seed)
        )

    return exactly(ratio)


def matrices(runs: Runs, titles: Mapping[str, str]) -> Any:
    """Return the covariances before all norms and after that of each arm, by title."""
    measured = {arm: rows[0] for arm, rows in runs.items() if "covariance" in rows[0]}
    if not measured:
        return {}
    before = next(iter(measured.values()))["covariance_before"]  # the same for all
    after = {titles[arm]: row["covariance"] for arm, row in measured.items()}
    return {"before, as correlation": before, **after}
