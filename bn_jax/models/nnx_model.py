"""A Flax NNX module with the interface of a Linen model.

NNX modules hold their variables and change them in place; training here passes
variables through pure functions, as Linen does. `NnxModel` translates: each call merges
the variables into a fresh copy of the module, calls it, and returns what changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from flax.nnx import rnglib
from jax import Array

Path = tuple[str, ...]
Factory = Callable[..., nnx.Module]  # of nnx.Rngs


class NnxModel:
    """A Flax NNX module as a model: pure, and hashable by identity.

    Variables are nested dictionaries of arrays: `params` holds those of type
    `nnx.Param`, `batch_stats` all others but the state of random streams. The module is
    called as `module(images)`, or `module(images, train=...)` if its call takes that.

    Args:
      source: a function that makes the module of an `nnx.Rngs`, such as
        `lambda rngs: Net(10, rngs=rngs)` or a class whose `__init__` needs `rngs`
        alone; or a module itself, of which a copy is taken.

    Raises:
      TypeError: if `source` is neither, or makes something else.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from bn_jax.models.nnx_model import NnxModel
      >>> model = NnxModel(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)), train=False)
      >>> model.apply(variables, jnp.ones((5, 3)), train=False).shape
      (5, 2)
    """

    def __init__(self, source: Factory | nnx.Module) -> None:
        if isinstance(source, nnx.Module):
            made = nnx.clone(source)
            self._factory = None
        elif callable(source):
            made = nnx.eval_shape(lambda: _made(source, nnx.Rngs(0)))
            self._factory = source
        else:
            raise TypeError(
                f"got {source!r}; expected an nnx.Module, or a function that makes one "
                "of an nnx.Rngs, such as lambda rngs: Net(rngs=rngs)"
            )
        self.name = type(made).__name__
        call = inspect.signature(type(made).__call__).parameters
        self._takes_train = "train" in call
        self._graphdef, state = nnx.split(made)
        self._variables = {
            path: variable for path, variable in nnx.to_flat_state(state)
        }

    @property
    def is_made(self) -> bool:
        """Whether a module was given, which holds its initial variables."""
        return self._factory is None

    def __repr__(self) -> str:
        return f"NnxModel({self.name})"

    def init(self, key: Array, images: Any, *, train: bool = False) -> dict[str, Any]:
        """Return initial variables.

        Args:
          key: the module is made with `nnx.Rngs(key)`. A module that was given
            has the variables that it had then, whatever the key.
          images: not used; NNX modules know their shapes.
          train: not used.

        Returns:
          `{"params": ..., "batch_stats": ...}`.
        """
        del images, train
        if self._factory is None:
            values = {path: v.get_value() for path, v in self._variables.items()}
        else:
            state = nnx.state(_made(self._factory, nnx.Rngs(key)))
            values = {path: v.get_value() for path, v in nnx.to_flat_state(state)}
        values = {
            path: jax.tree.map(jnp.copy, values[path])
            for path, variable in self._variables.items()
            if not isinstance(variable, nnx.RngState)
        }
        return {
            "params": self._nested(values, of_params=True),
            "batch_stats": self._nested(values, of_params=False),
        }

    def apply(
        self,
        variables: Mapping[str, Any],
        images: Array,
        *,
        train: bool,
        mutable: bool | Sequence[str] = False,
        rngs: Mapping[str, Array] | None = None,
        dropout: bool = True,
    ) -> Any:
        """Call the module on a batch of images.

        Args:
          variables: as `init` returns them.
          images: `[N, H, W, C]`.
          train: whether the module is in training mode, `module.train()`, or in
            evaluation, `module.eval()`.
          mutable: `["batch_stats"]` to have the new statistics returned.
          rngs: `{"dropout": key}`. The key seeds every random stream of the module, as
            `nnx.reseed` does: stream k, in the order of `nnx.iter_graph`, gets
            `fold_in(key, k)`.
          dropout: False switches dropout off in training mode, too.

        Returns:
          What the module returns; with `mutable`, a pair of that and
          `{"batch_stats": ...}`.

        Raises:
          ValueError: if the module draws random numbers and `rngs` has no "dropout".
        """
        key = (rngs or {}).get("dropout")
        module = self._merged(variables)
        module.train() if train else module.eval()
        if not dropout:
            module.set_attributes(deterministic=True, raise_if_not_found=False)
        streams = [
            node
            for _, node in nnx.iter_graph(module)
            if isinstance(node, rnglib.RngStream)
        ]
        if key is not None:
            for k, stream in enumerate(streams):
                _seed(stream, jax.random.fold_in(key, k))
        before = [stream.count.get_value() for stream in streams]

        call: Callable[..., Any] = module
        outputs = call(images, train=train) if self._takes_train else call(images)

        counts = [stream.count.get_value() for stream in streams]
        if key is None and any(a is not b for a, b in zip(before, counts, strict=True)):
            raise ValueError(
                f"{self.name} draws random numbers in "
                f"{'training' if train else 'evaluation'} mode, as dropout does; give "
                'rngs={"dropout": key}'
                + ("" if dropout else ", or let its dropout follow deterministic=True")
            )
        if not mutable:
            return outputs
        values = {
            path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module))
        }
        return outputs, {"batch_stats": self._nested(values, of_params=False)}

    def axis_names(self) -> dict[str, Any]:
        """Return the `axis_name` of each layer with batch statistics, by its path."""
        module = nnx.merge(self._graphdef, nnx.from_flat_state(self._variables))
        return {
            "/".join(map(str, path)): getattr(node, "axis_name", None)
            for path, node in nnx.iter_graph(module)
            if isinstance(getattr(node, "mean", None), nnx.BatchStat)
        }

    def _merged(self, variables: Mapping[str, Any]) -> nnx.Module:
        """Return a new module with the given variables."""
        flat = {}
        for path, variable in self._variables.items():
            if isinstance(variable, nnx.RngState):
                value = variable.get_value()
                if isinstance(value, jax.ShapeDtypeStruct):  # of a factory
                    value = _placeholder(value)
            else:
                value = variables["params" if _is_param(variable) else "batch_stats"]
                for name in path:
                    value = value[str(name)]
            flat[path] = variable.replace(value)
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    def _nested(self, values: Mapping[Any, Any], *, of_params: bool) -> dict[str, Any]:
        """Return parameters or statistics as nested dictionaries with texts as keys."""
        return traverse_util.unflatten_dict(
            {
                tuple(map(str, path)): values[path]
                for path, variable in self._variables.items()
                if not isinstance(variable, nnx.RngState)
                and _is_param(variable) == of_params
            }
        )


def _made(factory: Factory, rngs: nnx.Rngs) -> nnx.Module:
    """Return the module that a factory makes."""
    called: Any = factory
    while isinstance(called, functools.partial):
        called = called.func
    # The signature of an NNX class is that of its metaclass.
    target: Any = called
    if isinstance(called, type):
        target = target.__init__
    by_keyword = "rngs" in inspect.signature(target).parameters
    try:
        module = factory(rngs=rngs) if by_keyword else factory(rngs)
    except (AttributeError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TypeError(
            f"{factory!r} makes no module of an nnx.Rngs ({reason}); expected a Linen "
            "module, an NNX module, or a function that makes one, such as "
            "lambda rngs: Net(rngs=rngs)"
        ) from error
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"{factory!r} returned a {type(module).__name__}; expected a function that "
            "makes an nnx.Module of an nnx.Rngs, such as lambda rngs: Net(rngs=rngs)"
        )
    return module


def _is_param(variable: Any) -> bool:
    return isinstance(variable, nnx.Param)


def _placeholder(shape: jax.ShapeDtypeStruct) -> Array:
    """Return the state of a random stream before it is seeded."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape.shape)
    return jnp.zeros(shape.shape, shape.dtype)


def _seed(stream: rnglib.RngStream, key: Array) -> None:
    """Let a stream start anew from a key, or from as many as it has keys."""
    shape = stream.key.get_value().shape
    stream.key.set_value(jax.random.split(key, shape) if shape else key)
    stream.count.set_value(jnp.zeros(shape, jnp.uint32))
