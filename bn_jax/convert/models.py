"""All batch norm layers of a model at once, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax.convert.entries import (
    PLACES,
    SCALARS,
    Problems,
    check_like,
    check_momentum,
    layer_to_roles,
    note_direction,
    note_impossible,
    note_reason,
    read_entries,
    refuse_entries,
    roles_to_layer,
    unmapped,
)
from bn_jax.convert.layer import BatchNormLayer, Entries, Library, Like
from bn_jax.convert.leaves import (
    as_array,
    entry_key,
    flatten,
    replace_entries,
)


def layers_from(
    library: Library,
    entries: Entries,
    names: Mapping[str, str | None],
    *,
    like: Mapping[str, Like] | None = None,
    momentum: float | None = None,
) -> dict[str, BatchNormLayer]:
    """Return all batch norm layers of a model's state.

    Args:
      library: torch, keras, flax, nnx, haiku, equinox_ema, equinox_batch, sbx, crossq
        or purejaxql. Of the last three the limits r_max and d_max are not part of the
        result: `from_batch_renorm` returns them for a layer.
      entries: of the model, with entries other than batch norm's or without:
        torch, its `state_dict()`; keras, `{w.path: w.numpy() for w in model.weights}`;
        flax and the last three, its variables, nested or flattened; nnx,
        `nnx.state(model)`; haiku, `{"params": params, "state": state}`; equinox, names
        of your own to entries as `from_equinox` takes them.
      names: from each layer's name there to its name in the result, or to None to leave
        it out. Levels of nested names are joined by "/": "Block_0/BatchNorm_0".
      like: from names in the result to what `from_torch` takes as `like`.
      momentum: see `from_equinox`; for equinox_batch alone.

    Raises:
      TypeError: if entries, names or like are not mappings.
      ValueError: if entries of the named layers are missing, misshapen, no arrays of
        numbers, or impossible, as NaN or a negative variance is; or there are others,
        of these or of batch norm layers without a name, or `like` names others; all
        are named. If two layers get the same name, the library is unknown, or momentum
        is missing, outside [0, 1) or given for another library.

    Examples:
      >>> bn = {"weight": [1.0], "bias": [0.0], "running_mean": [2.0],
      ...       "running_var": [3.0]}
      >>> state_dict = {f"features.1.{name}": value for name, value in bn.items()}
      >>> layers = layers_from("torch", state_dict, {"features.1": "BatchNorm_0"})
      >>> layers["BatchNorm_0"].state.mean.tolist()
      [2.0]
    """
    check_momentum(library, momentum, reading=True)
    chosen = check_names(names)
    flat = dict(flatten(entries))
    like = {} if like is None else like
    _check_by_name("like", like)
    for of_layer in like.values():
        check_like(of_layer)
    problems = Problems()
    problems.missing += [f"{ours} (in like)" for ours in like.keys() - chosen.values()]
    read = {
        ours: read_entries(library, flat, theirs, like.get(ours), problems)
        for theirs, ours in chosen.items()
    }
    for theirs, ours in chosen.items():
        note_impossible(PLACES[library], read[ours], theirs, problems)
    problems.extra += unmapped(library, flat, names)
    if library == "torch":
        note_reason(flat, problems)
    note_direction(library, flat, names, problems)
    refuse_entries(problems, library)
    return {ours: roles_to_layer(roles, momentum) for ours, roles in read.items()}


def layers_into(
    library: Library,
    entries: Entries,
    layers: Mapping[str, BatchNormLayer],
    names: Mapping[str, str | None],
    *,
    momentum: float | None = None,
) -> dict[Any, Any]:
    """Return a copy of a model's state with all batch norm layers replaced.

    Args:
      library: see `layers_from`.
      entries: the model's state in the form that `layers_from` takes; its initial state
        will do. They say which shapes are expected, and whether there are scale and
        bias.
      layers: by the names that `names` maps to.
      names: maps a layer's name in `entries` to its name in `layers`, or to None to
        leave that layer as it is; see `layers_from`.
      momentum: weight of the OLD average, of the layers; for haiku and equinox_batch
        alone.

    Returns:
      Nested dicts like `entries`, with NumPy arrays in the layers' dtypes in place of
      the layers' entries and all others, and r_max and d_max, as they were.

    Raises:
      TypeError: if entries, names or layers are not mappings, or a layer is not a
        BatchNormLayer.
      ValueError: if entries of the layers are missing, extra, misshapen or no arrays of
        numbers in one or the other, which are all named; if a layer has a NaN, a
        negative variance or number of batches, or none that the library needs; or as
        `layers_from` says of names, library and momentum.

    Examples:
      >>> from bn_jax.convert import from_nnx
      >>> layer = from_nnx({"scale": [2.0], "bias": [3.0], "mean": [1.0], "var": [4.0]})
      >>> state_dict = {"bn.weight": [1.0], "bn.bias": [0.0],
      ...               "bn.running_mean": [0.0], "bn.running_var": [1.0]}
      >>> filled = layers_into("torch", state_dict, {"norm": layer}, {"bn": "norm"})
      >>> filled["bn.running_mean"].tolist(), filled["bn.running_var"].tolist()
      ([1.0], [4.0])
    """
    check_momentum(library, momentum, reading=False)
    chosen = check_names(names)
    flat = dict(flatten(entries))
    _check_by_name("layers", layers)
    problems = Problems()
    problems.missing += [
        f"{ours} (in layers)" for ours in chosen.values() if ours not in layers
    ]
    problems.extra += [
        f"{ours} (in layers)" for ours in layers if ours not in chosen.values()
    ]
    replaced: dict[str, np.ndarray] = {}
    for theirs, ours in chosen.items():
        if ours not in layers:
            continue
        layer = layers[ours]
        keys = {
            role: entry_key(place, theirs) for role, place in PLACES[library].items()
        }
        optional = keys.get("num_batches") in flat
        roles = layer_to_roles(library, layer, momentum, optional=optional, name=ours)
        read_entries(library, flat, theirs, layer, problems)
        for role, value in roles.items():
            if (there := as_array(flat.get(keys[role]))) is not None:
                replaced[keys[role]] = _shaped_like(there, role, value)
    problems.extra += unmapped(library, flat, names)
    if library == "torch":
        note_reason(flat, problems)
    note_direction(library, flat, names, problems)
    refuse_entries(problems, library)
    return replace_entries(entries, replaced)


def _shaped_like(there: np.ndarray, role: str, value: np.ndarray) -> np.ndarray:
    """Return the value in the shape of an entry, where it has the numbers for it."""
    if role in SCALARS:
        return np.full(there.shape, value)
    return value.reshape(there.shape) if there.size == value.size else value


def _check_by_name(argument: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} is of type {type(given).__name__}; expected a mapping whose "
            "keys are names in the result of layers_from"
        )


def check_names(names: Mapping[str, str | None]) -> dict[str, str]:
    """Return the names of layers that are not left out; refuse a name given twice."""
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names is of type {type(names).__name__}; expected a mapping from the "
            "layers' names in the entries to ours, or to None"
        )
    chosen = {theirs: ours for theirs, ours in names.items() if ours is not None}
    given = list(chosen.values())
    twice = sorted({ours for ours in given if given.count(ours) > 1})
    if twice:
        raise ValueError(
            f"names maps several layers to {', '.join(twice)}; give each its own name"
        )
    return chosen
