"""Scores and curves of the runs that `weights.follow` trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from experiments.estimate import spread
from experiments.measurements.weights import HELD
from experiments.scores import Row, Runs


def largest_cosine(row: Row) -> float:
    """Return the mean over steps of |cosine|, of the layer where it is largest."""
    largest: float = max(row["mean_abs_cosine"])
    return largest


def growth_error(row: Row) -> float:
    """Return the largest relative error of the formula for growth, over layers."""
    pairs = zip(row["growth"], row["sum_of_squared_gradients"], strict=True)
    return max(abs(g / (row["learning_rate"] ** 2 * sq) - 1) for g, sq in pairs)


def log_effective_rate(row: Row) -> float:
    """Return log10 of the effective rate at the end."""
    return math.log10(_effective_rate(row, row["final_squared_norm"]))


def final_accuracy(row: Row) -> float:
    """Return the training accuracy of the last 100 steps, .1 where it is not finite."""
    accuracy: float = row["final_accuracy"]
    return accuracy if math.isfinite(accuracy) else 0.1


def squared_norm(row: Row, k: int) -> float:
    """Return the squared norm of the weights of all layers at the k-th drawn step."""
    return float(sum(row["squared_norm"][k]))


def abs_cosine(row: Row, k: int) -> float:
    """Return the mean |cosine| over layers at the k-th drawn step."""
    return float(row["abs_cosine"][k])


def effective_rate(row: Row, k: int) -> float:
    """Return the effective rate at the k-th drawn step."""
    return _effective_rate(row, row["squared_norm"][k])


def _effective_rate(row: Row, squared_norms: list[float]) -> float:
    r"""Return the geometric mean over layers of $\eta / |w|^2$."""
    logs = [math.log(row["learning_rate"] / squared) for squared in squared_norms]
    return math.exp(sum(logs) / len(logs))


def by_step(
    runs: Runs, value: Callable[[Row, int], float], titles: Mapping[str, str]
) -> Any:
    """Return a panel for each norm, and in it a line for each rate.

    Args:
      runs: all of them, by arm and rate.
      value: of a run at the k-th of its drawn steps.
      titles: by norm.
    """
    panels: dict[str, Any] = {}
    for (arm, rate), rows in runs.items():
        shortest = min((row["drawn_steps"] for row in rows), key=len)
        norm = "batch_norm" if arm == HELD else arm
        label = f"rate {rate:g}" + (", norm held" if arm == HELD else "")
        panels.setdefault(f"step, {titles[norm]}", {})[label] = {
            1 + step: spread(lambda row, k=k: value(row, k), (arm, rate))
            for k, step in enumerate(shortest)
        }
    return panels
