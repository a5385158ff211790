"""What may be given as a model and its variables."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax import tracing
from bn_jax.measures.layer_calls import Predict
from bn_jax.variables import check_variables, collection

_Key = tuple[str, tuple[str, ...]]  # of a variable: its collection and path

# What a model's call takes to be in prediction mode.
_PREDICTS = {
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "inference": True,
    "deterministic": True,
    "use_running_average": True,
}


def resolve(model: Any, variables: Any) -> tuple[Predict, Any]:
    """Return a predict function of a model, hashable, and the variables that it takes.

    Args:
      model: a function of variables and inputs that applies a model in prediction mode,
        compiled by `jax.jit` or not; a Linen module or its `apply`, whose call takes
        inputs and perhaps train, training, is_training, deterministic or
        use_running_average; or an NNX module, of which a copy in evaluation mode is
        called, with these, too.
      variables: of the model: a dict or FrozenDict of Linen's collections, a TrainState
        with `params` and `batch_stats`, or an NNX state. Of a function of an NNX module
        and inputs, the module. Of an NNX module, None for the variables that it has, or
        such a dict with its names, as a training run returns it: those in it take the
        place of the module's own.

    Raises:
      ValueError: if they are something else.
    """
    predict, variables = _resolve(model, variables)
    try:
        hash(predict)
    except TypeError:  # such as a module with an array among its attributes
        return _ByIdentity(predict), variables
    return predict, variables


def _resolve(model: Any, variables: Any) -> tuple[Predict, Any]:
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):
        if variables is None:
            variables = model
        graph, state = nnx.split(model)
        if isinstance(variables, nnx.Module):
            state = nnx.state(variables)
        elif isinstance(variables, Mapping) and not isinstance(variables, nnx.State):
            state = _with_values(state, variables, type(model).__name__)
        elif variables is not model:
            state = variables
        check_variables(state)
        return _NnxPredict(graph), state
    if isinstance(model, type):
        raise ValueError(
            f"the model is the class {model.__name__}; give a module made of it, or a "
            "function of variables and inputs"
        )
    if nnx is not None and isinstance(variables, nnx.Module):
        graph, state = nnx.split(variables)
        return _NnxPredict(graph, model), state
    check_variables(variables)
    own = getattr(model, "__self__", None)
    if isinstance(own, nn.Module) and getattr(model, "__name__", "") == "apply":
        model = own  # as `TrainState.apply_fn` is
    if isinstance(model, nn.Module):
        if not hasattr(variables, "keys"):
            variables = {
                "params": variables.params,
                "batch_stats": variables.batch_stats,
            }
        return _LinenPredict(model), variables
    if not callable(model):
        raise ValueError(
            f"the model is a {type(model).__name__}; expected a function of variables "
            "and inputs that applies it in prediction mode, a Linen or an NNX module"
        )
    if _is_train_state(variables):
        return _OfState(model), variables
    return model, variables


def check_array(name: str, value: Any) -> None:
    """Refuse what is not an array of examples.

    Raises:
      ValueError: naming what it is.
    """
    if not getattr(value, "shape", ()):
        raise ValueError(
            f"{name} are a {type(value).__name__}; expected an array of examples, "
            "[N, ...]"
        )


def modules_of(predict: Predict, variables: Any, inputs: Any) -> dict[str, Any]:
    """Return the modules in a model by path, without computing anything.

    Args:
      predict: as `resolve` returns it.
      variables: likewise. Those of a Linen module are not read.
      inputs: a batch.

    Returns:
      The modules of NNX; or those of Linen that are called. Of a function that fails,
      those that it calls before.
    """
    if isinstance(predict, _NnxPredict):
        from flax import nnx

        nodes = nnx.iter_graph(nnx.merge(predict.graph, variables))
        return {
            "/".join(map(str, path)): node
            for path, node in nodes
            if isinstance(node, nnx.Module)
        }
    found: dict[str, Any] = {}

    def note(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        found["/".join(context.module.path)] = context.module
        return next_fun(*args, **kwargs)

    def call(variables: Any, inputs: Any) -> Any:
        with nn.intercept_methods(note):
            if isinstance(predict, _LinenPredict):
                module, key = predict.module, jax.random.key(0)
                return module.init(key, inputs, **_mode(module))
            return predict(variables, inputs)

    with contextlib.suppress(Exception):  # whatever a model of the user's raises
        tracing.trace_shapes(call, variables, inputs)
    return found


def _with_values(state: Any, variables: Mapping[str, Any], name: str) -> Any:
    """Return the state of an NNX module with the values of a dict, by name.

    Args:
      state: of the module.
      variables: "params", and "batch_stats" for all others, as a training run returns
        them; an index in a list may be an integer or a text.
      name: of the module's class.

    Raises:
      ValueError: if names are missing or unknown, or shapes differ.
    """
    nnx = sys.modules["flax.nnx"]
    check_variables(variables)
    given: dict[_Key, Any] = {
        (kind, path): value
        for kind in ("params", "batch_stats")
        for path, value in collection(variables, kind).items()
    }
    flat, faults = dict(nnx.to_flat_state(state)), []
    for path, variable in flat.items():
        if isinstance(variable, nnx.RngState):
            continue
        kind = "params" if isinstance(variable, nnx.Param) else "batch_stats"
        key = (kind, tuple(map(str, path)))
        if key not in given:
            faults.append(f"no {_named(key)}")
            continue
        value, own = jnp.asarray(given.pop(key)), variable.get_value()
        if value.shape != own.shape:
            faults.append(
                f"{_named(key)} of shape {list(value.shape)}, not {list(own.shape)}"
            )
        flat[path] = variable.replace(value)
    faults += [f"unknown {_named(key)}" for key in given]
    if faults:
        raise ValueError(
            f"variables do not fit the NNX module {name}: "
            f"{'; '.join(faults[:5])}{' and others' * (len(faults) > 5)}. Expected "
            "those of a run of this module; or None, for the values that the module "
            "holds: nnx.update(module, nnx.restore_int_paths(part)) puts each part of "
            "a run's variables into it"
        )
    return nnx.from_flat_state(flat)


def _named(key: _Key) -> str:
    kind, path = key
    return "/".join((kind, *path))


def _is_train_state(variables: Any) -> bool:
    """Return whether variables are an object with params, as Flax's TrainState is."""
    return not isinstance(variables, Mapping) and hasattr(variables, "params")


def _mode(module: Any) -> Any:
    """Return the arguments by which a module's call is in prediction mode."""
    known = inspect.signature(type(module).__call__).parameters
    return {name: value for name, value in _PREDICTS.items() if name in known}


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A predict function that is equal to nothing but itself."""

    function: Predict

    def __call__(self, variables: Any, inputs: Any) -> Any:
        return self.function(variables, inputs)


@dataclasses.dataclass(frozen=True)
class _LinenPredict:
    """Predictions of a Linen module."""

    module: nn.Module

    def __call__(self, variables: Any, inputs: Any) -> Any:
        return self.module.apply(variables, inputs, **_mode(self.module))


@dataclasses.dataclass(frozen=True)
class _OfState:
    """A function that is given a TrainState as it is."""

    function: Predict

    def __call__(self, variables: Any, inputs: Any) -> Any:
        try:
            return self.function(variables, inputs)
        except (AttributeError, KeyError, TypeError, flax.errors.FlaxError) as error:
            raise ValueError(
                f"the model, a function, does not take a {type(variables).__name__} as "
                f"its variables ({type(error).__name__}: {error}); give "
                '{"params": state.params, "batch_stats": state.batch_stats}, or the '
                "module in place of the function"
            ) from error


@dataclasses.dataclass(frozen=True)
class _NnxPredict:
    """Predictions of an NNX module, or of a function of one and inputs."""

    graph: Any
    function: Any = None

    def __call__(self, state: Any, inputs: Any) -> Any:
        from flax import nnx  # those who come here have imported it

        # A copy, as a module that calls nnx.jit inside changes its variables.
        model: Any = nnx.merge(self.graph, state, copy=True)
        model.eval()
        if self.function is None:
            return model(inputs, **_mode(model))
        return self.function(model, inputs)
