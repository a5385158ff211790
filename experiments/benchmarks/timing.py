"""Times of several arms: measured in turns, summarized and set side by side.

Each arm is a process of its own. It sets itself up once (devices, threads, library) and
then measures whenever it is told to, so that a machine that slows down slows all arms.
What the arms of a benchmark are, and what is written, is in
`experiments.benchmarks.benchmark`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from bn_jax.runs.json_files import RunError

Measurement = dict[str, float]

# Modules whose package has another name.
_PACKAGES = {"haiku": "dm-haiku"}


class Summary(NamedTuple):
    """One quantity over the rounds."""

    median: float
    min: float
    max: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Return median, least and greatest value, and the number of values."""
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratios(values: Sequence[float], reference: Sequence[float]) -> Summary:
    """Divide two arms' values round by round, and summarize the ratios."""
    return summarize([v / r for v, r in zip(values, reference, strict=True)])


def ratios_to(
    reference: str, values: Mapping[str, Sequence[float]]
) -> dict[str, Summary]:
    """Return the ratio of each arm to the arm `reference`."""
    return {arm: ratios(of_arm, values[reference]) for arm, of_arm in values.items()}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    r"""Return the exponent p of $y = c x^p$, by least squares on logarithms."""
    log_x, log_y = [[math.log(v) for v in values] for values in (x, y)]
    return statistics.linear_regression(log_x, log_y).slope


def check_agreement(
    series: Mapping[str, Sequence[float]],
    reference: str,
    *,
    tolerance: float,
    what: str,
) -> dict[str, float]:
    """Compare what the arms computed with what one of them did.

    Args:
      series: numbers by arm, such as the losses of the first steps.
      reference: the arm to compare with.
      tolerance: the greatest difference allowed.
      what: names the numbers in the error.

    Returns:
      The greatest difference of each arm; infinite where a number is NaN.

    Raises:
      FloatingPointError: if a difference is greater than the tolerance.
    """
    apart = {
        arm: max(
            math.inf if math.isnan(a - b) else abs(a - b)
            for a, b in zip(values, series[reference], strict=True)
        )
        for arm, values in series.items()
    }
    if max(apart.values()) > tolerance:
        raise FloatingPointError(
            f"{what} differ from those of {reference} by {apart}; the arms do not "
            "compute the same, so their times say nothing"
        )
    return apart


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of those modules whose package is installed."""
    found = {}
    for module in modules:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[module] = importlib.metadata.version(_PACKAGES.get(module, module))
    return found


class ArmError(RunError):
    """An arm failed; its process has written the reason to stderr."""


class _Process:
    """The process of one arm."""

    def __init__(self, arm: str, command: Sequence[str], env: Mapping[str, str]):
        self._arm = arm
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        """Wait for a line of JSON, and return what it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ArmError(f"arm {self._arm} ended with status {self._process.wait()}")

    def measure(self) -> Measurement:
        """Have the process measure once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `read` reports how it ended
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        measurement: Measurement = self.read()
        return measurement

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # a "go" was left unread
            self._process.communicate()


def interleaved(
    module: str,
    arms: Mapping[str, Mapping[str, str]],
    *,
    rounds: int,
    arguments: Sequence[str] = (),
    together: bool = False,
) -> tuple[dict[str, Any], dict[str, list[Measurement]]]:
    """Measure the arms in turns, after a round that warms them up.

    Args:
      module: run as `python -m module --arm=NAME`; it must call `serve`.
      arms: environment variables of each arm's process, by the arm's name.
      rounds: number of measurements of each arm.
      arguments: further flags for all arms.
      together: whether all arms are set up at the same time. On a CPU that would leave
        each a part of the cores, for which libraries then choose their programs.

    Returns:
      What each arm said about itself at the start, and its measurements.

    Raises:
      ArmError: if an arm fails.
    """
    with contextlib.ExitStack() as stack:
        processes: dict[str, _Process] = {}
        bar = stack.enter_context(
            tqdm(total=len(arms) * (rounds + 2), disable=None, leave=False)
        )
        about = {}

        def wait_for(name: str) -> None:
            bar.set_postfix_str(f"starting {name}")
            about[name] = processes[name].read()
            bar.update()

        for name, env in arms.items():
            command = [sys.executable, "-m", module, f"--arm={name}", *arguments]
            processes[name] = _Process(name, command, env)
            stack.callback(processes[name].stop)
            if not together:
                wait_for(name)
        if together:
            for name in arms:
                wait_for(name)
        measured: dict[str, list[Measurement]] = {name: [] for name in arms}
        for round_ in range(rounds + 1):
            for name, process in processes.items():
                bar.set_postfix_str(name)
                measurement = process.measure()
                if round_:
                    measured[name].append(measurement)
                bar.update()
        return about, measured


def serve(about: Mapping[str, Any], measure: Callable[[], Measurement]) -> None:
    """Measure each time the parent process asks, until it ends.

    Args:
      about: what the parent should know first, such as losses to compare.
      measure: takes one measurement.
    """
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table in Markdown; the first row is the header."""
    header, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def interval(summary: Summary, digits: int = 3) -> str:
    """Format a summary as "median (min-max)"."""
    median, low, high = (f"{v:.{digits}g}" for v in summary[:3])
    return f"{median} ({low}-{high})"
