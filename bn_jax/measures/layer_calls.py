"""The calls of batch norm layers in a Flax model, seen from outside.

Layers are found by their collection `batch_stats{mean,var}`: ours, Flax's own, or any
with attributes `axis` and `epsilon`. A `bn_jax.linen.Norm` that keeps anything else,
such as a covariance, is refused. The calls are seen, and may be replaced, through
`flax.linen.intercept_methods`, which cannot look into Flax's lifted transforms: a layer
inside `nn.jit`, `nn.remat`, `nn.scan` or `nn.vmap` is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

from bn_jax.linen import Norm, check_variables
from bn_jax.moments import align_weights

Path = tuple[str, ...]
Predict = Callable[[Any, Array], Any]  # of variables and inputs, in prediction mode


class LayerCall(NamedTuple):
    """One call of a batch norm layer."""

    path: Path
    shape: tuple[int, ...]  # of the input
    epsilon: float


def layer_calls(predict: Predict, variables: Any, inputs: Any) -> list[LayerCall]:
    """Return the calls of batch norm layers in order, without computing anything.

    Raises:
      ValueError: if a layer is inside a lifted transform, or predicts by other
        statistics than a mean and a variance; or as `check_variables` says.
    """
    check_variables(variables)
    calls: list[LayerCall] = []

    def note(module: Any, x: Array, own_weights: Array | None) -> None:
        del own_weights
        # A lifted transform runs its modules in a scope that is a root of its own, and
        # traces them on values that do not exist outside it.
        if module.scope.root.path:
            raise ValueError(
                f"the input of layer {'/'.join(module.path)} cannot be seen inside a "
                f"lifted transform at {'/'.join(module.scope.root.path)}; expected no "
                "nn.remat, nn.jit, nn.scan or nn.vmap around batch norm: give a "
                "predict function of the same model without it (its variables are the "
                "same, or after nn.scan and nn.vmap slices of these)"
            )
        calls.append(LayerCall(module.path, x.shape, module.epsilon))

    def trace(variables: Any, inputs: Array) -> None:
        intercepted(predict, variables, inputs, note)

    jax.eval_shape(trace, variables, inputs)
    return calls


def _layers(variables: Any) -> set[Path]:
    """Return the paths of the layers that hold a mean and a variance."""
    flat = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    return {p[:-1] for p in flat if p[-1] == "mean" and (*p[:-1], "var") in flat}


def check_all_called(variables: Any, called: Sequence[Path]) -> None:
    """Refuse layers that would keep their statistics without a word.

    Raises:
      ValueError: if a layer with batch statistics is none of those that were called.
    """
    missed = sorted("/".join(path) for path in _layers(variables) - set(called))
    if missed:
        raise ValueError(
            f"no call of {', '.join(missed)} was seen: a layer that predict does not "
            "call, or inside nn.jit; drop it from variables['batch_stats'], or give a "
            "predict function of the same model without nn.jit"
        )


def intercepted(
    predict: Predict,
    variables: Any,
    inputs: Array,
    each_call: Callable[[Any, Array, Array | None], Any],
    given: Mapping[int, Array] | None = None,
) -> Any:
    """Apply a model, showing `each_call` the layers, their inputs and weights.

    What `each_call` returns, unless None, replaces the layer's output; `given` replaces
    inputs, by the number of the call.
    """
    layers = _layers(variables)
    numbers = itertools.count()

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(module, Norm):
            _check_predicts_by_mean_and_var(module)
        if module.path not in layers:
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        x = (given or {}).get(next(numbers), x)
        y = each_call(module, x, _own_weights(module, x, kwargs))
        if y is not None:
            return y
        others = {name: value for name, value in kwargs.items() if name != "x"}
        return next_fun(x, *args[1:], **others)

    with nn.intercept_methods(intercept):
        return predict(variables, inputs)


def _check_predicts_by_mean_and_var(module: Norm) -> None:
    """Refuse a layer that predicts by other statistics than batch norm's."""
    kept = sorted(module.variables.get("batch_stats", {}))
    if kept and module.epsilon is None:
        raise ValueError(
            f"layer {'/'.join(module.path)}, norm={module.transform.name!r}, predicts "
            f"by {' and '.join(kept)}; statistics of a data set are measured for norms "
            "that predict by a mean and a variance, such as batch_norm and renorm"
        )


def _own_weights(module: Any, x: Array, kwargs: Mapping[str, Any]) -> Array | None:
    """Return the mask or weights that the model itself gives to a layer."""
    mask, weights = kwargs.get("mask"), kwargs.get("weights")
    if mask is not None:  # Flax's masks broadcast to x from the last axis on
        mask = jnp.asarray(mask, bool)
        weights = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return None if weights is None else align_weights(weights, x, module.axis)
