"""What every experiment's command line shares: data flags, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging

from bn_jax.training.config import ConfigError

if TYPE_CHECKING:
    from bn_jax.data import ImageData

flags.disclaim_key_flags()


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
    return Path(flags.FLAGS.workdir)


def define_data_flags() -> None:
    """Define the flags that say where the data lie."""
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TFDS data sets, read where prepared and written by a download "
        "(default: $TFDS_DATA_DIR or ~/tensorflow_datasets).",
    )
    flags.DEFINE_string(
        "idx_dir",
        None,
        "Folder with the data set's four IDX files, such as "
        "train-images-idx3-ubyte.gz (default: where Debian's package "
        "dataset-fashion-mnist puts them).",
    )


def load_data(name: str) -> ImageData:
    """Return the data set that the flags give, and say where it is from."""
    from bn_jax import data as data_lib

    data = data_lib.load(
        name, data_dir=flags.FLAGS.data_dir, idx_dir=flags.FLAGS.idx_dir
    )
    print(f"data: {data.source}", flush=True)
    if data.fallback_reason:
        print(f"  {data.fallback_reason}", flush=True)
    return data


def check_no_arguments(argv: Sequence[str]) -> None:
    """Refuse arguments that are no flags, such as a forgotten `--`."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")


def numbers(values: Iterable[float]) -> str:
    """Return numbers in a row of equal widths."""
    return " ".join(f"{value:7.3f}" for value in values)


def start(
    main: Callable[[Sequence[str]], None], define_flags: Callable[[], None]
) -> None:
    """Run an experiment; a user's mistake ends with one line and status 1.

    Args:
      main: the experiment, given what is left of the command line.
      define_flags: called first. Flags are not defined on import, so that experiments
        can be imported side by side.
    """
    define_flags()

    def run(argv: Sequence[str]) -> None:
        from bn_jax.data import DataError
        from bn_jax.results import RunError

        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells its every move
        try:
            main(argv)
        except (ConfigError, DataError, RunError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    app.run(run)
