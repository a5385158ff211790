"""Models that a user passes in: how a config names them, what is checked of them."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.training import parallel
from bn_jax.training.config import OWN_MODEL, OWN_VARIABLES, TrainConfig
from bn_jax.training.state import Network
from bn_jax.variables import check_variables, collection


def named(config: TrainConfig, model: Any) -> TrainConfig:
    """Return the config of a run of the user's own model: it names the class.

    Raises:
      ConfigError: if it sets what only our models take, or names another class; or if
        the model is none.
    """
    try:
        name = OWN_MODEL + models.name_of(models.as_model(model))
    except TypeError as error:
        raise ConfigError(f"model: {error}") from None
    default = TrainConfig()
    of_ours = [
        f"{field}={getattr(config, field)!r}"
        for field in ("model", "norm", "norm_statistics")
        if getattr(config, field) not in (getattr(default, field), name)
    ]
    if config.precision == "bfloat16":
        of_ours.append("precision='bfloat16'")
    if config.model.startswith(OWN_MODEL) and config.model != name:
        raise ConfigError(
            f"the run is of a model of the class {config.model.removeprefix(OWN_MODEL)}"
            f", and model is of {name.removeprefix(OWN_MODEL)}; pass one of that class"
        )
    if config.inputs == "norm":
        of_ours.append("inputs='norm'")
    if of_ours:
        raise ConfigError(
            f"{', '.join(of_ours)} together with a model that was passed in, which "
            "such a choice does not reach; build it into the model, and leave it out "
            "of the config"
        )
    return dataclasses.replace(config, model=name)


def starting_from(
    config: TrainConfig, model: Any, variables: Any
) -> tuple[TrainConfig, Any]:
    """Return the config of a run that starts from the user's variables, and these.

    The config has their checksum as `init_from`, so that a run that starts from other
    variables is another run.

    Args:
      config: of the run.
      model: the user's own, or None. An NNX module, as opposed to its
        class, holds the variables that it starts from.
      variables: that the run starts from: of Linen, a TrainState or of NNX; or None.

    Returns:
      The config, and variables as nested dictionaries of arrays; None where the run
      starts from none of the user's.

    Raises:
      ConfigError: if they are not variables, hold other collections than parameters and
        statistics, are missing in a run that started from some, or `config.init_from`
        names another run.
    """
    is_named = config.init_from.startswith(OWN_VARIABLES)
    if variables is None:
        made: Any = None if model is None else models.as_model(model)
        if getattr(made, "is_made", False) and (is_named or not config.init_from):
            variables = made.init(jax.random.key(0), None)
        elif is_named:
            raise ConfigError(
                f"init_from={config.init_from!r}: the run started from variables that "
                "were passed in; pass them again as variables=..."
            )
        else:
            return config, None
    elif config.init_from and not is_named:
        raise ConfigError(
            f"init_from={config.init_from!r} together with variables that are passed "
            "in; give one of them"
        )
    flat = _flat(variables)
    found = _checksum(flat)
    init_from = f"{OWN_VARIABLES}{found}"
    if config.init_from not in ("", init_from):
        raise ConfigError(
            f"init_from={config.init_from!r} in the config, and variables with the "
            f"checksum {found}; pass those that the config is of, or leave "
            "init_from out of it"
        )
    start = {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(flat)}
    return dataclasses.replace(config, init_from=init_from), start


def checksum(variables: Any) -> str:
    """Return a checksum of variables, their names, shapes and dtypes."""
    return _checksum(_flat(variables))


def _checksum(flat: Mapping[tuple[str, ...], np.ndarray]) -> str:
    crc32 = 0
    for name, value in sorted(flat.items()):
        header = f"{'/'.join(name)} {value.dtype} {value.shape}"
        crc32 = zlib.crc32(value.tobytes(), zlib.crc32(header.encode(), crc32))
    return f"crc32={crc32:08x}"


def _flat(variables: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Return the parameters and statistics in variables by collection and path."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(variables, nnx.Module):
        variables = nnx.state(variables)
    try:
        check_variables(variables)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    kinds = ("params", "batch_stats")
    is_nnx = nnx is not None and isinstance(variables, nnx.State)
    others = []
    if isinstance(variables, Mapping) and not is_nnx:
        others = sorted(variables.keys() - kinds)
    if others:
        raise ConfigError(
            f"variables hold {', '.join(others)}; expected params and batch_stats "
            "alone, which are all that training keeps"
        )
    return {
        (kind, *path): np.asarray(value)
        for kind in kinds
        for path, value in collection(variables, kind).items()
    }


def check_sharing(
    config: TrainConfig, placement: parallel.Placement, network: Network
) -> None:
    """Refuse norms that would share their statistics in another way than configured.

    Our own models are built for `batch_stats`; in a user's the norms' `axis_name` has
    to agree with it.

    Raises:
      ConfigError: naming the layers and what they need.
    """
    if len(placement.devices) == 1:  # where `Network.apply` binds their axes
        return
    names = models.axis_names(network.model, network.image_shape)
    if not placement.uses_axis:  # one program, whose statistics are global
        if placement.group_size < len(placement.devices):
            raise ConfigError(
                f"batch_stats={config.batch_stats!r} and parallel='jit' with a model "
                "that was passed in: one program has statistics of the whole batch; "
                "give parallel='pmap'"
            )
        named = {path: name for path, name in names.items() if name is not None}
        if named:
            raise ConfigError(
                f"parallel='jit' with norms with axis_name="
                f"{next(iter(named.values()))!r}, {', '.join(sorted(named))} of the "
                "model; one program has statistics of the whole batch, and no axis to "
                "name: build the model without axis_name, or give parallel='pmap'"
            )
        return
    if 1 < placement.group_size < len(placement.devices):
        raise ConfigError(
            f"batch_stats={config.batch_stats!r} with a model that was passed in; give "
            "synced or per_device"
        )
    wanted = parallel.DATA if placement.group_size > 1 else None
    wrong = sorted(name for name, axis_name in names.items() if axis_name != wanted)
    if wrong and wanted is None:
        raise ConfigError(
            f"batch_stats={config.batch_stats!r} with norms that name an axis, "
            f"{', '.join(wrong)} of the model; build the model without axis_name, or "
            "give batch_stats='synced' (statistics of the whole batch)"
        )
    if wrong:
        raise ConfigError(
            f"batch_stats={config.batch_stats!r} on {len(placement.devices)} devices "
            f"needs norms with axis_name={wanted!r}, which {', '.join(wrong)} of the "
            "model lack; build the model so, or give parallel='jit' (statistics of the "
            "whole batch) or batch_stats='per_device' (those of each device)"
        )
