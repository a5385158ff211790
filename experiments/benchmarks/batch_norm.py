r"""How far is batch norm, alone, from what memory allows, and from the others?

Forward and backward in training: y, the gradients of x, gamma and beta for a given
gradient of y, and the new moving averages; float32, at three shapes of ResNets and
LeNet. Ours as the function, in two layouts, and as modules; Flax, Haiku and Keras on
JAX; PyTorch in two memory formats; the plain one-pass form with variance
E[x^2] - E[x]^2.

  pip install -e '.[bench]'
  python -m experiments.benchmarks.batch_norm --workdir=runs/batch_norm        3 minutes
  python -m experiments.benchmarks.batch_norm --workdir=runs/bn-try --smoke    a minute

The floor is the time of 8 passes over x. Forward reads x for the moments, reads it
again and writes y; backward reads x and the gradient for the sums, reads both again and
writes. A pass takes half the time of a jitted y = c x with a buffer of its own, which
reads once and writes once; it is measured in turns with the rest.

A round repeats each call for --seconds at each shape, and waits for each result. JAX
runs one jitted function; PyTorch runs its layer and `torch.autograd.grad`. Every call
returns new arrays, and glibc gives their memory back to the system, which then has to
clear pages. So that this is in nobody's time, malloc is told to keep memory in all
arms, as XLA does within a program. Before the times are reported, y and the gradients
of each arm must agree with a float64 reference.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as flax_linen
from flax import nnx as flax_nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax import fields, plots
from experiments.benchmarks import batch_norm_calls as calls
from experiments.benchmarks import benchmark, timing

SHAPES = ((256, 24, 24, 6), (64, 56, 56, 64), (32, 14, 14, 256))  # [N, H, W, C]
NUM_PASSES = 8
# Relative to the greatest value of each result; float32 sums of 200,000 values are off
# by 1e-5.
TOLERANCE = 1e-4
# Freed memory stays with the process. Without this, a call that returns 51 MB spends
# most of its time in page faults; malloc cannot keep a mapping of its own, above 32 MB.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

Make = Callable[[calls.Case], calls.Call]  # sets a library's batch norm up for a case


def shape_name(shape: Sequence[int]) -> str:
    """Return a shape as "256x24x24x6"."""
    return "x".join(map(str, shape))


def parse_shape(name: str) -> tuple[int, ...]:
    """Return the shape of a name that `shape_name` gave."""
    return tuple(map(int, name.split("x")))


def _names_a_shape(name: str) -> bool:
    sizes = name.split("x")
    return len(sizes) == 4 and all(s.isdecimal() and int(s) for s in sizes)


def set_up(design: Design, *, make: Make) -> benchmark.Ready:
    """Set up one library's call at each shape, and compare it with the reference."""
    made, wrong = {}, {}
    for name in design.shapes:
        case = calls.make_case(parse_shape(name))
        made[name] = make(case)
        wrong[name] = calls.errors(made[name].result(), calls.reference(case))
    return benchmark.Ready(
        lambda: {
            name: seconds_per_call(call.run, design.seconds)
            for name, call in made.items()
        },
        {"errors": wrong},
    )


def seconds_per_call(run: Callable[[], Any], seconds: float) -> float:
    """Return the mean time of a call, repeated for at least so many seconds."""
    count, elapsed = 0, 0.0
    started = time.perf_counter()
    while not count or elapsed < seconds:
        run()
        count += 1
        elapsed = time.perf_counter() - started
    return elapsed / count


def _arm(
    title: str,
    make: Make,
    needs: Sequence[str] = (),
    env: Mapping[str, str] = {},
) -> benchmark.Arm:
    return benchmark.Arm(
        title,
        functools.partial(set_up, make=make),
        needs,
        env={**KEEP_MEMORY, **env},
    )


FLOOR = "bandwidth"
OURS = ("ours", "ours_chwn", "ours_linen", "ours_nnx")
PEERS = ("flax_linen", "flax_nnx", "haiku", "keras", "torch", "torch_channels_last")


def _linen(module: Any) -> Make:
    return calls.by_jax(functools.partial(calls.linen_layer, module=module))


def _nnx(module: Any) -> Make:
    return calls.by_jax(functools.partial(calls.nnx_layer, module=module))


def _torch(*, channels_last: bool) -> Make:
    return functools.partial(calls.torch_call, channels_last=channels_last)


CHWN = functools.partial(calls.bn_jax_layer, feature_axis=0)
ARMS = {
    FLOOR: _arm("floor: 8 passes", calls.bandwidth_call),
    "ours": _arm("bn_jax.batch_norm", calls.by_jax(calls.bn_jax_layer)),
    "ours_chwn": _arm(
        "bn_jax.batch_norm, CHWN", calls.by_jax(CHWN, channels_first=True)
    ),
    "ours_linen": _arm("bn_jax.linen", _linen(bn_jax.linen.BatchNorm)),
    "ours_nnx": _arm("bn_jax.nnx", _nnx(bn_jax.nnx.BatchNorm)),
    "one_pass": _arm("plain one-pass in jnp", calls.by_jax(calls.one_pass_layer)),
    "flax_linen": _arm("Flax linen", _linen(flax_linen.BatchNorm)),
    "flax_nnx": _arm("Flax nnx", _nnx(flax_nnx.BatchNorm)),
    "haiku": _arm("Haiku", calls.by_jax(calls.haiku_layer), ["haiku"]),
    "keras": _arm(
        "Keras on JAX",
        calls.by_jax(calls.keras_layer),
        ["keras"],
        {"KERAS_BACKEND": "jax"},
    ),
    "torch": _arm("PyTorch, NCHW", _torch(channels_last=False), ["torch"]),
    "torch_channels_last": _arm(
        "PyTorch, channels last", _torch(channels_last=True), ["torch"]
    ),
}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.Design):
    """Which libraries are timed, at which shapes, for how long."""

    seconds: float = fields.option(
        0.3, "Time of a round at each shape.", valid=fields.NOT_NEGATIVE
    )
    shapes: tuple[str, ...] = fields.option(
        tuple(map(shape_name, SHAPES)),
        "Shapes of x: N x H x W x C.",
        valid=fields.Range("such as 256x24x24x6", _names_a_shape),
    )
    arms: tuple[str, ...] = benchmark.arms_option(ARMS)


def check_errors(about: Mapping[str, Any]) -> float:
    """Return the greatest error of all arms.

    Raises:
      FloatingPointError: if an error is greater than the tolerance.
    """
    errors = {
        f"{arm} at {shape}, {part}": error
        for arm, said in about.items()
        for shape, parts in said["errors"].items()
        for part, error in parts.items()
    }
    faults = {where: error for where, error in errors.items() if not error <= TOLERANCE}
    if faults:
        raise FloatingPointError(f"results differ from float64 by {faults}")
    return max(errors.values())


def floors(seconds: Sequence[float]) -> list[float]:
    """Return the times of 8 passes from those of one read and one write."""
    return [NUM_PASSES / 2 * s for s in seconds]


class Compared(NamedTuple):
    """Times at one shape, compared round by round."""

    to_floor: dict[str, timing.Summary]  # by arm
    best_peer: str | None  # the one of the least median
    to_best_peer: dict[str, timing.Summary]  # of ours
    to_one_pass: dict[str, timing.Summary]  # of ours


def compare(times: Mapping[str, Sequence[float]]) -> Compared:
    """Compare the times of arms at one shape.

    Args:
      times: per round, by arm; the floor's are of 8 passes.
    """
    medians = {arm: timing.summarize(t).median for arm, t in times.items()}
    peers = [arm for arm in PEERS if arm in times]
    best = min(peers, key=medians.__getitem__) if peers else None
    ours = {arm: times[arm] for arm in OURS if arm in times}

    def ours_to(other: str | None) -> dict[str, timing.Summary]:
        if other not in times:
            return {}
        return {arm: timing.ratios(t, times[other]) for arm, t in ours.items()}

    return Compared(
        to_floor=timing.ratios_to(FLOOR, times),
        best_peer=best,
        to_best_peer=ours_to(best),
        to_one_pass=ours_to("one_pass"),
    )


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report times to the floor, to the best peer and to the one-pass form."""
    error = check_errors(measured.about)
    titles = measured.titles
    shapes = list(measured.rows[FLOOR][0])
    times, compared = {}, {}
    for shape in shapes:
        of_shape = measured.values(shape)
        times[shape] = {**of_shape, FLOOR: floors(of_shape[FLOOR])}
        compared[shape] = compare(times[shape])

    def medians(arm: str) -> list[float]:
        return [timing.summarize(times[shape][arm]).median for shape in shapes]

    to_floor = [["time, to the floor", *shapes]]
    milliseconds = [["median, ms", *shapes]]
    for arm, title in titles.items():
        cells = [timing.interval(compared[shape].to_floor[arm]) for shape in shapes]
        to_floor.append([title, *cells])
        milliseconds.append([title, *(f"{1e3 * m:.3g}" for m in medians(arm))])
    beside = [["time of ours", *shapes]]
    for arm in (arm for arm in OURS if arm in titles):
        to_peer, to_one_pass = [], []
        for shape in shapes:
            of_shape = compared[shape]
            best = (
                "" if of_shape.best_peer is None else f" {titles[of_shape.best_peer]}"
            )
            to_peer.append(_cell(of_shape.to_best_peer, arm) + best)
            to_one_pass.append(_cell(of_shape.to_one_pass, arm))
        beside.append([f"{titles[arm]}, to the best peer", *to_peer])
        beside.append([f"{titles[arm]}, to the one-pass", *to_one_pass])
    panels = {
        shape: {title: compared[shape].to_floor[arm] for arm, title in titles.items()}
        for shape in shapes
    }
    num_bytes = [4 * NUM_PASSES * np.prod(parse_shape(shape)) for shape in shapes]
    by_shape = {
        shape: {
            "ratio_to_floor": compared[shape].to_floor,
            "best_peer": compared[shape].best_peer,
            "ratio_to_best_peer": compared[shape].to_best_peer,
            "ratio_to_one_pass": compared[shape].to_one_pass,
            "seconds": times[shape],
            "bytes_per_second": float(size / seconds),
        }
        for shape, size, seconds in zip(shapes, num_bytes, medians(FLOOR), strict=True)
    }
    return benchmark.Report(
        tables=[to_floor, beside, milliseconds],
        results={
            "shapes": by_shape,
            "largest_error": error,
            "errors": {arm: said["errors"] for arm, said in measured.about.items()},
        },
        figures={
            "batch_norm": benchmark.Figure(
                plots.bar_panels, panels, "time, to the floor"
            )
        },
        notes=[
            f"results and gradients differ from float64 by at most a share {error:.1g}"
        ],
    )


def _cell(summaries: Mapping[str, timing.Summary], arm: str) -> str:
    return timing.interval(summaries[arm]) if arm in summaries else "-"


BENCHMARK = benchmark.Benchmark(
    "batch_norm",
    Design,
    ARMS,
    report,
    smoke={
        "rounds": 2,
        "seconds": 0.02,
        "shapes": (shape_name(SHAPES[0]), shape_name(SHAPES[2])),
    },
    needed=(FLOOR,),  # all others are divided by it
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
