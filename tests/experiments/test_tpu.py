"""Programs for TPUs that are not there; run by `.ci/run`, which installs libtpu."""

import sys

import jax
import pytest
from jax.experimental import topologies

from bn_jax.fields import ConfigError
from experiments.benchmarks import tpu


@pytest.fixture
def compiles():
    try:
        tpu.chips(8)
    except ConfigError:
        pytest.skip("needs libtpu, of the extra `tpu`")


@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_a_layer_on_eight_chips_has_these_collectives(how, compiles):
    said = tpu.compile_program(f"layer/{how}/8")
    # One forward, one backward.
    assert said.collectives_a_norm == 2
    by_hand = {"all-reduce": 2}
    by_compiler = {"all-gather": 1, "all-reduce": 1}
    assert said.collectives == (by_hand if how == "shard_map" else by_compiler)
    x = 8 * 32 * 14 * 14 * 64 * 4 / 8  # bytes of x on a chip
    assert 8 * x < said.bytes_moved < 36 * x
    assert said.bandwidth_seconds > said.arithmetic_seconds > 0


def test_libtpu_in_use_is_named(compiles, monkeypatch):
    def locked(**options):
        raise jax.errors.JaxRuntimeError("ABORTED: error when accessing lockfile")

    monkeypatch.setattr(topologies, "get_topology_desc", locked)
    with pytest.raises(ConfigError, match="wait for it, or remove"):
        tpu.chips(8)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"libtpu.*pip install -e '\.\[tpu\]'"):
        tpu.chips(8)
