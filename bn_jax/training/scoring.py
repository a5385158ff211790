"""Scores of a trained network, by moving averages and by exact statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax.measures import population
from bn_jax.measures.layer_calls import layer_calls
from bn_jax.measures.population import Mode
from bn_jax.training import memory, parallel
from bn_jax.training.evaluation import BATCH_SIZE, Evaluator
from bn_jax.training.state import Network

# Exact statistics of more layers are measured in one pass. Layer by layer each takes a
# pass of its own, which compiles and computes the layers before it again: for a ResNet
# of 20 layers 42 seconds of compilation on 2 cores, where one pass takes 7.
MAX_LAYERWISE_CALLS = 10


class Score(NamedTuple):
    """Accuracies are shares of 1, losses cross-entropies in nats.

    Exact statistics are None where `exact_refused` says why they cannot be measured.
    """

    test_loss: float  # by the moving averages
    test_accuracy: float  # likewise
    test_loss_exact: float | None  # by exact statistics of the training set
    test_accuracy_exact: float | None  # likewise
    # Of the average of the weights, by exact statistics that are measured with it.
    test_loss_averaged: float | None = None
    test_accuracy_averaged: float | None = None
    exact_refused: str | None = None
    exact_mode: Mode = "layerwise"  # how exact statistics were measured

    def to_row(self) -> dict[str, Any]:
        """Return the scores, and what else is not as usual."""
        usual = type(self)._field_defaults
        return {
            name: value
            for name, value in self._asdict().items()
            if name not in usual or value != usual[name]
        }


def score(
    network: Network,
    variables: Any,
    evaluate: Evaluator,
    images: np.ndarray,
    *,
    devices: Sequence[jax.Device],
    average: Any = None,
) -> Score:
    """Evaluate by moving averages and by exact statistics of the training set.

    Args:
      network: the network.
      variables: its parameters and moving averages.
      evaluate: on the test set.
      images: of the training set, bytes `[N, H, W, C]`, which give the exact
        statistics.
      devices: of this process, which share these images.
      average: of the parameters, to be scored with exact statistics of its own; none if
        it is empty.
    """
    by_average = evaluate(variables)
    by_exact: tuple[Any, Any] = (None, None)
    of_average: tuple[Any, Any] = (None, None)
    mode: Mode = "layerwise"
    refused = exact_refusal(network, variables, images[:1])
    if refused is None:
        mode = exact_mode(network, variables, images[:1])

        def exact(variables: Any) -> Any:
            found = exact_statistics(
                network, variables, images, devices=devices, mode=mode
            )
            return evaluate({**variables, "batch_stats": found})

        by_exact = exact(variables)
        if average:
            of_average = exact({**variables, "params": average})
    return Score(*by_average, *by_exact, *of_average, refused, mode)


def exact_refusal(network: Network, variables: Any, example: np.ndarray) -> str | None:
    """Return why exact statistics cannot be measured, or None if they can.

    Args:
      network: the network.
      variables: its parameters and moving averages.
      example: one image, `[1, H, W, C]`.
    """
    return population.refusal(network.predict, variables, example)


def exact_mode(network: Network, variables: Any, example: np.ndarray) -> Mode:
    """Return how exact statistics are measured: in one pass, if layers are many.

    Args:
      network: the network, which `exact_refusal` does not refuse.
      variables: its parameters and moving averages.
      example: one image, `[1, H, W, C]`.
    """
    calls = layer_calls(network.predict, variables, example)
    return "layerwise" if len(calls) <= MAX_LAYERWISE_CALLS else "one_pass"


def exact_statistics(
    network: Network,
    variables: Any,
    images: np.ndarray,
    *,
    devices: Sequence[jax.Device],
    mode: Mode = "layerwise",
) -> Any:
    """Return the exact statistics of a training set.

    Args:
      network: the network.
      variables: its parameters and moving averages.
      images: of the training set, bytes `[N, H, W, C]`.
      devices: of this process, which share the images; where they do not divide them,
        the first has all.
      mode: see `population.exact_statistics`. In one pass, batches are as large
        whatever the number of devices, as the result depends on them.

    Returns:
      A collection like `variables["batch_stats"]`.

    Raises:
      ValueError: as `population.exact_statistics` says.
    """
    memory.return_freed()  # here most is needed
    if len(images) % len(devices):
        devices = devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), (parallel.DATA,))
    by_example = NamedSharding(mesh, PartitionSpec(parallel.DATA))
    replicated = NamedSharding(mesh, PartitionSpec())
    batch_size = BATCH_SIZE * (len(devices) if mode == "layerwise" else 1)
    with jax.set_mesh(mesh):  # convolutions look at it
        return population.exact_statistics(
            network.predict,
            jax.tree.map(lambda v: parallel.put(v, replicated), variables),
            parallel.put(images, by_example),
            batch_size=batch_size,
            mode=mode,
        )
