"""Working directories: what one holds, and whether it can take a run.

A folder that is a link, as checkpoints may be, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bn_jax import paths
from bn_jax.fields import counted
from bn_jax.runs.json_files import (
    CONFIG,
    LOCK,
    PARTS,
    RESULTS,
    UNFINISHED,
    RunError,
    read_object,
    writing,
)
from bn_jax.training.config import OWN_VARIABLES


@contextmanager
def locked(workdir: str | Path, *, seconds: float = 0) -> Iterator[Path]:
    """Hold a working directory, made when it is not there, against other processes.

    The lock ends with the process, however that ends.

    Args:
      workdir: the directory.
      seconds: how long to wait for another process that holds it.

    Raises:
      RunError: if the directory cannot be written, or another process holds it.
      ConfigError: if it is not a path of this machine.
    """
    workdir = paths.local(workdir, "workdir")
    lock = FileLock(workdir / LOCK, timeout=seconds)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"another process is at work in {workdir}; wait for it, or give another "
            "folder with --workdir"
        ) from None
    except OSError as error:
        raise _no_place(workdir, error) from error
    try:
        yield workdir
    finally:
        lock.release()


@contextmanager
def held(
    workdir: str | Path,
    config: Mapping[str, Any],
    *,
    seconds: float = 0,
    **options: Any,
) -> Iterator[Path]:
    """Hold a working directory that can take a run of `config`, as `locked` does.

    A directory that cannot is not touched.

    Args:
      workdir: the directory.
      config: the run's config.
      seconds: how long to wait for another process that holds it.
      **options: of `check_free`.

    Raises:
      RunError: as `check_free` and `locked` say.
      ConfigError: if it is not a path of this machine.
    """
    workdir = paths.local(workdir, "workdir")
    check_free(workdir, config, **options)
    with locked(workdir, seconds=seconds):
        check_free(workdir, config, **options)  # what another process has made of it
        yield workdir


def check_free(
    workdir: Path,
    config: Mapping[str, Any],
    *,
    resume: bool = True,
    repeat: bool = False,
    grows: bool = False,
    data_source: str | None = None,
) -> None:
    """Refuse a working directory that cannot take a run of `config`.

    It takes an unfinished run of the same config, to resume it. Nothing is written.

    Args:
      workdir: the directory; one that is not there can take any.
      config: the run's config.
      resume: whether to resume an unfinished run; else it is refused.
      repeat: whether a finished run of the same config may write its results anew.
      grows: whether a run of fewer epochs may go on, finished or not: its steps are
        the first ones of the longer run.
      data_source: of the run's images, where its config does not tell it.

    Raises:
      RunError: if the directory holds a run of another config or on other images, a
        finished run, files of something else, or links to folders; or if it cannot be
        read.
    """
    present = _present(workdir)
    longer = False
    if present:
        there = read_object(workdir / CONFIG)
        longer = is_shorter(there, config)
        _check_same(workdir, there, config, grows=longer and grows)
    if RESULTS in present and data_source is not None:
        source = read_object(workdir / RESULTS).get("data_source")
        if source != data_source:
            raise RunError(
                f"{workdir} holds a run on other images (data: {source!r} there, "
                f"{data_source!r} now); give another workdir"
            )
    if RESULTS in present and not repeat and not longer:
        raise RunError(
            f"{workdir} holds a finished run of this config; read it with "
            f"--load={workdir} (in Python by bn_jax.runs.load, or train_or_load in "
            "place of train), let it go on with more epochs, or give another workdir"
        )
    if present and not resume:
        raise RunError(
            f"{workdir} holds an unfinished run of this config; give resume=True, or "
            "another workdir"
        )


def _present(workdir: Path) -> list[str]:
    """Return the names of what a run has left in a directory; none if it is not there.

    Raises:
      RunError: if it cannot be read, or holds links to folders or no run's files.
    """
    try:
        present = sorted(
            path.name
            for path in workdir.iterdir()
            if path.name not in (LOCK, PARTS) and path.suffix != UNFINISHED
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _no_place(workdir, error) from error
    for name in present:
        if (workdir / name).is_symlink() and (workdir / name).is_dir():
            raise RunError(
                f"{workdir / name} is a link to another folder, which would be written "
                "to; put the folder itself there, or give another workdir"
            )
    if present and CONFIG not in present:
        raise RunError(
            f"{workdir} holds {', '.join(present[:5])} but no {CONFIG}, so it is not a "
            "run's; give an empty or new workdir"
        )
    return present


def _check_same(
    workdir: Path, there: Mapping[str, Any], config: Mapping[str, Any], *, grows: bool
) -> None:
    """Refuse a directory whose config is another one, unless the run there grows.

    Raises:
      RunError: saying what differs.
    """
    if _kind(there) != _kind(config):
        raise RunError(
            f"{workdir} holds {_kind(there)}, and this is {_kind(config)}; give "
            "another workdir"
        )
    faults = differences(there, config)
    if grows or not faults:
        return
    if is_shorter(there, config):
        raise RunError(
            f"{workdir} holds a run of {counted(there['epochs'], 'epoch')}; with "
            f"schedule={config.get('schedule')!r}, a run of {config['epochs']} has "
            "other learning rates from the start. Only runs with schedule=constant "
            "can be extended: give another workdir"
        )
    start = str(there.get("init_from"))
    hint = ""
    if start.startswith(OWN_VARIABLES) and start != config.get("init_from"):
        hint = "the variables, or the NNX module, as it started with, or "
    raise RunError(
        f"{workdir} holds a run of another config ({'; '.join(faults)}); give "
        f"{hint}another workdir"
    )


def existing(folder: str | Path, name: str) -> Path:
    """Return the path of a folder that is there.

    Args:
      folder: as the user wrote it.
      name: of the argument, for messages.

    Raises:
      RunError: if it does not exist.
      ConfigError: if it is no path of this machine.
    """
    path = paths.local(folder, name)
    if not path.is_dir():
        fault = "is a file" if path.exists() else "does not exist"
        raise RunError(
            f"{name}={str(folder)!r} {fault}; expected the folder of a finished run"
        )
    return path


def is_sweep(config: Mapping[str, Any]) -> bool:
    """Return whether the contents of a config.json are those of a sweep."""
    return "exact" in config


def check_no_experiment(workdir: Path, config: Mapping[str, Any]) -> None:
    """Refuse the directory of an experiment, which has no run of its own to load.

    Raises:
      RunError: naming the experiment.
    """
    if "experiment" in config:
        raise RunError(
            f"{workdir} holds the experiment {config['experiment']}; give the folder "
            "of one run or sweep"
        )


def is_shorter(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether one config is that of fewer epochs, and all else the same."""
    fewer, more = old.get("epochs"), new.get("epochs")
    same = {**old, "epochs": None} == {**new, "epochs": None}
    return same and isinstance(fewer, int) and isinstance(more, int) and fewer < more


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two configs."""

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} letters)"

    return [
        f"{name}: {short(old.get(name))} there, {short(new.get(name))} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def set_results_aside(workdir: Path) -> None:
    """Rename the results of a finished run that goes on, by its number of epochs.

    Raises:
      RunError: if the config cannot be read, or the results not renamed.
    """
    epochs = read_object(workdir / CONFIG)["epochs"]
    with writing(workdir / RESULTS):
        (workdir / RESULTS).rename(workdir / f"results_{epochs}_epochs.json")


def _kind(config: Mapping[str, Any]) -> str:
    """Return in words what the contents of a config.json are those of."""
    if "experiment" in config:
        return f"the experiment {config['experiment']}"
    if "part" in config:
        return f"part {config['part'][0]} of {config['part'][1]} of a sweep"
    return "a sweep" if is_sweep(config) else "a run"


def _no_place(workdir: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write to the working directory {workdir}: {error.strerror}; make it "
        "writable, or give another workdir"
    )
