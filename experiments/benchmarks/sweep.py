r"""What does a sweep of eight learning rates cost, to eight runs one after another?

LeNet with batch norm on the embedded sample. A round is an epoch of 23 steps for each
of the eight rates: by eight trainers in turns, each compiled for its rate, and by one
sweep on one and on two host devices. Compilation is reported apart: the trainers
compile eight programs, the sweep one.

  python -m experiments.benchmarks.sweep --workdir=runs/sweep-speed          2 minutes
  python -m experiments.benchmarks.sweep --workdir=runs/sweep-try --smoke

Before the times are reported, the members of the sweeps must have the losses of the
single runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from bn_jax import data as data_lib
from experiments.benchmarks import benchmark, timing, training

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# At rate 2 rounding errors grow tenfold every few steps: only the first are compared.
NUM_CHECKED_STEPS = 10


def one_after_another(design: benchmark.Design) -> benchmark.Ready:
    """Set up a trainer for each rate."""
    del design
    data = data_lib.load("sample")
    trainers = [training.trainer(data, learning_rate=rate) for rate in RATES]
    reports = [trainer.train() for trainer in trainers]

    def epoch() -> timing.Measurement:
        return {"seconds": sum(training.next_epoch(each).seconds for each in reports)}

    epoch()  # compiles
    losses = np.stack([trainer.progress().step_losses for trainer in trainers])
    return _ready(epoch, losses, sum(t.compile_seconds for t in trainers))


def swept(design: benchmark.Design, *, devices: int) -> benchmark.Ready:
    """Set up a sweep of the rates."""
    del design
    sweep, of_sweep = training.sweep_epochs(
        [{"learning_rate": rate} for rate in RATES],
        data_lib.load("sample"),
        devices=devices,
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
    """Return an arm that compares the first of its losses, shape [rates, steps]."""
    first = losses[:, :NUM_CHECKED_STEPS].astype(float).ravel()
    about = {"losses": first.tolist(), "compile_seconds": compile_seconds}
    return benchmark.Ready(epoch, about)


ARMS = {
    "alone": benchmark.Arm("8 runs, one after another", one_after_another),
    "sweep": benchmark.Arm(
        "a sweep of 8, 1 device", functools.partial(swept, devices=1)
    ),
    # Each of the two devices has a core; XLA's threads would only get in the way.
    "sweep_2_devices": benchmark.Arm(
        "a sweep of 8, 2 devices",
        functools.partial(swept, devices=2),
        devices=2,
        env={"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
    ),
}


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report times of all rates to those of single runs."""
    apart = timing.check_agreement(
        {arm: about["losses"] for arm, about in measured.about.items()},
        "alone",
        tolerance=1e-3,
        what=f"losses of {NUM_CHECKED_STEPS} steps",
    )
    seconds = benchmark.compare(
        measured,
        "seconds",
        "alone",
        ratio="time, to one after another",
        value="s an epoch of 8",
    )
    compiled = {arm: said["compile_seconds"] for arm, said in measured.about.items()}
    column = ["compilation, s", *(f"{compiled[arm]:.1f}" for arm in measured.titles)]
    return benchmark.Report(
        tables=[
            [[*row, cell] for row, cell in zip(seconds.table, column, strict=True)]
        ],
        results={
            "time_to_one_after_another": seconds.ratios,
            "seconds": seconds.values,
            "compile_seconds": compiled,
            "largest_difference_in_loss": apart,
        },
        figures={"sweep": seconds.figure},
    )


BENCHMARK = benchmark.Benchmark(
    "sweep", benchmark.Design, ARMS, report, smoke={"rounds": 2}, needed=ARMS
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
