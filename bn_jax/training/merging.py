"""Moving averages that differ by device or micro-batch, and how they are merged."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bn_jax.averages import BatchNormState, merge_states
from bn_jax.fields import ConfigError
from bn_jax.training import parallel
from bn_jax.training.config import TrainConfig


def check(config: TrainConfig, batch_stats: Any, placement: parallel.Placement) -> None:
    """Refuse choices on moving averages that a model does not have, or cannot merge.

    Raises:
      ConfigError: naming the choice, and what to give.
    """
    apart = f"batch_stats={config.batch_stats!r}"
    merges = "accumulate_stats='once'"
    once = config.accumulate > 1 and config.accumulate_stats == "once"
    if not jax.tree.leaves(batch_stats) and (once or config.batch_stats != "synced"):
        raise ConfigError(
            f"{merges if once else apart} with a model that keeps no moving "
            "statistics; leave it out"
        )
    if once:
        _check_merges(batch_stats, merges, instead="accumulate_stats='each'")
    if placement.num_states > 1 and config.merged_stats == "exact":
        _check_merges(
            batch_stats,
            f"{apart} and merged_stats='exact'",
            instead="merged_stats='first'",
            beside=frozenset({"count"}),
        )


def _check_merges(
    batch_stats: Any, option: str, *, instead: str, beside: frozenset[str] = frozenset()
) -> None:
    """Refuse statistics that are not a mean and a variance, which alone can be merged.

    Args:
      batch_stats: of a model.
      option: the one that asks to merge them, as the user writes it.
      instead: what merges nothing, likewise.
      beside: names of statistics that may stand beside mean and variance.

    Raises:
      ConfigError: if a layer keeps others.
    """
    kept: dict[tuple[str, ...], set[str]] = {}
    for *layer, name in traverse_util.flatten_dict(batch_stats):
        kept.setdefault(tuple(layer), set()).add(name)
    for path, names in kept.items():
        if names - beside != {"mean", "var"}:
            raise ConfigError(
                f"{option} with the norm {'/'.join(path)}, which keeps "
                f"{', '.join(sorted(names))}; it merges means and variances alone: "
                f"give {instead}"
            )


def merged(batch_stats: Any, rule: str) -> Any:
    """Return one set of moving averages of those that differ by group of devices.

    Args:
      batch_stats: collection with a leading axis of groups in each array.
      rule: "exact" merges means and variances, the variance between groups included
        (`bn_jax.averages.merge_states`); "first" takes the first group's.
    """

    def is_layer(node: Any) -> bool:
        return isinstance(node, dict) and "mean" in node and "var" in node

    def of_layer(layer: Any) -> Any:
        first = jax.tree.map(lambda leaf: leaf[0], layer)
        if rule == "first" or not is_layer(layer) or len(layer["mean"]) == 1:
            return first
        state = merge_states(BatchNormState(layer["mean"], layer["var"]))
        mean, var = np.asarray(state.mean), np.asarray(state.var)
        return {**first, "mean": mean, "var": var}

    return jax.tree.map(of_layer, batch_stats, is_leaf=is_layer)
