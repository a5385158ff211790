"""Batch norm folded into the dense layer or convolution before it, for prediction.

With fixed statistics, batch norm after a linear layer is a linear layer again:

  gamma (W x + b - mean) / sigma + beta = (gamma / sigma) W x + b',
  b' = (b - mean) gamma / sigma + beta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

Path = tuple[str, ...]
Flat = dict[Path, Array]


def fold(
    predict: Callable[[Any, Array], Array], variables: Any, inputs: Array
) -> dict[str, Any]:
    """Return the parameters of a Flax model with every batch norm folded away.

    They are those of the same model without norms, whose linear layers all have a bias:
    `LeNet(norm=None).apply({"params": folded}, x, train=False)`.

    That a layer's output goes to its norm alone cannot be read off a model, so the
    folding is tried out on `inputs`: the kernels are scaled in place, the norms made
    shifts, and the outputs compared.

    Args:
      predict: function of `(variables, inputs)` that applies the model in prediction
        mode.
      variables: of the model, with the statistics to fold.
      inputs: a few examples, on which the folding is checked.

    Returns:
      The new `params`.

    Raises:
      ValueError: if a norm cannot be folded; all such norms and reasons are named.
    """
    params: Flat = dict(traverse_util.flatten_dict(variables["params"]))
    stats: Flat = dict(traverse_util.flatten_dict(variables.get("batch_stats", {})))
    norms = {path[:-1] for path in stats if path[-1] == "mean"}
    pairs, epsilons, faults = _find_pairs(predict, variables, inputs, norms)
    faults += [
        f"{'/'.join(linear)} is followed by several norms"
        for linear in set(pairs.values())
        if list(pairs.values()).count(linear) > 1
    ]
    faults += [
        f"{'/'.join(norm)} has statistics of shape "
        f"{list(stats[(*norm, 'mean')].shape)}, not one for each of the "
        f"{params[(*linear, 'kernel')].shape[-1]} outputs of {'/'.join(linear)}"
        for norm, linear in pairs.items()
        if stats[(*norm, "mean")].shape != params[(*linear, "kernel")].shape[-1:]
    ]
    _refuse(faults)

    folded, in_place, shifts = dict(params), dict(params), dict(stats)
    for norm, linear in pairs.items():
        scale, bias = params.get((*norm, "scale")), params.get((*norm, "bias"))
        kernel, b = params[(*linear, "kernel")], params.get((*linear, "bias"))
        mean, var = stats[(*norm, "mean")], stats[(*norm, "var")]
        multiplier = jax.lax.rsqrt(var + epsilons[norm])
        if scale is not None:
            multiplier = multiplier * scale
        new_kernel = (kernel * multiplier).astype(kernel.dtype)
        new_bias = ((0 if b is None else b) - mean) * multiplier
        new_bias = new_bias if bias is None else new_bias + bias
        folded[(*linear, "kernel")] = in_place[(*linear, "kernel")] = new_kernel
        folded[(*linear, "bias")] = new_bias.astype(kernel.dtype)
        for name in ("scale", "bias"):
            folded.pop((*norm, name), None)

        # The same model with kernels scaled and the norm a shift by the new bias.
        identity = {"scale": jnp.ones_like, "bias": jnp.zeros_like}
        for name, value in identity.items():
            if (*norm, name) in params:
                in_place[(*norm, name)] = value(params[(*norm, name)])
        if b is not None:
            in_place[(*linear, "bias")] = jnp.zeros_like(b)
        shifts[(*norm, "mean")] = -new_bias
        shifts[(*norm, "var")] = jnp.full_like(var, 1 - epsilons[norm])

    _check_equal(
        predict(variables, inputs),
        predict(
            {
                **variables,
                "params": traverse_util.unflatten_dict(in_place),
                "batch_stats": traverse_util.unflatten_dict(shifts),
            },
            inputs,
        ),
        pairs,
    )
    return traverse_util.unflatten_dict(folded)


def _find_pairs(
    predict: Callable[[Any, Array], Array],
    variables: Any,
    inputs: Array,
    norms: set[Path],
) -> tuple[dict[Path, Path], dict[Path, float], list[str]]:
    """Return the linear layer before each norm, the norms' epsilons, and what fails."""
    calls: list[tuple[Any, Any, Any]] = []  # module, input, output

    def record(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and args:
            calls.append((context.module, args[0], y))
        return y

    def trace(variables: Any, inputs: Array) -> None:
        with nn.intercept_methods(record):
            predict(variables, inputs)

    jax.eval_shape(trace, variables, inputs)
    params = traverse_util.flatten_dict(variables["params"])
    num_calls: dict[Path, int] = {}
    for module, _, _ in calls:
        num_calls[module.path] = num_calls.get(module.path, 0) + 1

    pairs: dict[Path, Path] = {}
    epsilons: dict[Path, float] = {}
    faults: list[str] = []
    for module, x, _ in calls:
        norm = module.path
        if norm not in norms or norm in epsilons:
            continue
        epsilons[norm] = module.epsilon
        sources = [
            other.path
            for other, _, y in calls
            if y is x and (*other.path, "kernel") in params
        ]
        if not sources:
            faults.append(
                f"{'/'.join(norm)} is not given the output of a layer with a kernel as "
                "it is: something stands between, or nothing linear before"
            )
            continue
        linear = sources[-1]
        for path in (norm, linear):
            if num_calls[path] > 1:
                faults.append(f"{'/'.join(path)} is called {num_calls[path]} times")
        pairs[norm] = linear
    uncalled = norms - epsilons.keys()
    faults += [f"{'/'.join(norm)} is not called" for norm in sorted(uncalled)]
    return pairs, epsilons, faults


def _check_equal(before: Array, after: Array, pairs: dict[Path, Path]) -> None:
    """Refuse a folding that changes the outputs."""
    size = float(jnp.max(jnp.abs(before)))
    difference = float(jnp.max(jnp.abs(before - after)))
    if not difference <= 1e-4 * max(size, 1.0):
        names = ", ".join("/".join(linear) for linear in pairs.values())
        _refuse(
            [
                f"the outputs change by {difference:.2g}, so the output of one of "
                f"{names} is used elsewhere than in its norm, or its norm is over "
                "another axis than its features"
            ]
        )


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(
            "cannot fold batch norm into the layers before it: "
            f"{'; '.join(faults)}. Expected each norm directly after a dense layer or "
            "convolution of its own; predict with the model as it is"
        )
