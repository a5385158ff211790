"""Batch norm alone, forward and backward in training, as each library calls it.

Every call computes y and the gradients of x, gamma and beta for a given gradient of y.
`experiments.benchmarks.batch_norm` times them. Libraries that need not be installed are
imported by the functions that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax

import bn_jax

MOMENTUM, EPSILON = 0.9, 1e-5


class Case(NamedTuple):
    """The arguments of a call."""

    x: np.ndarray  # shape [N, H, W, C], float32
    dy: np.ndarray  # gradient of y; likewise
    gamma: np.ndarray  # shape [C], float32
    beta: np.ndarray  # likewise


class Result(NamedTuple):
    """The results that are compared with the reference."""

    y: np.ndarray  # shape [N, H, W, C]
    dx: np.ndarray  # likewise
    dgamma: np.ndarray  # shape [C]
    dbeta: np.ndarray  # likewise


class Call(NamedTuple):
    """A library's batch norm at one shape."""

    run: Callable[[], Any]  # calls it once and waits for the result
    result: Callable[[], Result]


# (params, state, x) -> (y, new state), in JAX; params and state are the library's.
Apply = Callable[[Any, Any, Any], tuple[Any, Any]]


class Layer(NamedTuple):
    """A library's batch norm as a pure function in JAX, and its arguments."""

    apply: Apply
    params: Any  # the library's own tree
    state: Any  # likewise
    gamma_beta: Callable[[Any], tuple[Any, Any]]  # picks them from a tree like params


def make_case(shape: Sequence[int]) -> Case:
    """Return random arguments for x of a shape; they are the same in every process."""
    rng = np.random.default_rng(0)
    features = shape[-1]
    return Case(
        x=rng.normal(1, 2, shape).astype(np.float32),
        dy=rng.normal(0, 1, shape).astype(np.float32),
        gamma=rng.uniform(0.5, 1.5, features).astype(np.float32),
        beta=rng.normal(0, 1, features).astype(np.float32),
    )


def reference(case: Case) -> Result:
    r"""Compute the results in float64.

    $$\hat x = (x - \mu) / \sqrt{\sigma^2 + \epsilon}, \quad
      d\gamma = \sum dy\,\hat x, \quad d\beta = \sum dy, \quad
      dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}
           (dy - (d\beta + \hat x\,d\gamma) / n)$$
    """
    x, dy, gamma, beta = (a.astype(np.float64) for a in case)
    axes = tuple(range(x.ndim - 1))
    r = 1 / np.sqrt(x.var(axes) + EPSILON)
    x_hat = (x - x.mean(axes)) * r
    dgamma, dbeta = (dy * x_hat).sum(axes), dy.sum(axes)
    n = x.size // x.shape[-1]
    dx = gamma * r * (dy - (dbeta + x_hat * dgamma) / n)
    return Result(gamma * x_hat + beta, dx, dgamma, dbeta)


def errors(result: Result, true: Result) -> dict[str, float]:
    """Return the greatest error of each result, relative to its greatest value."""
    return {
        name: float(np.abs(value - right).max() / np.abs(right).max())
        for name, value, right in zip(Result._fields, result, true, strict=True)
    }


def step_of(layer: Layer) -> Any:
    """Return a jitted `step(params, state, x, dy)`, forward and backward."""

    @jax.jit
    def step(params: Any, state: Any, x: Any, dy: Any) -> Any:
        y, pullback, state = jax.vjp(
            lambda params, x: layer.apply(params, state, x), params, x, has_aux=True
        )
        return y, pullback(dy), state

    return step


def by_jax(
    make_layer: Callable[[Case], Layer], *, channels_first: bool = False
) -> Callable[[Case], Call]:
    """Return a function that sets up a JAX library's layer as one jitted call.

    Args:
      make_layer: returns the layer for a case.
      channels_first: whether x is laid out as [C, H, W, N].
    """

    def make(case: Case) -> Call:
        def laid_out(array: Any) -> Any:
            # The layout of our LeNet on CPU.
            return array.transpose(3, 1, 2, 0) if channels_first else array

        layer = make_layer(case)
        step = step_of(layer)
        x, dy = (jnp.asarray(laid_out(a)) for a in (case.x, case.dy))
        state = layer.state

        def run() -> Any:
            nonlocal state
            y, gradients, state = jax.block_until_ready(
                step(layer.params, state, x, dy)
            )
            return y, gradients

        def result() -> Result:
            y, (dparams, dx) = run()
            given = (laid_out(y), laid_out(dx), *layer.gamma_beta(dparams))
            return Result(*(np.asarray(value) for value in given))

        return Call(run, result)

    return make


def bn_jax_layer(case: Case, *, feature_axis: int = -1) -> Layer:
    """Return our function."""

    def apply(params: Any, state: Any, x: Any) -> Any:
        return bn_jax.batch_norm(
            x,
            params,
            state,
            train=True,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            feature_axis=feature_axis,
        )

    _, state = bn_jax.init(len(case.gamma))
    params = bn_jax.BatchNormParams(case.gamma, case.beta)
    return Layer(apply, params, state, lambda params: (params.scale, params.bias))


def one_pass_layer(case: Case) -> Layer:
    """Return the textbook form, whose variance loses digits where the mean is large."""

    def apply(params: Any, state: Any, x: Any) -> Any:
        gamma, beta = params
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = (x * x).mean(axes) - mean * mean
        r = gamma * lax.rsqrt(var + EPSILON)
        moved = [
            MOMENTUM * old + (1 - MOMENTUM) * new
            for old, new in zip(state, (mean, var), strict=True)
        ]
        return x * r + (beta - mean * r), moved

    features = len(case.gamma)
    state = [jnp.zeros(features), jnp.ones(features)]
    return Layer(apply, (case.gamma, case.beta), state, lambda params: params)


def linen_layer(case: Case, *, module: Callable[..., linen.Module]) -> Layer:
    """Return the batch norm of a Linen module, such as `flax.linen.BatchNorm`."""
    layer = module(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON)

    def apply(params: Any, state: Any, x: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    small = jnp.zeros((2, len(case.gamma)))
    state = layer.init(jax.random.key(0), small)["batch_stats"]
    params = {"scale": case.gamma, "bias": case.beta}
    return Layer(apply, params, state, lambda p: (p["scale"], p["bias"]))


def nnx_layer(case: Case, *, module: Callable[..., Any]) -> Layer:
    """Return the batch norm of an NNX module, such as `flax.nnx.BatchNorm`."""
    layer = module(
        len(case.gamma),
        use_running_average=False,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        rngs=nnx.Rngs(0),
    )
    layer.scale.set_value(jnp.asarray(case.gamma))
    layer.bias.set_value(jnp.asarray(case.beta))
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params: Any, state: Any, x: Any) -> Any:
        merged = nnx.merge(graph, params, state, copy=True)
        y = merged(x)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    return Layer(
        apply, params, state, lambda p: (p["scale"].get_value(), p["bias"].get_value())
    )


def haiku_layer(case: Case) -> Layer:
    """Return Haiku's module."""
    import haiku as hk

    model = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x: hk.BatchNorm(True, True, decay_rate=MOMENTUM, eps=EPSILON)(
                x, is_training=True
            )
        )
    )
    small = jnp.zeros((2, *[1] * (case.x.ndim - 2), len(case.gamma)))
    params, state = model.init(jax.random.key(0), small)
    (name,) = params
    given = {"scale": case.gamma, "offset": case.beta}
    own = params[name]
    params = {name: {k: v.reshape(own[k].shape) for k, v in given.items()}}

    def gamma_beta(params: Any) -> tuple[Any, Any]:
        return params[name]["scale"].ravel(), params[name]["offset"].ravel()

    return Layer(model.apply, params, state, gamma_beta)


def keras_layer(case: Case) -> Layer:
    """Return Keras's layer, on JAX."""
    from keras import layers

    layer = layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)
    layer.build(case.x.shape)
    moving = layer.get_weights()[2:]
    layer.set_weights([case.gamma, case.beta, *moving])

    def apply(params: Any, state: Any, x: Any) -> Any:
        return layer.stateless_call(params, state, x, training=True)

    params, state = (
        [variable.value for variable in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )
    return Layer(apply, params, state, tuple)


def torch_call(case: Case, *, channels_last: bool) -> Call:
    """Set up PyTorch's layer; its shapes are channels first in either memory format."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layer = torch.nn.BatchNorm2d(
        len(case.gamma), eps=EPSILON, momentum=1 - MOMENTUM, device=device
    )
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(case.gamma))
        layer.bias.copy_(torch.tensor(case.beta))
    x, dy = (
        torch.tensor(a, device=device)
        .permute(0, 3, 1, 2)
        .contiguous(memory_format=memory_format)
        for a in (case.x, case.dy)
    )
    inputs = (x.requires_grad_(), layer.weight, layer.bias)

    def run() -> Any:
        y = layer(x)
        gradients = torch.autograd.grad(y, inputs, dy)
        if device == "cuda":
            torch.cuda.synchronize()
        return y, gradients

    def result() -> Result:
        y, (dx, dgamma, dbeta) = run()
        y, dx = (value.detach().permute(0, 2, 3, 1) for value in (y, dx))
        return Result(*(v.cpu().numpy() for v in (y, dx, dgamma, dbeta)))

    return Call(run, result)


def bandwidth_call(case: Case) -> Call:
    """Set up a program that reads x once and writes an array of its size once."""
    x = jnp.asarray(case.x)
    scaled = jax.jit(lambda x: 1.5 * x)
    return Call(
        run=lambda: scaled(x).block_until_ready(),
        result=lambda: reference(case),  # there is nothing to check
    )
