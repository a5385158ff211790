"""SIGTERM and Ctrl-C: a wish to stop, heard at the next point where nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A run that was asked to stop, and can be resumed.

    Attributes:
      signum: number of the signal.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether the process was asked to stop; see `listening`."""

    signum: int | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note a first SIGTERM or SIGINT; a second one ends the process at once."""
    request = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        if request.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        request.signum = signum

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, which alone hears signals
        before = {}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
