"""What training asks of a model, ours or a user's.

A model has Linen's `init(key, images, train=...)` and `apply(variables, images,
train=..., mutable=..., rngs=...)` with the collections `params` and `batch_stats`, and
returns logits `[N, classes]`. Linen modules do that by themselves; NNX modules are
wrapped.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.extend.core import jaxprs_in_params

from bn_jax import tracing
from bn_jax.contract import DivisorError
from bn_jax.fields import ConfigError, counted
from bn_jax.linen import Norm


def as_model(source: Any) -> Any:
    """Return a model of a Linen module, an NNX module, or a function that makes one.

    Args:
      source: a Linen module, called as `model(images, train=...)`; an NNX module; a
        function that makes an NNX module of an `nnx.Rngs`; or what `as_model` returned.

    Returns:
      The Linen module itself, or a `bn_jax.models.nnx_model.NnxModel`.

    Raises:
      TypeError: if `source` is something else, such as the class of a Linen module, or
        is a Linen module whose call takes no `train`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = as_model(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)), train=False)
      >>> model.apply(variables, jnp.ones((5, 3)), train=False).shape
      (5, 2)
    """
    if isinstance(source, nn.Module):
        parameters = inspect.signature(type(source).__call__).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_any and "train" not in parameters:
            raise TypeError(
                f"the call of {type(source).__name__} takes no `train`; expected a "
                "module that is called as model(images, train=True) in training and "
                "model(images, train=False) in prediction"
            )
        return source
    if isinstance(source, type) and issubclass(source, nn.Module):
        raise TypeError(
            f"got the class {source.__name__}; give an instance of it, "
            f"{source.__name__}(...)"
        )
    # Imported here, since it takes .4 s that a Linen model need not wait for.
    from bn_jax.models.nnx_model import NnxModel

    if isinstance(source, NnxModel):
        return source
    if not callable(source):
        raise TypeError(
            f"got {source!r}; expected a Linen module, an NNX module, or a function "
            "that makes an NNX module of an nnx.Rngs"
        )
    return NnxModel(source)


def name_of(model: Any) -> str:
    """Return the name of a model's class.

    Args:
      model: as `as_model` returns it.

    Examples:
      >>> from bn_jax.models.mlp import MLP
      >>> name_of(MLP())
      'MLP'
    """
    name: str = type(model).__name__ if isinstance(model, nn.Module) else model.name
    return name


def axis_names(model: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the `axis_name` of each layer with batch statistics, by its path.

    Args:
      model: as `as_model` returns it.
      image_shape: `[H, W, C]`, which fits the model.

    Examples:
      >>> from bn_jax.linen import BatchNorm
      >>> from bn_jax.models.mlp import MLP
      >>> axis_names(MLP(widths=[3], norm=BatchNorm), (2, 2, 1))
      {'norm1': None}
    """
    if not isinstance(model, nn.Module):
        of_nnx: dict[str, Any] = model.axis_names()
        return of_nnx
    found: dict[str, Any] = {}

    def note(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        module: Any = context.module
        if context.method_name == "__call__" and module.has_variable(
            "batch_stats", "mean"
        ):
            found["/".join(module.path)] = getattr(module, "axis_name", None)
        return y

    def trace(key: jax.Array) -> Any:
        with nn.intercept_methods(note):
            return model.init(key, jnp.zeros((1, *image_shape)), train=False)

    tracing.trace(trace, jax.random.key(0))
    return found


def check_fits(
    model: Any,
    image_shape: tuple[int, ...],
    *,
    num_classes: int | None = None,
    num_images: int = 2,
    max_bytes: float = math.inf,
) -> None:
    """Refuse a model that does not fit the images, without computing anything.

    Args:
      model: as `as_model` returns it.
      image_shape: `[H, W, C]`.
      num_classes: number of logits that it should return; None for any.
      num_images: of a batch.
      max_bytes: of the largest array that the model computes of a batch.

    Raises:
      ConfigError: in one line, naming the model, the shape, and what to do: if Flax or
        JAX refuses such images, an option of a norm does not divide its features,
        a variable has no elements, there are collections besides `params` and
        `batch_stats`, the result is not of shape `[num_images, num_classes]`, or an
        array is larger than `max_bytes`.

    Examples:
      >>> from bn_jax.models.mlp import MLP
      >>> check_fits(MLP(), (28, 28, 1), num_classes=10)
      >>> check_fits(MLP(), (28, 28, 1), num_classes=100)
      Traceback (most recent call last):
          ...
      bn_jax.fields.ConfigError: MLP returns (2, 10) ... logits of shape (2, 100)
    """

    def trace(images: Array) -> tuple[Any, Any]:
        variables = model.init(jax.random.key(0), images, train=False)
        return variables, model.apply(variables, images, train=False)

    name, size = name_of(model), " x ".join(map(str, image_shape))
    images = jax.ShapeDtypeStruct((num_images, *image_shape), jnp.result_type(float))
    try:
        traced, (variables, logits) = jax.make_jaxpr(trace, return_shape=True)(images)
    except DivisorError as error:
        raise _of_all_layers(error, model, images) from error
    except ConfigError:
        raise
    except ZeroDivisionError as error:  # of an initializer: of a kernel of 0 inputs
        raise ConfigError(
            f"{name} does not fit images of {size}: nothing is left of them before "
            "some layer; give larger images or another model"
        ) from error
    except (AssertionError, TypeError, ValueError, flax.errors.FlaxError) as error:
        # Of Flax's and JAX's long messages the first line says what is wrong.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # A norm that is told neither way, or trains in prediction, too.
        if "use_running_average" in reason or "batch_stats" in reason:
            raise ConfigError(
                f"{name} cannot be called: {reason.rstrip('.')}; give its norms "
                "use_running_average=not train"
            ) from error
        raise ConfigError(
            f"{name} does not fit images of {size}: {reason}; give larger images or "
            "another model"
        ) from error
    shapes = jax.tree.map(jnp.shape, variables)
    empty = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if not leaf.size
    ]
    if empty:
        raise ConfigError(
            f"{name} does not fit images of {size}: {empty[0]} has no elements; give "
            "larger images or another model"
        )
    others = sorted(shapes.keys() - {"params", "batch_stats"})
    if others:
        raise ConfigError(
            f"{name} has the variables {', '.join(others)}; expected none besides "
            "params and batch_stats, which are all that training keeps"
        )
    expected = (num_images, num_classes or "classes")
    if (
        len(getattr(logits, "shape", ())) != 2
        or logits.shape[0] != num_images
        or (num_classes is not None and logits.shape[1] != num_classes)
    ):
        given = jax.tree.map(jnp.shape, logits)
        raise ConfigError(
            f"{name} returns {given} for {counted(num_images, 'image')} of {size}; "
            f"expected logits of shape ({expected[0]}, {expected[1]})"
        )
    largest = max(map(_bytes, _computed(traced.jaxpr)), default=0)
    if largest > max_bytes:
        raise ConfigError(
            f"{name} needs an array of {largest / 1e9:,.0f} GB for "
            f"{counted(num_images, 'image')} of {size}; expected at most "
            f"{max_bytes / 1e9:,.0f} GB, twice the memory: give a smaller model or "
            "batch, or less padding"
        )


def _of_all_layers(error: DivisorError, model: Any, images: Any) -> ConfigError:
    """Return the error of a layer with its name, and the values that all layers take.

    Only a Linen model's layers can be seen; of another the error is returned as it is.
    """
    features: dict[str, dict[str, int]] = {}  # by kind of norm and layer
    refused: list[Norm] = []

    def note(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if not isinstance(layer, Norm):
            return next_fun(*args, **kwargs)
        of_kind = features.setdefault(layer.transform.name, {})
        try:
            y = next_fun(*args, **kwargs)
            if isinstance(layer.axis, int):
                of_kind["/".join(layer.path)] = y.shape[layer.axis]
        except DivisorError as of_layer:
            y = args[0]  # passed by, so that the layers behind it are seen
            of_kind["/".join(layer.path)] = of_layer.num_features
            refused.append(layer)
        return y

    def init(images: Array) -> Any:
        with nn.intercept_methods(note):
            return model.init(jax.random.key(0), images, train=False)

    if isinstance(model, nn.Module):
        jax.eval_shape(init, images)
    if not refused:
        return error
    kind = refused[0].transform.name
    numbers = set(features[kind].values())
    common = math.gcd(*numbers)
    divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    counts = ", ".join(map(str, sorted(numbers)))
    layer = "/".join(refused[0].path)
    return ConfigError(
        f"{error.option} does not divide the {counted(error.num_features, 'feature')} "
        f"of layer {layer}; the {kind} norms of {name_of(model)} have {counts} "
        f"features, so give one of {divisors}{error.otherwise}"
    )


def _computed(jaxpr: Any) -> Iterator[Any]:
    """Yield the type of each value that a traced program computes, inner ones too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _computed(inner)


def _bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return math.prod(aval.shape) * getattr(dtype, "itemsize", 0)


def logits_by_batch(model: Any, variables: Any, images: Array) -> Array:
    """Return the logits of a batch whose norms use its own statistics.

    The model is applied in training mode with dropout switched off. In Linen modules
    calls of `nn.Dropout` return their input; in NNX modules `deterministic` is True.

    Args:
      model: as `as_model` returns it.
      variables: parameters and statistics; the statistics are not used.
      images: the batch, `[N, H, W, C]`, numbers of the scale that the model takes.

    Returns:
      Logits `[N, classes]`.

    Raises:
      ValueError: if the model draws random numbers by other means than dropout layers.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from bn_jax.linen import BatchNorm
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train):
      ...         return BatchNorm(not train)(images.reshape(len(images), -1))
      >>> images = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> variables = Net().init(jax.random.key(0), images, train=False)
      >>> logits_by_batch(Net(), variables, images).round(3).ravel().tolist()
      [-1.0, 1.0]
    """
    logits: Array
    if not isinstance(model, nn.Module):
        logits, _ = model.apply(
            variables, images, train=True, mutable=["batch_stats"], dropout=False
        )
        return logits

    def pass_dropout_by(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            return args[0] if args else kwargs["inputs"]
        return next_fun(*args, **kwargs)

    try:
        # Without a random stream for dropout, what nn.jit has cached of training with
        # one is not used.
        with nn.intercept_methods(pass_dropout_by):
            logits, _ = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
    except flax.errors.InvalidRngError as error:
        raise ValueError(
            f"{type(model).__name__} draws random numbers in training mode outside of "
            "nn.Dropout, so it has no logits by the batch's statistics alone; expected "
            "nn.Dropout layers only"
        ) from error
    return logits
