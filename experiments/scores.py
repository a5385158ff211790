"""Runs by what sets them apart, and their scores at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # a run, as a line of runs.jsonl
Score = Callable[[Mapping[str, Any]], float]
CHOOSING = "choosing"  # in a row: whether the run is one to choose by


class NotTrained(LookupError):
    """There are no runs of a choice."""


class Runs(dict[Any, list[Row]]):
    """Rows by choice, such as the name of an arm.

    The rows of a choice are in order of seeds, so that choices can be paired. A choice
    that has no rows raises `NotTrained`.

    Attributes:
      used: choices whose rows have been asked for.
      choosing: runs by which choices were made before those that are judged.
    """

    def __init__(self, rows: Mapping[Any, list[Row]] | None = None) -> None:
        super().__init__(rows or {})
        self.used: set[Any] = set()
        self.choosing: dict[Any, list[Row]] = {}

    @classmethod
    def of(cls, rows: Iterable[Row], choice: Callable[[Row], Any]) -> Runs:
        """Group rows by their choices, in the order in which these first occur."""
        found, choosing = cls(), cls()
        for row in rows:
            of = choosing if row.get(CHOOSING) else found
            of.setdefault(choice(row), []).append(row)
        for of_choice in [*found.values(), *choosing.values()]:
            of_choice.sort(key=seed_of)
        found.choosing = choosing
        return found

    def __getitem__(self, choice: Any) -> list[Row]:
        if choice not in self:
            raise NotTrained(choice)
        self.used.add(choice)
        return super().__getitem__(choice)

    def look(self, first: int, count: int) -> Runs:
        """Return the runs of some seeds, of the choices that were trained with all.

        Args:
          first: the least of them.
          count: their number.
        """
        seeds = range(first, first + count)
        found = {
            choice: [row for row in rows if seed_of(row) in seeds]
            for choice, rows in self.items()
        }
        runs = Runs({c: rows for c, rows in found.items() if len(rows) == count})
        runs.choosing = self.choosing
        return runs

    def find(self, choice: Any) -> list[Row]:
        """Return the rows of a choice, or of the one that a function of runs finds."""
        return self[choice(self) if callable(choice) else choice]

    def where(self, wanted: Callable[[Any], bool]) -> Runs:
        """Return the runs of some choices."""
        found = Runs({choice: rows for choice, rows in self.items() if wanted(choice)})
        found.choosing = self.choosing
        return found

    @property
    def rows(self) -> list[Row]:
        """All rows, choice by choice."""
        return [row for rows in self.values() for row in rows]


def arm_of(row: Mapping[str, Any]) -> str:
    """Return the name of a run's arm."""
    arm: str = row["arm"]
    return arm


def seed_of(row: Mapping[str, Any]) -> int:
    """Return the seed of a run."""
    seed: int = row.get("config", row)["seed"]
    return seed


def guessing(name: str) -> float:
    """Return the score of guessing one of ten classes: a loss, nats, or an accuracy."""
    return math.log(10) if "loss" in name else 0.1


def final(*names: str) -> Score:
    """Return the score at the end of a run; a run that diverged scores as guessing.

    Args:
      *names: of the score. The first that a row has counts. Its value is a number, or a
        list by epoch, of which the last counts; None stands for divergence.
    """

    def score(row: Mapping[str, Any]) -> float:
        name = next(name for name in names if name in row)
        value = row[name][-1] if isinstance(row[name], list) else row[name]
        return guessing(name) if value is None else value

    return score


def summarize(score: Score, rows: Sequence[Row]) -> Row:
    """Return mean, standard deviation, least and greatest value of a score, and n."""
    values = [score(row) for row in rows]
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


loss = final("loss")  # of training, nats, a mean over the last epoch
train_accuracy = final("train_accuracy")  # likewise
# By moving averages, which are noisy at large rates.
moving_test_accuracy = final("test_accuracy")
# Free of that noise: by exact statistics where they were measured, otherwise by those
# of batches of 500 test images; without norm there is only one accuracy.
test_accuracy = final("test_accuracy_exact", "test_accuracy_batch", "test_accuracy")
# Of the part of the training images that is left out, to choose by: likewise.
validation_accuracy = final("validation_accuracy_exact", "validation_accuracy")
