"""A batch on the devices of a mesh that is set (`jax.set_mesh`).

A program for one device gives the same numbers for a batch that lies on many: the
compiler adds the exchanges between them. How many it needs depends on the program. If
the program cuts the batch where the devices do, one exchange is enough for its moments,
where the compiler would make two or three. All automatic axes of the mesh are taken for
the batch's. Where one of them shares out features, the numbers are right, too, but the
compiler adds exchanges of the moments along it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec


def explicit_axes(x: Array, axis: int) -> tuple[str, ...]:
    """Return the axes of an explicit mesh along which an axis of `x` lies."""
    names = jax.typeof(x).sharding.spec[axis] or ()
    return names if isinstance(names, tuple) else (names,)


def automatic_axes(size: int) -> tuple[str, ...]:
    """Return the automatic axes of the mesh along which to lay an axis of `size`.

    The compiler lays it out later, and has said nothing yet: each axis of the mesh is
    taken that still divides the size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = []
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        devices = mesh.shape[name]
        if kind == AxisType.Auto and devices > 1 and size % devices == 0:
            axes.append(name)
            size //= devices
    return tuple(axes)


def num_parts(size: int, num_groups: int = 1) -> int:
    """Return into how many parts to cut an axis of a batch, each for one device.

    Args:
      size: of the axis.
      num_groups: number of ghost batches. No part reaches into two of them.

    Returns:
      A multiple of `num_groups`; that number itself where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in automatic_axes(size))
    return devices if devices % num_groups == 0 else num_groups


def cut(x: Array, axis: int, parts: int) -> Array:
    """Return `x` with an axis of so many parts before `axis`, non-negative."""
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])


def cut_weights(weights: Array | None, x: Array, axis: int, parts: int) -> Array | None:
    """Return weights of x's rank, whose axes may be of size 1, cut as `x` is."""
    if weights is None:
        return None
    full = [*weights.shape[:axis], x.shape[axis], *weights.shape[axis + 1 :]]
    return cut(jnp.broadcast_to(weights, full), axis, parts)


def gathered(x: Array) -> Array:
    """Return `x`, whole on each device of the mesh; its gradient comes whole, too."""
    return lax.with_sharding_constraint(x, PartitionSpec())
