import contextlib
import functools
import io
import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from absl import app

from bn_jax.runs import json_files, results
from bn_jax.runs import run as run_lib
from experiments import launch
from experiments import lenet as experiment
from marks import slow_but

app.define_help_flags()  # once in a process

MODULE = ("-m", "experiments.lenet")


def start(*arguments, cwd, program=MODULE):
    """Start the experiment as a user does, in another folder than the checkout's."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "TFDS_DATA_DIR": str(cwd / "no-tfds-here"),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
    )


def ended(process):
    """What a process said, and how it ended."""
    with process:
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess((), process.returncode, stdout, stderr)


def lenet(*arguments, cwd, program=MODULE):
    return ended(start(*arguments, cwd=cwd, program=program))


@pytest.fixture
def command(in_process):
    """Runs the experiment's file here; returns what it printed."""
    start = functools.partial(runpy.run_path, experiment.__file__, run_name="__main__")
    return functools.partial(in_process, start)


def test_help_explains_itself_to_a_newcomer(command, capsys):
    with pytest.raises(SystemExit):
        command("--help")
    shown = capsys.readouterr().out
    assert "python -m experiments.lenet --workdir=" in shown
    flags = "model norm trained optimizer schedule epochs batch_size learning_rate seed"
    flags += " dataset validation inputs augment accumulate precision smoke data_dir"
    flags += " data_files workdir load sweep batch_stats merged_stats devices parallel"
    flags += " input checkpoint_every resume coordinator_address num_processes"
    for flag in flags.split():
        assert f"--{flag}:" in shown or f"--[no]{flag}:" in shown


def assert_reports(said, num_features):
    """These are the lines of a smoke run whose first norm has so many features."""
    assert "6,000 + 1,000 images, the sample embedded in bn_jax" in said[0]
    assert said[1].startswith("epoch 1/1  loss ")
    assert "train accuracy" in said[1] and "test accuracy" in said[1]
    assert said[1].endswith("examples/s")
    for line, greek in zip(said[2:4], ("gamma", "beta"), strict=True):
        assert line.startswith(f"norm1 {greek}")
        assert len(line.split()) == 2 + num_features
    assert "by exact statistics" in said[4]
    assert "written to run: checkpoints, checksums.json, config.json" in said[-1]
    # One epoch of 23 steps on 6,000 images: far from trained, far from chance.
    assert json_files.read_json(Path("run/results.json"))["train_accuracy"] > 0.3


SAME_NUMBERS = "the same numbers as in run/results.json"
IS_FINISHED = "error: run holds a finished run of this config; read it with --load=run"


def test_smoke_run_trains_reports_and_reads_back(command):
    model = "--model=mlp:activation=relu,widths=16"
    arguments = ("--workdir=run", "--smoke", "--devices=1", model)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        said = command(*arguments)
    assert stderr.getvalue() == ""
    assert_reports(said.splitlines(), 16)
    config = json_files.read_json(Path("run/config.json"))
    assert config["model"] == "mlp:widths=16,activation=relu"
    assert SAME_NUMBERS in command("--load=run")

    before = contents(Path())
    with pytest.raises(SystemExit, match=f"^{IS_FINISHED}.*$"):
        command(*arguments)
    assert contents(Path()) == before


@pytest.mark.slow
def test_smoke_run_of_lenet_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = lenet("--workdir=run", "--smoke", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert_reports(ran.stdout.splitlines(), 6)

    read = lenet("--load=run", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    assert SAME_NUMBERS in read.stdout

    before = contents(tmp_path)
    again = lenet("--workdir=run", "--smoke", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith(IS_FINISHED) and again.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_flags_reach_the_devices_the_input_and_the_checkpoints(tmp_path):
    ran = lenet(
        "--workdir=run",
        "--smoke",
        "--batch_size=600",
        "--devices=2",
        "--parallel=jit",
        "--batch_stats=per_device",
        "--input=stream",
        "--checkpoint_every=4steps",
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[1:3] == [
        "2 devices of one process by jit, 300 of 600 images each, statistics "
        "per_device",
        "training images are streamed to the devices",
    ]
    summary = json_files.read_json(tmp_path / "run" / "results.json")
    assert (summary["num_devices"], summary["num_processes"]) == (2, 1)
    assert steps_in(tmp_path / "run") == [4, 8, 10]


def steps_in(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names)


# Of each way to end: absl's, ours, and ours when the folder is opened. The other
# mistakes are made in test_train.py, in this process.
MISTAKES = {
    "run": "error: unexpected 'run'; flags begin with --",
    "--epohcs=3": "error: --epohcs is no flag; did you mean --epochs. --help lists",
    "--norm=nrom": "norm='nrom'; expected one of batch_norm",
    "--workdir=/proc/a": "cannot write to .* directory /proc/a: .*another workdir",
}


@pytest.mark.parametrize("mistake", slow_but(["--norm=nrom"], MISTAKES))
def test_mistake_ends_in_a_line_that_says_the_mend(tmp_path, mistake):
    ran = lenet("--workdir=a", "--smoke", mistake, cwd=tmp_path)
    assert ran.returncode == 1
    assert re.search(MISTAKES[mistake], ran.stderr)
    assert "Traceback" not in ran.stderr
    assert not any(tmp_path.iterdir())


def test_output_that_breaks_goes_nowhere_and_is_else_the_streams_own(tmp_path, capsys):
    with open(tmp_path / "log", "w") as log:
        output = launch._Output(log)
        print("kept", file=output, flush=True)
        assert (output.isatty(), output.encoding) == (False, log.encoding)
        assert output.fileno() == log.fileno()
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), log.fileno())
        for _ in range(2):
            print("lost", file=output, flush=True)
    assert (tmp_path / "log").read_text() == "kept\n"
    note = "note: output cannot be written (No space left on device); the program goes"
    assert capsys.readouterr().err.count(note) == 1


def test_what_jax_warns_of_is_told_although_absl_is_quiet(capsys, monkeypatch):
    root, of_jax = logging.getLogger(), logging.getLogger("jax")
    for logger in (root, of_jax):
        monkeypatch.setattr(logger, "level", logger.level)
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(of_jax, name, getattr(of_jax, name))
    root.setLevel(logging.CRITICAL)  # as absl's verbosity does
    launch.show_warnings_of_jax()
    logging.getLogger("jax._src.xla_bridge").warning("A GPU may be present")
    assert capsys.readouterr().err == "warning: A GPU may be present\n"


@pytest.mark.slow
@pytest.mark.parametrize("output", ["/dev/full", "closed", "a pipe to head"])
def test_training_goes_on_without_its_output(output, tmp_path):
    command = [sys.executable, "-m", "experiments.lenet", "--workdir=run", "--smoke"]
    command += ["--model=mlp:widths=8"]
    to = {"/dev/full": "> /dev/full", "closed": ">&-", "a pipe to head": "| head -1"}
    shell = f"set -o pipefail; {shlex.join(command)} {to[output]}"
    ran = subprocess.run(
        ["bash", "-c", shell],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert run_lib.load(tmp_path / "run").results["test_accuracy"] > 0


@pytest.mark.slow
def test_help_is_no_failure_and_a_device_that_is_not_there_is_named(
    tmp_path, monkeypatch
):
    assert lenet("--help", cwd=tmp_path).returncode == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    ran = lenet("--workdir=run", "--smoke", cwd=tmp_path)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "JAX_PLATFORMS='cuda', and JAX has no such device here; unset" in ran.stderr
    assert not any(tmp_path.iterdir())


TIMES = ("seconds", "examples_per_second", "compile_seconds")


def assert_same_run(a, b):
    """Two folders hold the same run, bit for bit, but for the times that it took."""

    def without_times(values):
        return {name: value for name, value in values.items() if name not in TIMES}

    a, b = run_lib.load(a), run_lib.load(b)
    chex.assert_trees_all_equal(a.variables, b.variables)
    assert list(map(without_times, a.metrics)) == list(map(without_times, b.metrics))
    assert without_times(a.results) == without_times(b.results)


# Four epochs of 100 steps.
RUN = ("--dataset=sample", "--model=mlp:widths=16", "--epochs=4", "--batch_size=60")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that was never stopped, nor wrote a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    ran = lenet("--workdir=run", *RUN, "--checkpoint_every=never", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert not (folder / "run" / "checkpoints").exists()
    return folder / "run"


def wait_for(process, condition):
    """Wait until a condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.005)


@pytest.mark.slow
def test_run_that_is_told_to_stop_ends_in_a_line_and_goes_on(tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    arguments = ("--workdir=run", *RUN, "--checkpoint_every=2epochs")
    stops = []
    for number, signum in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        process = start(*arguments, cwd=tmp_path)

        def has_epoch(number=number):
            path = workdir / "metrics.jsonl"
            return path.exists() and path.read_text().count("\n") >= number

        wait_for(process, has_epoch)
        process.send_signal(signum)
        stopped = ended(process)
        assert stopped.returncode == 128 + signum
        said = r"stopped at step (\d+) of 400; the same command resumes from there\n"
        stops.append(int(re.fullmatch(said, stopped.stderr)[1]))
        assert steps_in(workdir)[-1] == stops[-1]
    assert 0 < stops[0] < stops[1] < 400
    assert f"resuming from step {stops[0]} of 400" in stopped.stdout
    finished = lenet(*arguments, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"resuming from step {stops[1]} of 400" in finished.stdout
    assert_same_run(workdir, uninterrupted)


NUM_KILLS = 20


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    tmp_path, uninterrupted
):
    rng = np.random.default_rng(0)
    workdir = tmp_path / "run"
    arguments = ("--workdir=run", *RUN, "--checkpoint_every=2steps")
    killed = killed_in_writing = 0
    for _ in range(NUM_KILLS):
        started = time.time()
        process = start(*arguments, cwd=tmp_path)

        def has_begun_a_checkpoint(since=started):
            with contextlib.suppress(FileNotFoundError):  # removed as we looked at it
                checkpoints = (workdir / "checkpoints").iterdir()
                return any(path.stat().st_mtime > since for path in checkpoints)
            return False

        wait_for(process, has_begun_a_checkpoint)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        killed += ended(process).returncode == -signal.SIGKILL
        halves = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        killed_in_writing += bool(halves)
    # Checkpoints are being written most of the time, so that the moments are of all
    # kinds; on a fast machine the last kills may have come after the end.
    assert killed >= NUM_KILLS // 2 and killed_in_writing >= 1
    if not (workdir / "results.json").exists():
        finished = lenet("--workdir=run", *RUN, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
    assert [row["epoch"] for row in results.read_metrics(workdir)] == [1, 2, 3, 4]
    assert_same_run(workdir, uninterrupted)


# From step 6 on no file can grow beyond a kilobyte, as if the disk were full.
FULL_DISK = """
import resource, runpy
from bn_jax.runs.files import Files

save = Files.save

def save_on_a_full_disk(files, progress):
    if len(progress.step_losses) == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
    save(files, progress)

Files.save = save_on_a_full_disk
runpy.run_module("experiments.lenet", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_full_disk_ends_in_a_line_and_with_room_the_run_goes_on(
    tmp_path, uninterrupted
):
    arguments = ("--workdir=run", *RUN, "--checkpoint_every=2steps")
    failed = lenet(*arguments, cwd=tmp_path, program=("-c", FULL_DISK))
    assert failed.returncode == 1
    message = f"error: cannot write {tmp_path}/run/checkpoints: "
    assert failed.stderr.count("error: ") == 1, failed.stderr
    assert any(line.startswith(message) for line in failed.stderr.splitlines())
    assert "Traceback" not in failed.stderr
    # Checkpoints are written in the background: the one before may have failed, too.
    went_on = lenet("--workdir=run", *RUN, cwd=tmp_path)
    assert re.search("resuming from step [24] of 400", went_on.stdout), went_on.stderr
    assert_same_run(tmp_path / "run", uninterrupted)
