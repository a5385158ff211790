"""The files of a run: what is written to a working directory, and read back.

config.json       every choice that decides the numbers
environment.json  versions, device and commit that the run used
metrics.jsonl     a line per epoch
checksums.json    of the files above and below, and of each array of the variables
results.json      the final numbers; its presence says that the run is finished
.lock             held while a process is at work in the directory

No file is written through a link: one that stands in its place is replaced. A folder
that is a link, as checkpoints may be, is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from filelock import FileLock, Timeout

from bn_jax import paths
from bn_jax.fields import counted
from bn_jax.training.config import OWN_VARIABLES
from bn_jax.version import __version__

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKSUMS = "checksums.json"
RESULTS = "results.json"
ROWS = "runs.jsonl"  # of a sweep, a row a member
PARTS = "parts"  # of a sweep that is trained in parts, a folder each
LOCK = ".lock"
UNFINISHED = ".unfinished"  # ending of a file that is being written

# Files beside the results whose checksums are kept.
START = "start"  # in environment.json: the checksum of what `init_from` held
OF_A_RUN = (CONFIG, ENVIRONMENT, METRICS)
OF_A_SWEEP = (CONFIG, ENVIRONMENT, ROWS)

# What to do about a damaged file.
MEND = "restore it from a copy, or train again in another folder"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class RunError(ValueError):
    """A working directory that cannot be used as asked."""


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


def _no_place(workdir: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write to the working directory {workdir}: {error.strerror}; make it "
        "writable, or give another workdir"
    )


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
    try:
        present = sorted(
            path.name
            for path in workdir.iterdir()
            if path.name not in (LOCK, PARTS) and path.suffix != UNFINISHED
        )
    except FileNotFoundError:
        return
    except OSError as error:
        raise _no_place(workdir, error) from error
    links = [
        n for n in present if (workdir / n).is_symlink() and (workdir / n).is_dir()
    ]
    if links:
        raise RunError(
            f"{workdir / links[0]} is a link to another folder, which would be written "
            "to; put the folder itself there, or give another workdir"
        )
    if present and CONFIG not in present:
        raise RunError(
            f"{workdir} holds {', '.join(present[:5])} but no {CONFIG}, so it is not a "
            "run's; give an empty or new workdir"
        )
    longer = False
    if present:
        there = read_object(workdir / CONFIG)
        if _kind(there) != _kind(config):
            raise RunError(
                f"{workdir} holds {_kind(there)}, and this is {_kind(config)}; give "
                "another workdir"
            )
        faults = differences(there, config)
        longer = is_shorter(there, config)
        if longer and not grows:
            raise RunError(
                f"{workdir} holds a run of {counted(there['epochs'], 'epoch')}; with "
                f"schedule={config.get('schedule')!r}, a run of {config['epochs']} has "
                "other learning rates from the start. Only runs with schedule=constant "
                "can be extended: give another workdir"
            )
        if faults and not longer:
            start = str(there.get("init_from"))
            hint = ""
            if start.startswith(OWN_VARIABLES) and start != config.get("init_from"):
                hint = "the variables, or the NNX module, as it started with, or "
            raise RunError(
                f"{workdir} holds a run of another config ({'; '.join(faults)}); give "
                f"{hint}another workdir"
            )
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


def is_shorter(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether one config is that of fewer epochs, and all else the same."""
    fewer, more = old.get("epochs"), new.get("epochs")
    same = {**old, "epochs": None} == {**new, "epochs": None}
    return same and isinstance(fewer, int) and isinstance(more, int) and fewer < more


def set_results_aside(workdir: Path) -> None:
    """Rename the results of a finished run that goes on, by its number of epochs.

    Raises:
      RunError: if the config cannot be read, or the results not renamed.
    """
    epochs = read_object(workdir / CONFIG)["epochs"]
    with writing(workdir / RESULTS):
        (workdir / RESULTS).rename(workdir / f"results_{epochs}_epochs.json")


def start_run(
    workdir: Path, config: Mapping[str, Any], of_model: Mapping[str, Any] | None = None
) -> None:
    """Write what a run is, and where it runs now.

    Args:
      workdir: the directory.
      config: the run's config.
      of_model: what `same_model.recorded` returns, to stand beside the environment.

    Raises:
      RunError: if it cannot be written.
    """
    write_json(workdir / CONFIG, config)
    write_json(workdir / ENVIRONMENT, {**environment(), **(of_model or {})})


def finish_run(
    workdir: Path,
    summary: Mapping[str, Any],
    *,
    others: Sequence[str],
    arrays: Mapping[str, Mapping[str, int]],
) -> None:
    """Write results.json, last of all, and before it checksums of everything.

    Args:
      workdir: the directory.
      summary: the contents of results.json.
      others: names of the other files of the run.
      arrays: by folder of arrays, the CRC-32 of each array by name.

    Raises:
      RunError: if it cannot be written.
    """
    files = {name: zlib.crc32((workdir / name).read_bytes()) for name in others}
    files[RESULTS] = zlib.crc32(_json(summary).encode())
    write_json(workdir / CHECKSUMS, {"files": files, "arrays": arrays})
    write_json(workdir / RESULTS, summary)


def check_finished(workdir: Path, *, others: Sequence[str]) -> dict[str, Any]:
    """Refuse the directory of a finished run if one of its files has changed.

    Args:
      workdir: the directory.
      others: names of the files beside results.json, see `finish_run`.

    Returns:
      The checksums of arrays, by folder and name.

    Raises:
      RunError: naming the file that is missing or damaged, or if the run has not ended.
    """
    if not (workdir / RESULTS).exists() and (workdir / CONFIG).exists():
        raise RunError(
            f"the run in {workdir} has not ended; train it again with the same "
            "config to go on from its last checkpoint"
        )
    read_object(workdir / RESULTS)  # says of a folder without one what it is
    known = read_object(workdir / CHECKSUMS)
    files, arrays = known.get("files"), known.get("arrays")
    if not isinstance(files, dict) or not isinstance(arrays, dict):
        raise RunError(f"{workdir / CHECKSUMS} is damaged: it lacks checksums; {MEND}")
    for name in (*others, RESULTS):
        if zlib.crc32(_read_bytes(workdir / name)) != files.get(name):
            raise RunError(
                f"{workdir / name} is damaged: it is not what {CHECKSUMS} says was "
                f"written; {MEND}"
            )
    return arrays


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


def _kind(config: Mapping[str, Any]) -> str:
    """Return in words what the contents of a config.json are those of."""
    if "experiment" in config:
        return f"the experiment {config['experiment']}"
    if "part" in config:
        return f"part {config['part'][0]} of {config['part'][1]} of a sweep"
    return "a sweep" if is_sweep(config) else "a run"


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two configs."""
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def versions() -> dict[str, str]:
    """Return the versions of this program, of Python and of packages."""
    return {
        "bn_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def environment() -> dict[str, Any]:
    """Return the versions, processor, device and commit that numbers depend on."""
    device = jax.devices()[0]
    return {
        **versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_instructions": _cpu_instructions(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _cpu_instructions() -> list[str]:
    """Return the sets of vector instructions, whose widths decide how sums round.

    They are those beyond what numpy was compiled for, which leaves out what is empty.
    """
    extensions = np.show_config(mode="dicts").get("SIMD Extensions", {})
    found: list[str] = extensions.get("found", [])
    return found


def _commit() -> str | None:
    """Return the checkout's commit, with "+changes" where files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # installed inside a repository that is not ours
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def finite(value: Any) -> Any:
    """Return JSON values with None for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value`, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with writing(path):
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "x") as file:  # which follows no link
            file.write(text)
        unfinished.replace(path)


def remove_link(path: Path) -> Path:
    """Return a path that is to be written, of which a link was removed.

    Raises:
      RunError: if it cannot be removed.
    """
    with writing(path):
        if path.is_symlink():
            path.unlink()
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system has against writing into our error.

    Raises:
      RunError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was written before is kept. "
            "Make room, or the folder writable, and the same command resumes"
        ) from error


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote.

    Raises:
      RunError: if there is no such file or it does not hold JSON.
    """
    return _parse(path, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        inside = sorted(found.parent for found in path.parent.glob(f"*/{path.name}"))
        inside = [folder for folder in inside if _is_of_a_run(folder / CONFIG)]
        raise RunError(
            f"there is no {path.name} in {path.parent}; expected the working directory "
            f"of a run{f', such as {inside[0]}' if inside else ''}"
        ) from None
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}; expected a file that you may read"
        ) from None


def _is_of_a_run(path: Path) -> bool:
    """Return whether a config.json can be read, and is that of a run or sweep."""
    try:
        return "experiment" not in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _parse(path: Path, content: bytes) -> Any:
    """Return the value that a file's JSON stands for.

    Raises:
      RunError: if it is no JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged: it does not hold JSON ({error}); {MEND}"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
      RunError: as `read_json`, or if it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; {MEND}")
    return value


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_text(path, "".join(_line(row) for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines.

    Raises:
      RunError: if the file is missing or damaged.
    """
    rows = [_parse(path, line) for line in _read_bytes(path).splitlines()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RunError(
                f"{path} is damaged: line {number} holds no JSON object; {MEND}"
            )
    return rows


def write_metrics(workdir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl anew with these rows, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_rows(workdir / METRICS, rows)


def append_metrics(workdir: Path, row: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl.

    Raises:
      RunError: if it cannot be written.
    """
    with writing(workdir / METRICS), open(remove_link(workdir / METRICS), "a") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, one per epoch.

    Raises:
      RunError: if the file is missing or damaged.
    """
    return read_rows(workdir / METRICS)
