"""What may be given as a model and its variables."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from flax import linen as nn

from bn_jax.measures.layer_calls import Predict
from bn_jax.variables import check_variables

# What a model's call takes to be in prediction mode.
_PREDICTS = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def resolve(model: Any, variables: Any) -> tuple[Predict, Any]:
    """Return a predict function of a model, hashable, and the variables that it takes.

    Args:
      model: a function of variables and inputs that applies a model in prediction mode,
        compiled by `jax.jit` or not; a Linen module, whose call takes inputs and
        perhaps train, training, is_training, deterministic or use_running_average; or
        an NNX module, of which a copy in evaluation mode is called.
      variables: of the model: a dict or FrozenDict of Linen's collections, a TrainState
        with `params` and `batch_stats`, or an NNX state. Of a function of an NNX module
        and inputs, the module. None for an NNX module with the variables that it has.

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
    return model, variables


def check_array(name: str, value: Any) -> None:
    """Refuse what is no array of examples.

    Raises:
      ValueError: naming what it is.
    """
    if not getattr(value, "shape", ()):
        raise ValueError(
            f"{name} are a {type(value).__name__}; expected an array of examples, "
            "[N, ...]"
        )


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
        known = inspect.signature(type(self.module).__call__).parameters
        mode: Any = {name: value for name, value in _PREDICTS.items() if name in known}
        return self.module.apply(variables, inputs, **mode)


@dataclasses.dataclass(frozen=True)
class _NnxPredict:
    """Predictions of an NNX module, or of a function of one and inputs."""

    graph: Any
    function: Any = None

    def __call__(self, state: Any, inputs: Any) -> Any:
        from flax import nnx  # those who come here have imported it

        model = nnx.merge(self.graph, state)
        model.eval()
        if self.function is None:
            return model(inputs)
        return self.function(model, inputs)
