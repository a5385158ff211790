"""How long a step of training takes with one norm, beside batch norm."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator

import numpy as np

from bn_jax.data import ImageData, Split
from bn_jax.training.config import TrainConfig
from bn_jax.training.loop import Trainer
from experiments.scores import Row, Runs, final

STEPS = 20  # of an epoch that is timed
ROUNDS = 5
step_time = final("step_time")


def to_batch_norm(row: Row, data: ImageData) -> float:
    """Return the time of a step of a run's network, divided by that with batch norm.

    Both train by turns on one device, `STEPS` steps each, `ROUNDS` times after a first
    round that warms up. The median of the rounds is returned.
    """
    own = _epochs(row["config"]["norm"], row["config"]["model"], data)
    reference = _epochs("batch_norm", TrainConfig().model, data)
    ratios = [next(own) / next(reference) for _ in range(ROUNDS)]
    return statistics.median(ratios)


@functools.lru_cache(maxsize=32)  # seeds take as long as one another
def _epochs(norm: str, model: str, data: ImageData) -> Iterator[float]:
    """Return the seconds of one short epoch after the other."""
    first = [
        Split(split.images[:size], split.labels[:size])
        for split, size in (
            (data.train, STEPS * TrainConfig().batch_size),
            (data.test, 100),
        )
    ]
    few = dataclasses.replace(data, train=first[0], test=first[1])
    trainer = Trainer(TrainConfig(epochs=100_000, norm=norm, model=model), few)
    reports = (report.seconds for report in trainer.train() if report is not None)
    next(reports)
    return reports


def at_equal_time(runs: Runs, arm: str) -> list[float]:
    """Return the training losses of an arm after as long as batch norm trains in all.

    The mean loss of an epoch counts as the loss at its end, and losses between are
    interpolated. NaN where the arm has not finished its first epoch by then.
    """
    found = []
    for row in runs[arm]:
        losses = [math.nan if loss is None else loss for loss in row["loss"]]
        epochs = np.arange(1, len(losses) + 1)
        trained = epochs[-1] / step_time(row)
        found.append(float(np.interp(trained, epochs, losses, left=math.nan)))
    return found
