"""Axes that `jax.pmap`, `jax.vmap` and `jax.shard_map` map over, by name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax.numpy as jnp
from jax import Array, lax

AxisName = Hashable | tuple[Hashable, ...]
AxisIndexGroups = Sequence[Sequence[int]]


def check_groups(
    axis_name: AxisName | None, axis_index_groups: AxisIndexGroups | None
) -> None:
    """Refuse groups of an axis that is not named.

    Raises:
      ValueError: if there are groups and no name.
    """
    if axis_name is None and axis_index_groups is not None:
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} groups a mapped axis, but "
            "axis_name is None; give the axis's name too"
        )


def axis_size(axis_name: AxisName) -> int:
    """Return the number of instances along a named axis, or a tuple of them.

    Raises:
      ValueError: if a name is not bound where this is traced.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    size = 1
    for name in names:
        try:
            size *= lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name={name!r} is not bound here; call the function inside "
                f"jax.pmap(..., axis_name={name!r}), jax.vmap(..., axis_name={name!r}) "
                f"or jax.shard_map over a mesh with that axis, or leave axis_name out"
            ) from None
    return size


def group_size(axis_index_groups: AxisIndexGroups, num_instances: int) -> int:
    """Return the number of instances in each group.

    Raises:
      ValueError: if the groups do not split the axis into parts of one size.
    """
    sizes = {len(group) for group in axis_index_groups}
    members = sorted(i for group in axis_index_groups for i in group)
    if len(sizes) != 1 or members != list(range(num_instances)):
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} do not split an axis of "
            f"{num_instances} instances; expected groups of one size that hold each of "
            f"0 to {num_instances - 1} once"
        )
    return sizes.pop()


def place_in_group(axis_index_groups: AxisIndexGroups) -> Array:
    """Return, for each instance along the axis, its position in its group."""
    places = {i: place for group in axis_index_groups for place, i in enumerate(group)}
    return jnp.asarray([places[i] for i in range(len(places))])
