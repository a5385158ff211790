"""The entries of batch norm layers: where each library keeps what, read and written.

A layer's entries are sorted by role (scale, bias, mean, var, ...); what does not fit is
gathered, so that one error names it all.
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.averages import BatchNormState
from bn_jax.checks import AFFINE, AVERAGES, check_fields
from bn_jax.convert.averages import debias
from bn_jax.convert.layer import BatchNormLayer, Entries, Like, check_is_layer
from bn_jax.convert.leaves import (
    as_array,
    entry_key,
    flatten,
    layer_name,
)
from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE
from bn_jax.functional import BatchNormParams
from bn_jax.moments import statistics_dtype

# The BatchRenorm that reinforcement learning libraries have from each other.
_RENORM = {
    "scale": "params/{}/scale",
    "bias": "params/{}/bias",
    "mean": "batch_stats/{}/mean",
    "var": "batch_stats/{}/var",
    "num_batches": "batch_stats/{}/steps",
    "r_max": "batch_stats/{}/r_max",
    "d_max": "batch_stats/{}/d_max",
}
# Where each library keeps what: {} is the name of the layer, levels are joined by "/".
PLACES: dict[str, dict[str, str]] = {
    "torch": {
        "scale": "{}.weight",
        "bias": "{}.bias",
        "mean": "{}.running_mean",
        "var": "{}.running_var",
        "num_batches": "{}.num_batches_tracked",
    },
    "keras": {
        "scale": "{}/gamma",
        "bias": "{}/beta",
        "mean": "{}/moving_mean",
        "var": "{}/moving_variance",
    },
    "flax": {
        "scale": "params/{}/scale",
        "bias": "params/{}/bias",
        "mean": "batch_stats/{}/mean",
        "var": "batch_stats/{}/var",
        "num_batches": "batch_stats/{}/count",
    },
    "nnx": {
        "scale": "{}/scale",
        "bias": "{}/bias",
        "mean": "{}/mean",
        "var": "{}/var",
    },
    "haiku": {
        "scale": "params/{}/scale",
        "bias": "params/{}/offset",
        "mean": "state/{}/~/mean_ema/average",
        "mean_hidden": "state/{}/~/mean_ema/hidden",
        "num_batches": "state/{}/~/mean_ema/counter",
        "var": "state/{}/~/var_ema/average",
        "var_hidden": "state/{}/~/var_ema/hidden",
        "var_num_batches": "state/{}/~/var_ema/counter",
    },
    "equinox_ema": {
        "scale": "{}/weight",
        "bias": "{}/bias",
        "mean": "{}/running_mean",
        "var": "{}/running_var",
        "first_time": "{}/first_time",
    },
    "equinox_batch": {
        "scale": "{}/weight",
        "bias": "{}/bias",
        "mean_hidden": "{}/hidden_mean",
        "var_hidden": "{}/hidden_var",
        "num_batches": "{}/counter",
    },
    "sbx": _RENORM,
    "crossq": _RENORM,
    "purejaxql": _RENORM,
}
# PyTorch wrote no counter before 0.4.1; Flax has none, bn_jax.linen one on demand.
_OPTIONAL = {"torch": {"num_batches"}, "flax": {"num_batches"}}
# Of an ensemble, such as `flax.linen.vmap` makes, they have the axes of its members.
SCALARS = {"num_batches", "var_num_batches", "first_time", "r_max", "d_max"}
_LIMITS = {"r_max": AT_LEAST_1, "d_max": NOT_NEGATIVE}  # may be infinite
_VARIANCES = {"var", "var_hidden"}
_STATISTICS = {"mean", "var", "mean_hidden", "var_hidden"}


_POSSIBLE = (
    "finite numbers, variances of 0 or more, whole numbers of batches, limits r_max at "
    "least 1 and d_max 0 or greater, and the same scalars in all members of an ensemble"
)


_MENDS = {
    "missing": "check names and prefixes; a layer without scale or bias needs "
    "like=bn_jax.init(..., scale=False, bias=False)",
    "extra": "map their layer in names (to None to leave it out), or drop them",
    "misshapen": "give the entries of a layer of the same size",
    "unreadable": "give arrays of numbers; of a PyTorch tensor, "
    "tensor.detach().float().cpu()",
    "impossible": f"expected {_POSSIBLE}; give the entries of a layer that did not "
    "diverge",
}


class Problems:
    """What does not fit, gathered so that one error names it all."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.misshapen: list[str] = []
        self.unreadable: list[str] = []
        self.impossible: list[str] = []
        self.hint = ""  # what may be the reason of it all, after a colon

    def refuse(self, what: str, expected: str, mends: Mapping[str, str]) -> None:
        """Raise the error, if there is anything to name.

        Args:
          what: does not fit, as a sentence.
          expected: in its place.
          mends: by kind of problem, what to do about it.

        Raises:
          ValueError: naming all problems, kind by kind.
        """
        lines = [
            f"{kind} ({mend}): {'; '.join(found)}"
            for kind, mend in mends.items()
            if (found := getattr(self, kind))
        ]
        if lines:
            head = f"{what}{self.hint}; expected {expected}"
            raise ValueError("\n  ".join([head, *lines]))


def refuse_entries(problems: Problems, library: str) -> None:
    """Refuse the entries of a library's batch norm layers, if they have problems.

    Raises:
      ValueError: naming them, and the entries that the library's layers have.
    """
    for kind in _MENDS:
        getattr(problems, kind).sort()
    expected = ", ".join(PLACES[library].values()).replace("{}", "<layer>")
    problems.refuse(
        "the batch norm entries do not fit", f"for {library}: {expected}", _MENDS
    )


def note_reason(flat: Mapping[str, Any], problems: Problems) -> None:
    """Note in `problems` why PyTorch's entries may be missing.

    They are there with a prefix, or the layer keeps no averages.
    """
    bare = [
        key.removesuffix("running_mean")
        for key in problems.missing
        if key.endswith("running_mean")
        and key.removesuffix("mean") + "var" in problems.missing
        and key.removesuffix("running_mean") + "weight" in flat
    ]
    if bare:
        names = ", ".join(sorted(name.rstrip(".") for name in bare if name))
        problems.hint = (
            f": {names or 'the layer'} may have track_running_stats=False, and no "
            "averages, so that it normalises by the batch in prediction, too: give "
            "zeros as running_mean and ones as running_var, and call the layer here "
            "with use_running_average=False always"
        )
        return
    missing = [key for key in problems.missing if " " not in key]
    found = Counter(
        given[: -len(key)]
        for key in missing
        for given in flat
        if given.endswith((f".{key}", f"/{key}"))
    )
    prefixes = [p for p, number in found.items() if 2 * number > len(missing)]
    if len(prefixes) == 1:
        problems.hint = stripping(prefixes[0], flat)
    elif prefixes:
        problems.hint = (
            f": they are of several layers, {', '.join(sorted(prefixes))} (take one, "
            "or all of them by name with layers_from)"
        )


def stripping(prefix: str, flat: Mapping[str, Any]) -> str:
    """Return in words that entries have a prefix, and how it is stripped.

    Args:
      prefix: with its last separator, such as "module.".
      flat: the entries by name.
    """
    folders, _, rest = prefix.rpartition("/")
    if folders:
        place = "".join(f"[{name!r}]" for name in folders.split("/"))
        words = f": they are inside of {place}, so give entries{place}"
        return words + (f", with {rest!r} stripped from their names" if rest else "")
    number = sum(key.startswith(prefix) for key in flat)
    others = f" if k.startswith({prefix!r})" if number < len(flat) else ""
    return (
        f": the names of {number} of {len(flat)} entries begin with {prefix!r} "
        "(DataParallel puts module. there, torch.compile _orig_mod., Lightning "
        f"model.), so strip it: {{k.removeprefix({prefix!r}): v for k, v in "
        f"state_dict.items(){others}}}"
    )


def read_layer(
    library: str,
    entries: Entries,
    like: Like | None,
    name: str = "",
    *,
    momentum: float | None = None,
) -> BatchNormLayer:
    """Read the one layer called `name` ("" where the entries are its own)."""
    check_like(like)
    check_momentum(library, momentum, reading=True)
    problems = Problems()
    roles = read_entries(library, dict(flatten(entries)), name, like, problems)
    note_impossible(PLACES[library], roles, name, problems)
    if library == "torch":
        note_reason(dict(flatten(entries)), problems)
    refuse_entries(problems, library)
    return roles_to_layer(roles, momentum)


def write_layer(
    library: str,
    layer: BatchNormLayer,
    *,
    momentum: float | None = None,
    optional: bool = True,
) -> dict[str, Any]:
    """Write a layer as the nested entries of a model that is nothing else."""
    check_momentum(library, momentum, reading=False)
    tree: dict[str, Any] = {}
    for role, value in layer_to_roles(
        library, layer, momentum, optional=optional
    ).items():
        *levels, entry = entry_key(PLACES[library][role], "").split("/")
        node = tree
        for level in levels:
            node = node.setdefault(level, {})
        node[entry] = value
    return tree


def read_entries(
    library: str,
    flat: Mapping[str, Any],
    name: str,
    like: Like | None,
    problems: Problems,
) -> dict[str, np.ndarray]:
    """Return a layer's entries by role; note what does not fit in `problems`."""
    params, state = (None, None) if like is None else like[:2]
    unwanted = {
        role
        for role in ("scale", "bias")
        if params is not None and getattr(params, role) is None
    }
    keys = {role: entry_key(place, name) for role, place in PLACES[library].items()}
    roles: dict[str, np.ndarray] = {}
    for role, key in keys.items():
        if role in unwanted:
            if key in flat:
                problems.extra.append(key)
        elif key in flat:
            value = as_array(flat[key])
            if value is None:
                problems.unreadable.append(f"{key} is {_described(flat[key])}")
            else:
                roles[role] = value
        elif role not in _OPTIONAL.get(library, ()):
            problems.missing.append(key)
    separator = "." if library == "torch" else "/"
    parents = {key.rpartition(separator)[0] for key in keys.values()}
    known = set(keys.values())
    problems.extra += [
        key
        for key in flat
        if key not in known and key.rpartition(separator)[0] in parents
    ]
    if library == "haiku":
        roles = {
            role: value if role in SCALARS else _without_unit_axes(value)
            for role, value in roles.items()
        }
        counters = [
            roles[role].tolist()
            for role in ("num_batches", "var_num_batches")
            if role in roles
        ]
        if len(counters) == 2 and counters[0] != counters[1]:
            problems.misshapen.append(
                f"{keys['num_batches']} is {counters[0]} and "
                f"{keys['var_num_batches']} is {counters[1]}, expected the same"
            )
    per_feature = {r: v.shape for r, v in roles.items() if r not in SCALARS}
    if state is not None:
        expected = np.shape(state.mean)
        if library == "haiku":
            expected = _without_unit_axes(np.empty(expected)).shape
    else:
        # Statistics first: they are what a layer cannot do without.
        ordered = sorted(per_feature, key=lambda role: role not in _STATISTICS)
        expected = per_feature[ordered[0]] if ordered else ()
    for role, value in roles.items():
        wanted = expected
        if role in SCALARS:
            members = value.ndim < len(expected)
            wanted = expected[: value.ndim] if members else ()
        if value.shape != wanted:
            problems.misshapen.append(
                f"{keys[role]} has shape {list(value.shape)}, expected {list(wanted)}"
            )
    return roles


def note_impossible(
    places: Mapping[str, str],
    roles: Mapping[str, np.ndarray],
    name: str,
    problems: Problems,
) -> None:
    """Note numbers that a layer cannot have, such as NaN or a negative variance."""
    for role, value in roles.items():
        if fault := _fault(role, value):
            problems.impossible.append(f"{entry_key(places[role], name)} {fault}")


def _fault(role: str, value: np.ndarray) -> str | None:
    """Describe the fault of an entry's numbers, or return None."""
    if role in SCALARS and len(numbers := np.unique(value)) > 1:
        return f"has the values {', '.join(map(str, numbers))}"
    if role in _LIMITS:
        held = all(_LIMITS[role].holds(number) for number in value.ravel().tolist())
        return None if held else f"is {value}"
    finite = np.isfinite(value)
    if not finite.all():
        number = f"{(~finite).sum()} of {value.size} values"
        return f"has {number} that are not finite in {value.dtype}"
    if role in _VARIANCES and np.iscomplexobj(value):
        return f"has dtype {value.dtype}"
    if role in _VARIANCES and (value < 0).any():
        return f"has the value {value.min()}"
    if role in SCALARS and not ((value >= 0) & (value == np.floor(value))).all():
        return f"is {value}"
    return None


def unmapped(
    library: str, flat: Mapping[str, Any], names: Mapping[str, str | None]
) -> Iterator[str]:
    """Yield the entries of the batch norm layers that `names` does not speak of."""
    for name in _layers_in(library, flat):
        if name not in names:
            for place in PLACES[library].values():
                if (key := entry_key(place, name)) in flat:
                    yield key


def _layers_in(library: str, flat: Mapping[str, Any]) -> list[str]:
    """Return the names of the batch norm layers in entries, in their order."""
    places = PLACES[library]
    found: dict[str, None] = {}
    for key in flat:
        for role in _STATISTICS & places.keys():
            if (name := layer_name(places[role], key)) is not None:
                found[name] = None
    return list(found)


def note_direction(
    library: str,
    flat: Mapping[str, Any],
    names: Mapping[str, str | None],
    problems: Problems,
) -> None:
    """Note in `problems` that names go from ours to theirs, if they seem to."""
    there = _layers_in(library, flat)
    to = [name for name in names.values() if name is not None]
    if to and set(to) <= set(there) and not set(names) & set(there):
        problems.hint = (
            f": names look turned round, as {to[0]!r} is a layer in the entries; map "
            f"its name there to the other, {{{to[0]!r}: "
            f"{next(k for k, v in names.items() if v == to[0])!r}}}"
        )


def roles_to_layer(
    roles: Mapping[str, np.ndarray], momentum: float | None
) -> BatchNormLayer:
    """Return the layer for entries that fit."""
    num_batches = None
    if "num_batches" in roles:
        num_batches = int(roles["num_batches"].flat[0])
    if "first_time" in roles:
        num_batches = 0 if roles["first_time"].flat[0] else None

    def average(role: str) -> Array:
        if role in roles:
            value = roles[role]
        else:
            assert momentum is not None and num_batches is not None
            value = roles[f"{role}_hidden"] / (debias(momentum, num_batches) or 1)
        # jnp.array promises a copy, jnp.asarray does not: PyTorch trains in place.
        array = jnp.array(value)
        return array.astype(statistics_dtype(array.dtype))

    def parameter(role: str) -> Array | None:
        if role not in roles:
            return None
        array = jnp.array(roles[role])
        if jnp.issubdtype(array.dtype, jnp.inexact):
            return array
        return array.astype(statistics_dtype(array.dtype))

    return BatchNormLayer(
        BatchNormParams(scale=parameter("scale"), bias=parameter("bias")),
        BatchNormState(mean=average("mean"), var=average("var")),
        num_batches,
    )


def layer_to_roles(
    library: str,
    layer: BatchNormLayer,
    momentum: float | None,
    *,
    optional: bool = True,
    name: str | None = None,
) -> dict[str, np.ndarray]:
    """Return a layer's entries by role, in the library's order and dtypes."""
    check_is_layer(layer)
    params, state, num_batches = layer
    _check_layer(layer, name)
    places = PLACES[library]
    roles = {role: value for role, value in params._asdict().items()}
    roles |= state._asdict()
    if library == "torch":
        roles["num_batches"] = np.int64(num_batches or 0)
    elif library == "equinox_ema":
        roles["first_time"] = np.bool_(num_batches == 0)
    elif "num_batches" in places and (library != "flax" or optional):
        if num_batches is None:
            which = "" if name is None else f" of layer {name}"
            raise ValueError(
                f"num_batches{which} is None, but {library} needs the number of "
                "batches in the averages; set it by layer._replace(num_batches=...), "
                "to a large one such as 10**6 for averages with constant momentum"
            )
        # bn_jax.linen counts in float32, beside its averages.
        dtype = np.float32 if library == "flax" else np.int32
        most = np.iinfo(np.int32).max
        if num_batches > most:
            raise ValueError(
                f"num_batches is {num_batches}, but {library} counts batches in int32; "
                f"give at most {most}"
            )
        roles["num_batches"] = roles["var_num_batches"] = dtype(num_batches)
        if momentum is not None:
            factor = debias(momentum, num_batches)
            if library == "equinox_batch":
                factor = factor or 1  # at counter 0 it predicts by what is hidden
            for role in ("mean", "var"):
                value = np.asarray(roles[role])
                roles[f"{role}_hidden"] = (value * factor).astype(value.dtype)
    if library == "torch" and not optional:
        del roles["num_batches"]
    return {
        role: np.array(roles[role]) for role in places if roles.get(role) is not None
    }


def _check_layer(layer: BatchNormLayer, name: str | None) -> None:
    """Refuse a layer with numbers that it cannot have, such as a negative variance."""
    roles = {**layer.params._asdict(), **layer.state._asdict()}
    roles["num_batches"] = layer.num_batches
    faults = [
        f"{role} {fault}"
        for role, value in roles.items()
        if value is not None and (fault := _fault(role, np.asarray(value)))
    ]
    if faults:
        which = "the layer" if name is None else f"layer {name}"
        raise ValueError(f"{which}: {', '.join(faults)}; expected {_POSSIBLE}")


def _described(value: Any) -> str:
    """Return the type of a value, and what of a tensor NumPy may not read."""
    words = f"a {type(value).__name__}"
    for prefix, attribute in (("of", "dtype"), ("on", "device")):
        if (found := getattr(value, attribute, None)) is not None:
            words += f" {prefix} {found}"
    return words + " that requires grad" * (getattr(value, "requires_grad", 0) is True)


def _without_unit_axes(value: np.ndarray) -> np.ndarray:
    """Return Haiku's `[1, 1, C]` as `[C]`; one feature is `[1]`."""
    shape = [size for size in value.shape if size != 1]
    return value.reshape(shape or [1]) if value.ndim else value


def check_like(like: Like | None) -> None:
    """Refuse what is not the parameters and the state of a layer."""
    if like is None:
        return
    if not isinstance(like, tuple) or len(like) < 2:
        raise TypeError(
            f"like is of type {type(like).__name__}; expected (params, state), as "
            "bn_jax.init returns them"
        )
    check_fields(params=(like[0], AFFINE), state=(like[1], AVERAGES))


def check_momentum(library: str, momentum: float | None, *, reading: bool) -> None:
    """Refuse an unknown library; a momentum missing, without use, or not in [0, 1)."""
    if not isinstance(library, str) or library not in PLACES:
        raise ValueError(
            f"library={library!r} is not known; give one of {', '.join(PLACES)}"
        )
    needed = library == "equinox_batch" or (library == "haiku" and not reading)
    if needed and momentum is None:
        raise ValueError(
            f"momentum is None, but {library} keeps averages times 1 - "
            "momentum**num_batches; give its layers' weight of the old average"
        )
    if momentum is not None and not needed:
        raise ValueError(
            f"momentum={momentum!r} has no place in entries of {library}; leave it out "
            "here, and give it to batch_norm"
        )
    if momentum is not None and not (
        isinstance(momentum, numbers.Real) and 0 <= momentum < 1
    ):
        raise ValueError(
            f"momentum={momentum!r}; expected the weight of the old average, in [0, 1)"
        )
