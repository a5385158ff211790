"""Checksums of what a network computes, which other processes find again.

On disk a user's own model is known by its class and by the shapes of its variables. Two
that agree in these may still differ, in an activation or in a norm's momentum; the
programs that JAX traces of them differ then, too.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from bn_jax import models
from bn_jax.training import loop
from bn_jax.training.state import Network

# Options of operations that change no number.
_OF_SPEED = ("name", "unroll", "_split_transpose")


def checksums(
    network: Network, batch_size: int, *, initial: bool = True
) -> dict[str, Any]:
    """Return a checksum of each of a network's programs.

    They are those of the model alone, whatever precision of products is configured.
    They depend on the versions of JAX and Flax, and on JAX's `settings`.

    Args:
      network: of a model that fits its images.
      batch_size: of the images, in training; a model may depend on it, as by ghosts.
      initial: whether to trace the initial values, too.

    Returns:
      The CRC-32, in hexadecimal, of the programs for `initialisation`, `training` (with
      its gradients) and `prediction`; the `axes` over which statistics are shared in
      training; and the `settings` of JAX that change a program, the dtype of floats and
      the kind of random keys.
    """
    model, shape = network.model, network.image_shape
    names = models.axis_names(model, shape).values()
    axes = sorted({str(name) for name in names if name is not None})
    alone = dataclasses.replace(
        network,
        scale=lambda images: images,
        centre=lambda images: images,
        products=None,
        binds_axes=bool(axes),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)

    def train(variables: Any, images: Any, key: Any) -> Any:
        def total(params: Any) -> Any:
            outputs, moved = loop.forward(
                alone, params, variables["batch_stats"], images, key
            )
            return jnp.sum(outputs).real, moved

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    # Whatever the user has set, perhaps to look for a fault.
    with jax.default_matmul_precision(None), jax.disable_jit(False):
        init = models.make_init(model, shape)
        variables = jax.eval_shape(init, key)
        traced = {
            "training": jax.make_jaxpr(train)(variables, images, key),
            "prediction": jax.make_jaxpr(alone.predict)(variables, images),
        }
        if initial:
            traced["initialisation"] = jax.make_jaxpr(init)(key)
    found = {mode: f"{_crc32(program):08x}" for mode, program in traced.items()}
    settings = [str(jnp.result_type(float)), str(key.dtype)]
    return {**found, "axes": axes, "settings": settings}


def _crc32(traced: ClosedJaxpr) -> int:
    crc32 = 0
    for part in _described(traced.jaxpr, traced.consts):
        crc32 = zlib.crc32(part, crc32)
    return crc32


def _described(jaxpr: Jaxpr, consts: Sequence[Any]) -> Iterator[bytes]:
    """Yield what a program computes: operations, their inputs, options and constants.

    Variables are numbered in their order. Left out is what no result depends on, such
    as the random state that an NNX module holds in prediction; what has no value, such
    as a Python function that JAX calls for a derivative; and names of functions.
    """
    needed = set(_variables(jaxpr.outvars))
    equations = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            equations.append(equation)
            needed.update(_variables(equation.invars))
    pairs = zip(jaxpr.constvars, consts, strict=True)
    held = [(variable, const) for variable, const in pairs if variable in needed]
    inputs = [*(variable for variable, _ in held), *jaxpr.invars]
    numbers = {variable: i for i, variable in enumerate(inputs)}
    yield from (str(variable.aval).encode() for variable in inputs)
    for _, const in held:
        yield from _value(const)
    for equation in reversed(equations):
        yield equation.primitive.name.encode()
        for atom in equation.invars:
            yield from _atom(atom, numbers)
        for name, value in sorted(equation.params.items()):
            if name not in _OF_SPEED:
                yield name.encode()
                yield from _value(value)
        for variable in equation.outvars:
            numbers[variable] = len(numbers)
            yield str(variable.aval).encode()
    for atom in jaxpr.outvars:
        yield from _atom(atom, numbers)


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, Literal))


def _atom(atom: Any, numbers: dict[Any, int]) -> Iterator[bytes]:
    if isinstance(atom, Literal):
        yield from _value(atom.val)
    else:
        yield f"%{numbers[atom]}".encode()


def _value(value: Any) -> Iterator[bytes]:
    """Yield a value that a program holds."""
    if isinstance(value, ClosedJaxpr):
        yield from _described(value.jaxpr, value.consts)
    elif isinstance(value, Jaxpr):
        yield from _described(value, [None] * len(value.constvars))
    elif isinstance(value, tuple | list):
        yield f"({len(value)}".encode()
        for part in value:
            yield from _value(part)
    elif isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        yield from _value(jax.random.key_data(value))
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.asarray(value).tobytes()
    elif isinstance(
        value, bool | int | float | complex | str | bytes | np.dtype | enum.Enum | None
    ):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
