"""Models that a user passes in: how a config names them, what is checked of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.training import parallel
from bn_jax.training.config import OWN_MODEL, TrainConfig
from bn_jax.training.state import Network


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
                "give --parallel=pmap"
            )
        named = {path: name for path, name in names.items() if name is not None}
        if named:
            raise ConfigError(
                f"parallel='jit' with norms with axis_name="
                f"{next(iter(named.values()))!r}, {', '.join(sorted(named))} of the "
                "model; one program has statistics of the whole batch, and no axis to "
                "name: build the model without axis_name, or give --parallel=pmap"
            )
        return
    if 1 < placement.group_size < len(placement.devices):
        raise ConfigError(
            f"batch_stats={config.batch_stats!r} with a model that was passed in; give "
            "synced or per_device"
        )
    wanted = parallel.DATA if placement.group_size > 1 else None
    wrong = sorted(name for name, axis_name in names.items() if axis_name != wanted)
    if wrong:
        raise ConfigError(
            f"batch_stats={config.batch_stats!r} on {len(placement.devices)} devices "
            f"needs norms with axis_name={wanted!r}, which {', '.join(wrong)} of the "
            "model lack; build the model so, or give --parallel=jit (statistics of the "
            "whole batch) or --batch_stats=per_device (those of each device)"
        )
