"""Data and variables on meshes of explicit axes.

There the sharding of each result has to be told, which a user's model may do for the
shapes that it was written for, and not for a data set that is cut into batches. So what
is measured is measured on automatic axes of the same devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

T = TypeVar("T")


def automatic(tree: T) -> T:
    """Return arrays with the same shards on meshes whose axes are all automatic."""

    def moved(leaf: Any) -> Any:
        if not _is_explicit(leaf):
            return leaf
        sharding = leaf.sharding
        mesh = _automatic_mesh(sharding.mesh)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(moved, tree)


def like(tree: T, other: T) -> T:
    """Return arrays on the explicit meshes where those of another tree are."""

    def moved(leaf: Any, on: Any) -> Any:
        return jax.device_put(leaf, on.sharding) if _is_explicit(on) else leaf

    return jax.tree.map(moved, tree, other)


@contextlib.contextmanager
def automatic_axes() -> Iterator[None]:
    """Let all axes of the mesh that is set be automatic in here."""
    with contextlib.ExitStack() as stack:
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            stack.enter_context(jax.set_mesh(_automatic_mesh(jax.sharding.get_mesh())))
        yield


def _is_explicit(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    mesh = getattr(leaf.sharding, "mesh", None)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _automatic_mesh(mesh: Any) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names)
