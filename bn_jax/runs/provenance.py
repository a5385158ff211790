"""What numbers depend on beside a run's config: versions, processor, device, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bn_jax.version import __version__

START = "start"  # in environment.json: the checksum of what `init_from` held

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of this program, of Python and of packages."""
    return {
        "bn_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def environment() -> dict[str, Any]:
    """Return the versions, processor, device and commit that numbers depend on."""
    device = jax.devices()[0]
    return {
        **versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_instructions": _cpu_instructions(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _cpu_instructions() -> list[str]:
    """Return the sets of vector instructions, whose widths decide how sums round.

    They are those beyond what numpy was compiled for, which leaves out what is empty.
    """
    extensions = np.show_config(mode="dicts").get("SIMD Extensions", {})
    found: list[str] = extensions.get("found", [])
    return found


def _commit() -> str | None:
    """Return the checkout's commit, with "+changes" where files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # installed inside a repository that is not ours
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
