"""The matrices that whiten: functions of a covariance, and their derivatives.

The methods are described in `bn_jax.variants.whitening`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Of the largest eigenvalue: differences of eigenvalues below it count as none in the
# derivative of eigenvectors. Ours; a float32 resolves about 1e-7.
_BROADENING = 1e-4

product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def transpose(matrices: Array) -> Array:
    """Transpose the last two axes."""
    return jnp.swapaxes(matrices, -1, -2)


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


def _decompose(covariance: Array, epsilon: float | Array) -> tuple[Array, Array]:
    """Return eigenvalues plus epsilon, ascending, and eigenvectors as columns."""
    if covariance.ndim > 2:
        # One matrix after another: jaxlib 0.10's eigh of many, of some 30 rows or more,
        # waits on CPU for the very threads that it was called from, and never returns.
        variances, v = lax.map(jnp.linalg.eigh, covariance)
    else:
        variances, v = jnp.linalg.eigh(covariance)
    # Rounding may leave a variance of 0 below -epsilon.
    return jnp.maximum(variances, 0) + epsilon, v


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
    through V and are not finite there.

    Args:
      covariance: symmetric and positive semi-definite, shape `[..., S, S]`.
      epsilon: added to its diagonal, greater than 0.

    Returns:
      Array of the shape and dtype of `covariance`.

    References:
      Daleckii and Krein, 1965, "Integration and differentiation of functions of
      Hermitian operators". Higham, 2008, "Functions of Matrices", theorem 3.11.
    """
    eigenvalues, v = _decompose(covariance, epsilon)
    return product(v * lax.rsqrt(eigenvalues)[..., None, :], transpose(v))


@inverse_square_root.defjvp
def _inverse_square_root_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    eigenvalues, v = _decompose(*primals)
    roots = jnp.sqrt(eigenvalues)
    w = product(v / roots[..., None, :], transpose(v))
    a, b = roots[..., :, None], roots[..., None, :]
    factors = -1 / (a * b * (a + b))
    inner = factors * _in_basis(v, *tangents)
    return w, product(product(v, inner), transpose(v))


def _in_basis(v: Array, tangent: Array, of_epsilon: Array) -> Array:
    """Return V^T T V of a tangent of the covariance and one of epsilon.

    T is the symmetric part, all that eigh reads; V^T (e I) V is e I.
    """
    symmetric = (tangent + transpose(tangent)) / 2
    inner = product(product(transpose(v), symmetric), v)
    return inner + of_epsilon * jnp.eye(v.shape[-1], dtype=v.dtype)


@jax.custom_jvp
def _pca_matrix(covariance: Array, epsilon: float | Array) -> Array:
    r"""Return $\Lambda^{-1/2} V^T$, of the largest variance first.

    The largest entry by magnitude of each eigenvector is positive. The derivative of
    eigenvectors, $dV = V (K \circ (V^T d\Sigma\, V))$ with
    $K_{ij} = 1 / (\lambda_j - \lambda_i)$, is not finite where eigenvalues repeat. As a
    deviation from the formula, $1 / d$ is broadened to $d / (d^2 + \delta^2)$, with
    $\delta$ a small share of the largest eigenvalue: wrong by $(\delta / d)^2$.

    References:
      Liao et al., 2019, "Differentiable Programming Tensor Networks",
      arXiv:1903.09650 (broadening).
    """
    eigenvalues, v = _pca_basis(covariance, epsilon)
    return transpose(v * lax.rsqrt(eigenvalues)[..., None, :])


@_pca_matrix.defjvp
def _pca_matrix_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    eigenvalues, v = _pca_basis(*primals)
    inverse_roots = lax.rsqrt(eigenvalues)[..., None, :]
    inner = _in_basis(v, *tangents)
    gaps = eigenvalues[..., None, :] - eigenvalues[..., :, None]
    delta = _BROADENING * jnp.max(eigenvalues, -1)[..., None, None]
    d_v = product(v, gaps / (gaps**2 + delta**2) * inner)
    d_eigenvalues = jnp.diagonal(inner, axis1=-2, axis2=-1)[..., None, :]
    # d(v / sqrt(a)) = dv / sqrt(a) - v da / (2 a sqrt(a))
    d_w = (d_v - v * d_eigenvalues * inverse_roots**2 / 2) * inverse_roots
    return transpose(v * inverse_roots), transpose(d_w)


def _pca_basis(covariance: Array, epsilon: float | Array) -> tuple[Array, Array]:
    """Return `_decompose`, descending and with signs that the batch cannot choose."""
    eigenvalues, v = _decompose(covariance, epsilon)
    eigenvalues, v = eigenvalues[..., ::-1], v[..., ::-1]
    largest = jnp.argmax(jnp.abs(v), -2, keepdims=True)
    return eigenvalues, v * jnp.sign(jnp.take_along_axis(v, largest, -2))


def _cholesky_matrix(covariance: Array, epsilon: float | Array) -> Array:
    """Return the inverse of the lower Cholesky factor."""
    identity = jnp.broadcast_to(
        jnp.eye(covariance.shape[-1], dtype=covariance.dtype), covariance.shape
    )
    factor = jnp.linalg.cholesky(covariance + epsilon * identity)
    return lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


def _newton_matrix(
    covariance: Array, epsilon: float | Array, *, num_iterations: int
) -> Array:
    r"""Return the inverse square root after some steps of Newton and Schulz.

    $P_{k+1} = (3 P_k - P_k^3 S) / 2$ from $P_0 = I$ converges for eigenvalues of S in
    (0, 1], which division by the trace provides; then $W = P / \sqrt{\mathrm{tr}}$. As
    it stands the iteration blows up rounding once it has converged. With $Y = P S$
    carried along, the steps are the same and stable.

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
