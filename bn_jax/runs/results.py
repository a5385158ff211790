"""What a run writes to its working directory: its start, its epochs and its results."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bn_jax.runs import provenance
from bn_jax.runs.json_files import (
    CHECKSUMS,
    CONFIG,
    ENVIRONMENT,
    MEND,
    METRICS,
    RESULTS,
    ROWS,
    RunError,
    append_row,
    dumped,
    read_bytes,
    read_object,
    read_rows,
    write_json,
    write_rows,
)

# Files beside the results whose checksums are kept.
OF_A_RUN = (CONFIG, ENVIRONMENT, METRICS)
OF_A_SWEEP = (CONFIG, ENVIRONMENT, ROWS)


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
    write_json(
        workdir / ENVIRONMENT,
        {**provenance.environment(), **(of_model or {})},
    )


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
    files[RESULTS] = zlib.crc32(dumped(summary).encode())
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
    read_object(workdir / RESULTS)  # says what a folder lacks
    known = read_object(workdir / CHECKSUMS)
    files, arrays = known.get("files"), known.get("arrays")
    if not isinstance(files, dict) or not isinstance(arrays, dict):
        raise RunError(f"{workdir / CHECKSUMS} is damaged: it lacks checksums; {MEND}")
    for name in (*others, RESULTS):
        if zlib.crc32(read_bytes(workdir / name)) != files.get(name):
            raise RunError(
                f"{workdir / name} is damaged: it is not what {CHECKSUMS} says was "
                f"written; {MEND}"
            )
    return arrays


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
    append_row(workdir / METRICS, row)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, one per epoch.

    Raises:
      RunError: if the file is missing or damaged.
    """
    return read_rows(workdir / METRICS)
