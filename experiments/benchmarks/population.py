r"""How long do exact population statistics take, beside an epoch of training?

The statistics of LeNet's batch norm layers over N training images, layer by layer and
in one pass (`exact_statistics`, as a run's last evaluation calls it),
for growing N; by the time of one epoch of training on all images.

  python -m experiments.benchmarks.population --workdir=runs/population       3 minutes
  python -m experiments.benchmarks.population --workdir=runs/pop-try --smoke  a minute

Each way, and the epoch, is a process of its own on one device, and they are timed in
turns. In the clock: a call on images that are on the device as bytes, from the call
until the statistics are there. Not in it: the first call of each N, which compiles, and
is in results.json. The slope on log-log axes says how the time grows: 1 is in
proportion to N, less is a cost that does not depend on N. First both ways must agree on
the first layer, whose input depends on no other. The folder receives results.json,
table.md and population.png.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bn_jax import fields
from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import timing

SIZES = (1_000, 4_000, 16_000, 60_000)
EPOCH = "epoch"
MODES = {"layerwise": "layer by layer", "one_pass": "in one pass"}
# Both compute the first layer's moments in float32, from the same batches.
TOLERANCE = 1e-5


def define_flags() -> None:
    launch.define_data_flags()
    launch.define_workdir_flag()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("rounds", 7, "Of each arm.", lower_bound=1)
    flags.DEFINE_list(
        "sizes", list(map(str, SIZES)), "N, separated by commas; all images at most."
    )
    flags.DEFINE_boolean("smoke", False, "The sample and 2 rounds, unless given.")
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = {"dataset": "sample", "rounds": 2} if flags.FLAGS.smoke else {}
    dataset, rounds = (launch.given_or(name, smoke) for name in ("dataset", "rounds"))
    if flags.FLAGS.arm is not None:
        time_arm(flags.FLAGS.arm, dataset, flags.FLAGS.sizes)
        return
    sizes_of(flags.FLAGS.sizes, 1)  # refuses bad ones before an arm is started
    config = {"dataset": dataset, "rounds": rounds, "sizes": flags.FLAGS.sizes}
    with launch.experiment("population_speed", config, repeat=False) as folder:
        about, measured = timing.interleaved(
            "experiments.benchmarks.population",
            dict.fromkeys((EPOCH, *MODES), {}),
            rounds=rounds,
            arguments=[
                f"--dataset={dataset}",
                f"--sizes={','.join(flags.FLAGS.sizes)}",
                *launch.data_arguments(),
            ],
        )
        write(folder, about, measured)


def sizes_of(names: Sequence[str], num_examples: int) -> list[int]:
    """Return the numbers of examples to measure, in order, none beyond all there are.

    Raises:
      ConfigError: if one is not a positive number.
    """
    if not all(name.isdigit() and int(name) for name in names):
        raise fields.ConfigError(f"sizes={names}; expected such as 1000,4000")
    return sorted({min(int(name), num_examples) for name in names})


def time_arm(arm: str, dataset: str, sizes: Sequence[str]) -> None:
    """Set an arm up, and time it whenever told to."""
    from bn_jax import data as data_lib
    from bn_jax.training import loop

    data = data_lib.load(
        dataset, data_dir=flags.FLAGS.data_dir, idx_dir=flags.FLAGS.idx_dir
    )
    about: dict[str, Any] = {
        "source": data.source,
        "num_examples": len(data.train.labels),
    }
    trainer = loop.Trainer(config_lib.TrainConfig(epochs=10**6), data)
    if arm == EPOCH:
        training = trainer.train()

        def epoch() -> timing.Measurement:
            report = next(report for report in training if report is not None)
            return {"seconds": report.seconds}

        timing.serve(about, epoch)
        return
    time_statistics(arm, trainer, sizes_of(sizes, len(data.train.labels)), about)


def time_statistics(
    mode: str, trainer: Any, sizes: Sequence[int], about: Mapping[str, Any]
) -> None:
    """Time exact statistics of an untrained model at each size."""
    import jax
    import jax.numpy as jnp

    from bn_jax.measures import population
    from bn_jax.training import evaluation
    from bn_jax.training import step as step_lib

    predict = functools.partial(step_lib.predict, trainer.model)
    variables = jax.tree.map(jnp.asarray, trainer.state().variables)
    images = jnp.asarray(trainer.data.train.images)

    def seconds(size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        statistics = population.exact_statistics(
            predict,
            variables,
            images,
            batch_size=evaluation.BATCH_SIZE,
            mode=mode,
            num_examples=size,
        )
        jax.block_until_ready(statistics)
        return time.perf_counter() - started, statistics

    first = {size: seconds(size) for size in sizes}
    statistics = first[sizes[-1]][1]["norm1"]
    timing.serve(
        {
            **about,
            "first_layer": [*statistics["mean"].tolist(), *statistics["var"].tolist()],
            "first_call_seconds": {size: first[size][0] for size in sizes},
        },
        lambda: {str(size): seconds(size)[0] for size in sizes},
    )


def check_first_layer(about: Mapping[str, Any]) -> float:
    """Return how far both ways are apart on the first layer.

    Raises:
      FloatingPointError: if it is beyond the tolerance.
    """
    layers = {mode: about[mode]["first_layer"] for mode in MODES}
    apart = timing.largest_differences(layers, layers["layerwise"])["one_pass"]
    if apart > TOLERANCE:
        raise FloatingPointError(
            f"the first layer's statistics differ by {apart:.3g} between the two ways; "
            "they do not measure the same, so their times say nothing"
        )
    return apart


def write(
    folder: Path,
    about: Mapping[str, Any],
    measured: Mapping[str, Sequence[timing.Measurement]],
) -> None:
    """Check that both ways agree; print and write what they took."""
    from bn_jax import plots
    from bn_jax.runs import results

    apart = check_first_layer(about)
    epochs = [row["seconds"] for row in measured[EPOCH]]
    sizes = [int(name) for name in measured["layerwise"][0]]
    seconds = {
        mode: {n: [row[str(n)] for row in measured[mode]] for n in sizes}
        for mode in MODES
    }
    ratios = {
        mode: {n: timing.ratios(seconds[mode][n], epochs) for n in sizes}
        for mode in MODES
    }
    slopes = {
        mode: timing.slope(
            sizes, [timing.summarize(seconds[mode][n]).median for n in sizes]
        )
        for mode in MODES
        if len(sizes) > 1
    }
    num_examples = about[EPOCH]["num_examples"]
    rows = [[f"time, to an epoch of {num_examples:,}", *(f"N = {n:,}" for n in sizes)]]
    rows[0].append("slope")
    for mode, title in MODES.items():
        cells = [timing.interval(ratios[mode][n]) for n in sizes]
        slope = f"{slopes[mode]:.2f}" if mode in slopes else "-"
        rows.append([title, *cells, slope])
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    n = len(epochs)
    plots.growth(
        {"N, examples": {title: ratios[mode] for mode, title in MODES.items()}},
        f"time, to an epoch of {num_examples:,}",
        f"n = {n} rounds; band: least to greatest",
        folder / "population.png",
    )
    summary = {
        "ratio_to_epoch": {
            mode: {size: ratio._asdict() for size, ratio in ratios[mode].items()}
            for mode in MODES
        },
        "slope": slopes,
        "seconds": {**seconds, EPOCH: epochs},
        "first_call_seconds": {m: about[m]["first_call_seconds"] for m in MODES},
        "largest_difference_of_first_layer": apart,
        "data_source": about[EPOCH]["source"],
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    print(
        f"an epoch takes {timing.interval(timing.summarize(epochs))} s; n = {n} rounds"
    )
    print(f"written to {folder}: table.md, {results.RESULTS}, population.png")


if __name__ == "__main__":
    launch.start(main, define_flags)
