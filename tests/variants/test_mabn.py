import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from bn_jax import linen as linen_lib
from bn_jax import nnx as nnx_lib
from bn_jax.fields import ConfigError
from bn_jax.functional import BatchNormParams
from bn_jax.models.lenet import LeNet
from bn_jax.transforms import NORMS
from bn_jax.variables import moving_param_mask, norm_param_mask
from bn_jax.variants.mabn import MABNState, init, mabn, mabn_transform
from bn_jax.variants.one_moment import ScaleState
from bn_jax.variants.one_moment import scale as scale_norm
from reference import normal

OPTIONS = {"warm_up": 3, "r_max": 1.2, "momentum": 0.75, "epsilon": 1e-3}
BATCHES = [normal((4, 5, 3), mean=1.0, std=i, seed=i) for i in range(1, 7)]
UPSTREAM = [normal((4, 5, 3), mean=0.5, seed=10 + i) for i in range(1, 7)]
SCALE, BIAS = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, -3.0])


def fresh(num_batches=2):
    params, state = init(3, num_batches=num_batches)
    return params._replace(scale=jnp.float32(SCALE), bias=jnp.float32(BIAS)), state


def value_and_grads(params, state, x, g, **options):
    """Return y, the new state, and gradients by params and x of sum(y g)."""

    def loss(params, x):
        y, moved = mabn(x, params, state, train=True, **options)
        return jnp.sum(y * g), (y, moved)

    grads, (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, moved, *grads


class Reference:
    """The algorithm of the paper, in float64 and without JAX."""

    def __init__(self, num_batches, warm_up, r_max, momentum, epsilon):
        self.n, self.warm_up, self.r_max = num_batches, warm_up, r_max
        self.momentum, self.epsilon = momentum, epsilon
        self.squares, self.products = [], []
        self.var = np.ones(3)

    def step(self, x, g):
        x, g = np.float64(x), np.float64(g)
        count = len(self.squares)
        self.squares.append((x**2).mean((0, 1)))
        is_warm = count >= self.warm_up
        s = np.mean(self.squares[-self.n :], 0) if is_warm else self.squares[-1]
        root = np.sqrt(s + self.epsilon)
        r = np.clip(root / np.sqrt(self.var + self.epsilon), 1 / self.r_max, self.r_max)
        r = r if is_warm else np.ones(3)
        z = x / root
        inner = g * SCALE * r
        self.products.append((inner * z).mean((0, 1)))
        p = np.mean(self.products[-self.n :], 0) if is_warm else self.products[-1]
        m = self.momentum if is_warm else count / (count + 1)
        self.var = m * self.var + (1 - m) * s
        return r * z * SCALE + BIAS, (inner - p * z) / root, (g * r * z).sum((0, 1))


@pytest.mark.parametrize("by_linen", [False, True])
def test_values_gradients_and_state_are_the_papers(by_linen):
    reference = Reference(num_batches=2, **OPTIONS)
    params, state = fresh()
    text = ",".join(f"{key}={value}" for key, value in OPTIONS.items())
    layer = linen_lib.norm(f"mabn:num_batches=2,{text}")(use_running_average=False)

    def through_module(params, state, x, g):
        def loss(params, x):
            variables = {"params": params._asdict(), "batch_stats": state._asdict()}
            y, moved = layer.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(y * g), (y, MABNState(**moved["batch_stats"]))

        grads, (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, moved, *grads

    step = jax.jit(
        through_module if by_linen else functools.partial(value_and_grads, **OPTIONS)
    )
    for x, g in zip(BATCHES, UPSTREAM, strict=True):
        y, state, of_params, of_x = step(params, state, x, g)
        expected_y, expected_of_x, of_scale = reference.step(x, g)
        np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_x, expected_of_x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_params.scale, of_scale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_params.bias, g.sum((0, 1)), rtol=1e-4)
        params = params._replace(
            moving_products=params.moving_products - of_params.moving_products
        )
    np.testing.assert_allclose(
        params.moving_products, reference.products[-2:], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state.squares, reference.squares[-2:], rtol=1e-5)
    np.testing.assert_allclose(state.var, reference.var, rtol=1e-5)
    assert state.count == len(BATCHES)
    predicted, same = mabn(BATCHES[0], params, state, train=False, epsilon=1e-3)
    expected = np.float64(BATCHES[0]) / np.sqrt(reference.var + 1e-3) * SCALE + BIAS
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)
    assert same is state


def test_until_it_is_warm_the_gradient_is_exact():
    # Of centred features, the mean square is the variance.
    params, state = fresh()
    x = BATCHES[0] - np.mean(BATCHES[0], (0, 1))
    _, _, _, got = value_and_grads(params, state, x, UPSTREAM[0])

    def expected_of(x):
        z = x * jax.lax.rsqrt(jnp.mean(x**2, (0, 1)) + 1e-5)
        return jnp.sum((z * params.scale + params.bias) * UPSTREAM[0])

    np.testing.assert_allclose(got, jax.grad(expected_of)(x), rtol=1e-4, atol=1e-5)
    y, _ = mabn(x, params, state, train=True)
    affine = BatchNormParams(params.scale, params.bias)
    same, _ = scale_norm(x, affine, ScaleState(state.var), train=True)
    np.testing.assert_allclose(y, same, rtol=1e-5, atol=1e-5)


def test_eight_devices_share_both_statistics(devices):
    params, state = fresh()
    x, g = normal((8, 5, 3), std=2.0), normal((8, 5, 3), seed=1)
    state = state._replace(count=jnp.float32(5), squares=jnp.ones((2, 3)))
    old = normal((2, 3), seed=3)

    @jax.jit
    def alone(x, g):
        of_all = params._replace(moving_products=old)
        return value_and_grads(of_all, state, x, g, **OPTIONS)

    def on_device(x, g):
        # The loss of each device is the mean over its own examples, here one of eight.
        shared = params._replace(moving_products=8 * old)
        options = {"axis_name": "d", **OPTIONS}
        y, moved, of_params, of_x = value_and_grads(shared, state, x, 8 * g, **options)
        return y, moved, jax.lax.pmean(of_params, "d"), of_x

    def shards(a):
        return a.reshape(8, 1, 5, 3)

    y, moved, of_params, of_x = alone(x, g)
    got = jax.pmap(on_device, axis_name="d", devices=devices)(shards(x), shards(g))
    got_y, got_moved, got_of_params, got_of_x = jax.device_get(got)
    np.testing.assert_allclose(got_y, shards(y), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_of_x / 8, shards(of_x), rtol=1e-3, atol=1e-5)
    one = jax.tree.map(lambda a: a[5], (got_moved, got_of_params))
    chex.assert_trees_all_close(one[0], moved, rtol=1e-5)
    same = one[1]._replace(moving_products=one[1].moving_products / 8)
    chex.assert_trees_all_close(same, of_params, rtol=1e-3, atol=1e-5)
    assert np.abs(of_params.moving_products).max() > 0.1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="dense")(x)
        norm = linen_lib.norm("mabn:num_batches=2,warm_up=2")
        return norm(use_running_average=not train, name="norm")(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx_lib.norm("mabn:num_batches=2,warm_up=2")(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def test_masks_tell_averages_from_parameters_in_both_apis():
    variables = Net().init(jax.random.key(0), jnp.ones((2, 3)), False)
    of_dense = {"kernel": False, "bias": False}
    for given in (variables, {"params": variables["params"]}):
        assert moving_param_mask(given) == {
            "dense": of_dense,
            "norm": {"scale": False, "bias": False, "moving_products": True},
        }
    assert norm_param_mask(variables) == {
        "dense": of_dense,
        "norm": {"scale": True, "bias": True, "moving_products": False},
    }
    model = NNXNet(nnx.Rngs(0))
    mask = moving_param_mask(model)
    chex.assert_trees_all_equal_structs(mask, nnx.as_pure(nnx.state(model, nnx.Param)))
    assert sum(jax.tree.leaves(mask)) == 1 and mask["norm"]["moving_products"]


def test_a_loop_of_ones_own_moves_the_products_by_the_mask():
    model = NNXNet(nnx.Rngs(0))
    mask = moving_param_mask(model)
    optimizer = nnx.Optimizer(
        model,
        optax.multi_transform({True: optax.sgd(1.0), False: optax.adam(1e-3)}, mask),
        wrt=nnx.Param,
    )

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(jnp.sin(model(x))))(model)
        before = model.norm.moving_products[...]
        optimizer.update(model, grads)
        return before

    seen = [step(model, optimizer, normal((6, 3), seed=i)) for i in range(4)]
    seen.append(model.norm.moving_products[...])
    for before, after in zip(seen, seen[1:], strict=False):
        np.testing.assert_allclose(after[0], before[1], rtol=1e-5, atol=1e-7)
    assert all(np.abs(after[1]).max() > 1e-4 for after in seen[1:])


def test_centred_kernels_take_the_mean_of_a_patch_away():
    model = LeNet(centred_kernels=True, bias_before_norm=False)
    x = np.float32(np.random.default_rng(0).random((2, 28, 28, 1)))

    def first_layer(x):
        variables = model.init(jax.random.key(0), x, train=False)
        _, kept = model.apply(
            variables, x, train=False, capture_intermediates=True, mutable=True
        )
        outputs = kept["intermediates"]["conv1"]["__call__"][0]
        return variables["params"]["conv1"]["kernel"], outputs

    kernel, outputs = jax.jit(first_layer)(x)
    _, shifted = jax.jit(first_layer)(x + 3)
    np.testing.assert_allclose(shifted, outputs, atol=1e-4)
    assert np.abs(np.mean(kernel, (0, 1, 2))).max() > 0.01  # it is not stored so


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"warm_up": 1}, "warm_up=1 is less than num_batches=2; expected as many"),
        ({"r_max": 0.5}, "r_max=0.5; expected"),
        ({"epsilon": -1.0}, "epsilon=-1.0; expected"),
        ({"x": jnp.ones((0, 3))}, "is empty; training mode needs"),
        ({"x": jnp.ones((2, 4))}, r"scale has shape \[3\], but x"),
        (
            {"state": init(3, num_batches=4)[1]},
            r"state.squares has shape \[4, 3\]; expected \[2, 3\], a row of features",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    params, state = fresh()
    given = {"x": BATCHES[0], "state": state, **call}
    with pytest.raises(ValueError, match=message):
        mabn(given.pop("x"), params, train=True, **given)
    with pytest.raises(ConfigError, match=r"norm='mabn': warm_up=8 is less than"):
        NORMS.make("mabn:warm_up=8")
    with pytest.raises(ConfigError, match=r"norm='mabn': num_batches=0; expected"):
        mabn_transform(num_batches=0)
    with pytest.raises(ValueError, match="num_batches=-1; expected"):
        init(3, num_batches=-1)
    with pytest.warns(UserWarning, match="one value a feature"):
        mabn(jnp.ones((1, 3)), params, state, train=True)
