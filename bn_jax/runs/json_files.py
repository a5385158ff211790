"""The files of a working directory, by name, and how JSON is written and read.

config.json       every choice that decides the numbers
environment.json  versions, device and commit that the run used
metrics.jsonl     a line per epoch
checksums.json    of the files above and below, and of each array of the variables
results.json      the final numbers; its presence says that the run is finished
.lock             held while a process is at work in the directory

No file is written through a link: one that stands in its place is replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKSUMS = "checksums.json"
RESULTS = "results.json"
ROWS = "runs.jsonl"  # of a sweep, a row a member
PARTS = "parts"  # of a sweep that is trained in parts, a folder each
LOCK = ".lock"
UNFINISHED = ".unfinished"  # ending of a file that is being written

# What to do about a damaged file.
MEND = "restore it from a copy, or train again in another folder"


class RunError(ValueError):
    """A working directory that cannot be used as asked."""


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
    write_text(path, dumped(value))


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


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all.

    Raises:
      RunError: if it cannot be written.
    """
    write_text(path, "".join(_line(row) for row in rows))


def dumped(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines.

    Raises:
      RunError: if it cannot be written.
    """
    with writing(path), open(remove_link(path), "a") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


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
    """Raise an OSError as our error, which names the file.

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
    return _parse(path, read_bytes(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
      RunError: as `read_json`, or if it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; {MEND}")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines.

    Raises:
      RunError: if the file is missing or damaged.
    """
    rows = [_parse(path, line) for line in read_bytes(path).splitlines()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RunError(
                f"{path} is damaged: line {number} holds no JSON object; {MEND}"
            )
    return rows


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
      RunError: if it cannot be read, or is missing; if a folder inside the same one
        holds a run, the message names it.
    """
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
