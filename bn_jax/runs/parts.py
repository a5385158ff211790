"""A sweep in parts: each trained by a process of its own, anywhere, and then merged.

A part has the program of the whole sweep, so that on one kind of machine its members
have the numbers that they have undivided. The process that ends the last part merges
them; one that was stopped resumes where the same part is trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bn_jax import data as data_lib
from bn_jax import paths
from bn_jax.runs import checkpoint, json_files, results, same_model, sweeps, workdirs
from bn_jax.runs.run import Run
from bn_jax.runs.sweeps import Finished, Part
from bn_jax.training import members, own_models
from bn_jax.training.config import TrainConfig
from bn_jax.training.task import Task

WAIT_SECONDS = 600  # for another process that merges the same parts


def unfinished(
    configs: Sequence[TrainConfig], *, workdir: str | Path, num_parts: int
) -> list[Part]:
    """Return the parts of a sweep that are not trained to the end.

    Args:
      configs: of all members.
      workdir: of the sweep.
      num_parts: of the sweep.
    """
    workdir = paths.local(workdir, "workdir")
    every = (Part(number, num_parts) for number in range(1, num_parts + 1))
    return [part for part in every if not _is_finished(part.folder(workdir), configs)]


def is_merged(configs: Sequence[TrainConfig], workdir: str | Path) -> bool:
    """Return whether the sweep is finished as a whole."""
    return _is_finished(paths.local(workdir, "workdir"), configs)


def _is_finished(folder: Path, configs: Sequence[TrainConfig]) -> bool:
    if not (folder / json_files.RESULTS).exists():
        return False
    # The results may be those of fewer epochs.
    epochs = sweeps.common([config.epochs for config in configs])
    return bool(
        json_files.read_object(folder / json_files.CONFIG).get("epochs") == epochs
    )


def merge(
    configs: Sequence[TrainConfig],
    data: data_lib.ImageData,
    *,
    workdir: str | Path,
    num_parts: int,
    model: Any = None,
    exact: bool = True,
    train: bool = False,
) -> list[dict[str, Any]]:
    """Write to `workdir` what `sweeps.sweep` would have written, from all parts.

    Args:
      configs: of all members, as each part was given them.
      data: the images.
      workdir: as each part was given it.
      num_parts: of the sweep; all of them are finished.
      model: see `sweeps.sweep`.
      exact: see there.
      train: see there.

    Returns:
      The rows of all members. Those of a sweep that was merged before are read.

    Raises:
      RunError: if a part is not finished, is damaged or of another sweep, or `workdir`
        holds something else.
    """
    workdir = paths.local(workdir, "workdir")
    if model is not None:
        configs = [own_models.named(config, model) for config in configs]
    identity = sweeps.identity(configs, data, exact=exact, train=train)
    whole = members.grouped(configs)
    # The last parts may end, and merge, at the same time.
    grows = sweeps.can_grow(configs)
    with workdirs.held(
        workdir, identity, seconds=WAIT_SECONDS, repeat=True, grows=grows
    ):
        is_there = (workdir / json_files.RESULTS).exists()
        if is_there:
            results.check_finished(workdir, others=results.OF_A_SWEEP)
            there = json_files.read_object(workdir / json_files.CONFIG)
            if not workdirs.is_shorter(there, identity):
                return json_files.read_rows(workdir / json_files.ROWS)
        runs: list[Any] = [None] * len(configs)
        summaries = []
        for number in range(1, num_parts + 1):
            part = Part(number, num_parts)
            folder = part.folder(workdir)
            there = json_files.read_object(folder / json_files.CONFIG)
            faults = workdirs.differences(there, {**identity, "part": list(part)})
            if faults:
                raise json_files.RunError(
                    f"{folder} holds a part of another sweep ({'; '.join(faults)}); "
                    "move it away, and train that part again"
                )
            for i, run in zip(
                part.members(whole), sweeps.load(folder, model=model), strict=True
            ):
                runs[i] = run
            summaries.append(json_files.read_object(folder / json_files.RESULTS))
        if is_there:
            workdirs.set_results_aside(workdir)
        of_model = same_model.recorded(configs[0], runs[0].network)
        results.start_run(workdir, identity, of_model)
        sweeps.finish(
            workdir,
            configs,
            Finished(
                [run.results for run in runs],
                seconds=sum(s["seconds"] for s in summaries),
                compile_seconds=sum(s["compile_seconds"] for s in summaries),
                num_examples=sum(s["examples"] for s in summaries),
                num_devices=max(s["num_devices"] for s in summaries),
                task=Task.from_dict(summaries[0]["task"]),
                checksums=_save(workdir, whole, runs),
            ),
            data_source=identity["data"],
        )
    return [run.results for run in runs]


def _save(
    workdir: Path, groups: Sequence[Sequence[int]], runs: Sequence[Run]
) -> dict[str, dict[str, int]]:
    """Write the members' variables, stacked by program; return their checksums."""
    checksums = {}
    folders = sweeps.folders_of(workdir, len(groups))
    for folder, group in zip(folders, groups, strict=True):
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves), *(runs[i].variables for i in group)
        )
        folder.mkdir(exist_ok=True)
        name = sweeps.name_of_variables(workdir, folder)
        checksums[name] = checkpoint.save_variables(folder, stacked)
    return checksums
