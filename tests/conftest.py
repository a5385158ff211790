"""Gives every test 8 CPU devices, and single tests float64 or a tiny run.

Most of the time of these tests is XLA's compiler's. Unless XLA_FLAGS is set, be it to
nothing, they ask it for plain code, which it makes in a third of the time; `.ci/run
--all` runs them with the code that users get, too.

On a GPU or TPU they run by `JAX_PLATFORMS=cuda,cpu XLA_FLAGS= pytest`: what asks for no
device runs there, what is spread over 8 devices on the CPU. Products of models are then
of float32, as they are on a CPU; what our own promises rest on asks for that itself
(see test_precision.py).
"""

import dataclasses
import gc
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax
import numpy as np
import pytest

from bn_jax import data as data_lib
from bn_jax.training import loop, memory
from bn_jax.training.config import TrainConfig

# Tracing makes many small objects that live long. Looking for garbage among them takes
# seconds each time, so that it is left to the end of a file (see below).
gc.freeze()
gc.set_threshold(100_000, 50, 1_000_000)

QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

NUM_DEVICES = 8
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
if os.environ["JAX_PLATFORMS"] != "cpu":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share it
    jax.config.update("jax_default_matmul_precision", "highest")

# Many tests use the same programs; each is compiled once in a session, whose worker
# processes find the folder in the environment.
if "BN_JAX_TESTS_COMPILED" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="bn_jax-compiled-")
    os.environ["BN_JAX_TESTS_COMPILED"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["BN_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session", autouse=True)
def devices():
    """The 8 CPU devices: a test across devices never runs on one in silence."""
    devices = jax.devices("cpu")
    assert len(devices) == NUM_DEVICES, f"{len(devices)} CPU devices, expected 8"
    return devices


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Drop compiled programs, which would fill the memory, once they are many.

    Files share small ones, so those of the last files are kept.
    """
    yield
    if resident_bytes() > 1000e6:
        jax.clear_caches()
        gc.collect()
        memory.return_freed()


def resident_bytes():
    """The memory of this process, where Linux tells; otherwise more than there is."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return math.inf
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def x64():
    """Lets the test that asks for it compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def trace_counter():
    """Starts chex.assert_max_traces afresh: it counts by name over the process."""
    chex.clear_trace_counter()


def tiny_split(seed, num_examples):
    """Images whose class can be read off: row 2 * class is bright, the rest noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % 10).astype(np.int32)
    images = rng.integers(0, 100, (num_examples, 28, 28, 1), dtype=np.uint8)
    images[np.arange(num_examples), 2 * labels + 4] = 255
    return data_lib.Split(images, labels)


@pytest.fixture(scope="session")
def tiny_data():
    return data_lib.ImageData(
        name="tiny",
        train=tiny_split(0, 170),
        test=tiny_split(1, 37),
        class_names=tuple("0123456789"),
        kind="sample",
        source="tiny, 170 + 37 images",
    )


@pytest.fixture(scope="session")
def tiny_config():
    """Two epochs of five steps, and twenty images an epoch left over."""
    return dataclasses.replace(
        TrainConfig(), model="mlp:widths=16x16", epochs=2, batch_size=30
    )


@pytest.fixture
def signal_at():
    """Lets a test send its own process a signal in a step of a run."""

    def signal_at(step, signum, monkeypatch):
        train = loop.Trainer.train

        def signalled(trainer):
            for report in train(trainer):
                if trainer.step == step:
                    os.kill(os.getpid(), signum)
                yield report

        monkeypatch.setattr(loop.Trainer, "train", signalled)

    return signal_at
