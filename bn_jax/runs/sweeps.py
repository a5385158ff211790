"""A sweep on disk: its members trained into one folder, a row for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax import data as data_lib
from bn_jax import paths
from bn_jax.fields import ConfigError, counted
from bn_jax.runs import checkpoint, interrupt, json_files, results, same_model, workdirs
from bn_jax.runs.run import Run, read_config
from bn_jax.runs.sweep_program import Program
from bn_jax.training import members, own_models, schedules, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.progress import EpochReport
from bn_jax.training.state import Network
from bn_jax.training.task import Task, make_network


class Part(NamedTuple):
    """A part of a sweep's members, trained apart from the others; see `runs.parts`."""

    number: int  # from 1
    num_parts: int

    def members(self, groups: Sequence[Sequence[int]]) -> list[int]:
        """Return the numbers of its members, whose programs are as few as may be.

        Raises:
          ConfigError: if there are more parts than members.
        """
        order = [i for group in groups for i in group]
        if self.num_parts > len(order):
            raise ConfigError(
                f"{self.num_parts} parts of a sweep of "
                f"{counted(len(order), 'member')}; expected no more parts than members"
            )
        ends = [
            len(order) * k // self.num_parts for k in (self.number - 1, self.number)
        ]
        return sorted(order[slice(*ends)])

    def folder(self, workdir: Path) -> Path:
        """Return the folder in which it is trained."""
        width = len(str(self.num_parts))
        return (
            workdir / json_files.PARTS / f"{self.number:0{width}}_of_{self.num_parts}"
        )


class Finished(NamedTuple):
    """What the members of a sweep have become."""

    rows: list[dict[str, Any]]  # a row per member, as `Sweep.rows`
    seconds: float  # of training
    compile_seconds: float
    num_examples: int  # that all members trained on, all steps together
    num_devices: int
    task: Task
    # By folder of variables, the CRC-32 of each array by name.
    checksums: dict[str, dict[str, int]]


def sweep(
    configs: Sequence[TrainConfig],
    data: data_lib.ImageData,
    *,
    workdir: str | Path,
    model: Any = None,
    options: RunOptions | None = None,
    exact: bool = True,
    train: bool = False,
    part: Part | None = None,
) -> list[dict[str, Any]]:
    """Train a sweep, and write everything to `workdir`; resume one that is there.

    Members that differ in numbers alone share a program, see `members`; where there are
    several programs, each has a folder in `workdir`. If `workdir` holds a
    finished sweep of fewer epochs, training continues from its end, as in `run.train`.

    Args:
      configs: of the members, on one data set.
      data: the images.
      workdir: receives config.json, environment.json, runs.jsonl (a row per member, as
        `Sweep.rows`), results.json, the members' variables, stacked, and sweep.png.
      model: the user's own; see `run.train`.
      options: as of `run.train`; by default on one device, unlike `RunOptions()`,
        which is on all. A sweep is neither streamed nor logged.
      exact: see `Sweep.rows`.
      train: see `Sweep.rows`.
      part: which of the members to train, into a folder of its own in `workdir`. They
        get the same numbers as in the whole sweep.

    Returns:
      The rows, in the order of `configs`; of a part, those of its members. Losses are
      in nats, accuracies shares of 1; None where a member has diverged, which is no
      error. Those of a finished sweep are read.

    Raises:
      TypeError: if configs are none.
      RunError: if `workdir` cannot take this sweep, or be written; nothing is
        overwritten.
      ConfigError: if configs do not make a sweep, do not fit the data or the model, or
        options do not fit one.
      DataError: if there are too few examples, or a channel to standardise is constant.
      Interrupted: on SIGTERM or Ctrl-C, after a checkpoint.

    Examples:
      >>> import dataclasses, tempfile
      >>> from bn_jax import data, runs
      >>> from bn_jax.training.config import TrainConfig
      >>> config = TrainConfig(model="mlp", epochs=1, train_examples=256)
      >>> configs = [dataclasses.replace(config, seed=seed) for seed in (0, 1)]
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     rows = runs.sweep(configs, data.load("sample"), workdir=workdir)
      epoch 1/1  2 of 2 members continue ...
      >>> [row["config"]["seed"] for row in rows]
      [0, 1]
    """
    options = RunOptions.given(options)
    workdir = paths.local(workdir, "workdir")
    if not isinstance(configs, Sequence) or not all(
        isinstance(config, TrainConfig) for config in configs
    ):
        raise TypeError(
            f"configs are a {type(configs).__name__}; expected a list of TrainConfig, "
            "one for each member"
        )
    if model is not None:
        configs = [own_models.named(config, model) for config in configs]
    whole = check(configs, data, model=model)
    config = identity(configs, data, exact=exact, train=train)
    grows = can_grow(configs)
    own = list(range(len(configs)))
    if part is not None:
        workdirs.check_free(workdir, config, repeat=True, grows=grows)
        own, workdir = part.members(whole), part.folder(workdir)
        config["part"] = list(part)
    groups = [[own[i] for i in g] for g in members.grouped([configs[i] for i in own])]
    devices = _devices(options, max(map(len, groups)))
    first = configs[0]
    network = make_network(first, Task.of(first, task.select(first, data)), model=model)
    allowed: dict[str, Any] = {"resume": options.resume, "repeat": True, "grows": grows}
    workdirs.check_free(workdir, config, **allowed)
    same_model.check(workdir, first, network)
    place = workdirs.held(workdir, config, **allowed)
    with interrupt.listening() as request, place:
        if (workdir / json_files.RESULTS).exists():
            results.check_finished(workdir, others=results.OF_A_SWEEP)
            if not workdirs.is_shorter(
                json_files.read_object(workdir / json_files.CONFIG), config
            ):
                return json_files.read_rows(workdir / json_files.ROWS)
            workdirs.set_results_aside(workdir)
        start = functools.partial(
            results.start_run, workdir, config, same_model.recorded(first, network)
        )
        if not (workdir / json_files.CONFIG).exists():
            start()
        of_member: dict[int, dict[str, Any]] = {}
        programs = []
        checksums = {}
        folders = folders_of(workdir, len(groups))
        for number, (folder, group) in enumerate(zip(folders, groups, strict=True), 1):
            folder.mkdir(exist_ok=True)
            if len(groups) > 1:
                print(f"program {number} of {len(groups)}", flush=True)
            (of_all,) = (g for g in whole if group[0] in g)
            program = Program(
                [configs[i] for i in group],
                data,
                whole=[configs[i] for i in of_all],
                model=model,
                devices=devices[: len(group)],
                options=options,
                identity={**config, "members": group},
                grows=grows,
                folder=folder,
            )
            of_group = program.train(start, request, exact=exact, train=train)
            of_member.update(zip(group, of_group, strict=True))
            programs.append(program)
            checksums[name_of_variables(workdir, folder)] = program.checksums
        rows = [of_member[i] for i in own]
        finish(
            workdir,
            [configs[i] for i in own],
            Finished(
                rows,
                seconds=sum(program.seconds for program in programs),
                compile_seconds=sum(p.sweep.compile_seconds for p in programs),
                num_examples=sum(program.num_examples for program in programs),
                num_devices=len(devices),
                task=programs[0].sweep.task,
                checksums=checksums,
            ),
            data_source=config["data"],
            is_part=part is not None,
        )
    return rows


def check(
    configs: Sequence[TrainConfig], data: data_lib.ImageData, *, model: Any = None
) -> list[list[int]]:
    """Refuse configs that make no sweep on these data.

    Returns:
      The numbers of the configs that share a program, group by group.

    Raises:
      ConfigError: saying what does not fit.
    """
    groups = members.grouped(configs)
    for name in ("batch_stats", "merged_stats"):
        others = {getattr(c, name) for c in configs} - {getattr(TrainConfig(), name)}
        if others:
            raise ConfigError(
                f"{name}={min(others)!r} in a sweep, whose members train on one device "
                "each; leave it out, or train a run of it on several devices"
            )
    for name in ("dataset", "train_examples", "validation"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise ConfigError(
                f"members of a sweep differ in {name}; they share the images in the "
                "devices' memory: train a sweep for each"
            )
    for group in groups:
        first = configs[group[0]]
        group_task = Task.of(first, task.select(first, data))
        for i in group:
            try:
                network = make_network(configs[i], group_task, model=model)
                if i == group[0]:  # the others are of the same shapes
                    network.check_fits(first.batch_size)
            except ConfigError as error:
                raise ConfigError(
                    f"{error} (member {i + 1} of {len(configs)}: {labels(configs)[i]})"
                ) from error
    return groups


def can_grow(configs: Sequence[TrainConfig]) -> bool:
    """Return whether the steps of a sweep are the first ones of a longer one."""
    return all(schedules.is_of_any_length(config.schedule) for config in configs)


def identity(
    configs: Sequence[TrainConfig],
    data: data_lib.ImageData,
    *,
    exact: bool,
    train: bool,
) -> dict[str, Any]:
    """Return the contents of a sweep's config.json: all choices behind its numbers."""
    source = task.select(configs[0], data).source
    return {**_common(configs), "data": source, "exact": exact, "train": train}


def finish(
    workdir: Path,
    configs: Sequence[TrainConfig],
    finished: Finished,
    *,
    data_source: str,
    is_part: bool = False,
) -> None:
    """Write the rows, but for a part the figure, and last of all results.json.

    Raises:
      RunError: if they cannot be written.
    """
    rows = finished.rows
    json_files.write_rows(workdir / json_files.ROWS, rows)
    if not is_part:
        from bn_jax import plots  # here, so that training starts sooner

        path = json_files.remove_link(workdir / "sweep.png")
        plots.members_by_epoch(_by_values(rows, configs), path)
    summary = {
        "members": len(configs),
        "examples": finished.num_examples,
        "examples_per_second": finished.num_examples / finished.seconds,
        "seconds": finished.seconds,
        "compile_seconds": finished.compile_seconds,
        "num_devices": finished.num_devices,
        "data_source": data_source,
        "task": finished.task.to_dict(),
        **_best(rows, configs),
    }
    results.finish_run(
        workdir, summary, others=results.OF_A_SWEEP, arrays=finished.checksums
    )


def _best(
    rows: Sequence[dict[str, Any]], configs: Sequence[TrainConfig]
) -> dict[str, Any]:
    """Return which member is best on the validation set at the end, if there is one."""
    scored = [
        (row["validation_accuracy"][-1], label)
        for row, label in zip(rows, labels(configs), strict=True)
        if row.get("validation_accuracy", [None])[-1] is not None
    ]
    if not scored:
        return {}
    accuracy, label = max(scored)
    return {"best_by_validation": label, "best_validation_accuracy": accuracy}


def load(workdir: str | Path, *, model: Any = None) -> list[Run]:
    """Read the members of a finished sweep.

    Args:
      workdir: the directory that `sweep` wrote.
      model: the user's own, of a sweep that it was passed to.

    Returns:
      A run for each member, in the order of the sweep's configs; its results are the
      member's row, and it has no `average`.

    Raises:
      RunError: if `workdir` holds none, files are damaged, or the model computes
        something else than that of the sweep.
      ConfigError: as `run.load` says.
    """
    workdir = workdirs.existing(workdir, "workdir")
    values = json_files.read_object(workdir / json_files.CONFIG)
    workdirs.check_no_experiment(workdir, values)
    if not workdirs.is_sweep(values):
        raise json_files.RunError(
            f"{workdir} holds a run, not a sweep; bn_jax.runs.load reads it"
        )
    checksums = results.check_finished(workdir, others=results.OF_A_SWEEP)
    rows = json_files.read_rows(workdir / json_files.ROWS)
    configs = [read_config(workdir, row["config"]) for row in rows]
    if model is not None:
        configs = [own_models.named(config, model) for config in configs]
    of_task = Task.from_dict(
        json_files.read_object(workdir / json_files.RESULTS)["task"]
    )
    groups = members.grouped(configs)
    runs: list[Any] = [None] * len(rows)
    for folder, group in zip(folders_of(workdir, len(groups)), groups, strict=True):
        networks = [make_network(configs[i], of_task, model=model) for i in group]
        like = _stacked_like(networks[0], len(group))
        known = checksums.get(name_of_variables(workdir, folder), {})
        stacked = checkpoint.load_variables(folder, like, known)
        for place, (i, network) in enumerate(zip(group, networks, strict=True)):
            own = jax.tree.map(lambda leaf, at=place: np.asarray(leaf[at]), stacked)
            runs[i] = Run(configs[i], network, own, _by_epoch(rows[i]), rows[i])
    same_model.check(workdir, configs[0], runs[0].network)
    return runs


def _stacked_like(network: Network, count: int) -> Any:
    """Return the shapes of the variables of so many members."""
    of_one = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(
        lambda v: jax.ShapeDtypeStruct((count, *v.shape), v.dtype), of_one
    )


def folders_of(workdir: Path, num_programs: int) -> list[Path]:
    """Return the folder of each program of a sweep."""
    if num_programs == 1:
        return [workdir]
    return [workdir / f"program{number}" for number in range(1, num_programs + 1)]


def name_of_variables(workdir: Path, folder: Path) -> str:
    """Return the key, in the checksums, of the variables in a program's folder."""
    return (folder / checkpoint.VARIABLES).relative_to(workdir).as_posix()


def _by_epoch(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a member's values by epoch as a run has them."""
    names = [name for name in EpochReport._fields if isinstance(row.get(name), list)]
    values = zip(*(row[name] for name in names), strict=True)
    return [
        {"epoch": epoch, **dict(zip(names, each, strict=True))}
        for epoch, each in enumerate(values, 1)
    ]


def _devices(options: RunOptions, num_members: int) -> list[jax.Device]:
    """Return the devices that share the members."""
    present = jax.local_devices()
    count = len(present) if options.devices == "all" else int(options.devices)
    if count > len(present) or jax.process_count() > 1:
        raise ConfigError(
            f"devices={options.devices} for a sweep; one process trains it, on at most "
            f"its own {counted(len(present), 'device')}"
        )
    if options.input == "stream":
        raise ConfigError(
            "input='stream' for a sweep, whose members share the data set in the "
            "devices' memory; leave out input"
        )
    if options.log != "none":
        raise ConfigError(
            f"log={options.log!r} for a sweep, whose members have a row each in "
            f"{json_files.ROWS}; leave out log"
        )
    return present[: min(count, num_members)]


def _common(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return the fields that configs share, and lists of those that differ."""
    return {
        field.name: common([getattr(config, field.name) for config in configs])
        for field in dataclasses.fields(TrainConfig)
    }


def common(values: list[Any]) -> Any:
    """Return the value that all are, or the list of them."""
    return values if len(set(values)) > 1 else values[0]


def _by_values(
    rows: Sequence[dict[str, Any]], configs: Sequence[TrainConfig]
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of members that differ in their seed alone together, by label."""
    names = [name for name in members.differing(configs) if name != "seed"]
    found: dict[str, list[dict[str, Any]]] = {}
    for config, row in zip(configs, rows, strict=True):
        label = ", ".join(f"{n}={config.value(n)}" for n in names)
        found.setdefault(label, []).append(row)
    return found


def labels(configs: Sequence[TrainConfig]) -> list[str]:
    """Return a label of each member: the fields in which members differ."""
    names = members.differing(configs)
    return [", ".join(f"{n}={c.value(n)}" for n in names) for c in configs]
