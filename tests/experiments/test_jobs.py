"""Sweeps as jobs: of this machine, and of Slurm where it is installed."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from absl import app, flags

from bn_jax.fields import ConfigError
from bn_jax.runs import json_files
from experiments import jobs, launch, train

MEMBERS = (
    "--dataset=sample --train_examples=512 --epochs=2 --batch_size=128 "
    "--model=mlp:widths=8 --sweep=learning_rate=0.1,0.2;seed=0..2"
).split()


def test_launchers_are_read_and_checked():
    launcher = jobs.launcher_of("local:3")
    assert (launcher.num_parts, launcher.at_once) == (3, 3)
    launcher = jobs.launcher_of("local:3,array=40")
    assert (launcher.num_parts, launcher.at_once) == (40, 3)
    launcher = jobs.launcher_of("slurm:partition=gpu,array=7")
    assert (launcher.num_parts, launcher.at_once) == (7, None)
    for text, message in {
        "slrum": r"launcher='slrum'; expected one of local, slurm \(did you mean slurm",
        "local:0": "at_once=0; expected an integer at least 1",
        "slurm:partiton=a": r"no option 'partiton' \(did you mean partition",
        "slurm:array=many": "array=many; expected an integer at least 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            jobs.launcher_of(text)


def test_missing_submitit_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[launch\]'"):
        jobs.launcher_of("local:2")


def test_jobs_are_given_each_of_several_sweeps(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_multi_string("sweep", None, "", flag_values=values)
    flags.DEFINE_string("launcher", None, "", flag_values=values)
    flags.DEFINE_boolean("smoke", False, "", flag_values=values)
    given = ["--sweep=learning_rate=0.1,1.0", "--sweep=seed=0..1", "--smoke"]
    values(["train", *given, "--launcher=local:2"])
    monkeypatch.setattr(flags, "FLAGS", values)
    assert sorted(jobs.given_arguments()) == sorted(given)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts scripts in the place of Slurm's commands."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def test_jobs_in_the_queue_are_those_that_squeue_lists(commands, tmp_path):
    commands("squeue", "printf '12_0\\n12_10\\n13\\n'")
    asked = ["12_0", "12_1", "13", "14"]
    assert jobs._queued(asked, tmp_path) == {"12_0", "13"}
    commands("squeue", "exit 1")  # it does not answer: none may be submitted twice
    assert jobs._queued(asked, tmp_path) == set(asked)


def test_jobs_that_slurm_does_not_take_end_in_its_own_words(commands, command):
    commands("srun", "exit 0")
    commands("sbatch", "echo 'sbatch: error: invalid partition: gpu' >&2; exit 1")
    with pytest.raises(SystemExit) as ended:
        command("--workdir=a", *MEMBERS, "--launcher=slurm:partition=gpu,array=2")
    assert re.match(
        "error: jobs were not submitted: .*invalid partition: gpu; change the options",
        ended.value.code,
    )


def test_without_slurm_the_mend_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no srun on this machine; start the command"):
        jobs.slurm().executor(tmp_path)


@pytest.fixture
def command(in_process):
    return lambda *arguments: in_process(
        lambda: app.run(
            train.main, flags_parser=launch.flags_parser(train.define_flags)
        ),
        *arguments,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=1/2"], "--part=1/2 without --sweep; give the members"),
        (["--launcher=local:2"], "--launcher=local:2 without --sweep"),
        ([*MEMBERS, "--part=3/2"], "part='3/2'; expected K/N, part K of N"),
        ([*MEMBERS, "--part=0/2"], "part='0/2'; expected K/N"),
        ([*MEMBERS, "--part=7/7"], "7 parts of a sweep of 6 members; expected no more"),
        ([*MEMBERS, "--launcher=local:7"], "7 parts of a sweep of 6 members"),
        ([*MEMBERS, "--launcher=local:2", "--part=1/2"], "leave out one"),
        ([*MEMBERS, "--launcher=locl:2"], "expected one of local, slurm"),
    ],
)
def test_mistake_is_refused_before_anything_is_written(
    arguments, message, command, tmp_path
):
    with pytest.raises(SystemExit) as ended:
        command("--workdir=a", *arguments)
    assert re.match(f"error: .*{re.escape(message)}", ended.value.code)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["--launcher=local:2", "--part=1/2"])
def test_folder_of_something_else_is_refused_before_a_job_starts(
    how, command, tmp_path
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine\n")
    with pytest.raises(SystemExit) as ended:
        command("--workdir=a", *MEMBERS, how)
    assert "a holds notes.txt but no config.json" in ended.value.code
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_a_part_is_trained_by_hand_and_the_last_merges(command):
    few = [*MEMBERS[:-1], "--sweep=seed=0..1"]
    said = command("--workdir=run", *few, "--part=2/2")
    assert "1 part left to be trained: 1" in said
    said = command("--workdir=run", *few, "--part=1/2")
    assert "all parts are merged in run" in said
    rows = json_files.read_rows(Path("run/runs.jsonl"))
    assert [row["config"]["seed"] for row in rows] == [0, 1]
    assert "the same numbers" in command("--load=run")


class Sweeps:
    """Runs the command in processes of its own, all with one cache of programs."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PLATFORMS": "cpu",
        }

    def start(self, *arguments):
        command = [sys.executable, "-m", "experiments.train", *MEMBERS, *arguments]
        return subprocess.Popen(
            command,
            env=os.environ | self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def end(self, *arguments):
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    @property
    def expected(self):
        """The rows of the undivided sweep."""
        whole = self.folder / "whole"
        if not whole.exists():
            status, said = self.end(f"--workdir={whole}", "--devices=1")
            assert status == 0, said
        return (whole / "runs.jsonl").read_bytes()


@pytest.fixture
def sweep(tmp_path):
    return Sweeps(tmp_path)


def submitted(workdir):
    """The job of each part."""
    path = workdir / "parts" / "submitted.json"
    return json_files.read_object(path) if path.exists() else {}


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="children are read from /proc")
def test_killed_local_jobs_are_submitted_again_and_the_table_is_the_same(sweep):
    workdir = sweep.folder / "run"
    arguments = [f"--workdir={workdir}", "--devices=1", "--launcher=local:2,array=6"]
    process = sweep.start(*arguments)
    killed = set()
    while process.poll() is None:
        for part, job in submitted(workdir).items():
            doomed = part in ("2_of_6", "5_of_6") and part not in killed
            for child in children(job) if doomed else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed.add(part)
        time.sleep(0.05)
    said, _ = process.communicate()
    assert process.returncode == 1, said
    assert re.search(
        r"error: 2 of 6 jobs ended before .* \(2, 5\); the same comm", said
    )
    assert not (workdir / "runs.jsonl").exists()
    status, said = sweep.end(*arguments)
    assert status == 0, said
    assert "6 parts: 4 trained, 0 submitted before, 2 to submit" in said
    assert (workdir / "runs.jsonl").read_bytes() == sweep.expected


@pytest.mark.slow
def test_interrupted_command_ends_its_local_jobs(sweep):
    workdir = sweep.folder / "run"
    arguments = [f"--workdir={workdir}", "--devices=1", "--launcher=local:2,array=3"]
    process = sweep.start(*arguments)
    deadline = time.monotonic() + 60
    while not submitted(workdir) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped; the same command resumes each part" in said
    logs = workdir / "parts" / "logs"
    assert not jobs._running(submitted(workdir).values(), logs)
    status, said = sweep.end(*arguments)
    assert status == 0, said
    assert (workdir / "runs.jsonl").read_bytes() == sweep.expected


@pytest.fixture
def slurm(tmp_path, sweep):
    """Starts Slurm on this machine: Debian's slurm-wlm, as root."""
    daemons = [shutil.which(n) for n in ("munged", "slurmctld", "slurmd")]
    if not all(daemons) or os.geteuid() != 0:
        pytest.skip("needs Debian's package slurm-wlm, and root to start its daemons")
    host = socket.gethostname().partition(".")[0]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    configuration = f"""
        ClusterName=tests
        SlurmctldHost={host}(127.0.0.1)
        SlurmUser=root
        AuthType=auth/munge
        StateSaveLocation={tmp_path}/state
        SlurmdSpoolDir={tmp_path}/spool
        SlurmctldPidFile={tmp_path}/slurmctld.pid
        SlurmdPidFile={tmp_path}/slurmd.pid
        SlurmctldPort={ports[0]}
        SlurmdPort={ports[1]}
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        ReturnToService=2
        NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
        PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
    """
    path = tmp_path / "slurm.conf"
    path.write_text(textwrap.dedent(configuration))
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    sweep.environment["SLURM_CONF"] = str(path)
    environment = os.environ | sweep.environment

    def run(*command):
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        ).stdout

    with contextlib.ExitStack() as stack:
        socket_path = tmp_path / "munge.socket"
        with open(path, "a") as file:
            file.write(f"AuthInfo=socket={socket_path}\n")
        key = tmp_path / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munged = [daemons[0], "--foreground", "--force", f"--socket={socket_path}"]
        munged += [f"--key-file={key}", f"--pid-file={tmp_path}/munged.pid"]
        munged += [f"--log-file={tmp_path}/munged.log", f"--seed-file={tmp_path}/seed"]
        commands = [munged, [daemons[1], "-D"], [daemons[2], "-D"]]
        for command in commands:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in run("sinfo", "--noheader"):
            assert time.monotonic() < deadline, run("sinfo")
            time.sleep(0.5)
        yield run
        run("scancel", "--me")


@pytest.mark.slow
def test_slurm_array_is_killed_requeued_and_submitted_again(slurm, sweep):
    workdir = sweep.folder / "run"
    launcher = "--launcher=slurm:partition=all,array=4,at_once=2,cpus=1"
    arguments = [f"--workdir={workdir}", "--devices=1", launcher]
    process = sweep.start(*arguments)
    running = []
    while len(running) < 2 and process.poll() is None:
        listed = slurm("squeue", "-h", "-r", "-t", "running", "-o", "%i")
        running = listed.split()
        time.sleep(0.2)
    killed, requeued = sorted(running)
    slurm("scancel", killed)
    slurm("scontrol", "requeue", requeued)
    # The command may end; its jobs go on.
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, said
    assert "the jobs go on, and the same command waits for them" in said
    status, said = sweep.end(*arguments)
    assert status == 0, said
    assert re.search(r"4 parts: \d trained, \d submitted before, [1-4] to submit", said)
    assert (workdir / "runs.jsonl").read_bytes() == sweep.expected
