"""The members of a sweep that share a program, trained in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bn_jax import data as data_lib
from bn_jax.runs import checkpoint, interrupt
from bn_jax.training import task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.sweep import Progress, Sweep

_STEPS = ("step_losses", "step_accuracies")


class Program:
    """The members of a sweep that share a program, and their folder."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        data: data_lib.ImageData,
        *,
        whole: Sequence[TrainConfig],
        model: Any,
        devices: Sequence[jax.Device],
        options: RunOptions,
        identity: dict[str, Any],
        grows: bool,
        folder: Path,
    ) -> None:
        num_examples = len(task.select(configs[0], data).train.labels)
        self._checkpoint_steps = options.checkpoint_steps(
            num_examples // configs[0].batch_size
        )
        self.sweep = Sweep(
            configs,
            data,
            model=model,
            devices=devices,
            checkpoint_steps=self._checkpoint_steps,
            whole=whole,
        )
        self._folder, self._identity, self._grows = folder, identity, grows

    @property
    def num_examples(self) -> int:
        """Number of examples that the members train on, all steps together."""
        first = self.sweep.configs[0]
        return len(self.sweep.configs) * self.sweep.num_steps * first.batch_size

    def train(
        self,
        start: Callable[[], None],
        request: interrupt.StopRequest,
        *,
        exact: bool,
        train: bool,
    ) -> list[dict[str, Any]]:
        """Train to the end from where the folder's checkpoints are; return the rows.

        Args:
          start: called when they have been read.
          request: says when to stop.
          exact: see `sweeps.sweep`.
          train: see `sweeps.sweep`.
        """
        sweep = self.sweep
        with contextlib.closing(
            checkpoint.Checkpoints(self._folder, self._identity, grows=self._grows)
        ) as checkpoints:
            _restore(sweep, checkpoints)
            start()
            _train(sweep, checkpoints, request, self._checkpoint_steps)
        progress = sweep.progress()
        self.seconds = progress.seconds
        self.checksums = checkpoint.save_variables(
            self._folder, progress.state.variables
        )
        return sweep.rows(exact=exact, train=train)


def _restore(sweep: Sweep, checkpoints: checkpoint.Checkpoints) -> None:
    parts = checkpoints.parts()
    if parts is None:
        return
    step, arrays, run = parts
    now = sweep.progress()
    scores = {
        # Of a sweep of fewer epochs, there are none of the later ones.
        name: np.concatenate(
            [found := arrays.pop(f"scores/{name}"), of[:, found.shape[1] :]], 1
        )
        for name, of in now.scores.items()
    }
    losses, accuracies = (arrays.pop(name) for name in _STEPS)
    state = checkpoints.unflat(step, arrays, now.state)
    sweep.restore(Progress(state, losses, accuracies, scores, run["seconds"]))
    print(f"resuming from step {sweep.step} of {sweep.num_steps}", flush=True)


def _save(sweep: Sweep, checkpoints: checkpoint.Checkpoints) -> None:
    progress = sweep.progress()
    arrays = {name: getattr(progress, name) for name in _STEPS}
    arrays |= {f"scores/{name}": of for name, of in progress.scores.items()}
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
                scores = sweep.progress().scores
                split = "validation" if "validation_accuracy" in scores else "test"
                scored = scores[f"{split}_accuracy"][:, epoch - 1]
                alive = np.isfinite(scored)
                best = f"{scored[alive].max():.3f}" if alive.any() else "none"
                bar.write(
                    f"epoch {epoch}/{sweep.configs[0].epochs}  {alive.sum()} of "
                    f"{count} members continue  best {split} accuracy {best}"
                )
                bar.set_postfix_str("")
            stop = request.signum is not None
            is_due = checkpoint_steps and (
                sweep.step % checkpoint_steps == 0 or sweep.step == sweep.num_steps
            )
            if stop or is_due:
                _save(sweep, checkpoints)
            if stop and sweep.step < sweep.num_steps:
                raise interrupt.Interrupted(
                    request.signum or 0,
                    f"stopped at step {sweep.step} of {sweep.num_steps}; the same "
                    "command resumes from there",
                )
