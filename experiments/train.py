r"""Train any model with any norm on any images, from the command line.

  python -m experiments.train --workdir=runs/mlp --model=mlp:widths=512x512 \
    --norm=layer --learning_rate=0.1
  python -m experiments.train --workdir=runs/resnet --model=resnet:depth=20 \
    --dataset=cifar10 --optimizer=sgd:momentum=0.9,nesterov=true \
    --schedule=cosine:warmup_epochs=1 --learning_rate=0.1 --weight_decay=0.0005 \
    --inputs=standardised --augment=crop_and_flip
  python -m experiments.train --workdir=runs/own --dataset=npz:images.npz
  python -m experiments.train --workdir=runs/smoke --smoke     a try in seconds
  python -m experiments.train --load=runs/mlp        evaluate a run or sweep again
  python -m experiments.train --workdir=runs/rates --devices=2 \
    --sweep="learning_rate=0.1,0.3,1.0;norm=batch_norm|group:num_groups=2;seed=0..2"

The folder --workdir receives config.json, environment.json, metrics.jsonl (a line per
epoch), results.json, the trained variables, curves.png and gamma_beta.png. Without
flags this is the run of `experiments.lenet`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from bn_jax import runs, transforms
from bn_jax.data import ImageData
from bn_jax.fields import ConfigError, counted
from bn_jax.runs import distributed, json_files, parts, sweeps, workdirs
from bn_jax.training import members, scoring, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.evaluation import Evaluator
from experiments import flag_fields, jobs, launch

if __name__ != "__main__":  # --help of experiments.lenet lists these flags as its own
    flags.disclaim_key_flags()

OF_SWEEPS = ("sweep", "part", "launcher")

# What rounding may change of a loss or an accuracy: an image or two of 10,000.
ROUNDING = 3e-4


def define_flags() -> None:
    """Define the flags of a run."""
    flag_fields.define(TrainConfig)
    launch.define_run_flags()
    flags.DEFINE_boolean(
        "smoke", False, "Try everything in seconds: the sample, 1 epoch, unless given."
    )
    flags.DEFINE_string(
        "load", None, "Folder of a finished run to evaluate again, instead of training."
    )
    flags.DEFINE_multi_string(
        "sweep",
        None,
        "Train all combinations, as in 'learning_rate=0.01,0.1;seed=0..4', "
        "'model.norm_layers=0011,1111' or 'norm=batch_norm|group:num_groups=2'. What "
        "differs in numbers alone shares one program.",
    )
    flags.DEFINE_string(
        "part",
        None,
        "K/N: train the K-th of N parts of the sweep alone, as on other machines the "
        "others; where the last one ends, all are merged.",
    )
    flags.DEFINE_string(
        "launcher",
        None,
        "Train the parts of the sweep by jobs, and wait for them: local:N, processes "
        f"of this machine, or slurm. Options: {jobs.LAUNCHERS.help()}.",
    )


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    """Train, sweep or evaluate again, as the flags say."""
    launch.check_no_arguments(argv)
    given = flags.FLAGS
    if (given.workdir is None) == (given.load is None):
        given_both = "" if given.load is None else "both are given; "
        raise ConfigError(
            f"{given_both}give --workdir=DIR to train into a folder, or --load=DIR to "
            "evaluate what a run left there; --help lists all flags"
        )
    if given.load is not None:
        fields = (*dataclasses.fields(TrainConfig), *dataclasses.fields(RunOptions))
        names = [field.name for field in fields]
        names += ["smoke", *OF_SWEEPS, *launch.PROCESSES]
        names.remove("dataset")  # whose file may lie elsewhere now
        ignored = [f"--{name}" for name in names if given[name].present]
        if ignored:
            raise ConfigError(
                "--load evaluates a run on one device, by the run's own config, so "
                f"leave out {', '.join(ignored)}"
            )
        launch.set_up_cache()
        launch.check_devices()
        evaluate_again(workdirs.existing(given.load, "load"))
        return
    if given.launcher is None:
        launch.set_up_jax()
    else:  # which leaves the devices to the jobs
        jax.config.update("jax_platforms", "cpu")
    smoke = {"dataset": "sample", "epochs": 1} if given.smoke else {}
    config = flag_fields.read(TrainConfig, given, defaults=smoke)
    spec = None if given.sweep is None else ";".join(given.sweep)
    swept = {} if spec is None else _swept(spec)
    _check_counted(config, swept)
    if spec is not None:
        _check_given_once(swept)
        train_sweep(launch.workdir(), spec, config)
        return
    for name in OF_SWEEPS:
        if given[name].present:
            raise ConfigError(
                f"--{name}={given[name].value} without --sweep; give the members, as "
                "in --sweep=seed=0..9"
            )
    train(launch.workdir(), config)


# Fields that count with another one alone.
_COUNT_WITH = {
    "init_statistics": "init_from",
    "accumulate_stats": "accumulate",
    "decay": "weight_decay",
    "merged_stats": "batch_stats",
}


def _swept(spec: str) -> dict[str, str]:
    """Return the fields that a sweep varies, each as a flag that gives it."""
    fields = [field.strip() for field in spec.split(";")]
    return {field.partition("=")[0].strip(): f"--sweep={field}" for field in fields}


def _check_counted(config: TrainConfig, swept: Mapping[str, str]) -> None:
    """Refuse flags that count for nothing, as another one that they need is not given.

    Args:
      config: that the flags give.
      swept: fields that are as good as flags.

    Raises:
      ConfigError: naming both.
    """
    default = TrainConfig()
    for name, other in _COUNT_WITH.items():
        flag = flags.FLAGS[name]
        given = swept.get(name) or (f"--{name}={flag.value}" if flag.present else None)
        if (
            given
            and getattr(config, other) == getattr(default, other)
            and other not in swept
        ):
            raise ConfigError(f"{given} without --{other}; give it, too")
    devices = flags.FLAGS.devices
    num_devices = jax.device_count() if devices == "all" else int(devices)
    if config.batch_stats != default.batch_stats and num_devices == 1:
        raise ConfigError(
            f"--batch_stats={config.batch_stats} on one device, where it changes "
            "nothing; give --devices=N, too"
        )


def train(workdir: Path, config: TrainConfig) -> None:
    """Train `config` into `workdir` and print what came out."""
    data = launch.load_data(config.dataset)
    options = flag_fields.read(RunOptions, flags.FLAGS)
    run = runs.train(config, data, workdir=workdir, options=options)
    if not distributed.is_primary():
        return
    first = next(iter(run.results["gamma_beta"].items()), None)
    if first is not None:
        layer, learned = first
        for greek, values in learned.items():
            print(f"{layer} {greek:5s}  {launch.numbers(values)}")
    found = run.results
    validated = ""
    if "validation_accuracy" in found:
        validated = f"validation accuracy {found['validation_accuracy']:.3f}, "
    tested = f"test accuracy {found['test_accuracy']:.3f}"
    if found["moving_averages"]:
        by_exact = "no exact statistics"
        if found["test_accuracy_exact"] is not None:
            by_exact = f"{found['test_accuracy_exact']:.3f} by exact statistics"
        tested += f" by moving averages and {by_exact}"
    print(
        f"loss {_rounded(found['train_loss'])}, "
        f"train accuracy {found['train_accuracy']:.3f}, {validated}"
        f"{tested}, {found['examples_per_second']:,.0f} examples/s"
    )
    _print_best(found)
    if "exact_refused" in found:
        print(f"exact statistics were not measured: {found['exact_refused']}")
    if found.get("exact_mode") == "one_pass":
        print("exact statistics of these many layers were measured in one pass")
    if "test_accuracy_averaged" in found:
        by_exact = " by exact statistics of its own" * found["moving_averages"]
        print(
            "average of the weights: test accuracy "
            f"{found['test_accuracy_averaged']:.3f}{by_exact}"
        )
    names = sorted(path.name for path in workdir.glob("[!.]*"))
    print(f"written to {workdir}: {', '.join(names)}")


def train_sweep(workdir: Path, spec: str, base: TrainConfig) -> None:
    """Train the members of a sweep into `workdir` and print a line for each."""
    part = _part(flags.FLAGS.part)
    launcher = None
    if flags.FLAGS.launcher is not None:
        launcher = jobs.launcher_of(flags.FLAGS.launcher)
    configs = members.parse(spec, base)
    data = launch.load_data(base.dataset)
    print(f"{counted(len(configs), 'member')} of the sweep", flush=True)
    if part is not None and parts.is_merged(configs, workdir):
        print(f"all parts are merged in {workdir}")
        return
    if launcher is not None:
        rows = _by_jobs(launcher, configs, data, workdir)
    else:
        options = flag_fields.read(RunOptions, flags.FLAGS)
        rows = runs.sweep(configs, data, workdir=workdir, options=options, part=part)
    if part is not None:
        _end_part(part, configs, data, workdir)
        return
    names = list(_swept(spec))
    widths = [max(len(str(c.value(name))) for c in configs) for name in names]
    for config, row in zip(configs, rows, strict=True):
        member = "  ".join(
            f"{name} {config.value(name)!s:{width}}"
            for name, width in zip(names, widths, strict=True)
        )
        if row["diverged_at_step"] is not None:
            print(f"{member}  diverged at step {row['diverged_at_step']}")
            continue
        line = (
            f"{member}  loss {row['loss'][-1]:.3f}  "
            f"train accuracy {row['train_accuracy'][-1]:.3f}  "
        )
        if "validation_accuracy" in row:
            line += f"validation accuracy {row['validation_accuracy'][-1]:.3f}  "
        line += f"test accuracy {row['test_accuracy'][-1]:.3f}"
        if "test_accuracy_exact" in row and transforms.is_batch_norm(config.norm):
            line += f", {row['test_accuracy_exact']:.3f} by exact statistics"
        print(line)
    _print_best(json_files.read_object(workdir / json_files.RESULTS))
    print(f"written to {workdir}")


def _check_given_once(swept: Mapping[str, str]) -> None:
    """Refuse flags whose fields a sweep varies, as the sweep alone would count.

    Raises:
      ConfigError: naming the first.
    """
    for name, field in swept.items():
        if name in flags.FLAGS and flags.FLAGS[name].present:
            raise ConfigError(
                f"--{name}={flags.FLAGS[name].value} together with {field}; give one "
                "of them"
            )


def _print_best(found: Mapping[str, Any]) -> None:
    """Print what is best on the validation set: a run's epoch, or a sweep's member."""
    if "best_epoch" in found:
        print(
            f"best on the validation set: epoch {found['best_epoch']}, validation "
            f"accuracy {found['best_validation_accuracy']:.3f}, test accuracy "
            f"{found['best_test_accuracy']:.3f}; its variables are kept, too"
        )
    if "best_by_validation" in found:
        print(
            f"best on the validation set: {found['best_by_validation']}, accuracy "
            f"{found['best_validation_accuracy']:.3f}"
        )


def _part(text: str | None) -> sweeps.Part | None:
    """Return the part that a flag gives.

    Raises:
      ConfigError: if it gives none, or a launcher is given, too.
    """
    if text is None:
        return None
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ConfigError(
            f"part={text!r}; expected K/N, part K of N, such as 3/40 with K from 1 to N"
        )
    if flags.FLAGS.launcher is not None:
        raise ConfigError(
            f"--part={text} with --launcher, which trains all parts; leave out one"
        )
    return sweeps.Part(int(numbers[1]), int(numbers[2]))


def _by_jobs(
    launcher: jobs.Launcher,
    configs: Sequence[TrainConfig],
    data: ImageData,
    workdir: Path,
) -> list[dict[str, Any]]:
    """Train a sweep by jobs; return the rows of its members."""
    flag_fields.read(RunOptions, flags.FLAGS)
    groups = sweeps.check(configs, data)
    sweeps.Part(1, launcher.num_parts).members(groups)
    config = sweeps.identity(configs, data, exact=True, train=False)
    grows = sweeps.can_grow(configs)
    workdirs.check_free(workdir, config, repeat=True, grows=grows)
    if not parts.is_merged(configs, workdir):
        for number in range(1, launcher.num_parts + 1):
            part = sweeps.Part(number, launcher.num_parts)
            of_part = {**config, "part": list(part)}
            folder = part.folder(workdir)
            workdirs.check_free(folder, of_part, repeat=True, grows=grows)
        jobs.run(launcher, configs, jobs.given_arguments(), workdir)
    return parts.merge(configs, data, workdir=workdir, num_parts=launcher.num_parts)


def _end_part(
    part: sweeps.Part,
    configs: Sequence[TrainConfig],
    data: ImageData,
    workdir: Path,
) -> None:
    """Merge all parts, if this was the last one."""
    print(f"part {part.number} of {part.num_parts}: written to {part.folder(workdir)}")
    left = parts.unfinished(configs, workdir=workdir, num_parts=part.num_parts)
    if left:
        numbers = ", ".join(str(p.number) for p in left[:12])
        more = ", ..." if len(left) > 12 else ""
        print(f"{counted(len(left), 'part')} left to be trained: {numbers}{more}")
        return
    parts.merge(configs, data, workdir=workdir, num_parts=part.num_parts)
    print(f"all parts are merged in {workdir}")


def evaluate_again(workdir: Path) -> None:
    """Evaluate the run or sweep in `workdir` and compare with what it wrote."""
    is_sweep = workdirs.is_sweep(json_files.read_object(workdir / json_files.CONFIG))
    found = sweeps.load(workdir) if is_sweep else [runs.load(workdir)]
    name = _dataset_of(found[0].config)
    data = task.select(found[0].config, launch.load_data(name))
    written = json_files.read_object(workdir / json_files.RESULTS)
    way_out = ""
    if data.source != written["data_source"]:
        print(f"note: the run was on {written['data_source']}")
        way_out = (
            f", and the data, {data.source}, from those it was on; give these by "
            "--dataset, or evaluate it in Python"
        )
    outcomes = []
    labels = sweeps.labels([run.config for run in found])
    for number, (run, label) in enumerate(zip(found, labels, strict=True), 1):
        if is_sweep:
            print(f"member {number} of {len(found)}: {label}")
        if run.results.get("diverged_at_step") is not None:
            print(f"diverged at step {run.results['diverged_at_step']}")
            continue
        count = run.results.get("exact_statistics_examples", len(data.train.labels))
        outcomes.append(_evaluate_again(run, data, count))
    _print_best(written)
    where = workdir / (json_files.ROWS if is_sweep else json_files.RESULTS)
    if not all(near for _, near in outcomes):
        sys.exit(f"error: the numbers differ from those that the run wrote{way_out}")
    if all(same for same, _ in outcomes):
        print(f"the same numbers as in {where}")
    else:
        why = "on another machine or backend"
        if is_sweep:
            why = f"where a member is evaluated by itself, or {why}"
        print(f"the same numbers but for rounding, as {why}")


def _dataset_of(config: TrainConfig) -> str:
    """Return the data set to evaluate a run on: its own, whose file may have moved.

    Raises:
      ConfigError: if the flag gives another one.
    """
    flag = flags.FLAGS["dataset"]
    if not flag.present or flag.value == config.dataset:
        return config.dataset
    name: str = flag.value
    # What "auto" was, or what Python was given in its place, the config does not tell.
    if config.dataset == "auto" or all(
        dataset.startswith("npz:") for dataset in (name, config.dataset)
    ):
        return name
    raise ConfigError(
        f"--dataset={name} with --load of a run on {config.dataset}; leave it out, or, "
        "of a run on an npz: file, say where that lies now"
    )


def _evaluate_again(
    run: runs.Run, data: ImageData, num_examples: int
) -> tuple[bool, bool]:
    """Print a run's scores; return whether they are those it wrote, and near them."""
    devices = jax.local_devices()[:1]
    evaluate = Evaluator(run.network.predict, data.test, devices=devices)
    scores = scoring.score(
        run.network,
        run.variables,
        evaluate,
        data.train.images[:num_examples],
        devices=devices,
        average=run.average,
    )
    found = scores.to_row()
    if run.best is not None:
        tested = evaluate(run.best)
        found |= {
            "best_test_loss": tested.loss,
            "best_test_accuracy": tested.accuracy,
        }
    found = json_files.finite(found)
    new = {name: value for name, value in found.items() if name in run.results}
    old = {name: run.results[name] for name in new}
    # Of a sweep's member, those of all epochs.
    old = {name: v[-1] if isinstance(v, list) else v for name, v in old.items()}
    for name, value in new.items():
        print(f"{name:22s} {_number(value)}  (the run wrote {_number(old[name])})")
    same = all(new[name] == old[name] for name in new)
    return same, all(_is_close(new[name], old[name]) for name in new)


def _rounded(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _number(value: float | str | None) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _is_close(new: float | str | None, old: float | str | None) -> bool:
    if isinstance(new, float) and isinstance(old, float):
        return math.isclose(new, old, rel_tol=ROUNDING)
    return new == old


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(define_flags))
