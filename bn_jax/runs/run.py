"""A run on disk: train a config into a working directory, and read it back."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from bn_jax import data as data_lib
from bn_jax import paths
from bn_jax.fields import ConfigError
from bn_jax.runs import checkpoint, distributed, interrupt, logs, results
from bn_jax.runs import summary as summary_lib
from bn_jax.runs.results import RunError
from bn_jax.training import loop, own_models, parallel, schedules, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.loop import EpochReport, Progress
from bn_jax.training.optimizers import make_schedule
from bn_jax.training.state import Network, TrainState
from bn_jax.training.task import Task, make_network
from bn_jax.version import __version__

# Training images that take more than this are streamed by default.
MAX_STORED_BYTES = 10**9


class Run(NamedTuple):
    """A finished run.

    `variables` are `{"params": ..., "batch_stats": ...}`, with one moving average a
    layer whatever the number of devices. In `metrics` and `results` losses are in nats,
    accuracies shares of 1, times in seconds; None is a number that is not finite, or
    could not be measured.
    """

    config: TrainConfig
    network: Network
    variables: Any
    metrics: list[dict[str, Any]]  # one row per epoch, as `loop.EpochReport`
    results: dict[str, Any]  # as results.json
    average: Any = None  # of the parameters, like them; None where none was kept

    def predict(self, images: Any) -> jax.Array:
        """Return the logits of images in prediction mode.

        Args:
          images: `[N, H, W, C]` of the data set's H, W and C, as bytes: integers from 0
            to 255, which are scaled here as they were in training.

        Returns:
          Logits `[N, classes]`.

        Raises:
          ValueError: if images are of another shape, or no integers.
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        expected = self.network.image_shape
        if images.shape[1:] != expected or not np.issubdtype(images.dtype, np.integer):
            raise ValueError(
                f"images of shape {list(images.shape)} and dtype {images.dtype}; "
                f"expected bytes [N, {', '.join(map(str, expected))}], 0 to 255: of "
                "images that are scaled already, run.network.model.apply("
                "run.variables, images, train=False) gives the logits"
            )
        return self.network.predict(self.variables, images)


def train(
    config: TrainConfig,
    data: data_lib.ImageData,
    *,
    model: Any = None,
    workdir: str | Path,
    options: RunOptions | None = None,
) -> Run:
    """Train, evaluate, and write everything to `workdir`; resume a run that is there.

    If `workdir` holds a finished run of fewer epochs and the schedule is constant,
    training continues from its end. Its results stay in `results_N_epochs.json`.

    Shows a progress bar on a terminal, and prints a line per epoch. With several
    processes, each calls this; process 0 alone reads and writes `workdir`.

    Args:
      config: what to train.
      data: the images.
      model: your own Linen module, called as `model(images, train=...)`, NNX module, or
        function of `nnx.Rngs` that makes one; by default the one that `config` names.
        An NNX module starts from the parameters that it holds, a Linen module from its
        initializers or from another run (`config.init_from`). On several devices by
        pmap its norms need `axis_name="data"`; by jit they need none.
      workdir: the run's directory.
      options: how to carry it out, a `bn_jax.training.config.RunOptions`, such as
        `RunOptions(devices="2")`; by default on one device, unlike `RunOptions()`,
        which is on all.

    Returns:
      The run, on every process.

    Raises:
      RunError: if `workdir` cannot take this run, or be written; nothing is
        overwritten. Also if `config.init_from` holds no finished run.
      ConfigError: if the config does not fit the data, the model or the devices, a log
        needs a package that is not installed, or `workdir` is no path of this machine.
      DataError: if there are too few examples, or a channel to standardise is constant.
      DistributedError: if processes differ; on the others, if process 0 cannot start.
      FloatingPointError: if the loss, a parameter or the test loss is not finite; the
        last checkpoint is kept.
      Interrupted: on SIGTERM or Ctrl-C, after a checkpoint.

    Examples:
      >>> import tempfile
      >>> from bn_jax import data, runs
      >>> from bn_jax.training.config import TrainConfig
      >>> config = TrainConfig(model="mlp", epochs=1, train_examples=256)
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     run = runs.train(config, data.load("sample"), workdir=workdir)
      epoch 1/1  loss ...
      >>> len(run.metrics), sorted(run.variables)
      (1, ['batch_stats', 'params'])
    """
    workdir = paths.local(workdir, "workdir")
    options = options or RunOptions(devices="1")
    if model is not None:
        config = own_models.named(config, model)
    logs.check(options.logs())
    distributed.check_same(_agreed(config, options, data))
    selected = task.select(config, data)
    earlier = load(config.init_from, model=model) if config.init_from else None
    placement = parallel.place(
        config, devices=options.devices, parallel=options.parallel
    )
    steps_per_epoch = len(selected.train.labels) // config.batch_size
    checkpoint_steps = options.checkpoint_steps(steps_per_epoch)
    trainer = loop.Trainer(
        config,
        data,
        model=model,
        placement=placement,
        stream=_is_streamed(options, selected),
        checkpoint_steps=checkpoint_steps,
        start=None if earlier is None else earlier.variables,
    )
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(interrupt.listening())
        like = trainer.progress().state  # all processes take part
        files = None
        if distributed.is_primary():
            files = _Files(workdir, trainer, options.logs())

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
        _train(trainer, files, request, checkpoint_steps, bool(options.logs()))
        score = trainer.score()
        state = trainer.state()
        summary = summary_lib.summary(trainer, score, state.variables)
        rows = [results.finite(report.to_row()) for report in trainer.history]
        run = Run(
            config,
            trainer.network,
            state.variables,
            rows,
            summary,
            state.average or None,
        )
        if files is not None:
            files.finish(run)
        distributed.any_process(False)  # wait for the primary
    return run


def train_or_load(
    config: TrainConfig,
    data: data_lib.ImageData,
    *,
    model: Any = None,
    workdir: str | Path,
    options: RunOptions | None = None,
) -> Run | None:
    """Read the finished run in `workdir`; train it there, or resume it, otherwise.

    A finished run of fewer epochs continues as in `train`.

    Args:
      config: see `train`.
      data: see `train`.
      model: see `train`.
      workdir: see `train`.
      options: see `train`.

    Returns:
      The run; None on processes other than the primary, where it was read.

    Raises:
      RunError: if `workdir` holds another run; this and other errors also as `train`
        and `load` say.

    Examples:
      >>> import tempfile
      >>> from bn_jax import data, runs
      >>> from bn_jax.training.config import TrainConfig
      >>> config = TrainConfig(model="mlp", epochs=1, train_examples=256)
      >>> images = data.load("sample")
      >>> with tempfile.TemporaryDirectory() as workdir:  # trains once
      ...     first = runs.train_or_load(config, images, workdir=workdir)
      ...     second = runs.train_or_load(config, images, workdir=workdir)
      epoch 1/1  loss ...
      >>> second.results == first.results
      True
    """
    workdir = paths.local(workdir, "workdir")
    read: list[Run] = []

    def is_done() -> bytes:
        if not (workdir / results.RESULTS).exists():
            return b""
        run = load(workdir, model=model)
        named = config if model is None else own_models.named(config, model)
        there = {**run.config.to_dict(), "data": run.results["data_source"]}
        now = {**named.to_dict(), "data": task.select(named, data).source}
        faults = results.differences(there, now)
        if faults and results.is_shorter(there, now):
            return b""
        if faults:
            raise RunError(
                f"{workdir} holds another run ({'; '.join(faults)}); give another "
                "--workdir"
            )
        read.append(run)
        return b"done"

    # All processes train, or none does: the primary, which reads, decides.
    if not distributed.on_primary(is_done):
        return train(config, data, model=model, workdir=workdir, options=options)
    return read[0] if read else None


def _agreed(
    config: TrainConfig, options: RunOptions, data: data_lib.ImageData
) -> dict[str, Any]:
    """Return the values that must be the same on all processes of a run."""
    if jax.process_count() == 1:  # which need not read all of the images
        return {}
    arrays = (*data.train, *data.test)
    return {
        **dataclasses.asdict(options),
        **config.to_dict(),
        "data": data.name,
        "images and labels": [zlib.crc32(np.asarray(a).tobytes()) for a in arrays],
        **results.versions(),
    }


def _is_streamed(options: RunOptions, data: data_lib.ImageData) -> bool:
    if options.input == "auto":
        return data.train.images.nbytes > MAX_STORED_BYTES
    return options.input == "stream"


def _train(
    trainer: loop.Trainer,
    files: _Files | None,
    request: interrupt.StopRequest,
    checkpoint_steps: int | None,
    is_logged: bool,
) -> None:
    """Train to the end, writing what comes up, unless asked to stop."""
    for report in trainer.train():
        if report is not None:
            # All processes take part.
            variables = trainer.state().variables if is_logged else None
            if files is not None:
                files.add_epoch(report, variables)
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
                "command resumes from there",
            )
        if files is not None:
            files.show(trainer)


class _Files:
    """What the primary reads, writes and shows."""

    def __init__(
        self, workdir: Path, trainer: loop.Trainer, log: Sequence[str]
    ) -> None:
        self._workdir, self._config = workdir, trainer.config
        self._log = log
        self._logs: logs.Logs | None = None
        self._trainer, self._data = trainer, trainer.data
        self._checkpoints: checkpoint.Checkpoints | None = None
        self._grows = schedules.is_of_any_length(trainer.config.schedule)
        self._bar = tqdm(
            total=trainer.num_steps, unit="step", disable=None, leave=False
        )

    def start(self, like: TrainState, *, resume: bool) -> Progress | None:
        """Make the directory ready; return the progress to resume from."""
        config = self._config.to_dict()
        results.check_free(self._workdir, config, resume=resume, grows=self._grows)
        finished = (self._workdir / results.RESULTS).exists()
        progress = None
        if (self._workdir / checkpoint.CHECKPOINTS).exists():
            progress = self._open().latest(like)
        if finished and progress is None:
            raise RunError(
                f"{self._workdir} holds a finished run of fewer epochs, and no "
                "checkpoint to go on from; give another folder with --workdir"
            )
        if finished:
            results.set_results_aside(self._workdir)
        results.start_run(self._workdir, config)
        history = () if progress is None else progress.history
        rows = (results.finite(report.to_row()) for report in history)
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
            self._bar.write(
                f"{num_devices} devices of {jax.process_count()} process(es) by "
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
        results.append_metrics(self._workdir, results.finite(report.to_row()))
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

    def finish(self, run: Run) -> None:
        """Write the results, last of all their file."""
        from bn_jax import plots  # here, so that training starts sooner

        arrays = {
            name: checkpoint.save_variables(self._workdir, of_name, name=name)
            for name, of_name in (
                (checkpoint.VARIABLES, run.variables),
                (checkpoint.AVERAGE, run.average),
            )
            if of_name is not None
        }
        path = results.remove_link(self._workdir / "curves.png")
        plots.curves(run.metrics, run.results, path, title=_title(run.config))
        if run.results["gamma_beta"]:
            path = results.remove_link(self._workdir / "gamma_beta.png")
            plots.gamma_beta(run.results["gamma_beta"], path)
        self.close()  # an error in writing a checkpoint comes up before the results
        results.finish_run(
            self._workdir, run.results, others=results.OF_A_RUN, arrays=arrays
        )

    def close(self) -> None:
        """Wait until checkpoints are written."""
        self._bar.close()
        if self._logs is not None:
            self._logs.close()
        if self._checkpoints is not None:
            opened, self._checkpoints = self._checkpoints, None
            opened.close()


def load(workdir: str | Path, *, model: Any = None) -> Run:
    """Read a finished run.

    Args:
      workdir: the directory that `train` wrote.
      model: the user's own, of a run that it was passed to.

    Returns:
      The run, as `train` returned it.

    Raises:
      RunError: if the directory does not hold a finished run, or files are damaged.
      ConfigError: if its config is of another version of the program, its model was
        passed in and is not now or is of another class, or `workdir` is no path of this
        machine.

    Examples:
      >>> import tempfile
      >>> from bn_jax import data, runs
      >>> from bn_jax.training.config import TrainConfig
      >>> config = TrainConfig(model="mlp", epochs=1, train_examples=256)
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     trained = runs.train(config, data.load("sample"), workdir=workdir)
      ...     loaded = runs.load(workdir)
      epoch 1/1  loss ...
      >>> loaded.results == trained.results
      True
    """
    workdir = paths.local(workdir, "workdir")
    values = results.read_object(workdir / results.CONFIG)
    if results.is_sweep(values):
        raise RunError(
            f"{workdir} holds a sweep, not a run; bn_jax.runs.sweeps.load reads its "
            "members"
        )
    results.check_no_experiment(workdir, values)
    config = read_config(workdir, values)
    checksums = results.check_finished(workdir, others=results.OF_A_RUN)
    summary = results.read_object(workdir / results.RESULTS)
    if model is not None:
        config = own_models.named(config, model)
    of_task = Task.from_dict(summary["task"])
    network = make_network(config, of_task, model=model)
    like = jax.eval_shape(network.init, jax.random.key(0))

    def read(name: str, like: Any) -> Any:
        known = checksums.get(name, {})
        return checkpoint.load_variables(workdir, like, known, name=name)

    variables = read(checkpoint.VARIABLES, like)
    average = None
    if config.average_weights:
        average = read(checkpoint.AVERAGE, like["params"])
    rows = results.read_metrics(workdir)
    return Run(config, network, variables, rows, summary, average)


def read_config(workdir: Path, values: dict[str, Any]) -> TrainConfig:
    """Return the config of a run in `workdir`.

    Raises:
      ConfigError: naming the version that wrote it, if that is another.
    """
    written_by = results.read_object(workdir / results.ENVIRONMENT).get("bn_jax")
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        if written_by == __version__:
            raise
        raise ConfigError(
            f"{workdir} was written by bn_jax {written_by}, whose configs "
            f"{__version__} does not read; read it with that version, or train it again"
        ) from error


def _title(config: TrainConfig) -> str:
    return f"{config.model}, norm {config.norm}, rate {config.learning_rate:g}"


def _line(report: loop.EpochReport, epochs: int) -> str:
    validated = ""
    if report.validation_accuracy is not None:
        validated = f"validation accuracy {report.validation_accuracy:.3f}  "
    return (
        f"epoch {report.epoch:{len(str(epochs))}}/{epochs}  loss {report.loss:.3f}  "
        f"train accuracy {report.train_accuracy:.3f}  {validated}"
        f"test accuracy {report.test_accuracy:.3f}  "
        f"{report.examples_per_second:,.0f} examples/s"
    )
