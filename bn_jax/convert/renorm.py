r"""The BatchRenorm of reinforcement learning in JAX, to and from ours.

SBX, CrossQ and PureJaxQL have one layer from each other, under different defaults. It
predicts as ours, its averages move as ours, and for its first steps it trains as batch
norm, as ours with `start`. After those it departs from Ioffe (2017): it normalises by

$$\frac{x - \mu_B + d\, s_B / r}{\sqrt{s_B^2 / r^2 + \epsilon}}
  \quad\text{in place of}\quad
  r \frac{x - \mu_B}{\sqrt{s_B^2 + \epsilon}} + d,$$

with the batch's deviation $s_B$ free of epsilon. Where it is not large beside the root
of epsilon, their outputs are far from those of prediction; where it is 0, their
gradients are not numbers, and that in the first steps, too. Ours has neither fault, so
that training goes on by other numbers there: `experiments/conformance.py` has both.
"""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

import numpy as np

from bn_jax import checks
from bn_jax.convert.entries import (
    PLACES,
    read_layer,
    write_layer,
)
from bn_jax.convert.layer import BatchNormLayer, Entries, Like, RenormLibrary
from bn_jax.convert.leaves import (
    as_array,
    entry_key,
    flatten,
)
from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE

# Steps as batch norm: of SBX the default of warmup_steps, of the others fixed in the
# sources that `DEFAULTS` names.
_STARTS: dict[RenormLibrary, int] = {
    "sbx": 100_000,
    "crossq": 100_000,
    "purejaxql": 1_000,
}


class RenormOptions(NamedTuple):
    """What `bn_jax.transforms.renorm` has as options, and other libraries as entries.

    The limits jump from 1 and 0 at `start`: r_end and d_end stay None.
    """

    start: int = 100_000  # steps as batch norm
    r_max: float = 3.0  # largest correction of the deviation, at least 1
    d_max: float = 5.0  # largest correction of the mean, in deviations


def from_batch_renorm(
    library: RenormLibrary, entries: Entries, *, like: Like | None = None
) -> tuple[BatchNormLayer, RenormOptions]:
    """Return the layer for a BatchRenorm, and the options with which it goes on.

    Write the layer by `to_flax(layer, count=True)` for
    `bn_jax.linen.norm("renorm", options=...)`, whose options are the ones returned and
    those of `DEFAULTS[library]`, unless the model gives its layers others: its
    momentum, as CrossQ does, or its warmup_steps.

    The entries r_max and d_max, which are constants in these libraries, become options;
    steps is the layer's `num_batches`, by which it is known whether `start` is reached.
    Read a whole model by `layers_from`.

    Args:
      library: sbx, crossq or purejaxql, which names the start.
      entries: `{"params": {scale, bias}, "batch_stats": {mean, var, r_max, d_max,
        steps}}`, the last three scalars, all others of shape `[C]`. In an ensemble of
        critics, all have an axis of its members in front.
      like: see `from_torch`.

    Raises:
      TypeError: as `from_torch` says.
      ValueError: as `from_torch` says, or if r_max is below 1 or d_max below 0, or
        members differ in a scalar; all are named. If the library is unknown.

    References:
      Ioffe, 2017, arXiv:1702.03275; Bhatt et al., 2024, arXiv:1902.05605 (CrossQ).

    Examples:
      >>> layer, options = from_batch_renorm("crossq", {
      ...     "params": {"scale": [2.0], "bias": [0.0]},
      ...     "batch_stats": {
      ...         "mean": [1.0], "var": [4.0], "r_max": 3, "d_max": 5, "steps": 7}})
      >>> layer.num_batches, options
      (7, RenormOptions(start=100000, r_max=3.0, d_max=5.0))
    """
    _check_library(library)
    layer = read_layer(library, entries, like)
    flat = dict(flatten(entries))

    def limit(role: str) -> float:
        value = as_array(flat[entry_key(PLACES[library][role], "")])
        assert value is not None  # as read_layer has found
        return float(value.flat[0])

    return layer, RenormOptions(_STARTS[library], limit("r_max"), limit("d_max"))


def to_batch_renorm(
    library: RenormLibrary,
    layer: BatchNormLayer,
    options: RenormOptions | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the variables of a BatchRenorm, as `from_batch_renorm` takes them.

    Write into a whole model, or an ensemble, by `layers_into`.

    Args:
      library: sbx, crossq or purejaxql.
      layer: to be written; needs `num_batches`, which becomes steps.
      options: of ours; by default the library's own. The limits become r_max and d_max,
        in int32 where they are whole and else in float32. Give the start to SBX as
        warmup_steps; the others have it fixed in their code.

    Raises:
      TypeError: if `options` are no RenormOptions, or as `to_torch` says.
      ValueError: if the library is unknown, `num_batches` is None, start or a limit is
        out of range, or the start is not the one that CrossQ or PureJaxQL has; or as
        `to_torch` says.

    Examples:
      >>> from bn_jax import init
      >>> layer = BatchNormLayer(*init(1), num_batches=7)
      >>> batch_stats = to_batch_renorm("crossq", layer)["batch_stats"]
      >>> {name: value.item() for name, value in batch_stats.items()}
      {'mean': 0.0, 'var': 1.0, 'steps': 7, 'r_max': 3, 'd_max': 5}
    """
    _check_library(library)
    options = RenormOptions(_STARTS[library]) if options is None else options
    checks.check_fields(options=(options, RenormOptions._fields))
    checks.check_known("start", options.start, NOT_NEGATIVE)
    checks.check_known("r_max", options.r_max, AT_LEAST_1)
    checks.check_known("d_max", options.d_max, NOT_NEGATIVE)
    if library != "sbx" and options.start != _STARTS[library]:
        raise ValueError(
            f"start={options.start}, but the code of {library} fixes it at "
            f"{_STARTS[library]}; give that, or write for sbx, whose warmup_steps may "
            "be any"
        )
    variables: dict[str, Any] = write_layer(library, layer)
    for name in ("r_max", "d_max"):
        variables["batch_stats"][name] = _as_written(getattr(options, name))
    return variables


def _as_written(limit: float) -> np.ndarray:
    """Return a limit as these libraries hold it: an integer where it is one."""
    return np.array(limit, np.int32 if float(limit).is_integer() else np.float32)


def _check_library(library: str) -> None:
    known = typing.get_args(RenormLibrary)
    if not isinstance(library, str) or library not in known:
        raise ValueError(
            f"library={library!r} has no BatchRenorm; give one of {', '.join(known)}"
        )
