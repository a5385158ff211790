r"""Where does the time go?

By part of a program, from JAX's own trace of it: of a step of LeNet with batch norm on
one device and on two with synced statistics; of batch norm alone, forward and backward,
ours and the plain one-pass form, at the shapes of `batch_norm`; and of exact statistics
of the training set, by pass.

  python -m experiments.benchmarks.profile --workdir=runs/profile             3 minutes
  python -m experiments.benchmarks.profile --workdir=runs/profile-try --smoke

Times are those of XLA's operations, which take in several of ours: one counts for the
part that made its last step. Of two devices they are the mean; waiting for the other
device counts as communication. Tracing itself takes time, so parts are to be compared
with each other, not with other benchmarks. The folder receives results.json, table.md
and figures of the parts.
"""

from __future__ import annotations

import collections
import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from bn_jax import fields
from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import batch_norm, batch_norm_calls, timing

BACKWARD = "transpose("
STEPS = 5  # of batch norm alone, in a trace


class Arm(NamedTuple):
    """A program that is traced."""

    title: str
    make: Callable[[Any], Callable[[], timing.Measurement]]  # of the images
    env: Mapping[str, str] = {}


def trace(run: Callable[[], Any]) -> dict[tuple[str, int], dict[str, float]]:
    """Run under JAX's profiler.

    Returns:
      Seconds by operation, over all devices, by the module's name and the program's
      number.
    """
    import jax
    from jax.profiler import ProfileData

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
    """Return the seconds by operation of the program that took most."""
    return max(of_programs.values(), key=lambda seconds: sum(seconds.values()))


def sources(compiled: str) -> dict[str, str]:
    """Return where each operation of a compiled program came from, as JAX names it."""
    found = re.finditer(r'%([\w.-]+) = .*?op_name="([^"]*)"', compiled)
    return {match[1]: match[2] for match in found}


def part_of_lenet(source: str) -> str:
    """Return the part of a training step that an operation came from."""
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
    """Return the part of batch norm alone that an operation came from."""
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
    """Return milliseconds a step by part."""
    parts: dict[str, float] = collections.defaultdict(float)
    for operation, value in seconds.items():
        if operation.startswith("while"):  # it contains the others
            continue
        part = part_of(names.get(operation, ""))
        parts[part] += 1e3 * value / steps
    return dict(parts)


def lenet(data: Any, *, devices: int) -> Callable[[], timing.Measurement]:
    """Return what traces an epoch of LeNet on so many devices."""
    from bn_jax.training import loop, parallel

    config = config_lib.TrainConfig(epochs=10**6)
    placement = parallel.place(config, devices=str(devices))
    trainer = loop.Trainer(config, data, placement=placement)
    training = trainer.train()

    def epoch() -> None:
        next(report for report in training if report is not None)

    epoch()
    names = sources(trainer.lower().compile().as_text())

    def measure() -> timing.Measurement:
        seconds = longest(trace(epoch))
        return by_part(seconds, names, part_of_lenet, trainer.steps_per_epoch * devices)

    return measure


def alone(
    data: Any, *, make_layer: Callable[[Any], Any], shape: Sequence[int]
) -> Callable[[], timing.Measurement]:
    """Return what traces batch norm alone at a shape."""
    import jax

    del data
    case = batch_norm_calls.make_case(shape)
    layer = make_layer(case)
    step = batch_norm_calls.step_of(layer)
    arguments = (layer.params, layer.state, *map(jax.numpy.asarray, case[:2]))
    names = sources(step.lower(*arguments).compile().as_text())

    def run() -> None:
        for _ in range(STEPS):
            jax.block_until_ready(step(*arguments))

    run()

    def measure() -> timing.Measurement:
        seconds = longest(trace(run))
        return by_part(seconds, names, part_of_batch_norm, STEPS)

    return measure


def statistics(data: Any) -> Callable[[], timing.Measurement]:
    """Return what traces the exact statistics of the training set, pass by pass."""
    import jax
    import jax.numpy as jnp

    from bn_jax.measures import population
    from bn_jax.training import evaluation, loop
    from bn_jax.training import step as step_lib

    trainer = loop.Trainer(config_lib.TrainConfig(), data)
    variables = jax.tree.map(jnp.asarray, trainer.state().variables)
    images = jnp.asarray(data.train.images)

    def run() -> None:
        statistics = population.exact_statistics(
            functools.partial(step_lib.predict, trainer.model),
            variables,
            images,
            batch_size=evaluation.BATCH_SIZE,
        )
        jax.block_until_ready(statistics)

    run()

    def measure() -> timing.Measurement:
        of_programs = trace(run)
        passes = sorted(key for key in of_programs if "pooled" in key[0])
        return {
            f"pass {i}": 1e3
            * sum(v for k, v in of_programs[key].items() if k[:5] != "while")
            for i, key in enumerate(passes, start=1)
        }

    return measure


ARMS = {
    "lenet": Arm("LeNet, a step", functools.partial(lenet, devices=1)),
    "lenet_2_devices": Arm(
        "LeNet, a step on 2 devices, synced", functools.partial(lenet, devices=2)
    ),
    "statistics": Arm("exact statistics", statistics),
    **{
        f"{name}_{batch_norm.shape_name(shape)}": Arm(
            f"{title}, {batch_norm.shape_name(shape)}",
            functools.partial(alone, make_layer=make_layer, shape=shape),
            batch_norm.KEEP_MEMORY,
        )
        for shape in batch_norm.SHAPES
        for name, title, make_layer in (
            ("ours", "batch norm", batch_norm_calls.bn_jax_layer),
            ("one_pass", "plain one-pass", batch_norm_calls.one_pass_layer),
        )
    },
}


def define_flags() -> None:
    launch.define_data_flags()
    launch.define_workdir_flag()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("rounds", 5, "Traces of each program.", lower_bound=1)
    flags.DEFINE_boolean("smoke", False, "The sample and 2 rounds, unless given.")
    flags.DEFINE_list(
        "arms", list(ARMS), f"What to trace, separated by commas, of {', '.join(ARMS)}."
    )
    flags.DEFINE_string("arm", None, "Trace this when told to; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = {"dataset": "sample", "rounds": 2} if flags.FLAGS.smoke else {}
    dataset = launch.given_or("dataset", smoke)
    if flags.FLAGS.arm is not None:
        serve(ARMS[flags.FLAGS.arm], dataset)
        return
    rounds, arms = launch.given_or("rounds", smoke), flags.FLAGS.arms
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        raise fields.ConfigError(
            f"arms={','.join(unknown)}; expected some of {', '.join(ARMS)}"
        )
    config = {"dataset": dataset, "rounds": rounds, "arms": arms}
    with launch.experiment("profile", config, repeat=False) as folder:
        about, measured = timing.interleaved(
            "experiments.benchmarks.profile",
            {name: ARMS[name].env for name in arms},
            rounds=rounds,
            arguments=[f"--dataset={dataset}", *launch.data_arguments()],
        )
        write(folder, about, measured)


def serve(arm: Arm, dataset: str) -> None:
    """Set a program up, and trace it whenever told to."""
    import jax

    from bn_jax import data as data_lib

    jax.config.update("jax_num_cpu_devices", 2)
    data = data_lib.load(
        dataset, data_dir=flags.FLAGS.data_dir, idx_dir=flags.FLAGS.idx_dir
    )
    timing.serve({"source": data.source}, arm.make(data))


def write(
    folder: Path,
    about: Mapping[str, Any],
    measured: Mapping[str, Sequence[timing.Measurement]],
) -> None:
    """Print and write what the parts of each program took."""
    from bn_jax import plots
    from bn_jax.runs import results

    summaries, rows = {}, [["program", "part", "ms", "share"]]
    for name, traces in measured.items():
        parts = sorted(
            {part for trace in traces for part in trace},
            key=lambda part: -sum(trace.get(part, 0.0) for trace in traces),
        )
        summaries[name] = {
            part: timing.summarize([trace.get(part, 0.0) for trace in traces])
            for part in parts
        }
        total = sum(summary.median for summary in summaries[name].values())
        title = ARMS[name].title
        for part, summary in summaries[name].items():
            share = f"{100 * summary.median / total:.0f}%"
            rows.append([title, part, timing.interval(summary), share])
            title = ""
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    n = len(next(iter(measured.values())))
    for group in ("lenet", "ours", "one_pass"):
        panels = {
            ARMS[name].title: parts
            for name, parts in summaries.items()
            if name.startswith(group)
        }
        if panels:
            every = dict.fromkeys(part for parts in panels.values() for part in parts)
            absent = timing.summarize([0.0])
            plots.bar_panels(
                {
                    title: {part: parts.get(part, absent) for part in every}
                    for title, parts in panels.items()
                },
                "ms",
                f"n = {n} traces; lines: least to greatest",
                folder / f"{group}.png",
            )
    results.write_json(
        folder / results.RESULTS,
        {
            "milliseconds": {
                name: {part: s._asdict() for part, s in parts.items()}
                for name, parts in summaries.items()
            },
            "data_source": next(iter(about.values()))["source"],
            "environment": results.environment(),
        },
    )
    print(text)
    print(f"n = {n} traces; written to {folder}: table.md, {results.RESULTS}, figures")


if __name__ == "__main__":
    launch.start(main, define_flags)
