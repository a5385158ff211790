r"""The matrices that whiten: functions of a covariance, and their derivatives.

The methods are described in `bn_jax.variants.whitening`.

Features of unlike scales have a covariance D C D with D diagonal and entries of many
orders of magnitude. `eigh` is accurate to the rounding of its largest entry, which may
exceed the least eigenvalues. Cholesky's factor, triangular solves and products are
accurate to the rounding of each row and column: they lose what the correlations C ask
for and nothing to D (Demmel; Demmel and Veselic). So `eigh` here is given a matrix
whose eigenvalues are of like size, and every derivative is written in
$W\, d\Sigma\, W^T$, of whitened features.

References:
  Demmel, 1989, "On floating point errors in Cholesky", LAPACK working note 14.
  Demmel and Veselic, 1992, "Jacobi's method is more accurate than QR", SIAM Journal on
  Matrix Analysis and Applications 13(4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# In units of rounding, of the variances that two directions would have without
# correlations: differences of variances below it count as none in the derivative of
# eigenvectors. Ours; rounding of the covariance changes them by some ten units.
_BROADENING = 100.0

# Number of shifts c in `_compressed`. Ours: seven part the 13 orders of magnitude from
# epsilon 1e-5 to features of scale 1e4 into steps of about 70.
_NUM_SHIFTS = 7

# Of epsilon: pca tells variances below epsilon apart down to it.
_LEAST_VARIANCE = 1e-4

# Of eigenvectors, in `_refined`: larger ones are wrong by a third of their cube. Ours.
_LARGEST_TURN = 0.1
# Of the largest variance, in `_refined`: less is mixed with too much rounding. Ours.
_LEAST_REFINED = 1e-2

# Of the diagonal, in units of rounding: what `_factor` adds to a singular covariance.
# Ours; the second where a covariance is a sum of so many values that it is less exact.
_ADDED = (2.0, 64.0)

# Floating-point operations in one call of LAPACK, as jaxlib counts them. From twice as
# many on it divides a batch among the threads of the pool that the call itself runs on,
# and waits: where all of them wait, nothing goes on. A batch of one is never divided.
_MOST_WORK = 100_000

product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def transpose(matrices: Array) -> Array:
    """Transpose the last two axes."""
    return jnp.swapaxes(matrices, -1, -2)


def _in_small_calls(
    function: Callable[..., Array], work: Callable[[int], float]
) -> Callable[..., Array]:
    """Return a function of stacked matrices that calls LAPACK for few at a time.

    It does so on CPU alone. There, programs of several devices, or several members of a
    sweep, could otherwise wait for each other without end (seen with jaxlib 0.10.2).

    Args:
      function: of arrays `[..., S, S]` of one shape.
      work: floating-point operations for one matrix of S rows.
    """

    @jax.custom_batching.custom_vmap
    def of_stacks(*stacks: Array) -> Array:
        first = stacks[0]
        count, size = math.prod(first.shape[:-2]), first.shape[-1]
        most = max(1, int(_MOST_WORK / work(size)))
        if count <= most:
            return function(*stacks)

        def in_parts(*stacks: Array) -> Array:
            flat = [stack.reshape(count, size, size) for stack in stacks]
            whole = count // most * most
            parts = [a[:whole].reshape(-1, most, size, size) for a in flat]
            found = lax.map(lambda part: function(*part), parts)
            found = found.reshape(whole, size, size)
            if whole < count:
                rest = function(*(a[whole:] for a in flat))
                found = jnp.concatenate([found, rest])
            return found.reshape(first.shape)

        return lax.platform_dependent(*stacks, cpu=in_parts, default=function)

    @of_stacks.def_vmap
    def _(size: int, is_batched: Sequence[bool], *stacks: Array) -> tuple[Array, bool]:
        full = [
            stack if batched else jnp.broadcast_to(stack, (size, *stack.shape))
            for stack, batched in zip(stacks, is_batched, strict=True)
        ]
        return of_stacks(*full), True

    return of_stacks


_cholesky = _in_small_calls(
    functools.partial(lax.linalg.cholesky, symmetrize_input=False), lambda n: n**3 / 3
)
# Of symmetric matrices: eigenvectors as columns, of the least eigenvalue first.
_eigenvectors = _in_small_calls(lambda a: jnp.linalg.eigh(a)[1], lambda n: 5 * n**3)
# G^-T B, for lower triangular G.
_solve_transposed = _in_small_calls(
    functools.partial(
        lax.linalg.triangular_solve, left_side=True, lower=True, transpose_a=True
    ),
    lambda n: n**3,
)


def matrix_function(method: str, num_iterations: int) -> Callable[[Array, Any], Array]:
    """Return the function from covariance and epsilon to the whitening matrix."""
    methods: dict[str, Callable[[Array, Any], Array]] = {
        "zca": inverse_square_root,
        "pca": _pca_matrix,
        "cholesky": _cholesky_matrix,
        "iternorm": functools.partial(_newton_matrix, num_iterations=num_iterations),
    }
    if method not in methods:
        raise ValueError(f"method={method!r}; expected one of {', '.join(methods)}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations}; expected 1 or more")
    return methods[method]


class _Principal(NamedTuple):
    """The principal directions of a covariance, of the largest variance first."""

    variances: Array  # v, the eigenvalues without epsilon; shape [..., S]
    vectors: Array  # U, eigenvectors as columns; shape [..., S, S]
    whitening: Array  # U^T with rows divided by sqrt(v + epsilon); shape [..., S, S]
    # The diagonal of U^T diag(S) U: what v would be if the features were not
    # correlated; shape [..., S].
    uncorrelated: Array


def _principal(
    covariance: Array,
    epsilon: float | Array,
    *,
    least: float = 1.0,
    refined: bool = False,
) -> _Principal:
    r"""Return the principal directions, accurate for features of unlike scales.

    With the Cholesky factor G of $S = G G^T$ and its right singular vectors as columns
    of R, $A = G R = U \Lambda^{1/2}$ and $B = G^{-T} R = U \Lambda^{-1/2}$. Rounding
    mixes some of the columns of larger norm into each column, of A and of B: large
    eigenvalues are read from A and small ones from B, and so are the entries of U. The
    largest entry of each eigenvector, by $A_{ij} B_{ij} = U_{ij}^2$, is made positive.

    Args:
      covariance: shape `[..., S, S]`.
      epsilon: greater than 0.
      least: variances are told apart down to this share of epsilon.
      refined: whether each direction matters, rather than the space of those of like
        variance; see `_refined`.
    """
    epsilon = jnp.asarray(epsilon, covariance.dtype)
    shifts = [epsilon] if least == 1 else [least * epsilon, epsilon]
    s, g, shift = _factor(covariance, shifts)
    right = _eigenvectors(_compressed(s, g, shift))[..., ::-1]
    if refined:
        right = _refined(g, right)
    a = product(g, right)
    b = _solve_transposed(g, right)
    largest = jnp.argmax(a * b, -2, keepdims=True)
    signs = jnp.sign(jnp.take_along_axis(a, largest, -2))
    a, b = a * signs, b * signs

    of_a = jnp.sum(a**2, -2, keepdims=True)
    of_b = jnp.sum(b**2, -2, keepdims=True)
    middle = jnp.max(of_a, -1, keepdims=True) / jnp.max(of_b, -1, keepdims=True)
    eigenvalues = jnp.where(of_a / of_b > middle, of_a, 1 / of_b)
    roots = jnp.sqrt(eigenvalues)
    # The rows of A and of B have the diagonals of S and of its inverse for squares.
    diagonal = _diagonal(s)[..., None]
    of_inverse = jnp.sum(b**2, -1, keepdims=True)
    large = eigenvalues * jnp.sqrt(of_inverse) > jnp.sqrt(diagonal)
    u = jnp.where(large, a / roots, b * roots)

    variances = jnp.maximum(eigenvalues - shift, 0)
    whitening = b * (roots / jnp.sqrt(variances + epsilon))
    uncorrelated = jnp.sum(u**2 * diagonal, -2)
    return _Principal(variances[..., 0, :], u, transpose(whitening), uncorrelated)


def _refined(g: Array, right: Array) -> Array:
    r"""Return right singular vectors of G nearer to orthogonal images under G.

    In the compressed matrix eigenvalues are nearer to each other than in $S$, and so
    rounding turns their vectors further. Columns $a_i = G r_i$ should have no overlap;
    to first order $r_j + \sum_i r_i X_{ij}$ with
    $X_{ij} = a_i \cdot a_j / (|a_j|^2 - |a_i|^2)$ have none. They are brought back to
    length 1. The overlaps are accurate to the rounding of $|a_i| |a_j|$, whatever the
    scales. Where X is not a small number, of eigenvalues that rounding does not tell
    apart, it is left out.

    References:
      Ogita and Aishima, 2018, "Iterative refinement for symmetric eigenvalue
      decomposition", Japan Journal of Industrial and Applied Mathematics 35.
    """
    a = product(g, right)
    overlaps = product(transpose(a), a)
    squares = _diagonal(overlaps)
    gaps = squares[..., None, :] - squares[..., :, None]
    small = jnp.abs(overlaps) < _LARGEST_TURN * jnp.abs(gaps)
    large = squares > _LEAST_REFINED * jnp.max(squares, -1, keepdims=True)
    turned = small & large[..., None, :] & large[..., :, None]
    turns = jnp.where(turned, overlaps / jnp.where(turned, gaps, 1), 0)
    refined = right + product(right, turns)
    return refined / jnp.linalg.norm(refined, axis=-2, keepdims=True)


def _factor(covariance: Array, shifts: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Return the covariance with an addition, its Cholesky factor, and the shift.

    It adds the first of the shifts to leave pivots above rounding. If none does, as in
    singular covariances where epsilon is below rounding, it adds the last one and a
    share of the diagonal.

    Returns:
      S and the lower triangular G with S = G G^T, of the shape of `covariance`, and the
      shift of shape `[..., 1, 1]`.
    """
    size = covariance.shape[-1]
    identity = jnp.eye(size, dtype=covariance.dtype)
    rounding = 2 * size**0.5 * jnp.finfo(covariance.dtype).eps
    last = covariance + shifts[-1] * identity
    share = rounding * _diagonal(last)[..., None] * identity
    sums = jnp.stack(
        [covariance + shift * identity for shift in shifts]
        + [last + times * share for times in _ADDED]
    )
    factors = _cholesky(sums)
    exact = jnp.all(_diagonal(factors) ** 2 >= rounding * _diagonal(sums), -1)
    first = jnp.argmax(exact.at[-1].set(True), 0)[None, ..., None, None]
    all_shifts = jnp.stack([*shifts, *[shifts[-1]] * len(_ADDED)])
    return (
        jnp.take_along_axis(sums, first, 0)[0],
        jnp.take_along_axis(factors, first, 0)[0],
        all_shifts[first[0]],
    )


def _compressed(s: Array, g: Array, least: Array) -> Array:
    r"""Return a matrix with G's right singular vectors and eigenvalues of like size.

    Of $S = G G^T$ it is $\sum_c G^T (S + c I)^{-1} G$, with eigenvalues
    $\sum_c \lambda / (\lambda + c)$: about the logarithm of those of S, from shifts c
    in a geometric series from `least`, of shape `[..., 1, 1]`, to their sum.
    """
    size = s.shape[-1]
    share = (jnp.arange(_NUM_SHIFTS, dtype=s.dtype) + 0.5) / _NUM_SHIFTS
    share = share.reshape(-1, *(1,) * s.ndim)
    most = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None]
    shifts = jnp.exp((1 - share) * jnp.log(least) + share * jnp.log(most))
    shifted = s + shifts * jnp.eye(size, dtype=s.dtype)
    rows = _solve(shifted, jnp.broadcast_to(g, shifted.shape))
    # The sum over shifts is that of one product, on CPU faster than a product of each.
    rows = jnp.moveaxis(rows, 0, -3).reshape(*s.shape[:-2], -1, size)
    return product(transpose(rows), rows)


def _solve(s: Array, right: Array) -> Array:
    """Return G^-1 B of S = G G^T, for B of the shape of S.

    It is the transpose of a corner of the Cholesky factor of [[S, B], [B^T, t I]], for
    any t that is large. On a busy CPU the threads of each triangular solve wait for
    each other, longer than all else here takes; those of Cholesky's factor do not.
    """
    size = s.shape[-1]
    large = float(jnp.finfo(s.dtype).max) ** 0.5
    corner = jnp.broadcast_to(large * jnp.eye(size, dtype=s.dtype), s.shape)
    both = jnp.block([[s, right], [transpose(right), corner]])
    factor = _cholesky(both)
    return transpose(factor[..., size:, :size])


def _diagonal(matrices: Array) -> Array:
    return jnp.diagonal(matrices, axis1=-2, axis2=-1)


@jax.custom_jvp
def inverse_square_root(covariance: Array, epsilon: float | Array) -> Array:
    r"""Return the symmetric $W = (\Sigma + \epsilon I)^{-1/2}$, the matrix of zca.

    The derivative is that of Daleckii and Krein: for a function f of the eigenvalues
    $\lambda$ in $\Sigma = V \Lambda V^T$,

    $$dW = V (F \circ (V^T d\Sigma\, V)) V^T, \qquad
      F_{ij} = \frac{f(\lambda_i) - f(\lambda_j)}{\lambda_i - \lambda_j}.$$

    Of $f(t) = t^{-1/2}$, with a and b for $\lambda_i + \epsilon$ and
    $\lambda_j + \epsilon$, the numerator is $(\sqrt b - \sqrt a) / \sqrt{ab}$ and the
    denominator $(\sqrt a - \sqrt b)(\sqrt a + \sqrt b)$, so that

    $$F_{ij} = -\frac{1}{\sqrt a \sqrt b (\sqrt a + \sqrt b)}.$$

    Nothing is divided by a difference: the derivative is exact and stable where
    eigenvalues repeat, and is f' on the diagonal. Derivatives of second order pass
    through V and are not finite there. $V^T d\Sigma\, V$ is computed of whitened
    features, with $\sqrt a \sqrt b$ left out here and there.

    Args:
      covariance: symmetric and positive semi-definite, shape `[..., S, S]`.
      epsilon: added to its diagonal, greater than 0.

    Returns:
      Array of the shape and dtype of `covariance`.

    References:
      Daleckii and Krein, 1965, "Integration and differentiation of functions of
      Hermitian operators". Higham, 2008, "Functions of Matrices", theorem 3.11.

    Examples:
      >>> import jax.numpy as jnp
      >>> covariance = jnp.array([[5.0, 4.0], [4.0, 5.0]])
      >>> w = inverse_square_root(covariance, 1e-5)
      >>> bool(jnp.allclose(w @ covariance @ w, jnp.eye(2), atol=1e-3))
      True
    """
    found = _principal(covariance, epsilon)
    return product(found.vectors, found.whitening)


@inverse_square_root.defjvp
def _inverse_square_root_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    variances, u, whitening, _ = _principal(*primals)
    roots = jnp.sqrt(variances + primals[1])
    a, b = roots[..., :, None], roots[..., None, :]
    inner = _whitened(whitening, *tangents) * b / (a + b)
    return product(u, whitening), -product(product(u, inner), whitening)


def _whitened(w: Array, tangent: Array, of_epsilon: Array) -> Array:
    """Return W (T + e I) W^T of a tangent T of the covariance and e of epsilon."""
    symmetric = (tangent + transpose(tangent)) / 2
    symmetric = symmetric + of_epsilon * jnp.eye(w.shape[-1], dtype=w.dtype)
    return product(product(w, symmetric), transpose(w))


@jax.custom_jvp
def _pca_matrix(covariance: Array, epsilon: float | Array) -> Array:
    r"""Return $(V + \epsilon I)^{-1/2} U^T$, of the largest variance first.

    The largest entry by magnitude of each eigenvector is positive. The derivative of
    eigenvectors, $dU = U (K \circ (U^T d\Sigma\, U))$ with
    $K_{ij} = 1 / (v_j - v_i)$, is not finite where eigenvalues repeat. As a deviation
    from the formula, $1 / d$ is broadened to $d / (d^2 + \delta^2)$, wrong by
    $(\delta / d)^2$. Here $\delta$ is about what rounding leaves of differences: 1e-5
    of the variances that both directions would have in float32, were the features not
    correlated.

    References:
      Liao et al., 2019, "Differentiable Programming Tensor Networks",
      arXiv:1903.09650 (broadening).
    """
    return _principal(
        covariance, epsilon, least=_LEAST_VARIANCE, refined=True
    ).whitening


@_pca_matrix.defjvp
def _pca_matrix_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    v, _, w, uncorrelated = _principal(*primals, least=_LEAST_VARIANCE, refined=True)
    broadening = _BROADENING * float(jnp.finfo(v.dtype).eps)
    scales = jnp.sqrt(uncorrelated)
    unit = scales[..., :, None] * scales[..., None, :]
    gaps = (v[..., :, None] - v[..., None, :]) / unit
    # Of no gap, 1 / (0 + inf).
    turns = (v + primals[1])[..., None, :] / unit / (gaps + broadening**2 / gaps)
    shrinking = jnp.eye(w.shape[-1], dtype=w.dtype) / 2
    inner = (turns - shrinking) * _whitened(w, *tangents)
    return w, product(inner, w)


@jax.custom_jvp
def _cholesky_matrix(covariance: Array, epsilon: float | Array) -> Array:
    r"""Return the inverse of the lower Cholesky factor.

    Its derivative is $-\Phi(W d\Sigma\, W^T) W$, where $\Phi$ takes the lower triangle
    and half the diagonal.
    """
    s, _, _ = _factor(covariance, [jnp.asarray(epsilon, covariance.dtype)])
    identity = jnp.eye(s.shape[-1], dtype=s.dtype)
    return _solve(s, jnp.broadcast_to(identity, s.shape))


@_cholesky_matrix.defjvp
def _cholesky_matrix_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    w = _cholesky_matrix(*primals)
    half = 1 - jnp.eye(w.shape[-1], dtype=w.dtype) / 2
    inner = jnp.tril(half * _whitened(w, *tangents))
    return w, -product(inner, w)


def _newton_matrix(
    covariance: Array, epsilon: float | Array, *, num_iterations: int
) -> Array:
    r"""Return the inverse square root after some steps of Newton and Schulz.

    $P_{k+1} = (3 P_k - P_k^3 S) / 2$ from $P_0 = I$ converges for eigenvalues of S in
    (0, 1], which division by the trace provides; then $W = P / \sqrt{\mathrm{tr}}$.
    Computed in this way, it amplifies rounding errors after it has converged. With
    $Y = P S$ carried along, the steps are the same and stable.

    References:
      Higham, 2008, "Functions of Matrices", section 6.7 (stability).
    """
    identity = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
    covariance = covariance + epsilon * identity
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
    s = covariance / trace
    p = (3 * identity - s) / 2  # the first step
    y = product(s, p)
    for k in range(2, num_iterations + 1):
        step = (3 * identity - product(p, y)) / 2
        p = product(step, p)
        if k < num_iterations:
            y = product(y, step)
    return p * lax.rsqrt(trace)
