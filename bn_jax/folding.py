"""Batch norm folded into the dense layer or convolution before it, for prediction.

With fixed statistics, batch norm after a linear layer is a linear layer again:

  gamma (W x + b - mean) / sigma + beta = (gamma / sigma) W x + b',
  b' = (b - mean) gamma / sigma + beta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

Path = tuple[str, ...]
Flat = dict[Path, Array]
Predict = Callable[[Any, Array], Any]


def fold(predict: Predict, variables: Any, inputs: Array) -> dict[str, Any]:
    """Return the parameters of a Flax model with every batch norm folded away.

    They are those of the same model without norms, whose linear layers all have a bias:
    `LeNet(norm=None).apply({"params": folded}, x, train=False)`.

    That a layer's output goes to its norm as it is, and nowhere else, is read off a
    trace of the model. That the norm is over the layer's features cannot be, so the
    folding is tried out on `inputs`: kernels scaled in place, norms made shifts, and
    the outputs compared.

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
    params: Flat = dict(traverse_util.flatten_dict(variables.get("params", {})))
    stats: Flat = dict(traverse_util.flatten_dict(variables.get("batch_stats", {})))
    norms = {path[:-1] for path in stats if path[-1] == "mean"}
    pairs, faults = _find_pairs(predict, variables, inputs, norms)
    faults += _misfits(pairs, params, stats)
    _refuse(faults)
    _refuse(_used_elsewhere(predict, variables, inputs, pairs))

    folded, in_place, shifts = dict(params), dict(params), dict(stats)
    for norm, linear, _, epsilon in pairs:
        scale, bias = params.get((*norm, "scale")), params.get((*norm, "bias"))
        kernel, b = params[(*linear, "kernel")], params.get((*linear, "bias"))
        mean, var = stats[(*norm, "mean")], stats[(*norm, "var")]
        multiplier = jax.lax.rsqrt(var + epsilon)
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
        shifts[(*norm, "var")] = jnp.full_like(var, 1 - epsilon)

    in_place_variables = {
        **variables,
        "params": traverse_util.unflatten_dict(in_place),
        "batch_stats": traverse_util.unflatten_dict(shifts),
    }
    if pairs:
        before, after = predict(variables, inputs), predict(in_place_variables, inputs)
        _check_equal(before, after, pairs)
    return traverse_util.unflatten_dict(folded)


class _Pair(NamedTuple):
    """A norm and the linear layer whose output it is given."""

    norm: Path
    linear: Path
    output: Any  # of the linear layer, as traced: its shape and dtype
    epsilon: float  # of the norm


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("x")


def _find_pairs(
    predict: Predict, variables: Any, inputs: Array, norms: set[Path]
) -> tuple[list[_Pair], list[str]]:
    """Return the norms with the linear layers before them, and what stands against."""
    calls: list[tuple[Any, Any, Any]] = []  # module, input, output

    def record(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append((context.module, _input(args, kwargs), y))
        return y

    def trace(variables: Any, inputs: Array) -> None:
        with nn.intercept_methods(record):
            predict(variables, inputs)

    jax.eval_shape(trace, variables, inputs)
    params = traverse_util.flatten_dict(variables.get("params", {}))
    num_calls = Counter(module.path for module, _, _ in calls)

    pairs: list[_Pair] = []
    faults: list[str] = []
    for module, x, _ in calls:
        norm = module.path
        if norm not in norms or any(norm == pair.norm for pair in pairs):
            continue
        # Replacing outputs inside nn.jit would leave them in its cache.
        if module.scope.root.path:
            faults.append(
                f"{_name(norm)} is inside a lifted transform (nn.jit, nn.remat, "
                f"nn.scan or nn.vmap) at {_name(module.scope.root.path)}"
            )
            continue
        sources = [
            (other, y)
            for other, _, y in calls
            if y is x and (*other.path, "kernel") in params
        ]
        if not sources:
            faults.append(
                f"{_name(norm)} is not given the output of a layer with a kernel as it "
                "is: something stands between, or nothing linear before"
            )
            continue
        linear, y = sources[-1]
        features = params[(*linear.path, "kernel")].shape[-1]
        if getattr(linear, "features", features) != features:
            faults.append(
                f"{_name(linear.path)} has features={linear.features}, not the last "
                f"axis of its kernel, {features}"
            )
        for path in (norm, linear.path):
            if num_calls[path] > 1:
                faults.append(f"{_name(path)} is called {num_calls[path]} times")
        pairs.append(_Pair(norm, linear.path, y, module.epsilon))
    uncalled = sorted(norms - num_calls.keys())
    faults += [f"no call of {_name(norm)} was seen" for norm in uncalled]
    return pairs, list(dict.fromkeys(faults))


def _misfits(pairs: list[_Pair], params: Flat, stats: Flat) -> list[str]:
    """Return what is against the pairs in their parameters and statistics."""
    faults = [
        f"{_name(linear)} is followed by several norms"
        for linear, count in Counter(pair.linear for pair in pairs).items()
        if count > 1
    ]
    for norm, linear, _, _ in pairs:
        features = params[(*linear, "kernel")].shape[-1:]
        shape = stats[(*norm, "mean")].shape
        if shape != features:
            faults.append(
                f"{_name(norm)} has statistics of shape {list(shape)}, not one for "
                f"each of the {features[0]} outputs of {_name(linear)}"
            )
        bias = params.get((*linear, "bias"))
        if bias is not None and bias.shape != features:
            faults.append(
                f"{_name(linear)} has a bias of shape {list(bias.shape)}, not one for "
                f"each of its {features[0]} outputs"
            )
    return faults


def _used_elsewhere(
    predict: Predict, variables: Any, inputs: Array, pairs: list[_Pair]
) -> list[str]:
    """Return the linear layers whose output is used by more than their norm.

    The model is traced with each of these outputs replaced, for all but the norm, by an
    argument of the trace; an argument that some operation uses tells on its layer.
    """
    linear_before = {pair.norm: pair.linear for pair in pairs}

    def with_outputs(replacements: dict[Path, Array]) -> Any:
        outputs: dict[Path, Array] = {}

        def intercept(
            next_fun: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            path = context.module.path
            if context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            if path in linear_before:
                kwargs = {key: kwargs[key] for key in kwargs if key != "x"}
                return next_fun(outputs[linear_before[path]], *args[1:], **kwargs)
            y = next_fun(*args, **kwargs)
            if path not in replacements:
                return y
            outputs[path] = y
            return replacements[path]

        with nn.intercept_methods(intercept):
            return predict(variables, inputs)

    replaced = {
        pair.linear: jax.ShapeDtypeStruct(pair.output.shape, pair.output.dtype)
        for pair in pairs
    }
    jaxpr = jax.make_jaxpr(with_outputs)(replaced).jaxpr
    used = {id(var) for eqn in jaxpr.eqns for var in eqn.invars}
    used |= {id(var) for var in jaxpr.outvars}
    # Arguments come in the order of a tree's leaves: that of the sorted paths.
    return [
        f"the output of {_name(linear)} is used elsewhere than in its norm"
        for linear, var in zip(sorted(replaced), jaxpr.invars, strict=True)
        if id(var) in used
    ]


def _check_equal(before: Any, after: Any, pairs: list[_Pair]) -> None:
    """Refuse a folding that changes the outputs."""
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for old, new in leaves:
        size = float(jnp.max(jnp.abs(old)))
        difference = float(jnp.max(jnp.abs(old - new)))
        if not difference <= 1e-4 * size:
            names = ", ".join(_name(pair.norm) for pair in pairs)
            _refuse(
                [
                    f"outputs of size {size:.2g} change by {difference:.2g}, so one of "
                    f"the norms {names} is over another axis than the features before "
                    "it, or a kernel before one is not used as it is, or is shared"
                ]
            )


def _name(path: Path) -> str:
    return "/".join(path)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(
            "cannot fold batch norm into the layers before it: "
            f"{'; '.join(faults)}. Expected each norm directly after a dense layer or "
            "convolution of its own; predict with the model as it is"
        )
