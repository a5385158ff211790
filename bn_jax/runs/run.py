"""A run on disk: train a config into a working directory, and read it back."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from tqdm import tqdm

from bn_jax import data as data_lib
from bn_jax.runs import results
from bn_jax.runs.results import RunError
from bn_jax.runs import checkpoint, distributed, interrupt
from bn_jax.training import loop, parallel
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.loop import EpochReport, Progress
from bn_jax.training.state import TrainState, init_variables, make_model

# Training images that take more than this are streamed by default.
MAX_STORED_BYTES = 10**9


class Run(NamedTuple):
    """A finished run."""

    config: TrainConfig
    model: nn.Module
    variables: Any
    metrics: list[dict[str, Any]]  # one row per epoch, as `loop.EpochReport`
    results: dict[str, Any]  # as results.json


def train_into(
    workdir: str | Path,
    config: TrainConfig,
    data: data_lib.ImageData,
    options: RunOptions | None = None,
) -> Run:
    """Train, evaluate, and write everything to `workdir`; go on where it was stopped.

    Shows a progress bar on a terminal, and prints a line per epoch. With several
    processes, each calls this; process 0 alone reads and writes.

    Args:
      workdir: the run's directory.
      config: what to train.
      data: the images.
      options: how to carry it out; by default on one device.

    Raises:
      RunError: if `workdir` cannot take this run; nothing is overwritten.
      ConfigError: if the config does not fit the data or the devices.
      FloatingPointError: if the loss is not finite; the last checkpoint is kept.
      Interrupted: on SIGTERM or Ctrl-C, after a checkpoint.
    """
    options = options or RunOptions(devices="1")
    data = data.with_train_examples(config.train_examples)
    loop.check_fits(config, data)
    placement = parallel.place(
        config, devices=options.devices, parallel=options.parallel
    )
    steps_per_epoch = len(data.train.labels) // config.batch_size
    checkpoint_steps = options.checkpoint_steps(steps_per_epoch)
    trainer = loop.Trainer(
        config,
        data,
        placement=placement,
        stream=_is_streamed(options, data),
        checkpoint_steps=checkpoint_steps,
    )
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(interrupt.listening())
        like = trainer.progress().state  # all processes take part
        files = None
        if distributed.is_primary():
            files = _Files(Path(workdir), config, data, trainer)

        def start() -> bytes:
            assert files is not None  # this is called on the primary alone
            stack.enter_context(results.locked(workdir))
            return checkpoint.to_bytes(files.start(like, resume=options.resume))

        started = distributed.on_primary(start)
        progress = checkpoint.from_bytes(started, like)
        if progress is not None:
            trainer.restore(progress)
        if files is not None:
            stack.callback(files.close)
            files.announce(progress)
        _train(trainer, files, request, checkpoint_steps)
        score = trainer.score()
        variables = trainer.state().variables
        summary = _summary(trainer, score, variables)
        rows = [report._asdict() for report in trainer.history]
        run = Run(config, trainer.model, variables, rows, summary)
        if files is not None:
            files.finish(run)
        distributed.any_process(False)  # wait for the primary
    return run


def train_or_load(
    workdir: str | Path,
    config: TrainConfig,
    data: data_lib.ImageData,
    options: RunOptions | None = None,
) -> Run | None:
    """Read the finished run in `workdir`, or train it there, or go on with it.

    Args:
      workdir: as for `train_into`.
      config: as for `train_into`.
      data: as for `train_into`.
      options: as for `train_into`.

    Returns:
      The run; None on processes other than the primary, where it was read.

    Raises:
      RunError: if `workdir` holds another run, or as `train_into` says.
    """
    workdir = Path(workdir)
    data = data.with_train_examples(config.train_examples)
    done = distributed.on_primary(
        lambda: b"done" if (workdir / results.RESULTS).exists() else b""
    )
    if not done:
        return train_into(workdir, config, data, options)
    if not distributed.is_primary():
        return None
    run = load(workdir)
    faults = results.differences(
        {**run.config.to_dict(), "data": run.results["data_source"]},
        {**config.to_dict(), "data": data.source},
    )
    if faults:
        raise RunError(
            f"{workdir} holds another run ({'; '.join(faults)}); give another --workdir"
        )
    return run


def _is_streamed(options: RunOptions, data: data_lib.ImageData) -> bool:
    if options.input == "auto":
        return data.train.images.nbytes > MAX_STORED_BYTES
    return options.input == "stream"


def _train(
    trainer: loop.Trainer,
    files: _Files | None,
    request: interrupt.StopRequest,
    checkpoint_steps: int | None,
) -> None:
    """Train to the end, writing what comes up, unless asked to stop."""
    for report in trainer.train():
        if files is not None and report is not None:
            files.add_epoch(report)
        stop = distributed.any_process(request.signum is not None)
        is_due = checkpoint_steps and trainer.step % checkpoint_steps == 0
        if stop or is_due or trainer.step == trainer.num_steps:
            progress = trainer.progress()  # all processes take part
            if files is not None and (stop or checkpoint_steps is not None):
                files.save(progress)
        if stop and trainer.step < trainer.num_steps:
            raise interrupt.Interrupted(
                request.signum or signal.SIGTERM,
                f"stopped at step {trainer.step} of {trainer.num_steps}; the same "
                "command goes on from there",
            )
        if files is not None:
            files.show(trainer)


class _Files:
    """What the primary reads, writes and shows."""

    def __init__(
        self,
        workdir: Path,
        config: TrainConfig,
        data: data_lib.ImageData,
        trainer: loop.Trainer,
    ) -> None:
        self._workdir, self._config = workdir, config
        self._trainer, self._data = trainer, data
        self._checkpoints: checkpoint.Checkpoints | None = None
        self._bar = tqdm(
            total=trainer.num_steps, unit="step", disable=None, leave=False
        )

    def start(self, like: TrainState, *, resume: bool) -> Progress | None:
        """Make the directory ready; return what there is to go on from."""
        results.start_run(self._workdir, self._config.to_dict(), resume=resume)
        progress = None
        if (self._workdir / checkpoint.CHECKPOINTS).exists():
            progress = self._open().latest(like)
        history = () if progress is None else progress.history
        results.write_metrics(self._workdir, (r._asdict() for r in history))
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
            self._checkpoints = checkpoint.Checkpoints(self._workdir, identity)
        return self._checkpoints

    def announce(self, progress: Progress | None) -> None:
        """Say on what the run goes, and from where."""
        placement, batch_size = self._trainer.placement, self._config.batch_size
        num_devices = len(placement.devices)
        if num_devices > 1:
            self._bar.write(
                f"{num_devices} devices of {jax.process_count()} process(es) by "
                f"{placement.parallel}, {batch_size // num_devices} of {batch_size} "
                f"images each, statistics {self._config.batch_stats}"
            )
        if self._trainer.stream:
            self._bar.write("training images are streamed to the devices")
        if progress is not None:
            step = len(progress.step_losses)
            self._bar.write(f"going on from step {step} of {self._trainer.num_steps}")
            self._bar.update(step)
        self._bar.set_postfix_str("compiling")

    def add_epoch(self, report: EpochReport) -> None:
        """Write and show an epoch's line."""
        results.append_metrics(self._workdir, report._asdict())
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

    def finish(self, run: Run) -> None:
        """Write the results, last of all their file."""
        from bn_jax import plots  # here, so that training starts sooner

        checkpoint.save_variables(self._workdir, run.variables)
        plots.curves(run.metrics, run.results, self._workdir / "curves.png")
        if run.results["gamma_beta"]:
            path = self._workdir / "gamma_beta.png"
            plots.gamma_beta(run.results["gamma_beta"], path)
        self.close()  # an error in writing a checkpoint comes up before the results
        results.write_json(self._workdir / results.RESULTS, run.results)

    def close(self) -> None:
        """Wait until checkpoints are written."""
        self._bar.close()
        if self._checkpoints is not None:
            opened, self._checkpoints = self._checkpoints, None
            opened.close()


def _summary(
    trainer: loop.Trainer, score: loop.Score, variables: Any
) -> dict[str, Any]:
    """Return what results.json holds."""
    last = trainer.history[-1]
    seconds = sum(report.seconds for report in trainer.history)
    losses = trainer.progress().step_losses
    num_examples = len(trainer.data.train.labels)
    if trainer.stream:
        num_examples = min(num_examples, loop.MAX_STREAMED_EXAMPLES)
    return {
        "train_loss": last.loss,
        "train_accuracy": last.train_accuracy,
        **score._asdict(),
        "exact_statistics_examples": num_examples,
        "examples_per_second": last.step * trainer.config.batch_size / seconds,
        "compile_seconds": trainer.compile_seconds,
        "num_devices": len(trainer.placement.devices),
        "num_processes": jax.process_count(),
        "data_source": trainer.data.source,
        "first_step_losses": losses[:20].astype(float).tolist(),
        "gamma_beta": gamma_beta(variables),
    }


def load(
    workdir: str | Path,
    *,
    num_classes: int = 10,
    images_shape: tuple[int, ...] = (28, 28, 1),
) -> Run:
    """Read a finished run.

    Args:
      workdir: the directory that `train_into` wrote.
      num_classes: of the data set; 10 in all those of `bn_jax.data`.
      images_shape: `[H, W, C]` of the data set, likewise.

    Raises:
      RunError: if the directory does not hold a finished run, or files are damaged.
      ConfigError: if its config is of another version of the program.
    """
    workdir = Path(workdir)
    config = TrainConfig.from_dict(results.read_object(workdir / results.CONFIG))
    summary = results.read_object(workdir / results.RESULTS)
    model = make_model(config, num_classes=num_classes)
    like = init_variables(model, jax.random.key(0), images_shape)
    variables = checkpoint.load_variables(workdir, like)
    return Run(config, model, variables, results.read_metrics(workdir), summary)


def gamma_beta(variables: Any) -> dict[str, dict[str, list[float]]]:
    """Return gamma and beta of each normalisation layer, by the layer's name."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    layers = {
        path.rpartition("/")[0]
        for path in traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    }
    return {
        layer: {
            greek: np.asarray(params[f"{layer}/{name}"]).astype(float).tolist()
            for greek, name in (("gamma", "scale"), ("beta", "bias"))
            if f"{layer}/{name}" in params
        }
        for layer in sorted(layers)
    }


def _line(report: loop.EpochReport, epochs: int) -> str:
    return (
        f"epoch {report.epoch:{len(str(epochs))}}/{epochs}  loss {report.loss:.3f}  "
        f"train accuracy {report.train_accuracy:.3f}  "
        f"test accuracy {report.test_accuracy:.3f}  "
        f"{report.examples_per_second:,.0f} examples/s"
    )
