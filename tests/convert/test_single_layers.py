"""Numbers by hand, and round trips, without any of the libraries."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import Moments, convert, init, measure
from bn_jax.convert import BatchNormLayer
from convert_trainer import LAYER

TORCH = {
    "weight": [1.0, 2.0],
    "bias": [3.0, 4.0],
    "running_mean": [5.0, 6.0],
    "running_var": [7.0, 8.0],
    "num_batches_tracked": 9,
}
EMA = {"counter": 2, "hidden": np.array([[[0.19, 0.38]]])}
HAIKU_PARAMS = {
    "bn": {"scale": np.array([[[1.0, 2.0]]]), "offset": np.array([[[3.0, 4.0]]])},
    "linear": {"w": np.zeros([2, 2])},
}
HAIKU_STATE = {
    "bn/~/mean_ema": {**EMA, "average": np.array([[[1.0, 2.0]]])},
    "bn/~/var_ema": {**EMA, "average": np.array([[[1.0, 2.0]]])},
}


def test_torch_entries_go_where_they_belong():
    layer = convert.from_torch(TORCH)
    assert layer.params.scale.tolist() == [1, 2]
    assert layer.params.bias.tolist() == [3, 4]
    assert layer.state.mean.tolist() == [5, 6]
    assert layer.state.var.tolist() == [7, 8]
    assert layer.num_batches == 9


def test_keras_entries_keep_the_order_of_its_weights():
    assert list(convert.to_keras(LAYER)) == [
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
    ]


def test_haiku_is_read_by_its_average_whatever_its_axes():
    layer = convert.from_haiku(HAIKU_PARAMS, HAIKU_STATE, "bn")
    assert layer.params.scale.tolist() == [1, 2]
    assert layer.state.var.tolist() == [1, 2]
    assert layer.num_batches == 2


def test_haiku_hides_the_average_times_one_minus_the_decay():
    """1 - .9^2 = .19."""
    layer = convert.from_haiku(HAIKU_PARAMS, HAIKU_STATE, "bn")
    params, state = convert.to_haiku(layer, "bn", momentum=0.9, num_dims=3)
    assert params["bn"]["offset"].shape == (1, 1, 2)
    hidden = state["bn/~/mean_ema"]["hidden"]
    np.testing.assert_allclose(hidden, [[[0.19, 0.38]]], rtol=1e-6)
    assert state["bn/~/var_ema"]["counter"] == 2
    assert state["bn/~/var_ema"]["counter"].dtype == np.int32


def test_the_decay_is_what_float32_makes_of_it():
    """1 - .999 in float32 is .00099998713, which is off by more than 1e-5."""
    layer = LAYER._replace(num_batches=1)
    _, state = convert.to_haiku(layer, momentum=0.999, num_dims=2)
    hidden = state["batch_norm/~/var_ema"]["hidden"]
    expected = 0.00099998713 * np.array([[1.0, 2.0, 3.0, 0.5]])
    np.testing.assert_allclose(hidden, expected, rtol=1e-6)


def test_one_feature_of_haiku_stays_a_feature():
    one = BatchNormLayer(*init(1), num_batches=1)
    params, state = convert.to_haiku(one, momentum=0.9, num_dims=4)
    assert params["batch_norm"]["scale"].shape == (1, 1, 1, 1)
    assert convert.from_haiku(params, state).state.mean.shape == (1,)


def test_equinox_in_mode_batch_is_read_as_it_predicts():
    """With m = .5 and 2 batches, averages are hidden over 1 - .25 = .75."""
    entries = {
        "weight": None,
        "bias": None,
        "counter": jnp.array(2),
        "hidden_mean": [3.0],
        "hidden_var": [1.5],
    }
    like = init(1, scale=False, bias=False)
    layer = convert.from_equinox(entries, mode="batch", momentum=0.5, like=like)
    assert layer.params == (None, None)
    assert layer.state.mean.tolist() == [4]
    assert layer.state.var.tolist() == [2]
    # Of the initial 1, .25 is left, over .75.
    mended = convert.without_equinox_excess(layer, momentum=0.5)
    np.testing.assert_allclose(mended.state.var, [2 - 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("num_batches", [0, 1, 3, 10**6])
@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda layer: convert.from_torch(convert.to_torch(layer)),
        lambda layer: convert.from_keras(convert.to_keras(layer)),
        lambda layer: convert.from_flax(convert.to_flax(layer, count=True)),
        lambda layer: convert.from_nnx(convert.to_nnx(layer)),
        lambda layer: convert.from_haiku(
            *convert.to_haiku(layer, momentum=0.9, num_dims=4)
        ),
        lambda layer: convert.from_equinox(
            convert.to_equinox(layer, mode="ema"), mode="ema"
        ),
        lambda layer: convert.from_equinox(
            convert.to_equinox(layer, mode="batch", momentum=0.9),
            mode="batch",
            momentum=0.9,
        ),
    ],
    ids=["torch", "keras", "flax", "nnx", "haiku", "equinox ema", "equinox batch"],
)
def test_there_and_back_is_the_same_layer(there_and_back, num_batches):
    layer = LAYER._replace(num_batches=num_batches)
    back = there_and_back(layer)
    chex.assert_trees_all_close(back[:2], layer[:2], rtol=1e-6)
    assert back.num_batches in (None, num_batches)
    dtypes = [a.dtype for part in back[:2] for a in part]
    assert dtypes == [jnp.float32] * 4


@pytest.mark.parametrize(
    "options", [{"scale": False}, {"bias": False}, {"scale": False, "bias": False}]
)
def test_what_a_layer_lacks_stays_absent(options):
    layer = BatchNormLayer(*init(2, **options), num_batches=1)
    for name, write, read in [
        ("torch", convert.to_torch, convert.from_torch),
        ("keras", convert.to_keras, convert.from_keras),
        ("flax", convert.to_flax, convert.from_flax),
        ("nnx", convert.to_nnx, convert.from_nnx),
    ]:
        back = read(write(layer), like=init(2, **options))
        assert jax.tree.structure(back[:2]) == jax.tree.structure(layer[:2]), name


def test_half_precision_statistics_become_float32():
    half = {name: np.array(value, np.float16) for name, value in TORCH.items()}
    half["num_batches_tracked"] = np.int64(9)
    layer = convert.from_torch(half)
    assert layer.state.var.dtype == jnp.float32
    assert layer.params.scale.dtype == jnp.float16


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, ">i2"])
def test_numbers_of_any_width_and_byte_order_are_read(dtype):
    entries = {name: np.array(value, dtype) for name, value in TORCH.items()}
    layer = convert.from_torch(entries)
    assert layer.num_batches == 9
    assert layer.state.var.tolist() == [7, 8]
    assert layer.params.scale.tolist() == [1, 2]
    assert {a.dtype for part in layer[:2] for a in part} == {jnp.dtype(jnp.float32)}


def test_written_arrays_are_copies_that_may_be_written_to():
    written = convert.to_torch(LAYER)
    written["running_mean"] += 1
    assert LAYER.state.mean.tolist() == pytest.approx([0.1, -0.2, 2, 0])


def aligned(values):
    """Return float32 values at an address that JAX on the CPU is willing to alias."""
    values = np.asarray(values, np.float32)
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    view = memory[start : start + values.nbytes].view(np.float32)
    view[...] = values
    return view


def test_read_arrays_are_copies():
    entries = {name: aligned(TORCH[name]) for name in ("weight", "running_var")}
    layer = convert.from_torch({**TORCH, **entries})
    for value in entries.values():
        value[...] = -1
    assert layer.state.var.tolist() == [7, 8]
    assert layer.params.scale.tolist() == [1, 2]


@pytest.mark.parametrize(("first_time", "num_batches"), [(True, 0), (False, None)])
def test_first_time_of_equinox_says_whether_there_was_a_batch(first_time, num_batches):
    entries = {
        "weight": [1.0],
        "bias": [0.0],
        "running_mean": [0.0],
        "running_var": [1.0],
        "first_time": first_time,
    }
    layer = convert.from_equinox(entries, mode="ema")
    assert layer.num_batches == num_batches
    assert convert.to_equinox(layer, mode="ema")["first_time"] == first_time


def test_torch_momentum_is_the_weight_of_the_new_value():
    assert convert.momentum_from_torch(0.1) == pytest.approx(0.9)
    assert convert.momentum_to_torch(0.9) == pytest.approx(0.1)


def test_torch_momentum_none_weighs_all_batches_alike():
    """After 3 batches the average has weight 3/4, the fourth batch 1/4."""
    assert float(convert.momentum_from_torch(None, 3)) == 0.75


def test_unbiased_divides_by_n_minus_one():
    """Of 1 and 3: variance 1 over n, 2 over n - 1. One value, or none, stays."""
    moments = Moments(jnp.array([2.0, 1.0, 0.0]), jnp.zeros(3), jnp.array([1.0, 5, 0]))
    assert convert.unbiased(moments).var.tolist() == [2, 5, 0]


@pytest.mark.parametrize("total", [0.5, 1.04, 1.9, np.nan])
def test_unbiased_refuses_weights_that_are_no_numbers_of_values(total):
    """Of a total of 1.04, n / (n - 1) would be 26."""
    moments = Moments(jnp.array([4.0, total]), jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"moments.count=.*expected 0, 1, or 2 and mo"):
        convert.unbiased(moments)


def test_unbiased_keeps_the_variance_of_weights_that_only_the_program_knows():
    def var(weights):
        return convert.unbiased(measure(jnp.array([[1.0], [3.0]]), weights=weights)).var

    totals = {1.0: 1, 1.04: 1, 2.0: 2, 4.0: 4 / 3}
    for total, expected in totals.items():
        weights = np.full(2, total / 2, np.float32)
        np.testing.assert_allclose(jax.jit(var)(weights), [expected], rtol=1e-6)
    # Rounding is forgiven.
    assert var(jnp.full(2, 0.5 + 1e-7)).tolist() == [1]


def test_biased_average_scales_the_variance_alone():
    state = convert.from_torch(TORCH).state
    biased = convert.biased_average(state, values_per_feature=8)
    np.testing.assert_allclose(biased.var, [7 * 7 / 8, 7], rtol=1e-6)
    assert biased.mean is state.mean
    back = convert.unbiased_average(biased, values_per_feature=8)
    np.testing.assert_allclose(back.var, [7, 8], rtol=1e-6)


def test_none_of_the_libraries_is_imported():
    program = (
        "import sys, bn_jax.convert; "
        "print(*({'torch', 'keras', 'haiku', 'equinox', 'flax'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ""
