"""The means and variances among a model's variables, whatever holds them.

Variables are those of a Flax Linen model (a dict or a FrozenDict), anything with a
field `batch_stats` such as a TrainState, or the state of an NNX model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

Path = tuple[str, ...]  # of a layer, such as ("Block_0", "BatchNorm_0")


class Statistics(NamedTuple):
    """A mean and a variance, of the shape that the variables have."""

    mean: Array
    var: Array


def statistics_of(variables: Any) -> dict[Path, Statistics]:
    """Return the statistics of each layer that holds a mean and a variance."""
    leaves, _ = _leaves(variables)
    found = {path: _value(leaf) for path, leaf in leaves if path is not None}
    return {
        path[:-1]: Statistics(found[path], found[*path[:-1], "var"])
        for path in found
        if path[-1] == "mean" and (*path[:-1], "var") in found
    }


def with_statistics(variables: Any, statistics: Mapping[Path, Statistics]) -> Any:
    """Return variables of the same kind with layers' statistics in place."""
    leaves, structure = _leaves(variables)

    def replaced(path: Path | None, leaf: Any) -> Any:
        if path is None or path[:-1] not in statistics:
            return leaf
        new = statistics[path[:-1]]._asdict().get(path[-1])
        if new is None:
            return leaf
        return leaf.replace(new) if _is_nnx("Variable", leaf) else new

    return jax.tree.unflatten(structure, [replaced(*pair) for pair in leaves])


def batch_stats_of(variables: Any) -> Any:
    """Return the collection of statistics in variables, as the model's user knows it.

    Of an NNX state these are its variables of type `nnx.BatchStat`, which `nnx.update`
    puts into a model.
    """
    if _is_nnx("State", variables):
        nnx = sys.modules["flax.nnx"]
        return nnx.filter_state(variables, nnx.BatchStat)
    if isinstance(variables, Mapping):
        return variables.get("batch_stats", {})
    return variables.batch_stats


def check_variables(variables: Any) -> None:
    """Refuse what are no variables of a model, in which no layer would be found.

    Raises:
      ValueError: naming what was given.
    """
    if _is_nnx("State", variables) or hasattr(variables, "batch_stats"):
        return
    if not isinstance(variables, Mapping):
        given = f"a {type(variables).__name__}"
    elif not variables or variables.keys() & {"params", "batch_stats"}:
        return
    else:
        given = f"a mapping of {', '.join(map(str, variables))}"
    raise ValueError(
        f"variables are {given}; expected those of a Flax Linen model, with params and "
        "batch_stats, as its init returns them; a TrainState with batch_stats; or an "
        "NNX model or its state, as nnx.split returns it"
    )


def _leaves(variables: Any) -> tuple[list[tuple[Path | None, Any]], Any]:
    """Return the leaves, those of batch statistics with their paths, and the structure.

    An NNX variable is a leaf as a whole.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda leaf: _is_nnx("Variable", leaf)
    )

    def path_of(keys: Any, leaf: Any) -> Path | None:
        names = [str(_name(key)) for key in keys]
        if _is_nnx("BatchStat", leaf):
            return tuple(names)
        if _is_nnx("Variable", leaf) or "batch_stats" not in names:
            return None
        return tuple(names[names.index("batch_stats") + 1 :])

    return [(path_of(keys, leaf) or None, leaf) for keys, leaf in flat], structure


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _value(leaf: Any) -> Any:
    return leaf.get_value() if _is_nnx("Variable", leaf) else leaf


def _is_nnx(kind: str, value: Any) -> bool:
    """Return whether a value is of a class of Flax NNX, without importing it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, getattr(nnx, kind))
