"""The initial variables of a model, drawn by a program that is quick to compile.

`jax.jit(model.init)` compiles the random numbers of every kernel anew: 110 layers take
110 copies of the same program. Here kernels that differ only in their key share one
copy, which a loop runs for each of them. The numbers are those of `model.init`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

Init = Callable[[Array], dict[str, Any]]
# JAX asks each program for the names of its arguments in error messages.
_UNNAMED = core.DebugInfo("init", "share_equal_parts", None, None)


def make_init(model: Any, image_shape: tuple[int, ...]) -> Init:
    """Return a function that draws a model's initial variables.

    It is compiled at its first call, once for all keys.

    Args:
      model: a Linen module or what `as_model` returns, called as
        `model(images, train=...)`.
      image_shape: `[H, W, C]`.

    Returns:
      Function of a key (`jax.random.key`) that returns `{"params": ...,
      "batch_stats": ...}`; a model without statistics has `{}` there.
    """

    def init(key: Array) -> dict[str, Any]:
        images = jnp.zeros((1, *image_shape))
        return {"batch_stats": {}, **model.init(key, images, train=False)}

    return jax.jit(share_equal_parts(init))


def share_equal_parts(init: Init) -> Init:
    """Return `init` with outputs that are drawn in the same way drawn in one loop.

    Flax derives the key of each parameter as `fold_in(key, hash of its path)`. Outputs
    whose programs are equal up to these hashes form a group, and `lax.map` runs one
    program on the keys of the group. Computations that no output needs are left out:
    of `model.init` that is the forward pass.

    Args:
      init: function of one typed key. It may return any tree of arrays.
    """

    def shared(key: Array) -> Any:
        closed, shapes = jax.make_jaxpr(init, return_shape=True)(key)
        needed = _needed_equations(closed.jaxpr)
        parts = _parts(closed.jaxpr, needed)
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            groups[part.signature if part else None].append(i)
        alone = groups.pop(None, [])
        alone += [group.pop() for group in groups.values() if len(group) == 1]

        values: list[Any] = [None] * len(parts)
        numbers = sorted({number for i in alone for number in needed[i]})
        program = core.Jaxpr(
            closed.jaxpr.constvars,
            closed.jaxpr.invars,
            [closed.jaxpr.outvars[i] for i in alone],
            [closed.jaxpr.eqns[number] for number in numbers],
            debug_info=_UNNAMED,
        )
        run = core.jaxpr_as_fun(core.ClosedJaxpr(program, closed.consts))
        for i, value in zip(alone, run(key), strict=True):
            values[i] = value
        for group in filter(None, groups.values()):
            members = [part for i in group if (part := parts[i])]
            for i, value in zip(group, _draw(key, members), strict=True):
                values[i] = value
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return shared


class _Part(NamedTuple):
    """The program of one output."""

    signature: Any  # equal for two outputs whose programs are equal
    program: core.Jaxpr  # of the key, and of keys that are folded from it
    data: tuple[Any, ...]  # what is folded into the key for each of these


def _draw(key: Array, members: Sequence[_Part]) -> Sequence[Array]:
    """Return the outputs of parts with equal programs."""
    program = core.jaxpr_as_fun(core.ClosedJaxpr(members[0].program, []))

    def draw(data: Sequence[Array] | Array) -> Array:
        value: Array
        (value,) = program(key, *(jax.random.fold_in(key, number) for number in data))
        return value

    if not members[0].data:
        return [draw([])] * len(members)
    data = np.array([part.data for part in members], np.uint32)
    return list(lax.map(draw, jnp.asarray(data)))


def _parts(jaxpr: core.Jaxpr, needed: list[list[int]]) -> list[_Part | None]:
    """Return the program of each output, or None where it shares work with others."""
    (key,) = jaxpr.invars
    uses = Counter(number for numbers in needed for number in numbers)
    return [
        _part(key, [jaxpr.eqns[n] for n in numbers], outvar)
        if all(uses[n] == 1 or _folds(jaxpr.eqns[n], key) for n in numbers)
        else None
        for numbers, outvar in zip(needed, jaxpr.outvars, strict=True)
    ]


def _part(key: Any, equations: list[Any], outvar: Any) -> _Part | None:
    """Return the program of one output, or None if it uses constant arrays."""
    folds = [eqn for eqn in equations if _folds(eqn, key)]
    others = [eqn for eqn in equations if not _folds(eqn, key)]
    folded = [eqn.outvars[0] for eqn in folds]
    # Variables are numbered as they appear, so that equal programs look equal.
    names = {var: n for n, var in enumerate([key, *folded])}
    signature = []
    for eqn in others:
        operands = [_name_of(operand, names) for operand in eqn.invars]
        if None in operands:
            return None
        for var in eqn.outvars:
            names[var] = len(names)
        signature.append((eqn.primitive, tuple(operands), tuple(eqn.params.items())))
    whole = (len(folds), tuple(signature), _name_of(outvar, names))
    try:
        hash(whole)
    except TypeError:  # an equation holds an array
        return None
    inputs = [key, *folded]
    program = core.Jaxpr([], inputs, [outvar], others, debug_info=_UNNAMED)
    return _Part(whole, program, tuple(eqn.invars[1].val for eqn in folds))


def _name_of(operand: Any, names: dict[Any, int]) -> Any:
    """Return what an operand is called, or None for a constant array."""
    if isinstance(operand, core.Literal):
        return str(operand.aval), np.asarray(operand.val).tobytes()
    return names.get(operand)


def _folds(equation: Any, key: Any) -> bool:
    """Return whether an equation folds a known number into the key."""
    return (
        equation.primitive.name == "random_fold_in"
        and equation.invars[0] is key
        and isinstance(equation.invars[1], core.Literal)
    )


def _needed_equations(jaxpr: core.Jaxpr) -> list[list[int]]:
    """Return, for each output, the numbers of the equations that it needs, in order."""
    producers = {var: n for n, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    needed_by_all = []
    for outvar in jaxpr.outvars:
        needed: set[int] = set()
        stack = [outvar]
        while stack:
            var = stack.pop()
            if isinstance(var, core.Literal):
                continue
            number = producers.get(var)
            if number is not None and number not in needed:
                needed.add(number)
                stack.extend(jaxpr.eqns[number].invars)
        needed_by_all.append(sorted(needed))
    return needed_by_all
