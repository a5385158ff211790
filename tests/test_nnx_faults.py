"""Where `flax.nnx.BatchNorm` is wrong, its number and ours."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reference
from bn_jax import nnx as ours
from nnx_layers import MODULES, make, merge
from reference import normal

# What follows is the docstring's list of where Flax is wrong: a test for each.


def normalise(module, x, mask=None, **options):
    """Return the output and statistics of one training step that keeps only itself."""
    layer = make(module, x.shape[-1], momentum=0.0, **options)
    graphdef, state = nnx.split(layer)

    def step(x, mask):
        layer = merge(graphdef, state)
        y = layer(x, mask=mask)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    if layer.axis_name is not None:
        step = jax.vmap(step, axis_name=layer.axis_name)
    return jax.jit(step)(x, mask)


def test_flax_loses_the_variance_of_a_large_mean_and_ours_holds_it():
    x = normal((256, 64), mean=1e4)
    flax_y, _ = normalise(nnx.BatchNorm, x)
    y, stats = normalise(ours.BatchNorm, x)
    # Where E[x^2] - E[x]^2 cancels to 0, y is (x - mean) / sqrt(1e-5) = 316 (x - mean).
    assert np.max(np.std(flax_y, axis=0)) > 290
    np.testing.assert_allclose(np.std(y, axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(stats["var"], reference.moments(x).var, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_flax_rounds_the_running_averages_in_evaluation_and_ours_do_not(dtype):
    # In bfloat16, whose numbers are 2 apart there, a mean of 259 is 260; in float16 one
    # of 4098 (4 apart) is 4096 with x 4096. Then x - mean is 0 in place of +-1 or -2.
    mean, x, y = (259, 260, 2.0) if dtype == jnp.bfloat16 else (4098, 4096, -4.0)
    results = []
    for module in MODULES:
        layer = make(module, 1, dtype=dtype, use_running_average=True)
        layer.mean[...], layer.var[...] = jnp.full(1, float(mean)), jnp.full(1, 0.25)
        results.append(layer(jnp.full((1, 1), x, dtype)))
        assert layer.mean[...].item() == mean
    got, flax = results
    assert got.dtype == flax.dtype == dtype
    assert flax.item() == 0 and got.item() == y  # y is exact in dtype


def test_flax_averages_unequal_masks_as_equal_and_ours_weighs_them():
    # Present are {0, 2} and {10}: mean 12 / 3 = 4, variance (16 + 4 + 36) / 3 = 56 / 3.
    # Flax averages the means 1 and 10 to 5.5, and mean squares 2 and 100 to
    # 51 - 5.5^2 = 20.75.
    x = jnp.array([[[0.0], [2.0]], [[10.0], [99.0]]])
    mask = jnp.array([[[True], [True]], [[True], [False]]])
    _, flax_stats = normalise(nnx.BatchNorm, x, mask, axis_name="batch")
    y, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    chex.assert_trees_all_close(flax_stats["mean"], jnp.full((2, 1), 5.5))
    chex.assert_trees_all_close(flax_stats["var"], jnp.full((2, 1), 20.75))
    chex.assert_trees_all_close(stats["mean"], jnp.full((2, 1), 4.0), rtol=1e-6)
    chex.assert_trees_all_close(stats["var"], jnp.full((2, 1), 56 / 3), rtol=1e-6)
    expected = np.array([0.0, 2.0, 10.0]) - 4.0
    np.testing.assert_allclose(
        y.ravel()[:3], expected / np.sqrt(56 / 3 + 1e-5), rtol=1e-5
    )


def test_flax_gives_nan_for_an_empty_mask_and_ours_the_running_averages():
    x, mask = jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1), bool)
    flax_y, flax_stats = normalise(nnx.BatchNorm, x, mask)
    y, stats = normalise(ours.BatchNorm, x, mask)
    assert np.isnan(flax_y).all() and np.isnan(flax_stats["mean"]).all()
    chex.assert_trees_all_equal(stats, {"mean": jnp.zeros(1), "var": jnp.ones(1)})
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_flax_gives_nan_on_all_shards_for_one_empty_and_ours_ignores_it():
    x = jnp.array([[[1.0], [3.0]], [[7.0], [9.0]]])
    mask = jnp.array([[[True], [True]], [[False], [False]]])
    flax_y, _ = normalise(nnx.BatchNorm, x, mask, axis_name="batch")
    _, stats = normalise(ours.BatchNorm, x, mask, axis_name="batch")
    assert np.isnan(flax_y).all()
    chex.assert_trees_all_close(
        stats, {"mean": jnp.full((2, 1), 2.0), "var": jnp.ones((2, 1))}, rtol=1e-6
    )


def test_flax_gradients_are_nan_beside_a_masked_nan_and_ours_finite():
    x = jnp.array([[1.0], [3.0], [jnp.nan]])
    mask = jnp.array([[True], [True], [False]])

    def gradient(module):
        def total(x):
            y, _ = normalise(module, x, mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.jit(jax.grad(total))(x)

    assert np.isnan(gradient(nnx.BatchNorm)[:2]).all()
    assert np.isfinite(gradient(ours.BatchNorm)).all()


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax
@pytest.mark.filterwarnings("ignore:Casting complex values")  # Flax
def test_flax_drops_the_imaginary_part_of_the_mean_and_ours_keeps_it():
    x = jnp.array([[1 + 1j], [3 + 5j]])
    _, flax_stats = normalise(nnx.BatchNorm, x)
    _, stats = normalise(ours.BatchNorm, x)
    assert flax_stats["mean"].item() == 2
    assert stats["mean"].item() == 2 + 3j
    assert stats["var"].item() == 5 and stats["var"].dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax
def test_flax_freezes_averages_in_bf16_and_ours_refuse_them_in_training():
    # One step from 256 to 0.99 * 256 + 0.01 * 300 = 256.44, which bfloat16 rounds.
    x = jnp.array([[299.0], [301.0]])
    mine, flax = (make(m, 1) for m in MODULES)
    for layer in (mine, flax):
        layer.mean.set_value(jnp.array([256.0], jnp.bfloat16))
        layer.var.set_value(jnp.array([1.0], jnp.bfloat16))
    flax(x)
    assert flax.mean[...].item() == 256
    with pytest.raises(ValueError, match="mean has dtype bfloat16, too narrow"):
        mine(x)
    mine.eval()
    np.testing.assert_allclose(mine(x), x - 256.0, rtol=1e-5)
