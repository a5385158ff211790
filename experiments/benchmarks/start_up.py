r"""How long from the command to the first trained epoch, and how much memory?

  python -m experiments.benchmarks.start_up --workdir=runs/start-up          4 minutes
  python -m experiments.benchmarks.start_up --workdir=runs/start-try --smoke a minute

Every measurement is a new process, in turns, after a round that warms the system's file
cache: `import bn_jax`; `experiments.lenet --help`; the main job with an empty cache of
compiled programs, cold, and again with what that left, warm. Times are on the wall from
the start of the process, for a first epoch until its line is on stdout (so the test
images are evaluated, too). The job runs two epochs, and its peak memory is what the
system counts for that process alone, as resident. Where PyTorch is installed, a plain
script that trains the same network for an epoch stands beside it: it reads the training
images from a NumPy file, and evaluates nothing. First the warm and the cold job must
have the same losses. The folder receives results.json, table.md and start_up.png.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import launch
from experiments.benchmarks import timing

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


# A process begins with the memory of the one that starts it in its peak, so a small one
# (10 ms) starts each; it writes what the system counted.
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
    first_line_seconds: float  # until the line that was waited for; NaN without one
    peak_bytes: int


class Quantity(NamedTuple):
    """A row of the table."""

    title: str
    unit: str
    scale: float = 1.0  # of a measurement, in that unit


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


def define_flags() -> None:
    launch.define_data_flags()
    launch.define_workdir_flag()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("rounds", 5, "Processes of each kind.", lower_bound=1)
    flags.DEFINE_boolean("smoke", False, "The sample and 1 round, unless given.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = {"dataset": "sample", "rounds": 1} if flags.FLAGS.smoke else {}
    dataset, rounds = (launch.given_or(name, smoke) for name in ("dataset", "rounds"))
    skipped = timing.missing({"torch": ["torch"]})
    for name, reason in skipped.items():
        print(f"left out: {name} ({reason})", flush=True)
    data = launch.load_data(dataset)
    warm_up = 0 if flags.FLAGS.smoke else 1
    with (
        launch.experiment(
            "start_up", {"dataset": dataset, "rounds": rounds}, repeat=False
        ) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        torch_data = None
        if not skipped:
            torch_data = Path(temporary) / "train.npz"
            np.savez(torch_data, **data.train._asdict())
        measured = [
            measure(dataset, torch_data)
            for _ in tqdm(range(warm_up + rounds), disable=None, leave=False)
        ]
        write(folder, measured[warm_up:], skipped, data.source)


def measure(dataset: str, torch_data: Path | None) -> timing.Measurement:
    """Run each process once, PyTorch's where there is data for it."""
    taken = {
        "import_seconds": run(["-c", "import bn_jax"]).seconds,
        "help_seconds": run(["-m", "experiments.lenet", "--help"]).seconds,
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("cold", "warm"):  # the first leaves the cache to the second
            workdir = Path(temporary) / name
            ran = run(
                [
                    *("-m", "experiments.lenet", f"--workdir={workdir}"),
                    *(f"--dataset={dataset}", f"--epochs={EPOCHS}"),
                    f"--cache_dir={Path(temporary) / 'cache'}",
                    *launch.data_arguments(),
                ],
                wait_for=FIRST_EPOCH,
            )
            taken |= {
                f"first_epoch_seconds_{name}": ran.first_line_seconds,
                f"job_seconds_{name}": ran.seconds,
                f"peak_bytes_{name}": ran.peak_bytes,
                **_results(workdir, name),
            }
    if torch_data is not None:
        ran = run(["-c", TORCH_SCRIPT, str(torch_data)], wait_for=FIRST_EPOCH)
        taken["first_epoch_seconds_torch"] = ran.first_line_seconds
        taken["peak_bytes_torch"] = ran.peak_bytes
    return taken


def _results(workdir: Path, name: str) -> timing.Measurement:
    """Return what a job wrote about itself."""
    from bn_jax.runs import results

    written = results.read_json(workdir / results.RESULTS)
    return {
        f"compile_seconds_{name}": written["compile_seconds"],
        f"loss_{name}": written["train_loss"],
    }


def run(
    arguments: Sequence[str],
    *,
    wait_for: str | None = None,
) -> Ran:
    """Run Python in a process of its own.

    Args:
      arguments: of the interpreter.
      wait_for: beginning of a line of its output.

    Raises:
      ArmError: if it fails, or no line begins so.
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


def check_losses(measured: Sequence[timing.Measurement]) -> None:
    """Refuse jobs whose cached program does not train as the compiled one.

    Raises:
      FloatingPointError: if losses differ.
    """
    losses = {row[f"loss_{name}"] for row in measured for name in ("cold", "warm")}
    if len(losses) > 1:
        raise FloatingPointError(f"jobs of one config ended with the losses {losses}")


def write(
    folder: Path,
    measured: Sequence[timing.Measurement],
    skipped: Mapping[str, str],
    source: str,
) -> None:
    """Check that jobs agree; print and write what they took."""
    from bn_jax import plots
    from bn_jax.runs import results

    check_losses(measured)
    present = {k: q for k, q in QUANTITIES.items() if k in measured[0]}
    values: dict[str, list[float]] = {
        name: [row[name] * quantity.scale for row in measured]
        for name, quantity in present.items()
    }
    summaries = {name: timing.summarize(of) for name, of in values.items()}
    ratios: dict[str, Any] = {}
    if "first_epoch_seconds_torch" in values:
        for name in ("cold", "warm"):
            ratios[name] = timing.ratios(
                values[f"first_epoch_seconds_{name}"],
                values["first_epoch_seconds_torch"],
            )
    rows = [["", "median (least-greatest)"]]
    for name, ratio in ratios.items():
        rows.append([f"first epoch, {name}, to PyTorch", timing.interval(ratio)])
    for name, quantity in present.items():
        cell = f"{timing.interval(summaries[name])} {quantity.unit}"
        rows.append([quantity.title, cell])
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    n = len(measured)
    plots.bars(
        {f"{q.title} [{q.unit}]": summaries[name] for name, q in present.items()},
        "s, GB",
        f"n = {n} rounds; lines: least to greatest",
        folder / "start_up.png",
    )
    summary = {
        "ratio_to_torch": {name: ratio._asdict() for name, ratio in ratios.items()},
        "summaries": {name: s._asdict() for name, s in summaries.items()},
        "measured": list(measured),
        "skipped": skipped,
        "data_source": source,
        "versions": timing.versions(["torch"]),
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    print(f"n = {n} rounds; written to {folder}: table.md, {results.RESULTS}, ")
    print("  start_up.png")


if __name__ == "__main__":
    launch.start(main, define_flags)
