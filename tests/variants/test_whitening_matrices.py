"""Stacks of matrices: as one at a time, and in calls that never wait for each other."""

import math
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.variants.whitening_matrices import matrix_function
from reference import normal

METHODS = pytest.mark.parametrize("method", ["zca", "pca", "cholesky"])
# From jaxlib's lapack_kernels.cc: a batch of less work is never divided among threads.
LEAST_WORK_OF_A_TASK = 200_000
WORK = {"potrf": 1 / 3, "trsm": 1, "syevd": 5}


def covariances(members, groups, size):
    x = normal((members, groups, 4 * size, size))
    return np.swapaxes(x, -1, -2) @ x / (4 * size)


@METHODS
def test_stacks_of_members_and_groups_are_as_one_matrix_at_a_time(method):
    function = matrix_function(method, 5)
    stacks = covariances(3, 9, 8)

    def value_and_derivative(matrix):
        tangent = jnp.ones_like(matrix)
        return jax.jvp(lambda m: function(m, 1e-3), (matrix,), (tangent,))

    found = jax.jit(jax.vmap(value_and_derivative))(stacks)
    one = jax.jit(value_and_derivative)
    for member, group in ((0, 0), (1, 7), (2, 8)):
        for stack, matrix in zip(found, one(stacks[member, group]), strict=True):
            np.testing.assert_allclose(
                stack[member, group], matrix, rtol=1e-3, atol=1e-4
            )


@METHODS
@pytest.mark.parametrize(("members", "groups", "size"), [(3, 8, 16), (2, 2, 64)])
def test_no_call_of_lapack_divides_its_batch_among_threads(
    method, members, groups, size
):
    function = matrix_function(method, 5)

    def value_and_gradient(matrices):
        return jax.value_and_grad(lambda m: jnp.sum(function(m, 1e-5)))(matrices)

    program = jax.jit(jax.vmap(value_and_gradient))
    traced = program.trace(covariances(members, groups, size))
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    calls = re.findall(r"@lapack_s(\w+)_ffi\(.*\}\s*:\s*\(tensor<([\dx]+)xf32>", text)
    assert {name for name, _ in calls} == {
        "zca": {"potrf", "trsm", "syevd"},
        "pca": {"potrf", "trsm", "syevd"},
        "cholesky": {"potrf"},
    }[method]
    assert len(calls) == text.count("custom_call @lapack")
    for name, shape in calls:
        *batch, rows, _ = map(int, shape.split("x"))
        count = math.prod(batch)
        assert count == 1 or count * WORK[name] * rows**3 < LEAST_WORK_OF_A_TASK


@pytest.mark.slow
def test_a_sweep_over_two_devices_ends():
    """Without small calls it waits for ever, within seconds; see `_in_small_calls`."""
    program = """
        import sys
        import jax
        import numpy as np
        from bn_jax.variants.whitening_matrices import matrix_function

        jax.config.update("jax_num_cpu_devices", 2)
        function = matrix_function("zca", 5)
        x = np.random.default_rng(0).standard_normal((2, 3, 8, 32, 16))
        covariances = np.float32(np.swapaxes(x, -1, -2) @ x / 32)

        def steps(covariances):
            def step(_, stack):
                w = jax.vmap(lambda stack: function(stack, 1e-5))(stack)
                return stack + 0 * jax.lax.psum(w, "d")

            return jax.lax.fori_loop(0, 200, step, covariances)

        jax.block_until_ready(jax.pmap(steps, axis_name="d")(covariances))
        print("ended")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "ended"
