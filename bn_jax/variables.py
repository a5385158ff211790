"""The parameters and statistics of a model by path, whatever holds them.

Variables are those of a Flax Linen model (a dict or a FrozenDict), anything with a
field `batch_stats` such as a TrainState, or the state of an NNX model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

Path = tuple[str, ...]  # of a layer, such as ("Block_0", "BatchNorm_0")

# Name of the parameter of `bn_jax.variants.mabn` that is an average.
MOVING_PRODUCTS = "moving_products"


class Statistics(NamedTuple):
    """A mean and a variance, of the shape that the variables have."""

    mean: Array
    var: Array


# A leaf of variables: the collection that it is of, "params" or "batch_stats", and the
# path in there; for any other leaf ("", ()).
Key = tuple[str, Path]


def statistics_of(variables: Any) -> dict[Path, Statistics]:
    """Return the statistics of each layer that holds a mean and a variance.

    Examples:
      >>> import numpy as np
      >>> averages = {"mean": np.array([1.0]), "var": np.array([4.0])}
      >>> statistics = statistics_of({"batch_stats": {"norm": averages}})
      >>> statistics[("norm",)].mean.tolist(), statistics[("norm",)].var.tolist()
      ([1.0], [4.0])
    """
    found = collection(variables, "batch_stats")
    return {
        path[:-1]: Statistics(found[path], found[*path[:-1], "var"])
        for path in found
        if path[-1] == "mean" and (*path[:-1], "var") in found
    }


def with_statistics(variables: Any, statistics: Mapping[Path, Statistics]) -> Any:
    """Return variables of the same kind with layers' statistics in place.

    Statistics of a layer that the variables lack are ignored.

    Examples:
      >>> import numpy as np
      >>> averages = {"mean": np.zeros(1), "var": np.ones(1)}
      >>> measured = {("norm",): Statistics(mean=np.array([1.0]), var=np.array([4.0]))}
      >>> variables = with_statistics({"batch_stats": {"norm": averages}}, measured)
      >>> variables["batch_stats"]["norm"]["var"].tolist()
      [4.0]
    """
    return replaced(
        variables,
        {
            ("batch_stats", (*path, name)): value
            for path, of_layer in statistics.items()
            for name, value in of_layer._asdict().items()
        },
    )


def collection(variables: Any, name: str) -> dict[Path, Any]:
    """Return the arrays of "params" or "batch_stats", by path."""
    keys, leaves, _ = leaves_of(variables)
    return {
        path: leaf.get_value() if _is_nnx("Variable", leaf) else leaf
        for (of_collection, path), leaf in zip(keys, leaves, strict=True)
        if of_collection == name
    }


def replaced(variables: Any, values: Mapping[Key, Any]) -> Any:
    """Return variables of the same kind with some arrays replaced.

    Keys that they lack are ignored.
    """
    keys, leaves, structure = leaves_of(variables)

    def new(key: Key, leaf: Any) -> Any:
        if key not in values:
            return leaf
        return leaf.replace(values[key]) if _is_nnx("Variable", leaf) else values[key]

    return jax.tree.unflatten(structure, map(new, keys, leaves))


def leaves_of(variables: Any) -> tuple[list[Key], list[Any], Any]:
    """Return the keys of the leaves, the leaves, and the structure.

    An NNX variable is a leaf as a whole.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda leaf: _is_nnx("Variable", leaf)
    )

    def key_of(keys: Any, leaf: Any) -> Key:
        names = tuple(str(_name(key)) for key in keys)
        if _is_nnx("Variable", leaf):
            kinds = {"Param": "params", "BatchStat": "batch_stats"}
            of_kind = [c for kind, c in kinds.items() if _is_nnx(kind, leaf)]
            return (of_kind[0], names) if of_kind else ("", ())
        if names[1:] and names[0] in ("params", "batch_stats"):
            return names[0], names[1:]
        return "", ()

    return [key_of(*pair) for pair in flat], [leaf for _, leaf in flat], structure


def norm_param_mask(variables: Any) -> Any:
    """Return a tree of booleans: True at the scale and bias of normalisation layers.

    With `optax.masked` it freezes them or singles them out, as in
    `optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask))`.

    Args:
      variables: of a Linen model, a TrainState, or an NNX module or its state. Layers
        that hold batch statistics count as normalisation.

    Returns:
      A tree like `variables["params"]`; of a TrainState, like its field; of NNX, like
      `nnx.as_pure(nnx.state(model, nnx.Param))`.

    Raises:
      ValueError: if there are no parameters or no batch statistics, or as
        `check_variables` says.

    Examples:
      >>> import numpy as np
      >>> one = np.ones(1)
      >>> norm_param_mask({
      ...     "params": {"dense": {"kernel": one}, "norm": {"scale": one, "bias": one}},
      ...     "batch_stats": {"norm": {"mean": one, "var": one}}})
      {'dense': {'kernel': False}, 'norm': {'bias': True, 'scale': True}}
    """
    variables = _state_of(variables)
    keys, _, _ = leaves_of(variables)
    layers = {path[:-1] for name, path in keys if name == "batch_stats"}
    if not layers:
        raise ValueError(
            "variables have no batch_stats, by which normalisation layers are known; "
            "give those that the model's init returns, with params and batch_stats"
        )
    return _param_mask(
        variables, lambda path: path[:-1] in layers and path[-1] != MOVING_PRODUCTS
    )


def moving_param_mask(variables: Any) -> Any:
    """Return a tree of booleans: True at parameters that are averages, not learned.

    Those are the `moving_products` of `bn_jax.variants.mabn`, which plain gradient
    descent at rate 1 moves as they should be, and nothing else does:
    `optax.multi_transform({True: optax.sgd(1.0), False: optax.adam(1e-3)}, mask)`.

    Args:
      variables: as `norm_param_mask` takes them, or with params alone.

    Returns:
      A tree as `norm_param_mask` returns it.

    Raises:
      ValueError: if there are no parameters, or as `check_variables` says.

    Examples:
      >>> import numpy as np
      >>> of_norm = {"scale": np.ones(1), "moving_products": np.zeros((2, 1))}
      >>> moving_param_mask({"params": {"norm": of_norm}})
      {'norm': {'moving_products': True, 'scale': False}}
    """
    return _param_mask(_state_of(variables), lambda path: path[-1] == MOVING_PRODUCTS)


def _state_of(variables: Any) -> Any:
    """Return checked variables; of an NNX module its state."""
    if _is_nnx("Module", variables):
        variables = sys.modules["flax.nnx"].state(variables)
    check_variables(variables)
    return variables


def _param_mask(variables: Any, is_true: Callable[[Path], bool]) -> Any:
    """Return booleans by the path of each parameter."""
    keys, _, _ = leaves_of(variables)
    if all(name != "params" for name, _ in keys):
        raise ValueError(
            "variables have no params, which a mask is made of; give those that the "
            "model's init returns, with params and batch_stats"
        )
    mask = replaced(
        variables, {key: is_true(key[1]) for key in keys if key[0] == "params"}
    )
    if _is_nnx("State", mask):
        nnx = sys.modules["flax.nnx"]
        return nnx.as_pure(nnx.filter_state(mask, nnx.Param))
    return mask["params"] if isinstance(mask, Mapping) else mask.params


def batch_stats_of(variables: Any) -> Any:
    """Return the collection of statistics in variables, as the model's user knows it.

    Of an NNX state these are its variables of type `nnx.BatchStat`, which `nnx.update`
    puts into a model; of a mapping that has none, an empty one.

    Raises:
      ValueError: as `check_variables` says.

    Examples:
      >>> import numpy as np
      >>> averages = {"mean": np.array([1.0]), "var": np.array([4.0])}
      >>> batch_stats_of({"params": {}, "batch_stats": {"norm": averages}})
      {'norm': {'mean': array([1.]), 'var': array([4.])}}
    """
    variables = _state_of(variables)
    if _is_nnx("State", variables):
        nnx = sys.modules["flax.nnx"]
        return nnx.filter_state(variables, nnx.BatchStat)
    if isinstance(variables, Mapping):
        return variables.get("batch_stats", {})
    return variables.batch_stats


def check_variables(variables: Any) -> None:
    """Refuse anything but the variables of a model, as it would hold no layer.

    Raises:
      ValueError: naming what was given.
    """
    if _is_nnx("State", variables) or hasattr(variables, "batch_stats"):
        return
    if not isinstance(variables, Mapping):
        given = f"a {type(variables).__name__}"
        if hasattr(variables, "params"):
            given += (
                " without batch_stats (give {'params': state.params, 'batch_stats': "
                "...}, with the statistics that are kept beside it)"
            )
    elif not variables or variables.keys() & {"params", "batch_stats"}:
        return
    else:
        given = f"a mapping of {', '.join(map(str, variables))}"
    raise ValueError(
        f"variables are {given}; expected those of a Flax Linen model, with params and "
        "batch_stats, as its init returns them; a TrainState with batch_stats; or an "
        "NNX model or its state, as nnx.split returns it"
    )


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _is_nnx(kind: str, value: Any) -> bool:
    """Return whether a value is of a class of Flax NNX, without importing it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, getattr(nnx, kind))
