"""`bn_jax.moments` on one device: measuring, weights, merging, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from bn_jax import Moments, measure, merge, merge_stacked
from reference import assert_moments_close, normal

LAYOUTS = [
    ((6, 3), -1),
    ((4, 3, 2, 5), np.int64(1)),
    ((6, 3), 0),
    ((4, 2, 5, 3), -1),
    ((4, 3, 2, 5), 1),
    ((4, 3, 2, 5), -3),
    ((2, 3, 2, 2, 2), 1),
    ((4, 2, 5, 3), (1, -1)),
    ((4, 2, 5, 3), (-1, -3)),
]


@functools.partial(jax.jit, static_argnames="feature_axis")
def measured(x, feature_axis=-1, weights=None):
    """Return `measure`, compiled."""
    return measure(x, feature_axis=feature_axis, weights=weights)


@pytest.mark.parametrize("shape,feature_axis", LAYOUTS)
def test_moments_are_over_all_axes_but_the_feature_axes(shape, feature_axis):
    x = normal(shape, mean=2.0, std=3.0)
    got = measured(x, feature_axis)
    expected = reference.moments(x, feature_axis=feature_axis)
    assert got.count.shape == () and got.count == x.size // expected.mean.size
    assert_moments_close(got, expected)


def test_variance_is_biased():
    # Values 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, over n = 3.
    got = measured(np.float32([[1.0], [2.0], [6.0]]))
    assert_moments_close(got, (3.0, [3.0], [14 / 3]))


@pytest.mark.parametrize("mean", [1.0, 1e2, -1e4])
def test_variance_holds_where_the_mean_is_large_beside_the_deviation(mean):
    x = normal((256, 8), mean=mean)
    assert_moments_close(measured(x), reference.moments(x), rtol=1e-4)


@pytest.mark.parametrize("shape", [(1600, 2), (16, 10, 10, 2)])
def test_variance_holds_where_the_values_it_is_taken_about_lie_far_off(shape):
    # The first sixteenth, whose mean the moments are taken about, is 1e6 deviations of
    # the rest away: sqrt(15) deviations of all. A sum of 1600 equal squares is rounded
    # by 2e-5, of which the variance gets 16 times as much at worst.
    x = np.array(normal(shape))
    x[: shape[0] // 16] += 1e6
    assert_moments_close(measured(x), reference.moments(x), rtol=3e-4)


def test_variance_of_a_constant_is_never_negative():
    # Unequal weights make E[(x - c)^2] - delta^2 round below 0 for many of these.
    constants = np.asarray(normal((1, 1024), mean=3.0, std=100.0))
    weights = np.float32(np.random.default_rng(0).uniform(0.1, 1, 64))
    var = np.asarray(measured(np.tile(constants, (64, 1)), weights=weights).var)
    assert np.all(var >= 0)
    assert np.all(var <= (1e-6 * constants) ** 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_measured_in_float32(dtype):
    # 300 squared is beyond float16's largest number, 65504.
    x = normal((64, 4), mean=300.0, std=20.0, dtype=dtype)
    got = measured(x)
    chex.assert_trees_all_equal_dtypes(got, Moments(*[jnp.zeros((), jnp.float32)] * 3))
    assert_moments_close(got, reference.moments(x))


def test_float64_is_measured_in_float64(x64):
    x = normal((64, 4), mean=1e6, dtype=jnp.float64)
    got = measured(x)
    assert got.mean.dtype == got.var.dtype == got.count.dtype == jnp.float64
    assert_moments_close(got, reference.moments(x), rtol=1e-9)


def test_numpy_input_needs_no_conversion():
    # NumPy's default is float64, which JAX reads as float32 unless told otherwise.
    x = np.random.default_rng(0).normal(size=(8, 3))
    got = measure(x, weights=np.ones(8))
    assert got.mean.dtype == jnp.float32
    assert_moments_close(got, reference.moments(x))


def test_an_empty_set_has_moments_of_zero():
    assert_moments_close(measured(np.zeros((0, 2))), (0.0, [0.0, 0.0], [0.0, 0.0]))


def test_integer_weights_equal_repeated_rows():
    x = np.asarray(normal((5, 3), mean=1.0))
    repeats = np.array([2, 0, 1, 3, 1])
    got = measured(x, weights=repeats)
    assert_moments_close(got, measured(np.repeat(x, repeats, axis=0)))


def test_real_weights_are_relative_frequencies():
    # Weight 0.5 on 0 and 1.5 on 4: mean 6 / 2 = 3, variance (0.5 9 + 1.5 1) / 2 = 3.
    got = measured(np.float32([[0.0], [4.0]]), weights=np.float32([0.5, 1.5]))
    assert_moments_close(got, (2.0, [3.0], [3.0]))


@pytest.mark.parametrize(
    "weights_shape",
    [
        (4,),
        (4, 2, 5),
        (4, 1, 1),
        (4, 1, 1, 1),
        (1, 2, 1, 1),
        (1, 1, 1, 3),
        (4, 2, 5, 3),
    ],
)
@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_weights_broadcast_over_examples_positions_and_features(
    weights_shape, feature_axis
):
    x = np.moveaxis(np.asarray(normal((4, 2, 5, 3))), -1, feature_axis)
    w = np.random.default_rng(1).uniform(0, 2, weights_shape)
    full = w if w.ndim == 4 else w.reshape(w.shape + (1,) * (4 - w.ndim))
    if w.ndim == 4:
        w = np.moveaxis(w, -1, feature_axis)
    elif w.ndim == 1:
        w = w.reshape(4, 1, 1)
    full = np.moveaxis(np.broadcast_to(full, (4, 2, 5, 3)), -1, feature_axis)
    expected = reference.moments(x, full, feature_axis)
    got = measured(x, feature_axis, np.float32(w))
    assert got.count.shape in ((), (3,))
    assert_moments_close(got, expected)


def test_weights_of_rank_one_of_a_higher_rank_are_refused_not_guessed():
    with pytest.raises(ValueError, match=r"weights\[:, None, None\]"):
        measure(jnp.zeros((4, 2, 5, 3)), weights=jnp.ones(4))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            jnp.array([1.0, jnp.inf]),
            "finite numbers, but the greatest is inf.*give it 1",
        ),
        (np.array([np.inf, 0.0]), "finite numbers, but the greatest is inf"),
        (np.array([-np.inf, 0.0]), "non-negative numbers, but the least is -inf"),
        (jnp.array([1j, 1.0]), "dtype complex64; expected real numbers"),
    ],
)
def test_weights_that_are_infinite_or_complex_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        measure(jnp.ones((2, 3)), weights=weights)
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda x: measure(x, weights=weights))(jnp.ones((2, 3)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_row_of_weight_zero_is_absent_whatever_it_holds(bad):
    x = np.array(normal((4, 3)))
    x[1] = bad
    present = np.array([True, False, True, True])

    def total(x, present):
        got = measure(x, weights=present)
        return sum(jnp.sum(m) for m in got), got

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(x, present)
    gradient = np.asarray(gradient)
    assert_moments_close(got, measured(x[present]))
    # d mean / dx = 1 / n and d var / dx = 2 (x - mean) / n, for the n = 3 present.
    expected = (1 + 2 * (x[present] - x[present].mean(0))) / 3
    chex.assert_trees_all_close(gradient[present], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(gradient[1], np.zeros(3, np.float32))


def test_weights_of_zero_give_zeros_and_zero_gradients():
    def total(x):
        got = measure(x, weights=jnp.zeros(4))
        return jnp.sum(got.mean + got.var), got

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(normal((4, 2)))
    assert_moments_close(got, (0.0, [0.0, 0.0], [0.0, 0.0]))
    chex.assert_trees_all_equal(gradient, np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_weights_may_be_closed_over_by_jit(shape):
    x, weights = normal((6, 3)), jnp.asarray(np.arange(6.0).reshape(shape))
    got = jax.jit(lambda x: measure(x, weights=weights))(x)
    assert_moments_close(got, measured(x, weights=weights))


def test_derivatives_agree_with_finite_differences_to_second_order(x64):
    x = normal((4, 2), mean=1.0, dtype=jnp.float64)
    weights = jnp.array([0.5, 1.0, 2.0, 0.25])
    check_grads(jax.jit(lambda x: measure(x)[1:]), (x,), order=2)
    check_grads(jax.jit(lambda x, w: measure(x, weights=w)), (x, weights), order=1)


def test_hessian_of_the_variance_is_constant_and_holds_at_a_constant_feature(x64):
    # var = sum x^2 / n - (sum x / n)^2, so its hessian is 2 (I - 1/n) / n everywhere.
    n = 5
    expected = 2 * (np.eye(n) - 1 / n) / n
    hessian = jax.jit(jax.hessian(lambda x: measure(x[:, None]).var[0]))
    for x in (normal((n,), dtype=jnp.float64), np.full(n, 0.1)):
        chex.assert_trees_all_close(np.asarray(hessian(x)), expected, atol=1e-12)


def test_merge_is_that_of_the_union_for_unequal_counts():
    # {0, 2} has mean 1, var 1; {10} mean 10, var 0. {0, 2, 10}: mean 4, var 56 / 3.
    a, b = (measured(np.float32(x)) for x in ([[0.0], [2.0]], [[10.0]]))
    for merged in (jax.jit(merge)(a, b), jax.jit(merge)(b, a)):
        assert_moments_close(merged, (3.0, [4.0], [56 / 3]))


def measured_in_parts(x, splits):
    parts = [measure(part) for part in jnp.split(x, list(splits))]
    return merge_stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


@pytest.mark.parametrize("splits", [(1,), (5,), (0,), (10,), (2, 3, 9)])
# A float32 mean of 1e4 is rounded to 5e-4, so a variance of 1 between means to 1e-3.
@pytest.mark.parametrize("mean,rtol", [(0.0, 1e-5), (1e4, 1e-3)])
def test_merge_stacked_equals_measuring_at_once(splits, mean, rtol):
    x = normal((10, 3), mean=mean)
    got = jax.jit(measured_in_parts, static_argnums=1)(x, splits)
    assert_moments_close(got, reference.moments(x), rtol=rtol)


def test_merge_with_an_empty_set_changes_nothing():
    x = np.asarray(normal((4, 2), mean=1e4))
    full, empty = measured(x), measured(x[:0])
    for merged in (jax.jit(merge)(full, empty), jax.jit(merge)(empty, full)):
        assert_moments_close(merged, full, rtol=1e-6)
    assert_moments_close(jax.jit(merge)(empty, empty), empty)


def test_merge_keeps_the_variance_between_sets_of_constants():
    # Means 0, 1e4 and 2e4 with no variance inside: variance 2/3 1e8.
    means = np.array([[0.0], [1e4], [2e4]])
    stacked = Moments(*map(np.float32, (np.ones(3), means, np.zeros((3, 1)))))
    got = jax.jit(merge_stacked)(stacked)
    assert_moments_close(got, (3.0, [1e4], [2 / 3 * 1e8]))


def test_merge_is_exact_where_features_have_their_own_counts():
    x = np.asarray(normal((6, 3), mean=1.0))
    w = np.float32(np.random.default_rng(2).integers(0, 2, (6, 3)))
    merged = jax.jit(merge)(
        *(measured(a, weights=b) for a, b in ((x[:2], w[:2]), (x[2:], w[2:])))
    )
    assert_moments_close(merged, measured(x, weights=w))


def test_merge_joins_a_shared_count_with_counts_per_feature():
    x = np.asarray(normal((6, 3), mean=1.0))
    w = np.float32([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    merged = jax.jit(merge)(measured(x[:4]), measured(x[4:], weights=w))
    full = np.concatenate([np.ones((4, 3), np.float32), w])
    assert_moments_close(merged, measured(x, weights=full))


def test_merge_has_the_gradient_of_the_union(x64):
    x = normal((6, 2), mean=3.0, dtype=jnp.float64)

    def at_once(x):
        return jnp.sum(jnp.sin(measure(x).mean) * measure(x).var)

    def merged(x):
        got = merge(measure(x[:1]), measure(x[1:]))
        return jnp.sum(jnp.sin(got.mean) * got.var)

    @jax.jit
    def derivatives(x):
        return [(jax.grad(f)(x), jax.hessian(f)(x)) for f in (merged, at_once)]

    got, expected = derivatives(x)
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)


def test_measure_is_traced_once_for_a_shape_and_agrees_under_jit():
    measure_once = jax.jit(chex.assert_max_traces(lambda x: measure(x), n=1))
    for seed in range(3):
        x = normal((6, 3), seed=seed)
        chex.assert_trees_all_close(measure_once(x), measure(x), rtol=1e-6)
