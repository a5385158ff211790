r"""How does training scale from one core to two, and what do collectives cost?

LeNet with batch norm, in examples/s, on one and on two host devices, with statistics
synced and per device, at one global batch and at one batch per device; the share of
time that collectives take; the time that a checkpoint takes.

  python -m experiments.benchmarks.scaling --workdir=runs/scaling             3 minutes
  python -m experiments.benchmarks.scaling --workdir=runs/scaling-try --smoke

Here a host device is a core: only one arm uses XLA's own threads. Before the times are
reported, all arms that compute the same must have the same losses. What came out is in
experiments/results/scaling.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bn_jax.runs import checkpoint
from bn_jax.training import loop
from experiments.benchmarks import benchmark, timing, training

ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}


def set_up(
    design: benchmark.DataDesign,
    *,
    devices: int,
    one_thread: bool,
    collectives: bool = True,
    with_checkpoint: bool = False,
    **choices: Any,
) -> benchmark.Ready:
    """Set up our trainer.

    Args:
      design: names the data set.
      devices: how many to train on.
      one_thread: whether each device keeps to a core.
      collectives: whether devices exchange anything; if not, each trains its own model.
      with_checkpoint: whether a measurement includes a checkpoint, timed apart.
      **choices: see `training.trainer`.
    """
    if one_thread and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:devices])

    def make_train_step(*arguments: Any, axis_name: str | None) -> loop.TrainStep:
        axis_name = axis_name if collectives else None
        return loop.make_train_step(*arguments, axis_name=axis_name)

    trainer = training.trainer(
        design.load(), devices=devices, make_train_step=make_train_step, **choices
    )
    reports = trainer.train()

    def epoch() -> timing.Measurement:
        report = training.next_epoch(reports)
        measurement = {
            "examples_per_second": report.examples_per_second,
            "epoch_seconds": report.seconds,
        }
        if with_checkpoint:
            measurement["checkpoint_seconds"] = time_checkpoint(trainer)
        return measurement

    epoch()  # compiles
    losses = trainer.progress().step_losses[:20]
    return benchmark.Ready(epoch, {"losses": losses.astype(float).tolist()})


def time_checkpoint(trainer: loop.Trainer) -> float:
    """Return the seconds from the start of a checkpoint until it is complete."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(Path(folder), {})
        started = time.perf_counter()
        checkpoints.save(trainer.progress())
        checkpoints.close()
        return time.perf_counter() - started


def arm(
    title: str, devices: int = 1, *, one_thread: bool = True, **options: Any
) -> benchmark.Arm:
    """Return an arm of our trainer."""
    ready = functools.partial(set_up, devices=devices, one_thread=one_thread, **options)
    env = ONE_THREAD if one_thread else {}
    return benchmark.Arm(title, ready, devices=devices, env=env)


ARMS = {
    "one": arm("1 device, 1 thread", with_checkpoint=True),
    "threads": arm("1 device, XLA's threads", one_thread=False),
    "synced": arm("2 devices, synced", 2),
    "per_device": arm("2 devices, statistics per device", 2, batch_stats="per_device"),
    "alone": arm(
        "2 devices, no collectives", 2, batch_stats="per_device", collectives=False
    ),
    "jit": arm("2 devices, synced, jit over a mesh", 2, mode="jit"),
    "synced_512": arm("2 devices, synced, batch 512", 2, batch_size=512),
    "per_device_512": arm(
        "2 devices, statistics per device, batch 512",
        2,
        batch_size=512,
        batch_stats="per_device",
    ),
}


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report speeds to one device's, and what collectives and checkpoints cost."""
    apart = timing.check_agreement(
        {
            arm: measured.about[arm]["losses"]
            for arm in ("one", "threads", "synced", "jit")
        },
        "one",
        tolerance=1e-3,
        what="losses of 20 steps",
    )
    speeds = benchmark.compare(
        measured,
        "examples_per_second",
        "one",
        ratio="examples/s, to one device with one thread",
        value="examples/s",
    )

    def share_saved(arm: str) -> timing.Summary:
        """Return the share of a synced step's time that an arm does without."""
        pairs = zip(speeds.values["synced"], speeds.values[arm], strict=True)
        return timing.summarize([1 - synced / other for synced, other in pairs])

    collectives = share_saved("alone")
    of_one = measured.rows["one"]
    seconds = timing.summarize([row["checkpoint_seconds"] for row in of_one])
    share = timing.summarize(
        [row["checkpoint_seconds"] / (10 * row["epoch_seconds"]) for row in of_one]
    )
    return benchmark.Report(
        tables=[speeds.table],
        results={
            "ratio_to_one": speeds.ratios,
            "examples_per_second": speeds.values,
            "share_of_collectives": collectives,
            "share_of_synced_statistics": share_saved("per_device"),
            "checkpoint_seconds": seconds,
            "checkpoint_share_of_10_epochs": share,
            "largest_difference_in_loss": apart,
        },
        figures={"scaling": speeds.figure},
        notes=[
            f"collectives take a share {timing.interval(collectives)} of a synced step",
            f"a checkpoint takes {timing.interval(seconds)} s, a share "
            f"{timing.interval(share)} of a run of 10 epochs",
        ],
    )


BENCHMARK = benchmark.Benchmark(
    "scaling",
    benchmark.DataDesign,
    ARMS,
    report,
    smoke={"dataset": "sample", "rounds": 2},
    needed=ARMS,
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
