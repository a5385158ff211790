"""Padding that weighs nothing, and a gamma that is stored without its 1."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax import linen as linen_lib
from bn_jax import nnx as nnx_lib
from bn_jax.folding import fold
from bn_jax.measures.population import exact_statistics
from reference import normal

KEY = jax.random.key(0)
# Sequences on 8 devices, two on each: on the third all is padding.
LENGTHS = np.array([5, 1, 3, 0, 0, 0, 2, 5, 4, 4, 1, 1, 0, 2, 5, 3])
MASK = (np.arange(5) < LENGTHS[:, None])[..., None]
X = np.where(MASK, normal((16, 5, 4), mean=3.0, std=2.0), np.nan).astype(np.float32)
TOKENS = X[MASK[..., 0]]  # unpadded


def of_linen(x, *, mask=None, **attributes):
    """Return y in training and the moved averages."""
    layer = linen_lib.BatchNorm(use_running_average=False, **attributes)
    bare = linen_lib.BatchNorm(use_running_average=False)  # no axis to be bound
    variables = bare.init(KEY, jnp.ones((2, 4)))
    y, moved = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, moved["batch_stats"]


def of_nnx(x, *, mask=None, **attributes):
    layer = nnx_lib.BatchNorm(4, rngs=nnx.Rngs(0), **attributes)
    y = layer(x, mask=mask)
    return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


@pytest.mark.parametrize("run", [of_linen, of_nnx])
def test_padded_sequences_on_devices_are_the_unpadded_tokens(run, devices):
    expected, averages = jax.jit(run)(TOKENS)
    on_devices = functools.partial(run, axis_name="d", zero_masked=True)
    parts, masks = (a.reshape(8, 2, *a.shape[1:]) for a in (X, MASK))
    y, moved = jax.pmap(lambda x, m: on_devices(x, mask=m), "d", devices=devices)(
        parts, masks
    )
    y = np.asarray(y).reshape(X.shape)
    np.testing.assert_allclose(y[MASK[..., 0]], expected, rtol=1e-6, atol=1e-6)
    assert not y[~MASK[..., 0]].any()
    for of_device in range(8):
        got = jax.tree.map(lambda a, i=of_device: a[i], moved)
        chex.assert_trees_all_close(got, averages, rtol=1e-6)


@pytest.mark.parametrize("run", [of_linen, of_nnx])
def test_padding_is_zeroed_only_if_asked_and_has_no_gradient(run):
    x = np.nan_to_num(X, nan=7.0)
    y, _ = jax.jit(run)(x, mask=MASK)
    assert (y[~MASK[..., 0]] != 0).all()

    def loss(x):
        return jnp.sum(jnp.sin(run(x, mask=MASK, zero_masked=True)[0]))

    gradient = jax.jit(jax.grad(loss))
    for padded in (x, X):
        assert not np.asarray(gradient(padded))[~MASK[..., 0]].any()
        assert np.isfinite(gradient(padded)).all()


class Summed(nn.Module):
    """Sums a sequence, so that its padding would matter."""

    @nn.compact
    def __call__(self, x, train=False):
        mask = jnp.isfinite(x[..., :1])
        norm = functools.partial(
            linen_lib.BatchNorm, not train, momentum=0.0, zero_masked=True
        )
        x = norm(name="of_tokens")(x, mask=mask)
        return norm(name="of_sums")(jnp.sum(jnp.sin(x), 1))


def test_zeroed_padding_is_measured_as_the_model_sees_it():
    model = Summed()
    variables = jax.jit(model.init)(KEY, X)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, expected = jax.jit(train)(variables, X)
    for mode in ("layerwise", "one_pass"):
        got = exact_statistics(model, variables, X, batch_size=16, mode=mode)
        chex.assert_trees_all_close(got, expected["batch_stats"], rtol=1e-5)


# Gamma less 1.


def stored(run, x, offset):
    """Return the loss and its gradient by (x, scale), at a gamma of 1 to 4."""
    gamma = jnp.arange(1.0, 5.0)

    def loss(x, scale):
        if run is of_linen:
            layer = linen_lib.BatchNorm(False, scale_offset=offset)
            params = {"scale": scale, "bias": jnp.zeros(4)}
            stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
            variables = {"params": params, "batch_stats": stats}
            y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        else:
            layer = nnx_lib.BatchNorm(4, scale_offset=offset, rngs=nnx.Rngs(0))
            layer.scale.set_value(scale)
            y = layer(x)
        return jnp.sum(jnp.sin(y))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, gamma - offset)


@pytest.mark.parametrize("run", [of_linen, of_nnx])
def test_scale_may_be_stored_less_an_offset(run):
    chex.assert_trees_all_close(
        stored(run, TOKENS, 1.0), stored(run, TOKENS, 0.0), rtol=1e-6
    )


def test_offset_is_taken_from_the_initial_gamma():
    options = {"scale_offset": 1.0, "scale_init": nn.initializers.constant(3.0)}
    linen = linen_lib.BatchNorm(True, **options)
    params = linen.init(KEY, TOKENS)["params"]
    layer = nnx_lib.BatchNorm(4, rngs=nnx.Rngs(0), **options)
    for scale in (params["scale"], layer.scale[...]):
        assert scale.tolist() == [2.0] * 4
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(
        linen.apply({**linen.init(KEY, x), "params": params}, x), 3.0, rtol=1e-5
    )


class Net(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        if self.norm:
            x = linen_lib.BatchNorm(True, scale_offset=1.0, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x))


def test_layer_with_an_offset_is_folded():
    init = jax.jit(Net().init)(KEY, TOKENS)
    params = {**init["params"], "norm": {"scale": jnp.arange(4.0), "bias": jnp.ones(4)}}
    stats = {"norm": {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}}
    variables = {"params": params, "batch_stats": stats}
    folded = fold(Net(), variables, TOKENS, without_norms=Net(norm=False))
    np.testing.assert_allclose(
        Net(norm=False).apply({"params": folded}, TOKENS),
        Net().apply(variables, TOKENS),
        rtol=1e-5,
        atol=1e-5,
    )
