r"""What does a sweep of eight learning rates cost, to eight runs one after another?

LeNet with batch norm on the embedded sample. A round is an epoch of 23 steps for each
of the eight rates: by eight trainers in turns, each compiled for its rate, and by one
sweep on one and on two host devices. Compilation is reported apart: the trainers
compile eight programs, the sweep one. With more seeds each rate is that of several
members.

  python -m experiments.benchmarks.sweep --workdir=runs/sweep-speed          2 minutes
  python -m experiments.benchmarks.sweep --workdir=runs/sweep-try --smoke
  python -m experiments.benchmarks.sweep --workdir=runs/sweep-64 --seeds=8 \
    --arms=one,sweep                                       a GPU: 64 members to one run

Before the times are reported, the members of the sweeps must have the losses of the
single runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from bn_jax import data as data_lib
from bn_jax import fields
from experiments.benchmarks import benchmark, timing, training

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# At rate 2 rounding errors grow tenfold every few steps: only the first are compared.
NUM_CHECKED_STEPS = 10


def members(design: Design) -> list[dict[str, Any]]:
    """Return the fields of the config in which each member differs."""
    return [
        {"learning_rate": rate, "seed": seed}
        for seed in range(design.seeds)
        for rate in RATES
    ]


def one_after_another(design: Design, *, most: int | None = None) -> benchmark.Ready:
    """Set up a trainer for each of the members, or of the first ones."""
    data = data_lib.load("sample")
    trainers = [training.trainer(data, **own) for own in members(design)[:most]]
    reports = [trainer.train() for trainer in trainers]

    def epoch() -> timing.Measurement:
        return {"seconds": sum(training.next_epoch(each).seconds for each in reports)}

    epoch()  # compiles
    losses = np.stack([trainer.progress().step_losses for trainer in trainers])
    return _ready(epoch, losses, sum(t.compile_seconds for t in trainers))


def swept(design: Design, *, devices: int) -> benchmark.Ready:
    """Set up a sweep of the members."""
    sweep, of_sweep = training.sweep_epochs(
        members(design), data_lib.load("sample"), devices=devices
    )

    def epoch() -> timing.Measurement:
        seconds, _ = of_sweep()
        return {"seconds": seconds}

    epoch()  # compiles
    return _ready(epoch, sweep.progress().step_losses, sweep.compile_seconds)


def _ready(
    epoch: Callable[[], timing.Measurement],
    losses: np.ndarray,
    compile_seconds: float,
) -> benchmark.Ready:
    """Return an arm that compares the first of its losses, shape [members, steps]."""
    first = losses[:, :NUM_CHECKED_STEPS].astype(float).ravel()
    about = {"losses": first.tolist(), "compile_seconds": compile_seconds}
    return benchmark.Ready(epoch, about)


ARMS = {
    "alone": benchmark.Arm("runs one after another", one_after_another),
    "one": benchmark.Arm("one run", functools.partial(one_after_another, most=1)),
    "sweep": benchmark.Arm("a sweep, 1 device", functools.partial(swept, devices=1)),
    # Each of the two devices has a core; XLA's threads would only get in the way.
    "sweep_2_devices": benchmark.Arm(
        "a sweep, 2 devices",
        functools.partial(swept, devices=2),
        devices=2,
        env={"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.Design):
    """How many members there are, and in which ways they train."""

    seeds: int = fields.option(
        1, f"Seeds of each of the {len(RATES)} rates.", valid=fields.AT_LEAST_1
    )
    arms: tuple[str, ...] = benchmark.arms_option(
        ARMS, default=("alone", "sweep", "sweep_2_devices")
    )


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report the times of all members, divided by those of single runs."""
    losses = {arm: about["losses"] for arm, about in measured.about.items()}
    reference = next(iter(losses))  # the first is that of single runs
    shared = min(map(len, losses.values()))
    apart = timing.check_agreement(
        {arm: of_arm[:shared] for arm, of_arm in losses.items()},
        reference,
        tolerance=1e-3,
        what=f"losses of {NUM_CHECKED_STEPS} steps",
    )
    seconds = benchmark.compare(
        measured,
        "seconds",
        reference,
        ratio=f"time, to {measured.titles[reference]}",
        value="s an epoch",
    )
    compiled = {arm: said["compile_seconds"] for arm, said in measured.about.items()}
    column = ["compilation, s", *(f"{compiled[arm]:.1f}" for arm in measured.titles)]
    return benchmark.Report(
        tables=[
            [[*row, cell] for row, cell in zip(seconds.table, column, strict=True)]
        ],
        results={
            f"ratio_to_{reference}": seconds.ratios,
            "seconds": seconds.values,
            "compile_seconds": compiled,
            "largest_difference_in_loss": apart,
        },
        figures={"sweep": seconds.figure},
    )


BENCHMARK = benchmark.Benchmark("sweep", Design, ARMS, report, smoke={"rounds": 2})

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
