"""The files of a run while it trains: read at its start, written until its end."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bn_jax.runs import (
    checkpoint,
    json_files,
    logs,
    provenance,
    results,
    same_model,
    workdirs,
)
from bn_jax.runs import summary as summary_lib
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop, merging, schedules
from bn_jax.training.config import OWN_MODEL, TrainConfig
from bn_jax.training.optimizers import make_schedule
from bn_jax.training.progress import EpochReport, Progress
from bn_jax.training.state import TrainState


class Files:
    """What the primary reads, writes and shows."""

    def __init__(
        self,
        workdir: Path,
        trainer: loop.Trainer,
        log: Sequence[str],
        start: str | None = None,
    ) -> None:
        self._workdir, self._config = workdir, trainer.config
        self._start = start  # checksum of the variables that another run has left
        self._log = log
        self._logs: logs.Logs | None = None
        self._trainer, self._data = trainer, trainer.data
        self._checkpoints: checkpoint.Checkpoints | None = None
        self._like: TrainState | None = None
        self._grows = schedules.is_of_any_length(trainer.config.schedule)
        self._bar = tqdm(
            total=trainer.num_steps, unit="step", disable=None, leave=False
        )

    def held(self, *, resume: bool) -> contextlib.AbstractContextManager[Path]:
        """Return the context that holds the directory for this run.

        Raises:
          RunError: if it cannot take this run, or one there is of another model.
        """
        config = self._config.to_dict()
        options: dict[str, Any] = {
            "resume": resume,
            "grows": self._grows,
            "data_source": self._data.source,
        }
        workdirs.check_free(self._workdir, config, **options)
        same_model.check(self._workdir, self._config, self._trainer.network)
        return workdirs.held(self._workdir, config, **options)

    def start(self, like: TrainState) -> Progress | None:
        """Make the directory ready; return the progress to resume from."""
        self._like = like
        finished = (self._workdir / json_files.RESULTS).exists()
        progress = None
        if (self._workdir / checkpoint.CHECKPOINTS).exists():
            progress = self._open().latest(like)
        if finished and progress is None:
            raise RunError(
                f"{self._workdir} holds a finished run of fewer epochs, and no "
                "checkpoint to go on from; give another workdir"
            )
        if finished:
            workdirs.set_results_aside(self._workdir)
        of_model = same_model.recorded(self._config, self._trainer.network)
        start = self._start
        if progress is not None:  # what is in the folder of `init_from` now is not it
            there = json_files.read_object(self._workdir / json_files.ENVIRONMENT)
            start = there.get(provenance.START)
        if start is not None:
            of_model[provenance.START] = start
        results.start_run(self._workdir, self._config.to_dict(), of_model)
        history = () if progress is None else progress.history
        rows = (json_files.finite(report.to_row()) for report in history)
        results.write_metrics(self._workdir, rows)
        step = 0 if progress is None else len(progress.step_losses)
        offsets = {}
        if self._log:
            image = self._data.train.images[:1]
            network = self._trainer.network
            stats = jax.tree.map(lambda leaf: leaf[0], like.batch_stats)
            variables = {"params": like.params, "batch_stats": stats}
            offsets = summary_lib.scale_offsets(network, variables, image)
        self._logs = logs.Logs(self._log, self._workdir, step, offsets)
        return progress

    def _open(self) -> checkpoint.Checkpoints:
        if self._checkpoints is None:
            train = self._data.train
            key = jax.random.key_data(self._trainer.order_key)
            identity = {
                **self._config.to_dict(),
                "data": f"{self._data.name}, {len(train.labels)} images",
                "key": np.asarray(key).tolist(),
            }
            self._checkpoints = checkpoint.Checkpoints(
                self._workdir, identity, grows=self._grows
            )
        return self._checkpoints

    def announce(self, progress: Progress | None) -> None:
        """Print the devices and the starting step."""
        placement, batch_size = self._trainer.placement, self._config.batch_size
        num_devices = len(placement.devices)
        if num_devices > 1:
            processes = jax.process_count()
            of = "of one process" if processes == 1 else f"of {processes} processes"
            self._bar.write(
                f"{num_devices} devices {of} by "
                f"{placement.parallel}, {batch_size // num_devices} of {batch_size} "
                f"images each, statistics {self._config.batch_stats}"
            )
        if self._trainer.stream:
            self._bar.write("training images are streamed to the devices")
        if progress is not None:
            step = len(progress.step_losses)
            self._bar.write(f"resuming from step {step} of {self._trainer.num_steps}")
            self._bar.update(step)
        self._bar.set_postfix_str("compiling")

    def add_epoch(self, report: EpochReport, variables: Any) -> None:
        """Write and show an epoch's line, and log it.

        Args:
          report: of the epoch.
          variables: of the model at its end, where there are logs.
        """
        results.append_metrics(self._workdir, json_files.finite(report.to_row()))
        if self._logs is not None and self._log:
            rate = make_schedule(
                self._config, steps_per_epoch=self._trainer.steps_per_epoch
            )
            self._logs.add(report, float(rate(report.step - 1)), variables)
        self._bar.write(_line(report, self._config.epochs))

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        self._open().save(progress)

    def show(self, trainer: loop.Trainer) -> None:
        """Move the progress bar."""
        self._bar.set_postfix_str(f"loss {trainer.last_loss:.3f}")
        self._bar.update(trainer.step - self._bar.n)
        if trainer.step == trainer.num_steps:
            self._bar.set_postfix_str("statistics of the whole training set")

    def best(self) -> tuple[EpochReport, dict[str, Any]] | None:
        """Return report and variables of the epoch that is best on the validation set.

        None without such a set, or without a checkpoint at an epoch's end.
        """
        if not self._config.validation or self._checkpoints is None:
            return None
        assert self._like is not None  # `start` has been called
        history = self._trainer.history
        progress = self._checkpoints.best(history, self._like)
        if progress is None:
            return None
        step, state = len(progress.step_losses), progress.state
        (report,) = (report for report in history if report.step == step)
        merged = merging.merged(state.batch_stats, self._config.merged_stats)
        return report, {"params": state.params, "batch_stats": merged}

    def finish(
        self,
        metrics: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> None:
        """Write the results, last of all their file.

        Args:
          metrics: a row for each epoch.
          summary: the contents of results.json.
          variables: by name of the folder; None for none.
        """
        from bn_jax import plots  # here, so that training starts sooner

        arrays = {
            name: checkpoint.save_variables(self._workdir, of_name, name=name)
            for name, of_name in variables.items()
            if of_name is not None
        }
        path = json_files.remove_link(self._workdir / "curves.png")
        plots.curves(metrics, summary, path, title=_title(self._config))
        if summary["gamma_beta"]:
            path = json_files.remove_link(self._workdir / "gamma_beta.png")
            plots.gamma_beta(summary["gamma_beta"], path)
        self.close()  # an error in writing a checkpoint comes up before the results
        results.finish_run(
            self._workdir, summary, others=results.OF_A_RUN, arrays=arrays
        )

    def close(self) -> None:
        """Wait until checkpoints are written."""
        self._bar.close()
        if self._logs is not None:
            self._logs.close()
        if self._checkpoints is not None:
            opened, self._checkpoints = self._checkpoints, None
            opened.close()


def _title(config: TrainConfig) -> str:
    # A model that was passed in has norms of its own, which the config does not know.
    is_own = config.model.startswith(OWN_MODEL)
    norm = "" if is_own else f"norm {config.norm}, "
    smoothed = ", train loss of smoothed labels" * (config.label_smoothing > 0)
    return f"{config.model}, {norm}rate {config.learning_rate:g}{smoothed}"


def _line(report: EpochReport, epochs: int) -> str:
    validated = ""
    if report.validation_accuracy is not None:
        validated = f"validation accuracy {report.validation_accuracy:.3f}  "
    return (
        f"epoch {report.epoch:{len(str(epochs))}}/{epochs}  loss {report.loss:.3f}  "
        f"train accuracy {report.train_accuracy:.3f}  {validated}"
        f"test accuracy {report.test_accuracy:.3f}  "
        f"{report.examples_per_second:,.0f} examples/s"
    )
