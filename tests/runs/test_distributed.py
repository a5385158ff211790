"""Several processes train as one, and none waits for ever for another."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import processes
from bn_jax.runs import distributed, json_files, results
from bn_jax.runs import run as run_lib
from bn_jax.runs.distributed import DistributedError
from bn_jax.training import feed
from marks import slow_but

ROOT = Path(__file__).parents[2]
# No program takes so long, on the slowest of machines; one that hangs is ended then.
SECONDS = 120
CONFIG = {"epochs": 2, "batch_size": 16, "learning_rate": 0.1}  # 10 steps an epoch


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_data):
    """A folder with the data set, and with what all processes have compiled."""
    folder = tmp_path_factory.mktemp("processes")
    np.savez(
        folder / "data.npz",
        train_images=tiny_data.train.images,
        train_labels=tiny_data.train.labels,
        test_images=tiny_data.test.images,
        test_labels=tiny_data.test.labels,
    )
    return folder


class Process:
    """A process of a test, what it says, and how it ends."""

    def __init__(self, command, output, environment):
        self._output = output
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
        with output.open("w") as out:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def said(self):
        return self._output.read_text()

    def end(self, seconds=SECONDS):
        """Wait for the end, and return status and output."""
        try:
            return self.popen.wait(seconds), self.said()
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end in {seconds} seconds; it has said: {self.said()}")

    def wait_for(self, words, seconds=SECONDS):
        """Wait until it has said some words."""
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert self.popen.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


@pytest.fixture
def start(folder, tmp_path):
    """Start processes; those that are left are killed when the test ends."""
    with contextlib.ExitStack() as stack:
        outputs = iter(range(1000))

        def start_command(command, **environment):
            output = tmp_path / f"output{next(outputs)}"
            process = Process(command, output, environment)
            stack.callback(process.popen.wait)
            stack.callback(process.popen.kill)
            return process

        def start_program(program, *, environment=None, **arguments):
            job = {"program": program, "cache": str(folder / "compiled"), **arguments}
            command = [sys.executable, processes.__file__, json.dumps(job)]
            return start_command(command, **(environment or {}))

        start_program.command = start_command
        yield start_program


@pytest.fixture
def start_pair(start):
    """Start a program in two processes of two devices each."""

    def start_pair(program, *, of_process=lambda index: {}, **arguments):
        arguments |= {"address": f"127.0.0.1:{free_port()}", "count": 2}
        return [start(program, index=i, **arguments, **of_process(i)) for i in (0, 1)]

    return start_pair


def assert_both_end_well(pair):
    for process in pair:
        status, said = process.end()
        assert status == 0, said


# Two processes of two devices are one of four.

RUNS = {
    f"{batch_stats} {program} {'streamed' if stream else 'stored'}": {
        "config": {**CONFIG, "batch_stats": batch_stats},
        "program": program,
        "stream": stream,
    }
    for batch_stats, program, stream in (
        ("synced", "pmap", False),
        ("synced", "jit", True),
        ("per_device", "pmap", True),
        ("groups:2", "pmap", False),
        ("groups:2", "jit", False),
    )
}


@pytest.fixture
def trained(folder, start_pair):
    """Gives what two processes have written of a run; each runs once for this file."""
    outs = [folder / f"out{index}" for index in (0, 1)]

    def trained(name):
        written = [Path(f"{out}.{name}.npz") for out in outs]
        if not all(path.exists() for path in written):
            pair = start_pair(
                "train_one",
                name=name,
                run=RUNS[name],
                data=str(folder / "data.npz"),
                of_process=lambda index: {"out": str(outs[index])},
            )
            assert_both_end_well(pair)
        return [dict(np.load(path)) for path in written]

    return trained


@pytest.mark.parametrize("name", slow_but(["synced pmap stored"], RUNS))
def test_two_processes_train_as_one(name, trained, folder):
    data = processes.load_data(folder / "data.npz")
    expected = processes.numbers(data, devices="4", **RUNS[name])
    assert len(expected["losses"]) == 20
    of_processes = trained(name)
    for found in of_processes:
        found = {key: value for key, value in found.items() if key != "rows"}
        assert found.keys() == expected.keys()
        for key in expected:
            chex.assert_equal_shape([found[key], expected[key]])
            np.testing.assert_allclose(
                found[key], expected[key], atol=1e-5, err_msg=key
            )
    chex.assert_trees_all_equal(*({**found, "rows": 0} for found in of_processes))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_processes_measure_a_data_set_that_they_share_out(axes, folder, start_pair):
    pair = start_pair("measure", data=str(folder / "data.npz"), axes=axes)
    assert_both_end_well(pair)
    assert all("measured as by one process" in p.said() for p in pair)


@pytest.mark.slow
def test_ways_to_share_statistics_differ_across_processes_too(trained):
    losses = [trained(name)[0]["losses"] for name in RUNS]
    apart = [
        np.abs(losses[i] - losses[j]).max() > 1e-4
        for i, j in ((0, 2), (0, 3), (2, 3), (0, 4))
    ]
    assert all(apart)
    means = trained("per_device pmap streamed")[0]["batch_stats/norm1/mean"]
    assert len(np.unique(means.round(4), axis=0)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name]["stream"]])
def test_process_reads_its_own_columns_alone(name, trained, tiny_data):
    _, key = jax.random.split(jax.random.key(0))
    order = feed.Order(key, num_examples=170, batch_size=16)
    expected = np.concatenate([order.of_epoch(epoch) for epoch in (0, 1)])
    for index, found in enumerate(trained(name)):
        # Calls of 10 steps, an epoch, and 10 more of padding that are not taken.
        chex.assert_shape(found["rows"], (2, 20, 8))
        taken = found["rows"][:, :10].reshape(20, 8)
        # Grain's threads may have been in another order.
        if not np.array_equal(taken[0], expected[0, 8 * index : 8 * (index + 1)]):
            taken = np.concatenate([taken[10:], taken[:10]])
        np.testing.assert_array_equal(taken, expected[:, 8 * index : 8 * (index + 1)])
        padding = found["rows"][:, 10:]
        assert np.isin(padding, taken).all()


# Process 0 writes, and all stop together.


@pytest.mark.slow
def test_processes_write_once_stop_together_and_go_on_bit_for_bit(
    folder, tmp_path, start_pair
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    absent = [tmp_path / "absent" / name for name in ("whole", "stopped")]

    def workdirs(index):
        return [str(whole), str(stopped)] if index == 0 else [str(w) for w in absent]

    options = {"data": str(folder / "data.npz"), "config": CONFIG}
    # Steps are taken up to 4, 8, 10, 12, ...; 10 is an epoch's end, without a
    # checkpoint of its own. Process 1 alone receives SIGTERM.
    pair = start_pair(
        "train_into",
        **options,
        of_process=lambda index: {
            "workdirs": workdirs(index),
            **({"kill_at": 10} if index == 1 else {}),
        },
    )
    assert_both_end_well(pair)
    for process in pair:
        assert "stopped at step 10 of 20; the same command resumes" in process.said()
    steps = {p.name for p in (stopped / "checkpoints").iterdir() if p.name.isdigit()}
    assert "10" in steps and "12" not in steps
    assert not (stopped / "results.json").exists()

    pair = start_pair(
        "train_into",
        **options,
        of_process=lambda index: {"workdirs": workdirs(index)[1:]},
    )
    assert_both_end_well(pair)
    assert "resuming from step 10 of 20" in pair[0].said()
    assert without_times(whole) == without_times(stopped)
    (summary,), history = without_times(whole)
    assert (summary["num_devices"], summary["num_processes"]) == (4, 2)
    assert len(history) == 2
    last = [final_arrays(w / "checkpoints") for w in (whole, stopped)]
    chex.assert_trees_all_equal(*last)
    assert len(last[0]["step_losses"]) == 20
    assert not (tmp_path / "absent").exists()


def without_times(workdir):
    """A run's results and epochs, but for the times that they took."""
    times = {"seconds", "examples_per_second", "compile_seconds"}
    summary = json_files.read_json(workdir / "results.json")
    return tuple(
        [{name: row[name] for name in row.keys() - times} for row in rows]
        for rows in ([summary], results.read_metrics(workdir))
    )


def final_arrays(checkpoints):
    """The arrays of a finished run's last checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((checkpoints / "20" / "arrays").absolute())


# None waits for ever.


@pytest.mark.slow
def test_process_that_never_comes_is_named(start):
    """Process 0 of 2 is missing; and 2 of 3, for two that are there."""
    alone, trio = (f"127.0.0.1:{free_port()}" for _ in range(2))
    started = time.monotonic()
    options = {"program": "meet", "start_seconds": 3}
    waiting = [
        start(**options, address=alone, count=2, index=1),
        start(**options, address=trio, count=3, index=0),
        start(**options, address=trio, count=3, index=1),
    ]
    missing = [("0 of 2", alone), ("2 of 3", trio), ("2 of 3", trio)]
    for process, (which, address) in zip(waiting, missing, strict=True):
        status, said = process.end(40)
        assert status == 1
        assert f"error: process {which}" in said
        assert f"has not come to {address} within 3 seconds; start all of them" in said
        assert "Traceback" not in said
    assert time.monotonic() - started < 30  # the start of Python included


@pytest.fixture
def start_training(tmp_path, start):
    """Starts the command in two processes, into one folder."""

    def start_training(epochs):
        command = [sys.executable, "-m", "experiments.train", "--dataset=sample"]
        command += ["--model=mlp:widths=8", "--batch_size=600", "--devices=2"]
        command += [f"--epochs={epochs}", f"--workdir={tmp_path / 'run'}"]
        address = f"127.0.0.1:{free_port()}"
        command += ["--num_processes=2", f"--coordinator_address={address}"]
        return [start.command([*command, f"--process_id={i}"]) for i in (0, 1)]

    return start_training


def assert_ended_in_a_line(said):
    for dump in ("Traceback", "Fatal", "***", "coordination_service"):
        assert dump not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_others_in_a_line(killed, start_training):
    pair = start_training(epochs=10_000)
    pair[0].wait_for("epoch     3/")
    pair[killed].popen.kill()
    started = time.monotonic()
    status, said = pair[1 - killed].end(60)
    assert time.monotonic() - started < distributed.DEATH_SECONDS + 20
    assert status == 1
    assert "error: another process has ended before the run was over" in said
    assert "the same command, started anew on all, resumes from" in said
    assert_ended_in_a_line(said)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_process_killed_when_the_results_are_whole_is_no_matter(
    killed, start_training, tmp_path
):
    pair = start_training(epochs=1)
    while not (tmp_path / "run" / "results.json").exists():
        assert pair[0].popen.poll() is None, pair[0].said()
        time.sleep(0.001)
    pair[killed].popen.kill()
    status, said = pair[1 - killed].end(60)
    assert status == 0, said
    assert_ended_in_a_line(said)
    assert run_lib.load(tmp_path / "run").metrics[-1]["epoch"] == 1


def test_abort_for_another_reason_shows_what_was_said(start):
    program = """
        import os
        from bn_jax.runs import distributed
        distributed.end_in_a_line_with_others(lambda: False)
        os.write(2, b"the runtime's own words")
        os.abort()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    status, said = start.command(command).end()
    assert status == -signal.SIGABRT
    assert said == "the runtime's own words"


def test_warnings_of_the_runtime_are_shown_at_the_end(start):
    program = """
        import os
        from bn_jax.runs import distributed
        distributed.end_in_a_line_with_others(lambda: True)
        os.write(2, b"a warning of the runtime")
        print("done", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    status, said = start.command(command).end()
    assert (status, said) == (0, "done\na warning of the runtime")


@pytest.mark.slow
def test_error_on_process_0_alone_ends_the_others(tmp_path, start):
    occupied = tmp_path / "file"
    occupied.write_text("no folder\n")
    port = free_port()
    command = [sys.executable, "-m", "experiments.lenet", "--dataset=sample"]
    command += ["--epochs=1", "--devices=4", "--num_processes=2"]
    command += [f"--coordinator_address=127.0.0.1:{port}"]
    pair = [
        start.command([*command, f"--process_id={index}", f"--workdir={workdir}"])
        for index, workdir in enumerate((occupied, tmp_path / "absent"))
    ]
    (status0, said0), (status1, said1) = (process.end() for process in pair)
    assert (status0, status1) == (1, 1), said0 + said1
    assert "error: " in said0 and str(occupied) in said0
    assert "error: process 0 has stopped with an error; see its message" in said1
    assert "Traceback" not in said0 + said1
    assert not (tmp_path / "absent").exists()
    assert occupied.read_text() == "no folder\n"


DIFFERENT = {
    "rate": ({"learning_rate": 0.2}, "learning_rate: 0.1 on process 0, 0.2 on process"),
    "epochs": ({"epochs": 3}, "epochs: 2 on process 0, 3 on process 1"),
    "data": ({}, r"images and labels: \[.*\] on process 0, \[.*\] on process 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_differ_end_before_the_first_step(
    what, folder, tmp_path, start_pair
):
    changes, message = DIFFERENT[what]
    other = tmp_path / "other.npz"
    arrays = dict(np.load(folder / "data.npz"))
    arrays["train_images"][5, 5, 5] ^= 1
    np.savez(other, **arrays)
    data = [folder / "data.npz", other if what == "data" else folder / "data.npz"]
    pair = start_pair(
        "train_into",
        of_process=lambda index: {
            "workdirs": [str(tmp_path / f"run{index}")],
            "data": str(data[index]),
            "config": {**CONFIG, **(changes if index == 1 else {})},
        },
    )
    for process in pair:
        status, said = process.end()
        assert status != 0
        assert re.search(rf"processes differ \({message}", said), said
    assert not list(tmp_path.glob("run*"))


# Meeting.


def meet_in_threads(port, indices, *, count, seconds):
    """What `_meet` says to processes that come at the same time, by number."""
    outcomes = {}

    def meet(index):
        try:
            distributed._meet(f"127.0.0.1:{port}", count, index, seconds=seconds)
            outcomes[index] = "met"
        except DistributedError as error:
            outcomes[index] = str(error)

    threads = [threading.Thread(target=meet, args=(i,), daemon=True) for i in indices]
    for thread in threads:
        thread.start()
    return outcomes, threads


def join_all(threads, seconds):
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
        assert not thread.is_alive()


def knock(port, seconds=10):
    """A connection to whoever listens, as soon as it does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\n", b"\xff\xfe\n", b"7\n", b"1" * 4000, b"1"],
)
def test_something_else_that_knocks_does_not_stop_the_meeting(words):
    port = free_port()
    outcomes, first = meet_in_threads(port, [0], count=3, seconds=30)
    # It says something and stays, or says something and is gone.
    with knock(port) as stranger, knock(port) as hasty:
        stranger.sendall(words)
        with contextlib.suppress(OSError):
            hasty.sendall(words)
            hasty.setsockopt(  # it resets the connection
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
            hasty.close()
        started = time.monotonic()
        others, rest = meet_in_threads(port, [1, 2], count=3, seconds=30)
        join_all(first + rest, 10)
        assert time.monotonic() - started < 5
    assert {**outcomes, **others} == {0: "met", 1: "met", 2: "met"}


def test_process_that_starts_again_before_the_meeting_is_counted_once():
    port = free_port()
    outcomes, first = meet_in_threads(port, [0], count=3, seconds=2)
    with knock(port) as died:
        died.sendall(b"1\n")
        time.sleep(0.2)
    join_all(first, 10)
    assert "process 1, 2 of 3 has not come" in outcomes[0]


def test_something_else_at_the_address_is_not_taken_for_process_0():
    def answer(server):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        outcomes, threads = meet_in_threads(port, [1], count=2, seconds=1)
        join_all(threads, 10)
        server.shutdown(socket.SHUT_RDWR)
    assert "process 0 of 2 has not come" in outcomes[1]


def test_two_processes_of_one_number_end_the_meeting_at_once():
    port = free_port()
    started = time.monotonic()
    outcomes, first = meet_in_threads(port, [0, 1], count=3, seconds=30)
    others, rest = meet_in_threads(port, [1], count=3, seconds=30)
    join_all(first + rest, 10)
    assert time.monotonic() - started < 5
    message = "two processes have come with process_id=1; give each its own, from"
    for said in (outcomes[0], others[1], outcomes[1]):
        assert message in said


def test_process_0_says_that_its_port_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        message = f"process 0 cannot listen on port {port}: .*; give another port"
        with pytest.raises(DistributedError, match=message):
            distributed._meet(f"127.0.0.1:{port}", 2, 0, seconds=1)


ADDRESS = "10.0.0.1:1234"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ADDRESS, 2, None), "num_processes=2, process_id=None; give all three"),
        ((ADDRESS, None, 0), "num_processes=None, process_id=0; give all three"),
        ((ADDRESS, 2, 2), "process_id=2 of 2 processes; expected 0 to 1"),
        ((ADDRESS, 2, -1), "process_id=-1 of 2 processes; expected 0 to 1"),
        (("10.0.0.1", 2, 0), "coordinator_address='10.0.0.1'; expected HOST:PORT"),
        ((":1234", 2, 0), "coordinator_address=':1234'; expected HOST:PORT"),
        (("host:port", 2, 0), "coordinator_address='host:port'; expected HOST:PORT"),
        (("host:0", 2, 0), "coordinator_address='host:0'; .*a port from 1 to 65535"),
        (("host:99999", 2, 1), "coordinator_address='host:99999'; .*1 to 65535"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DistributedError, match=message):
        distributed.initialize(*arguments)


# Processes that something else has started.


@pytest.mark.parametrize(
    ("environment", "detected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "5"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        # In a batch script, outside of srun: many tasks, but this is none of them.
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}, False),
        ({"JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": ""}, False),
    ],
)
def test_processes_of_a_cluster_are_detected(environment, detected):
    assert distributed.is_detected(environment) is detected


@pytest.mark.parametrize("tasks", ["", "x", "-1", "2.5"])
def test_number_of_tasks_that_is_none_is_refused(tasks):
    with pytest.raises(DistributedError, match=f"SLURM_STEP_NUM_TASKS='{tasks}' in"):
        distributed.is_detected({"SLURM_STEP_NUM_TASKS": tasks})


def is_free(job):
    """Whether the port that JAX takes from the number of a Slurm job is free."""
    try:
        socket.create_server(("", job + 2**16 - 2**12)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_processes_that_slurm_has_started_find_each_other(start):
    job = next(job for job in range(os.getpid() % 4000, 2**12) if is_free(job))
    of_job = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    pair = [
        start("meet", environment={**of_job, "SLURM_PROCID": i, "SLURM_LOCALID": i})
        for i in "01"
    ]
    for index, process in enumerate(pair):
        status, said = process.end()
        assert status == 0, said
        assert f"process {index} of 2, 2 of 4 devices, True, from 0" in said


# The file alone: the package takes seconds to import.
JOIN = f"""
import runpy
distributed = runpy.run_path({distributed.__file__!r})
try:
    distributed["initialize"]()
except distributed["DistributedError"] as error:
    print(error)
"""


def test_cluster_that_there_is_not_is_named_in_a_line(start):
    status, said = start.command([sys.executable, "-c", JOIN]).end()
    assert status == 0, said
    assert said.startswith("JAX does not find out what processes to join (")
    way_out = "give coordinator_address, num_processes and process_id\n"
    assert said.endswith(way_out) and said.count("\n") == 1


# One process is all of them.


def test_one_process_asks_nobody():
    assert jax.process_count() == 1
    assert distributed.is_primary()
    assert distributed.any_process(True) and not distributed.any_process(False)
    assert distributed.on_primary(lambda: b"answer") == b"answer"
    with pytest.raises(KeyError, match="itself"):
        distributed.on_primary(lambda: {}["itself"])
