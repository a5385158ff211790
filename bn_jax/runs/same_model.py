"""Whether a user's own model is the one that was trained in a run on disk.

A run knows it by its class and by the shapes of its variables. Beside these stand the
checksums of its programs, which differ where an attribute does, such as an activation
or a norm's momentum. They are in environment.json, and not in the config, since other
versions of JAX, Flax or this program may trace the same model otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bn_jax.runs import json_files, provenance
from bn_jax.runs.json_files import RunError
from bn_jax.training import fingerprints
from bn_jax.training.config import OWN_MODEL, TrainConfig
from bn_jax.training.state import Network

PROGRAMS = "programs"  # in environment.json
# Programs are compared where all of these, in environment.json, are the same.
_TRACED_BY = ("bn_jax", "commit", "jax", "flax", "backend")


def recorded(config: TrainConfig, network: Network) -> dict[str, Any]:
    """Return the entry for environment.json of a model of the user's own; else none.

    Args:
      config: of the run.
      network: whose model it trains.
    """
    if not config.model.startswith(OWN_MODEL):
        return {}
    initial = not config.init_from
    return {
        PROGRAMS: fingerprints.checksums(network, config.batch_size, initial=initial)
    }


def check(workdir: Path, config: TrainConfig, network: Network) -> None:
    """Refuse a user's own model that computes something else than that of a run.

    Nothing is refused where the run was recorded by other versions or settings of JAX,
    or before programs were.

    Args:
      workdir: of the run, or of a sweep; one without files is free.
      config: of the run.
      network: of the model that is given now.

    Raises:
      RunError: saying in what it differs.
    """
    path = workdir / json_files.ENVIRONMENT
    if not config.model.startswith(OWN_MODEL) or not path.exists():
        return
    there = json_files.read_object(path)
    of_run = there.get(PROGRAMS)
    here = provenance.environment()
    if of_run is None or any(there.get(name) != here[name] for name in _TRACED_BY):
        return
    # What an NNX module that is made already holds is not what its class would draw.
    is_made = getattr(network.model, "is_made", False)
    initial = "initialisation" in of_run and not is_made
    now = fingerprints.checksums(network, config.batch_size, initial=initial)
    if of_run["settings"] != now["settings"]:
        return
    modes = now.keys() - {"axes", "settings"}
    differing = [mode for mode in modes if of_run.get(mode) != now[mode]]
    if of_run["axes"] != now["axes"]:  # which training computes with
        differing = [mode for mode in differing if mode != "training"]
    if differing:
        name = config.model.removeprefix(OWN_MODEL)
        raise RunError(
            f"{workdir} holds a run of another {name}: in "
            f"{' and '.join(sorted(differing))} the model that was passed in computes "
            "something else. Give it the attributes that it had (activations, "
            "momentum and epsilon of norms, rates of dropout, initializers), or give "
            "another workdir"
        )
