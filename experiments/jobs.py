"""A sweep as many jobs, on Slurm or on this machine, through submitit.

Each job trains a part of the sweep (`bn_jax.runs.parts`) by the command that was given,
with --part, and resumes it where it was stopped. The same command submits again what
has not finished, whatever became of its jobs, and merges the parts when all are there.
"""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from absl import app, flags
from tqdm import tqdm

from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE, ConfigError
from bn_jax.names import Table
from bn_jax.runs import json_files, parts, workdirs
from bn_jax.runs.interrupt import Interrupted, listening
from bn_jax.runs.json_files import RunError
from bn_jax.runs.sweeps import Part
from bn_jax.training.config import TrainConfig

SUBMITTED = "submitted.json"  # by part, the job that was last submitted for it
LOGS = "logs"

# A job that is told to end has so long to save a checkpoint.
_STOP_SECONDS = 10.0


class Launcher(NamedTuple):
    """Where jobs run.

    Attributes:
      num_parts: into how many jobs a sweep is cut.
      at_once: how many are submitted at a time; None for all.
      executor: makes submitit's executor, given the folder of logs.
      active: which of these jobs, by id, wait or run; given the folder of logs, too.
      ends: whether the jobs are to end with the command.
      seconds: from one look at the jobs to the next.
    """

    num_parts: int
    at_once: int | None
    executor: Callable[[Path], Any]
    active: Callable[[Collection[str], Path], set[str]]
    ends: bool
    seconds: float


def local(
    *,
    at_once: Annotated[int, AT_LEAST_1] = 2,
    array: Annotated[int | None, AT_LEAST_1] = None,
) -> Launcher:
    """Return processes of this machine; `local:N` is short for `local:at_once=N`.

    Args:
      at_once: how many run at a time.
      array: into how many jobs the sweep is cut; by default as many.
    """

    def executor(folder: Path) -> Any:
        from submitit import LocalExecutor

        made = LocalExecutor(folder)
        made.update_parameters(timeout_min=60 * 24 * 365)
        return made

    return Launcher(array or at_once, at_once, executor, _running, True, 0.5)


def slurm(
    *,
    partition: str | None = None,
    array: Annotated[int, AT_LEAST_1] = 8,
    at_once: Annotated[int, AT_LEAST_1] = 256,
    minutes: Annotated[int, AT_LEAST_1] = 60,
    cpus: Annotated[int, AT_LEAST_1] = 2,
    gpus: Annotated[int, NOT_NEGATIVE] = 0,
    memory_gb: Annotated[int | None, AT_LEAST_1] = None,
    account: str | None = None,
) -> Launcher:
    """Return the jobs of an array on Slurm; a folder that all nodes see is needed.

    Args:
      partition: by default the cluster's own.
      array: into how many jobs the sweep is cut.
      at_once: how many of them run at a time, at most.
      minutes: that a job may take; what has not ended by then is queued again.
      cpus: of a job.
      gpus: of a job.
      memory_gb: of a job; by default the cluster's own.
      account: to charge.
    """

    def executor(folder: Path) -> Any:
        from submitit import SlurmExecutor

        try:
            made = SlurmExecutor(folder)
        except RuntimeError:
            raise ConfigError(
                "launcher='slurm', but there is no srun on this machine; start the "
                "command on a login node of the cluster, or give local:N"
            ) from None
        given = {
            "partition": partition,
            "account": account,
            "mem": memory_gb and f"{memory_gb}GB",
            "gpus_per_node": gpus or None,
        }
        made.update_parameters(
            job_name="bn_jax",
            time=minutes,
            cpus_per_task=cpus,
            array_parallelism=at_once,
            additional_parameters={"requeue": True},
            **{name: value for name, value in given.items() if value is not None},
        )
        return made

    return Launcher(array, None, executor, _queued, False, 5.0)


LAUNCHERS: Table[Launcher] = Table("launcher", {"local": local, "slurm": slurm})


def launcher_of(text: str) -> Launcher:
    """Return the launcher that a text names.

    Raises:
      ConfigError: if there is no such one, or submitit is not installed.
    """
    short = re.fullmatch(r"local:(\d+)(,.*)?", text)
    if short is not None:
        text = f"local:at_once={short[1]}{short[2] or ''}"
    launcher = LAUNCHERS.make(text)
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--launcher needs submitit, which is not installed; "
            "pip install -e '.[launch]'"
        ) from None
    return launcher


def given_arguments() -> list[str]:
    """Return the flags that this command was given, for those of its jobs."""
    known = {name: flags.FLAGS[name] for name in flags.FLAGS}
    return [
        argument
        for name, flag in known.items()
        if flag.present and name == flag.name and name != "launcher"
        for argument in flag.serialize().split("\n")  # of a flag that is repeated
    ]


class Job:
    """What a job does: the command, with other flags. submitit may start it again."""

    def __call__(self, arguments: Sequence[str]) -> None:
        """Run the command in this process."""
        from experiments import launch, train

        sys.argv = ["experiments.train", *arguments]
        try:
            app.run(train.main, flags_parser=launch.flags_parser(train.define_flags))
        except SystemExit as ended:
            if ended.code:
                raise

    def checkpoint(self, arguments: Sequence[str]) -> Any:
        """Return a job for when time is up: it resumes from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments)


def run(
    launcher: Launcher,
    configs: Sequence[TrainConfig],
    arguments: Sequence[str],
    workdir: Path,
) -> None:
    """Train all parts of a sweep by jobs, and wait for them.

    Args:
      launcher: where they run.
      configs: of all members.
      arguments: flags of the command, without --part.
      workdir: of the sweep.

    Raises:
      RunError: if jobs have ended before their part was trained.
      Interrupted: on SIGTERM or Ctrl-C.
    """
    folder = workdir.absolute() / json_files.PARTS
    logs = folder / LOGS
    total = launcher.num_parts
    unfinished = functools.partial(
        parts.unfinished, configs, workdir=workdir, num_parts=total
    )
    with (
        listening() as request,
        workdirs.locked(folder),
        tqdm(total=total, unit="part", disable=None, leave=False) as bar,
    ):
        submitted = _Submitted(folder / SUBMITTED)
        executor = launcher.executor(logs)
        left = unfinished()
        before = launcher.active(submitted.jobs(left), logs)
        waiting = [part for part in left if submitted.job(part) not in before]
        print(
            f"{total} parts: {total - len(left)} trained, "
            f"{len(before)} submitted before, {len(waiting)} to submit",
            flush=True,
        )
        jobs: dict[str, Any] = {}
        while True:
            left = unfinished()
            bar.update(total - len(left) - bar.n)
            active = launcher.active(submitted.jobs(left), logs)
            if request.signum is not None:
                _stop(launcher, [jobs[i] for i in active if i in jobs], request.signum)
            room = len(waiting)
            if launcher.at_once is not None:
                room = max(0, launcher.at_once - len(active))
            new, waiting = waiting[:room], waiting[room:]
            if new:
                of_parts = [[*arguments, f"--part={p.number}/{total}"] for p in new]
                made = _submit(executor, of_parts)
                submitted.add({p: j.job_id for p, j in zip(new, made, strict=True)})
                jobs |= {job.job_id: job for job in made}
                continue
            if not left:
                return
            if not active and not waiting:
                break
            time.sleep(launcher.seconds)
        time.sleep(launcher.seconds)  # a file of another machine may come later
        left = unfinished()
        if left:
            raise RunError(_ended_early(left, submitted, logs))


def _submit(executor: Any, of_parts: Sequence[Sequence[str]]) -> list[Any]:
    """Submit a job for each part, given its flags; return submitit's jobs.

    Raises:
      RunError: if they are not taken, with what was said of it.
    """
    try:
        made: list[Any] = executor.map_array(Job(), of_parts)
        return made
    except (OSError, RuntimeError) as error:  # of starting sbatch, and of its answer
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunError(
            f"jobs were not submitted: {lines[-1] if lines else type(error).__name__}; "
            "change the options of --launcher, see --help, and the same command goes on"
        ) from error


def _stop(launcher: Launcher, jobs: Sequence[Any], signum: int) -> None:
    """End the command, and its jobs where they end with it.

    Raises:
      Interrupted: always.
    """
    if not launcher.ends:
        raise Interrupted(
            signum,
            "stopped waiting; the jobs go on, and the same command waits for them",
        )
    # submitit hands the signal on; a job that is about to start does not hear it yet.
    while running := [job for job in jobs if not job.done()]:
        for job in running:
            job._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < deadline and not all(job.done() for job in running):
            time.sleep(launcher.seconds)
    raise Interrupted(signum, "stopped; the same command resumes each part")


def _ended_early(unfinished: Sequence[Part], submitted: _Submitted, logs: Path) -> str:
    first = unfinished[0]
    log = logs / f"{submitted.job(first)}_0_log.err"
    said = ""
    if log.exists():
        lines = log.read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
    numbers = ", ".join(str(part.number) for part in unfinished[:12])
    more = ", ..." if len(unfinished) > 12 else ""
    return (
        f"{len(unfinished)} of {first.num_parts} jobs ended before their part was "
        f"trained ({numbers}{more}); the same command submits them again. The log of "
        f"part {first.number}, {log}, ends: {said or 'with nothing'}"
    )


class _Submitted:
    """Which job was submitted for which part, on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._jobs: dict[str, str] = (
            json_files.read_object(path) if path.exists() else {}
        )

    def jobs(self, parts: Sequence[Part]) -> list[str]:
        jobs = (self.job(part) for part in parts)
        return [job for job in jobs if job is not None]

    def job(self, part: Part) -> str | None:
        return self._jobs.get(self._name(part))

    def add(self, jobs: dict[Part, str]) -> None:
        self._jobs |= {self._name(part): job for part, job in jobs.items()}
        json_files.write_json(self._path, self._jobs)

    def _name(self, part: Part) -> str:
        return part.folder(Path()).name


def _running(jobs: Collection[str], logs: Path) -> set[str]:
    """Return those of the processes submitit started that are still running."""
    return {job for job in jobs if str(logs) in _command_of(job)}


def _command_of(pid: str) -> str:
    """Return the command line of a process; empty of one that has ended."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except OSError:
            return ""
    ps = ["ps", "-o", "command=", "-p", pid]
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout


def _queued(jobs: Collection[str], logs: Path) -> set[str]:
    """Return which jobs Slurm has in its queue, waiting or running.

    Where Slurm does not answer, all of them may be.
    """
    del logs
    if not jobs:
        return set()
    done = subprocess.run(
        ["squeue", "--me", "--noheader", "--array", "--format=%i"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return set(jobs)
    return set(jobs) & set(done.stdout.split())
