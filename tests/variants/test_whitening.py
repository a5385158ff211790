import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bn_jax import BatchNormParams, batch_norm
from bn_jax import init as init_batch_norm
from bn_jax.variants.whitening import WhiteningState, init, whiten
from bn_jax.variants.whitening_matrices import inverse_square_root
from marks import slow_but
from reference import normal

EXACT = ["zca", "pca", "cholesky"]
METHODS = [*EXACT, "iternorm"]
MIX = np.asarray(normal((6, 6), seed=1)) + 2 * np.eye(6, dtype=np.float32)
X_NUMPY = np.asarray(normal((512, 6))) @ MIX + 3
X = jnp.asarray(X_NUMPY)
ROTATION = np.float32(np.linalg.qr(normal((6, 6), seed=2))[0])
NONE = BatchNormParams(None, None)
PARAMS = BatchNormParams(jnp.arange(1.0, 7.0), jnp.arange(-3.0, 3.0))


def covariance(x):
    """Return the biased covariance of `[N, C]` in float64."""
    return np.cov(np.float64(x).T, bias=True)


@functools.cache
def compiled(**options):
    """Return `whiten` with these options, compiled."""
    return jax.jit(functools.partial(whiten, **options))


def whitened(x, params=None, group_size=None, epsilon=1e-5, **options):
    """Return y in training mode, by default of gamma 1 and beta 0."""
    initial, state = init(x.shape[-1], group_size=group_size, dtype=x.dtype)
    options = {"train": True, "group_size": group_size, **options}
    params = initial if params is None else params
    if isinstance(x, jax.core.Tracer):
        return whiten(x, params, state, epsilon=epsilon, **options)[0]
    return np.asarray(compiled(**options)(x, params, state, epsilon=epsilon)[0])


@functools.cache
def gradient_of(**options):
    """Return a compiled function of the gradient of the loss, and y."""

    def loss_and_y(x, epsilon):
        y = whitened(x, epsilon=epsilon, **options)
        return loss(y), y

    gradient = jax.jit(jax.grad(loss_and_y, has_aux=True))
    return lambda x, epsilon=1e-5: jax.device_get(gradient(x, epsilon))


def loss(y):
    """Return a loss with no symmetry that would hide a term."""
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.sum(jnp.sin(coefficients * y))


@pytest.mark.parametrize(
    ("method", "group_size"),
    slow_but(
        [("zca", None), ("zca", 3), ("pca", None), ("cholesky", 2), ("zca", 1)],
        list(itertools.product(EXACT, (None, 1, 2, 3))),
    ),
)
def test_output_of_each_group_has_mean_0_and_covariance_identity(method, group_size):
    y = whitened(X, method=method, group_size=group_size, epsilon=1e-8)
    np.testing.assert_allclose(np.mean(np.float64(y), 0), 0, atol=1e-4)
    for group in np.split(np.float64(y), 6 // (group_size or 6), axis=1):
        np.testing.assert_allclose(
            np.atleast_2d(covariance(group)), np.eye(group.shape[1]), atol=1e-4
        )


def test_groups_do_not_see_each_other():
    y = whitened(X, group_size=3)
    apart = [whitened(x) for x in np.split(X_NUMPY, 2, axis=1)]
    np.testing.assert_allclose(y, np.concatenate(apart, 1), rtol=1e-4, atol=1e-5)


def test_groups_of_one_feature_are_batch_norm():
    y, _ = jax.jit(functools.partial(batch_norm, train=True))(X, *init_batch_norm(6))
    for method in EXACT:
        np.testing.assert_allclose(
            whitened(X, method=method, group_size=1), y, rtol=1e-4, atol=1e-5
        )


def reference_matrix(method, sigma, num_iterations=5):
    """Return the whitening matrix by NumPy in float64.

    Sigma = L L^T and L = U s V^T give Sigma^(-1/2) = U V^T L^-1, and V^T L^-1 for pca.
    Of eigenvalues from 1e-5 to 1e8, eigh loses the least; L has their roots.
    """
    lower = np.linalg.cholesky(sigma)
    u, s, vt = np.linalg.svd(lower)
    if method == "pca":
        u, signs = 1, np.sign(u[np.abs(u).argmax(0), np.arange(len(u))])
        vt = signs[:, None] * vt
    if method == "iternorm":
        share, p = s**2 / np.sum(s**2), 1.0
        for _ in range(num_iterations):
            p = (3 * p - p**3 * share) / 2
        vt = (p * np.sqrt(share))[:, None] * vt
    rotation = np.eye(len(s)) if method == "cholesky" else np.dot(u, vt)
    return np.linalg.solve(lower.T, rotation.T).T


def reference(x, method, epsilon, group_size):
    """Return y by NumPy in float64, of gamma 1 and beta 0."""
    groups = np.split(x - x.mean(0), x.shape[1] // group_size, axis=1)
    sigmas = [g.T @ g / len(g) + epsilon * np.eye(group_size) for g in groups]
    whitened_ = [
        g @ reference_matrix(method, s).T for g, s in zip(groups, sigmas, strict=True)
    ]
    return np.concatenate(whitened_, axis=1)


def by_differences(f, x):
    """Return the gradient of f by differences of a thousandth of each deviation."""
    gradient = np.empty_like(x)
    steps = 1e-3 * x.std(0)
    for i, j in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i, j] = steps[j]
        gradient[i, j] = (f(x + step) - f(x - step)) / (2 * steps[j])
    return gradient


@pytest.mark.parametrize("method", EXACT)
def test_is_the_methods_formula_in_float64(method):
    x, epsilon = np.float64(X), 0.01
    w = reference_matrix(method, covariance(x) + epsilon * np.eye(6))
    expected = (x - x.mean(0)) @ w.T * np.arange(1.0, 7.0) + np.arange(-3.0, 3.0)
    y = whitened(X, PARAMS, method=method, epsilon=epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("method", "group_size"),
    slow_but([(m, 6) for m in METHODS], list(itertools.product(METHODS, (6, 3)))),
)
@pytest.mark.parametrize("epsilon", slow_but([1e-5], [1e-5, 1e-3]))
def test_features_of_unlike_scales_are_whitened_as_in_float64(
    method, group_size, epsilon
):
    # Of the covariance's entries, 1e-8 to 1e8, the largest round to multiples of 8.
    weights = np.float64(normal((40, 6), seed=5))
    value_and_gradient = value_and_gradient_of(method=method, group_size=group_size)
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        x = np.float32(X_NUMPY[:40] * np.geomspace(1e-4, 1e4, 6)[order])
        y, gradient = value_and_gradient(x, np.float32(weights), epsilon)

        def exact(x):
            return reference(x, method, epsilon, group_size)

        assert_close_by_feature(y, exact(np.float64(x)), 1e-3)
        expected = by_differences(lambda x: np.sum(weights * exact(x)), np.float64(x))
        assert_close_by_feature(gradient, expected, 1e-2)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("num_features", slow_but([120], [8, 64, 120]))
def test_many_features_of_like_scale_are_whitened_as_in_float64(method, num_features):
    # Of 120 eigenvalues, the nearest differ by a share 8e-4.
    x = np.asarray(normal((480, num_features), seed=0))
    y = compiled(method=method, train=True)(x, NONE, init(num_features)[1])[0]
    assert_close_by_feature(
        y, reference(np.float64(x), method, 1e-5, num_features), 1e-3
    )


def test_pcas_gradient_beside_near_eigenvalues_is_that_in_float64(x64):
    # The nearest two eigenvalues differ by a share 6e-4: rounding turns their vectors.
    x = np.asarray(normal((480, 120), seed=1))
    weights = np.asarray(normal((480, 120), seed=2))

    @jax.grad
    def expected_of(x):
        centred = x - x.mean(0)
        variances, u = jnp.linalg.eigh(centred.T @ centred / len(x))
        u = u * jnp.sign(u[jnp.abs(u).argmax(0), jnp.arange(len(u))])
        y = centred @ u / jnp.sqrt(variances + 1e-5)
        return jnp.sum(weights * y[:, ::-1])

    _, gradient = value_and_gradient_of(method="pca")(x, weights, np.float32(1e-5))
    assert gradient.dtype == np.float32
    assert_close_by_feature(gradient, expected_of(np.float64(x)), 3e-3)


@functools.cache
def value_and_gradient_of(**options):
    """Return a compiled function of y and the gradient of a linear function of it."""

    def linear(x, weights, epsilon):
        y = whitened(x, epsilon=epsilon, **options)
        return jnp.sum(weights * y), y

    gradient = jax.jit(jax.grad(linear, has_aux=True))
    return lambda *args: jax.device_get(gradient(*args))[::-1]


def assert_close_by_feature(actual, expected, share):
    """Assert that errors are below a share of each feature's largest magnitude."""
    errors = np.max(np.abs(actual - expected), 0) / np.max(np.abs(expected), 0)
    np.testing.assert_array_less(errors, share)


@pytest.mark.parametrize("method", METHODS)
def test_prediction_of_unlike_scales_is_training(method):
    x = np.float32(X_NUMPY[:40] * np.geomspace(1e-4, 1e4, 6))
    _, state = init(6)
    options = {"method": method, "momentum": 0.0}
    y, state = compiled(train=True, **options)(x, NONE, state)
    predicted, _ = compiled(train=False, **options)(x, NONE, state)
    assert_close_by_feature(predicted, y, 1e-3)


def test_error_of_iternorm_falls_with_each_iteration():
    errors = []
    for t in (1, 3, 5, 14):
        y = whitened(X, method="iternorm", num_iterations=t, epsilon=1e-8)
        errors.append(np.abs(covariance(y) - np.eye(6)).max())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1
    assert errors[-1] < 1e-3
    y = whitened(X, method="iternorm", num_iterations=20)
    np.testing.assert_allclose(y, whitened(X, method="zca"), rtol=1e-2, atol=1e-3)


def test_one_iteration_of_iternorm_by_hand():
    # Variances 1 and 3 without correlation: S = diag(1, 3) / 4, so that
    # P_1 = (3 - S) / 2 = diag(11, 9) / 8, and W = P_1 / 2.
    signs = [[1, 1], [-1, 1], [1, -1], [-1, -1]]
    x = np.float32(signs) * np.float32([1.0, 3**0.5])
    y = whitened(x, method="iternorm", num_iterations=1, epsilon=1e-12)
    np.testing.assert_allclose(y, x * np.float32([11 / 16, 9 / 16]), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_shift_scale_and_order_of_the_batch_do_not_matter(method):
    whiten_ = functools.partial(whitened, method=method, epsilon=1e-8)
    y = whiten_(X)
    np.testing.assert_allclose(whiten_(X_NUMPY * 8 + 5), y, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(whiten_(X_NUMPY[::-1]), y[::-1], rtol=1e-3, atol=1e-3)


def test_zca_turns_with_the_features():
    turned = whitened(X_NUMPY @ ROTATION)
    np.testing.assert_allclose(turned, whitened(X) @ ROTATION, rtol=1e-3, atol=1e-3)


def test_cholesky_and_pca_do_not_see_what_leaves_the_rotation():
    # A lower triangular A with a positive diagonal is absorbed by the Cholesky factor;
    # a scale and a rotation of all features by the eigenvectors, up to their signs.
    a = np.tril(normal((6, 6), seed=3), -1) + 2 * np.eye(6, dtype=np.float32)
    options = {"method": "cholesky", "epsilon": 1e-8}
    np.testing.assert_allclose(
        whitened(X_NUMPY @ a.T, **options), whitened(X, **options), rtol=1e-3, atol=1e-3
    )
    turned = whitened(X_NUMPY @ ROTATION, method="pca")
    np.testing.assert_allclose(
        np.abs(turned), np.abs(whitened(X, method="pca")), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 2])
def test_layout_does_not_matter(group_size):
    x = X_NUMPY.reshape(32, 4, 4, 6)
    _, state = init(6, group_size=group_size)
    options = {"train": True, "group_size": group_size}
    expected = compiled(**options)(X, PARAMS, state)
    for axis in (0, 1, 3):
        y, moved = compiled(**options, feature_axis=axis)(
            np.moveaxis(x, -1, axis), PARAMS, state
        )
        chex.assert_trees_all_close(
            (np.moveaxis(np.asarray(y), axis, -1).reshape(X.shape), moved),
            expected,
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("method", "group_size"),
    slow_but(
        [("zca", 2), ("cholesky", None)],
        list(itertools.product(METHODS, (None, 2))),
    ),
)
def test_prediction_is_training_when_the_batch_is_the_data(method, group_size):
    _, initial = init(6, group_size=group_size)
    options = {"method": method, "group_size": group_size}

    @jax.jit
    def train_and_predict(x, params, state):
        y, state = whiten(x, params, state, train=True, momentum=0.0, **options)
        predicted, same = whiten(x, params, state, train=False, **options)
        assert same is state
        return y, predicted

    y, predicted = train_and_predict(X, PARAMS, initial)
    np.testing.assert_allclose(predicted, y, rtol=1e-5, atol=1e-5)


def test_averages_after_n_steps_are_those_of_the_closed_form():
    # m^n initial + (1 - m) sum_i m^(n - 1 - i) batch_i, from mean 0 and covariance I.
    m, n = 0.8, 4
    _, state = init(6)
    batches = [np.asarray(normal((64, 6), seed=i)) @ MIX + i for i in range(n)]
    for x in batches:
        _, state = compiled(train=True, momentum=m)(x, NONE, state)
    weights = [(1 - m) * m ** (n - 1 - i) for i in range(n)]
    expected = WhiteningState(
        sum(w * np.float64(x).mean(0) for w, x in zip(weights, batches, strict=True)),
        m**n * np.eye(6)[None]
        + sum(w * covariance(x) for w, x in zip(weights, batches, strict=True)),
    )
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "group_size"),
    slow_but(
        [("zca", 2)],
        [*((m, None) for m in METHODS), ("zca", 2)],
    ),
)
def test_gradients_are_those_of_finite_differences(x64, method, group_size):
    stds = np.array([1.0, 2.0, 3.0, 4.0])
    x = np.asarray(normal((9, 4), dtype=jnp.float64)) * stds + 1.0
    params = BatchNormParams(stds, -stds)

    @jax.jit
    def y(x, params):
        return whitened(x, params, group_size, method=method, epsilon=0.1)

    check_grads(y, (x, params), order=1, rtol=1e-4, atol=1e-4)


def with_covariance_identity():
    """Return 8 examples of 6 features of mean 0 and covariance the identity.

    They are products of three signs: a, b, c, ab, ac, bc.
    """
    a, b, c = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8)
    return np.stack([a, b, c, a * b, a * c, b * c], axis=1)


def test_gradient_of_zca_is_exact_where_eigenvalues_repeat(x64):
    x = with_covariance_identity()[:, :3]
    np.testing.assert_array_equal(covariance(x), np.eye(3))
    y = jax.jit(functools.partial(whitened, epsilon=1e-3))
    check_grads(y, (x,), order=1)


def test_derivative_of_the_inverse_root_is_exact_near_repeated_eigenvalues(x64):
    # From W S W = I: dW W^-1 + W^-1 dW = -W dS W. At S = I that is dW = -dS / 2.
    tangent = np.asarray(normal((3, 3), dtype=jnp.float64))
    tangent = tangent + tangent.T
    root = functools.partial(inverse_square_root, epsilon=1e-9)
    derivative = jax.jit(lambda *args: jax.jvp(root, args[:1], args[1:]))
    for gap in (0.0, 1e-15, 1e-9, 1e-5, 1e-2):
        sigma = np.diag([1.0, 1.0 + gap, 1.0 - gap])
        w, d_w = jax.device_get(derivative(sigma, tangent))
        inverse = np.linalg.inv(w)
        np.testing.assert_allclose(
            d_w @ inverse + inverse @ d_w, -w @ tangent @ w, rtol=1e-8, atol=1e-12
        )
        if gap == 0:
            np.testing.assert_allclose(d_w, -tangent / 2, rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_finite_where_eigenvalues_repeat_in_float32(method):
    gradient, _ = gradient_of(method=method)(np.float32(with_covariance_identity()))
    assert np.all(np.isfinite(gradient))
    assert np.max(np.abs(gradient)) < 10


@pytest.mark.parametrize("method", METHODS)
def test_gradient_sees_the_invariances(x64, method):
    # y does not change when x is shifted or scaled: no gradient in these directions.
    x = np.asarray(normal((16, 3), mean=1.0, dtype=jnp.float64)) * [1.0, 2.0, 4.0]
    g, _ = gradient_of(method=method)(x, 1e-12)
    np.testing.assert_allclose(np.sum(g, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.sum(g * x), 0, atol=1e-6)
    assert np.max(np.abs(g)) > 1e-2


def in_parts(method, group_size, x, num_devices, mapped):
    """Return y, state and gradient by vmap or pmap over an axis."""
    _, state = init(6, group_size=group_size)

    def forward(x):
        return whiten(
            x,
            PARAMS,
            state,
            train=True,
            method=method,
            group_size=group_size,
            axis_name="d",
        )

    cut = x.reshape(num_devices, -1, 6)
    weights = np.arange(1.0, x.size + 1, dtype=np.float32).reshape(cut.shape) / x.size

    def one(x, w):
        (y, state), vjp = jax.vjp(forward, x)
        cotangent = w * jnp.cos(w * y)
        return y, state, vjp((cotangent, jax.tree.map(jnp.zeros_like, state)))[0]

    y, state, gradient = jax.device_get(mapped(one)(cut, weights))
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], state), state_of(state))
    return y.reshape(x.shape), state_of(state), gradient.reshape(x.shape)


def state_of(states):
    """Return the last instance's state."""
    return jax.tree.map(lambda a: a[-1], states)


@pytest.mark.parametrize(
    ("method", "how", "num_devices"),
    slow_but(
        [("zca", "pmap", 4)],
        [
            *((method, how, 4) for method in METHODS for how in ("vmap", "pmap")),
            *(("zca", "pmap", n) for n in (2, 8)),
        ],
    ),
)
def test_devices_whiten_as_one(devices, method, how, num_devices):
    x, group_size = X_NUMPY[:64], 3
    _, state = init(6, group_size=group_size)

    def big(x):
        y, new = whiten(
            x, PARAMS, state, train=True, method=method, group_size=group_size
        )
        return loss(y), (y, new)

    (_, (y, new)), gradient = jax.jit(jax.value_and_grad(big, has_aux=True))(x)
    mapped = {
        "vmap": lambda f: jax.jit(jax.vmap(f, axis_name="d")),
        "pmap": lambda f: jax.pmap(f, axis_name="d", devices=devices[:num_devices]),
    }[how]
    got = in_parts(method, group_size, x, num_devices, mapped)
    chex.assert_trees_all_close(got, (y, new, gradient), rtol=1e-3, atol=2e-4)


def test_vmap_over_an_ensemble_equals_its_members():
    xs = np.stack([X_NUMPY[:32], 2 * X_NUMPY[32:64] + 1])
    gradient = jax.jit(jax.grad(lambda x: loss(whitened(x))))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(gradient))(xs), [gradient(x) for x in xs], atol=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_singular_covariance_shrinks_to_nothing_what_does_not_vary(method):
    # 4 examples, twice each, of 6 features vary in 3 directions: y has covariance
    # v / (v + eps) there, 0 elsewhere, and is finite as is its gradient.
    x, epsilon = np.tile(X_NUMPY[:4], (2, 1)), 1e-2
    gradient, y = gradient_of(method=method)(x, epsilon)
    if method == "iternorm":
        y = whitened(x, method=method, epsilon=epsilon, num_iterations=15)
    v = np.sort(np.linalg.eigvalsh(covariance(x)))
    got = np.sort(np.linalg.eigvalsh(covariance(y)))
    np.testing.assert_allclose(got, v / (v + epsilon), atol=2e-3)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("method", METHODS)
def test_rounding_below_zero_gives_no_nan(method):
    x = np.tile(1e4 * X_NUMPY[:4], (1, 4))  # eigenvalues of 0 come out as -100
    gradient, y = gradient_of(method=method)(x)
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(gradient))
    if method != "iternorm":
        # x varies in 3 directions.
        got = np.linalg.eigvalsh(covariance(y))
        np.testing.assert_allclose(got, [0] * 21 + [1] * 3, atol=1e-2)


def test_duplicates_and_constants_beside_large_features_leave_them_alone():
    # Whatever of rank is lacking, the features of full rank are whitened as without.
    x = X_NUMPY[:, :3]
    for others in (1e4 * np.ones((512, 3)), 1e4 * X_NUMPY[:, [4, 4, 4]]):
        together = np.concatenate([x, others], 1, dtype=np.float32)
        apart = reference(np.float64(together), "zca", 1e-5, 6)
        assert_close_by_feature(whitened(together)[:, :3], apart[:, :3], 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_number_stays_so(method):
    x = np.where(X_NUMPY == X_NUMPY[0, 0], np.nan, X_NUMPY)
    assert np.all(np.isnan(whitened(x, method=method)))


def test_training_exports_with_a_symbolic_batch():
    params, state = init(6)
    (n,) = jax.export.symbolic_shape("n")
    train = jax.jit(functools.partial(whiten, train=True))
    exported = jax.export.export(train)(
        jax.ShapeDtypeStruct((n, 6), jnp.float32), params, state
    )
    y, _ = exported.call(X[:33], params, state)
    np.testing.assert_allclose(y, whitened(X[:33]), rtol=1e-5, atol=1e-5)


def test_one_example_gives_beta():
    for method in METHODS:
        y = whitened(X_NUMPY[:1], PARAMS, method=method)
        np.testing.assert_allclose(y[0], PARAMS.bias, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_widened_and_given_back(method):
    x = X_NUMPY.astype(jnp.bfloat16)
    _, state = init(6)
    y, state = compiled(train=True, method=method)(x, NONE, state)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in state} == {jnp.dtype("float32")}
    wide = whitened(x.astype(np.float32), method=method)
    y = np.asarray(y).astype(np.float32)
    np.testing.assert_allclose(y, wide, rtol=1e-2, atol=1e-2)


def test_mean_far_beyond_the_deviation_costs_few_digits():
    far = X_NUMPY + np.float32(1e4)
    exact = np.float64(far)
    w = reference_matrix("zca", covariance(exact) + 1e-5 * np.eye(6))
    y = whitened(far)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) @ w, atol=1e-2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"group_size": 4}, "group_size=4 does not divide the 6 features.*divisor"),
        ({"group_size": 0}, "group_size=0 does not divide"),
        ({"group_size": 3}, r"covariance has shape \[1, 6, 6\].*\[2, 3, 3\]"),
        ({"method": "svd"}, "method='svd'; expected one of zca, pca"),
        ({"num_iterations": 0}, "num_iterations=0; expected 1 or more"),
        ({"epsilon": 0.0}, "epsilon=0.0; expected a number greater than 0"),
        ({"momentum": 1.5}, r"momentum=1.5.*in \[0, 1\]"),
        ({"feature_axis": (0, 1)}, "feature_axis"),
        ({"axis_name": "nowhere"}, "axis_name='nowhere' is not bound"),
        ({"x": X[0]}, "expected rank 2 or more"),
        ({"x": X[:0]}, "is empty"),
        ({"x": X[:, :3]}, r"scale has shape \[6\].*\[3\] features"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    _, state = init(6)
    options = {"x": X, "params": PARAMS, "state": state, "train": True, **bad}
    with pytest.raises(ValueError, match=message):
        whiten(**options)


def test_bad_dtypes_and_traced_choices_are_refused():
    _, state = init(6)
    for dtype, message in ((jnp.int32, "int32"), (jnp.complex64, "real numbers")):
        with pytest.raises(TypeError, match=message):
            whiten(X.astype(dtype), NONE, state, train=True)
    with pytest.raises(TypeError, match="train must be a Python bool"):
        jax.jit(lambda t: whiten(X, NONE, state, train=t))(True)
    with pytest.raises(ValueError, match="too narrow"):
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
        whiten(X, NONE, narrow, train=True)
    with pytest.raises(ValueError, match="group_size=5 does not divide"):
        init(6, group_size=5)
