"""Arms that are timed in turns, each in a process of its own.

An arm's process sets itself up once (its number of devices and threads, its library)
and then measures whenever it is told to, so that rounds of all arms interleave and a
machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from bn_jax.runs.results import RunError

Measurement = dict[str, float]


class Summary(NamedTuple):
    """Of one quantity over the rounds."""

    median: float
    min: float
    max: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Return median, spread and number of values."""
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratios(values: Sequence[float], reference: Sequence[float]) -> Summary:
    """Return the ratios of two arms, round by round, summarized."""
    return summarize([v / r for v, r in zip(values, reference, strict=True)])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    r"""Return the slope of log y against log x by least squares: p of $y = c x^p$."""
    log_x, log_y = [[math.log(v) for v in values] for values in (x, y)]
    return statistics.linear_regression(log_x, log_y).slope


def largest_differences(
    series: Mapping[str, Sequence[float]], reference: Sequence[float]
) -> dict[str, float]:
    """Return how far each series is from the reference, at its worst value.

    NaN, of a series that has one, counts as infinitely far.
    """
    return {
        name: max(
            math.inf if math.isnan(a - b) else abs(a - b)
            for a, b in zip(values, reference, strict=True)
        )
        for name, values in series.items()
    }


def missing(needed: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return which arms cannot run here, with the reason.

    Args:
      needed: names of the modules that each arm imports.
    """
    reasons = {}
    for arm, modules in needed.items():
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        if absent:
            reasons[arm] = f"{', '.join(absent)} is not installed"
    return reasons


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class ArmError(RunError):
    """An arm that failed; what it wrote is on stderr."""


class _Arm:
    """The process of one arm."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]):
        self.name = name
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        """Return the next line of JSON that the process prints."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ArmError(f"arm {self.name} ended with status {self._process.wait()}")

    def measure(self) -> Measurement:
        """Have it measure once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading says how it ended
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        measurement: Measurement = self.read()
        return measurement

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # of a "go" that was not read
            self._process.communicate()


def interleaved(
    module: str,
    arms: Mapping[str, Mapping[str, str]],
    *,
    rounds: int,
    arguments: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, list[Measurement]]]:
    """Time the arms of a benchmark in turns.

    Args:
      module: run as `python -m module --arm=NAME`, where it calls `serve`.
      arms: environment variables of each arm, by name.
      rounds: measurements of each arm, after one that warms it up.
      arguments: further flags for all arms.

    Returns:
      What each arm said of itself at the start, and its measurements.

    Raises:
      ArmError: if an arm fails.
    """
    with contextlib.ExitStack() as stack:
        started = {}
        bar = stack.enter_context(
            tqdm(total=len(arms) * (rounds + 2), disable=None, leave=False)
        )
        about = {}
        for name, env in arms.items():  # one after another: they share the cores
            bar.set_postfix_str(f"starting {name}")
            command = [sys.executable, "-m", module, f"--arm={name}", *arguments]
            started[name] = _Arm(name, command, env)
            stack.callback(started[name].stop)
            about[name] = started[name].read()
            bar.update()
        measured: dict[str, list[Measurement]] = {name: [] for name in arms}
        for round_ in range(rounds + 1):
            for name, arm in started.items():
                bar.set_postfix_str(name)
                measurement = arm.measure()
                if round_:
                    measured[name].append(measurement)
                bar.update()
        return about, measured


def serve(about: Mapping[str, Any], measure: Callable[[], Measurement]) -> None:
    """Measure whenever the parent process says so, until it is gone.

    Args:
      about: what the parent should know first, such as a loss to compare.
      measure: takes one measurement.
    """
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def values(
    measured: Mapping[str, Sequence[Measurement]], name: str
) -> dict[str, list[float]]:
    """Return one quantity of each arm's measurements."""
    return {arm: [m[name] for m in rows] for arm, rows in measured.items()}


def table(rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return rows, the first a header, as a table in Markdown."""
    header, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def interval(summary: Summary, digits: int = 3) -> str:
    """Return a summary as "median (min-max)"."""
    median, low, high = (f"{v:.{digits}g}" for v in summary[:3])
    return f"{median} ({low}-{high})"
