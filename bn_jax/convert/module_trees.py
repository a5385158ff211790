"""Two networks as trees of modules, whose layers are matched by their places.

On each level convolutions go with convolutions, norms with norms, dense layers with
dense layers and modules with modules, one by one in their order.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from bn_jax.convert.entries import Problems

Path = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]  # by entry of a layer, or by role
_KINDS = ("convolution", "norm", "dense", "other", "module")


def apart(layers: Mapping[Path, Shapes]) -> dict[Path, Shapes]:
    """Return layers, with each entry beside layers in a module as one of its own."""
    modules = {path[:depth] for path in layers for depth in range(len(path))}
    found: dict[Path, Shapes] = {}
    for path, entries in layers.items():
        if path in modules:
            found |= {(*path, name): {"": shape} for name, shape in entries.items()}
        else:
            found[path] = entries
    return found


def kind_of(shapes: Shapes) -> str:
    """Return the kind of a layer, PyTorch's or ours, by its entries' shapes."""
    if shapes.keys() & {"running_mean", "running_var"}:
        return "norm"
    if {"mean", "var"} <= shapes.keys():
        return "norm"
    kernel = shapes.get("kernel", shapes.get("weight", ()))
    return {4: "convolution", 2: "dense"}.get(len(kernel), "other")


def numbers_as_numbers(path: Path) -> list[list[str | int]]:
    """Return a key that sorts the names of a path by the numbers in them."""
    return [
        [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
        for name in path
    ]


def root(layers: Iterable[Path]) -> Path:
    """Return the path that all layers share, such as ("module",)."""
    shared: Path = ()
    for names in zip(*(path[:-1] for path in layers), strict=False):
        if len(set(names)) > 1:
            break
        shared = (*shared, names[0])
    return shared


def pairs_of(
    theirs: Mapping[Path, str],
    ours: Mapping[Path, str],
    their_module: Path,
    our_module: Path,
    problems: Problems,
) -> Iterator[tuple[Path, Path]]:
    """Yield the paths, ours and theirs, of the layers of two modules.

    Args:
      theirs: kinds of layers, in the order of their names.
      ours: kinds of layers, in the order of their calls.
      their_module: path of the module.
      our_module: path of the module.
      problems: takes what one of the modules has and the other has not.
    """
    their_children = _children(theirs, their_module)
    our_children = _children(ours, our_module)
    for kind in _KINDS:
        for there, here in _aligned(their_children[kind], our_children[kind]):
            if there is not None and (here is None or kind == "other"):
                problems.extra.append(_named(".", there, theirs))
            if here is not None and (there is None or kind == "other"):
                problems.missing.append(_named("/", here, ours))
            if here is None or there is None or kind == "other":
                continue
            if kind == "module":
                yield from pairs_of(theirs, ours, there, here, problems)
            else:
                yield here, there


def _children(
    layers: Mapping[Path, str], module: Path
) -> dict[str, dict[Path, tuple[str, ...]]]:
    """Return the children of a module by kind: their paths, and their layers' kinds."""
    depth = len(module) + 1
    inside: dict[Path, list[str]] = {}
    modules: set[Path] = set()
    for path, kind in layers.items():
        if path[: depth - 1] == module:
            inside.setdefault(path[:depth], []).append(kind)
            if len(path) > depth:
                modules.add(path[:depth])
    children: dict[str, dict[Path, tuple[str, ...]]] = {kind: {} for kind in _KINDS}
    for path, kinds in inside.items():
        kind = "module" if path in modules else kinds[0]
        children[kind][path] = tuple(sorted(kinds))
    return children


def _aligned(
    theirs: Mapping[Path, tuple[str, ...]], ours: Mapping[Path, tuple[str, ...]]
) -> Iterator[tuple[Path | None, Path | None]]:
    """Yield pairs of paths, one by one, with None beside one that is left over.

    Where their numbers differ, modules are paired that hold layers of the same kinds.
    An additional one, such as a stem, then does not shift all others.
    """
    a, b = list(theirs), list(ours)
    if len(a) == len(b):
        yield from zip(a, b, strict=True)
        return
    kinds = list(theirs.values()), list(ours.values())
    matcher = difflib.SequenceMatcher(None, *kinds, autojunk=False)
    for _, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        yield from itertools.zip_longest(a[a_start:a_end], b[b_start:b_end])


def _named(separator: str, path: Path, layers: Iterable[Path]) -> str:
    """Return the name of a layer or module that has no counterpart."""
    inside = [other for other in layers if other[: len(path)] == path]
    name = separator.join(path)
    return f"{name} with its {len(inside)} layers" if len(inside) > 1 else name
