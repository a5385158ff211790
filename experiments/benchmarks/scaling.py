r"""How does training scale from one core to two, and what do collectives cost?

LeNet with batch norm, by examples/s, on one and on two host devices, with statistics
synced and per device, at one global batch and at one batch per device; the share of
time that goes to collectives; the time that a checkpoint takes.

  python -m experiments.benchmarks.scaling --workdir=runs/scaling             3 minutes
  python -m experiments.benchmarks.scaling --workdir=runs/scaling-try --smoke

A host device is a core here: XLA's own threads are off but in the arm that uses them
instead. Each arm is a process, and they are timed in turns. Results, the table and the
figure are in --workdir; what came out is in experiments/results/scaling.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import timing

ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}


class Arm(NamedTuple):
    """A way to train."""

    title: str
    devices: int = 1
    batch_size: int = 256  # over all devices
    batch_stats: str = "synced"
    parallel: str = "pmap"
    one_thread: bool = True  # per device
    collectives: bool = True  # else each device trains a model of its own


ARMS = {
    "one": Arm("1 device, 1 thread"),
    "threads": Arm("1 device, XLA's threads", one_thread=False),
    "synced": Arm("2 devices, synced", 2),
    "per_device": Arm("2 devices, statistics per device", 2, batch_stats="per_device"),
    "alone": Arm(
        "2 devices, no collectives", 2, batch_stats="per_device", collectives=False
    ),
    "jit": Arm("2 devices, synced, jit over a mesh", 2, parallel="jit"),
    "synced_512": Arm("2 devices, synced, batch 512", 2, 512),
    "per_device_512": Arm(
        "2 devices, statistics per device, batch 512", 2, 512, "per_device"
    ),
}


def define_flags() -> None:
    launch.define_data_flags()
    launch.define_workdir_flag()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("rounds", 7, "Epochs timed of each arm.", lower_bound=1)
    flags.DEFINE_boolean("smoke", False, "The sample and 2 rounds, unless given.")
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = {"dataset": "sample", "rounds": 2} if flags.FLAGS.smoke else {}
    dataset = launch.given_or("dataset", smoke)
    if flags.FLAGS.arm is not None:
        time_arm(ARMS[flags.FLAGS.arm], dataset)
        return
    rounds = launch.given_or("rounds", smoke)
    config = {"dataset": dataset, "rounds": rounds}
    with launch.experiment("scaling", config, repeat=False) as folder:
        about, measured = timing.interleaved(
            "experiments.benchmarks.scaling",
            {name: ONE_THREAD if arm.one_thread else {} for name, arm in ARMS.items()},
            rounds=rounds,
            arguments=[f"--dataset={dataset}", *launch.data_arguments()],
        )
        write(folder, about, measured)


def time_arm(arm: Arm, dataset: str) -> None:
    """Set an arm up, and time an epoch whenever told to."""
    import jax

    jax.config.update("jax_num_cpu_devices", arm.devices)
    if arm.one_thread and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: arm.devices]
        os.sched_setaffinity(0, cores)

    import numpy as np

    from bn_jax import data as data_lib
    from bn_jax.training import loop, parallel
    from bn_jax.training import step as step_lib

    config = config_lib.TrainConfig(
        dataset=dataset,
        epochs=10**6,
        batch_size=arm.batch_size,
        batch_stats=arm.batch_stats,
    )
    data = data_lib.load(
        dataset, data_dir=flags.FLAGS.data_dir, idx_dir=flags.FLAGS.idx_dir
    )
    placement = parallel.place(config, devices=str(arm.devices), parallel=arm.parallel)

    def make_train_step(
        model: Any, optimizer: Any, *, axis_name: str | None, **options: Any
    ) -> Any:
        axis_name = axis_name if arm.collectives else None
        return step_lib.make_train_step(
            model, optimizer, axis_name=axis_name, **options
        )

    trainer = loop.Trainer(
        config, data, placement=placement, make_train_step=make_train_step
    )
    training = trainer.train()

    def epoch() -> dict[str, float]:
        report = next(report for report in training if report is not None)
        measurement = {
            "examples_per_second": report.examples_per_second,
            "epoch_seconds": report.seconds,
        }
        if arm == ARMS["one"]:
            measurement["checkpoint_seconds"] = time_checkpoint(trainer)
        return measurement

    first = epoch()
    losses = np.asarray(trainer.progress().step_losses[:20], float)
    about: dict[str, Any] = {"losses": losses.tolist(), "source": data.source, **first}
    timing.serve(about, epoch)


def time_checkpoint(trainer: Any) -> float:
    """Return the time from the start of a checkpoint until it is whole."""
    from bn_jax.runs import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(Path(folder), {})
        started = time.perf_counter()
        checkpoints.save(trainer.progress())
        checkpoints.close()
        return time.perf_counter() - started


def write(folder: Path, about: Any, measured: Any) -> None:
    """Check that arms train alike; print and write what they took."""
    from bn_jax import plots
    from bn_jax.runs import results

    losses = {name: about[name]["losses"] for name in ("threads", "synced", "jit")}
    apart = timing.largest_differences(losses, about["one"]["losses"])
    if max(apart.values()) > 1e-3:
        raise FloatingPointError(
            f"losses of 20 steps differ from one device's by {apart}; the arms do not "
            "train alike, so their times say nothing"
        )
    speeds = timing.values(measured, "examples_per_second")
    ratios = {name: timing.ratios(speeds[name], speeds["one"]) for name in ARMS}
    # Time, not speed: the share of a synced step that is gone without collectives.
    collectives = timing.summarize(
        [1 - s / a for s, a in zip(speeds["synced"], speeds["alone"], strict=True)]
    )
    sync = timing.summarize(
        [1 - s / p for s, p in zip(speeds["synced"], speeds["per_device"], strict=True)]
    )
    checkpoints = [
        row["checkpoint_seconds"] / (10 * row["epoch_seconds"])
        for row in measured["one"]
    ]
    seconds = [row["checkpoint_seconds"] for row in measured["one"]]
    rows = [["arm", "to one device, one thread", "examples/s"]]
    for name, arm in ARMS.items():
        speed = timing.summarize(speeds[name])
        rows.append([arm.title, timing.interval(ratios[name]), timing.interval(speed)])
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    summary = {
        "ratio_to_one": {name: ratios[name]._asdict() for name in ARMS},
        "examples_per_second": speeds,
        "share_of_collectives": collectives._asdict(),
        "share_of_synced_statistics": sync._asdict(),
        "checkpoint_seconds": timing.summarize(seconds)._asdict(),
        "checkpoint_share_of_10_epochs": timing.summarize(checkpoints)._asdict(),
        "largest_difference_in_loss": apart,
        "data_source": about["one"]["source"],
        "environment": results.environment(),
    }
    plots.bars(
        {arm.title: ratios[name] for name, arm in ARMS.items()},
        "examples/s, to one device with one thread",
        f"n = {ratios['one'].n} rounds; lines: least to greatest",
        folder / "scaling.png",
    )
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    print(f"collectives take {timing.interval(collectives)} of a synced step")
    print(f"a checkpoint takes {timing.interval(timing.summarize(seconds))} s, or ")
    print(f"  {timing.interval(timing.summarize(checkpoints))} of a 10-epoch run")
    print(f"written to {folder}: table.md, {results.RESULTS}, scaling.png")


if __name__ == "__main__":
    launch.start(main, define_flags)
