"""How much memory there is, and what is free but still with the process."""

from __future__ import annotations

import ctypes
import math
import os
import sys

import jax


def total() -> float:
    """Return the bytes of memory of a device; infinity where that is not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        known = device.memory_stats() or {}
        return float(known.get("bytes_limit", math.inf))
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # as on Windows
        return math.inf


def return_freed() -> None:
    """Give the system back what this process has freed, where the C library can.

    glibc keeps it for the next allocation. Compiling the main job leaves 200 MB of it
    in small pieces, which its large arrays, mapped apart, cannot use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
