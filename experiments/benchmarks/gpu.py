r"""Is everything right on this GPU, and how fast is it?

Runs on one NVIDIA GPU, one after another: the tests of what computes on the device; the
benchmarks `lenet` and `resnet` (20 layers) beside PyTorch, and `sweep` (64 members
beside one run), in under ten minutes. (`batch_norm` is for CPUs: it waits for each
call, which on a GPU is longer than what is computed.)

  pip install -e '.[dev,bench,cuda]'
  python -m experiments.benchmarks.gpu --workdir=runs/gpu
  python -m experiments.benchmarks.gpu --workdir=runs/gpu --parts=lenet,sweep

Each part writes the folder --workdir/CARD/PART, where CARD is the name of the card, so
that its results stand in experiments/results/PART/CARD once copied there; the tests
write tests.txt. A part that fails does not keep the others from running; the command
then ends with status 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from bn_jax.fields import ConfigError
from experiments import launch

ROOT = Path(__file__).parents[2]
TESTED = ("tests/test_*.py", "tests/variants", "tests/measures", "tests/models")
# pytest-benchmark, where it happens to be installed, warns beside xdist.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "no:benchmark"]
# For the tests: what asks for no device runs on the GPU, what needs 8 on the CPU. They
# ask whether numbers are right, for which XLA need not find the fastest kernels.
TEST_ENV = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}

BENCHMARKS: dict[str, Sequence[str]] = {
    "lenet": ("--arms=ours,ours_tf32,torch,torch_tf32,flax", "--rounds=9"),
    "resnet": ("--rounds=7",),
    "sweep": ("--arms=one,sweep", "--seeds=8"),
}
PARTS = ("tests", *BENCHMARKS)


def slug(card: str) -> str:
    """Return a card's name as that of a folder, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def run_tests(folder: Path) -> bool:
    """Run the tests on the GPU; return whether they pass."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(p.relative_to(ROOT)) for t in TESTED for p in sorted(ROOT.glob(t))]
    with open(folder / "tests.txt", "w") as file:
        done = subprocess.run(
            [*PYTEST, "-m", "not slow", *files],
            cwd=ROOT,
            env={**os.environ, **TEST_ENV},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    print((folder / "tests.txt").read_text().splitlines()[-1], flush=True)
    return done.returncode == 0


def run_benchmark(name: str, folder: Path) -> bool:
    """Run a benchmark; return whether it ended well."""
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}"]
    own = launch.data_arguments() if name == "lenet" else []
    done = subprocess.run([*command, f"--workdir={folder}", *BENCHMARKS[name], *own])
    return done.returncode == 0


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    workdir = launch.workdir()
    unknown = [part for part in flags.FLAGS.parts if part not in PARTS]
    if unknown:
        raise ConfigError(
            f"parts={','.join(unknown)}; expected some of {', '.join(PARTS)}"
        )
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ConfigError(
            f"JAX sees no GPU, but {device.device_kind}; pip install -e '.[cuda]' on a "
            "machine with an NVIDIA card"
        )
    card = workdir / slug(device.device_kind)
    failed = []
    for part in flags.FLAGS.parts:
        started = time.perf_counter()
        print(f"--- {part}", flush=True)
        run = (
            run_tests(card / part)
            if part == "tests"
            else run_benchmark(part, card / part)
        )
        if not run:
            failed.append(part)
        print(f"--- {part}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{device.device_kind}: written to {card}")
    if failed:
        raise ConfigError(f"{', '.join(failed)} failed; what they say is above")


def define_flags() -> None:
    launch.define_workdir_flag()
    launch.define_data_flags()
    flags.DEFINE_list("parts", list(PARTS), f"Which to run, of {', '.join(PARTS)}.")


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(define_flags))
