"""A sweep on disk: its members trained into one folder, a row for each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bn_jax import data as data_lib
from bn_jax.runs import results
from bn_jax.runs import checkpoint, interrupt
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.fields import ConfigError
from bn_jax.training.members import SWEPT
from bn_jax.training.state import init_variables, make_model
from bn_jax.training.sweep import Progress, Sweep

ROWS = "runs.jsonl"


def sweep_into(
    workdir: str | Path,
    configs: Sequence[TrainConfig],
    data: data_lib.ImageData,
    options: RunOptions | None = None,
    *,
    exact: bool = True,
    train: bool = False,
) -> list[dict[str, Any]]:
    """Train a sweep, and write everything to `workdir`; go on where it was stopped.

    Args:
      workdir: receives config.json, environment.json, runs.jsonl (a row per member, as
        `Sweep.rows`), results.json, the members' variables, stacked, and sweep.png.
      configs: of the members.
      data: the images.
      options: how to carry it out; by default on one device.
      exact: as for `Sweep.rows`.
      train: as for `Sweep.rows`.

    Returns:
      The rows. Those of a finished sweep are read.

    Raises:
      RunError: if `workdir` cannot take this sweep; nothing is overwritten.
      ConfigError: if configs do not make a sweep, or options do not fit one.
      Interrupted: on SIGTERM or Ctrl-C, after a checkpoint.
    """
    options = options or RunOptions(devices="1")
    workdir = Path(workdir)
    devices = _devices(options, len(configs))
    data = data.with_train_examples(configs[0].train_examples)
    steps_per_epoch = len(data.train.labels) // configs[0].batch_size
    checkpoint_steps = options.checkpoint_steps(steps_per_epoch)
    config = {**_common(configs), "data": data.source, "exact": exact, "train": train}
    with interrupt.listening() as request, results.locked(workdir):
        results.start_run(workdir, config, resume=options.resume, repeat=True)
        if (workdir / results.RESULTS).exists():
            return results.read_rows(workdir / ROWS)
        sweep = Sweep(configs, data, devices=devices, checkpoint_steps=checkpoint_steps)
        with contextlib.closing(checkpoint.Checkpoints(workdir, config)) as checkpoints:
            _restore(sweep, checkpoints)
            _train(sweep, checkpoints, request, checkpoint_steps)
        from bn_jax import plots  # here, so that training starts sooner

        rows = sweep.rows(exact=exact, train=train)
        progress = sweep.progress()
        checkpoint.save_variables(workdir, progress.state.variables)
        results.write_rows(workdir / ROWS, rows)
        plots.members_by_epoch(rows, _labels(configs), workdir / "sweep.png")
        num_examples = len(configs) * sweep.num_steps * configs[0].batch_size
        summary = {
            "members": len(configs),
            "examples_per_second": num_examples / progress.seconds,
            "seconds": progress.seconds,
            "compile_seconds": sweep.compile_seconds,
            "num_devices": len(devices),
            "data_source": data.source,
        }
        results.write_json(workdir / results.RESULTS, summary)
    return rows


def load_variables(
    workdir: str | Path,
    *,
    num_classes: int = 10,
    images_shape: tuple[int, ...] = (28, 28, 1),
) -> dict[str, Any]:
    """Return the variables of a finished sweep's members, stacked NumPy arrays.

    Args:
      workdir: the directory that `sweep_into` wrote.
      num_classes: of the data set; 10 in all those of `bn_jax.data`.
      images_shape: `[H, W, C]` of the data set, likewise.

    Raises:
      RunError: if `workdir` holds none, or they are damaged or of another model.
    """
    rows = results.read_rows(Path(workdir) / ROWS)
    model = make_model(
        TrainConfig.from_dict(rows[0]["config"]), num_classes=num_classes
    )
    of_one = init_variables(model, jax.random.key(0), images_shape)
    like = jax.tree.map(lambda v: np.zeros((len(rows), *v.shape), v.dtype), of_one)
    variables = checkpoint.load_variables(Path(workdir), like)
    stacked: dict[str, Any] = jax.tree.map(np.asarray, variables)
    return stacked


def _devices(options: RunOptions, num_members: int) -> list[jax.Device]:
    """Return the devices that share the members."""
    present = jax.local_devices()
    count = len(present) if options.devices == "all" else int(options.devices)
    if count > len(present) or jax.process_count() > 1:
        raise ConfigError(
            f"devices={options.devices} for a sweep; one process trains it, on at most "
            f"its own {len(present)} devices"
        )
    if options.input == "stream":
        raise ConfigError(
            "input='stream' for a sweep, whose members share the data set in the "
            "devices' memory; leave out --input"
        )
    return present[: min(count, num_members)]


def _common(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return what configs share, and lists of what they differ in."""
    common: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        values = [getattr(config, field.name) for config in configs]
        is_swept = field.name in SWEPT and len(set(values)) > 1
        common[field.name] = values if is_swept else values[0]
    return common


def _labels(configs: Sequence[TrainConfig]) -> list[str]:
    """Return what tells each member from the others."""
    differing = [
        name for name in SWEPT if len({getattr(config, name) for config in configs}) > 1
    ]
    return [
        ", ".join(f"{name}={getattr(config, name)}" for name in differing)
        for config in configs
    ]


_ARRAYS = ("step_losses", "step_accuracies", "test_losses", "test_accuracies")


def _restore(sweep: Sweep, checkpoints: checkpoint.Checkpoints) -> None:
    parts = checkpoints.latest_parts()
    if parts is None:
        return
    step, arrays, run = parts
    own = {name: arrays.pop(name) for name in _ARRAYS}
    state = checkpoints.unflat(step, arrays, sweep.progress().state)
    sweep.restore(Progress(state, seconds=run["seconds"], **own))
    print(f"going on from step {sweep.step} of {sweep.num_steps}", flush=True)


def _save(sweep: Sweep, checkpoints: checkpoint.Checkpoints) -> None:
    progress = sweep.progress()
    arrays = {name: getattr(progress, name) for name in _ARRAYS}
    arrays |= checkpoint.flat(progress.state)
    checkpoints.save_parts(sweep.step, arrays, {"seconds": progress.seconds})


def _train(
    sweep: Sweep,
    checkpoints: checkpoint.Checkpoints,
    request: interrupt.StopRequest,
    checkpoint_steps: int | None,
) -> None:
    """Train to the end, showing progress and saving, unless asked to stop."""
    count = len(sweep.configs)
    with tqdm(total=sweep.num_steps, unit="step", disable=None, leave=False) as bar:
        bar.update(sweep.step)
        bar.set_postfix_str("compiling")
        for epoch in sweep.train():
            bar.update(sweep.step - bar.n)
            if epoch is not None:
                tested = sweep.progress().test_accuracies[:, epoch - 1]
                alive = np.isfinite(tested)
                best = f"{tested[alive].max():.3f}" if alive.any() else "none"
                bar.write(
                    f"epoch {epoch}/{sweep.configs[0].epochs}  {alive.sum()} of "
                    f"{count} members go on  best test accuracy {best}"
                )
                bar.set_postfix_str("")
            stop = request.signum is not None
            if stop or (checkpoint_steps and sweep.step % checkpoint_steps == 0):
                _save(sweep, checkpoints)
            if stop and sweep.step < sweep.num_steps:
                raise interrupt.Interrupted(
                    request.signum or 0,
                    f"stopped at step {sweep.step} of {sweep.num_steps}; the same "
                    "command goes on from there",
                )
