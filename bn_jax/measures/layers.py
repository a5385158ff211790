"""What layers are at a call: Flax's own and ours, of Linen and NNX."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bn_jax import modules
from bn_jax.functional import BatchNormParams, normalize
from bn_jax.moments import Moments, align_weights


class Layer(NamedTuple):
    """A batch norm layer at a call.

    Its variables are those that it sees, such as its slice inside `nn.scan`.
    """

    name: str
    axis: Any
    epsilon: float
    dtype: Any  # of the result; None for that of input and parameters
    mean: Array
    var: Array
    params: BatchNormParams  # gamma and beta
    scale_offset: float  # of gamma, which is stored without it
    zero_masked: bool


class Linear(NamedTuple):
    """A layer with a kernel at a call, such as a dense layer or a convolution."""

    name: str
    kernel: Array
    bias: Array | None
    features: Any  # as the layer declares them; None if it does not


Proceed = Callable[[Array], Array]  # calls a layer on an input
# Of a layer, its input, the mask or weights that the model itself gives it, and how to
# proceed. Returns the output.
EachCall = Callable[[Layer, Array, Array | None, Proceed], Array]
EachLinear = Callable[[Linear, Array, Proceed], Array]


@contextlib.contextmanager
def seen(each_call: EachCall, each_linear: EachLinear | None = None) -> Iterator[None]:
    """Hand each call of a batch norm layer to a function, while this context lasts.

    Args:
      each_call: called in place of the layer.
      each_linear: called in place of layers with kernels, if given.

    Raises:
      ValueError: at a layer that predicts by other statistics than a mean and a
        variance, or normalises by its batch.
    """
    with contextlib.ExitStack() as stack:
        interceptor = functools.partial(_linen_call, each_call, each_linear)
        stack.enter_context(nn.intercept_methods(interceptor))
        if "flax.nnx" in sys.modules:
            stack.enter_context(_nnx_seen(each_call, each_linear))
        yield


def normalized(
    layer: Layer, x: Array, moments: Moments, weights: Array | None
) -> Array:
    """Normalise by moments, as the layer does in training mode.

    Args:
      layer: whose call it is.
      x: its input.
      moments: what to normalise by.
      weights: those that the model itself gives to the layer.
    """
    dtype = nn.dtypes.canonicalize_dtype(x, *layer.params, dtype=layer.dtype)
    present = moments.count > 0  # a batch that is masked out has no moments
    kept = weights != 0 if layer.zero_masked and weights is not None else None
    y = normalize(
        x.astype(moments.mean.dtype),
        jnp.where(present, moments.mean, layer.mean),
        jnp.where(present, moments.var, layer.var),
        layer.params,
        epsilon=layer.epsilon,
        feature_axis=layer.axis,
    )
    return modules.zero_unless(kept, y).astype(dtype)


def _linen_call(
    each_call: EachCall,
    each_linear: EachLinear | None,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    return _call(
        each_call,
        each_linear,
        module,
        "/".join(module.path),
        module.variables.get("batch_stats", {}),
        module.variables.get("params", {}),
        call,
        args,
        kwargs,
    )


@contextlib.contextmanager
def _nnx_seen(each_call: EachCall, each_linear: EachLinear | None) -> Iterator[None]:
    """Replace the calls of NNX layers in this thread, as NNX has no interceptors."""
    from flax import nnx  # here, as those who use Linen alone need not wait for it

    from bn_jax.nnx import BatchNorm, Norm

    this_thread = threading.get_ident()

    def replaced(call: Callable[..., Any]) -> Callable[..., Any]:
        def seen_call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != this_thread:
                return call(module, *args, **kwargs)

            def values(kind: type[nnx.Variable[Any]]) -> dict[str, Any]:
                own = vars(module).items()
                return {name: v[...] for name, v in own if isinstance(v, kind)}

            return _call(
                each_call,
                each_linear,
                module,
                type(module).__name__,
                values(nnx.BatchStat),
                values(nnx.Param),
                functools.partial(call, module),
                args,
                kwargs,
            )

        return seen_call

    kinds = [nnx.BatchNorm, BatchNorm, Norm]
    if each_linear is not None:
        kinds += [nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose]
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            call = kind.__call__
            stack.callback(setattr, kind, "__call__", call)
            kind.__call__ = replaced(call)  # type: ignore[method-assign]
        yield


def _call(
    each_call: EachCall,
    each_linear: EachLinear | None,
    module: Any,
    name: str,
    statistics: Mapping[str, Any],
    params: Mapping[str, Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module by way of `each_call` or `each_linear`, if it is one of theirs."""
    x: Any = args[0] if args else kwargs.get("x", kwargs.get("inputs"))

    def proceed(x: Any) -> Any:
        others = {k: v for k, v in kwargs.items() if args or k not in ("x", "inputs")}
        return call(x, *args[1:], **others)

    if statistics:
        transform = getattr(module, "transform", None)
        epsilon = getattr(module, "epsilon", getattr(transform, "epsilon", None))
        if transform is not None and epsilon is None:
            raise ValueError(
                f"layer {name}, norm={transform.name!r}, predicts by "
                f"{' and '.join(sorted(statistics))}; expected norms that predict by a "
                "mean and a variance, such as batch_norm and renorm"
            )
        if epsilon is not None and {"mean", "var"} <= statistics.keys():
            if _uses_batch(module, args, kwargs):
                raise ValueError(
                    f"layer {name} normalises by its batch, as in training; expected a "
                    "model in prediction mode: give the module itself, or a function "
                    "that applies it with train=False, or whatever sets "
                    "use_running_average=True in its norms"
                )
            given = BatchNormParams(params.get("scale"), params.get("bias"))
            offset = getattr(module, "scale_offset", 0.0)
            layer = Layer(
                name,
                module.axis,
                epsilon,
                getattr(module, "dtype", None),
                statistics["mean"],
                statistics["var"],
                modules.with_offset(given, offset),
                offset,
                getattr(module, "zero_masked", False),
            )
            return each_call(layer, x, _weights_given(module, x, kwargs), proceed)
    if each_linear is not None and "kernel" in params:
        features = getattr(module, "features", getattr(module, "out_features", None))
        linear = Linear(name, params["kernel"], params.get("bias"), features)
        return each_linear(linear, x, proceed)
    return call(*args, **kwargs)


def _uses_batch(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a layer is called in training mode."""
    given = [*args[1:2], kwargs.get("use_running_average")]
    given.append(getattr(module, "use_running_average", None))
    return next((value for value in given if value is not None), None) is False


def _weights_given(module: Any, x: Array, kwargs: Mapping[str, Any]) -> Array | None:
    """Return the mask or weights that the model itself gives to a layer."""
    mask, weights = kwargs.get("mask"), kwargs.get("weights")
    if mask is not None:  # Flax's masks broadcast to x from the last axis on
        mask = jnp.asarray(mask, bool)
        weights = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return None if weights is None else align_weights(weights, x, module.axis)
