"""A study: a question, arms of runs, claims about them, and figures.

A study is sequential: it trains a few seeds of every arm, judges its claims, trains
more seeds of what those that are undecided compare, and so on; see
`experiments.sequential`. Runs come from a pool that all studies share, where a stopped
one resumes. The folder --workdir receives runs.jsonl, a row for each run; results.json
with the verdicts; and the figures.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from bn_jax import fields, paths
from bn_jax.data import ImageData
from bn_jax.runs import json_files, provenance, workdirs
from bn_jax.training.config import RunOptions, TrainConfig
from experiments import claims, figures, flag_fields, launch, sequential
from experiments.claims import Claim, Verdict
from experiments.figures import Figure
from experiments.pool import Pool
from experiments.scores import CHOOSING, Row, Runs, arm_of, validation_accuracy
from experiments.sequential import Looks

flags.disclaim_key_flags()  # --help of a study lists them as its own

Fields = Mapping[str, Any]  # of `TrainConfig`
# By name, the runs of an arm: the fields that are not the design's, for each choice.
Arms = Mapping[str, Sequence[Fields]]
Setting = tuple[str, int]  # an arm, and the number of one of its choices
Rates = Mapping[str, Sequence[float]]  # that an arm is tried at
Measure = Callable[
    [str, Path, Sequence[TrainConfig], ImageData], tuple[list[Row], float]
]

ROWS = json_files.ROWS
CLAIMS = "claims.png"  # the figure of the verdicts
# A choice between arms is made on seeds of its own, by images that none trains on.
CHOOSING_SEEDS, CHOOSING_IMAGES = range(5), 5000
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
        20,
        "How many seeds, at most, each choice is judged by.",
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

    def configs(
        self, choices: Sequence[Fields], seeds: Iterable[int] | None = None
    ) -> list[TrainConfig]:
        """Return a config for each choice and seed.

        Args:
          choices: fields of `TrainConfig`. The others are the design's, where it has
            them, or have their defaults.
          seeds: of each choice; by default all from 0.
        """
        shared = {f.name for f in dataclasses.fields(TrainConfig)} & vars(self).keys()
        common = {name: getattr(self, name) for name in shared}
        return [
            TrainConfig(**{**common, **choice, "seed": seed})
            for choice in choices
            for seed in (range(self.seeds) if seeds is None else seeds)
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
      place: position in the index, which has the order of the chapter's questions.
      design: a dataclass of what is chosen, with a flag for each field.
      arms: what is trained, from each seed; or a function of the design that returns
        it. An arm is one sweep: its runs may differ only in what a sweep can vary.
      choosing: arms among which claims choose. They are trained on seeds of their own,
        with a part of the training images left out to choose by.
      rates: by arm, learning rates that it is tried at in that way; or a function of
        the design that returns them. The arm is then trained at the one of the highest
        validation accuracy. Other arms have the rate that their fields say.
      looks: when claims are judged.
      choice: the name, or other key, by which claims and figures know a run.
      claims: written before the runs.
      figures: by file name.
      score_training: whether runs that judge are scored on the training images, too.
      probe: measures a trained network, and returns what to add to its row; called with
        the row, the network's variables and the data.
      measure: trains an arm in place of a sweep; called with the arm, a folder, the
        configs and the data, it returns a row for each config, and seconds.
      summary: more for results.json.
      smoke: fields of the design that --smoke sets besides those of `SMOKE`.
    """

    name: str
    place: int = 100
    design: type[Design] = Design
    arms: Arms | Callable[[Any], Arms]
    choosing: Arms = dataclasses.field(default_factory=dict)
    rates: Rates | Callable[[Any], Rates] = dataclasses.field(default_factory=dict)
    looks: Looks = sequential.LOOKS
    choice: Callable[[Row], Any] = arm_of
    claims: Sequence[Claim]
    figures: Mapping[str, Figure]
    score_training: bool = False
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
        unknown = [arm for arm in design.arms if arm not in arms]
        if unknown:
            raise fields.ConfigError(
                f"arms={','.join(design.arms)}; expected all, or some of "
                f"{', '.join(arms)}{fields.did_you_mean(unknown[0], arms)}"
            )
        return {arm: choices for arm, choices in arms.items() if arm in design.arms}

    def runs(self, rows: Sequence[Row]) -> Runs:
        """Return rows by choice."""
        return Runs.of(rows, self.choice)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Judge the claims whose runs are among the rows, at the looks they allow."""
        runs = self.runs(rows)
        seeds = max(map(len, runs.values()), default=1)
        return claims.judge(self.claims, runs, self.looks.until(seeds))

    def caution(self, rows: Sequence[Row]) -> str:
        """Return a line that marks a try, on fewer seeds than claims need."""
        seeds = max(map(len, self.runs(rows).values()), default=0)
        needed = self.looks.seeds[0]
        few = f"No result, but a try: {seeds} of the {needed} seeds that claims need"
        return few if seeds < needed else ""

    def draw(self, rows: Sequence[Row], folder: Path) -> None:
        """Write the figures whose runs are among the rows, and one of the verdicts."""
        figures.draw_verdicts(
            self.verdicts(rows), folder / CLAIMS, caution=self.caution(rows)
        )
        for name, figure in self.figures.items():
            figure.draw(self.runs(rows), folder / name)


def start(study: Study) -> None:
    """Run a study from the command line."""
    app.run(
        lambda argv: _main(study, argv),
        flags_parser=launch.flags_parser(lambda: _define_flags(study)),
    )


def _define_flags(study: Study) -> None:
    launch.define_run_flags()
    flags.DEFINE_string(
        "pool",
        None,
        "Folder of the runs that studies share; by default `pool` beside --workdir.",
    )
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


@launch.errors_in_a_line()
def _main(study: Study, argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    if flags.FLAGS.plot_only:
        folder = workdirs.existing(launch.workdir(), "workdir")
        there = json_files.read_object(folder / json_files.CONFIG).get("experiment")
        if there != study.name:
            raise json_files.RunError(
                f"{folder} holds {there or 'a run or sweep of none'}, and this is the "
                f"experiment {study.name}; give the folder of its rows"
            )
        _end(study, json_files.read_rows(folder / ROWS), folder, "figures")
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
    trainer = _Trainer(study, design, data, folder)
    chosen = trainer.choosing()
    tried, arms = trainer.tuned(study.arms_of(design))
    chosen += tried
    looks = study.looks.until(design.seeds)
    wanted = _settings(arms)
    for count in looks.seeds:
        settings = fields.counted(len(wanted), "setting")
        print(f"look at {fields.counted(count, 'seed')}: {settings}", flush=True)
        seeds = range(looks.first_seed, looks.first_seed + count)
        trainer.reach(arms, wanted, seeds)
        rows = [*chosen, *trainer.rows]
        verdicts = study.verdicts(rows)
        wanted = _undecided(study, verdicts, trainer.trained)
        if not wanted:
            break
    json_files.write_rows(folder / ROWS, rows)
    summary = {
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        **study.summary(study.runs(rows)),
        "runs": len(rows),
        **design.to_dict(),
        "data_source": data.source,
        "seconds": sum(row["seconds"] for row in rows),
        "environment": provenance.environment(),
    }
    json_files.write_json(folder / json_files.RESULTS, summary)
    _end(study, rows, folder, f"{ROWS}, {json_files.RESULTS}, figures")
    if study.measure is None:
        print(f"trained runs, which studies share, are in {trainer.pool}")


def _settings(arms: Arms) -> set[Setting]:
    return {(arm, i) for arm, choices in arms.items() for i in range(len(choices))}


def _undecided(
    study: Study,
    verdicts: Iterable[Verdict],
    trained: Mapping[Setting, Sequence[Row]],
) -> set[Setting]:
    """Return the settings that claims without a decision use."""
    used = {
        choice
        for verdict in verdicts
        if verdict.verdict == "undecided"
        for choice in verdict.used
    }
    return {
        setting for setting, rows in trained.items() if study.choice(rows[0]) in used
    }


class _Trainer:
    """Trains a study's arms, or finds their runs in the pool.

    Attributes:
      trained: the rows of each setting, in order of seeds.
      pool: the folder of the runs that studies share.
    """

    def __init__(
        self, study: Study, design: Design, data: ImageData, folder: Path
    ) -> None:
        self._study, self._design, self._data = study, design, data
        self._folder = folder
        self._choosing_seeds = CHOOSING_SEEDS[: design.seeds]
        options = flag_fields.read(RunOptions, flags.FLAGS)
        pool = flags.FLAGS.pool
        self.pool = folder.parent / "pool"
        if pool is not None:
            self.pool = paths.local(pool, "pool")
        self._pool = Pool(self.pool, options)
        self.trained: dict[Setting, list[Row]] = collections.defaultdict(list)

    @property
    def rows(self) -> list[Row]:
        """All rows but those to choose by."""
        return [row for rows in self.trained.values() for row in rows]

    def choosing(self) -> list[Row]:
        """Train the runs to choose by, and return their rows."""
        return [
            row
            for arm, choices in self._study.choosing.items()
            for row in self._choosing(arm, choices)
        ]

    def tuned(self, arms: Arms) -> tuple[list[Row], dict[str, Sequence[Fields]]]:
        """Return the runs that tried the study's rates, and arms at the best ones."""
        of_study = self._study.rates
        of_arms = of_study(self._design) if callable(of_study) else of_study
        rows: list[Row] = []
        tuned = dict(arms)
        for arm, choices in arms.items():
            rates = of_arms.get(arm, ())
            if not rates:
                continue
            tried = [{**of, "learning_rate": rate} for of in choices for rate in rates]
            found = self._choosing(arm, tried)
            rows += found
            seeds = len(self._choosing_seeds)
            sums = [
                sum(map(validation_accuracy, found[i * seeds : (i + 1) * seeds]))
                for i in range(len(tried))
            ]
            tuned[arm] = [
                tried[max(range(i, i + len(rates)), key=sums.__getitem__)]
                for i in range(0, len(tried), len(rates))
            ]
        return rows, tuned

    def _choosing(self, arm: str, choices: Sequence[Fields]) -> list[Row]:
        """Return the rows of runs to choose by."""
        with_validation = [{**of, "validation": CHOOSING_IMAGES} for of in choices]
        name = f"{arm}-choosing"
        rows = self._train(name, with_validation, self._choosing_seeds, choosing=True)
        return [{**row, "arm": arm, CHOOSING: True} for row in rows]

    def reach(self, arms: Arms, wanted: Collection[Setting], seeds: range) -> None:
        """Train those of the settings that are wanted, with seeds they lack."""
        for arm, choices in arms.items():
            numbers = [i for i in range(len(choices)) if (arm, i) in wanted]
            if not numbers:
                continue
            # All that are still wanted have been wanted at the look before.
            missing = seeds[len(self.trained[arm, numbers[0]]) :]
            rows = self._train(arm, [choices[i] for i in numbers], missing)
            for place, row in enumerate(rows):
                self.trained[arm, numbers[place // len(missing)]].append(row)

    def _train(
        self,
        arm: str,
        choices: Sequence[Fields],
        seeds: Sequence[int],
        *,
        choosing: bool = False,
    ) -> list[Row]:
        """Return a row for each choice and seed."""
        configs = self._design.configs(choices, seeds)
        print(f"{arm}: {fields.counted(len(configs), 'run')}", flush=True)
        if self._study.measure is not None:
            folder = self._folder / f"{arm}-{seeds[0]}-{seeds[-1]}"
            rows, seconds = self._study.measure(arm, folder, configs, self._data)
            return [{"arm": arm, "seconds": seconds / len(rows), **row} for row in rows]
        members = self._pool.train(
            configs,
            self._data,
            name=arm,
            score_training=self._study.score_training and not choosing,
        )
        rows = [{"arm": arm, **member.row} for member in members]
        if self._study.probe is not None:
            for row, member in zip(rows, members, strict=True):
                row.update(self._study.probe(row, member.variables(), self._data))
        return rows


def _end(study: Study, rows: Sequence[Row], folder: Path, written: str) -> None:
    """Draw the figures; print the verdicts, and what was written."""
    study.draw(rows, folder)
    for verdict in study.verdicts(rows):
        value, low, high, n = verdict.interval
        print(
            f"{verdict.verdict}: {verdict.claim}\n  {verdict.statistic}: {value:.4g} "
            f"[{low:.4g}, {high:.4g}], n = {n}; claimed {verdict.threshold}"
        )
    caution = study.caution(rows)
    if caution:
        print(caution)
    print(f"written to {folder}: {written}")
