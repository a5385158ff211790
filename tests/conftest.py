"""Gives every test 8 CPU devices, and single tests float64."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax
import pytest

NUM_DEVICES = 8
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

# Many tests train the same small LeNet; it is compiled once in a session, whose worker
# processes find the folder in the environment.
if "BN_JAX_TESTS_COMPILED" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="bn_jax-compiled-")
    os.environ["BN_JAX_TESTS_COMPILED"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["BN_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session", autouse=True)
def devices():
    """The 8 CPU devices: a test across devices never runs on one in silence."""
    devices = jax.devices("cpu")
    assert len(devices) == NUM_DEVICES, f"{len(devices)} CPU devices, expected 8"
    return devices


@pytest.fixture
def x64():
    """Lets the test that asks for it compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def trace_counter():
    """Starts chex.assert_max_traces afresh: it counts by name over the process."""
    chex.clear_trace_counter()
