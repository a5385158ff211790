"""Norms and the linear layers whose outputs they are given, seen in a traced model."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr

from bn_jax import tracing
from bn_jax.measures import layers
from bn_jax.measures.layer_calls import Predict
from bn_jax.measures.layers import Layer, Linear, Proceed
from bn_jax.variables import Path, collection, leaves_of, statistics_of

Flat = dict[Path, Array]


class Pair(NamedTuple):
    """A norm and the linear layer whose output it is given.

    Each of the layers that `nn.scan` stacks counts by itself; its path ends in a
    number.
    """

    norm: Path
    linear: Path
    dtype: Any  # of the linear layer's output
    epsilon: float  # of the norm
    axis: int | Sequence[int]  # of the norm
    scale_offset: float  # of gamma, which is stored without it


class _Site(NamedTuple):
    """A place in a model's code where a layer's value is marked."""

    layer: Layer | Linear | None  # None of the output of a norm
    dtype: Any  # of the value


def find_pairs(
    predict: Predict, variables: Any, inputs: Array
) -> tuple[list[Pair], list[str]]:
    """Pair each norm with the linear layer before it, or say why it cannot be folded.

    The traced program is computed with nothing known. A value that is handed on as it
    is stays the same object; one that an operation takes is said to be used.

    Args:
      predict: the function that applies the model, from
        `bn_jax.measures.models.resolve`.
      variables: of the model, from there, too.
      inputs: examples, shape `[N, ...]`, or a tree of such arrays.

    Raises:
      ValueError: if a layer is inside something else than `jax.jit`, `jax.checkpoint`,
        `lax.scan` or `jax.vmap`, or a `Norm` predicts by other statistics than a mean
        and a variance.
    """
    traced, sites = _mark_layers(predict, variables, inputs)
    arguments = [tracing.Unknown() for _ in traced.jaxpr.invars]
    variable = functools.partial(_layer_of, _paths(variables, arguments))
    _, seen = tracing.evaluate(traced, arguments, {})
    # What a norm does with its input is no other use of it.
    own = {
        number: tracing.Unknown()
        for number, marked in enumerate(seen)
        if isinstance(sites[marked.site].layer, Layer)
    }
    results, seen = tracing.evaluate(traced, arguments, own)

    def calls_of(kind: Any) -> list[Any]:
        return [m for m in seen if isinstance(sites[m.site].layer, kind)]

    linear_of = {id(m.x): m for m in calls_of(Linear)}
    num_calls = Counter(
        variable(m.carried[0]) for m in calls_of(Linear) + calls_of(Layer)
    )
    pairs: list[Pair] = []
    faults: list[str] = []
    for call in calls_of(Layer):
        layer: Any = sites[call.site].layer
        path, before = variable(call.carried[0]), linear_of.get(id(call.x))
        if not path or call.mapped:
            faults.append(
                f"{layer.name} does not read its statistics from variables as they "
                "are, as inside nn.vmap, or nn.scan along another axis than the first"
            )
            continue
        if any(pair.norm == path for pair in pairs):
            continue
        if before is None:
            faults.append(
                f"{named(path)} is not given the output of a layer with a kernel as it "
                "is: something stands between, or nothing linear before"
            )
            continue
        linear: Any = sites[before.site].layer
        of_kernel = variable(before.carried[0])
        if not of_kernel:
            faults.append(
                f"{linear.name} does not read its kernel from variables as it is"
            )
            continue
        features = linear.kernel.shape[-1]
        if linear.features not in (None, features, (features,)):
            faults.append(
                f"{named(of_kernel)} has features={linear.features}, not the last axis "
                f"of its kernel, {features}"
            )
        if before.x.used or any(before.x is result for result in results):
            faults.append(
                f"the output of {named(of_kernel)} is used elsewhere than in its norm"
            )
        for called in (path, of_kernel):
            if num_calls[called] > 1:
                faults.append(f"{named(called)} is called {num_calls[called]} times")
        dtype = sites[before.site].dtype
        of_norm = (layer.epsilon, layer.axis, layer.scale_offset)
        pairs.append(Pair(path, of_kernel, dtype, *of_norm))
    norms = statistics_of(variables).keys()
    seen_layers = {_base(path) for path in num_calls}
    kept = collection(variables, "batch_stats")
    others = {path[:-1] for path in kept if path[-1] in ("mean", "var")} - norms
    faults += [
        f"{named(path)} does not predict by a mean and a variance, as batch norm does"
        for path in sorted(others)
    ]
    faults += [
        f"no call of {named(path)} was seen" for path in sorted(norms - seen_layers)
    ]
    return pairs, list(dict.fromkeys(faults))


def misfits(pairs: list[Pair], params: Flat, stats: Flat) -> list[str]:
    """List the reasons why the pairs cannot be folded."""
    faults = [
        f"{named(linear)} is followed by several norms"
        for linear, count in Counter(pair.linear for pair in pairs).items()
        if count > 1
    ]
    for norm, linear, *_ in pairs:
        features = params[(*linear, "kernel")].shape[-1:]
        shape = stats[(*norm, "mean")].shape
        if shape != features:
            faults.append(
                f"{named(norm)} has statistics of shape {list(shape)}, not one for "
                f"each of the {features[0]} outputs of {named(linear)}"
            )
        bias = params.get((*linear, "bias"))
        if bias is not None and bias.shape != features:
            faults.append(
                f"{named(linear)} has a bias of shape {list(bias.shape)}, not one for "
                f"each of its {features[0]} outputs"
            )
    return faults


def outputs_of_norms(
    predict: Predict, variables: Any, inputs: Array
) -> dict[Path, Array]:
    """Return the outputs of the norms by path.

    Args:
      predict: see `find_pairs`, and so are the others.
      variables: see `predict`.
      inputs: see `predict`.

    Raises:
      ValueError: as `find_pairs` says.
    """
    traced, sites = _mark_layers(predict, variables, inputs)
    arguments = [tracing.Unknown() for _ in traced.jaxpr.invars]
    variable = functools.partial(_layer_of, _paths(variables, arguments))
    _, seen = tracing.evaluate(traced, arguments, {})

    @jax.jit
    def compute(*leaves: Any) -> dict[str, Array]:
        _, values = tracing.evaluate(traced, leaves, {})
        return {
            str(number): values[number + 1].x
            for number, marked in enumerate(seen)
            if isinstance(sites[marked.site].layer, Layer)
        }

    outputs = compute(*jax.tree.leaves((variables, inputs)))
    return {variable(seen[int(number)].carried[0]): y for number, y in outputs.items()}


def _mark_layers(
    predict: Predict, variables: Any, inputs: Any
) -> tuple[ClosedJaxpr, list[_Site]]:
    """Trace a model with the outputs of linear layers and norms, and norms' inputs."""
    leaves, structure = jax.tree.flatten((variables, inputs))
    sites: list[_Site] = []

    def marked(x: Any, layer: Layer | Linear | None, carried: Sequence[Any]) -> Any:
        if not isinstance(x, jax.Array):
            return x  # no output of a layer that we know
        sites.append(_Site(layer, x.dtype))
        return tracing.mark(x, carried, site=len(sites) - 1)

    def each_norm(layer: Layer, x: Any, weights_given: Any, proceed: Proceed) -> Array:
        del weights_given  # predictions do not depend on them
        return marked(proceed(marked(x, layer, (layer.mean, layer.var))), None, ())

    def each_linear(linear: Linear, x: Any, proceed: Proceed) -> Array:
        return marked(proceed(x), linear, (linear.kernel,))

    def function(*leaves: Any) -> list[Any]:
        with layers.seen(each_norm, each_linear):
            return jax.tree.leaves(predict(*jax.tree.unflatten(structure, leaves)))

    return tracing.trace(function, *leaves), sites


def _paths(variables: Any, arguments: Sequence[Any]) -> dict[int, Path]:
    """Return the paths of variables that stand for the first arguments, by identity."""
    keys, _, _ = leaves_of(variables)
    return {id(a): path for a, (_, path) in zip(arguments, keys, strict=False)}


def _layer_of(paths: Mapping[int, Path], value: Any) -> Path:
    """Return the path of the layer whose variable a value is, or () if it is none."""
    number: Path = ()
    if isinstance(value, tracing.Unknown) and value.part_of is not None:
        value, i = value.part_of
        number = (f"[{i}]",)
    path = paths.get(id(value), ())
    return (*path[:-1], *number) if path else ()


def stacked_layers(pairs: Sequence[Pair]) -> dict[Path, int]:
    """Return how many layers are stacked at a path, where they are."""
    paths = [path for pair in pairs for path in (pair.norm, pair.linear)]
    return dict(Counter(_base(path) for path in set(paths) if _base(path) != path))


def unstacked(flat: Flat, stacked: Mapping[Path, int]) -> Flat:
    """Return variables with those of stacked layers apart."""
    apart: Flat = {}
    for (*layer, name), value in flat.items():
        number = stacked.get(tuple(layer))
        if number is None:
            apart[*layer, name] = value
            continue
        apart |= {(*layer, f"[{i}]", name): value[i] for i in range(number)}
    return apart


def restacked(flat: Flat, stacked: Mapping[Path, int]) -> Flat:
    """Return variables with those of stacked layers stacked again."""
    found = {p: value for p, value in flat.items() if _base(p[:-1]) == p[:-1]}
    for layer, number in stacked.items():
        names = {path[-1] for path in flat if path[:-1] == (*layer, "[0]")}
        for name in names:
            found[*layer, name] = jnp.stack(
                [flat[*layer, f"[{i}]", name] for i in range(number)]
            )
    return found


def _base(path: Path) -> Path:
    """Return the path of a layer, or of the stack that it is in."""
    return path[:-1] if path and path[-1].startswith("[") else path


def named(path: Path) -> str:
    """Return a path as people write it."""
    return "/".join(path)
