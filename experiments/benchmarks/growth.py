r"""How does the time of a training step grow with what one can make larger?

With the batch (LeNet), the width (an MLP of four layers), the depth (MLPs of width 128,
and ResNets of width 8 with up to 110 layers) and the members of a sweep (LeNet), each
with batch norm and without; ResNets without it have Fixup's blocks. With the devices
that share the batch and its statistics, on a CPU host devices that share its cores, and
with the images of an epoch: LeNet with batch norm. The slope is that on log-log axes: 1
is in proportion. How exact statistics grow with the number of examples is in
experiments.benchmarks.population.

  python -m experiments.benchmarks.growth --workdir=runs/growth            20 minutes
  python -m experiments.benchmarks.growth --workdir=runs/growth-try --smoke  2 minutes

Each line of the figure has a process on one device. A measurement is a compiled loop of
steps on images of the embedded sample, about as many as take 0.1 s; compilation is not
in it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax import data as data_lib
from bn_jax import fields, linen, plots
from bn_jax.models import lenet, mlp, resnet
from bn_jax.training import feed, loop, parallel
from bn_jax.training import state as state_lib
from bn_jax.training.config import TrainConfig
from experiments.benchmarks import benchmark, timing, training

BATCH_SIZE = 256  # where the batch is not what grows
RESNET_BATCH_SIZE, RESNET_WIDTH = 32, 8
MLP_DEPTH, MLP_WIDTH = 4, 128
MEASURED_SECONDS = 0.1
MAX_STEPS = 200  # of one measurement


class Axis(NamedTuple):
    """What grows."""

    title: str
    sizes: Sequence[int]


AXES = {
    "batch": Axis("LeNet: examples a batch", (16, 64, 256, 1024, 4096)),
    "width": Axis("MLP: width", (64, 128, 256, 512, 1024)),
    "depth": Axis("MLP: layers", (2, 4, 8, 16, 32)),
    "resnet_depth": Axis("ResNet: layers", (8, 20, 32, 56, 110)),
    "members": Axis("LeNet: members of a sweep", (1, 2, 4, 8, 16)),
    "devices": Axis("LeNet: devices", (1, 2, 4, 8)),
    "images": Axis("LeNet: images of an epoch", (1024, 4096, 16384, 65536)),
}
ONLY_BATCH_NORM = ("devices", "images")
NORMS = {"batch_norm": "batch norm", "none": "none"}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.Design):
    """How far each axis goes."""

    rounds: int = fields.option_of(benchmark.Design, "rounds", 5)
    num_sizes: int = fields.option(
        5,
        "How many sizes of each axis, from the least.",
        valid=fields.Range("a number at least 2", lambda v: v >= 2),
    )


def set_up(design: Design, *, axis: str, norm: str) -> benchmark.Ready:
    """Set up one axis with one norm."""
    sizes = AXES[axis].sizes[: design.num_sizes]
    calls = {str(size): make_call(axis, norm, size) for size in sizes}
    return benchmark.Ready(lambda: {size: call() for size, call in calls.items()})


def make_call(axis: str, norm: str, size: int) -> Callable[[], float]:
    """Return a function that measures the seconds of a step."""
    if axis == "members":
        return sweep_call(norm, size)
    if axis == "devices":
        return epoch_call(norm, devices=size, a_step=True)
    if axis == "images":
        return epoch_call(norm, num_images=size)
    batch_size = {"batch": size, "resnet_depth": RESNET_BATCH_SIZE}
    return step_call(make_model(axis, norm, size), batch_size.get(axis, BATCH_SIZE))


def make_model(axis: str, norm: str, size: int) -> Any:
    """Return the model that is trained at a size."""
    constructor = linen.norm(norm)
    if axis == "batch":
        return lenet.LeNet(norm=constructor)
    if axis == "resnet_depth":
        # Without norm each plain block doubles the variance: 110 layers overflow.
        residual = "plain" if constructor else "fixup"
        return resnet.ResNet(
            depth=size, width=RESNET_WIDTH, norm=constructor, residual=residual
        )
    widths = [MLP_WIDTH] * size if axis == "depth" else [size] * MLP_DEPTH
    return mlp.MLP(widths=tuple(widths), norm=constructor)


def step_call(model: Any, batch_size: int) -> Callable[[], float]:
    """Return a function that measures a step of plain SGD, in a compiled loop."""
    train = data_lib.load("sample").train
    # At this rate no model diverges, which would end the loop early.
    optimizer = optax.sgd(1e-3)
    network = state_lib.Network(model, train.images.shape[1:])
    state = state_lib.init_state(network.init(jax.random.key(0)), optimizer)
    shape = (MAX_STEPS, batch_size)
    order = np.random.default_rng(0).integers(0, len(train.labels), shape)
    data = feed.Batch(jnp.asarray(train.images), jnp.asarray(train.labels))
    source = feed.Stored(data, jnp.asarray(order))
    train_step = loop.make_train_step(TrainConfig(), network, optimizer)
    run = jax.jit(
        functools.partial(loop.run_steps, train_step, pace=parallel.Pace(MAX_STEPS))
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
    """Return a function that measures a step of all members of a sweep."""
    members = [
        {"norm": norm, "learning_rate": 0.1, "seed": seed}
        for seed in range(num_members)
    ]
    _, epoch = training.sweep_epochs(members, data_lib.load("sample"))
    epoch()  # compiles

    def seconds() -> float:
        taken, steps = epoch()
        return taken / steps

    return seconds


def epoch_call(
    norm: str, *, num_images: int = 4096, devices: int = 1, a_step: bool = False
) -> Callable[[], float]:
    """Return a function that measures an epoch, or the mean of its steps."""
    sample = data_lib.load("sample")
    which = np.arange(num_images) % len(sample.train.labels)
    train = data_lib.Split(*(array[which] for array in sample.train))
    trainer = training.trainer(
        dataclasses.replace(sample, train=train),
        devices=devices,
        norm=norm,
        learning_rate=0.01,
    )
    reports = trainer.train()
    training.next_epoch(reports)  # compiles
    units = trainer.steps_per_epoch if a_step else 1
    return lambda: training.next_epoch(reports).seconds / units


ARMS = {
    f"{axis}/{norm}": benchmark.Arm(
        f"{AXES[axis].title}, {title}",
        functools.partial(set_up, axis=axis, norm=norm),
        devices=max(AXES[axis].sizes) if axis == "devices" else 1,
    )
    for axis in AXES
    for norm, title in NORMS.items()
    if norm == "batch_norm" or axis not in ONLY_BATCH_NORM
}


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report how the time of a step grows."""
    seconds = {
        arm: {int(size): [row[size] for row in rows] for size in rows[0]}
        for arm, rows in measured.rows.items()
    }
    summaries = {
        arm: {size: timing.summarize(times) for size, times in by_size.items()}
        for arm, by_size in seconds.items()
    }

    def slopes(first: int) -> dict[str, float]:
        """Return each arm's slope, over the sizes from the first one given."""
        return {
            arm: timing.slope(
                list(by_size)[first:], [s.median for s in by_size.values()][first:]
            )
            for arm, by_size in summaries.items()
        }

    whole, last = slopes(0), slopes(-2)
    times = "ms a step (an epoch, where its images grow), by size"
    rows = [["what grows", "norm", times, "slope", "at the last two"]]
    panels = {}
    for name, axis in AXES.items():
        by_norm = {
            title: arm
            for norm, title in NORMS.items()
            if (arm := f"{name}/{norm}") in summaries
        }
        panels[axis.title] = {title: summaries[arm] for title, arm in by_norm.items()}
        for title, arm in by_norm.items():
            cells = ", ".join(
                f"{size}: {s.median * 1e3:.3g}" for size, s in summaries[arm].items()
            )
            rows.append(
                [axis.title, title, cells, f"{whole[arm]:.2f}", f"{last[arm]:.2f}"]
            )
    return benchmark.Report(
        tables=[rows],
        results={
            "seconds_a_step": seconds,
            "slope": whole,
            "slope_of_the_last_two": last,
        },
        figures={"growth": benchmark.Figure(plots.growth, panels, "s a step or epoch")},
    )


BENCHMARK = benchmark.Benchmark(
    "growth",
    Design,
    ARMS,
    report,
    smoke={"rounds": 1, "num_sizes": 2},
    needed=ARMS,
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
