"""How a benchmark is described, and the one program that runs each of them.

A benchmark names its options (a dataclass, with a flag for each field), its arms, and a
report of what they took. Everything else is here: --smoke, which arms can run on this
machine, a folder that keeps earlier results, rounds in turns, and the files that the
folder receives: results.json, table.md and the figures. What is timed is in the
benchmark's own file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from absl import app, flags

from bn_jax import fields, plots
from bn_jax.runs import json_files, provenance
from bn_jax.training.config import TrainConfig
from experiments import flag_fields, launch
from experiments.benchmarks import timing

if TYPE_CHECKING:
    from bn_jax.data import ImageData

flags.disclaim_key_flags()  # --help of a benchmark lists them as its own


@dataclasses.dataclass(frozen=True)
class Design:
    """The options of a benchmark; each adds its own to these.

    An option `arms`, made by `arms_option`, chooses which arms are timed.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    rounds: int = fields.option(
        7, "How many times each arm is measured.", valid=fields.AT_LEAST_1
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class DataDesign(Design):
    """The options of a benchmark on a data set that can be chosen."""

    dataset: str = fields.option_of(TrainConfig, "dataset")

    def load(self) -> ImageData:
        """Return the data set.

        Raises:
          ConfigError: if the other options do not fit it.
          DataError: if it cannot be read.
        """
        return launch.load_data(self.dataset)


def arms_option(arms: Mapping[str, Arm], default: tuple[str, ...] = ()) -> Any:
    """Return a field of a design that chooses among arms; all are its default."""
    names = tuple(arms)
    return fields.option(default or names, "Which arms to measure.", choices=names)


# Environment of an arm whose products may be rounded to TF32; see `_share_accelerator`.
TF32 = {"JAX_DEFAULT_MATMUL_PRECISION": "default"}


class Ready(NamedTuple):
    """An arm that has been set up in its process."""

    measure: Callable[[], timing.Measurement]  # once
    about: Mapping[str, Any] = {}  # what the report needs besides, as JSON values


class Arm(NamedTuple):
    """One of the things that a benchmark sets side by side.

    Attributes:
      title: in tables and figures.
      set_up: called with the design in a process of the arm's own, before it uses JAX.
      needs: modules that have to be installed.
      devices: how many it takes; on a CPU as many host devices are made.
      env: environment variables of its process.
      on_gpu: whether it is for a GPU alone.
    """

    title: str
    set_up: Callable[[Any], Ready]
    needs: Sequence[str] = ()
    devices: int = 1
    env: Mapping[str, str] = {}
    on_gpu: bool = False


class Measured(NamedTuple):
    """What the arms of a benchmark took."""

    titles: Mapping[str, str]  # by arm
    about: Mapping[str, Any]  # what each arm said about itself
    rows: Mapping[str, Sequence[timing.Measurement]]  # by arm, one a round

    @property
    def rounds(self) -> int:
        """The number of measurements of each arm."""
        return len(next(iter(self.rows.values())))

    def values(self, name: str) -> dict[str, list[float]]:
        """Return one quantity of all arms' measurements."""
        return {arm: [row[name] for row in rows] for arm, rows in self.rows.items()}


class Figure(NamedTuple):
    """A figure of summaries."""

    draw: Callable[[Any, str, str, Path], None]  # such as `plots.bars`
    values: Any  # its first argument
    label: str  # of the axis of values, with the unit


class Report(NamedTuple):
    """What a benchmark says about its measurements."""

    tables: Sequence[Sequence[Sequence[str]]]  # rows, the first a header
    results: Mapping[str, Any]  # for results.json; may hold `timing.Summary`
    figures: Mapping[str, Figure]  # by the file's name without ending
    notes: Sequence[str] = ()  # lines to print


class Comparison(NamedTuple):
    """One quantity of all arms beside one of them, round by round."""

    values: dict[str, list[float]]  # by arm
    ratios: dict[str, timing.Summary]  # by arm
    table: list[list[str]]  # a row an arm: title, ratio, value
    figure: Figure  # of the ratios


def compare(
    measured: Measured, quantity: str, reference: str, *, ratio: str, value: str
) -> Comparison:
    """Compare one quantity of all arms with that of the arm `reference`.

    Args:
      measured: what the arms took.
      quantity: its name in the measurements.
      reference: the arm by which the others are divided.
      ratio: heads the column of ratios, and labels the figure.
      value: heads the column of values.
    """
    values = measured.values(quantity)
    ratios = timing.ratios_to(reference, values)
    table = [["arm", ratio, value]]
    for arm, title in measured.titles.items():
        summary = timing.summarize(values[arm])
        table.append([title, timing.interval(ratios[arm]), timing.interval(summary, 5)])
    bars = {title: ratios[arm] for arm, title in measured.titles.items()}
    return Comparison(values, ratios, table, Figure(plots.bars, bars, ratio))


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
      name: that of its module in experiments.benchmarks.
      design: a dataclass of options, with a flag for each field.
      arms: what is timed, by name.
      report: called with all measurements; raises FloatingPointError if the arms did
        not compute the same.
      smoke: fields of the design that --smoke sets where no flag does.
      needed: arms without which there is no report. They are measured whatever --arms
        says.
    """

    name: str
    design: type[Design]
    arms: Mapping[str, Arm]
    report: Callable[[Measured], Report]
    smoke: Mapping[str, Any]
    needed: Collection[str] = ()


def start(benchmark: Benchmark) -> None:
    """Run a benchmark from the command line."""
    app.run(
        lambda argv: _main(benchmark, argv),
        flags_parser=launch.flags_parser(lambda: _define_flags(benchmark)),
    )


def _define_flags(benchmark: Benchmark) -> None:
    launch.define_workdir_flag()
    if issubclass(benchmark.design, DataDesign):
        launch.define_data_flags()
    flag_fields.define(benchmark.design)
    smoke = ", ".join(f"{k} {_text(v)}" for k, v in benchmark.smoke.items())
    flags.DEFINE_boolean(
        "smoke", False, f"Try it in a minute; where not given: {smoke}."
    )
    flags.DEFINE_string("arm", None, "Set this arm up and measure it; internal.")


def _text(value: Any) -> str:
    """Return a value as its flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@launch.errors_in_a_line()
def _main(benchmark: Benchmark, argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke = benchmark.smoke if flags.FLAGS.smoke else {}
    design = flag_fields.read(benchmark.design, flags.FLAGS, defaults=smoke)
    if flags.FLAGS.arm is not None:
        arm = benchmark.arms[flags.FLAGS.arm]
        jax.config.update("jax_num_cpu_devices", arm.devices)
        ready = arm.set_up(design)
        timing.serve(ready.about, ready.measure)
        return
    _share_accelerator()
    arguments = [f"--{name}={_text(value)}" for name, value in vars(design).items()]
    source = {}
    if isinstance(design, DataDesign):
        source = {"data_source": design.load().source}
        arguments += launch.data_arguments()
    arms, skipped = choose_arms(benchmark, design)
    config = json.loads(
        json.dumps(vars(design))
    )  # as it will be read: tuples are lists
    with launch.experiment(
        f"benchmarks.{benchmark.name}", config, repeat=False
    ) as folder:
        about, rows = timing.interleaved(
            f"experiments.benchmarks.{benchmark.name}",
            {name: arm.env for name, arm in arms.items()},
            rounds=design.rounds,
            arguments=arguments,
            together=jax.default_backend() != "cpu",
        )
        titles = {name: arm.title for name, arm in arms.items()}
        measured = Measured(titles, about, rows)
        libraries = dict.fromkeys(m for arm in arms.values() for m in arm.needs)
        more = {
            "skipped": skipped,
            **source,
            "versions": timing.versions(libraries),
            "environment": provenance.environment(),
        }
        write(folder, measured.rounds, benchmark.report(measured), more)


def _share_accelerator() -> None:
    """Have all processes share a GPU's memory, and multiply in float32 there.

    On a GPU, JAX takes most of the memory in advance, and rounds the factors of float32
    products to TF32, which other libraries do only when asked. Arms inherit this.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if jax.default_backend() != "cpu":
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"


def choose_arms(
    benchmark: Benchmark, design: Design
) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the arms to measure, and for each that cannot run here the reason.

    Raises:
      ConfigError: if an arm that the report needs, or every arm, cannot run.
    """
    asked = {*getattr(design, "arms", benchmark.arms), *benchmark.needed}
    arms = {name: arm for name, arm in benchmark.arms.items() if name in asked}
    skipped = {name: why for name, arm in arms.items() if (why := _obstacle(arm))}
    for name, reason in skipped.items():
        print(f"left out: {name} ({reason})", flush=True)
        if name in benchmark.needed:
            raise fields.ConfigError(f"{name} cannot be left out, but {reason}")
    arms = {name: arm for name, arm in arms.items() if name not in skipped}
    if not arms:
        raise fields.ConfigError("no arm is left; pip install -e '.[bench]'")
    return arms, skipped


def _obstacle(arm: Arm) -> str:
    """Return why an arm cannot run here; nothing if it can."""
    absent = [m for m in arm.needs if importlib.util.find_spec(m) is None]
    if absent:
        return f"{', '.join(absent)} is not installed"
    if arm.on_gpu and jax.default_backend() != "gpu":
        return "it is for a GPU"
    # On a CPU, devices are made of cores.
    if jax.default_backend() != "cpu" and jax.device_count() < arm.devices:
        return f"it takes {arm.devices} devices of {jax.device_count()}"
    return ""


def write(folder: Path, rounds: int, report: Report, more: Mapping[str, Any]) -> None:
    """Write results.json, table.md and the figures; print the tables and notes.

    Args:
      folder: receives the files.
      rounds: number of measurements of each arm.
      report: what to write.
      more: for results.json, after the report's own.
    """
    text = "\n".join(map(timing.table, report.tables))
    (folder / "table.md").write_text(text)
    note = f"n = {rounds} rounds; median, least to greatest"
    for name, figure in report.figures.items():
        figure.draw(figure.values, figure.label, note, folder / f"{name}.png")
    json_files.write_json(
        folder / json_files.RESULTS, _plain({**report.results, **more})
    )
    print(text)
    for line in report.notes:
        print(line)
    files = [
        "table.md",
        json_files.RESULTS,
        *(f"{name}.png" for name in report.figures),
    ]
    print(f"n = {rounds} rounds; written to {folder}: {', '.join(files)}")


def _plain(value: Any) -> Any:
    """Return a value with its summaries as dicts."""
    if isinstance(value, timing.Summary):
        return value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value
