import functools

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bn_jax import BatchNormParams
from bn_jax.contract import EmptyState
from bn_jax.variants import per_example
from marks import slow_but
from reference import normal

X = normal((5, 4, 3, 6), mean=1.0, std=2.0)  # [N, H, W, C]
PARAMS = BatchNormParams(jnp.arange(1.0, 7.0), jnp.arange(-3.0, 3.0))
NONE = BatchNormParams(None, None)
EMPTY = EmptyState()


def group_norm(x, params, **options):
    return output(per_example.group_norm, x, params, **options)


def layer_norm(x, params, **options):
    return output(per_example.layer_norm, x, params, **options)


def instance_norm(x, params, **options):
    return output(per_example.instance_norm, x, params, **options)


def output(norm, x, params, **options):
    """Return y in training mode; the state is given back as it is."""
    y, state = norm(x, params, EMPTY, train=True, **options)
    assert state is EMPTY
    return y


@functools.cache
def compiled(norm, **options):
    """Return a norm with these options, compiled."""
    return jax.jit(functools.partial(norm, **options))


@functools.partial(jax.jit, static_argnums=0)
def flax_result(module, x):
    return module.apply({"params": PARAMS._asdict()}, x)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm_is_flaxs(groups):
    module = flax.linen.GroupNorm(num_groups=groups, epsilon=1e-5)
    y = compiled(group_norm, num_groups=groups)(X, PARAMS)
    np.testing.assert_allclose(y, flax_result(module, X), rtol=1e-5, atol=1e-5)


def test_layer_norm_is_flaxs_over_all_but_the_batch():
    module = flax.linen.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3))
    y = compiled(layer_norm)(X, PARAMS)
    np.testing.assert_allclose(y, flax_result(module, X), rtol=1e-5, atol=1e-5)


def test_instance_norm_is_flaxs():
    module = flax.linen.InstanceNorm(epsilon=1e-5)
    y = compiled(instance_norm)(X, PARAMS)
    np.testing.assert_allclose(y, flax_result(module, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_is_the_formula_in_float64(groups):
    x = np.float64(X).reshape(5, 12, groups, 6 // groups)
    mean, var = (f(x, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((x - mean) / np.sqrt(var + 1e-5)).reshape(X.shape)
    expected = expected * np.float64(PARAMS.scale) + np.float64(PARAMS.bias)
    y = compiled(group_norm, num_groups=groups)(X, PARAMS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "feature_axis", "batch_axis"),
    [((3, 1, 2, 0), 0, 3), ((0, 3, 1, 2), 1, 0), ((1, 3, 0, 2), 1, -2)],
)
def test_layout_does_not_matter(order, feature_axis, batch_axis):
    expected = compiled(group_norm, num_groups=3)(X, PARAMS)
    axes = {"feature_axis": feature_axis, "batch_axis": batch_axis}
    in_order = compiled(group_norm, num_groups=3, **axes)
    y = in_order(np.transpose(np.asarray(X), order), PARAMS)
    expected = np.transpose(np.asarray(expected), order)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [layer_norm, instance_norm])
def test_examples_do_not_see_each_other(norm):
    norm = compiled(norm)
    y = np.asarray(norm(X, PARAMS))
    others = np.array(X)
    others[1:] = 7.0
    np.testing.assert_array_equal(np.asarray(norm(others, PARAMS))[0], y[0])
    backwards = norm(np.asarray(X)[::-1], PARAMS)
    np.testing.assert_allclose(backwards, y[::-1], rtol=1e-5, atol=1e-6)


def test_shift_and_scale_of_an_example_do_not_matter():
    factors = np.arange(1.0, 6.0, dtype=np.float32).reshape(5, 1, 1, 1)
    norm = compiled(layer_norm, epsilon=1e-12)
    y = norm(X, PARAMS)
    scaled = norm(np.asarray(X) * factors + 10 * factors, PARAMS)
    np.testing.assert_allclose(scaled, y, rtol=1e-4, atol=1e-4)


def test_mean_far_beyond_the_deviation_costs_few_digits():
    far = np.float64(X) * 1e-2 + 100
    y = compiled(layer_norm)(np.float32(far), NONE)
    exact = np.float64(np.float32(far))
    axes = {"axis": (1, 2, 3), "keepdims": True}
    var = exact.var(**axes) + 1e-5
    np.testing.assert_allclose(y, (exact - exact.mean(**axes)) / var**0.5, atol=2e-3)


@pytest.mark.parametrize("groups", slow_but([2], [1, 2, 6]))
def test_gradients_are_those_of_finite_differences(x64, groups):
    x = normal((2, 3, 6), dtype=jnp.float64)
    params = jax.tree.map(np.float64, PARAMS)
    y = compiled(group_norm, num_groups=groups)
    check_grads(y, (x, params), order=2, rtol=1e-3)


def test_bfloat16_is_widened_and_given_back():
    x = np.asarray(X).astype(jnp.bfloat16)
    y = compiled(layer_norm)(x, PARAMS)
    assert y.dtype == jnp.bfloat16
    wide = compiled(layer_norm)(x.astype(np.float32), PARAMS)
    y = np.asarray(y).astype(np.float32)
    chex.assert_trees_all_close(y, wide, rtol=1e-2, atol=1e-2)


def test_one_value_a_group_is_warned_of():
    with pytest.warns(UserWarning, match="one value a group.*y equals beta"):
        y = compiled(instance_norm)(np.asarray(X)[:, 0, 0], PARAMS)
    np.testing.assert_array_equal(y, np.broadcast_to(PARAMS.bias, (5, 6)))


@pytest.mark.parametrize("norm", [layer_norm, instance_norm])
@pytest.mark.parametrize("shape", [(0, 6), (0, 4, 3, 6), (5, 0, 3, 6)])
def test_what_is_empty_stays_so_without_a_warning(norm, shape):
    assert norm(np.zeros(shape, np.float32), PARAMS).shape == shape


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_groups": 4}, "num_groups=4 does not divide the 6 features.*divisor"),
        ({"num_groups": 0}, "num_groups=0; expected"),
        ({"num_groups": None}, "num_groups=None; expected"),
        ({"batch_axis": 0.5}, "batch_axis=0.5 is not an axis.*one integer"),
        ({"epsilon": 0}, "epsilon=0; expected a number greater than 0"),
        ({"feature_axis": 4}, "feature_axis=4"),
        ({"feature_axis": (1, 2)}, r"feature_axis=\(1, 2\).*one integer"),
        ({"batch_axis": -5}, "batch_axis=-5 is not an axis of x of shape"),
        ({"batch_axis": 3}, "batch_axis=3 and feature_axis=-1 are the same axis"),
        ({"feature_axis": 1}, r"scale has shape \[6\]"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        group_norm(X, PARAMS, **{"num_groups": 2, **bad})


def test_axes_may_be_integers_of_numpy():
    axis = np.int64(X.ndim - 1)
    expected = group_norm(X, PARAMS, num_groups=2)
    chex.assert_trees_all_equal(
        group_norm(X, PARAMS, num_groups=2, feature_axis=axis), expected
    )


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expected rank 2 or more"):
        layer_norm(X[0, 0, 0], PARAMS)
    with pytest.raises(TypeError, match="int32.*floating-point"):
        layer_norm(X.astype(jnp.int32), PARAMS)
