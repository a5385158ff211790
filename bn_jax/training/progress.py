"""The progress of a run: a report of each epoch, and the state it resumes from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bn_jax.training.state import TrainState


class EpochReport(NamedTuple):
    """One line of a run's history. Accuracies are shares of 1, losses in nats."""

    epoch: int  # from 1
    step: int  # steps taken at its end
    loss: float  # mean over the epoch's batches, in training mode, as they were trained
    train_accuracy: float  # likewise
    test_loss: float  # in prediction mode, by the moving averages
    test_accuracy: float  # likewise
    seconds: float  # of training alone, without evaluation or compilation
    examples_per_second: float  # trained, without evaluation or compilation
    validation_loss: float | None = None  # as that of the test set; None without one
    validation_accuracy: float | None = None  # likewise

    @property
    def best_by(self) -> float:
        """What the best checkpoint is chosen by: accuracy on the validation set.

        Without one it is that on the test set.
        """
        if self.validation_accuracy is None:
            return self.test_accuracy
        return self.validation_accuracy

    def to_row(self) -> dict[str, float]:
        """Return the fields that have a value."""
        return {name: v for name, v in self._asdict().items() if v is not None}


class Progress(NamedTuple):
    """A run so far; training resumes from it as if it had never stopped."""

    state: TrainState  # NumPy arrays; statistics have a leading axis, see parallel.py
    step_losses: np.ndarray  # of each step taken; shape [steps], float32
    step_accuracies: np.ndarray  # likewise
    history: tuple[EpochReport, ...]  # of the epochs that are finished
    seconds: float  # of training in the epoch that is not
