import os
import signal
import subprocess
import sys
import threading

import pytest

from bn_jax.runs import interrupt

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("signum", SIGNALS)
def test_first_signal_is_noted_and_afterwards_handlers_are_as_before(signum):
    before = [signal.getsignal(each) for each in SIGNALS]
    with interrupt.listening() as request:
        assert request.signum is None
        os.kill(os.getpid(), signum)
        assert request.signum == signum
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_each_time_of_listening_begins_without_a_request():
    with interrupt.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    with interrupt.listening() as request:
        assert request.signum is None


@pytest.mark.parametrize(
    ("first", "second"),
    [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2, SIGNALS[1:] * 2],
)
def test_second_signal_ends_the_process_at_once(first, second):
    # The file alone: the package takes seconds to import.
    program = f"""
import os, runpy
listening = runpy.run_path({interrupt.__file__!r})["listening"]
with listening():
    os.kill(os.getpid(), {int(first)})
    print("goes on", flush=True)
    os.kill(os.getpid(), {int(second)})
    print("still goes on", flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ran.returncode == -second
    assert (ran.stdout, ran.stderr) == (b"goes on\n", b"")


def test_another_thread_than_the_main_one_trains_without_listening():
    before = [signal.getsignal(each) for each in SIGNALS]
    during = []

    def listen():
        with interrupt.listening() as request:
            during.append(request.signum)
            during.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert during == [None, *before]
