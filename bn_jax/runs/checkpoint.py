"""What training has become, on disk, through Orbax: arrays and JSON, no code."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization, traverse_util

from bn_jax import fields
from bn_jax.runs import json_files, workdirs
from bn_jax.runs.json_files import RunError
from bn_jax.runs.workdirs import differences
from bn_jax.training.progress import EpochReport, Progress
from bn_jax.training.state import TrainState

VARIABLES = "variables"
AVERAGE = "average"  # of the parameters, in a folder of its own
BEST = "best"  # variables of the epoch that is best on the validation set
CHECKPOINTS = "checkpoints"

NUM_LATEST = 3  # kept, and the best


def save_variables(
    workdir: Path, variables: Any, *, name: str = VARIABLES
) -> dict[str, int]:
    """Write a model's variables to a folder in `workdir`, whole or not at all.

    Returns:
      The CRC-32 of each array by name.

    Raises:
      RunError: if they cannot be written.
    """
    import orbax.checkpoint as ocp  # here, because it takes a second to import

    path = (workdir / name).absolute()
    try:
        with ocp.StandardCheckpointer(
            multiprocessing_options=_primary_alone(), async_options=_folders_first()
        ) as checkpointer:
            checkpointer.save(path, variables, force=True)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return _checksums(_flat(variables))


def load_variables(
    workdir: Path, like: Any, checksums: Any, *, name: str = VARIABLES
) -> Any:
    """Read what `save_variables` wrote.

    Args:
      workdir: the run's directory.
      like: variables of the expected structure, shapes and dtypes.
      checksums: what `save_variables` returned.
      name: of the folder.

    Raises:
      RunError: if there are none, or they are damaged or of another model.
    """
    import orbax.checkpoint as ocp

    path = (workdir / name).absolute()
    if not path.is_dir():
        raise RunError(
            f"there is no folder {name} in {workdir}; expected the working "
            "directory of a finished run"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            faults = _misfits(_flat(stored), _flat(like), copies=False)
            variables = None if faults else checkpointer.restore(path, abstract)
    except Exception as error:  # whatever a damaged file makes Orbax stumble over
        raise RunError(
            f"cannot read the variables in {path}: they are damaged; {json_files.MEND} "
            f"({_first_line(error)})"
        ) from error
    if faults:
        others = fields.counted(len(faults) - 3, "other")
        more = f" and {others}" if len(faults) > 3 else ""
        raise RunError(
            f"the variables in {path} are of another model: {'; '.join(faults[:3])}"
            f"{more}. Give the model of the run"
        )
    changed = _changed(_flat(variables), checksums)
    if changed:
        raise RunError(
            f"the variables in {path} are damaged: {', '.join(changed)} hold other "
            f"numbers than were written; {json_files.MEND}"
        )
    return variables


def _flat(variables: Any) -> dict[str, Any]:
    flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    return flat


class _LatestAndBest:
    """Orbax's policy of what is kept: the last checkpoints, and the best."""

    best: int | None = None  # its step

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        latest = sorted(info.step for info in checkpoints)[-NUM_LATEST:]
        return [info.step in (*latest, self.best) for info in checkpoints]


class Checkpoints:
    """The checkpoints of a run: the last few, and the best.

    Writing goes on in the background; a checkpoint has its name only when it is whole.

    Args:
      workdir: the run's directory.
      identity: what decides the run's numbers, as JSON values: config, data, key. A
        checkpoint of another identity is refused.
      grows: whether that of a run of fewer epochs is read all the same.

    Raises:
      RunError: if their folder cannot be made or read.
    """

    def __init__(
        self, workdir: Path, identity: Mapping[str, Any], *, grows: bool = False
    ) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._kept = _LatestAndBest()
        self._identity, self._grows = dict(identity), grows
        self._path = (workdir / CHECKPOINTS).absolute()
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            multiprocessing_options=_primary_alone(),
            async_options=_folders_first(),
        )
        try:
            self._path.mkdir(exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._path,
                options=options,
                item_handlers={
                    "arrays": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )
        except (OSError, ValueError) as error:
            raise _cannot_write(self._path, error) from error

    @property
    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of `progress`, unless there is one of its step.

        Raises:
          RunError: if it, or the one before, cannot be written.
        """
        step = len(progress.step_losses)
        arrays = {
            "step_losses": progress.step_losses,
            "step_accuracies": progress.step_accuracies,
            **flat(progress.state),
        }
        run = {
            "history": [report.to_row() for report in progress.history],
            "seconds": progress.seconds,
        }
        # Orbax would forget at a restart which was the best; the history knows.
        self._kept.best = _best(progress.history, {*self.steps, step})
        self.save_parts(step, arrays, run)

    def save_parts(
        self,
        step: int,
        arrays: Mapping[str, np.ndarray],
        run: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint of arrays and JSON values, unless there is one of `step`.

        Raises:
          RunError: if it, or the one before, cannot be written.
        """
        if step in self.steps:
            return
        args = self._ocp.args
        run = {"identity": self._identity, **run, "arrays": _checksums(arrays)}
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    arrays=args.StandardSave(dict(arrays)),
                    run=args.JsonSave({**run, "checksum": _checksum_of_json(run)}),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise _cannot_write(self._path, error) from error

    def latest(self, like: TrainState) -> Progress | None:
        """Return the progress of the last whole checkpoint; None if there is none.

        Args:
          like: a state of the expected structure. The number of moving averages of a
            layer, the leading axis of its statistics, may be another.

        Raises:
          RunError: if it is damaged, or of another run.
        """
        return self._read(like, None)

    def best(self, history: Sequence[EpochReport], like: TrainState) -> Progress | None:
        """Return the progress at the best epoch's end; None if there is none.

        Args:
          history: of the run, by which it is the best of the checkpoints that are left.
          like: see `latest`.

        Raises:
          RunError: as `latest`, or if a checkpoint could not be written.
        """
        self._wait()
        step = _best(history, self.steps)
        return None if step is None else self._read(like, step)

    def _read(self, like: TrainState, step: int | None) -> Progress | None:
        """Return the progress at a step, by default the last one."""
        parts = self.parts(step)
        if parts is None:
            return None
        step, arrays, run = parts
        with self._reading(step):
            history = tuple(EpochReport(**report) for report in run["history"])
            seconds = run["seconds"]
            losses = arrays.pop("step_losses")
            accuracies = arrays.pop("step_accuracies")
        state = self.unflat(step, arrays, like)
        return Progress(state, losses, accuracies, history, seconds)

    def unflat(
        self, step: int, arrays: Mapping[str, np.ndarray], like: TrainState
    ) -> TrainState:
        """Return the state of which `flat` made these arrays of a checkpoint.

        Args:
          step: of the checkpoint.
          arrays: all those of the state.
          like: see `latest`.

        Raises:
          RunError: if arrays are missing, unknown or of another shape.
        """
        self._refuse(step, _misfits(arrays, flat(like)))
        nodes = {**_empty(like), **arrays}
        state: TrainState = serialization.from_state_dict(
            like, traverse_util.unflatten_dict(nodes, sep="/")
        )
        return state

    def parts(
        self, step: int | None = None
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """Return step, arrays and JSON values of a whole checkpoint.

        Args:
          step: at which there is one; by default that of the last.

        Raises:
          RunError: if it is damaged, or of another run.
        """
        if not self.steps:
            return None
        step = self.steps[-1] if step is None else step
        args = self._ocp.args
        with self._reading(step):
            saved = self._manager.restore(
                step,
                args=args.Composite(
                    arrays=args.StandardRestore(), run=args.JsonRestore()
                ),
            )
            arrays = {name: np.asarray(a) for name, a in saved["arrays"].items()}
            run = saved["run"]
            if run.pop("checksum") != _checksum_of_json(run):
                raise ValueError("its JSON holds other values than were written")
            changed = _changed(arrays, run.pop("arrays"))
            if changed:
                raise ValueError(
                    f"{', '.join(changed)} hold other numbers than were written"
                )
            identity = run.pop("identity")
        if not (self._grows and workdirs.is_shorter(identity, self._identity)):
            self._refuse(step, differences(identity, self._identity))
        return step, arrays, run

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turn what goes wrong in reading a damaged checkpoint into our error."""
        try:
            yield
        except Exception as error:  # whatever a damaged file makes Orbax stumble over
            raise RunError(
                f"the checkpoint {self._path / str(step)} is damaged: move it away, "
                f"and the run resumes from {self._before(step)} ({_first_line(error)})"
            ) from error

    def _refuse(self, step: int, faults: list[str]) -> None:
        if faults:
            raise RunError(
                f"the checkpoint {self._path / str(step)} is of another run "
                f"({'; '.join(faults)}); give another workdir"
            )

    def _before(self, step: int) -> str:
        earlier = [other for other in self.steps if other < step]
        return f"step {earlier[-1]}" if earlier else "the beginning"

    def close(self) -> None:
        """Wait until all is written.

        Raises:
          RunError: if something could not be written.
        """
        self._wait()
        self._manager.close()

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _cannot_write(self._path, error) from error


def _best(history: Sequence[EpochReport], steps: Collection[int]) -> int | None:
    """Return the step, of these, at which the best epoch ended."""
    accuracies = {report.step: report.best_by for report in history}
    present = accuracies.keys() & set(steps)
    return max(present, key=lambda step: (accuracies[step], step), default=None)


def to_bytes(progress: Progress | None) -> bytes:
    """Return progress as bytes, to be sent to other processes."""
    if progress is None:
        return b""
    fields = progress._asdict()
    fields["state"] = serialization.to_state_dict(progress.state)
    fields["history"] = json.dumps([r.to_row() for r in progress.history])
    return serialization.msgpack_serialize(fields)


def from_bytes(data: bytes, like: TrainState) -> Progress | None:
    """Read progress from the bytes that `to_bytes` made."""
    if not data:
        return None
    fields = serialization.msgpack_restore(data)
    fields["state"] = serialization.from_state_dict(like, fields["state"])
    reports = json.loads(fields["history"])
    fields["history"] = tuple(EpochReport(**report) for report in reports)
    return Progress(**fields)


def _nodes(state: TrainState) -> dict[str, Any]:
    """Return a state as a flat dictionary, of arrays and of empty nodes."""
    nested = serialization.to_state_dict(state)
    return traverse_util.flatten_dict(nested, sep="/", keep_empty_nodes=True)


def flat(state: TrainState) -> dict[str, np.ndarray]:
    """Return the arrays of a state by name."""
    return {
        name: np.asarray(value)
        for name, value in _nodes(state).items()
        if value is not traverse_util.empty_node
    }


def _empty(state: TrainState) -> dict[str, Any]:
    nodes = _nodes(state).items()
    return {name: node for name, node in nodes if node is traverse_util.empty_node}


def _misfits(
    arrays: Mapping[str, Any], like: Mapping[str, Any], *, copies: bool = True
) -> list[str]:
    """List arrays on disk that are missing, unknown or of another shape or dtype.

    Args:
      arrays: on disk, or what is known of them.
      like: those that are expected.
      copies: whether statistics have a leading axis, whose size may differ.
    """

    def shape(name: str, array: Any) -> tuple[int, ...]:
        is_copied = copies and name.startswith("batch_stats/")
        return tuple(array.shape[1:] if is_copied else array.shape)

    faults = [f"no {name}" for name in sorted(like.keys() - arrays.keys())]
    faults += [f"unknown {name}" for name in sorted(arrays.keys() - like.keys())]
    for name in sorted(like.keys() & arrays.keys()):
        old, new = arrays[name], like[name]
        if (shape(name, old), old.dtype) != (shape(name, new), new.dtype):
            faults.append(
                f"{name}: {old.dtype}{list(shape(name, old))} there, "
                f"{new.dtype}{list(shape(name, new))} now"
            )
    return faults


def _primary_alone() -> Any:
    """Return Orbax's option for files that process 0 writes, unaided by the others."""
    import orbax.checkpoint as ocp

    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def _folders_first() -> Any:
    """Return Orbax's option to make a checkpoint's folders before its threads start.

    They would wait for 20 minutes for a folder that a full disk has refused.
    """
    import orbax.checkpoint as ocp

    return ocp.AsyncOptions(create_directories_asynchronously=False)


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return the CRC-32 of each array."""
    return {
        name: zlib.crc32(np.asarray(array).tobytes()) for name, array in arrays.items()
    }


def _changed(arrays: Mapping[str, Any], checksums: Mapping[str, int]) -> list[str]:
    """Return the names of arrays that are not those of the checksums."""
    found = _checksums(arrays)
    return [
        n for n in sorted(found.keys() | checksums) if found.get(n) != checksums.get(n)
    ]


def _checksum_of_json(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    """Return the first line of an error; TensorStore appends its source positions."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _cannot_write(path: Path, error: Exception) -> RunError:
    return RunError(
        f"cannot write {path}: what was written before is kept; make room, or the "
        f"folder writable, and the same command resumes ({_first_line(error)})"
    )
