r"""Where does the time go?

By part of a program, from JAX's own trace: of a step of LeNet with batch norm on one
device, and on two with synced statistics; of batch norm alone, forward and backward,
ours and the plain one-pass form, at the shapes of `batch_norm`; and of exact statistics
of the training set, by pass.

  python -m experiments.benchmarks.profile --workdir=runs/profile             3 minutes
  python -m experiments.benchmarks.profile --workdir=runs/profile-try --smoke

The times are those of XLA's operations. XLA fuses several of ours into one, which
counts for the part that made its last step. On two devices times are means over both,
and waiting for the other counts as communication. Tracing itself takes time, so compare
parts with each other, not with other benchmarks.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from bn_jax import fields, plots
from experiments.benchmarks import (
    batch_norm,
    batch_norm_calls,
    benchmark,
    timing,
    training,
)

BACKWARD = "transpose("
STEPS = 5  # of batch norm alone, in a trace


def trace(run: Callable[[], Any]) -> dict[tuple[str, int], dict[str, float]]:
    """Run a function under JAX's profiler.

    Returns:
      For each program, by its module's name and its number: the seconds of each
      operation, summed over all devices.
    """
    seconds: dict[tuple[str, int], dict[str, float]] = collections.defaultdict(
        lambda: collections.defaultdict(float)
    )
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    program = (stats["hlo_module"], stats["program_id"])
                    seconds[program][stats["hlo_op"]] += event.duration_ns / 1e9
    return seconds


def longest(
    of_programs: Mapping[tuple[str, int], Mapping[str, float]],
) -> Mapping[str, float]:
    """Return the operations of the program that took longest, with their seconds."""
    return max(of_programs.values(), key=lambda seconds: sum(seconds.values()))


def sources(compiled: str) -> dict[str, str]:
    """Return JAX's name of the source of each operation of a compiled program."""
    found = re.finditer(r'%([\w.-]+) = .*?op_name="([^"]*)"', compiled)
    return {match[1]: match[2] for match in found}


def part_of_lenet(source: str) -> str:
    """Return the part of a training step that an operation belongs to."""
    if source.endswith("/psum"):
        return "communication"
    model = re.search(r"jvp\(LeNet\)+/(?:(conv|norm|dense)\d/)?", source)
    if model is None:
        return "batch, update, rest"
    layer = {
        "conv": "convolutions",
        "norm": "batch norm",
        "dense": "dense layers",
        None: "sigmoid, pooling, loss",
    }[model[1]]
    return f"{layer}, {'backward' if BACKWARD in source else 'forward'}"


def part_of_batch_norm(source: str) -> str:
    """Return the part of batch norm alone that an operation belongs to."""
    way = "backward" if BACKWARD in source else "forward"
    if source.endswith("reduce_sum"):
        return f"sums, {way}"
    return f"{'x - c' if source.endswith('/sub') else 'the rest'}, {way}"


def by_part(
    seconds: Mapping[str, float],
    names: Mapping[str, str],
    part_of: Callable[[str], str],
    steps: int,
) -> timing.Measurement:
    """Add up the milliseconds of a step, by part.

    Args:
      seconds: by operation.
      names: source of each operation.
      part_of: the part that a source belongs to.
      steps: number of steps that the seconds are of, over all devices.
    """
    parts: dict[str, float] = collections.defaultdict(float)
    for operation, value in seconds.items():
        if operation.startswith("while"):  # contains the others
            continue
        part = part_of(names.get(operation, ""))
        parts[part] += 1e3 * value / steps
    return dict(parts)


def lenet(design: Design, *, devices: int) -> benchmark.Ready:
    """Set up a trainer, and trace an epoch."""
    trainer = training.trainer(design.load(), devices=devices)
    reports = trainer.train()
    training.next_epoch(reports)  # compiles
    names = sources(trainer.lower().compile().as_text())
    steps = trainer.steps_per_epoch * devices

    def measure() -> timing.Measurement:
        seconds = longest(trace(lambda: training.next_epoch(reports)))
        return by_part(seconds, names, part_of_lenet, steps)

    return benchmark.Ready(measure)


def alone(
    design: Design,
    *,
    make_layer: Callable[[batch_norm_calls.Case], batch_norm_calls.Layer],
    shape: Sequence[int],
) -> benchmark.Ready:
    """Set up batch norm alone at a shape, and trace a few steps."""
    del design
    case = batch_norm_calls.make_case(shape)
    layer = make_layer(case)
    step = batch_norm_calls.step_of(layer)
    arguments = (layer.params, layer.state, *map(jnp.asarray, (case.x, case.dy)))
    names = sources(step.lower(*arguments).compile().as_text())

    def run() -> None:
        for _ in range(STEPS):
            jax.block_until_ready(step(*arguments))

    run()  # compiles
    return benchmark.Ready(
        lambda: by_part(longest(trace(run)), names, part_of_batch_norm, STEPS)
    )


def statistics(design: Design) -> benchmark.Ready:
    """Set up exact statistics of the training set, and trace their passes."""
    run = training.statistics_call(training.trainer(design.load()))
    run()  # compiles

    def measure() -> timing.Measurement:
        of_programs = trace(run)
        passes = sorted(program for program in of_programs if "pooled" in program[0])
        milliseconds = {}
        for i, program in enumerate(passes, start=1):
            part = f"pass {i}"
            milliseconds |= by_part(of_programs[program], {}, lambda _, p=part: p, 1)
        return milliseconds

    return benchmark.Ready(measure)


ARMS = {
    "lenet": benchmark.Arm("LeNet, a step", functools.partial(lenet, devices=1)),
    "lenet_2_devices": benchmark.Arm(
        "LeNet, a step on 2 devices, synced",
        functools.partial(lenet, devices=2),
        devices=2,
    ),
    "statistics": benchmark.Arm("exact statistics", statistics),
    **{
        f"{name}_{batch_norm.shape_name(shape)}": benchmark.Arm(
            f"{title}, {batch_norm.shape_name(shape)}",
            functools.partial(alone, make_layer=make_layer, shape=shape),
            env=batch_norm.KEEP_MEMORY,
        )
        for shape in batch_norm.SHAPES
        for name, title, make_layer in (
            ("ours", "batch norm", batch_norm_calls.bn_jax_layer),
            ("one_pass", "plain one-pass", batch_norm_calls.one_pass_layer),
        )
    },
}
# The figures, by the beginning of their arms' names.
GROUPS = ("lenet", "ours", "one_pass")


@dataclasses.dataclass(frozen=True)
class Design(benchmark.DataDesign):
    """Which programs are traced, on what data."""

    rounds: int = fields.option_of(benchmark.Design, "rounds", 5)
    arms: tuple[str, ...] = benchmark.arms_option(ARMS)


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report the parts of each program, the longest first."""
    summaries, rows = {}, [["program", "part", "ms", "share"]]
    for name, traces in measured.rows.items():
        milliseconds = {
            part: [trace.get(part, 0.0) for trace in traces]
            for part in dict.fromkeys(part for trace in traces for part in trace)
        }
        parts = {
            part: timing.summarize(values)
            for part, values in sorted(
                milliseconds.items(), key=lambda item: -sum(item[1])
            )
        }
        summaries[name] = parts
        total = sum(summary.median for summary in parts.values())
        title = measured.titles[name]
        for part, summary in parts.items():
            share = f"{100 * summary.median / total:.0f}%"
            rows.append([title, part, timing.interval(summary), share])
            title = ""  # once a program
    figures = {}
    for group in GROUPS:
        panels = {
            measured.titles[name]: parts
            for name, parts in summaries.items()
            if name.startswith(group)
        }
        if panels:
            figures[group] = benchmark.Figure(plots.bar_panels, _alike(panels), "ms")
    return benchmark.Report([rows], {"milliseconds": summaries}, figures)


def _alike(
    panels: Mapping[str, Mapping[str, timing.Summary]],
) -> dict[str, dict[str, timing.Summary]]:
    """Return panels that all have the same bars, 0 where they had none."""
    every = dict.fromkeys(part for parts in panels.values() for part in parts)
    absent = timing.summarize([0.0])
    return {
        title: {part: parts.get(part, absent) for part in every}
        for title, parts in panels.items()
    }


BENCHMARK = benchmark.Benchmark(
    "profile", Design, ARMS, report, smoke={"dataset": "sample", "rounds": 2}
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
