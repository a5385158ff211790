"""Making, training and taking apart NNX layers, ours or Flax's, in tests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax import nnx as ours

MODULES = (ours.BatchNorm, nnx.BatchNorm)


def loss_and_output(layer, x, mask=None):
    """Return a loss with no symmetry that would hide a term, and the output."""
    y = layer(x) if mask is None else layer(x, mask=mask)
    coefficients = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.mean(jnp.sin(coefficients * y) * y), y


def train(module, batches, mask=None, **options):
    """Return all that a few steps of gradient descent with a layer bring about."""
    num_features = batches.shape[1:][options.get("axis", -1)]
    layer = module(num_features, rngs=nnx.Rngs(0), **options)
    graphdef, first = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state)
        gradient = nnx.grad(loss_and_output, argnums=(0, 1), has_aux=True)
        gradients, y = gradient(layer, x, mask)
        params = nnx.state(layer, nnx.Param)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients[0])
        nnx.update(layer, params)
        state = nnx.state(layer)
        return state, (y, *map(nnx.to_pure_dict, gradients[:1]), gradients[1])

    @jax.jit
    def run(state, batches):
        state, steps = jax.lax.scan(step, state, batches)
        layer = nnx.merge(graphdef, state)
        layer.eval()
        return nnx.to_pure_dict(state), steps, layer(batches[0])

    return nnx.to_pure_dict(first), *run(first, batches)


def assert_close_in_own_precision(actual, expected):
    """Compare to 1e-5, or two roundings of the coarsest dtype where that is more.

    Parameters in bfloat16 lend their rounding to all but the running averages.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    coarsest = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(expected))

    def compare(path, a, b):
        path = jax.tree_util.keystr(path)
        is_average = "'mean'" in path or "'var'" in path
        tolerance = 1e-5 if is_average else max(1e-5, 2 * coarsest)
        np.testing.assert_allclose(
            *map(np.float64, (a, b)), rtol=tolerance, atol=tolerance, err_msg=path
        )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def variables(layer):
    """Return the layer's values as nested dictionaries of arrays."""
    return nnx.to_pure_dict(nnx.state(layer))


def snapshot(layer):
    """Return graphdef and state; the latter holds copies, not the layer's variables."""
    return nnx.split(nnx.clone(layer))


def merge(graphdef, state):
    """Return a layer with variables of its own."""
    return nnx.merge(graphdef, state, copy=True)


def make(module=ours.BatchNorm, num_features=3, **options):
    return module(num_features, rngs=nnx.Rngs(0), **options)
