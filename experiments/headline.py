r"""Does LeNet with batch norm train as the chapter says, and as Flax's own layer does?

The chapter trains LeNet on Fashion-MNIST for 10 epochs with batches of 256: with batch
norm written from scratch and with the framework's own layer, both at learning rate 1.0;
an earlier chapter trains it without, at 0.9, on images padded by 2. This trains all
arms from the same seeds.

  python -m experiments.headline --workdir=runs/headline           12 runs, 10 minutes
  python -m experiments.headline --workdir=runs/try --smoke        a try in a minute

Each run has a folder of its own in --workdir; a run that is finished is not repeated.
The summary is written beside them: runs.jsonl (a row per run), results.json (mean,
spread and n of each arm, and how far ours and Flax's are apart) and curves.png. What
came out is in experiments/results/headline and in experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bn_jax.training import config as config_lib
from experiments import launch

# Published runs without batch norm are of the chapter that introduces LeNet: rate .9
# and images padded by 2. `none` differs from the first two in norm and rate alone.
ARMS: dict[str, dict[str, Any]] = {
    "batch_norm": {"norm": "batch_norm", "learning_rate": 1.0},
    "flax": {"norm": "flax", "learning_rate": 1.0},
    "none": {"norm": "none", "learning_rate": 0.9},
    "none_padded": {"norm": "none", "learning_rate": 0.9, "first_padding": 2},
}
TITLES = {
    "batch_norm": "batch norm, ours (rate 1.0)",
    "flax": "batch norm, Flax's own (rate 1.0)",
    "none": "no batch norm (rate 0.9)",
    "none_padded": "no batch norm, images padded by 2",
}
SCORES = (
    "train_loss",
    "train_accuracy",
    "test_accuracy",
    "test_accuracy_exact",
    "examples_per_second",
)


def define_flags() -> None:
    launch.define_run_flags()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds, from 0.", lower_bound=1)
    flags.DEFINE_integer("epochs", 10, "Epochs of each run.", lower_bound=1)
    flags.DEFINE_boolean("smoke", False, "The sample, 1 epoch, 1 seed, unless given.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    launch.set_up_jax()
    smoke = {"dataset": "sample", "epochs": 1, "seeds": 1} if flags.FLAGS.smoke else {}
    base = config_lib.TrainConfig(
        dataset=launch.given_or("dataset", smoke),
        epochs=launch.given_or("epochs", smoke),
    )
    seeds = range(launch.given_or("seeds", smoke))
    with launch.experiment("headline", base.to_dict()) as workdir:
        rows = run_all(workdir, base, seeds)
        if rows:
            write_summary(workdir, rows)


def write_summary(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write and print what the runs have in common."""
    from bn_jax import plots, results

    (workdir / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {
        "arms": {arm: summarize(rows, arm) for arm in ARMS},
        "ours_against_flax": agreement(rows),
        "data_source": rows[0]["data_source"],
        "environment": results.environment(),
    }
    results.write_json(workdir / results.RESULTS, summary)
    plots.arms_by_epoch(rows, TITLES, workdir / "curves.png")
    for arm in ARMS:
        print(f"{arm:11s} " + "  ".join(lines(summary["arms"][arm])))
    print(f"ours against Flax's: {summary['ours_against_flax']}")
    print(f"written to {workdir}: runs.jsonl, {results.RESULTS}, curves.png")


def run_all(
    workdir: Path, base: config_lib.TrainConfig, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Train each arm from each seed, unless that is done.

    Returns:
      A row per run; on processes other than the primary none.
    """
    from bn_jax.training import distributed
    from bn_jax.training import run as run_lib

    data = launch.load_data(base.dataset)
    options = config_lib.options_from_flags(flags.FLAGS)
    rows = []
    for seed in seeds:
        for arm, choices in ARMS.items():
            config = dataclasses.replace(base, seed=seed, **choices)
            folder = workdir / f"{arm}-{seed}"
            print(f"{arm}, seed {seed}", flush=True)
            run = run_lib.train_or_load(folder, config, data, options)
            if run is None or not distributed.is_primary():
                continue
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    **{name: run.results[name] for name in SCORES},
                    "loss": [row["loss"] for row in run.metrics],
                    "test_accuracy_by_epoch": [
                        row["test_accuracy"] for row in run.metrics
                    ],
                    "first_step_losses": run.results["first_step_losses"],
                    "data_source": run.results["data_source"],
                }
            )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], arm: str) -> dict[str, Any]:
    """Return mean, standard deviation, least, greatest and n of an arm's scores."""
    summary = {}
    for name in SCORES:
        values = [row[name] for row in rows if row["arm"] == arm]
        summary[name] = {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }
    return summary


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest difference in loss between ours and Flax's, over seeds."""
    losses = {(row["arm"], row["seed"]): row["first_step_losses"] for row in rows}
    pairs = [
        (losses["batch_norm", seed], losses["flax", seed])
        for arm, seed in losses
        if arm == "flax"
    ]
    return {
        f"loss_difference_at_step_{step}": max(
            abs(ours[step - 1] - flax[step - 1]) for ours, flax in pairs
        )
        for step in (1, 20)
    }


def lines(summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return an arm's scores as "name mean [least, greatest]"."""
    return [
        f"{name} {v['mean']:.4g} [{v['min']:.4g}, {v['max']:.4g}]"
        for name, v in summary.items()
    ]


if __name__ == "__main__":
    launch.start(main, define_flags)
