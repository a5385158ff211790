r"""How long do exact population statistics take, beside an epoch of training?

The statistics of LeNet's batch norm layers over N training images, layer by layer and
in one pass (`exact_statistics`, as the last evaluation of a run calls it), for growing
N, divided by the time of an epoch of training on all images.

  python -m experiments.benchmarks.population --workdir=runs/population       3 minutes
  python -m experiments.benchmarks.population --workdir=runs/pop-try --smoke  a minute

Both ways and the epoch each have a process on one device, and take turns. The clock
starts at the call, with the images on the device as bytes, and stops when the
statistics are there. The first call at each N, which compiles, is in results.json
alone. The slope is that of time against N on log-log axes: 1 is in proportion to N, and
less means a cost that does not depend on N. Before the times are reported, both ways
must agree on the first layer, whose input depends on no other.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from bn_jax import fields, plots
from experiments.benchmarks import benchmark, timing, training

EPOCH = "epoch"
# Both ways compute the first layer's moments in float32, from the same batches.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Design(benchmark.DataDesign):
    """On how many images statistics are measured."""

    sizes: tuple[int, ...] = fields.option(
        (1_000, 4_000, 16_000, 60_000),
        "Values of N; all images at most.",
        valid=fields.AT_LEAST_1,
    )


def sizes_within(sizes: Sequence[int], num_examples: int) -> list[int]:
    """Return sizes in order, none greater than the number of examples."""
    return sorted({min(size, num_examples) for size in sizes})


def epoch(design: Design) -> benchmark.Ready:
    """Set up training."""
    data = design.load()
    reports = training.trainer(data).train()
    return benchmark.Ready(
        lambda: {"seconds": training.next_epoch(reports).seconds},
        {"num_examples": len(data.train.labels)},
    )


def statistics(design: Design, *, mode: str) -> benchmark.Ready:
    """Set up exact statistics of an untrained model, at each size."""
    data = design.load()
    measure = training.statistics_call(training.trainer(data))
    sizes = sizes_within(design.sizes, len(data.train.labels))

    def seconds(size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        found = measure(mode=mode, num_examples=size)
        return time.perf_counter() - started, found

    first = {size: seconds(size) for size in sizes}
    layer = first[sizes[-1]][1]["norm1"]
    return benchmark.Ready(
        lambda: {str(size): seconds(size)[0] for size in sizes},
        {
            "first_layer": [*layer["mean"].tolist(), *layer["var"].tolist()],
            "first_call_seconds": {size: first[size][0] for size in sizes},
        },
    )


MODES = {
    mode: benchmark.Arm(title, functools.partial(statistics, mode=mode))
    for mode, title in {
        "layerwise": "layer by layer",
        "one_pass": "in one pass",
    }.items()
}
ARMS = {EPOCH: benchmark.Arm("an epoch", epoch), **MODES}


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report times to that of an epoch, and how they grow with N."""
    apart = timing.check_agreement(
        {mode: measured.about[mode]["first_layer"] for mode in MODES},
        "layerwise",
        tolerance=TOLERANCE,
        what="the first layer's statistics",
    )["one_pass"]
    epochs = [row["seconds"] for row in measured.rows[EPOCH]]
    sizes = [int(name) for name in measured.rows["layerwise"][0]]
    seconds = {
        mode: {n: [row[str(n)] for row in measured.rows[mode]] for n in sizes}
        for mode in MODES
    }
    ratios = {
        mode: {n: timing.ratios(times, epochs) for n, times in by_size.items()}
        for mode, by_size in seconds.items()
    }
    slopes = {
        mode: timing.slope(
            list(by_size),
            [timing.summarize(times).median for times in by_size.values()],
        )
        for mode, by_size in seconds.items()
        if len(by_size) > 1
    }
    label = f"time, to an epoch of {measured.about[EPOCH]['num_examples']:,}"
    rows = [[label, *(f"N = {n:,}" for n in sizes), "slope"]]
    for mode, by_size in ratios.items():
        slope = f"{slopes[mode]:.2f}" if mode in slopes else "-"
        cells = map(timing.interval, by_size.values())
        rows.append([measured.titles[mode], *cells, slope])
    return benchmark.Report(
        tables=[rows],
        results={
            "ratio_to_epoch": ratios,
            "slope": slopes,
            "seconds": {**seconds, EPOCH: epochs},
            "first_call_seconds": {
                mode: measured.about[mode]["first_call_seconds"] for mode in MODES
            },
            "largest_difference_of_first_layer": apart,
        },
        figures={
            "population": benchmark.Figure(
                plots.growth,
                {"N, examples": {measured.titles[m]: ratios[m] for m in MODES}},
                label,
            )
        },
        notes=[f"an epoch takes {timing.interval(timing.summarize(epochs))} s"],
    )


BENCHMARK = benchmark.Benchmark(
    "population",
    Design,
    ARMS,
    report,
    smoke={"dataset": "sample", "rounds": 2},
    needed=ARMS,
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
