"""The leaves of state dicts and variables: their names, and arrays of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.convert.layer import Entries

# What JAX has no dtype for.
_NARROWER = {
    np.dtype(np.longdouble): np.dtype(np.float64),
    np.dtype(np.clongdouble): np.dtype(np.complex128),
}


def flatten(entries: Entries, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with their levels joined by "/"; None counts as absent.

    Raises:
      TypeError: if entries are not a mapping.
    """
    if not isinstance(entries, Mapping):
        raise TypeError(
            f"entries are of type {type(entries).__name__}; expected a mapping from "
            "names to arrays, such as a state dict or variables"
        )
    for key, value in entries.items():
        path = _join(prefix, key)
        if isinstance(value, Mapping):
            yield from flatten(value, path)
        elif value is not None:
            yield path, value


def replace_entries(
    entries: Entries, replaced: Mapping[str, np.ndarray], prefix: str = ""
) -> dict[Any, Any]:
    """Return nested dicts like `entries`, with some leaves replaced."""
    return {
        key: replace_entries(value, replaced, path)
        if isinstance(value, Mapping)
        else replaced.get(path, value)
        for key, value in entries.items()
        for path in [_join(prefix, key)]
    }


def _join(prefix: str, key: Any) -> str:
    levels = key if isinstance(key, tuple) else (key,)
    return "/".join([*([prefix] if prefix else []), *map(str, levels)])


def entry_key(place: str, name: str) -> str:
    """Return the key of a layer's entry; a name "" leaves no separator behind."""
    if not name:
        return place.replace("{}.", "").replace("{}/", "")
    return place.replace("{}", name)


def layer_name(place: str, key: str) -> str | None:
    """Return the name of the layer whose entry at `place` is `key`, or None."""
    if key == entry_key(place, ""):
        return ""
    before, after = place.split("{}")
    if key.startswith(before) and key.endswith(after):
        return key[len(before) : -len(after)] or None
    return None


def as_array(value: Any) -> np.ndarray | None:
    """Return a NumPy array of numbers, or None where there is no such thing.

    Floating-point numbers come in JAX's dtype for them, float32 for float64 unless it
    computes in 64 bits; all in the machine's byte order.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.dtype == bool or jnp.issubdtype(array.dtype, np.integer):
        return array.astype(array.dtype.newbyteorder("="))
    if not jnp.issubdtype(array.dtype, np.inexact):
        return None
    native = array.dtype.newbyteorder("=")
    native = _NARROWER.get(native, native)
    with np.errstate(over="ignore"):  # what is infinite then is refused as such
        return array.astype(jax.dtypes.canonicalize_dtype(native))
