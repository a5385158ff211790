"""Training by several processes, on one machine or many, joined by JAX's runtime.

Each process runs the same program on its own devices. Process 0, the primary, alone
reads and writes the run's folder; the others learn from it what they need.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What JAX's runtime, and the libraries by which it connects processes, say of one that
# has died.
_OF_A_DEATH = (
    b"another task died",
    b"stopped sending heartbeats",
    b"heartbeat timeout",
    b"Connection closed by peer",
    b"Connection reset by peer",
    b"Socket closed",
    b"Broken pipe",
)
_KEPT_ALIVE: list[Any] = []  # the handler that C calls, and the file it reads

# How long processes wait for one another at the start, and until they give up one
# that has died.
START_SECONDS = 120
DEATH_SECONDS = 30


class DistributedError(RuntimeError):
    """Processes that did not come together."""


def num_tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes Slurm has started; 1 without it.

    Raises:
      DistributedError: if Slurm's variable is not a number.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not re.fullmatch(r"[0-9]{1,9}", tasks):
        raise DistributedError(
            f"SLURM_STEP_NUM_TASKS={tasks!r} in the environment; expected the number "
            "that Slurm writes there: start the program by srun, or unset it"
        )
    return max(1, int(tasks))


def is_detected(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether Slurm, Kubernetes or a TPU pod has started several processes.

    Raises:
      DistributedError: as `num_tasks`.
    """
    tpu_hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slurms = num_tasks(environment) > 1
    return slurms or "JOB_COMPLETION_INDEX" in environment or len(tpu_hosts) > 1


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = START_SECONDS,
    death_seconds: int = DEATH_SECONDS,
) -> None:
    """Join the processes; call it before JAX is used.

    Without arguments, JAX finds them out where `is_detected`.

    Args:
      coordinator_address: "host:port" at which process 0 can be reached.
      num_processes: of the run.
      process_id: of this process, from 0.
      start_seconds: how long to wait for the others.
      death_seconds: after which a process that has died ends the others.

    Raises:
      DistributedError: if processes have not come in time, naming them; or if JAX does
        not find them out.
    """
    if coordinator_address is not None:
        if num_processes is None or process_id is None:
            raise DistributedError(
                f"coordinator_address={coordinator_address!r}, num_processes="
                f"{num_processes}, process_id={process_id}; give all three"
            )
        if not 0 <= process_id < num_processes:
            raise DistributedError(
                f"process_id={process_id} of {num_processes} processes; expected 0 to "
                f"{num_processes - 1}"
            )
        _meet(coordinator_address, num_processes, process_id, seconds=start_seconds)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=death_seconds,
            shutdown_timeout_seconds=death_seconds,
        )
    except ValueError as error:
        raise DistributedError(
            f"JAX does not find out what processes to join ({error}); give "
            "coordinator_address, num_processes and process_id"
        ) from error


def _meet(address: str, num_processes: int, process_id: int, *, seconds: int) -> None:
    """Wait until all processes are there, and say which are not.

    JAX's own start ends without a word of who is missing. Process 0 listens where the
    coordinator will, takes the others' numbers, and tells all of them who has not come.
    """
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"coordinator_address={address!r}; expected HOST:PORT, as in "
            "10.0.0.1:1234, with a port from 1 to 65535"
        )
    deadline = time.monotonic() + seconds
    if process_id == 0:
        missing, twice = _receive_numbers(int(port), num_processes, deadline)
    else:
        missing, twice = _send_number(host, int(port), process_id, deadline)
    if twice:
        raise DistributedError(
            f"two processes have come with process_id={twice[0]}; give each its own, "
            f"from 0 to {num_processes - 1}"
        )
    if missing:
        raise DistributedError(
            f"process {', '.join(map(str, missing))} of {num_processes} has not come "
            f"to {address} within {seconds} seconds; start all of them with the same "
            "coordinator_address and num_processes, and each with its process_id"
        )


def _receive_numbers(
    port: int, num_processes: int, deadline: float
) -> tuple[list[int], list[int]]:
    """Return the processes that have not come, and those that have come twice.

    Those that have come are told.
    """
    try:
        server = socket.create_server(("", port), backlog=num_processes)
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on port {port}: {error.strerror}; give another "
            "port in coordinator_address, or another process_id where process 0 "
            "has been started already"
        ) from error
    lines: dict[socket.socket, bytes] = {}  # what each that has knocked has said
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(stack.enter_context(server), selectors.EVENT_READ)
        while True:
            numbers = [int(line) for line in lines.values() if line.endswith(b"\n")]
            missing = [i for i in range(1, num_processes) if i not in numbers]
            twice = [i for i in range(1, num_processes) if numbers.count(i) > 1]
            seconds = deadline - time.monotonic()
            if not missing or twice or seconds <= 0:
                break
            for key, _ in selector.select(seconds):
                if key.fileobj is server:
                    connection = stack.enter_context(server.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    lines[connection] = b""
                    continue
                connection = cast(socket.socket, key.fileobj)
                received = b""
                with contextlib.suppress(OSError):
                    received = connection.recv(16)
                lines[connection] += received
                # It has gone, or is something else.
                if not received or not re.fullmatch(rb"\d{1,9}\n?", lines[connection]):
                    del lines[connection]
                    selector.unregister(connection)
                    connection.close()
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps([missing, twice]).encode() + b"\n")
    return missing, twice


def _send_number(
    host: str, port: int, process_id: int, deadline: float
) -> tuple[list[int], list[int]]:
    """Send this process's number to process 0, and return its answer.

    Returns:
      The processes that have not come, and those that have come twice.
    """
    while time.monotonic() < deadline:
        # What answers may be something else.
        with contextlib.suppress(OSError, ValueError):
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"{process_id}\n".encode())
                connection.settimeout(max(0.01, deadline - time.monotonic()) + 5)
                answer = json.loads(connection.makefile().readline())
                if isinstance(answer, list) and list(map(type, answer)) == [list] * 2:
                    return answer[0], answer[1]
        time.sleep(0.2)
    return [0], []


def end_in_a_line_with_others(is_whole: Callable[[], bool]) -> None:
    """End this process in a line, not in a dump, when another one has died.

    JAX's runtime then writes to file descriptor 2 and aborts. What it writes goes to a
    file instead, which is shown when this process ends, unless it says that another one
    died; the abort then ends with a status of ours. Python's standard error stays as it
    is.

    Args:
      is_whole: whether the run's results are written; the status is then 0.
    """
    sys.stderr.flush()
    log = tempfile.TemporaryFile()
    kept = os.dup(2)
    sys.stderr = open(kept, "w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(log.fileno(), 2)

    def said() -> bytes:
        return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)

    def tells_of_a_death() -> bool:
        return any(words in said() for words in _OF_A_DEATH)

    def end(signum: int) -> None:
        del signum
        if tells_of_a_death():
            os.write(kept, f"{told_of_a_death(is_whole())}\n".encode())
            os._exit(0 if is_whole() else 1)
        os.write(kept, said())

    def show() -> None:
        if not tells_of_a_death():
            os.write(kept, said())

    atexit.register(show)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _KEPT_ALIVE.append((handler, log))
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def is_of_a_death(error: BaseException) -> bool:
    """Return whether JAX's error is that of a lost connection to another process."""
    said = str(error).encode()
    return jax.process_count() > 1 and any(words in said for words in _OF_A_DEATH)


def told_of_a_death(is_whole: bool) -> str:
    """Return the line that reports the death of another process."""
    if is_whole:
        return "note: another process has ended early; the results had been written"
    return (
        "error: another process has ended before the run was over, see what it said; "
        "the same command, started anew on all, resumes from the last checkpoint"
    )


def end_with_others(is_whole: bool) -> NoReturn:
    """End this process at once, in a line, as another one has died."""
    sys.stdout.flush()
    print(told_of_a_death(is_whole), file=sys.stderr, flush=True)
    os._exit(0 if is_whole else 1)


def leave() -> None:
    """Leave the others at the end of a run, also where one of them has died by then."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    try:
        jax.distributed.shutdown()
    except RuntimeError:
        end_with_others(is_whole=True)


def is_primary() -> bool:
    """Return whether this process is the one that reads and writes files."""
    return jax.process_index() == 0


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on where processes differ; all of them must ask.

    Args:
      values: what is to be the same, as JSON values.

    Raises:
      DistributedError: on all of them, naming what differs.
    """
    if jax.process_count() == 1:
        return
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        # No array can be gathered then; but all of them know.
        counts = ", ".join(f"{devices[i]} on process {i}" for i in sorted(devices))
        raise DistributedError(
            f"processes have unlike numbers of devices: {counts}; give them as many"
        )
    own = json.dumps(values, sort_keys=True).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    texts = np.asarray(multihost_utils.process_allgather(padded))
    first, *others = [
        json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)
    ]
    faults = [
        f"{name}: {first.get(name)!r} on process 0, {other.get(name)!r} on process {i}"
        for i, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if faults:
        raise DistributedError(
            f"processes differ ({'; '.join(faults)}); start all of them with the same "
            "command, but for process_id, on the same versions and data"
        )


def any_process(flag: bool) -> bool:
    """Return whether `flag` is true on any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def on_primary(function: Callable[[], bytes]) -> bytes:
    """Call `function` on the primary, and send its result to all processes.

    Raises:
      DistributedError: on the others, if it raised there.
    """
    if jax.process_count() == 1:
        return function()
    answer, error = b"", None
    if is_primary():
        try:
            answer = function()
        except Exception as raised:
            error = raised
    size = -1 if error else len(answer)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(size)))
    if error is not None:
        raise error
    if size < 0:
        raise DistributedError("process 0 has stopped with an error; see its message")
    if not size:
        return b""
    own = np.frombuffer(answer, np.uint8) if is_primary() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own)))
