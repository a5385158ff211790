"""What experiments have in common: arms of runs, verdicts on them, and figures.

An experiment says which configs it trains, arm by arm; the runs of an arm are a sweep,
one compiled program. The folder --workdir receives a folder an arm, in which a stopped
sweep goes on; runs.jsonl, a row a run; results.json, the verdicts; and the figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from bn_jax import fields
from bn_jax.training.config import RunOptions, TrainConfig
from experiments import flag_fields, launch

if TYPE_CHECKING:
    from bn_jax.data import ImageData
    from experiments.claims import Verdict

flags.disclaim_key_flags()  # --help of an experiment lists them as its own

Row = dict[str, Any]
Arms = Mapping[str, Sequence[TrainConfig]]


@dataclasses.dataclass(frozen=True)
class Design:
    """What an experiment trains; each adds its own to these.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    epochs: int = fields.option_of(TrainConfig, "epochs")
    seeds: int = fields.option(
        3,
        "How many seeds, from 0, each choice is trained with.",
        valid=fields.AT_LEAST_1,
    )
    dataset: str = fields.option_of(TrainConfig, "dataset")
    batch_size: int = fields.option_of(TrainConfig, "batch_size")

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        fields.check(self)

    def config(self, **choices: Any) -> TrainConfig:
        """Return a run: the fields that it shares with the design, and choices."""
        shared = {f.name for f in dataclasses.fields(TrainConfig)} & vars(self).keys()
        return TrainConfig(**{name: getattr(self, name) for name in shared} | choices)

    def to_dict(self) -> Row:
        """Return the fields as a dict that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


class Study(NamedTuple):
    """An experiment.

    Attributes:
      name: of the experiment, and of its folder of results.
      design: a dataclass of what it trains, with a flag for each field.
      verdicts: of all rows.
      draw: writes figures of all rows into a folder.
      stages: each gives arms of runs, of the design and the rows so far.
      exact: whether runs are scored by exact statistics, too.
      train: whether runs are scored on the training set, too.
      complete: adds to the rows of an arm what its folder and the data hold.
      measure: gives the rows, and the seconds that they took, where they are not of
        sweeps; called with the design, the data and the folder.
      summary: more for results.json, of all rows.
      smoke: fields of the design that `--smoke` sets, besides those of `SMOKE`.
    """

    name: str
    design: type[Design]
    verdicts: Callable[[Sequence[Row]], list[Verdict]]
    draw: Callable[[Sequence[Row], Path], None]
    stages: Sequence[Callable[[Any, Sequence[Row]], Arms]] = ()
    exact: bool = True
    train: bool = False
    complete: Callable[[Path, list[Row], ImageData], list[Row]] = lambda _, rows, __: (
        rows
    )
    measure: Callable[[Any, ImageData, Path], tuple[list[Row], float]] | None = None
    summary: Callable[[Sequence[Row]], Row] = lambda _: {}
    smoke: Mapping[str, Any] = {}


ROWS = "runs.jsonl"
SMOKE = {"epochs": 1, "seeds": 2, "dataset": "sample"}


def start(study: Study) -> None:
    """Run an experiment from the command line."""
    launch.start(lambda argv: _main(study, argv), lambda: _define_flags(study))


def _define_flags(study: Study) -> None:
    launch.define_run_flags()
    flag_fields.define(study.design)
    smoke = ", ".join(
        f"{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in _smoke(study).items()
    )
    flags.DEFINE_boolean(
        "smoke", False, f"Try it in a minute; where not given: {smoke}."
    )
    flags.DEFINE_boolean(
        "plot_only", False, "Judge and draw anew the runs that --workdir holds."
    )


def _smoke(study: Study) -> Row:
    return {**SMOKE, **study.smoke}


def _main(study: Study, argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    if flags.FLAGS.plot_only:
        from bn_jax.runs import results

        folder = launch.workdir()
        rows = results.read_rows(folder / ROWS)
        study.draw(rows, folder)
        _print(study.verdicts(rows))
        return
    launch.set_up_jax()
    smoke = _smoke(study) if flags.FLAGS.smoke else {}
    design = flag_fields.read(study.design, flags.FLAGS, defaults=smoke)
    with launch.experiment(study.name, design.to_dict()) as folder:
        run(study, design, folder)


def run(study: Study, design: Design, folder: Path) -> None:
    """Train what is not trained yet; judge, draw and write."""
    from bn_jax.runs import results

    data = launch.load_data(design.dataset)
    if study.measure is not None:
        rows, seconds = study.measure(design, data, folder)
    else:
        rows, seconds = _sweeps(study, design, data, folder)
    results.write_rows(folder / ROWS, rows)
    verdicts = study.verdicts(rows)
    study.draw(rows, folder)
    summary = {
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        **study.summary(rows),
        "runs": len(rows),
        **design.to_dict(),
        "data_source": data.source,
        "seconds": seconds,
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    _print(verdicts)
    print(f"written to {folder}: {ROWS}, {results.RESULTS}, figures")


def _sweeps(
    study: Study, design: Design, data: ImageData, folder: Path
) -> tuple[list[Row], float]:
    """Return a row for each run of each arm, and the seconds that training took.

    Seconds are of training and compilation, whenever that was.
    """
    from bn_jax.runs import results, sweeps

    options = flag_fields.read(RunOptions, flags.FLAGS)
    rows: list[Row] = []
    seconds = 0.0
    for stage in study.stages:
        for arm, configs in stage(design, rows).items():
            print(f"{arm}: {len(configs)} runs", flush=True)
            of_arm = sweeps.sweep_into(
                folder / arm,
                configs,
                data,
                options,
                exact=study.exact,
                train=study.train,
            )
            speed = results.read_object(folder / arm / results.RESULTS)
            seconds += speed["seconds"] + speed["compile_seconds"]
            common = {"arm": arm, "examples_per_second": speed["examples_per_second"]}
            of_arm = [{**common, **row} for row in of_arm]
            rows += study.complete(folder / arm, of_arm, data)
    return rows, seconds


class Claim(NamedTuple):
    """A claim that can be judged once what it needs was trained.

    Attributes:
      needs: arms, or choices, by whatever names the experiment has.
      judge: gives the verdict.
    """

    needs: Collection[Any]
    judge: Callable[[], Verdict]


def judge(trained: Collection[Any], claims: Sequence[Claim]) -> list[Verdict]:
    """Return the verdicts on the claims of which all was trained, in their order."""
    present = set(trained)
    return [claim.judge() for claim in claims if present.issuperset(claim.needs)]


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Return the arms that have runs, in their order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def _print(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        value, low, high, n = verdict.interval
        print(
            f"{verdict.verdict}: {verdict.claim}\n  {verdict.statistic}: {value:.4g} "
            f"[{low:.4g}, {high:.4g}], n = {n}; claimed {verdict.threshold}"
        )


def load_params(folder: Path) -> dict[str, Any]:
    """Return the parameters of an arm's runs, with a leading axis of runs.

    Raises:
      RunError: if the folder holds none, or they are damaged.
    """
    from bn_jax.runs import sweeps

    params: dict[str, Any] = sweeps.load_variables(folder)["params"]
    return params


def last(row: Mapping[str, Any], name: str) -> float:
    """Return the last epoch's value of a run; NaN if it diverged."""
    value = row[name][-1]
    return float("nan") if value is None else value


def runs_of(rows: Sequence[Row], arm: str) -> list[Row]:
    """Return the runs of an arm in order of seeds, so that arms pair up."""
    of_arm = (row for row in rows if row["arm"] == arm)
    return sorted(of_arm, key=lambda row: row["config"]["seed"])


def guessing(name: str) -> float:
    """Return a score of guessing, which a run that diverged counts as."""
    return math.log(10) if "loss" in name else 0.1


def final_loss(row: Mapping[str, Any]) -> float:
    """Return the training loss at the end; that of guessing if the run diverged."""
    loss = last(row, "loss")
    return guessing("loss") if math.isnan(loss) else loss


def has_diverged(row: Mapping[str, Any]) -> bool:
    """Return whether a run's loss was not finite, or ended no better than chance."""
    loss = row["loss"][-1]
    return loss is None or loss >= 2.30


def final_test_accuracy(row: Mapping[str, Any]) -> float:
    """Return the test accuracy at the end, free of the moving averages' noise.

    That is by exact statistics where they were measured, else by those of batches of
    500 test images themselves; without norm there is but one. A run that diverged has
    that of guessing, .1.
    """
    for name in ("test_accuracy_exact", "test_accuracy_batch"):
        if name in row:
            return guessing(name) if row[name] is None else row[name]
    accuracy = last(row, "test_accuracy")
    return guessing("accuracy") if math.isnan(accuracy) else accuracy


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, least and greatest value."""
    return sum(values) / len(values), min(values), max(values)
