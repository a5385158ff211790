"""What every experiment's command line shares: data flags, errors in one line."""

from __future__ import annotations

import contextlib
import io
import logging as std_logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from absl import flags, logging

from bn_jax import fields, paths
from bn_jax.fields import ConfigError
from bn_jax.training.config import RunOptions
from experiments import flag_fields

if TYPE_CHECKING:
    from bn_jax.data import ImageData

flags.disclaim_key_flags()

# Flags that say which processes train together.
PROCESSES = ("coordinator_address", "num_processes", "process_id", "distributed")


def define_workdir_flag() -> None:
    """Define the flag that says where results go."""
    flags.DEFINE_string("workdir", None, "Folder that receives the results.")


def workdir() -> Path:
    """Return the folder that the flag gives.

    Raises:
      ConfigError: if it was not given.
    """
    if flags.FLAGS.workdir is None:
        raise ConfigError("give --workdir=DIR for the results; --help lists all flags")
    return paths.local(flags.FLAGS.workdir, "workdir")


def define_run_flags() -> None:
    """Define the flags that say where training takes place: devices, data, folder."""
    flag_fields.define(RunOptions)
    define_data_flags()
    define_workdir_flag()
    flags.DEFINE_string(
        "cache_dir",
        None,
        "Folder where JAX keeps compiled programs, so that the next start is quicker; "
        "empty for none (default: $JAX_COMPILATION_CACHE_DIR, or bn_jax/compiled in "
        "the user's cache folder).",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT at which process 0 can be reached, where several are started by "
        "hand; with --num_processes and --process_id.",
    )
    flags.DEFINE_integer("num_processes", None, "How many are started by hand.")
    flags.DEFINE_integer("process_id", None, "Of this one, from 0.")
    flags.DEFINE_boolean(
        "distributed",
        None,
        "Whether to join the processes that Slurm, Kubernetes or a TPU pod has started "
        "(default: where there are several).",
    )


def default_cache_dir() -> Path:
    """Return the user's folder for compiled programs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "bn_jax" / "compiled"


def set_up_cache() -> None:
    """Have JAX keep compiled programs where the flag, or the environment, says."""
    import jax

    folder = flags.FLAGS.cache_dir
    if folder is None and jax.config.jax_compilation_cache_dir is None:
        folder = str(default_cache_dir())
    if folder:
        folder = str(paths.local(folder, "cache_dir"))
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def set_up_jax() -> None:
    """Set up the cache, the devices and the processes that the flags ask for.

    It has to come before any use of JAX.
    """
    set_up_cache()
    import jax

    from bn_jax.runs import distributed

    given = flags.FLAGS
    options = flag_fields.read(RunOptions, given)
    _check_processes()
    joins = given.distributed
    if joins is None:
        joins = given.coordinator_address is not None or distributed.is_detected()
    if options.devices != "all":
        # Of the host's cores; a GPU or TPU that is there is used all the same.
        num_processes = given.num_processes or (distributed.num_tasks() if joins else 1)
        num_local, rest = divmod(int(options.devices), num_processes)
        if rest:
            raise ConfigError(
                f"devices={options.devices} does not divide over {num_processes} "
                "processes; give a multiple"
            )
        jax.config.update("jax_num_cpu_devices", num_local)
    if joins:
        distributed.end_in_a_line_with_others(_is_whole)
        distributed.initialize(
            given.coordinator_address, given.num_processes, given.process_id
        )
        others = jax.process_count() - 1
        devices = fields.counted(jax.device_count(), "device")
        print(
            f"process {jax.process_index()} of {jax.process_count()}, "
            f"{jax.local_device_count()} of {devices}; if "
            f"{'the other' if others == 1 else 'another'} dies, this one ends within "
            f"{distributed.DEATH_SECONDS} seconds",
            flush=True,
        )
    check_devices()


def _is_whole() -> bool:
    """Return whether the results of the run are written, where this process sees it."""
    from bn_jax.runs import json_files

    workdir = flags.FLAGS.workdir
    return workdir is not None and (Path(workdir) / json_files.RESULTS).exists()


def _check_processes() -> None:
    """Refuse flags of processes that would be ignored.

    Raises:
      ConfigError: naming them.
    """
    given = flags.FLAGS
    numbers = [n for n in ("num_processes", "process_id") if given[n].present]
    if numbers and given.coordinator_address is None:
        raise ConfigError(
            f"{' and '.join(f'--{n}={given[n].value}' for n in numbers)} without "
            "--coordinator_address; give HOST:PORT of process 0, too"
        )
    if given.distributed is False and given.coordinator_address is not None:
        raise ConfigError(
            f"--nodistributed with --coordinator_address={given.coordinator_address}; "
            "leave out one of them"
        )


def check_devices() -> None:
    """Have JAX find its devices.

    Raises:
      ConfigError: if there are none of those that it was told to use.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"JAX_PLATFORMS={platforms!r}, and JAX has no such device here; unset it, "
            f"or install what JAX needs for it{reason and f' ({reason})'}"
        ) from None


def define_data_flags() -> None:
    """Define the flags that say where the data lie."""
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TFDS data sets, read where prepared and written by a download "
        "(default: $TFDS_DATA_DIR or ~/tensorflow_datasets).",
    )
    flags.DEFINE_string(
        "data_files",
        None,
        "Folder with the files that the data set's authors publish: IDX files, CIFAR's "
        "archive or the archive itself, SVHN's MATLAB files (default, of "
        "Fashion-MNIST: where Debian's package dataset-fashion-mnist puts them).",
    )


def data_arguments() -> list[str]:
    """Return the data flags as they were given, for another process."""
    given = flags.FLAGS
    return [
        f"--{name}={given[name].value}"
        for name in ("data_dir", "data_files")
        if given[name].present
    ]


def load_data(name: str) -> ImageData:
    """Return the data set that the flags give, and say where it is from."""
    from bn_jax import data as data_lib

    data = data_lib.load(
        name, data_dir=flags.FLAGS.data_dir, data_files=flags.FLAGS.data_files
    )
    size = " x ".join(map(str, data.image_shape))
    print(
        f"data: {data.source}; {size}, {data.num_classes} classes",
        flush=True,
    )
    if data.fallback_reason:
        print(f"  {data.fallback_reason}", flush=True)
    return data


def check_no_arguments(argv: Sequence[str]) -> None:
    """Refuse arguments that are not flags, such as a forgotten `--`."""
    if len(argv) > 1:
        words = ", ".join(map(repr, argv[1:]))
        raise ConfigError(
            f"unexpected {words}; flags begin with --, as in --workdir=DIR, and a "
            "value with blanks has quotes around it"
        )


@contextlib.contextmanager
def experiment(
    name: str, config: Mapping[str, Any], *, repeat: bool = True
) -> Iterator[Path]:
    """Hold the folder --workdir for an experiment; give its path.

    Args:
      name: of the experiment.
      config: what decides its numbers, as JSON values.
      repeat: whether, run again with the same config, it writes its results anew, which
        are the same; those of a measurement are not, and are kept.

    Raises:
      RunError: if the folder cannot take the experiment; nothing is overwritten.
    """
    from bn_jax.runs import distributed, json_files, results, workdirs

    folder = workdir()
    with contextlib.ExitStack() as stack:
        if distributed.is_primary():
            if not repeat and (folder / json_files.RESULTS).exists():
                raise json_files.RunError(
                    f"{folder} holds results, which would be lost: measuring again "
                    "gives others; give another workdir"
                )
            started = {"experiment": name, **config}
            stack.enter_context(workdirs.held(folder, started, repeat=True))
            results.start_run(folder, started)
        yield folder


def numbers(values: Sequence[float], most: int = 16) -> str:
    """Return numbers in a row of equal widths; of many, the first."""
    row = " ".join(f"{value:7.3f}" for value in values[:most])
    return row if len(values) <= most else f"{row} ... of {len(values)}"


def fail(message: str) -> NoReturn:
    """End the process with status 1, and soon the others of its run."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    # An orderly end waits for the others, who may be waiting for this one. They get a
    # moment to end by themselves, where all have met the same error.
    time.sleep(1)
    sys.stdout.flush()
    os._exit(1)


def show_warnings_of_jax() -> None:
    """Print what JAX warns of, such as a GPU that it was not installed for."""
    handler = std_logging.StreamHandler()
    handler.setFormatter(std_logging.Formatter("warning: %(message)s"))
    logger = std_logging.getLogger("jax")
    logger.setLevel(std_logging.WARNING)
    logger.handlers = [handler]
    logger.propagate = False  # to absl's handler, which would tell it again


def _quiet_orbax() -> None:
    """Leave it to us to tell what Orbax does, and what goes wrong in it.

    Of an error that it raises, its threads tell as well, in the middle of our own line.
    """
    logging.set_verbosity(logging.FATAL)
    show_warnings_of_jax()

    def show(unraisable: sys.UnraisableHookArgs) -> None:
        # So end the other writes of a checkpoint when one has failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = show


class _Output:
    """A standard stream that goes nowhere from where it cannot be written any more.

    So training goes on when the terminal is gone, the disk of a log is full, or `head`
    has seen enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            print(
                f"note: output cannot be written ({error.strerror}); the program goes "
                "on without",
                file=sys.stderr,
            )

    def __getattr__(self, name: str) -> Any:  # such as isatty, by which tqdm goes
        return getattr(self._stream, name)


def _keep_output() -> None:
    """Let no write to a standard stream end the program."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: a file of ours would get its number
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Output(sys.stdout)  # type: ignore[assignment]
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Output(sys.stderr)  # type: ignore[assignment]


def _told(error: flags.Error) -> str:
    """Return in a line what is wrong with the command line, as absl found it."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        field, _, option = name.partition(".")
        if option and field in flags.FLAGS:
            hint = f"options stand with their name, as in --{field}=NAME:{option}=VALUE"
        else:
            known = [n for n in flags.FLAGS if n == flags.FLAGS[n].name]
            near = fields.nearest(name, known)
            meant = _as_options(name) or ([f"--{near}"] if near else [])
            hint = f"did you mean {' or '.join(meant)}? " if meant else ""
            hint += "--help lists all flags"
        return f"--{name} is no flag; {hint}"
    text = " ".join(str(error).split())
    given = re.match(r"flag --(\w+)=(.*?): ", text)
    if given is not None and given[1] in flags.FLAGS:
        words = {"bool": bool, "int": int, "float": float}
        kind = words.get(flags.FLAGS[given[1]].flag_type())
        if kind is not None:
            told = f"--{given[1]}={given[2]}; expected {fields.WORDS[kind]}"
            if "sweep" in flags.FLAGS and re.search(r"\d(,|\.\.)", given[2]):
                told += f": several values are a sweep, --sweep={given[1]}={given[2]}"
            return told
    return text


def _as_options(name: str) -> list[str]:
    """Return the flags that have an option of a name, or of one that it begins."""
    from bn_jax.models import MODELS
    from bn_jax.training.optimizers import OPTIMIZERS
    from bn_jax.transforms import NORMS

    tables = {"model": MODELS, "norm": NORMS, "optimizer": OPTIMIZERS}
    found = []
    for flag, table in tables.items():
        options = [(row, o) for row in table for o in table.options(row)]
        meant = [(r, o) for r, o in options if o == name or o.startswith(f"{name}_")]
        if flag in flags.FLAGS and meant:
            row, option = meant[0]
            found.append(f"--{flag}={row}:{option}=VALUE")
    return found


def flags_parser(
    define_flags: Callable[[], None],
) -> Callable[[Sequence[str]], list[str]]:
    """Define flags, and return what `absl.app.run` parses them with.

    A flag that is wrong ends with one line.

    Args:
      define_flags: called here, not on import, so that experiments can be imported side
        by side.
    """
    _keep_output()
    define_flags()

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except SystemExit:  # after --help
            sys.exit(0)  # for which absl has 1
        except flags.Error as error:
            sys.exit(f"error: {_told(error)}")

    return parse


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """End the process with one line and status 1 after a user's mistake.

    It decorates the function that `absl.app.run` calls.
    """
    from bn_jax.data import DataError
    from bn_jax.runs import distributed
    from bn_jax.runs.distributed import DistributedError
    from bn_jax.runs.interrupt import Interrupted
    from bn_jax.runs.json_files import RunError

    if not flags.FLAGS["verbosity"].present:
        _quiet_orbax()
    try:
        yield
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.signum)
    except (
        ConfigError,
        DataError,
        DistributedError,
        FloatingPointError,
        RunError,
    ) as error:
        fail(f"error: {error}")
    except (RuntimeError, ValueError) as error:  # of JAX
        if not distributed.is_of_a_death(error):
            raise
        distributed.end_with_others(_is_whole())
    distributed.leave()
