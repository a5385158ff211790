"""What a finished run is told by: its numbers, and what its norms have learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from bn_jax.measures.layer_calls import LayerCall, layer_calls
from bn_jax.runs import json_files
from bn_jax.training import loop
from bn_jax.training.parameters import of_norms
from bn_jax.training.progress import EpochReport
from bn_jax.training.scoring import Score
from bn_jax.training.state import Network

T = TypeVar("T")

_VALIDATION = ("validation_loss", "validation_accuracy")


def summary(
    trainer: loop.Trainer,
    score: Score,
    variables: Any,
    *,
    best: EpochReport | None = None,
) -> dict[str, Any]:
    """Return the contents of results.json, None for numbers that are not finite.

    Args:
      trainer: at the end of training.
      score: of what it has trained.
      variables: likewise.
      best: of the epochs, on the validation set.
    """
    images = trainer.data.train.images
    calls = _calls(trainer.network, variables, images[:1])
    last = trainer.history[-1]
    row = last.to_row()
    seconds = sum(report.seconds for report in trainer.history)
    losses = trainer.progress().step_losses
    num_examples = len(trainer.data.train.labels)
    if trainer.stream:
        num_examples = min(num_examples, loop.MAX_STREAMED_EXAMPLES)
    values = {
        "train_loss": last.loss,
        "train_accuracy": last.train_accuracy,
        **{name: row[name] for name in _VALIDATION if name in row},
        **({} if best is None else _best(best)),
        **score.to_row(),
        "exact_statistics_examples": num_examples,
        "examples_per_second": last.step * trainer.config.batch_size / seconds,
        "compile_seconds": trainer.compile_seconds,
        "num_devices": len(trainer.placement.devices),
        "num_processes": jax.process_count(),
        "data_source": trainer.data.source,
        "task": trainer.task.to_dict(),
        "class_names": list(trainer.data.class_names),
        "first_step_losses": losses[:20].astype(float).tolist(),
        "moving_averages": bool(jax.tree.leaves(variables["batch_stats"])),
        "gamma_beta": _in_order(gamma_beta(variables, _offsets(calls)), calls),
    }
    of_summary: dict[str, Any] = json_files.finite(values)
    return of_summary


def _best(report: EpochReport) -> dict[str, Any]:
    """Return the number and the scores of the best epoch, as results.json has them."""
    row = report.to_row()
    names = ("epoch", *_VALIDATION, "test_loss", "test_accuracy")
    return {f"best_{name}": row[name] for name in names}


def scale_offsets(
    network: Network, variables: Any, image: np.ndarray
) -> dict[str, float]:
    """Return the offsets that layers of a user's model add to their stored scale.

    Args:
      network: whose model is looked at.
      variables: of the model.
      image: one, of shape `[1, H, W, C]`.
    """
    return _offsets(_calls(network, variables, image))


def _calls(network: Network, variables: Any, image: np.ndarray) -> list[LayerCall]:
    """Return the calls of batch norm layers; none of a model with another norm."""
    try:
        return layer_calls(network.predict, variables, image)
    except ValueError:
        return []


def _offsets(calls: Sequence[LayerCall]) -> dict[str, float]:
    return {"/".join(c.path): c.scale_offset for c in calls if c.scale_offset}


def _in_order(layers: Mapping[str, T], calls: Sequence[LayerCall]) -> dict[str, T]:
    """Return layers in the order of their first calls, and the others after them."""
    called = dict.fromkeys("/".join(call.path) for call in calls)
    names = [name for name in called if name in layers]
    return {name: layers[name] for name in dict.fromkeys((*names, *layers))}


def gamma_beta(
    variables: Any, offsets: Mapping[str, float] = MappingProxyType({})
) -> dict[str, dict[str, list[float]]]:
    """Return gamma and beta of each normalisation layer, by the layer's name.

    Those are the layers that keep statistics, and those whose parameters are a norm's
    (`bn_jax.training.parameters.of_norms`), such as layer norm's.

    Args:
      variables: of a model.
      offsets: see `scale_offsets`.
    """
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    learned = traverse_util.flatten_dict(of_norms(variables["params"]), sep="/")
    kept = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    layers = {
        path.rpartition("/")[0]
        for path in (*kept, *(path for path in learned if learned[path]))
    }
    return {
        layer: {
            greek: (np.asarray(params[f"{layer}/{name}"], float) + offset).tolist()
            for greek, name, offset in (
                ("gamma", "scale", offsets.get(layer, 0.0)),
                ("beta", "bias", 0.0),
            )
            if f"{layer}/{name}" in params
        }
        for layer in sorted(layers)
    }


def layer_values(
    variables: Any, offsets: Mapping[str, float] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """Return gamma, beta and the moving averages of each norm.

    Args:
      variables: of a model.
      offsets: see `scale_offsets`.

    Returns:
      Arrays of shape [C] by name, such as `norm1/gamma` and `norm1/var`.
    """
    found = {
        f"{layer}/{greek}": np.asarray(values)
        for layer, learned in gamma_beta(variables, offsets).items()
        for greek, values in learned.items()
    }
    averages = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    return found | {
        name: np.asarray(value, np.float64)
        for name, value in averages.items()
        if np.ndim(value) == 1 and np.isrealobj(value)
    }
