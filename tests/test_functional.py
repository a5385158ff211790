"""`bn_jax.batch_norm` and its parts on one device: values, state and dtypes."""

import functools
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from bn_jax import (
    BatchNormParams,
    BatchNormState,
    Moments,
    batch_norm,
    cumulative_momentum,
    debiased_momentum,
    init,
    measure,
    normalize,
    update_average,
)
from bn_jax.contract import EmptyState
from bn_jax.variants.one_moment import center, init_center, init_scale, scale
from bn_jax.variants.per_example import layer_norm
from bn_jax.variants.quantile import init as init_quantile
from bn_jax.variants.quantile import quantile_norm
from bn_jax.variants.renorm import batch_renorm
from bn_jax.variants.renorm import init as init_renorm
from marks import slow_but
from reference import assert_moments_close, normal

EPSILON = 1e-5
LAYOUTS = [((6, 3), -1), ((4, 2, 5, 3), -1), ((4, 3, 2, 5), 1), ((3, 4, 2, 2, 2), 0)]


def train_step(x, *, scale=None, bias=None, **options):
    """Return the output and state of one training step from the initial state."""
    _, state = init(x.shape[options.get("feature_axis", -1)])
    return batch_norm(x, BatchNormParams(scale, bias), state, train=True, **options)


@functools.partial(jax.jit, static_argnames="feature_axis")
def compiled_step(x, **options):
    return train_step(x, **options)


@functools.partial(jax.jit, static_argnames="train")
def run(x, params, state, *, train, momentum=0.9):
    """Return `batch_norm`, compiled: `train_step` from any state, or prediction."""
    return batch_norm(x, params, state, train=train, momentum=momentum)


def test_init_is_the_identity_with_state_mean_0_and_var_1():
    params, state = init(3)
    chex.assert_trees_all_equal(params, BatchNormParams(jnp.ones(3), jnp.zeros(3)))
    chex.assert_trees_all_equal(state, BatchNormState(jnp.zeros(3), jnp.ones(3)))
    assert init((2, 3))[1].mean.shape == (2, 3)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_init_leaves_out_what_is_not_asked_for(scale, bias):
    params, _ = init(3, scale=scale, bias=bias)
    assert (params.scale is not None, params.bias is not None) == (scale, bias)


def test_init_takes_any_integer_and_any_shape_of_them():
    for number in (np.int64(3), np.uint8(3), np.array(3)):
        chex.assert_trees_all_equal(init(number), init(3))
    chex.assert_trees_all_equal(init([2, np.int64(3)]), init((2, 3)))
    chex.assert_trees_all_equal(init(np.array([2, 3])), init((2, 3)))
    with pytest.raises(ValueError, match="expected the number of features"):
        init(3.0)


def test_init_keeps_the_state_in_float32_whatever_the_parameters():
    params, state = init(3, dtype=jnp.bfloat16)
    assert params.scale.dtype == params.bias.dtype == jnp.bfloat16
    assert state.mean.dtype == state.var.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layout", "has_scale", "has_bias"),
    slow_but(
        [
            (LAYOUTS[0], False, False),
            (LAYOUTS[1], True, False),
            (LAYOUTS[2], False, True),
            (LAYOUTS[3], True, True),
        ],
        list(itertools.product(LAYOUTS, (False, True), (False, True))),
    ),
)
def test_output_is_the_papers_formula_in_every_layout(layout, has_scale, has_bias):
    shape, feature_axis = layout
    x = normal(shape, mean=2.0, std=3.0)
    scale = np.float32([0.5, -1.0, 2.0]) if has_scale else None
    bias = np.float32([3.0, 0.0, -1.0]) if has_bias else None
    y, state = compiled_step(
        x, scale=scale, bias=bias, feature_axis=feature_axis, momentum=0.0
    )
    expected, batch = reference.batch_norm(
        x,
        1.0 if scale is None else scale,
        0.0 if bias is None else bias,
        feature_axis=feature_axis,
    )
    assert y.shape == x.shape and y.dtype == x.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert_moments_close((batch.count, *state), batch)


def test_epsilon_is_added_to_the_variance():
    # x = -1, 1: mean 0, variance 1. With epsilon 3: y = x / sqrt(1 + 3).
    y, _ = compiled_step(np.float32([[-1.0], [1.0]]), epsilon=3.0)
    chex.assert_trees_all_close(y, np.float32([[-0.5], [0.5]]), rtol=1e-6)


def test_one_batch_moves_the_state_by_a_tenth_of_biased_moments():
    # x = 1, 3: mean 2, variance 1 (2 if unbiased). 0.9 (0, 1) + 0.1 (2, 1).
    _, state = compiled_step(np.float32([[1.0], [3.0]]))
    expected = BatchNormState(np.float32([0.2]), np.float32([1.0]))
    chex.assert_trees_all_close(state, expected, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_momentum_weighs_the_old_average_after_n_steps(momentum):
    # old_n = momentum^n old_0 + (1 - momentum) sum_t momentum^(n - 1 - t) batch_t.
    steps = 5
    x = normal((steps, 16, 3), mean=2.0, std=3.0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(x):
        def step(state, x):
            params = BatchNormParams(None, None)
            y, state = batch_norm(x, params, state, train=True, momentum=momentum)
            return state, y

        return jax.lax.scan(step, init(3)[1], x)[0]

    state = run(x)
    weights = (1 - momentum) * momentum ** np.arange(steps - 1.0, -1.0, -1.0)
    _, means, variances = (
        np.stack(m) for m in zip(*map(reference.moments, x), strict=True)
    )
    np.testing.assert_allclose(state.mean, weights @ means, rtol=1e-5, atol=1e-6)
    expected = momentum**steps + weights @ variances
    np.testing.assert_allclose(state.var, expected, rtol=1e-5)


def test_prediction_normalises_by_the_state_and_returns_it_as_it_was():
    x = normal((2, 3, 3, 2))
    params = BatchNormParams(jnp.array([2.0, 3.0]), jnp.array([1.0, -1.0]))
    state = BatchNormState(jnp.array([1.0, -2.0]), jnp.array([4.0, 0.25]))
    y, new_state = batch_norm(x, params, state, train=False)
    assert new_state is state
    scale, bias = map(np.float64, params)
    expected = reference.standardised(x, *state) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    one_y, _ = run(np.asarray(x)[:1], params, state, train=False)
    chex.assert_trees_all_close(one_y, np.asarray(y)[:1], rtol=1e-6)


def test_batch_norm_is_the_composition_of_its_public_parts():
    x, (params, state) = normal((8, 3), mean=1.0), init(3)
    y, new_state = run(x, params, state, train=True, momentum=0.7)

    @jax.jit
    def parts(x, params, state):
        batch = measure(x)
        y = normalize(x, batch.mean, batch.var, params)
        return y, update_average(state, batch, momentum=0.7)

    composed, moved = parts(x, params, state)
    chex.assert_trees_all_close(y, composed, atol=1e-6)
    chex.assert_trees_all_close(new_state, moved, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_has_the_dtype_of_x_and_the_state_is_float32(dtype):
    x = normal((64, 3), mean=300.0, std=20.0, dtype=dtype)
    params, state = init(3, dtype=dtype)
    y, state = run(x, params, state, train=True, momentum=0.0)
    assert y.dtype == dtype and state.mean.dtype == state.var.dtype == jnp.float32
    expected, batch = reference.batch_norm(x)
    assert_moments_close((batch.count, *state), batch)
    # Arithmetic in float32 leaves the one rounding at the end, half an ulp.
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.float64(y), expected, rtol=0.51 * ulp + 1e-5, atol=1e-4
    )
    y, _ = run(x, params, state, train=False)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.float64(y), expected, rtol=0.51 * ulp + 1e-5, atol=1e-4
    )


def test_a_state_averaged_over_half_precision_batches_keeps_small_steps():
    # With momentum 0.999 a bfloat16 average would round to 1 and never move.
    x, (params, state) = (
        jnp.full((4, 1), 2.0, jnp.bfloat16),
        init(1, dtype=jnp.bfloat16),
    )
    _, state = run(x, params, state, train=True, momentum=0.999)
    chex.assert_trees_all_close(state.mean, np.float32([0.002]), rtol=1e-4)
    chex.assert_trees_all_close(state.var, np.float32([0.999]), rtol=1e-6)


def test_float64_is_computed_and_kept_in_float64(x64):
    x = normal((32, 3), mean=1e5, dtype=jnp.float64)
    params, state = init(3, dtype=jnp.float64)
    y, state = run(x, params, state, train=True, momentum=0.0)
    expected, batch = reference.batch_norm(x)
    assert y.dtype == state.mean.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8)
    assert_moments_close((batch.count, *state), batch, rtol=1e-10)


def test_float64_input_leaves_the_dtype_of_a_float32_state(x64):
    _, state = init(3)
    y, new_state = compiled_step(normal((8, 3), dtype=jnp.float64))
    assert y.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("train", [True, False])
def test_numpy_input_needs_no_conversion(train):
    x = np.random.default_rng(0).normal(size=(8, 3))  # float64
    y, _ = batch_norm(x, *init(3), train=train)
    assert y.dtype == jnp.float32
    expected = reference.batch_norm(x)[0] if train else x / np.sqrt(1 + EPSILON)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [1e3, 1e4, -1e4])
def test_a_mean_1e4_deviations_from_zero_is_normalised_on_the_first_step(mean):
    x = normal((256, 16), mean=mean)
    y, state = compiled_step(x, momentum=0.0)
    np.testing.assert_allclose(np.std(y, axis=0), 1.0, atol=1e-3)
    np.testing.assert_allclose(state.var, reference.moments(x).var, rtol=1e-3)


def test_normalize_subtracts_the_mean_before_it_scales():
    # x and the mean are exact in float32, so that only the last digit of y may be off.
    x = np.float32(1e4 + np.arange(-4.0, 4.0)[:, None] / 8)
    y = jax.jit(normalize)(x, np.float32([1e4]), np.float32([0.3]))
    expected = reference.standardised(x, [1e4], [0.3])
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_normalize_returns_the_dtype_of_x(dtype):
    assert normalize(jnp.ones((2, 3), dtype), jnp.ones(3), jnp.ones(3)).dtype == dtype


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_a_batch_of_one_gives_beta_and_no_gradient_with_one_warning(shape):
    bias = jnp.array([0.5, -2.0, 1e4])

    @jax.jit
    def gradient_and_output(x):
        def total(x):
            y, _ = train_step(x, scale=jnp.array([3.0, 1.0, 7.0]), bias=bias)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, has_aux=True)(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            x = normal(shape, mean=1e3, std=1e3, seed=seed)
            gradient, y = gradient_and_output(x)
            chex.assert_trees_all_equal(y, jnp.broadcast_to(bias, shape))
            chex.assert_trees_all_equal(gradient, jnp.zeros(shape))
    assert [w.category for w in caught] == [UserWarning]
    assert "one value a feature" in str(caught[0].message)
    assert str(list(shape)) in str(caught[0].message)
    assert caught[0].filename == __file__


def test_one_example_of_many_positions_and_prediction_of_one_do_not_warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(normal((1, 2, 2, 3)))
        batch_norm(normal((1, 3)), *init(3), train=False)
    assert not caught


@pytest.mark.parametrize(
    "options",
    [
        {"train": False, "update_state": True},
        {"train": True, "statistics": BatchNormState(jnp.zeros(3), jnp.ones(3))},
    ],
)
def test_one_example_that_other_statistics_normalise_does_not_warn(options):
    x = normal((1, 3))
    y, _ = batch_norm(x, *init(3), **options)  # warnings are errors in this suite
    np.testing.assert_allclose(y, x, rtol=1e-4)


def test_integer_weights_equal_repeated_rows():
    x, repeats = np.asarray(normal((5, 3), mean=1.0)), np.array([2, 0, 1, 3, 1])
    y, state = compiled_step(x, weights=repeats)
    rows = np.repeat(np.arange(5), repeats)
    expected_y, expected_state = compiled_step(x[rows])
    y = np.asarray(y)[rows]
    chex.assert_trees_all_close(y, expected_y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5)


def test_real_weights_normalise_by_the_weighted_moments():
    x, w = normal((4, 2, 3)), np.random.default_rng(1).uniform(0, 2, (4, 2))
    y, state = compiled_step(x, weights=np.float32(w), momentum=0.0)
    expected, batch = reference.batch_norm(x, weights=w[..., None])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert_moments_close((batch.count, *state), batch)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_left_out_row_changes_neither_output_state_nor_gradient(bad):
    x = np.array(normal((5, 3), mean=1.0))
    x[3] = bad
    present = np.array([True, True, True, False, True])
    rest = x[present]
    gamma = np.float32([2.0, 1.0, -1.0])

    def total(x, scale, present):
        y, state = train_step(x, scale=scale, weights=present)
        if present is not None:
            y = jnp.where(present[:, None], y, 0)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.var), (y, state)

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (value, (y, state)), (dx, dscale) = jax.device_get(gradient(x, gamma, present))
    (expected, (rest_y, rest_state)), rest_gradients = gradient(rest, gamma, None)
    chex.assert_trees_all_close(
        (value, y[present], state), (expected, rest_y, rest_state), rtol=1e-5, atol=1e-6
    )
    chex.assert_tree_all_finite((dx, dscale))
    chex.assert_trees_all_close(
        (dx[present], dscale), rest_gradients, rtol=1e-4, atol=1e-5
    )
    chex.assert_trees_all_equal(dx[3], np.zeros(3, np.float32))


def test_a_total_weight_of_zero_keeps_the_state_and_normalises_by_it():
    x, params = normal((4, 2)), BatchNormParams(jnp.array([2.0, 3.0]), jnp.ones(2))
    state = BatchNormState(jnp.array([1.0, -2.0]), jnp.array([4.0, 0.25]))

    def total(x, params, train):
        weights = jnp.zeros(4) if train else None
        y, new = batch_norm(x, params, state, train=train, weights=weights)
        return jnp.sum(y**2) + jnp.sum(new.var), (y, new)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    gradient = jax.jit(gradient, static_argnums=2)
    train, predict = (gradient(x, params, train) for train in (True, False))
    chex.assert_tree_all_finite(train)
    chex.assert_trees_all_close(train, predict, rtol=1e-6)
    chex.assert_trees_all_equal(train[0][1][1], state)


def test_features_without_weight_keep_their_own_state():
    x = np.asarray(normal((4, 2), mean=3.0))
    weights = np.float32([[1.0, 0.0]] * 4)
    y, state = jax.device_get(compiled_step(x, weights=weights, momentum=0.0))
    assert_moments_close((4, *state), ([4, 4], [x[:, 0].mean(), 0], [x[:, 0].var(), 1]))
    np.testing.assert_allclose(y[:, 1], x[:, 1] / np.sqrt(1 + EPSILON), rtol=1e-5)


def test_output_is_invariant_to_shift_and_scale_of_x():
    # With (a x + b): mean a m + b, variance a^2 v, so y is unchanged for a > 0 but
    # for epsilon, which scales with a^2 too.
    x = np.asarray(normal((32, 3)))
    y, _ = compiled_step(x, epsilon=EPSILON)
    for a, b in ((4.0, 0.0), (1.0, 100.0), (0.25, -8.0)):
        moved, _ = compiled_step(a * x + b, epsilon=EPSILON * a**2)
        chex.assert_trees_all_close(moved, y, atol=1e-4)
    flipped, _ = compiled_step(-x, epsilon=EPSILON)
    chex.assert_trees_all_close(flipped, -np.asarray(y), atol=1e-6)


def test_a_permutation_of_the_rows_permutes_the_output():
    x = np.asarray(normal((16, 3)))
    order = np.random.default_rng(0).permutation(16)
    y, state = compiled_step(x)
    permuted, permuted_state = compiled_step(x[order])
    y = np.asarray(y)[order]
    chex.assert_trees_all_close(permuted, y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(permuted_state, state, rtol=1e-5)


def test_update_average_ignores_an_empty_batch():
    state = BatchNormState(jnp.array([1.0]), jnp.array([2.0]))
    empty = Moments(jnp.float32(0), jnp.array([0.0]), jnp.array([0.0]))
    chex.assert_trees_all_equal(update_average(state, empty), state)


@pytest.mark.parametrize(
    "epsilon",
    [jnp.float32(-100), np.array(0.0), np.float64(np.nan), jnp.inf, np.float32([1, 0])],
)
def test_epsilon_that_is_known_is_refused_whatever_type_it_has(epsilon):
    x, (params, state) = normal((4, 2)), init(2)
    for call in (
        lambda: batch_norm(x, params, state, train=True, epsilon=epsilon),
        lambda: normalize(x, *state, epsilon=epsilon),
        lambda: jax.jit(lambda x: normalize(x, *state, epsilon=epsilon))(x),
        lambda: layer_norm(x, params, EmptyState(), train=True, epsilon=epsilon),
        lambda: scale(x, params, init_scale(2)[1], train=True, epsilon=epsilon),
        lambda: batch_renorm(x, *init_renorm(2), train=True, epsilon=epsilon),
        lambda: quantile_norm(x, *init_quantile(2), train=True, epsilon=epsilon),
    ):
        with pytest.raises(ValueError, match=r"epsilon=.*greater than 0 and finite"):
            call()


@pytest.mark.parametrize(
    "momentum",
    [jnp.float32(2), np.array(-0.1), jnp.bfloat16(jnp.nan), np.array([0.5, 1.5]), 1j],
)
def test_momentum_that_is_known_is_refused_whatever_type_it_has(momentum):
    x, (params, state) = normal((4, 2)), init(2)
    for call in (
        lambda: batch_norm(x, params, state, train=True, momentum=momentum),
        lambda: update_average(state, measure(x), momentum=momentum),
        lambda: jax.jit(lambda m: update_average(state, m, momentum=momentum))(
            measure(x)
        ),
        lambda: debiased_momentum(momentum, 1),
        lambda: center(x, params, init_center(2)[1], train=True, momentum=momentum),
        lambda: batch_renorm(x, *init_renorm(2), train=True, momentum=momentum),
        lambda: quantile_norm(x, *init_quantile(2), train=True, momentum=momentum),
    ):
        with pytest.raises(ValueError, match=r"momentum=.*old average, in \[0, 1\]"):
            call()


@pytest.mark.parametrize("num_batches", [-1, jnp.float32(-1), np.array([1.0, np.inf])])
def test_a_number_of_batches_that_cannot_be_is_refused(num_batches):
    for call in (
        lambda: cumulative_momentum(num_batches),
        lambda: debiased_momentum(0.9, num_batches),
    ):
        with pytest.raises(ValueError, match="num_batches=.*old average, 0 or more"):
            call()


def test_numbers_of_any_type_that_are_in_range_are_taken_as_pythons():
    x, (params, state) = normal((4, 2)), init(2)
    expected = run(x, params, state, train=True, momentum=0.5)
    for number in (np.float32, np.array, jnp.float32, lambda m: jnp.full(2, m)):
        got = batch_norm(x, params, state, train=True, momentum=number(0.5))
        chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)


# Few shapes, so that compiled steps are used again.
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    layout=st.sampled_from([((6, 3), -1), ((2, 3, 4), 1), ((3, 4, 2, 2, 2), 0)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    std=st.floats(1e-3, 1e3),
    mean=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31),
    weighted=st.booleans(),
)
def test_output_and_state_are_those_of_float64_numpy(
    layout, dtype, std, mean, seed, weighted
):
    shape, feature_axis = layout
    x = normal(shape, mean=mean, std=std, seed=seed, dtype=dtype)
    weights = None
    if weighted:
        keep = [s if a == (feature_axis == 0) else 1 for a, s in enumerate(shape)]
        weights = np.random.default_rng(seed).integers(0, 3, keep) + 0.5
    y, state = compiled_step(
        x,
        feature_axis=feature_axis,
        momentum=0.0,
        weights=None if weights is None else np.float32(weights),
    )
    expected, batch = reference.batch_norm(
        x, weights=weights, feature_axis=feature_axis
    )
    # The float32 mean is rounded, which moves y by the rounding over the deviation.
    rounding = 2.0**-23 * np.max(np.abs(batch.mean))
    assert_moments_close(
        (batch.count, *state), batch, rtol=2e-5, atol=1e-6 * std**2 + rounding**2
    )
    deviation = np.sqrt(np.min(batch.var) + EPSILON)
    np.testing.assert_allclose(
        np.float64(y),
        expected,
        rtol=float(jnp.finfo(dtype).eps) + 1e-5,
        atol=1e-5 + 2 * rounding / deviation,
    )
