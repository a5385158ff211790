import ctypes
import platform
from pathlib import Path

import pytest

from bn_jax.training import memory


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_returned():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 100_000  # too small for a mapping of its own
    pieces = [libc.malloc(size) for _ in range(1000)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[:-1]:  # the last keeps the heap from shrinking by itself
        libc.free(piece)
    before = resident_bytes()
    memory.return_freed()
    after = resident_bytes()
    libc.free(pieces[-1])
    assert after < before - 50 * size


def test_other_systems_do_without(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "win32")
    loaded = []
    monkeypatch.setattr(memory.ctypes, "CDLL", loaded.append)
    memory.return_freed()
    assert not loaded
