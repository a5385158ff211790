"""Runs that studies share: what one has trained, no other trains again.

A pool is a folder of sweeps. A run is known by its config and data set, whichever sweep
it is a member of.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bn_jax.data import ImageData
from bn_jax.runs import json_files, sweeps
from bn_jax.runs.run import Run
from bn_jax.training import task
from bn_jax.training.config import RunOptions, TrainConfig
from experiments.scores import Row


class Member(NamedTuple):
    """A trained run."""

    row: Row  # with its share of the time, and the speed of its sweep
    folder: Path  # of its sweep
    number: int  # among the sweep's members

    def variables(self) -> Any:
        """Return the variables that it ended with."""
        return _runs(self.folder)[self.number].variables


class Pool:
    """A folder of finished sweeps, each scored by exact statistics, too."""

    def __init__(self, folder: Path, options: RunOptions) -> None:
        self.folder, self.options = folder, options

    def train(
        self,
        configs: Sequence[TrainConfig],
        data: ImageData,
        *,
        name: str,
        score_training: bool = False,
    ) -> list[Member]:
        """Return the runs of configs, of which those that are missing are trained.

        Args:
          configs: of one sweep.
          data: the images.
          name: of the sweep, in its folder's name.
          score_training: whether runs are scored on the training images, too; those
            that were not are missing.

        Raises:
          RunError: if a sweep there is damaged.
          Interrupted: as `sweeps.sweep`.
        """
        found = self._members()
        if score_training:
            found = {k: m for k, m in found.items() if "train_loss_average" in m.row}
        keys = [_key(config, data) for config in configs]
        missing = [c for c, k in zip(configs, keys, strict=True) if k not in found]
        if missing:
            text = json.dumps([_key(config, data) for config in missing])
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            how = "-on-training" if score_training else ""
            folder = self.folder / f"{name}{how}-{digest}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweeps.sweep(
                missing,
                data,
                workdir=folder,
                options=self.options,
                exact=True,
                train=score_training,
            )
            found.update(_members_of(folder))
        return [found[key] for key in keys]

    def _members(self) -> dict[str, Member]:
        """Return all runs of the pool, by key."""
        found = {}
        for path in sorted(self.folder.glob(f"*/{json_files.RESULTS}")):
            found.update(_members_of(path.parent))
        return found


@functools.cache
def _runs(folder: Path) -> list[Run]:
    return sweeps.load(folder)


def _members_of(folder: Path) -> dict[str, Member]:
    """Return the members of a finished sweep, by key."""
    source = json_files.read_object(folder / json_files.CONFIG)["data"]
    about = json_files.read_object(folder / json_files.RESULTS)
    rows = json_files.read_rows(folder / json_files.ROWS)
    seconds = (about["seconds"] + about["compile_seconds"]) / len(rows)
    common = {"examples_per_second": about["examples_per_second"], "seconds": seconds}
    return {
        _key_of(row["config"], source): Member({**common, **row}, folder, number)
        for number, row in enumerate(rows)
    }


def _key(config: TrainConfig, data: ImageData) -> str:
    return _key_of(config.to_dict(), task.select(config, data).source)


def _key_of(config: Row, source: str) -> str:
    """Return the key of a run: its config and the source of its data."""
    return json.dumps([source, config], sort_keys=True)
