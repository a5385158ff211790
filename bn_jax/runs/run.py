"""A run on disk: train a config into a working directory, and read it back."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax import data as data_lib
from bn_jax import paths
from bn_jax.fields import ConfigError
from bn_jax.runs import (
    checkpoint,
    distributed,
    interrupt,
    json_files,
    logs,
    provenance,
    results,
    same_model,
    workdirs,
)
from bn_jax.runs import summary as summary_lib
from bn_jax.runs.files import Files
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop, own_models, parallel, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.state import Network
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

    `best` holds the variables of the epoch that is best on the validation set.
    `average` holds the average of the parameters over the steps, which predicts by
    statistics of its own: as
    `with_exact_statistics(model, {**run.variables, "params": run.average}, inputs)`
    returns them (`bn_jax.measures.population`).
    """

    config: TrainConfig
    network: Network
    variables: Any
    metrics: list[dict[str, Any]]  # one row per epoch, as `progress.EpochReport`
    results: dict[str, Any]  # as results.json
    average: Any = None  # of the parameters, like them; None where none was kept
    # Variables of the epoch that is best on the validation set, at whose end there was
    # a checkpoint; None without such a set, and on processes other than the primary.
    best: Any = None

    def predict(self, images: Any) -> jax.Array:
        """Return the logits of images in prediction mode.

        Args:
          images: `[N, H, W, C]` of the data set's H, W and C, as bytes: integers from 0
            to 255, which are scaled here as they were in training.

        Returns:
          Logits `[N, classes]`.

        Raises:
          ValueError: if images are of another shape, or no integers from 0 to 255.
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        expected = self.network.data_shape or self.network.image_shape
        if images.shape[1:] != expected or not np.issubdtype(images.dtype, np.integer):
            raise ValueError(
                f"images of shape {list(images.shape)} and dtype {images.dtype}; "
                f"expected bytes [N, {', '.join(map(str, expected))}], 0 to 255"
                f"{_mend(images.shape, expected)}"
            )
        is_known = not isinstance(images, jax.core.Tracer)
        if is_known and images.dtype != np.uint8 and images.size:
            low, high = int(images.min()), int(images.max())
            if low < 0 or high > 255:
                raise ValueError(
                    f"images hold values from {low} to {high}; expected bytes, 0 to 255"
                )
        if not len(images):  # of which a model may not be able to infer a shape
            one = jax.numpy.zeros((1, *expected), np.uint8)
            return self.network.predict(self.variables, one)[:0]
        return self.network.predict(self.variables, images)


def _mend(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return how images of a shape become those that are expected, if that is known."""
    height, width, channels = expected
    if shape == expected:
        return ": give one image as images[None]"
    if len(shape) == 3 and shape[1:] == (height, width) and channels == 1:
        return ": give one channel as images[..., None]"
    if shape[1:] == (channels, height, width):
        return ": give numpy.moveaxis(images, 1, -1)"
    if shape[1:] == expected:
        return (
            ": of images that are scaled already, run.network.model.apply("
            "run.variables, images, train=False) gives the logits"
        )
    return ""


def train(
    config: TrainConfig,
    data: data_lib.ImageData,
    *,
    model: Any = None,
    variables: Any = None,
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
        initializers, from `variables` or from another run (`config.init_from`). On
        several devices by pmap its norms need `axis_name="data"`; by jit none; on one
        device, where they are the one instance along whatever axis they name, any.
        A run knows a model by its class, by the names and shapes of its variables and,
        where it is resumed or read by the same versions on the same kind of device, by
        what it computes: with other attributes (an activation, a norm's momentum) it
        is refused.
      variables: to start from instead of those that the seed draws, such as converted
        ones: those of a Linen model, a TrainState, an NNX module or its state, with
        the names and shapes of the model's own. `init_from` of the run's config has
        their checksum, as it has that of the variables that an NNX module holds: a run
        is resumed with the same ones alone.
      workdir: the run's directory.
      options: how to carry it out, a `bn_jax.training.config.RunOptions`, such as
        `RunOptions(devices="2")`; by default on one device, unlike `RunOptions()`,
        which is on all.

    Returns:
      The run, on every process.

    Raises:
      TypeError: if data or options are of another kind.
      RunError: if `workdir` cannot take this run, or be written; nothing is
        overwritten. Also if `config.init_from` holds no finished run.
      ConfigError: if the config does not fit the data, the model or the devices,
        variables are not the model's, a log needs a package that is not installed, or
        `workdir` is not a path of this machine.
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
    options = RunOptions.given(options)
    if model is not None:
        config = own_models.named(config, model)
    config, initial = own_models.starting_from(config, model, variables)
    logs.check(options.logs())
    distributed.check_same(_agreed(config, options, data))
    selected = task.select(config, data)
    checksum = None
    if initial is None and config.init_from:
        folder = workdirs.existing(config.init_from, "init_from")
        initial = _read(folder, model).variables  # whatever its attributes
        checksum = own_models.checksum(initial)
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
        start=initial,
    )
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(interrupt.listening())
        like = trainer.progress().state  # all processes take part
        files = None
        if distributed.is_primary():
            files = Files(workdir, trainer, options.logs(), checksum)

        def open_folder() -> bytes:
            assert files is not None  # this is called on the primary alone
            stack.enter_context(files.held(resume=options.resume))
            return checkpoint.to_bytes(files.start(like))

        found = distributed.on_primary(open_folder)
        progress = checkpoint.from_bytes(found, like)
        if progress is not None:
            trainer.restore(progress)
        if files is not None:
            stack.callback(files.close)
            files.announce(progress)
        _train(trainer, files, request, checkpoint_steps, bool(options.logs()))
        score = trainer.score()
        state = trainer.state()
        best = None if files is None else files.best()
        summary = summary_lib.summary(
            trainer, score, state.variables, best=None if best is None else best[0]
        )
        run = Run(
            config,
            trainer.network,
            state.variables,
            [json_files.finite(report.to_row()) for report in trainer.history],
            summary,
            state.average or None,
            None if best is None else best[1],
        )
        if files is not None:
            of_name = {
                checkpoint.VARIABLES: run.variables,
                checkpoint.AVERAGE: run.average,
                checkpoint.BEST: run.best,
            }
            files.finish(run.metrics, summary, of_name)
        distributed.any_process(False)  # wait for the primary
    return run


def train_or_load(
    config: TrainConfig,
    data: data_lib.ImageData,
    *,
    model: Any = None,
    variables: Any = None,
    workdir: str | Path,
    options: RunOptions | None = None,
) -> Run | None:
    """Read the finished run in `workdir`; train it there, or resume it, otherwise.

    A finished run of fewer epochs continues as in `train`.

    Args:
      config: see `train`.
      data: see `train`.
      model: see `train`.
      variables: see `train`.
      workdir: see `train`.
      options: see `train`.

    Returns:
      The run. If it was read and not trained, it is None on all processes but the
        primary.

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
        if not (workdir / json_files.RESULTS).exists():
            return b""
        run = load(workdir, model=model)
        named = config if model is None else own_models.named(config, model)
        named, _ = own_models.starting_from(named, model, variables)
        there = {**run.config.to_dict(), "data": run.results["data_source"]}
        now = {**named.to_dict(), "data": task.select(named, data).source}
        faults = workdirs.differences(there, now)
        if faults and workdirs.is_shorter(there, now):
            return b""
        if faults:
            raise RunError(
                f"{workdir} holds another run ({'; '.join(faults)}); give another "
                "workdir"
            )
        read.append(run)
        return b"done"

    # All processes train, or none does: the primary, which reads, decides.
    if not distributed.on_primary(is_done):
        return train(
            config,
            data,
            model=model,
            variables=variables,
            workdir=workdir,
            options=options,
        )
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
        **provenance.versions(),
    }


def _is_streamed(options: RunOptions, data: data_lib.ImageData) -> bool:
    if options.input == "auto":
        return data.train.images.nbytes > MAX_STORED_BYTES
    return options.input == "stream"


def _train(
    trainer: loop.Trainer,
    files: Files | None,
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


def load(workdir: str | Path, *, model: Any = None) -> Run:
    """Read a finished run.

    Args:
      workdir: the directory that `train` wrote.
      model: the user's own, of a run that it was passed to, with the attributes that
        it had: see `train`.

    Returns:
      The run, as `train` returned it.

    Raises:
      RunError: if the directory does not hold a finished run, files are damaged, or
        the model computes something else than that of the run.
      ConfigError: if its config is of another version of the program, if its model was
        passed in and now is not or is of another class, or if `workdir` is not a path
        of this machine.

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
    workdir = workdirs.existing(workdir, "workdir")
    run = _read(workdir, model)
    same_model.check(workdir, run.config, run.network)
    return run


def _read(workdir: Path, model: Any) -> Run:
    """Read a finished run, of a model of the class and shapes that are given."""
    values = json_files.read_object(workdir / json_files.CONFIG)
    if workdirs.is_sweep(values):
        raise RunError(
            f"{workdir} holds a sweep, not a run; bn_jax.runs.sweeps.load reads its "
            "members"
        )
    workdirs.check_no_experiment(workdir, values)
    config = read_config(workdir, values)
    checksums = results.check_finished(workdir, others=results.OF_A_RUN)
    summary = json_files.read_object(workdir / json_files.RESULTS)
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
    best = read(checkpoint.BEST, like) if "best_epoch" in summary else None
    rows = results.read_metrics(workdir)
    return Run(config, network, variables, rows, summary, average, best)


def read_config(workdir: Path, values: dict[str, Any]) -> TrainConfig:
    """Return the config of a run in `workdir`.

    Raises:
      ConfigError: naming the version that wrote it, if that is another.
    """
    written_by = json_files.read_object(workdir / json_files.ENVIRONMENT).get("bn_jax")
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        if written_by == __version__:
            raise
        raise ConfigError(
            f"{workdir} was written by bn_jax {written_by}, whose configs "
            f"{__version__} does not read; read it with that version, or train it again"
        ) from error
