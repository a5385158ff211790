import functools
import itertools
from statistics import NormalDist

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bn_jax import BatchNormParams
from bn_jax.variants.quantile import QuantileState, init, quantile_norm
from marks import slow_but
from reference import normal

X_NUMPY = np.asarray(normal((512, 3))) * np.float32([1.0, 2.0, 5.0]) + 3
X = jnp.asarray(X_NUMPY)
NONE = BatchNormParams(None, None)
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
TARGETS = ["uniform", "gaussian"]


@functools.cache
def compiled(**options):
    """Return `quantile_norm` with these options, compiled."""
    return jax.jit(functools.partial(quantile_norm, **options))


def transformed(
    x, params=None, target="uniform", num_quantiles=64, epsilon=1e-3, **options
):
    """Return y in training mode, by default of gamma 1 and beta 0."""
    shape = {"target": target, "num_quantiles": num_quantiles}
    initial, state = init(x.shape[-1], dtype=x.dtype, **shape)
    params = initial if params is None else params
    options = {"train": True, **shape, **options}
    if isinstance(x, jax.core.Tracer):
        return quantile_norm(x, params, state, epsilon=epsilon, **options)[0]
    return np.asarray(compiled(**options)(x, params, state, epsilon=epsilon)[0])


def run(x, params, state, **options):
    """Return `quantile_norm`, compiled."""
    return compiled(**options)(x, params, state)


def inverse(target, p):
    """Return the target's quantiles in float64."""
    if target == "uniform":
        return 12**0.5 * (np.asarray(p) - 0.5)
    return np.vectorize(NormalDist().inv_cdf)(p)


def loss(y):
    """Return a loss with no symmetry that would hide a term."""
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.sum(jnp.sin(coefficients * y))


@functools.cache
def gradient_of(**options):
    """Return a compiled function of the gradient of the loss, and y."""

    def loss_and_y(x, params):
        y = transformed(x, params, **options)
        return loss(y), y

    gradient = jax.jit(jax.grad(loss_and_y, has_aux=True))
    return lambda x, params: jax.device_get(gradient(x, params))


@pytest.mark.parametrize("target", TARGETS)
def test_with_a_knot_for_each_value_y_is_the_target_at_its_rank(target):
    x = X_NUMPY[:64]
    y = transformed(x, PARAMS, target, epsilon=1e-9)
    ranks = np.argsort(np.argsort(x, axis=0), axis=0)
    expected = inverse(target, (ranks + 0.5) / 64)
    expected = expected * np.float64(PARAMS.scale) + np.float64(PARAMS.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "num_quantiles"),
    slow_but(
        [("uniform", 2), ("gaussian", 5), ("uniform", 64), ("gaussian", 1000)],
        list(itertools.product(TARGETS, (2, 5, 64, 1000))),
    ),
)
def test_is_the_formula_in_float64(target, num_quantiles):
    # Hazen's quantiles, and lines between them, by NumPy.
    p = (np.arange(num_quantiles) + 0.5) / num_quantiles
    x = np.float64(X)
    knots = np.quantile(x, p, axis=0, method="hazen")
    t = inverse(target, p)
    if num_quantiles == 1000:  # the outermost, clamped to the extremes, are tied
        outer = p < 0.5 / 512
        t = np.where(outer, (t[0] + t[outer][-1]) / 2, t)
        t = np.where(outer[::-1], -t[0], t)
    expected = np.stack([np.interp(x[:, c], knots[:, c], t) for c in range(3)], 1)
    y = transformed(X, target=target, num_quantiles=num_quantiles, epsilon=1e-9)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("distribution", [np.asarray, np.exp, lambda x: x**3])
def test_moments_are_the_targets_whatever_the_data(distribution):
    x = distribution(np.asarray(normal((20_000, 1))))
    y = np.float64(transformed(x, epsilon=1e-7))
    # Clamped at the outer knots: variance (1 - 1/K)^2 (1 + 2/K).
    np.testing.assert_allclose(y.mean(), 0, atol=0.01)
    np.testing.assert_allclose(y.var(), (63 / 64) ** 2 * (1 + 2 / 64), atol=0.01)
    np.testing.assert_allclose((y**4).mean(), 9 / 5, atol=0.05)
    y = np.float64(transformed(x, target="gaussian", epsilon=1e-7))
    # A clamped normal z at +-a: P(|z| < a) - 2 a phi(a) + a^2 P(|z| > a).
    a, n = -NormalDist().inv_cdf(1 / 128), NormalDist()
    inside = 1 - 2 / 128
    clamped = inside - 2 * a * n.pdf(a) + a**2 * (1 - inside)
    np.testing.assert_allclose(y.mean(), 0, atol=0.01)
    np.testing.assert_allclose(y.var(), clamped, atol=0.02)
    assert abs(y.var() - 0.97) < 0.02


@pytest.mark.parametrize("target", TARGETS)
def test_is_monotone_and_bounded_by_the_outer_targets(target):
    ties = X_NUMPY[:100], np.zeros((50, 3), np.float32)
    x = np.sort(np.concatenate([X_NUMPY[:362], *ties]), axis=0)
    y = np.float64(transformed(x, target=target))
    assert (np.diff(y, axis=0) >= -1e-6).all()
    bound = inverse(target, 127 / 128)
    np.testing.assert_allclose([y.min(), y.max()], [-bound, bound], rtol=1e-5)


def test_increasing_maps_of_x_do_not_matter_at_the_knots():
    # 64 values and knots: each value is a knot.
    x = X_NUMPY[:64] / 4
    y = transformed(x, epsilon=1e-9)
    for increasing in (np.exp, np.arctan, lambda x: x**3, lambda x: 7 * x - 1e3):
        np.testing.assert_allclose(
            transformed(increasing(x), epsilon=1e-9), y, atol=2e-3
        )


def test_order_of_the_batch_does_not_matter():
    np.testing.assert_array_equal(transformed(X_NUMPY[::-1]), transformed(X)[::-1])


def test_tied_values_become_the_middle_of_their_targets():
    # Levels of 8 knots: 1/16 ... 15/16. The value 0 holds knots 0 to 3, the others one
    # each: targets of (1/16 + 7/16) / 2 = 1/4, 9/16, 11/16, 13/16, 15/16.
    x = np.float32([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0])[:, None]
    y = transformed(x, num_quantiles=8)
    levels = np.array([4, 4, 4, 4, 9, 11, 13, 15]) / 16
    np.testing.assert_allclose(y[:, 0], inverse("uniform", levels), atol=1e-6)
    zeros = np.float32([0.0, -0.0] * 4)[:, None]
    np.testing.assert_allclose(transformed(zeros, num_quantiles=8), 0, atol=1e-6)


@pytest.mark.parametrize("target", slow_but(["uniform"], TARGETS))
def test_constant_feature_gives_beta_and_no_gradient(target):
    x = X_NUMPY.copy()
    x[:, 1] = 2.5
    g, y = gradient_of(target=target)(x, PARAMS)
    np.testing.assert_allclose(y[:, 1], PARAMS.bias[1], atol=1e-6)
    assert np.all(np.isfinite(g)) and np.all(g[:, 1] == 0)
    assert np.all(np.any(g[:, ::2] != 0, axis=0))


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_gradient_is_finite_and_bounded_with_ties(digits):
    x = np.round(X_NUMPY, digits)
    x[:200] += np.float32(1e-7) * normal((200, 3), seed=1)  # ties broken by rounding
    g, _ = gradient_of(target="uniform")(x, init(3)[0])
    assert np.all(np.isfinite(g))
    # |dy/dx| <= (t_{k+1} - t_k) / (epsilon distance), some tied knots together.
    assert np.max(np.abs(g)) < 512 * 3.5 / 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("target", "num_quantiles"), [("uniform", 4), ("gaussian", 9)])
def test_gradients_are_those_of_finite_differences(x64, target, num_quantiles):
    x = normal((13, 2), dtype=jnp.float64)
    params = BatchNormParams(np.array([0.5, 2.0]), np.array([1.0, 0.0]))

    @jax.jit
    def y(x, params):
        return transformed(x, params, target, num_quantiles)

    check_grads(y, (x, params), order=1, eps=1e-6, rtol=1e-5)


def test_gradient_sees_the_invariances(x64):
    x = np.asarray(normal((64, 3), mean=1.0, dtype=jnp.float64))
    g, _ = gradient_of(num_quantiles=16)(x, NONE)
    np.testing.assert_allclose(np.sum(g, 0), 0, atol=1e-8)
    np.testing.assert_allclose(np.sum(g * x, 0), 0, atol=1e-8)
    assert np.max(np.abs(g)) > 1e-2


def test_tied_values_share_the_gradient_of_their_knot(x64):
    x = np.array([0.0, 1.0, 1.0, 3.0, 7.0, 8.0])[:, None]
    _, state = init(1, num_quantiles=6, dtype=x.dtype)

    def knots(x):
        options = {"train": True, "num_quantiles": 6, "momentum": 0}
        _, moved = quantile_norm(x, NONE, state, **options)
        return moved.knots[1] + 5 * moved.knots[2]

    g = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(knots(x))))(x))
    np.testing.assert_allclose(g[:, 0], [0, 3, 3, 0, 0, 0], atol=1e-12)


@pytest.mark.slow
def test_layout_does_not_matter():
    x = X_NUMPY.reshape(8, 8, 8, 3)
    _, state = init(3)
    expected = run(X, PARAMS, state, train=True)
    for axis in (0, 1, 3):
        y, moved = run(
            np.moveaxis(x, -1, axis), PARAMS, state, train=True, feature_axis=axis
        )
        y = np.moveaxis(np.asarray(y), axis, -1).reshape(X.shape)
        chex.assert_trees_all_close((y, moved), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_prediction_is_training_when_the_batch_is_the_data(target):
    _, state = init(3, target=target)
    options = {"target": target}
    y, state = run(X, PARAMS, state, train=True, momentum=0.0, **options)
    predicted, same = quantile_norm(X, PARAMS, state, train=False, **options)
    np.testing.assert_allclose(predicted, y, rtol=1e-5, atol=1e-5)
    assert same is state


@pytest.mark.parametrize("target", TARGETS)
def test_untrained_prediction_is_the_identity_between_the_outer_knots(target):
    _, state = init(3, target=target)
    bound = inverse(target, 127 / 128)
    x = normal((64, 3))
    y, _ = run(x, NONE, state, train=False, target=target)
    np.testing.assert_allclose(y, np.clip(x, -bound, bound), atol=1e-5)


def test_averages_after_n_steps_are_those_of_the_closed_form():
    m, n, k = 0.8, 4, 16
    _, state = init(3, num_quantiles=k)
    options = {"train": True, "momentum": m, "num_quantiles": k}
    step = jax.jit(functools.partial(quantile_norm, **options))
    expected = m**n * np.float64(state.knots)
    p = (np.arange(k) + 0.5) / k
    for i in range(n):
        x = normal((64, 3), seed=i) + i
        _, state = step(x, NONE, state)
        knots = np.quantile(np.float64(x), p, axis=0, method="hazen")
        expected += (1 - m) * m ** (n - 1 - i) * knots
    np.testing.assert_allclose(state.knots, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "num_devices"),
    slow_but([("pmap", 8)], [("vmap", 4), ("pmap", 2), ("pmap", 8)]),
)
def test_devices_transform_as_one(devices, how, num_devices):
    x = X_NUMPY[:64].copy()
    x[::7] = x[0]  # ties between the devices
    _, state = init(3, num_quantiles=16)
    norm = functools.partial(quantile_norm, train=True, num_quantiles=16)

    def big(x):
        y, new = norm(x, PARAMS, state)
        return loss(y), (y, new)

    def one(x, w):
        forward = functools.partial(norm, params=PARAMS, state=state, axis_name="d")
        (y, new), vjp = jax.vjp(forward, x)
        return y, new, vjp((w * jnp.cos(w * y), jax.tree.map(jnp.zeros_like, new)))[0]

    mapped = {
        "vmap": lambda f: jax.jit(jax.vmap(f, axis_name="d")),
        "pmap": lambda f: jax.pmap(f, axis_name="d", devices=devices[:num_devices]),
    }[how]
    cut = x.reshape(num_devices, -1, 3)
    weights = np.arange(1.0, x.size + 1, dtype=np.float32).reshape(cut.shape) / x.size
    y, states, gradient = jax.device_get(mapped(one)(cut, weights))
    expected = jax.jit(jax.value_and_grad(big, has_aux=True))(x)
    (_, (big_y, big_state)), big_gradient = expected
    chex.assert_trees_all_close(
        (y.reshape(x.shape), gradient.reshape(x.shape)),
        (big_y, big_gradient),
        rtol=1e-4,
        atol=1e-5,
    )
    for knots in states.knots:
        np.testing.assert_allclose(knots, big_state.knots, rtol=1e-6)


def test_bfloat16_is_widened_and_given_back():
    _, state = init(3)
    x = X_NUMPY.astype(jnp.bfloat16)
    y, state = run(x, PARAMS, state, train=True)
    assert y.dtype == jnp.bfloat16 and state.knots.dtype == jnp.float32
    wide = transformed(x.astype(np.float32), PARAMS)
    y = np.asarray(y).astype(np.float32)
    np.testing.assert_allclose(y, wide, rtol=1e-2, atol=1e-2)


def test_mean_far_beyond_the_deviation_costs_few_digits():
    # Where float32 resolves 1e-3, so that knots are off by half of it.
    far = X_NUMPY + np.float32(1e4)
    near = far - np.float32(1e4)
    np.testing.assert_allclose(transformed(far), transformed(near), atol=3e-3)


def test_fewer_values_than_knots_are_still_ordered():
    y = np.float64(transformed(np.float32([[5.0], [1.0], [2.0]])))[:, 0]
    assert y[1] < y[2] < y[0] and y[0] == pytest.approx(-y[1], abs=1e-5)
    y = transformed(X_NUMPY[:1], PARAMS)
    np.testing.assert_allclose(y[0], PARAMS.bias, atol=1e-6)


def test_value_that_is_not_a_number_spoils_itself_alone():
    x = X_NUMPY.copy()
    x[3, 1] = np.nan
    y = transformed(x)
    assert np.isnan(y[3, 1]) and np.sum(np.isnan(y)) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target": "normal"}, "target='normal'; expected uniform or gaussian"),
        ({"num_quantiles": 1}, "num_quantiles=1; expected 2 or more"),
        ({"num_quantiles": 32}, r"knots has shape \[64, 3\].*\[32, 3\].*init\(3"),
        ({"epsilon": 0.0}, "epsilon=0.0; expected a number greater than 0"),
        ({"momentum": -0.1}, r"momentum=-0.1.*in \[0, 1\]"),
        ({"feature_axis": (0, 1)}, "feature_axis"),
        ({"axis_name": "nowhere"}, "axis_name='nowhere' is not bound"),
        ({"x": X[0]}, "expected rank 2 or more"),
        ({"x": X[:0]}, "is empty"),
        ({"x": X[:, :2]}, r"scale has shape \[3\].*\[2\] features"),
        ({"state": QuantileState(jnp.zeros((64, 3), jnp.bfloat16))}, "too narrow"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    _, state = init(3)
    options = {"x": X, "params": PARAMS, "state": state, "train": True, **bad}
    with pytest.raises(ValueError, match=message):
        quantile_norm(**options)


def test_bad_dtypes_and_traced_choices_are_refused():
    _, state = init(3)
    for dtype, message in ((jnp.int32, "int32"), (jnp.complex64, "ranks are of real")):
        with pytest.raises(TypeError, match=message):
            quantile_norm(X.astype(dtype), NONE, state, train=True)
    with pytest.raises(TypeError, match="train must be a Python bool"):
        jax.jit(lambda t: quantile_norm(X, NONE, state, train=t))(True)
