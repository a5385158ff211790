"""A study: a question, arms of runs, claims about them, and figures.

The runs of an arm are trained as one sweep. The folder --workdir receives a folder for
each arm, where a stopped sweep resumes; runs.jsonl, a row for each run; results.json
with the verdicts; and the figures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bn_jax import fields
from bn_jax.data import ImageData
from bn_jax.runs import results, sweeps
from bn_jax.training.config import RunOptions, TrainConfig
from experiments import claims, flag_fields, launch
from experiments.claims import Claim, Verdict
from experiments.figures import Draw
from experiments.scores import Row, Runs, arm_of

flags.disclaim_key_flags()  # --help of a study lists them as its own

Fields = Mapping[str, Any]  # of `TrainConfig`
# By name, the runs of an arm: the fields that are not the design's, for each choice.
Arms = Mapping[str, Sequence[Fields]]
Measure = Callable[[Path, Sequence[TrainConfig], ImageData], tuple[list[Row], float]]

ROWS = results.ROWS
SMOKE = {"epochs": 1, "seeds": 2, "dataset": "sample"}
ALL = ("all",)


@dataclasses.dataclass(frozen=True)
class Design:
    """What a study trains. Each field has a flag; studies add their own fields.

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
    arms: tuple[str, ...] = fields.option(
        ALL, "Which arms to train, or all. Claims are judged whose arms were trained."
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        fields.check(self)

    def configs(self, choices: Sequence[Fields]) -> list[TrainConfig]:
        """Return a config for each choice and seed.

        Args:
          choices: fields of `TrainConfig`. The others are the design's, where it has
            them, or have their defaults.
        """
        shared = {f.name for f in dataclasses.fields(TrainConfig)} & vars(self).keys()
        common = {name: getattr(self, name) for name in shared}
        return [
            TrainConfig(**{**common, **choice, "seed": seed})
            for choice in choices
            for seed in range(self.seeds)
        ]

    def to_dict(self) -> Row:
        """Return the fields as a dict that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def design(**defaults: Any) -> type[Design]:
    """Return a `Design` with other defaults.

    Args:
      **defaults: by field. Fields of `TrainConfig` that `Design` does not have are
        added to it, so that they have a flag.
    """
    own = {field.name for field in dataclasses.fields(Design)}
    changed = [
        (
            name,
            type(value),
            fields.option_of(Design if name in own else TrainConfig, name, value),
        )
        for name, value in defaults.items()
    ]
    return dataclasses.make_dataclass("Design", changed, bases=(Design,), frozen=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study, as its file defines it by the name STUDY.

    Attributes:
      name: of the file, and of the folder of results.
      place: in the index, whose order is that of the chapter's questions.
      design: a dataclass of what is chosen, with a flag for each field.
      arms: what is trained, from each seed; or a function of the design that returns
        it. An arm is one sweep: its runs may differ only in what a sweep can vary.
      more_arms: returns further arms, from the design and the first arms' runs.
      choice: the name, or other key, by which claims and figures know a run.
      claims: written before the runs.
      figures: by file name.
      exact: whether to score runs by exact statistics, too.
      train: whether to score runs on the training set, too.
      probe: measures a trained network, and returns what to add to its row; called with
        the row, the network's variables and the data.
      measure: trains an arm in place of a sweep; called with the arm's folder, the
        configs and the data, it returns a row for each config, and seconds.
      summary: more for results.json.
      smoke: fields of the design that --smoke sets besides those of `SMOKE`.
    """

    name: str
    place: int = 100
    design: type[Design] = Design
    arms: Arms | Callable[[Any], Arms]
    more_arms: Callable[[Any, Runs], Arms] = lambda design, runs: {}
    choice: Callable[[Row], Any] = arm_of
    claims: Sequence[Claim]
    figures: Mapping[str, Draw]
    exact: bool = True
    train: bool = False
    probe: Callable[[Row, Any, ImageData], Row] | None = None
    measure: Measure | None = None
    summary: Callable[[Runs], Row] = lambda runs: {}
    smoke: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arms_of(self, design: Design) -> Arms:
        """Return the arms that a design trains.

        Raises:
          ConfigError: if the design names an arm that there is not.
        """
        arms = self.arms(design) if callable(self.arms) else self.arms
        if design.arms == ALL:
            return arms
        if not set(design.arms) <= arms.keys():
            raise fields.ConfigError(
                f"arms={','.join(design.arms)}; expected all, or some of "
                f"{', '.join(arms)}"
            )
        return {arm: choices for arm, choices in arms.items() if arm in design.arms}

    def runs(self, rows: Sequence[Row]) -> Runs:
        """Return rows by choice."""
        return Runs.of(rows, self.choice)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Judge the claims whose runs are among the rows."""
        return claims.judge(self.claims, self.runs(rows))

    def draw(self, rows: Sequence[Row], folder: Path) -> None:
        """Write the figures whose runs are among the rows."""
        for name, draw in self.figures.items():
            draw(self.runs(rows), folder / name)


def start(study: Study) -> None:
    """Run a study from the command line."""
    launch.start(lambda argv: _main(study, argv), lambda: _define_flags(study))


def _define_flags(study: Study) -> None:
    launch.define_run_flags()
    flag_fields.define(study.design)
    names = ", ".join(study.arms_of(study.design()))
    flags.FLAGS["arms"].help += f" Arms: {names}."
    smoke = ", ".join(
        f"{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in {**SMOKE, **study.smoke}.items()
    )
    flags.DEFINE_boolean(
        "smoke", False, f"Try it in a minute; where not given: {smoke}."
    )
    flags.DEFINE_boolean(
        "plot_only", False, "Judge and draw the runs in --workdir again."
    )


def _main(study: Study, argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    if flags.FLAGS.plot_only:
        folder = launch.workdir()
        rows = results.read_rows(folder / ROWS)
        study.draw(rows, folder)
        _print(study.verdicts(rows))
        return
    launch.set_up_jax()
    smoke = {**SMOKE, **study.smoke} if flags.FLAGS.smoke else {}
    design = flag_fields.read(study.design, flags.FLAGS, defaults=smoke)
    study.arms_of(design)  # raises before the folder is touched
    with launch.experiment(study.name, design.to_dict()) as folder:
        run(study, design, folder)


def run(study: Study, design: Design, folder: Path) -> None:
    """Train what is not trained yet; judge, draw and write."""
    data = launch.load_data(design.dataset)
    rows, seconds = _train(study, study.arms_of(design), design, data, folder)
    arms = study.more_arms(design, study.runs(rows))
    more, more_seconds = _train(study, arms, design, data, folder)
    rows, seconds = rows + more, seconds + more_seconds
    results.write_rows(folder / ROWS, rows)
    verdicts = study.verdicts(rows)
    study.draw(rows, folder)
    summary = {
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        **study.summary(study.runs(rows)),
        "runs": len(rows),
        **design.to_dict(),
        "data_source": data.source,
        "seconds": seconds,
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    _print(verdicts)
    print(f"written to {folder}: {ROWS}, {results.RESULTS}, figures")


def _train(
    study: Study, arms: Arms, design: Design, data: ImageData, folder: Path
) -> tuple[list[Row], float]:
    """Return a row for each run, and the seconds that training took, with compilation.

    An arm that was trained before is read, with the seconds that it took then.
    """
    rows: list[Row] = []
    seconds = 0.0
    for arm, choices in arms.items():
        configs = design.configs(choices)
        print(f"{arm}: {len(configs)} runs", flush=True)
        train = study.measure or functools.partial(_sweep, study)
        of_arm, of_arm_seconds = train(folder / arm, configs, data)
        rows += [{"arm": arm, **row} for row in of_arm]
        seconds += of_arm_seconds
    return rows, seconds


def _sweep(
    study: Study, folder: Path, configs: Sequence[TrainConfig], data: ImageData
) -> tuple[list[Row], float]:
    """Train an arm as a sweep; return its rows, and the seconds that it took."""
    options = flag_fields.read(RunOptions, flags.FLAGS)
    rows = sweeps.sweep(
        configs,
        data,
        workdir=folder,
        options=options,
        exact=study.exact,
        train=study.train,
    )
    speed = results.read_object(folder / results.RESULTS)
    common = {"examples_per_second": speed["examples_per_second"]}
    rows = [{**common, **row} for row in rows]
    if study.probe is not None:
        variables = sweeps.load_variables(folder)
        for i, row in enumerate(rows):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
            row.update(study.probe(row, own, data))
    return rows, speed["seconds"] + speed["compile_seconds"]


def _print(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        value, low, high, n = verdict.interval
        print(
            f"{verdict.verdict}: {verdict.claim}\n  {verdict.statistic}: {value:.4g} "
            f"[{low:.4g}, {high:.4g}], n = {n}; claimed {verdict.threshold}"
        )
