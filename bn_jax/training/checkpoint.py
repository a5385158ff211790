"""Trained variables on disk, through Orbax: arrays only, nothing that runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from bn_jax.results import RunError

VARIABLES = "variables"


def save_variables(workdir: Path, variables: Any) -> None:
    """Write a model's variables to `workdir`/variables, whole or not at all."""
    import orbax.checkpoint as ocp  # here, because it takes a second to import

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((workdir / VARIABLES).absolute(), variables, force=True)


def load_variables(workdir: Path, like: Any) -> Any:
    """Read what `save_variables` wrote.

    Args:
      workdir: the run's directory.
      like: variables of the expected structure, shapes and dtypes.

    Raises:
      RunError: if there are none, or they are damaged or of another model.
    """
    import orbax.checkpoint as ocp

    path = (workdir / VARIABLES).absolute()
    if not path.is_dir():
        raise RunError(
            f"there is no folder {VARIABLES} in {workdir}; expected the working "
            "directory of a finished run"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"cannot read the variables in {path}: {error}; they are damaged or belong "
            "to another model: train again in another folder"
        ) from error
