r"""Train LeNet with batch normalisation on Fashion-MNIST.

This is the main experiment of the d2l chapter on batch normalisation: LeNet with a
batch norm before each sigmoid, plain SGD with learning rate 1.0, batches of 256 images,
10 epochs. It prints a line per epoch and, at the end, what the first layer learned.

  python -m experiments.lenet --workdir=runs/lenet             the chapter's run
  python -m experiments.lenet --workdir=runs/flax --norm=flax  with Flax's own layer
  python -m experiments.lenet --workdir=runs/none --norm=none --learning_rate=0.9
  python -m experiments.lenet --workdir=runs/smoke --smoke     a try in seconds
  python -m experiments.lenet --load=runs/lenet                evaluate it again
  python -m experiments.lenet --workdir=runs/rates --devices=2 \
    --sweep="learning_rate=0.1,0.3,1.0;seed=0..2"              nine runs in one program

The folder --workdir receives config.json, environment.json, metrics.jsonl (a line per
epoch), results.json, the trained variables, curves.png and gamma_beta.png.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from bn_jax import fields
from bn_jax.training.config import RunOptions, TrainConfig
from experiments import flag_fields, launch

# What rounding may change of a loss or an accuracy: an image or two of 10,000.
ROUNDING = 3e-4


def define_flags() -> None:
    flag_fields.define(TrainConfig)
    launch.define_run_flags()
    flags.DEFINE_boolean(
        "smoke", False, "Try everything in seconds: the sample, 1 epoch, unless given."
    )
    flags.DEFINE_string(
        "load", None, "Folder of a finished run to evaluate again, instead of training."
    )
    flags.DEFINE_string(
        "sweep",
        None,
        "Train all combinations in one program, as in "
        "'learning_rate=0.01,0.1,1.0;seed=0..4'.",
    )


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    given = flags.FLAGS
    if (given.workdir is None) == (given.load is None):
        raise fields.ConfigError(
            "give --workdir=DIR to train into a folder, or --load=DIR to evaluate what "
            "a run left there; --help lists all flags"
        )
    if given.load is not None:
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        ignored = [f"--{name}" for name in names if given[name].present]
        if ignored:
            raise fields.ConfigError(
                f"--load takes the config of the run, so leave out {', '.join(ignored)}"
            )
        evaluate_again(given.load)
        return
    launch.set_up_jax()
    smoke = {"dataset": "sample", "epochs": 1} if given.smoke else {}
    config = flag_fields.read(TrainConfig, given, defaults=smoke)
    if given.sweep is not None:
        train_sweep(given.workdir, given.sweep, config)
    else:
        train(given.workdir, config)


def train(workdir: str, config: TrainConfig) -> None:
    """Train `config` into `workdir` and print what came out."""
    from bn_jax.runs import distributed  # here, so that --help is quick
    from bn_jax.runs import run as run_lib

    data = launch.load_data(config.dataset)
    options = flag_fields.read(RunOptions, flags.FLAGS)
    run = run_lib.train_into(workdir, config, data, options)
    if not distributed.is_primary():
        return
    first = next(iter(run.results["gamma_beta"].items()), None)
    if first is not None:
        layer, learned = first
        print(f"{layer} gamma  {launch.numbers(learned['gamma'])}")
        print(f"{layer} beta   {launch.numbers(learned['beta'])}")
    print(
        f"loss {run.results['train_loss']:.3f}, "
        f"train accuracy {run.results['train_accuracy']:.3f}, "
        f"test accuracy {run.results['test_accuracy']:.3f} by moving averages and "
        f"{run.results['test_accuracy_exact']:.3f} by exact statistics, "
        f"{run.results['examples_per_second']:,.0f} examples/s"
    )
    names = sorted(path.name for path in Path(workdir).glob("[!.]*"))
    print(f"data: {data.source}")
    print(f"written to {workdir}: {', '.join(names)}")


def train_sweep(workdir: str, spec: str, base: TrainConfig) -> None:
    """Train the members of a sweep into `workdir` and print a line for each."""
    from bn_jax.runs import sweep as sweep_lib
    from bn_jax.training import members

    configs = members.parse(spec, base)
    data = launch.load_data(base.dataset)
    print(f"{len(configs)} members of the sweep", flush=True)
    options = flag_fields.read(RunOptions, flags.FLAGS)
    rows = sweep_lib.sweep_into(workdir, configs, data, options)
    names = [part.partition("=")[0].strip() for part in spec.split(";")]
    for row in rows:
        member = "  ".join(f"{name} {row['config'][name]!s:6}" for name in names)
        if row["diverged_at_step"] is not None:
            print(f"{member}  diverged at step {row['diverged_at_step']}")
            continue
        print(
            f"{member}  loss {row['loss'][-1]:.3f}  "
            f"train accuracy {row['train_accuracy'][-1]:.3f}  "
            f"test accuracy {row['test_accuracy'][-1]:.3f}, "
            f"{row['test_accuracy_exact']:.3f} by exact statistics"
        )
    print(f"written to {workdir}")


def evaluate_again(workdir: str) -> None:
    """Evaluate the run in `workdir` and compare with what it wrote."""
    from bn_jax.runs import run as run_lib
    from bn_jax.training import loop

    run = run_lib.load(workdir)
    data = launch.load_data(run.config.dataset)
    if data.source != run.results["data_source"]:
        print(f"note: the run was on {run.results['data_source']}")
    score = loop.score(run.model, run.variables, data)
    new = score._asdict()
    old = {name: run.results[name] for name in new}
    for name in new:
        print(f"{name:20s} {new[name]:.6f}  (the run wrote {old[name]:.6f})")
    if new == old:
        print(f"the same numbers as in {Path(workdir) / 'results.json'}")
    elif all(math.isclose(new[name], old[name], rel_tol=ROUNDING) for name in new):
        print("the same numbers but for rounding, as on another machine or backend")
    else:
        sys.exit("error: the numbers differ from those that the run wrote")


if __name__ == "__main__":
    launch.start(main, define_flags)
