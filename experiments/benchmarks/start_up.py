r"""How long from the command to the first trained epoch, and how much memory?

  python -m experiments.benchmarks.start_up --workdir=runs/start-up          4 minutes
  python -m experiments.benchmarks.start_up --workdir=runs/start-try --smoke 2 minutes

Every measurement is a new process, in turns: `import bn_jax`; `experiments.lenet
--help`; the main job with an empty cache of compiled programs (cold), and again with
what the first job left there (warm). A first round, which is not counted, warms the
system's file cache. Times are on the wall from the start of the process; a first epoch
ends when its line is on stdout, so it includes evaluation on the test images. The job
runs two epochs. Peak memory is the resident memory that the system counts for that
process alone. Where PyTorch is installed, a plain script trains the same network for an
epoch: it reads the training images from a NumPy file, and evaluates nothing. Before the
times are reported, the warm and the cold job must have the same losses.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bn_jax import fields, plots
from bn_jax.runs import json_files
from experiments import launch
from experiments.benchmarks import benchmark, timing

FIRST_EPOCH = "epoch 1/"
EPOCHS = 2
# As PyTorch's users write it; JAX is not imported.
TORCH_SCRIPT = f"""
import sys
import numpy as np
import torch
from torch import nn

data = np.load(sys.argv[1])
images = torch.tensor(data["images"]).reshape(-1, 1, 28, 28)
labels = torch.tensor(data["labels"], dtype=torch.int64)
net = nn.Sequential(
    nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2),
    nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(256, 120), nn.BatchNorm1d(120), nn.Sigmoid(),
    nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid(),
    nn.Linear(84, 10),
)
optimizer = torch.optim.SGD(net.parameters(), 1.0)
losses = []
for rows in torch.randperm(len(labels)).split(256)[: len(labels) // 256]:
    loss = nn.functional.cross_entropy(net(images[rows].float() / 255), labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("{FIRST_EPOCH}1  loss", sum(losses) / len(losses))
"""


# The peak of a process includes the memory of the one that started it. So a small
# process (10 ms) starts each, and writes what the system counted.
LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Ran(NamedTuple):
    """What a process took."""

    seconds: float  # until it ended
    first_line_seconds: float  # until the awaited line; NaN if none was awaited
    peak_bytes: int


class Quantity(NamedTuple):
    """A row of the table."""

    title: str
    unit: str
    scale: float = 1.0  # measurements times this are in that unit


QUANTITIES = {
    "import_seconds": Quantity("import bn_jax", "s"),
    "help_seconds": Quantity("experiments.lenet --help", "s"),
    "first_epoch_seconds_cold": Quantity("first epoch, empty compile cache", "s"),
    "first_epoch_seconds_warm": Quantity("first epoch, warm compile cache", "s"),
    "first_epoch_seconds_torch": Quantity("first epoch, PyTorch", "s"),
    "compile_seconds_cold": Quantity("compilation, empty cache", "s"),
    "compile_seconds_warm": Quantity("compilation, warm cache", "s"),
    "job_seconds_cold": Quantity(f"job of {EPOCHS} epochs, empty cache", "s"),
    "job_seconds_warm": Quantity(f"job of {EPOCHS} epochs, warm cache", "s"),
    "peak_bytes_cold": Quantity("peak memory, empty cache", "GB", 1e-9),
    "peak_bytes_warm": Quantity("peak memory, warm cache", "GB", 1e-9),
    "peak_bytes_torch": Quantity("peak memory, PyTorch", "GB", 1e-9),
}


def run(arguments: Sequence[str], *, wait_for: str | None = None) -> Ran:
    """Run Python in a process of its own.

    Args:
      arguments: of the interpreter.
      wait_for: beginning of a line of output whose time counts.

    Raises:
      ArmError: if the process fails, or prints no such line.
    """
    first = float("nan")
    with tempfile.NamedTemporaryFile("r") as counted:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, counted.name]
        started = time.perf_counter()
        with subprocess.Popen(
            [*launcher, sys.executable, *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                awaited = wait_for is not None and line.startswith(wait_for)
                if awaited and math.isnan(first):
                    first = time.perf_counter() - started
        seconds = time.perf_counter() - started
        peak = int(counted.read() or 0)
    what = " ".join(arguments[:2])[:80]
    # --help ends with status 1 in absl.
    if process.returncode not in ((0, 1) if "--help" in arguments else (0,)):
        raise timing.ArmError(f"python {what} ended with status {process.returncode}")
    if wait_for is not None and math.isnan(first):
        raise timing.ArmError(f"python {what} printed no line {wait_for!r}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Ran(seconds, first, peak * unit)


def first_import(design: Design) -> benchmark.Ready:
    """Measure `import bn_jax`."""
    del design
    return benchmark.Ready(
        lambda: {"import_seconds": run(["-c", "import bn_jax"]).seconds}
    )


def show_help(design: Design) -> benchmark.Ready:
    """Measure --help of the main job."""
    del design
    return benchmark.Ready(
        lambda: {"help_seconds": run(["-m", "experiments.lenet", "--help"]).seconds}
    )


def job(design: Design) -> benchmark.Ready:
    """Measure the main job, cold and then warm."""

    def measure() -> timing.Measurement:
        taken: timing.Measurement = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):  # the first leaves the cache to the second
                workdir = Path(folder) / name
                ran = run(
                    [
                        *("-m", "experiments.lenet", f"--workdir={workdir}"),
                        *(f"--dataset={design.dataset}", f"--epochs={EPOCHS}"),
                        f"--cache_dir={Path(folder) / 'cache'}",
                        *launch.data_arguments(),
                    ],
                    wait_for=FIRST_EPOCH,
                )
                written = json_files.read_object(workdir / json_files.RESULTS)
                taken |= {
                    f"first_epoch_seconds_{name}": ran.first_line_seconds,
                    f"job_seconds_{name}": ran.seconds,
                    f"peak_bytes_{name}": ran.peak_bytes,
                    f"compile_seconds_{name}": written["compile_seconds"],
                    f"loss_{name}": written["train_loss"],
                }
        return taken

    return benchmark.Ready(measure)


def torch(design: Design) -> benchmark.Ready:
    """Measure a script of PyTorch's."""
    train = design.load().train

    def measure() -> timing.Measurement:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.npz"
            np.savez(path, images=train.images, labels=train.labels)
            ran = run(["-c", TORCH_SCRIPT, str(path)], wait_for=FIRST_EPOCH)
        return {
            "first_epoch_seconds_torch": ran.first_line_seconds,
            "peak_bytes_torch": ran.peak_bytes,
        }

    return benchmark.Ready(measure)


ARMS = {
    "import": benchmark.Arm("import bn_jax", first_import),
    "help": benchmark.Arm("experiments.lenet --help", show_help),
    "job": benchmark.Arm("the main job", job),
    "torch": benchmark.Arm("PyTorch", torch, ["torch"]),
}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.DataDesign):
    """How often, on what data."""

    rounds: int = fields.option_of(benchmark.Design, "rounds", 5)


def check_losses(measured: Sequence[timing.Measurement]) -> None:
    """Check that a program from the cache trains as one that was compiled.

    Raises:
      FloatingPointError: if losses differ.
    """
    losses = {row[f"loss_{name}"] for row in measured for name in ("cold", "warm")}
    if len(losses) > 1:
        raise FloatingPointError(f"jobs of one config ended with the losses {losses}")


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report all quantities, and first epochs to PyTorch's."""
    # A round of all arms in one row.
    rounds = [
        {name: value for row in rows for name, value in row.items()}
        for rows in zip(*measured.rows.values(), strict=True)
    ]
    check_losses(rounds)
    present = {k: q for k, q in QUANTITIES.items() if k in rounds[0]}
    values = {
        name: [row[name] * quantity.scale for row in rounds]
        for name, quantity in present.items()
    }
    summaries = {name: timing.summarize(of) for name, of in values.items()}
    ratios = {}
    if "first_epoch_seconds_torch" in values:
        ratios = {
            name: timing.ratios(
                values[f"first_epoch_seconds_{name}"],
                values["first_epoch_seconds_torch"],
            )
            for name in ("cold", "warm")
        }
    rows = [["", "median (least-greatest)"]]
    for name, ratio in ratios.items():
        rows.append([f"first epoch, {name}, to PyTorch", timing.interval(ratio)])
    for name, quantity in present.items():
        cell = f"{timing.interval(summaries[name])} {quantity.unit}"
        rows.append([quantity.title, cell])
    bars = {f"{q.title} [{q.unit}]": summaries[name] for name, q in present.items()}
    return benchmark.Report(
        tables=[rows],
        results={"ratio_to_torch": ratios, "summaries": summaries, "measured": rounds},
        figures={"start_up": benchmark.Figure(plots.bars, bars, "s, GB")},
    )


BENCHMARK = benchmark.Benchmark(
    "start_up",
    Design,
    ARMS,
    report,
    smoke={"dataset": "sample", "rounds": 1},
    needed=("import", "help", "job"),
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
