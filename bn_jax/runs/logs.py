"""Logs of a run for other programs: a CSV file, and TensorBoard's event files.

Both have a point for each epoch: losses, accuracies, speed, learning rate, and of each
norm the mean over its features of gamma, beta and moving averages; TensorBoard has
their histograms, too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.fields import ConfigError
from bn_jax.runs import json_files
from bn_jax.runs.summary import layer_values
from bn_jax.training.progress import EpochReport

CSV = "metrics.csv"
TENSORBOARD = "tensorboard"


def check(names: Sequence[str]) -> None:
    """Refuse a log whose package is not installed.

    Raises:
      ConfigError: naming it.
    """
    if "tensorboard" not in names:
        return
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ConfigError(
            "log='tensorboard' needs tensorboardX, which is not installed; "
            "pip install -e '.[log]'"
        ) from None


class Logs:
    """The logs of a run.

    Args:
      names: of "csv" and "tensorboard".
      workdir: the run's directory.
      step: at which the run resumes; later entries are dropped.
      offsets: see `summary.scale_offsets`.
    """

    def __init__(
        self,
        names: Sequence[str],
        workdir: Path,
        step: int,
        offsets: Mapping[str, float],
    ) -> None:
        self._offsets = offsets
        self._csv = workdir / CSV if "csv" in names else None
        self._rows: list[Mapping[str, Any]] = []
        if self._csv is not None and self._csv.exists():
            self._rows = [r for r in _read(self._csv) if int(r["step"]) <= step]
        self._writer: Any = None
        if "tensorboard" in names:
            from tensorboardX import SummaryWriter

            folder = json_files.remove_link(workdir / TENSORBOARD)
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, report: EpochReport, learning_rate: float, variables: Any) -> None:
        """Log an epoch.

        Args:
          report: of the epoch.
          learning_rate: of its last step.
          variables: of the model at its end.

        Raises:
          RunError: if the log cannot be written.
        """
        values = layer_values(variables, self._offsets)
        means = {f"{name}/mean": float(v.mean()) for name, v in values.items()}
        row = {**report.to_row(), "learning_rate": learning_rate, **means}
        if self._csv is not None:
            self._rows.append(row)
            json_files.write_text(self._csv, _text(self._rows))
        if self._writer is not None:
            with json_files.writing(Path(self._writer.logdir)):
                self._add_events(report.step, row, values)

    def _add_events(
        self, step: int, row: Mapping[str, Any], values: Mapping[str, np.ndarray]
    ) -> None:
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, step)
        for name, features in values.items():
            if np.isfinite(features).all():
                self._writer.add_histogram(name, features, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file of ours.

    Raises:
      RunError: if it is none.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        if all(row.get("step", "").isdigit() for row in rows):
            return rows
    except (OSError, ValueError, AttributeError):
        pass
    raise json_files.RunError(
        f"{path} is damaged: it is no log of a run; move it away, and the run goes on"
    )


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
