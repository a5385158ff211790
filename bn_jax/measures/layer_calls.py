"""The calls of batch norm layers in a Flax model, seen from outside.

Layers are those that hold a mean and a variance: ours and Flax's own, of Linen and of
NNX, and Linen modules of others that have `axis` and `epsilon`. They may be inside
`jax.jit`, `jax.checkpoint`, `lax.scan` and `jax.vmap`, and Flax's transforms of these
names. A `Norm` of ours that keeps anything else, such as a covariance, is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from bn_jax import tracing
from bn_jax.measures import layers
from bn_jax.measures.layers import Layer, Proceed
from bn_jax.moments import (
    Moments,
    measure,
    merge,
    merge_stacked,
    statistics_dtype,
)
from bn_jax.variables import (
    Path,
    Statistics,
    check_variables,
    statistics_of,
    with_statistics,
)

Predict = Callable[[Any, Any], Any]  # of variables and inputs, in prediction mode


class LayerCall(NamedTuple):
    """One call of a batch norm layer."""

    path: Path
    shape: tuple[int, ...]  # of the input
    epsilon: float
    scale_offset: float  # of gamma, which is stored without it


class Measured(NamedTuple):
    """What a call of a batch norm layer was given."""

    moments: dict[Path, Moments]  # in the shape of the variables; count 0 elsewhere
    x: Array


class _Place(NamedTuple):
    """Where among the variables the statistics of a call are."""

    path: Path
    entries: np.ndarray | None  # of the flattened mean, in its shape; None for all


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model on a batch, traced, with the calls of its batch norm layers in order.

    Attributes:
      traced: the program, of variables, inputs and weights of the examples.
      results: structure of its results.
      calls: for each call, the layers that it is a call of: one, or as many as
        `jax.vmap` runs at once.
      places: likewise.
    """

    traced: ClosedJaxpr
    results: Any
    calls: tuple[tuple[LayerCall, ...], ...]
    places: tuple[tuple[_Place, ...], ...]

    def __call__(
        self,
        variables: Any,
        inputs: Any,
        weights: Array | None = None,
        *,
        given: Mapping[int, Array] | None = None,
    ) -> tuple[Any, list[Measured]]:
        """Apply the model and measure what each call is given.

        Args:
          variables: of the model.
          inputs: a batch.
          weights: of its examples.
          given: known inputs of calls, by their number.
        """
        shapes = {path: s.mean.shape for path, s in statistics_of(variables).items()}
        arguments = jax.tree.leaves((variables, inputs, weights))
        outputs, seen = tracing.evaluate(self.traced, arguments, given or {})
        measured = []
        for marked, places in zip(seen, self.places, strict=True):
            moments = Moments(*marked.carried[2:])
            of_places = _by_place(moments, marked.mapped, places, shapes)
            measured.append(Measured(pooled(of_places), marked.x))
        return jax.tree.unflatten(self.results, outputs), measured


def program(
    predict: Predict,
    variables: Any,
    inputs: Any,
    weights: Any = None,
    *,
    by_batch: bool = False,
) -> Program:
    """Trace a model on a batch, without computing anything.

    Args:
      predict: function of variables and inputs that applies the model in prediction
        mode; it may be compiled by `jax.jit`, and may have been called before.
      variables: of the model.
      inputs: a batch, or its shape and dtype.
      weights: of its examples, shape `[N]`. In a layer's input the examples lie along
        the axis that has the batch's size, which is found by tracing the model with
        another batch size.
      by_batch: whether each call is normalised by what it is given.

    Raises:
      ValueError: if the calls of a layer with batch statistics cannot be seen, or it
        predicts by other statistics than a mean and a variance; if bytes are given to
        a model that does not scale them; or as `check_variables` says.
    """
    check_variables(variables)
    leaves, structure = jax.tree.flatten((variables, inputs, weights))
    key = (predict, structure, tuple(map(jax.typeof, leaves)), by_batch)
    try:
        hash(key)
    except TypeError:
        return _traced(*key)
    try:
        return _kept(*key)
    except _ClosesOverTracers as found:
        return found.program


def layer_calls(predict: Predict, variables: Any, inputs: Any) -> list[LayerCall]:
    """Return the calls of batch norm layers in order, without computing anything.

    Raises:
      ValueError: as `program` says.
    """
    calls = program(predict, variables, inputs).calls
    return [call for of_call in calls for call in of_call]


def pooled(of_calls: Sequence[Mapping[Path, Moments]]) -> dict[Path, Moments]:
    """Return the moments of each layer over its calls."""
    found: dict[Path, Moments] = {}
    for of_call in of_calls:
        for path, moments in of_call.items():
            found[path] = _merged(found.get(path), moments)
    return found


def with_moments(
    variables: Any, moments: Mapping[Path, Moments], *, share: Any = None
) -> Any:
    """Return `variables` with the means and variances that were measured in place.

    Args:
      variables: of a model.
      moments: by layer, in the shape of its variables.
      share: how much they count in a mean of them and the old ones; None takes them
        alone, whatever the old ones are.
    """
    old = statistics_of(variables)

    def mixed(count: Array, new: Array, old: Array) -> Array:
        if share is not None:
            new = share * new + (1 - share) * old
        return jnp.where(count > 0, new, old)

    def measured(path: Path) -> Statistics:
        count, mean, var = moments[path]
        return Statistics(
            mixed(count, mean, old[path].mean), mixed(count, var, old[path].var)
        )

    return with_statistics(variables, {path: measured(path) for path in moments})


class _ClosesOverTracers(Exception):
    """A program that is of no use once another trace has ended."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program


@functools.lru_cache(maxsize=64)
def _kept(*key: Any) -> Program:
    made = _traced(*key)
    if any(isinstance(const, jax.core.Tracer) for const in made.traced.consts):
        raise _ClosesOverTracers(made)
    return made


class _Site(NamedTuple):
    """A place in a model's code from where a layer is called."""

    layer: str  # its name
    shape: tuple[int, ...]  # of the input
    epsilon: float
    scale_offset: float


def _traced(
    predict: Predict, structure: Any, types: Sequence[Any], by_batch: bool
) -> Program:
    """Trace a model on arguments of a structure and of types."""
    variables, inputs, weights = jax.tree.unflatten(structure, types)
    larger: list[_Site] = []
    if weights is not None:
        one_more = jax.ShapeDtypeStruct(
            (inputs.shape[0] + 1, *inputs.shape[1:]), inputs.dtype
        )
        _mark_calls(predict, (variables, one_more, None), larger)
    sites: list[_Site] = []
    traced, results = _mark_calls(
        predict, (variables, inputs, weights), sites, by_batch=by_batch, larger=larger
    )
    check_scaled(predict, traced, len(jax.tree.leaves((inputs, weights))))
    numbers, places = _places(traced, variables, sites, structure)
    if by_batch:
        _check_batches_are_whole(places, [sites[number] for number in numbers])
    calls = tuple(
        tuple(LayerCall(p.path, *sites[number][1:]) for p in of_call)
        for number, of_call in zip(numbers, places, strict=True)
    )
    return Program(traced, results, calls, tuple(places))


def check_scaled(predict: Any, traced: ClosedJaxpr, num_inputs: int) -> None:
    """Refuse bytes that a model computes with as they are.

    A model that is given bytes by mistake, where it was trained on numbers in [0, 1],
    would be measured on others. A network of ours scales what it is given.

    Args:
      predict: the function that was traced.
      traced: the model on a batch.
      num_inputs: how many of the program's last arguments are no variables.

    Raises:
      ValueError: saying what to give in their place.
    """
    predict = inspect.unwrap(predict) if callable(predict) else predict
    if getattr(getattr(predict, "__self__", None), "takes_bytes", False):
        return
    last = traced.jaxpr.invars[len(traced.jaxpr.invars) - num_inputs :]
    raw = [variable for variable in last if variable.aval.dtype == np.uint8]
    if raw and not tracing.scales_bytes(traced, raw):
        raise ValueError(
            "inputs are bytes, uint8, and the model is not seen to scale them first, "
            "as by x / 255; give them as it was trained, such as inputs / 255, or "
            "inputs.astype(numpy.float32) where it was trained on 0 to 255 or scales "
            "them in another way"
        )


def _mark_calls(
    predict: Predict,
    arguments: tuple[Any, Any, Any],
    sites: list[_Site],
    *,
    by_batch: bool = False,
    larger: Sequence[_Site] = (),
) -> tuple[ClosedJaxpr, Any]:
    """Trace a model with its layers' calls marked; return the structure of results.

    Args:
      predict: see `program`.
      arguments: types of the variables, inputs and weights.
      sites: to be filled.
      by_batch: see `program`.
      larger: the sites were there one example more, to lay weights along.
    """
    _, structure = jax.tree.flatten(arguments)
    results: list[Any] = []

    def function(*leaves: Any) -> list[Any]:
        variables, inputs, weights = jax.tree.unflatten(structure, leaves)

        def each_call(
            layer: Layer, x: Array, weights_given: Array | None, proceed: Proceed
        ) -> Array:
            site = len(sites)
            sites.append(_Site(layer.name, x.shape, layer.epsilon, layer.scale_offset))
            w = weights_given
            if weights is not None:
                w = _along_examples(weights, x, larger[site])
                w = w if weights_given is None else w * weights_given
            wide = x.astype(statistics_dtype(x.dtype))  # layers take integers, too
            axis = layer.axis
            if x.ndim == 1:  # one example, of a batch that jax.vmap maps
                wide, axis = wide[None], -1
                if by_batch:
                    raise _mapped_examples(layer.name)
            moments = measure(wide, feature_axis=axis, weights=w)
            if moments.mean.shape != jnp.shape(layer.mean):
                raise ValueError(
                    f"layer {layer.name} keeps a mean of shape "
                    f"{list(jnp.shape(layer.mean))} for features of shape "
                    f"{list(moments.mean.shape)}; expected one value a feature"
                )
            x = tracing.mark(x, (layer.mean, layer.var, *moments), site=site)
            if by_batch:
                return layers.normalized(layer, x, moments, weights_given)
            return proceed(x)

        with layers.seen(each_call):
            try:
                outputs, of_results = jax.tree.flatten(predict(variables, inputs))
            except flax.errors.InvalidRngError as error:
                raise ValueError(
                    "the model draws random numbers in prediction, as dropout does in "
                    "training; expected one that draws none, as by "
                    f"deterministic=not train ({error})"
                ) from error
        results.append(of_results)
        return outputs

    traced = tracing.trace(function, *jax.tree.leaves(arguments))
    return traced, results[-1]


def _places(
    traced: ClosedJaxpr, variables: Any, sites: Sequence[_Site], structure: Any
) -> tuple[list[int], list[tuple[_Place, ...]]]:
    """Return each call's site, and where among the variables its statistics are.

    The program is computed as far as it goes with the statistics alone, whose entries
    are numbered: means 1, 2 and so on, variances -1, -2 and so on.
    """
    types = {path: s.mean for path, s in statistics_of(variables).items()}
    starts = np.cumsum([1, *(math.prod(t.shape) for t in types.values())])
    numbered = {}
    for (path, t), first in zip(types.items(), starts[:-1], strict=True):
        wide = np.finfo(np.promote_types(t.dtype, np.float32)).dtype
        numbers = (first + np.arange(math.prod(t.shape))).astype(wide)
        numbered[path] = Statistics(numbers.reshape(t.shape), -numbers.reshape(t.shape))
    leaves = [
        leaf if isinstance(leaf, np.ndarray) else tracing.Unknown()
        for leaf in jax.tree.leaves(with_statistics(variables, numbered))
    ]
    leaves += [tracing.Unknown() for _ in range(structure.num_leaves - len(leaves))]
    with jax.ensure_compile_time_eval():
        _, seen = tracing.evaluate(traced, leaves, {})

    paths = list(types)
    called = {path: np.zeros(math.prod(t.shape), bool) for path, t in types.items()}
    places = []
    for marked in seen:
        mean, var = marked.carried[:2]
        numbers = np.zeros(0)
        if not any(isinstance(value, tracing.Unknown) for value in (mean, var)):
            numbers = np.asarray(mean).real
        if not numbers.size or not np.array_equal(numbers, -np.asarray(var).real):
            raise ValueError(
                f"the mean and variance of layer {sites[marked.site].layer} are not "
                "those in variables; expected a predict function that hands them to "
                "its model as they are"
            )
        of_call = []
        for own in numbers.reshape(-1, *numbers.shape[len(marked.mapped) :]):
            which = int(np.searchsorted(starts, own.flat[0], side="right")) - 1
            entries = (own - starts[which]).astype(int)
            size = called[paths[which]].size
            called[paths[which]][entries] = True
            is_whole = np.array_equal(entries.ravel(), np.arange(size))
            of_call.append(_Place(paths[which], None if is_whole else entries))
        places.append(tuple(of_call))
    _check_all_called(called)
    return [marked.site for marked in seen], places


def _check_all_called(called: Mapping[Path, np.ndarray]) -> None:
    """Refuse layers that would keep their statistics without a word."""
    missed = sorted("/".join(path) for path, seen in called.items() if not seen.all())
    if missed:
        raise ValueError(
            f"no call of {', '.join(missed)} was seen: predict does not call it, or "
            "not as a batch norm layer; drop it from the batch statistics, or give a "
            "predict function that calls it"
        )


def _check_batches_are_whole(
    places: Sequence[Sequence[_Place]], sites: Sequence[_Site]
) -> None:
    """Refuse calls that `jax.vmap` gives one part of the batch each."""
    for of_call, site in zip(places, sites, strict=True):
        if len(set(map(_key, of_call))) < len(of_call):
            raise _mapped_examples(site.layer)


def _mapped_examples(layer: str) -> ValueError:
    return ValueError(
        f"layer {layer} is called under jax.vmap with one mean and variance for all "
        "instances, so it would be normalised by parts of the batch; give a predict "
        "function that takes a batch without jax.vmap, or measure layer by layer "
        "(mode='layerwise')"
    )


def _by_place(
    moments: Moments,
    mapped: tuple[int, ...],
    places: Sequence[_Place],
    shapes: Mapping[Path, tuple[int, ...]],
) -> list[dict[Path, Moments]]:
    """Return the moments of each place of a call, in the shape of the variables.

    Args:
      moments: as the call carries them, with the axes of `mapped` in front.
      mapped: see `tracing.Marked`.
      places: one for each instance along these axes.
      shapes: of the variables.
    """
    if mapped:
        rank = len(mapped)
        moments = jax.tree.map(lambda m: m.reshape(-1, *m.shape[rank:]), moments)
        if len(set(map(_key, places))) == 1:  # all examples of one layer
            moments, places = merge_stacked(moments), places[:1]
            mapped = ()
    return [
        {
            place.path: _in_place(
                jax.tree.map(lambda m, i=i: m[i], moments) if mapped else moments,
                place,
                shapes[place.path],
            )
        }
        for i, place in enumerate(places)
    ]


def _key(place: _Place) -> Any:
    return place.path, None if place.entries is None else place.entries.tobytes()


def _in_place(moments: Moments, place: _Place, shape: tuple[int, ...]) -> Moments:
    """Return moments in the shape of the variables, of count 0 where none are."""
    if place.entries is None:
        return Moments(moments.count, *(m.reshape(shape) for m in moments[1:]))
    entries = place.entries.ravel()
    count, mean, var = jnp.broadcast_arrays(*moments)

    def placed(values: Array) -> Array:
        flat = jnp.zeros(math.prod(shape), values.dtype)
        return flat.at[entries].set(values.ravel()).reshape(shape)

    return Moments(placed(count), placed(mean), placed(var))


def _merged(a: Moments | None, b: Moments) -> Moments:
    return b if a is None else merge(a, b)


def _along_examples(weights: Array, x: Array, larger: _Site) -> Array:
    """Return weights of the examples with x's rank.

    Args:
      weights: shape `[N]`.
      x: the input of a call.
      larger: the same call were there one example more.
    """
    axes = [a for a in range(x.ndim) if x.shape[a] != larger.shape[a]]
    if len(axes) != 1 or x.shape[axes[0]] != weights.shape[0]:
        raise ValueError(
            f"the input of layer {larger.layer}, of shape {list(x.shape)}, "
            f"has no axis of the {weights.shape[0]} examples to lay weights along; "
            "measure it without weights"
        )
    return jnp.expand_dims(weights, [a for a in range(x.ndim) if a != axes[0]])
