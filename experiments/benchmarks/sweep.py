r"""What does a sweep of eight learning rates cost, to eight runs one after another?

LeNet with batch norm on the embedded sample, an epoch of 23 steps for each of eight
rates a round: by eight trainers in turns, each compiled for its rate, and by one sweep
on one and on two host devices. Compilation is reported apart: the trainers compile
eight programs, the sweep one.

  python -m experiments.benchmarks.sweep --workdir=runs/sweep-speed          2 minutes
  python -m experiments.benchmarks.sweep --workdir=runs/sweep-try --smoke

Each arm is a process, and they are timed in turns; that members train as they would
alone is checked first. Results, the table and the figure are in --workdir.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import timing

MODULE = "experiments.benchmarks.sweep"
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# Number of host devices of each arm; None trains one after another.
ARMS = {"alone": None, "sweep": 1, "sweep_2_devices": 2}
TITLES = {
    "alone": "8 runs, one after another",
    "sweep": "a sweep of 8, 1 device",
    "sweep_2_devices": "a sweep of 8, 2 devices",
}
# No thread of XLA's helps where two devices have a core each.
ENVIRONMENTS = {
    "alone": {},
    "sweep": {},
    "sweep_2_devices": {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
}


def define_flags() -> None:
    launch.define_workdir_flag()
    flags.DEFINE_integer("rounds", 7, "Epochs timed of each arm.", lower_bound=1)
    flags.DEFINE_boolean("smoke", False, "Two rounds, unless given.")
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    if flags.FLAGS.arm is not None:
        time_arm(ARMS[flags.FLAGS.arm])
        return
    rounds = launch.given_or("rounds", {"rounds": 2} if flags.FLAGS.smoke else {})
    with launch.experiment("sweep", {"rounds": rounds}, repeat=False) as folder:
        about, measured = timing.interleaved(MODULE, ENVIRONMENTS, rounds=rounds)
        write(folder, about, measured)


def time_arm(num_devices: int | None) -> None:
    """Set an arm up, and time an epoch of all members whenever told to."""
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices or 1)

    from bn_jax import data as data_lib
    from bn_jax.training import loop
    from bn_jax.training.sweep import Sweep

    data = data_lib.load("sample")
    base = config_lib.TrainConfig(dataset="sample", epochs=1_000)
    configs = [dataclasses.replace(base, learning_rate=rate) for rate in RATES]
    if num_devices is None:
        trainers = [loop.Trainer(config, data) for config in configs]
        training = [trainer.train() for trainer in trainers]

        def epoch() -> dict[str, float]:
            reports = [next(r for r in t if r is not None) for t in training]
            return {"seconds": sum(report.seconds for report in reports)}

        first = epoch()
        losses = [trainer.progress().step_losses[:20].tolist() for trainer in trainers]
        compile_seconds = sum(trainer.compile_seconds for trainer in trainers)
    else:
        sweep = Sweep(configs, data, devices=jax.devices()[:num_devices])
        epochs = sweep.train()

        def epoch() -> dict[str, float]:
            before = sweep.progress().seconds
            next(number for number in epochs if number is not None)
            return {"seconds": sweep.progress().seconds - before}

        first = epoch()
        losses = sweep.progress().step_losses[:, :20].tolist()
        compile_seconds = sweep.compile_seconds
    about = {"losses": losses, "compile_seconds": compile_seconds, **first}
    timing.serve(about, epoch)


def write(folder: Path, about: Any, measured: Any) -> None:
    """Check that members train alike; print and write what they took."""
    import numpy as np

    from bn_jax import plots
    from bn_jax.runs import results

    # At rate 2 rounding grows tenfold every few steps: the first ten are compared.
    of_arms = {name: np.asarray(about[name]["losses"])[:, :10] for name in ARMS}
    apart = {
        name: float(np.abs(losses - of_arms["alone"]).max())
        for name, losses in of_arms.items()
    }
    if not max(apart.values()) <= 1e-3:  # NaN, too
        raise FloatingPointError(
            f"losses of 10 steps differ from those of single runs by {apart}; the arms "
            "do not train alike, so their times say nothing"
        )
    seconds = timing.values(measured, "seconds")
    ratios = {name: timing.ratios(seconds[name], seconds["alone"]) for name in ARMS}
    rows = [["arm", "time, to one after another", "s an epoch of 8", "compilation, s"]]
    for name in ARMS:
        taken = timing.interval(timing.summarize(seconds[name]))
        compiled = f"{about[name]['compile_seconds']:.1f}"
        rows.append([TITLES[name], timing.interval(ratios[name]), taken, compiled])
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    plots.bars(
        {TITLES[name]: ratios[name] for name in ARMS},
        "time, to one after another",
        f"n = {ratios['alone'].n} rounds; lines: least to greatest",
        folder / "sweep.png",
    )
    summary = {
        "time_to_one_after_another": {n: r._asdict() for n, r in ratios.items()},
        "seconds": seconds,
        "compile_seconds": {name: about[name]["compile_seconds"] for name in ARMS},
        "largest_difference_in_loss": apart,
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    print(f"written to {folder}: table.md, {results.RESULTS}, sweep.png")


if __name__ == "__main__":
    launch.start(main, define_flags)
