"""Functions of one model, mapped over many models and over devices.

On GPU and TPU the models are mapped by `vmap`. On CPU, where that makes one large and
slow convolution of many small ones, they take turns (`lax.map`), and the cores are used
by as many host devices. Over several devices models are shared out along the axis
`parallel.MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from bn_jax.training import parallel


def takes_turns(devices: Sequence[jax.Device]) -> bool:
    """Return whether models that share a device are faster one after another."""
    return devices[0].platform == "cpu"


class Mapped:
    """Functions of one model, mapped over stacked models and over devices."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = devices
        self._members = parallel.Members(devices)

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

        def of_models(*arguments: Any) -> Any:
            if not in_turns:
                axes = [None if is_shared else 0 for is_shared in shared]
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

        return self._members.compiled(of_models, shared=shared, donate=donate)

    def put(self, tree: Any) -> Any:
        """Return stacked models on the devices."""
        return jax.tree.map(self._members.put, tree)

    def put_shared(self, tree: Any) -> Any:
        """Put on each device the arrays that models share."""
        return jax.tree.map(self._members.put_shared, tree)

    def get(self, tree: Any) -> Any:
        """Return stacked models on the host."""
        return jax.tree.map(self._members.get, tree)
