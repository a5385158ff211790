import functools
import importlib.util
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.averages import CountedState
from bn_jax.functional import BatchNormParams
from bn_jax.variants.renorm import batch_renorm
from experiments import crossq


@pytest.fixture
def run(in_process):
    """Runs the experiment here; returns what it printed."""
    start = functools.partial(runpy.run_path, crossq.__file__, run_name="__main__")
    return functools.partial(in_process, start)


def test_missing_package_is_one_line_that_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run(f"--workdir={tmp_path}")
    assert ended.value.code == (
        "error: SBX, whose CrossQ is trained, is not installed; pip install -e '.[rl]'"
    )
    assert not list(tmp_path.iterdir())


def test_single_seed_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="seeds=1; expected a number at least 2"):
        run(f"--workdir={tmp_path}", "--seeds=1")


class Layers:
    """Ours and SBX's, in a network of CrossQ after some batches."""

    def __init__(self, num_batches):
        policies = pytest.importorskip(
            "sbx.crossq.policies", reason="needs the extra `rl`"
        )
        self.actor = policies.Actor(
            net_arch=[4], action_dim=1, renorm_warmup_steps=2, batch_norm_momentum=0.9
        )
        rng = np.random.default_rng(0)
        self.x = jnp.asarray(rng.normal(20, 3, (num_batches + 1, 16, 3)), jnp.float32)

    def apply(self, *, train):
        """Return variables, and the first layer's output for the last batch."""
        variables = self.actor.init(jax.random.key(0), self.x[0])
        for batch in self.x[:-1]:
            _, updates = self.actor.apply(
                variables, batch, train=True, mutable=["batch_stats"]
            )
            variables = {**variables, **updates}
        _, found = self.actor.apply(
            variables,
            self.x[-1],
            train=train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: str(module.name).endswith("orm_0"),
        )
        ((_, y),) = found["intermediates"].items()
        return variables, np.asarray(y["__call__"][0])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("num_batches", [1, 4])  # the limits jump at the third
def test_layer_in_crossq_gives_what_the_function_gives(num_batches, train):
    layers = Layers(num_batches)
    with crossq.layer_in_sbx(crossq.batch_renorm):
        variables, y = layers.apply(train=train)
    state = CountedState(**variables["batch_stats"]["Norm_0"])
    params = BatchNormParams(**variables["params"]["Norm_0"])
    assert state.count == num_batches
    expected, _ = batch_renorm(
        layers.x[-1],
        params,
        state,
        train=train,
        r_max=3.0,
        d_max=5.0,
        start=2,
        momentum=0.9,
        epsilon=1e-3,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_layer_agrees_with_theirs_where_the_variance_is_large(train):
    layers = Layers(num_batches=4)
    theirs, y_theirs = layers.apply(train=train)
    with crossq.layer_in_sbx(crossq.batch_renorm):
        ours, y_ours = layers.apply(train=train)
    assert "BatchRenorm_0" in theirs["params"] and "Norm_0" in ours["params"]
    # Outputs are below 10; of them r^2 epsilon / 2v, about 2e-4, is the difference.
    np.testing.assert_allclose(y_ours, y_theirs, atol=2e-3)
    same = ("Dense_0", "Dense_1", "Dense_2")
    assert all(
        (ours["params"][name]["kernel"] == theirs["params"][name]["kernel"]).all()
        for name in same
    )
