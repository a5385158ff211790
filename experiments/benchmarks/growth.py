r"""How does the time of a training step grow with what one can make larger?

With the batch (LeNet), the width (an MLP of four layers), the depth (MLPs of width 128
and CIFAR-style ResNets) and the number of members of a sweep (LeNet): each with batch
norm and without, and with the slope on log-log axes: 1 is in proportion. How exact
statistics grow with the number of examples is in experiments.benchmarks.population.

  python -m experiments.benchmarks.growth --workdir=runs/growth            10 minutes
  python -m experiments.benchmarks.growth --workdir=runs/growth-try --smoke  2 minutes

Each line of the figure is a process of its own on one device, and they are timed in
turns. A measurement is a compiled loop of steps, at least as many as took 0.1 s in the
first, on images of the embedded sample; compilation is not in it. The folder receives
results.json, table.md and growth.png.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import timing

BATCH_SIZE = 256  # where the batch is not what grows
RESNET_BATCH_SIZE = 64
MLP_DEPTH, MLP_WIDTH = 4, 128
MEASURED_SECONDS = 0.1
MAX_STEPS = 200  # of one measurement


class Axis(NamedTuple):
    """What grows."""

    label: str
    sizes: Sequence[int]
    model: str


AXES = {
    "batch": Axis("examples a batch", (16, 64, 256, 1024, 4096), "LeNet"),
    "width": Axis("width", (64, 128, 256, 512, 1024), "MLP"),
    "depth": Axis("layers", (2, 4, 8, 16, 32), "MLP"),
    "resnet_depth": Axis("layers", (8, 14, 20, 32), "ResNet"),
    "members": Axis("members of a sweep", (1, 2, 4, 8, 16), "LeNet"),
}
NORMS = {"batch_norm": "batch norm", "none": "none"}


def arm_names() -> list[str]:
    """Return the names of the arms: an axis and a norm."""
    return [f"{axis}/{norm}" for axis in AXES for norm in NORMS]


def define_flags() -> None:
    launch.define_workdir_flag()
    flags.DEFINE_integer("rounds", 5, "Of each arm.", lower_bound=1)
    flags.DEFINE_integer(
        "num_sizes", 5, "How many sizes of each axis, from the least.", lower_bound=2
    )
    flags.DEFINE_boolean("smoke", False, "2 sizes and 1 round, unless given.")
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = {"rounds": 1, "num_sizes": 2} if flags.FLAGS.smoke else {}
    rounds, num_sizes = (launch.given_or(n, smoke) for n in ("rounds", "num_sizes"))
    if flags.FLAGS.arm is not None:
        time_arm(*flags.FLAGS.arm.split("/"), num_sizes=num_sizes)
        return
    config = {"rounds": rounds, "num_sizes": num_sizes}
    with launch.experiment("growth", config, repeat=False) as to:
        _, measured = timing.interleaved(
            "experiments.benchmarks.growth",
            dict.fromkeys(arm_names(), {}),
            rounds=rounds,
            arguments=[f"--num_sizes={num_sizes}"],
        )
        write(to, measured)


def time_arm(axis: str, norm: str, *, num_sizes: int) -> None:
    """Set an arm up, and time a step at each size whenever told to."""
    calls = {size: make_call(axis, norm, size) for size in AXES[axis].sizes[:num_sizes]}
    timing.serve({}, lambda: {str(size): call() for size, call in calls.items()})


def make_call(axis: str, norm: str, size: int) -> Callable[[], float]:
    """Return what measures the seconds of a step."""
    if axis == "members":
        return sweep_call(norm, size)
    from bn_jax import models
    from bn_jax.models import lenet, mlp, resnet

    constructor = models.norm_by_name(norm, momentum=0.9, epsilon=1e-5)
    if axis == "batch":
        return step_call(lenet.LeNet(norm=constructor), size)
    if axis == "resnet_depth":
        return step_call(resnet.ResNet(depth=size, norm=constructor), RESNET_BATCH_SIZE)
    widths = [MLP_WIDTH] * size if axis == "depth" else [size] * MLP_DEPTH
    return step_call(mlp.MLP(widths=tuple(widths), norm=constructor), BATCH_SIZE)


def step_call(model: Any, batch_size: int) -> Callable[[], float]:
    """Return what measures a step of plain SGD, in a compiled loop of some."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bn_jax import data as data_lib
    from bn_jax.training import state as state_lib
    from bn_jax.training import step as step_lib

    train = data_lib.load("sample").train
    # A rate at which no model diverges, which would end the loop.
    optimizer = optax.sgd(1e-3)
    variables = state_lib.init_variables(
        model, jax.random.key(0), train.images.shape[1:]
    )
    state = state_lib.init_state(variables, optimizer)
    shape = (MAX_STEPS, batch_size)
    order = np.random.default_rng(0).integers(0, len(train.labels), shape)
    data = step_lib.Batch(jnp.asarray(train.images), jnp.asarray(train.labels))
    source = step_lib.Stored(data, jnp.asarray(order))
    run = jax.jit(
        functools.partial(
            step_lib.run_steps,
            step_lib.make_train_step(model, optimizer),
            max_steps=MAX_STEPS,
        )
    )

    def seconds(num_steps: int) -> float:
        started = time.perf_counter()
        stop = jnp.int32(num_steps)
        after, _ = jax.block_until_ready(run(state, source, jnp.int32(0), stop))
        taken = time.perf_counter() - started
        if int(after.step) != num_steps:
            raise FloatingPointError(f"{type(model).__name__} diverged at rate 1e-3")
        return taken / num_steps

    seconds(1)  # compiles
    num_steps = min(MAX_STEPS, 1 + int(MEASURED_SECONDS / seconds(2)))
    return lambda: seconds(num_steps)


def sweep_call(norm: str, num_members: int) -> Callable[[], float]:
    """Return what measures a step of all members, in an epoch of the sample."""
    from bn_jax import data as data_lib
    from bn_jax.training.sweep import Sweep

    configs = [
        config_lib.TrainConfig(
            dataset="sample", norm=norm, learning_rate=0.1, seed=seed, epochs=10**6
        )
        for seed in range(num_members)
    ]
    sweep = Sweep(configs, data_lib.load("sample"))
    # Evaluation at an epoch's end is not in the sweep's clock.
    epochs = sweep.train()
    next(epochs)

    def seconds() -> float:
        before, step = sweep.progress().seconds, sweep.step
        next(number for number in epochs if number is not None)
        return (sweep.progress().seconds - before) / (sweep.step - step)

    return seconds


def write(folder: Path, measured: Mapping[str, Sequence[timing.Measurement]]) -> None:
    """Print and write how the time of a step grows."""
    from bn_jax import plots
    from bn_jax.runs import results

    seconds = {
        arm: {int(size): [row[size] for row in rows] for size in rows[0]}
        for arm, rows in measured.items()
    }
    medians = {
        arm: {size: timing.summarize(values) for size, values in by_size.items()}
        for arm, by_size in seconds.items()
    }
    slopes = {
        arm: timing.slope(list(of_arm), [summary.median for summary in of_arm.values()])
        for arm, of_arm in medians.items()
    }
    last = {
        arm: timing.slope(list(of_arm)[-2:], [s.median for s in of_arm.values()][-2:])
        for arm, of_arm in medians.items()
    }
    rows = [["what grows", "norm", "ms a step, by size", "slope", "at the last two"]]
    panels = {}
    for name, axis in AXES.items():
        title = f"{axis.model}: {axis.label}"
        panels[title] = {NORMS[norm]: medians[f"{name}/{norm}"] for norm in NORMS}
        for norm in NORMS:
            of_arm = medians[f"{name}/{norm}"]
            cells = ", ".join(f"{n}: {s.median * 1e3:.3g}" for n, s in of_arm.items())
            arm = f"{name}/{norm}"
            rows.append(
                [title, NORMS[norm], cells, f"{slopes[arm]:.2f}", f"{last[arm]:.2f}"]
            )
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    n = len(next(iter(measured.values())))
    plots.growth(
        panels,
        "s a step",
        f"n = {n} rounds; band: least to greatest",
        folder / "growth.png",
    )
    summary = {
        "seconds_a_step": seconds,
        "slope": slopes,
        "slope_of_the_last_two": last,
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    print(f"written to {folder}: table.md, {results.RESULTS}, growth.png; n = {n}")


if __name__ == "__main__":
    launch.start(main, define_flags)
