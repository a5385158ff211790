"""The files of a run: what is written to a working directory, and read back.

config.json       every choice that decides the numbers
environment.json  versions, device and commit that the run used
metrics.jsonl     a line per epoch
results.json      the final numbers; its presence says that the run is finished
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bn_jax.version import __version__

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class RunError(ValueError):
    """A working directory that cannot be used as asked."""


def start_run(workdir: str | Path, config: Mapping[str, Any]) -> Path:
    """Make a working directory ready for a run of `config`.

    A directory with an unfinished run of the same config is started over. Nothing else
    is ever overwritten.

    Args:
      workdir: the directory; made when it is not there.
      config: the run's config, written to config.json.

    Raises:
      RunError: if the directory cannot be written, or holds another config's run, a
        finished run, or files of something else.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the working directory {workdir}: {error.strerror}; give "
            "another folder with --workdir"
        ) from error
    present = sorted(path.name for path in workdir.iterdir())
    if present and CONFIG not in present:
        raise RunError(
            f"{workdir} holds {', '.join(present[:5])} but no {CONFIG}, so it is not a "
            "run's; give an empty or new folder with --workdir"
        )
    if present:
        _check_same_config(workdir, read_json(workdir / CONFIG), config)
    if RESULTS in present:
        raise RunError(
            f"{workdir} holds a finished run of this config; read it with "
            f"--load={workdir}, or give another folder with --workdir"
        )
    write_json(workdir / CONFIG, config)
    write_json(workdir / ENVIRONMENT, environment())
    (workdir / METRICS).write_text("")
    return workdir


def _check_same_config(
    workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Refuse a directory of another config, naming what differs."""
    differences = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise RunError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}); "
            "give another folder with --workdir"
        )


def environment() -> dict[str, Any]:
    """Return the versions, device and commit that numbers depend on."""
    device = jax.devices()[0]
    return {
        "bn_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


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


def write_json(path: Path, value: Any) -> None:
    """Write `value`, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote.

    Raises:
      RunError: if there is no such file or it does not hold JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(
            f"there is no {path.name} in {path.parent}; expected the working directory "
            "of a run"
        ) from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: it does not hold JSON ({error})") from None


def append_metrics(workdir: Path, row: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl."""
    with open(workdir / METRICS, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, one per epoch.

    Raises:
      RunError: if the file is missing or damaged.
    """
    path = workdir / METRICS
    if not path.is_file():
        raise RunError(
            f"there is no {METRICS} in {workdir}; expected a run's directory"
        )
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: it does not hold JSON ({error})") from None
