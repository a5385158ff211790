"""Memory that is free, but still with the process."""

from __future__ import annotations

import ctypes
import sys


def return_freed() -> None:
    """Give the system back what this process has freed, where the C library can.

    glibc keeps it for the next allocation. Compiling the main job leaves 200 MB of it
    in small pieces, which its large arrays, mapped apart, cannot use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
