"""Functions of one model, mapped over many models and over devices.

On GPU and TPU the models are mapped by `vmap`. On CPU, where that makes one large and
slow convolution of many small ones, they take turns (`lax.map`), and the cores are used
by as many host devices. Over several devices models are shared out along the axis
`MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax.training import parallel

MODELS = "models"


def takes_turns(devices: Sequence[jax.Device]) -> bool:
    """Return whether models that share a device are faster one after another."""
    return devices[0].platform == "cpu"


class Mapped:
    """Functions of one model, mapped over stacked models and over devices."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = list(devices)
        mesh = jax.sharding.Mesh(np.array(self._devices), (MODELS,))
        self._shared = NamedSharding(mesh, PartitionSpec())
        self._apart = NamedSharding(mesh, PartitionSpec(MODELS))

    def compiled(
        self,
        function: Callable[..., Any],
        *,
        shared: Sequence[bool],
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Return a function of stacked models, compiled for the devices.

        Args:
          function: of one model.
          shared: for each argument, whether all models share it.
          donate: arguments that are used up.
        """
        in_turns = takes_turns(self._devices)
        axes = tuple(None if is_shared else 0 for is_shared in shared)

        def of_models(*arguments: Any) -> Any:
            if not in_turns:
                return jax.vmap(function, axes)(*arguments)
            own = [a for a, s in zip(arguments, shared, strict=True) if not s]

            def of_model(own: Sequence[Any]) -> Any:
                rest = iter(own)
                return function(
                    *(
                        a if s else next(rest)
                        for a, s in zip(arguments, shared, strict=True)
                    )
                )

            return lax.map(of_model, own)

        if len(self._devices) == 1:
            return jax.jit(of_models, donate_argnums=donate)
        mapped: Callable[..., Any] = jax.pmap(
            of_models,
            axis_name=MODELS,
            in_axes=axes,
            donate_argnums=donate,
            devices=self._devices,
        )
        return mapped

    def put(self, tree: Any) -> Any:
        """Return stacked models on the devices, each array `[D, models / D, ...]`."""

        def put(stacked: np.ndarray) -> jax.Array:
            if len(self._devices) > 1:
                stacked = stacked.reshape(len(self._devices), -1, *stacked.shape[1:])
            return parallel.put(stacked, self._apart)

        return jax.tree.map(put, tree)

    def put_shared(self, tree: Any) -> Any:
        """Put on each device the arrays that models share."""
        return jax.tree.map(lambda array: parallel.put(array, self._shared), tree)

    def get(self, tree: Any) -> Any:
        """Return stacked models on the host."""

        def get(array: jax.Array) -> np.ndarray:
            stacked = np.asarray(array)
            if len(self._devices) > 1:
                stacked = stacked.reshape(-1, *stacked.shape[2:])
            return stacked

        return jax.tree.map(get, tree)
