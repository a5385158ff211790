r"""How far is batch norm, alone, from what memory allows, and from the others?

Forward and backward in training: y, the gradients of x, gamma and beta for a given
gradient of y, and the moved averages; float32, at three shapes of ResNets and LeNet.
Ours as the function, in two layouts, and as modules; Flax, Haiku and Keras on JAX;
PyTorch in two memory formats; the plain one-pass form with variance E[x^2] - E[x]^2.

  pip install -e '.[bench]'
  python -m experiments.benchmarks.batch_norm --workdir=runs/batch_norm        3 minutes
  python -m experiments.benchmarks.batch_norm --workdir=runs/bn-try --smoke    a minute

The floor is the time of 8 passes over x: forward reads x for the moments, reads it
again and writes y; backward reads x and the gradient for the sums, reads both again and
writes. A pass takes half the time of a jitted y = c x, in a buffer of its own, which
reads once and writes once; it is measured in turns with the rest.

A round repeats each call for --seconds at each shape, and waits for each result; all
but PyTorch run one jitted function, PyTorch its layer and `torch.autograd.grad`. Every
call returns new arrays. So that no one's time is that of the system clearing pages,
which glibc returns after each call, all arms run with malloc told to keep memory, as
XLA does within a program. First y and the gradients of each arm must agree with a
float64 reference. The folder receives results.json, table.md and batch_norm.png.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from bn_jax import fields
from experiments import launch
from experiments.benchmarks import batch_norm_calls as calls
from experiments.benchmarks import timing

SHAPES = ((256, 24, 24, 6), (64, 56, 56, 64), (32, 14, 14, 256))  # [N, H, W, C]
NUM_PASSES = 8
# Of the greatest value of each result; float32 sums of 200,000 values cost 1e-5.
TOLERANCE = 1e-4
# What is freed stays with the process. Without, a call that returns 51 MB spends most
# of its time in page faults; a mapping of its own, above 32 MB, cannot be kept.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
}


class Arm(NamedTuple):
    """What is timed."""

    title: str
    make: Callable[[calls.Case], calls.Call]
    needs: Sequence[str] = ()
    env: Mapping[str, str] = {}


FLOOR = "bandwidth"
OURS = ("ours", "ours_chwn", "ours_linen", "ours_nnx")
KERAS = {"KERAS_BACKEND": "jax"}
ARMS = {
    FLOOR: Arm("floor: 8 passes", calls.bandwidth_call),
    "ours": Arm("bn_jax.batch_norm", calls.by_jax(calls.bn_jax_layer)),
    "ours_chwn": Arm(
        "bn_jax.batch_norm, CHWN",
        calls.by_jax(
            functools.partial(calls.bn_jax_layer, feature_axis=0), channels_first=True
        ),
    ),
    "ours_linen": Arm(
        "bn_jax.linen",
        calls.by_jax(functools.partial(calls.linen_layer, module="bn_jax.linen")),
    ),
    "ours_nnx": Arm(
        "bn_jax.nnx",
        calls.by_jax(functools.partial(calls.nnx_layer, module="bn_jax.nnx")),
    ),
    "one_pass": Arm("plain one-pass in jnp", calls.by_jax(calls.one_pass_layer)),
    "flax_linen": Arm(
        "Flax linen",
        calls.by_jax(functools.partial(calls.linen_layer, module="flax.linen")),
    ),
    "flax_nnx": Arm(
        "Flax nnx", calls.by_jax(functools.partial(calls.nnx_layer, module="flax.nnx"))
    ),
    "haiku": Arm("Haiku", calls.by_jax(calls.haiku_layer), ["haiku"]),
    "keras": Arm("Keras on JAX", calls.by_jax(calls.keras_layer), ["keras"], KERAS),
    "torch": Arm(
        "PyTorch, NCHW",
        functools.partial(calls.torch_call, channels_last=False),
        ["torch"],
    ),
    "torch_channels_last": Arm(
        "PyTorch, channels last",
        functools.partial(calls.torch_call, channels_last=True),
        ["torch"],
    ),
}
PEERS = ("flax_linen", "flax_nnx", "haiku", "keras", "torch", "torch_channels_last")


def define_flags() -> None:
    launch.define_workdir_flag()
    flags.DEFINE_integer("rounds", 7, "Of each arm.", lower_bound=1)
    flags.DEFINE_float(
        "seconds", 0.3, "Time of a round at each shape.", lower_bound=0.0
    )
    flags.DEFINE_list(
        "shapes",
        [shape_name(shape) for shape in SHAPES],
        "N x H x W x C, separated by commas.",
    )
    flags.DEFINE_list(
        "arms", list(ARMS), f"What to time, separated by commas, of {', '.join(ARMS)}."
    )
    flags.DEFINE_boolean(
        "smoke", False, "2 short rounds at the two smaller shapes, unless given."
    )
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")


def shape_name(shape: Sequence[int]) -> str:
    """Return a shape as "256x24x24x6"."""
    return "x".join(map(str, shape))


def parse_shape(name: str) -> tuple[int, ...]:
    """Return the shape of such a name.

    Raises:
      ConfigError: if it does not name four positive numbers.
    """
    sizes = name.split("x")
    if len(sizes) != 4 or not all(s.isdigit() and int(s) for s in sizes):
        raise fields.ConfigError(f"shapes={name!r}; expected such as 256x24x24x6")
    return tuple(map(int, sizes))


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke: dict[str, Any] = {}
    if flags.FLAGS.smoke:
        small = [shape_name(SHAPES[0]), shape_name(SHAPES[2])]
        smoke = {"rounds": 2, "seconds": 0.02, "shapes": small}
    rounds, seconds, shapes, names = (
        launch.given_or(name, smoke) for name in ("rounds", "seconds", "shapes", "arms")
    )
    for shape in shapes:
        parse_shape(shape)
    if flags.FLAGS.arm is not None:
        time_arm(ARMS[flags.FLAGS.arm], shapes, seconds)
        return
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise fields.ConfigError(
            f"arms={','.join(unknown)}; expected of {', '.join(ARMS)}"
        )
    skipped = timing.missing({name: ARMS[name].needs for name in names})
    for name, reason in skipped.items():
        print(f"left out: {name} ({reason})", flush=True)
    # The floor is always there: the ratios are to it.
    arms = [name for name in ARMS if name == FLOOR or name in names]
    arms = [name for name in arms if name not in skipped]
    config = {"rounds": rounds, "seconds": seconds, "shapes": shapes, "arms": arms}
    with launch.experiment("batch_norm_speed", config, repeat=False) as folder:
        about, measured = timing.interleaved(
            "experiments.benchmarks.batch_norm",
            {name: {**KEEP_MEMORY, **ARMS[name].env} for name in arms},
            rounds=rounds,
            arguments=[f"--seconds={seconds}", f"--shapes={','.join(shapes)}"],
        )
        write(folder, about, measured, skipped=skipped)


def time_arm(arm: Arm, shapes: Sequence[str], seconds: float) -> None:
    """Set an arm up, and time it at each shape whenever told to."""
    from experiments.benchmarks import lenet

    if not {"torch"} & set(arm.needs):
        lenet.set_float32()
    made, wrong = {}, {}
    for name in shapes:
        case = calls.make_case(parse_shape(name))
        made[name] = arm.make(case)
        wrong[name] = calls.errors(made[name].result(), calls.reference(case))

    def measure() -> timing.Measurement:
        return {
            name: seconds_per_call(call.run, seconds) for name, call in made.items()
        }

    timing.serve({"errors": wrong}, measure)


def seconds_per_call(run: Callable[[], Any], seconds: float) -> float:
    """Return the mean time of a call, called again for at least so many seconds."""
    count, elapsed = 0, 0.0
    started = time.perf_counter()
    while not count or elapsed < seconds:
        run()
        count += 1
        elapsed = time.perf_counter() - started
    return elapsed / count


def check_errors(about: Mapping[str, Any]) -> float:
    """Return the greatest error of all arms.

    Raises:
      FloatingPointError: if one is beyond the tolerance.
    """
    worst = {
        f"{arm} at {shape}, {part}": error
        for arm, said in about.items()
        for shape, parts in said["errors"].items()
        for part, error in parts.items()
    }
    faults = {where: e for where, e in worst.items() if not e <= TOLERANCE}
    if faults:
        raise FloatingPointError(f"results differ from float64 by {faults}")
    return max(worst.values())


def floors(seconds: Sequence[float]) -> list[float]:
    """Return the times of 8 passes, of those of one read and one written."""
    return [NUM_PASSES / 2 * s for s in seconds]


class Compared(NamedTuple):
    """Times at one shape, compared round by round."""

    to_floor: dict[str, timing.Summary]  # by arm
    best_peer: str | None  # that of the least median
    to_best_peer: dict[str, timing.Summary]  # of ours
    to_one_pass: dict[str, timing.Summary]  # of ours


def compare(times: Mapping[str, Sequence[float]]) -> Compared:
    """Compare the times of arms at one shape.

    Args:
      times: per round, by arm; that of the floor 8 passes.
    """
    medians = {arm: timing.summarize(t).median for arm, t in times.items()}
    peers = [arm for arm in PEERS if arm in times]
    best = min(peers, key=medians.__getitem__) if peers else None

    def ours_to(other: str | None) -> dict[str, timing.Summary]:
        if other not in times:
            return {}
        return {a: timing.ratios(times[a], times[other]) for a in OURS if a in times}

    return Compared(
        to_floor={a: timing.ratios(t, times[FLOOR]) for a, t in times.items()},
        best_peer=best,
        to_best_peer=ours_to(best),
        to_one_pass=ours_to("one_pass"),
    )


def write(
    folder: Path,
    about: Mapping[str, Any],
    measured: Mapping[str, Sequence[timing.Measurement]],
    *,
    skipped: Mapping[str, str],
) -> None:
    """Check that arms compute alike; print and write what they took."""
    from bn_jax import plots
    from bn_jax.runs import results

    error = check_errors(about)
    arms = list(measured)
    shapes = list(measured[FLOOR][0])
    times = {}
    for shape in shapes:
        of_shape = timing.values(measured, shape)
        times[shape] = {**of_shape, FLOOR: floors(of_shape[FLOOR])}
    compared = {shape: compare(times[shape]) for shape in shapes}

    header = ["time, to the floor", *shapes]
    rows = [header]
    for arm in arms:
        cells = [timing.interval(compared[s].to_floor[arm]) for s in shapes]
        rows.append([ARMS[arm].title, *cells])
    milliseconds = [["median, ms", *shapes]]
    for arm in arms:
        medians = [timing.summarize(times[s][arm]).median for s in shapes]
        milliseconds.append([ARMS[arm].title, *(f"{1e3 * m:.3g}" for m in medians)])
    text = timing.table(rows)
    beside = [["time of ours", *shapes]]
    for arm in [a for a in OURS if a in arms]:
        for other, field in (
            ("best peer", "to_best_peer"),
            ("one-pass", "to_one_pass"),
        ):
            cells = []
            for shape in shapes:
                ratios = getattr(compared[shape], field)
                best = compared[shape].best_peer if field == "to_best_peer" else None
                cell = timing.interval(ratios[arm]) if arm in ratios else "-"
                cells.append(cell + (f" {ARMS[best].title}" if best else ""))
            beside.append([f"{ARMS[arm].title}, to the {other}", *cells])
    text += "\n" + timing.table(beside) + "\n" + timing.table(milliseconds)
    (folder / "table.md").write_text(text)
    n = len(measured[FLOOR])
    plots.bar_panels(
        {
            shape: {ARMS[a].title: compared[shape].to_floor[a] for a in arms}
            for shape in shapes
        },
        "time, to the floor",
        f"n = {n} rounds; lines: least to greatest",
        folder / "batch_norm.png",
    )
    size = {shape: 4 * np.prod(parse_shape(shape)) for shape in shapes}
    summary = {
        shape: {
            "ratio_to_floor": _as_dicts(compared[shape].to_floor),
            "best_peer": compared[shape].best_peer,
            "ratio_to_best_peer": _as_dicts(compared[shape].to_best_peer),
            "ratio_to_one_pass": _as_dicts(compared[shape].to_one_pass),
            "seconds": times[shape],
            "bytes_per_second": float(
                NUM_PASSES * size[shape] / timing.summarize(times[shape][FLOOR]).median
            ),
        }
        for shape in shapes
    }
    results.write_json(
        folder / results.RESULTS,
        {
            "shapes": summary,
            "largest_error": error,
            "errors": {arm: about[arm]["errors"] for arm in arms},
            "skipped": skipped,
            "versions": timing.versions(["torch", "keras", "dm-haiku"]),
            "environment": results.environment(),
        },
    )
    print(text)
    print(f"results and gradients differ from float64 by at most {error:.1g} of them")
    print(f"n = {n} rounds; written to {folder}: table.md, {results.RESULTS}, ")
    print("  batch_norm.png")


def _as_dicts(summaries: Mapping[str, timing.Summary]) -> dict[str, Any]:
    return {arm: summary._asdict() for arm, summary in summaries.items()}


if __name__ == "__main__":
    launch.start(main, define_flags)
