"""Batch norm folded into the dense layer or convolution before it, for prediction.

With fixed statistics, batch norm after a linear layer is a linear layer again:

  gamma (W x + b - mean) / sigma + beta = (gamma / sigma) W x + b',
  b' = (b - mean) gamma / sigma + beta.
"""

from __future__ import annotations

from bn_jax import extras

extras.need("flax", "flax")

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from bn_jax import tracing
from bn_jax.contract import Transform
from bn_jax.linear_pairs import (
    Flat,
    Pair,
    find_pairs,
    misfits,
    named,
    outputs_of_norms,
    restacked,
    stacked_layers,
    unstacked,
)
from bn_jax.measures.layer_calls import Predict
from bn_jax.measures.models import check_array, modules_of, resolve
from bn_jax.moments import reduction_axes
from bn_jax.variables import (
    Path,
    collection,
    leaves_of,
    replaced,
)

# How far the folded model may be from the model: by roundings, and by more than these
# where large means cancel.
_TOLERANCE = 1e-2
# Flax's norms that keep no statistics of batches, of Linen and of NNX.
_PER_EXAMPLE = {"LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"}
_CURVES = {"dyt", "derf"}  # transforms without any statistics


def fold(model: Any, variables: Any, inputs: Array, *, without_norms: Any) -> Any:
    """Return the parameters of a Flax model with every batch norm folded away.

    They are those of the same model without norms, whose linear layers all have a bias:
    `fold(LeNet(), variables, images, without_norms=LeNet(norm=None))`.

    A trace of the model shows that a layer's output goes to its norm unchanged, and
    nowhere else. The rest it does not show, so that is tried out on `inputs`, in ways
    in which rounding hardly matters, whatever the dtype and the depth:

    - With kernels of 0 each norm must give its layer's new bias, to four roundings of
      the terms that it is summed from.
    - With the features of each layer times powers of 2, which round nothing, and its
      norm made to take them back, the outputs must stay the same: to 1e-4 of their
      largest, or four roundings of their dtype where that is more.

    Last, the model without norms is run on them. It must use all parameters, and give
    the same outputs, to 1% of the largest, or 32 roundings of their dtype. All these
    checks compute float32 products in float32 on every backend. The folded model rounds
    at other places than the model. Where that matters, as in half precision or for
    inputs far from 0, compare their outputs.

    Args:
      model: function of `(variables, inputs)` that applies the model in prediction
        mode, a Linen or an NNX module: see `bn_jax.measures.models.resolve`.
      variables: of the model, with the statistics to fold; see there.
      inputs: a few examples, shape `[N, ...]` or a tree of such arrays, on which the
        folding is checked.
      without_norms: the model without norms: of Linen, a module or a function as
        `model`, which is given `{"params": folded}` and what other collections there
        are; of NNX, a module with the same names.

    Returns:
      The new `params` of a Linen model; of NNX, a state that `nnx.update` puts into
      `without_norms`. New biases are in the dtype of their kernels.

    Raises:
      ValueError: if a norm cannot be folded; all such norms and reasons are named. If
        the model without norms cannot be run, leaves parameters out, or gives other
        outputs; where it leaves out norms such as group norm, whose statistics depend
        on the input, these are named. If outputs are not finite, or model, variables or
        inputs are something else.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from bn_jax.linen import BatchNorm
      >>> dense = nn.Dense(1, kernel_init=nn.initializers.constant(8.0))
      >>> model = nn.Sequential([dense, BatchNorm(use_running_average=True)])
      >>> x = jnp.array([[0.0], [1.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> variables["batch_stats"]["layers_1"]["var"] = jnp.array([4.0])
      >>> folded = fold(model, variables, x, without_norms=nn.Sequential([dense]))
      >>> folded["layers_0"]["kernel"].round(3).tolist()  # 8 over the root of 4
      [[4.0]]
    """
    with jax.default_matmul_precision("highest"):
        return _fold(model, variables, inputs, without_norms)


def _fold(model: Any, variables: Any, inputs: Array, without_norms: Any) -> Any:
    predict, variables = resolve(model, variables)
    for leaf in jax.tree.leaves(inputs) or [inputs]:
        check_array("inputs", leaf)
    params, stats = (collection(variables, c) for c in ("params", "batch_stats"))
    pairs, faults = find_pairs(predict, variables, inputs)
    stacked = stacked_layers(pairs)
    params, stats = unstacked(params, stacked), unstacked(stats, stacked)
    _refuse(faults + misfits(pairs, params, stats))

    folded = dict(params)
    for pair in pairs:
        kernel = params[(*pair.linear, "kernel")]
        multiplier, new_bias, _ = _affine(pair, params, stats)
        folded[(*pair.linear, "kernel")] = (kernel * multiplier).astype(kernel.dtype)
        folded[(*pair.linear, "bias")] = new_bias.astype(kernel.dtype)
        for name in ("scale", "bias"):
            folded.pop((*pair.norm, name), None)

    run = _compiled(predict)
    before = run(variables, inputs)
    if pairs:
        rescaled = _with_flat(variables, *_rescaled(pairs, params, stats), stacked)
        _check_equal(before, run(rescaled, inputs), pairs)
        zero = {(*p.linear, "kernel"): params[(*p.linear, "kernel")] * 0 for p in pairs}
        zeroed = _with_flat(variables, params | zero, stats, stacked)
        shifts = outputs_of_norms(predict, zeroed, inputs)
        _refuse(_wrong_shifts(shifts, pairs, params, stats))
    folded = restacked(folded, stacked)
    try:
        return _run_without_norms(without_norms, variables, folded, inputs, before)
    except ValueError as error:
        left_out = _per_example_norms(predict, variables, inputs)
        left_out -= _per_example_norms(*_plain(without_norms, folded), inputs)
        if not left_out:
            raise
        names = ", ".join(f"{path} ({kind})" for path, kind in sorted(left_out))
        reason = "the statistics of such a norm depend on the input"
        if all(kind in _CURVES for _, kind in left_out):
            reason = "such a norm is a curve"
        raise ValueError(
            f"cannot fold {names}: {reason}, so that no layer before it can stand for "
            "it. Leave it in the model without norms, which lacks batch norm alone; or "
            f"predict with the model as it is ({error})"
        ) from error


def _plain(without_norms: Any, folded: Flat) -> tuple[Predict, Any]:
    """Return a predict function of the model without norms, and its variables."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(without_norms, nnx.Module):
        return resolve(without_norms, None)
    return resolve(without_norms, {"params": traverse_util.unflatten_dict(folded)})


def _per_example_norms(
    predict: Predict, variables: Any, inputs: Any
) -> set[tuple[str, str]]:
    """Return the path and the kind of norms that keep no statistics of batches."""
    found = set()
    for path, module in modules_of(predict, variables, inputs).items():
        transform = getattr(module, "transform", None)
        kinds = {
            kind.__name__
            for kind in type(module).__mro__
            if kind.__module__.startswith("flax.")
        } & _PER_EXAMPLE
        if isinstance(transform, Transform) and not transform.uses_batch:
            kinds = {transform.name}
        found |= {(path or "the model itself", kind) for kind in kinds}
    return found


def _affine(pair: Pair, params: Flat, stats: Flat) -> tuple[Array, Array, Array]:
    """Return the factor of a norm, the new bias, and the size of its terms."""
    b = params.get((*pair.linear, "bias"), jnp.zeros(()))
    mean, var = stats[(*pair.norm, "mean")], stats[(*pair.norm, "var")]
    multiplier = jax.lax.rsqrt(var + pair.epsilon)
    scale = params.get((*pair.norm, "scale"))
    if scale is not None:
        multiplier = multiplier * (scale + pair.scale_offset)
    beta = params.get((*pair.norm, "bias"), 0)
    size = (jnp.abs(b) + jnp.abs(mean)) * jnp.abs(multiplier) + jnp.abs(beta)
    return multiplier, (b - mean) * multiplier + beta, size


def _wrong_shifts(
    outputs: Mapping[Path, Array], pairs: list[Pair], params: Flat, stats: Flat
) -> list[str]:
    """Return the norms that, with kernels of 0, give other than the new bias.

    Nothing of one layer reaches the next then, so that no rounding adds up.
    """
    faults = []
    for pair in pairs:
        y = outputs[pair.norm]
        _, new_bias, size = _affine(pair, params, stats)
        axes = reduction_axes(y.ndim, pair.axis)
        dtypes = (pair.dtype, y.dtype, new_bias.dtype)
        allowed = 4 * max(_rounding(dtype) for dtype in dtypes) * size
        # An infinite input times 0 is NaN, and no fault of the norm's.
        difference = jnp.abs(y - jnp.expand_dims(new_bias, axes))
        if jnp.any(difference > jnp.expand_dims(allowed, axes)):
            faults.append(
                f"{named(pair.norm)} does not give (bias - mean) gamma / sigma + beta "
                f"where the kernel of {named(pair.linear)} is 0, so the bias is not "
                "used as it is, or the norm is not batch norm"
            )
    return faults


def _rescaled(pairs: list[Pair], params: Flat, stats: Flat) -> tuple[Flat, Flat]:
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
            gamma = scale + pair.scale_offset
            new_scale = gamma / factor - pair.scale_offset
            params[(*pair.norm, "scale")] = new_scale.astype(scale.dtype)
        stats[(*pair.norm, "mean")] = (mean * factor).astype(mean.dtype)
        for name in ("kernel", "bias"):
            value = params.get((*pair.linear, name))
            if value is not None:
                new_value = (value * factor).astype(value.dtype)
                params[(*pair.linear, name)] = new_value
    return params, stats


def _check_equal(before: Any, after: Any, pairs: list[Pair]) -> None:
    """Refuse to fold where features times powers of 2 change the outputs."""
    for old, new in _pairs_of_outputs(before, after):
        if not jnp.all(jnp.isfinite(new)):
            _refuse(
                [
                    "the outputs are not finite once the inputs of the norms are up to "
                    f"8 times as large, too much for {old.dtype}: fold in a wider dtype"
                ]
            )
        size, difference = _difference(old, new)
        allowed = max(1e-4, 4 * _rounding(old.dtype)) * size
        if difference <= allowed:
            continue
        names = ", ".join(named(pair.norm) for pair in pairs)
        fault = (
            f"outputs of size {size:.2g} change by {difference:.2g}, beyond "
            f"{allowed:.2g}, where features are multiplied and their norms take it "
            f"back, so one of the norms {names} is over another axis than the features "
            "before it, or a kernel before one is not used as it is, or is shared"
        )
        if difference <= 100 * allowed:
            fault += "; or, as it is small, it is rounding: fold in wider dtypes"
        _refuse([fault])


def _run_without_norms(
    without_norms: Any, variables: Any, folded: Flat, inputs: Array, before: Any
) -> Any:
    """Run the model without norms on folded parameters, and return them.

    Raises:
      ValueError: if it does not take them as they are, leaves some out, or gives other
        outputs than `before`.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(variables, nnx.State):
        predict, plain = _nnx_without_norms(without_norms, folded)
        result = nnx.filter_state(plain, nnx.Param)
    else:
        result = traverse_util.unflatten_dict(folded)
        others = {}
        if isinstance(variables, Mapping):
            skipped = ("params", "batch_stats")
            others = {k: v for k, v in variables.items() if k not in skipped}
        predict, plain = resolve(without_norms, {"params": result, **others})
    try:
        after = _compiled(predict)(plain, inputs)
    except Exception as error:
        raise ValueError(
            "the model without norms cannot be run on the folded parameters, "
            f"{_names(folded)}: {error}"
        ) from error
    unused = _unused(predict, plain, inputs)
    if unused:
        raise ValueError(
            f"the model without norms does not use the folded parameters "
            f"{_names(unused)}; expected the same layers, all with a bias "
            "(use_bias=True)"
        )
    for old, new in _pairs_of_outputs(before, after):
        size, difference = _difference(old, new)
        if not difference <= max(_TOLERANCE, 32 * _rounding(old.dtype)) * size:
            raise ValueError(
                f"outputs of size {size:.2g} change by {difference:.2g} in the model "
                "without norms; expected the same model without them, or, where means "
                "are large beside deviations, fold in a wider dtype"
            )
    return result


def _nnx_without_norms(without_norms: Any, folded: Flat) -> tuple[Predict, Any]:
    """Return the predict function and the state of an NNX module without norms."""
    predict, state = resolve(without_norms, None)
    expected = collection(state, "params")
    missing, surplus = expected.keys() - folded.keys(), folded.keys() - expected.keys()
    if missing or surplus:
        raise ValueError(
            f"the model without norms has other parameters than are folded: "
            f"{_names(missing) or 'none'} besides, {_names(surplus) or 'none'} "
            "missing; expected the same layers under the same names, all with a bias "
            "(use_bias=True)"
        )
    shapes = {path for path in folded if folded[path].shape != expected[path].shape}
    if shapes:
        raise ValueError(
            f"the model without norms has {_names(shapes)} of other shapes; expected "
            "the same layers"
        )
    return predict, replaced(state, {("params", p): v for p, v in folded.items()})


def _unused(predict: Predict, variables: Any, inputs: Array) -> list[Path]:
    """Return the parameters on which no output of a model depends."""
    leaves, structure = jax.tree.flatten((variables, inputs))

    def function(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(predict(*jax.tree.unflatten(structure, leaves)))

    traced = tracing.trace(function, *leaves)
    arguments = [tracing.Unknown() for _ in leaves]
    results, _ = tracing.evaluate(traced, arguments, {})
    keys, _, _ = leaves_of(variables)
    return [
        path
        for (of_collection, path), argument in zip(keys, arguments, strict=False)
        if of_collection == "params"
        and not argument.used
        and not any(argument is result for result in results)
    ]


def _compiled(predict: Predict) -> Predict:
    return jax.jit(lambda variables, inputs: predict(variables, inputs))


def _with_flat(
    variables: Any, params: Flat, stats: Flat, stacked: Mapping[Path, int]
) -> Any:
    params, stats = restacked(params, stacked), restacked(stats, stacked)
    of_params = {("params", path): value for path, value in params.items()}
    of_stats = {("batch_stats", path): value for path, value in stats.items()}
    return replaced(variables, of_params | of_stats)


def _pairs_of_outputs(before: Any, after: Any) -> list[tuple[Array, Array]]:
    """Return the arrays of a model's outputs with those that should be equal."""
    old, new = (list(map(jnp.asarray, jax.tree.leaves(o))) for o in (before, after))
    if [leaf.shape for leaf in old] != [leaf.shape for leaf in new]:
        raise ValueError(
            f"the outputs have shapes {[list(leaf.shape) for leaf in new]}, and "
            f"{[list(leaf.shape) for leaf in old]} with norms; expected the same model"
        )
    if not all(jnp.all(jnp.isfinite(leaf)) for leaf in old):
        _refuse(["the outputs of the model as it is are not finite on inputs"])
    return list(zip(old, new, strict=True))


def _difference(old: Array, new: Array) -> tuple[float, float]:
    """Return the size of outputs, and how far others are from them at most."""
    wide = jnp.promote_types(old.dtype, jnp.float32)
    old, new = old.astype(wide), new.astype(wide)
    return float(jnp.max(jnp.abs(old))), float(jnp.max(jnp.abs(old - new)))


def _rounding(dtype: Any) -> float:
    """Return the relative distance of neighbouring numbers, 0 of integers."""
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _names(paths: Any) -> str:
    return ", ".join(sorted(map(named, paths)))


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(
            "cannot fold batch norm into the layers before it: "
            f"{'; '.join(faults)}. Expected each norm directly after a dense layer or "
            "convolution of its own; predict with the model as it is"
        )
