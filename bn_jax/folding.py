"""Batch norm folded into the dense layer or convolution before it, for prediction.

With fixed statistics, batch norm after a linear layer is a linear layer again:

  gamma (W x + b - mean) / sigma + beta = (gamma / sigma) W x + b',
  b' = (b - mean) gamma / sigma + beta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

from bn_jax.linen import check_variables
from bn_jax.moments import reduction_axes

Path = tuple[str, ...]
Flat = dict[Path, Array]
Predict = Callable[[Any, Array], Any]


def fold(predict: Predict, variables: Any, inputs: Array) -> dict[str, Any]:
    """Return the parameters of a Flax model with every batch norm folded away.

    They are those of the same model without norms, whose linear layers all have a bias:
    `LeNet(norm=None).apply({"params": folded}, x, train=False)`.

    That a layer's output goes to its norm as it is, and nowhere else, is read off a
    trace of the model. The rest cannot be, so it is tried out on `inputs`, in ways in
    which rounding hardly matters, whatever the dtype and the depth:

    - With kernels of 0 each norm must give its layer's new bias, to four roundings of
      the terms that it is summed from.
    - With the features of each layer times powers of 2, which round nothing, and its
      norm made to take them back, the outputs must stay the same: to 1e-4 of their
      largest, or four roundings of their dtype where that is more.

    The folded model rounds elsewhere than the model. Where that matters, as in half
    precision or under inputs far from 0, compare their outputs.

    Args:
      predict: function of `(variables, inputs)` that applies the model in prediction
        mode.
      variables: of the model, with the statistics to fold.
      inputs: a few examples, on which the folding is checked.

    Returns:
      The new `params`.

    Raises:
      ValueError: if a norm cannot be folded; all such norms and reasons are named. If
        variables are no Linen model's.
    """
    check_variables(variables)
    params: Flat = dict(traverse_util.flatten_dict(variables.get("params", {})))
    stats: Flat = dict(traverse_util.flatten_dict(variables.get("batch_stats", {})))
    norms = {path[:-1] for path in stats if path[-1] in ("mean", "var")}
    pairs, faults = _find_pairs(predict, variables, inputs, norms, set(stats))
    faults += _misfits(pairs, params, stats)
    _refuse(faults)
    _refuse(_used_elsewhere(predict, variables, inputs, pairs))

    folded = dict(params)
    for pair in pairs:
        kernel = params[(*pair.linear, "kernel")]
        multiplier, new_bias, _ = _affine(pair, params, stats)
        folded[(*pair.linear, "kernel")] = (kernel * multiplier).astype(kernel.dtype)
        folded[(*pair.linear, "bias")] = new_bias.astype(kernel.dtype)
        for name in ("scale", "bias"):
            folded.pop((*pair.norm, name), None)

    def with_flat(params: Flat, stats: Flat) -> dict[str, Any]:
        return {
            **variables,
            "params": traverse_util.unflatten_dict(params),
            "batch_stats": traverse_util.unflatten_dict(stats),
        }

    if pairs:
        before = predict(variables, inputs)
        after = predict(with_flat(*_rescaled(pairs, params, stats)), inputs)
        _check_equal(before, after, pairs)
        zero = {(*p.linear, "kernel"): params[(*p.linear, "kernel")] * 0 for p in pairs}
        calls = _calls(predict, with_flat(params | zero, stats), inputs)
        _refuse(_wrong_shifts(calls, pairs, params, stats))
    return traverse_util.unflatten_dict(folded)


class _Pair(NamedTuple):
    """A norm and the linear layer whose output it is given."""

    norm: Path
    linear: Path
    output: Any  # of the linear layer, as traced: its shape and dtype
    epsilon: float  # of the norm
    axis: int | Sequence[int]  # of the norm


class _Call(NamedTuple):
    """One call of a module."""

    module: Any
    x: Any  # input
    y: Any  # output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("x")


def _calls(predict: Predict, variables: Any, inputs: Array) -> list[_Call]:
    """Apply a model and return the calls of its modules in order."""
    calls: list[_Call] = []

    def record(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append(_Call(context.module, _input(args, kwargs), y))
        return y

    with nn.intercept_methods(record):
        predict(variables, inputs)
    return calls


def _find_pairs(
    predict: Predict,
    variables: Any,
    inputs: Array,
    norms: set[Path],
    stats: set[Path],
) -> tuple[list[_Pair], list[str]]:
    """Return the norms with the linear layers before them, and what stands against."""
    calls: list[_Call] = []

    def trace(variables: Any, inputs: Array) -> None:
        calls.extend(_calls(predict, variables, inputs))

    jax.eval_shape(trace, variables, inputs)
    params = traverse_util.flatten_dict(variables.get("params", {}))
    num_calls = Counter(module.path for module, _, _ in calls)

    pairs: list[_Pair] = []
    faults: list[str] = []
    for module, x, _ in calls:
        norm = module.path
        if norm not in norms or any(norm == pair.norm for pair in pairs):
            continue
        if {(*norm, "mean"), (*norm, "var")} - stats or module.epsilon is None:
            faults.append(
                f"{_name(norm)} does not predict by a mean and a variance, as batch "
                "norm does"
            )
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
        axis = getattr(module, "axis", -1)
        pairs.append(_Pair(norm, linear.path, y, module.epsilon, axis))
    uncalled = sorted(norms - num_calls.keys())
    faults += [f"no call of {_name(norm)} was seen" for norm in uncalled]
    return pairs, list(dict.fromkeys(faults))


def _misfits(pairs: list[_Pair], params: Flat, stats: Flat) -> list[str]:
    """List the reasons why the pairs cannot be folded."""
    faults = [
        f"{_name(linear)} is followed by several norms"
        for linear, count in Counter(pair.linear for pair in pairs).items()
        if count > 1
    ]
    for norm, linear, *_ in pairs:
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


def _affine(pair: _Pair, params: Flat, stats: Flat) -> tuple[Array, Array, Array]:
    """Return the factor of a norm, the new bias, and the size of its terms."""
    b = params.get((*pair.linear, "bias"), jnp.zeros(()))
    mean, var = stats[(*pair.norm, "mean")], stats[(*pair.norm, "var")]
    multiplier = jax.lax.rsqrt(var + pair.epsilon)
    multiplier = multiplier * params.get((*pair.norm, "scale"), 1)
    beta = params.get((*pair.norm, "bias"), 0)
    size = (jnp.abs(b) + jnp.abs(mean)) * jnp.abs(multiplier) + jnp.abs(beta)
    return multiplier, (b - mean) * multiplier + beta, size


def _wrong_shifts(
    calls: list[_Call], pairs: list[_Pair], params: Flat, stats: Flat
) -> list[str]:
    """Return the norms that, with kernels of 0, give other than the new bias.

    Nothing of one layer reaches the next then, so that no rounding adds up. Calls that
    are not seen, as a `predict` compiled before hides them, are not checked.
    """
    of_norm = {call.module.path: call for call in calls}
    faults = []
    for pair in pairs:
        call = of_norm.get(pair.norm)
        if call is None or isinstance(call.y, jax.core.Tracer):
            continue
        _, new_bias, size = _affine(pair, params, stats)
        axes = reduction_axes(call.y.ndim, pair.axis)
        dtypes = (pair.output.dtype, call.y.dtype, new_bias.dtype)
        allowed = 4 * max(_rounding(dtype) for dtype in dtypes) * size
        # An infinite input times 0 is NaN, and no fault of the norm's.
        difference = jnp.abs(call.y - jnp.expand_dims(new_bias, axes))
        if jnp.any(difference > jnp.expand_dims(allowed, axes)):
            faults.append(
                f"{_name(pair.norm)} does not give (bias - mean) gamma / sigma + beta "
                f"where the kernel of {_name(pair.linear)} is 0, so the bias is not "
                "used as it is, or the norm is not batch norm"
            )
    return faults


def _rescaled(pairs: list[_Pair], params: Flat, stats: Flat) -> tuple[Flat, Flat]:
    """Return parameters and statistics that give the same outputs, without rounding.

    Each linear layer's features are multiplied by -2, 4, -8, -2 and so on, and its
    norm takes that back: powers of 2 commute with rounding. Norms of no gamma take it
    back by their variance, of which no sign can come.
    """
    params, stats = dict(params), dict(stats)
    for pair in pairs:
        mean, var = stats[(*pair.norm, "mean")], stats[(*pair.norm, "var")]
        factor = (-2.0) ** (1 + jnp.arange(len(mean)) % 3)
        scale = params.get((*pair.norm, "scale"))
        if scale is None:
            factor = jnp.abs(factor)
            new_var = (var + pair.epsilon) * factor**2 - pair.epsilon
            stats[(*pair.norm, "var")] = new_var.astype(var.dtype)
        else:
            params[(*pair.norm, "scale")] = (scale / factor).astype(scale.dtype)
        stats[(*pair.norm, "mean")] = (mean * factor).astype(mean.dtype)
        for name in ("kernel", "bias"):
            value = params.get((*pair.linear, name))
            if value is not None:
                new_value = (value * factor).astype(value.dtype)
                params[(*pair.linear, name)] = new_value
    return params, stats


def _check_equal(before: Any, after: Any, pairs: list[_Pair]) -> None:
    """Refuse to fold where features times powers of 2 change the outputs."""
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for old, new in (map(jnp.asarray, pair) for pair in leaves):
        if not jnp.all(jnp.isfinite(old)):
            _refuse(["the outputs of the model as it is are not finite on inputs"])
        if not jnp.all(jnp.isfinite(new)):
            _refuse(
                [
                    "the outputs are not finite once the inputs of the norms are up to "
                    f"8 times as large, too much for {old.dtype}: fold in a wider dtype"
                ]
            )
        rounding = _rounding(old.dtype)
        wide = jnp.promote_types(old.dtype, jnp.float32)
        old, new = old.astype(wide), new.astype(wide)
        size = float(jnp.max(jnp.abs(old)))
        difference = float(jnp.max(jnp.abs(old - new)))
        allowed = max(1e-4, 4 * rounding) * size
        if difference <= allowed:
            continue
        names = ", ".join(_name(pair.norm) for pair in pairs)
        fault = (
            f"outputs of size {size:.2g} change by {difference:.2g}, beyond "
            f"{allowed:.2g}, where features are multiplied and their norms take it "
            f"back, so one of the norms {names} is over another axis than the features "
            "before it, or a kernel before one is not used as it is, or is shared"
        )
        if difference <= 100 * allowed:
            fault += "; or, as it is small, it is rounding: fold in wider dtypes"
        _refuse([fault])


def _rounding(dtype: Any) -> float:
    """Return the relative distance of neighbouring numbers, 0 of integers."""
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _name(path: Path) -> str:
    return "/".join(path)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(
            "cannot fold batch norm into the layers before it: "
            f"{'; '.join(faults)}. Expected each norm directly after a dense layer or "
            "convolution of its own; predict with the model as it is"
        )
