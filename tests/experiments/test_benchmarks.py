import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.runs import json_files
from experiments.benchmarks import (
    batch_norm,
    batch_norm_calls,
    benchmark,
    growth,
    lenet,
    lenet_peers,
    population,
    profile,
    start_up,
    timing,
    torch_training,
)

# An arm that tells the time by a counter in a file that all arms share.
MADE_UP = """
import os, pathlib, sys
from experiments.benchmarks import timing

(arm,) = [a.removeprefix("--arm=") for a in sys.argv if a.startswith("--arm=")]
clock = pathlib.Path([a for a in sys.argv if a.endswith("clock")][0])

def measure():
    if arm == "broken" and clock.read_text():
        sys.exit(3)
    clock.write_text(clock.read_text() + ".")
    return {"at": len(clock.read_text())}

print("something that is no measurement")
timing.serve({"env": os.environ.get("GIVEN", "")}, measure)
"""


@pytest.fixture
def made_up(tmp_path):
    """Return environment variables by which Python finds `made_up`, and its clock."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    clock = tmp_path / "clock"
    clock.write_text("")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    return {"PYTHONPATH": path}, str(clock)


@pytest.mark.slow
def test_arms_are_measured_in_turns_after_a_round_that_warms_them_up(made_up):
    env, clock = made_up
    about, measured = timing.interleaved(
        "made_up",
        {"a": env, "b": {**env, "GIVEN": "yes"}},
        rounds=2,
        arguments=[clock],
    )
    # The rounds are at 1, 2; 3, 4; 5, 6; the first is left out.
    measured = benchmark.Measured({}, about, measured)
    assert measured.values("at") == {"a": [3, 5], "b": [4, 6]}
    assert measured.rounds == 2
    assert [about[arm]["env"] for arm in "ab"] == ["", "yes"]


@pytest.mark.slow
def test_arm_that_fails_is_named(made_up):
    env, clock = made_up
    with pytest.raises(timing.ArmError, match="arm broken ended with status 3"):
        timing.interleaved(
            "made_up", {"a": env, "broken": env}, rounds=1, arguments=[clock]
        )


def test_arm_that_cannot_start_is_named(made_up):
    env, clock = made_up
    with pytest.raises(timing.ArmError, match="arm a ended with status 1"):
        timing.interleaved("no_such_module", {"a": env}, rounds=1, arguments=[clock])


def test_summary_is_median_and_spread():
    assert timing.summarize([4.0, 1.0, 2.0]) == (2.0, 1.0, 4.0, 3)


def test_ratios_are_paired_by_round():
    # 2 / 1, 6 / 2 and 4 / 4
    assert timing.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == (2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        timing.ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_slope_is_the_power(power):
    x = [1_000.0, 4_000.0, 16_000.0, 60_000.0]
    assert timing.slope(x, [3 * v**power for v in x]) == pytest.approx(power)


def test_slope_is_least_squares_on_logarithms():
    # log2: x 0, 1, 2 and y 0, 0, 3: sum (x - 1) (y - 1) / sum (x - 1)^2 = 3 / 2.
    assert timing.slope([1, 2, 4], [1, 1, 8]) == pytest.approx(1.5)


def test_agreement_is_the_largest_difference():
    losses = {"torch": [2.0, 1.0], "ours": [2.0, 1.0005]}
    apart = timing.check_agreement(losses, "ours", tolerance=1e-3, what="losses")
    assert apart == {"torch": pytest.approx(5e-4), "ours": 0.0}


@pytest.mark.parametrize("loss,difference", [(1.5005, "0.5"), (math.nan, "inf")])
def test_arms_that_compute_differently_are_refused(loss, difference):
    losses = {"flax": [2.0, loss], "ours": [2.0, 1.0005]}
    with pytest.raises(FloatingPointError) as refused:
        timing.check_agreement(losses, "ours", tolerance=1e-3, what="losses")
    assert f"losses differ from those of ours by {{'flax': {difference}" in str(
        refused.value
    )


def test_table_and_interval_read_as_they_should():
    rows = [["arm", "ratio"], ["a", timing.interval(timing.summarize([1.0, 2.0, 4.0]))]]
    assert timing.table(rows) == "| arm | ratio |\n|---|---|\n| a | 2 (1-4) |\n"


def test_versions_are_of_what_is_installed():
    assert timing.versions(["numpy", "no_such_library"]) == {"numpy": np.__version__}


def made_up_benchmark(*, needed=(), report=None, **needs):
    """Return a benchmark whose arms need the given modules."""
    arms = {
        name: benchmark.Arm(name.upper(), lambda _: None, modules)
        for name, modules in needs.items()
    }
    return benchmark.Benchmark(
        "made_up", benchmark.Design, arms, report, smoke={}, needed=needed
    )


def test_arm_of_a_missing_library_is_left_out_with_the_reason(capsys):
    made = made_up_benchmark(a=["math"], b=[], c=["math", "no_such_library"])
    arms, skipped = benchmark.choose_arms(made, benchmark.Design())
    assert list(arms) == ["a", "b"]
    assert skipped == {"c": "no_such_library is not installed"}
    assert "left out: c (no_such_library is not installed)" in capsys.readouterr().out


def test_benchmark_without_the_arms_that_it_needs_is_refused():
    made = made_up_benchmark(a=[], c=["no_such_library"], needed=["c"])
    with pytest.raises(ConfigError, match="c cannot be left out, but no_such_library"):
        benchmark.choose_arms(made, benchmark.Design())
    made = made_up_benchmark(c=["no_such_library"])
    with pytest.raises(ConfigError, match=r"no arm is left; pip install"):
        benchmark.choose_arms(made, benchmark.Design())


def test_arms_are_those_asked_for_and_those_needed():
    design = batch_norm.Design(arms=("one_pass", "ours"))
    arms, _ = benchmark.choose_arms(batch_norm.BENCHMARK, design)
    assert list(arms) == [batch_norm.FLOOR, "ours", "one_pass"]
    with pytest.raises(ConfigError, match="tensorflow.*expected of each value one of"):
        lenet.Design(arms=("ours", "tensorflow"))


def test_comparison_is_written_as_table_figure_and_json(tmp_path, capsys):
    rows = {"a": [{"s": 4.0}, {"s": 9.0}], "b": [{"s": 2.0}, {"s": 3.0}]}
    measured = benchmark.Measured({"a": "A", "b": "B"}, {}, rows)
    compared = benchmark.compare(measured, "s", "b", ratio="to B", value="s")
    assert compared.values == {"a": [4.0, 9.0], "b": [2.0, 3.0]}
    assert compared.ratios["a"] == (2.5, 2.0, 3.0, 2)  # 4 / 2 and 9 / 3
    report = benchmark.Report(
        [compared.table],
        {"ratio": compared.ratios, "s": compared.values},
        {"bars": compared.figure},
        ["a note"],
    )
    benchmark.write(tmp_path, measured.rounds, report, {"skipped": {"c": "why"}})
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[2] == "| A | 2.5 (2-3) | 6.5 (4-9) |"
    written = json_files.read_object(tmp_path / "results.json")
    assert written["ratio"]["a"] == {"median": 2.5, "min": 2.0, "max": 3.0, "n": 2}
    assert written["s"] == compared.values
    assert written["skipped"] == {"c": "why"}
    assert (tmp_path / "bars.png").stat().st_size > 1_000
    out = capsys.readouterr().out
    assert table in out
    assert "a note\nn = 2 rounds; written to" in out


def test_lenet_trains_on_as_many_batches_as_asked():
    design = lenet.Design(dataset="sample", steps=3, batch_size=8)
    assert len(sample_of(design).train.labels) == 24
    with pytest.raises(ConfigError, match="steps=3 of batch_size=5000 take 15000"):
        sample_of(lenet.Design(dataset="sample", steps=3, batch_size=5_000))


def sample_of(design):
    """Load a design's data, without flags that say where data lie."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(benchmark.launch, "load_data", data_lib.load)
        return design.load()


def test_lenet_tells_which_variant_of_pytorch_was_timed():
    row = {"examples_per_second": 10.0, "loss": 1.0, "accuracy": 0.5}
    measured = benchmark.Measured(
        {"ours": "ours", "torch": "PyTorch"},
        {
            "ours": {"losses": [2.0]},
            "torch": {"losses": [2.0], "variant": "NCHW, eager"},
        },
        {"ours": [{**row, "examples_per_second": 20.0}], "torch": [row]},
    )
    report = lenet.report(measured)
    header, ours, torch = report.tables[0]
    assert header == ["arm", "examples/s, to PyTorch", "examples/s"]
    assert ours == ["ours", "2 (2-2)", "20 (20-20)"]
    assert torch[0] == "PyTorch (NCHW, eager)"
    assert set(report.results) >= {"ratio_to_torch", "largest_difference_in_loss"}


def lenet_params():
    """Return numbered parameters of the shapes that LeNet has."""
    kernels = {
        "conv1": (5, 5, 1, 6),
        "conv2": (5, 5, 6, 16),
        "dense1": (256, 120),
        "dense2": (120, 84),
        "dense3": (84, 10),
    }
    params = {}
    for i, (name, shape) in enumerate(kernels.items(), start=1):
        params[f"{name}/kernel"] = np.arange(np.prod(shape), dtype=float).reshape(shape)
        params[f"{name}/bias"] = np.full(shape[-1], float(i))
        params[f"norm{i}/scale"] = np.full(shape[-1], 10.0 + i)
        params[f"norm{i}/bias"] = np.full(shape[-1], 20.0 + i)
    return params


def test_torch_parameters_compute_what_ours_do():
    params = lenet_params()
    listed = lenet_peers.torch_params(params)
    assert [p.shape for p in listed[:4]] == [(6, 1, 5, 5), (6,), (6,), (6,)]
    assert [p.shape for p in listed[4:9]] == [(16, 6, 5, 5), *[(16,)] * 3, (120, 256)]
    assert [p.shape for p in listed[9:]] == [
        *[(120,)] * 3,
        (84, 120),
        *[(84,)] * 3,
        (10, 84),
        (10,),
    ]
    np.testing.assert_array_equal(
        listed[4][3, 2, 1, 4], params["conv2/kernel"][1, 4, 2, 3]
    )
    # The features are flattened pixels first in ours, channels first there.
    features = np.random.default_rng(0).normal(size=(4, 4, 16))
    ours = features.reshape(-1) @ params["dense1/kernel"]
    theirs = listed[8] @ features.transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(theirs, ours, rtol=1e-12)


def test_torch_networks_agree_with_each_other():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {k: 0.1 * rng.normal(size=v.shape) for k, v in lenet_params().items()}
    x = torch.tensor(rng.normal(size=(8, 1, 28, 28)), dtype=torch.float32)
    outputs, moved = [], []
    for from_scratch in (False, True):
        net = lenet_peers.torch_lenet(from_scratch)
        torch_training.load(net, lenet_peers.torch_params(params))
        outputs.append(net(x).detach())
        moved.append(list(net.buffers())[0])
        outputs.append(net.eval()(x).detach())
    nn_train, nn_predict, own_train, own_predict = outputs
    torch.testing.assert_close(nn_train, own_train, rtol=1e-4, atol=1e-5)
    # PyTorch's average is of variances over n - 1: 4,608 values here, but 8 in layer 3.
    torch.testing.assert_close(moved[0], moved[1])
    assert (nn_predict - own_predict).abs().max() < 0.1


def test_calls_take_turns_and_the_least_time_of_each_counts(monkeypatch):
    durations = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 5.0, 4.0])}
    now, called = [0.0], []

    def call(name):
        called.append(name)
        now[0] += next(durations[name])

    monkeypatch.setattr(torch_training.time, "perf_counter", lambda: now[0])
    calls = {name: functools.partial(call, name) for name in durations}
    assert torch_training.least_seconds(calls, repeats=3) == {"a": 1.0, "b": 4.0}
    assert called == ["a", "b"] * 3


def test_reference_gradients_are_those_of_the_formula():
    case = batch_norm_calls.make_case((4, 3, 2, 5))
    wide = batch_norm_calls.Case(*(a.astype(float) for a in case))
    true = batch_norm_calls.reference(wide)
    rng = np.random.default_rng(1)
    step = 1e-6
    for i, name in enumerate(("x", "gamma", "beta")):
        # Along a random direction d: (f(v + h d) - f(v - h d)) / 2h = gradient . d.
        value = getattr(wide, name)
        d = rng.normal(size=value.shape)
        up, down = (
            (
                batch_norm_calls.reference(wide._replace(**{name: value + s * d})).y
                * wide.dy
            ).sum()
            for s in (step, -step)
        )
        gradient = true[1 + i]
        assert (up - down) / (2 * step) == pytest.approx((gradient * d).sum(), rel=1e-6)
    x_hat = (true.y - wide.beta) / wide.gamma
    np.testing.assert_allclose(x_hat.mean((0, 1, 2)), 0, atol=1e-12)


ARMS = "ours ours_chwn ours_linen ours_nnx one_pass flax_linen flax_nnx haiku torch"


@pytest.mark.parametrize("name", [*ARMS.split(), "torch_channels_last"])
def test_batch_norm_arm_computes_the_reference(name):
    arm = batch_norm.ARMS[name]
    for module in arm.needs:
        pytest.importorskip(module)
    case = batch_norm_calls.make_case((4, 3, 2, 5))
    call = arm.set_up.keywords["make"](case)
    errors = batch_norm_calls.errors(call.result(), batch_norm_calls.reference(case))
    assert max(errors.values()) < 1e-5
    assert batch_norm.check_errors({name: {"errors": {"4x3x2x5": errors}}}) < 1e-5


def test_batch_norm_refuses_a_wrong_result():
    said = {"ours": {"errors": {"2x2x2x2": {"y": 1e-6, "dx": 1e-3}}}}
    with pytest.raises(FloatingPointError, match="ours at 2x2x2x2, dx"):
        batch_norm.check_errors(said)
    said["ours"]["errors"]["2x2x2x2"]["dx"] = math.nan
    with pytest.raises(FloatingPointError):
        batch_norm.check_errors(said)


def test_floor_is_eight_passes_of_which_two_were_measured():
    assert batch_norm.floors([1.0, 2.5]) == [4.0, 10.0]


def test_times_are_compared_to_the_floor_and_the_fastest_peer():
    compared = batch_norm.compare(
        {
            batch_norm.FLOOR: [1.0, 2.0, 1.0],
            "ours": [2.0, 3.0, 2.0],
            "one_pass": [4.0, 3.0, 4.0],
            "haiku": [4.0, 6.0, 4.0],
            "torch": [9.0, 1.0, 9.0],
        }
    )
    assert compared.to_floor["ours"] == (2.0, 1.5, 2.0, 3)
    assert compared.best_peer == "haiku"  # by its median, not by one lucky round
    assert compared.to_best_peer == {"ours": (0.5, 0.5, 0.5, 3)}
    assert compared.to_one_pass == {"ours": (0.5, 0.5, 1.0, 3)}


def test_times_without_peers_are_compared_to_the_floor_alone():
    compared = batch_norm.compare({batch_norm.FLOOR: [1.0], "ours": [2.0]})
    assert compared.best_peer is None
    assert compared.to_best_peer == compared.to_one_pass == {}


def test_shapes_have_names():
    shape = (64, 56, 56, 64)
    assert batch_norm.parse_shape(batch_norm.shape_name(shape)) == shape


@pytest.mark.parametrize("wrong", ["64x56", "axbxcxd", "1x2x3x0", "1x2x3x-4"])
def test_shapes_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="shapes=.*expected of each value such as"):
        batch_norm.Design(shapes=("1x2x3x4", wrong))


def test_population_sizes_are_at_most_all_examples():
    assert population.sizes_within([4000, 1000, 60000], 6_000) == [1000, 4000, 6000]
    assert population.sizes_within([16000, 60000], 6_000) == [6000]


def test_population_reports_times_to_an_epoch():
    first = {"first_layer": [0.5, 1.0], "first_call_seconds": {"1000": 9.0}}
    measured = benchmark.Measured(
        {arm: arm_.title for arm, arm_ in population.ARMS.items()},
        {"epoch": {"num_examples": 4_000}, "layerwise": first, "one_pass": first},
        {
            "epoch": [{"seconds": 2.0}],
            "layerwise": [{"1000": 1.0, "4000": 4.0}],
            "one_pass": [{"1000": 1.0, "4000": 2.0}],
        },
    )
    report = population.report(measured)
    assert report.tables[0] == [
        ["time, to an epoch of 4,000", "N = 1,000", "N = 4,000", "slope"],
        ["layer by layer", "0.5 (0.5-0.5)", "2 (2-2)", "1.00"],
        ["in one pass", "0.5 (0.5-0.5)", "1 (1-1)", "0.50"],
    ]
    measured.about["one_pass"] = {**first, "first_layer": [0.6, 1.0]}
    with pytest.raises(FloatingPointError, match="the first layer's statistics differ"):
        population.report(measured)


def test_start_up_reads_line_status_and_memory_of_one_process():
    ran = start_up.run(
        ["-c", "print('a'); x = b'x' * 300_000_000; print('epoch 1/2')"],
        wait_for="epoch 1/",
    )
    assert 0 < ran.first_line_seconds <= ran.seconds
    small = start_up.run(["-c", "pass"])
    assert math.isnan(small.first_line_seconds)
    # Its own peak, though this process and a child that came before are larger.
    assert small.peak_bytes < 250_000_000 < ran.peak_bytes


def test_start_up_refuses_a_process_that_fails_or_says_nothing():
    with pytest.raises(timing.ArmError, match="ended with status 5"):
        start_up.run(["-c", "import sys; sys.exit(5)"])
    with pytest.raises(timing.ArmError, match="printed no line 'epoch 1/'"):
        start_up.run(["-c", "print('epoch 2/2')"], wait_for="epoch 1/")


def test_start_up_refuses_a_cache_that_changes_the_result():
    same = {"loss_cold": 0.5, "loss_warm": 0.5}
    start_up.check_losses([same, same])
    with pytest.raises(FloatingPointError, match="jobs of one config"):
        start_up.check_losses([same, {"loss_cold": 0.5, "loss_warm": 0.25}])


LENET = "jit(run_steps)/while/body/"


@pytest.mark.parametrize(
    "source,part",
    [
        ("jvp(LeNet)/conv1/cond/branch_0_fun/dot_general", "convolutions, forward"),
        ("transpose(jvp(LeNet))/conv2/slice", "convolutions, backward"),
        ("jvp(LeNet)/norm3/reduce_sum", "batch norm, forward"),
        ("jvp(LeNet)/norm1/psum", "communication"),
        ("psum", "communication"),
        ("transpose(jvp(LeNet))/dense1/dot_general", "dense layers, backward"),
        ("transpose(jvp(LeNet))/mul", "sigmoid, pooling, loss, backward"),
        ("gather", "batch, update, rest"),
    ],
)
def test_profile_knows_the_parts_of_a_step(source, part):
    assert profile.part_of_lenet(LENET + source) == part


def test_profile_adds_up_what_a_trace_says():
    """A product's time is most of a program of a product and a sine."""

    @jax.jit
    def program(x):
        with jax.named_scope("product"):
            y = x @ x
        with jax.named_scope("sine"):
            return jnp.sin(y[:8])

    x = jnp.ones((1024, 1024))
    names = profile.sources(program.lower(x).compile().as_text())
    program(x).block_until_ready()
    seconds = profile.longest(profile.trace(lambda: program(x).block_until_ready()))
    parts = profile.by_part(
        seconds, names, lambda source: "sine" if "sine" in source else "product", 2
    )
    assert set(parts) == {"product", "sine"}
    assert parts["product"] > parts["sine"]
    assert sum(parts.values()) == pytest.approx(1e3 * sum(seconds.values()) / 2)


def test_growth_reports_slopes_and_draws(tmp_path):
    # With batch norm times are in proportion to the size; without, they no longer grow
    # after the second. Sizes are in a ratio q each: at log q 0, 1, 2 times are at log
    # 0, p, p, whose slope is p / 2.
    measured = {}
    sizes = [16, 64, 256]
    for arm in growth.ARMS:
        most = math.inf if arm.endswith("/batch_norm") else 64
        measured[arm] = [{str(n): 1e-3 * min(n, most) for n in sizes}] * 2
    report = growth.report(benchmark.Measured({}, {}, measured))
    benchmark.write(tmp_path, 2, report, {})
    found = json_files.read_object(tmp_path / "results.json")
    assert set(found["slope"]) == set(growth.ARMS)
    whole, last = found["slope"], found["slope_of_the_last_two"]
    for arm in growth.ARMS:
        grows = arm.endswith("/batch_norm")
        assert whole[arm] == pytest.approx(1.0 if grows else 0.5)
        assert last[arm] == pytest.approx(1.0 if grows else 0.0, abs=1e-12)
    table = (tmp_path / "table.md").read_text()
    assert (
        "| LeNet: examples a batch | batch norm | 16: 16, 64: 64, 256: 256 |" in table
    )
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_refuses_a_model_that_diverges():
    class Infinite(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            scale = self.param("scale", nn.initializers.ones, (10,))
            return x[:, :10, 0, 0] * scale * float("inf")

    with pytest.raises(FloatingPointError, match="Infinite diverged at rate 1e-3"):
        growth.step_call(Infinite(), 64)
