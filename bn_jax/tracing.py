"""Programs in which the calls of layers can be seen, wherever they are.

What is computed inside `jax.jit`, `jax.checkpoint`, `lax.scan` or `jax.vmap` exists
only there. So the calls of layers are marked while a function is traced: `mark` is an
operation that returns its first argument and carries others along. `evaluate` then
computes the traced program, opens these transforms where they hold marks, hands out
what the marks carry, and can put another value in place of the first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching

# Calls of a part of the program, which stand for that part.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# A traced function is found again while this stays as it is; each trace sets another
# value, so that a function that was compiled before is traced with marks, too.
_trace = jax.make_user_context()


class Unknown:
    """In place of a value that is not given to `evaluate`.

    Attributes:
      used: whether an operation takes it.
      part_of: the unknown value that it is a slice of, along the first axis as a scan
        takes it, and the slice's number; None for any other.
    """

    def __init__(self, part_of: tuple[Unknown, int] | None = None) -> None:
        self.used = False
        self.part_of = part_of

    def use(self) -> None:
        """Note that an operation takes the value, or a slice of it."""
        self.used = True
        if self.part_of is not None:
            self.part_of[0].use()


class Marked(NamedTuple):
    """What a mark carries, at one of its executions."""

    site: int
    mapped: tuple[int, ...]  # sizes of the vmapped axes, which all values start with
    x: Any
    carried: tuple[Any, ...]


def mark(x: Array, carried: Sequence[Array], *, site: int) -> Array:
    """Return `x`, and show `evaluate` the values that are carried along."""
    (x,) = _mark.bind(x, *carried, site=site, mapped=())
    return x


def trace(function: Callable[..., Any], *arguments: Any) -> ClosedJaxpr:
    """Trace a function with all that it calls, whatever was traced before."""
    with _trace(object()):
        return jax.make_jaxpr(function)(*arguments)


def trace_shapes(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes and dtypes of a function's results, traced as by `trace`."""
    with _trace(object()):
        return jax.eval_shape(function, *arguments)


def evaluate(
    traced: ClosedJaxpr, arguments: Sequence[Any], given: Mapping[int, Any]
) -> tuple[list[Any], list[Marked]]:
    """Compute a traced program.

    Args:
      traced: as `trace` returns it.
      arguments: the leaves of its arguments. Some may be `Unknown`; only what depends
        on others, and on nothing unknown, is computed then. An unknown value that is
        handed on as it is, to a mark or a result, stays the same object.
      given: values in place of the first argument of executions of marks, by number.

    Returns:
      The leaves of its results, and the executions of marks in their order.

    Raises:
      ValueError: if a mark is inside something else than `jax.jit`, `jax.checkpoint`,
        `lax.scan` or `jax.vmap`.
    """
    seen: list[Marked] = []
    results = _evaluate(traced.jaxpr, traced.consts, arguments, seen, given)
    return results, seen


# What computes nothing with the values of an array, but moves, pads or selects them.
_KEEPS_VALUES = frozenset(
    {
        *("convert_element_type", "copy", "reshape", "squeeze", "expand_dims"),
        *("transpose", "broadcast_in_dim", "rev", "slice", "dynamic_slice", "gather"),
        *("pad", "concatenate", "split", "max", "min", "reduce_max"),
        *("reduce_window_max", "sharding_constraint", "optimization_barrier"),
    }
)
_PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})


def are_multiplied(jaxpr: Jaxpr, values: Sequence[Var]) -> bool:
    """Return whether the values of arguments go into a product or a convolution.

    They do where nothing is computed with them before, but for another dtype, shape or
    order. Of a loop only the first step counts.

    Args:
      jaxpr: a program.
      values: some of its arguments.
    """
    return _followed(jaxpr, values)[0]


def _followed(jaxpr: Jaxpr, values: Sequence[Var]) -> tuple[bool, list[bool]]:
    """Return whether values are multiplied, and which results they are as they were."""
    raw = set(values)

    def are_raw(atoms: Sequence[Any]) -> list[bool]:
        return [not isinstance(atom, Literal) and atom in raw for atom in atoms]

    for equation in jaxpr.eqns:
        inputs = are_raw(equation.invars)
        if not any(inputs):
            continue
        name = equation.primitive.name
        if name in _PRODUCTS:
            return True, []
        if name in _KEEPS_VALUES:
            raw.update(equation.outvars)
        for part in _parts(equation):
            # What a call is given, and returns, stands last in its equation.
            pairs = zip(reversed(part.invars), reversed(inputs), strict=False)
            found, results = _followed(part, [v for v, is_raw in pairs if is_raw])
            if found:
                return True, []
            of_call = zip(reversed(equation.outvars), reversed(results), strict=False)
            raw.update(v for v, is_raw in of_call if is_raw)
    return False, are_raw(jaxpr.outvars)


_mark = Primitive("bn_jax_mark")
_mark.multiple_results = True
_mark.def_abstract_eval(lambda x, *carried, site, mapped: [x])


def _mark_batched(
    values: Sequence[Any], axes: Sequence[Any], *, site: int, mapped: tuple[int, ...]
) -> tuple[list[Any], list[int]]:
    (size,) = {v.shape[a] for v, a in zip(values, axes, strict=True) if a is not None}
    values = [
        batching.bdim_at_front(value, axis, size)
        for value, axis in zip(values, axes, strict=True)
    ]
    return _mark.bind(*values, site=site, mapped=(size, *mapped)), [0]


def _mark_jvp(
    values: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    return _mark.bind(*values, **params), [tangents[0]]


batching.primitive_batchers[_mark] = _mark_batched
ad.primitive_jvps[_mark] = _mark_jvp


def _evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    seen: list[Marked],
    given: Mapping[int, Any],
) -> list[Any]:
    values: dict[Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    is_partial = any(isinstance(value, Unknown) for value in arguments)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        if equation.primitive is _mark:
            x = given.get(len(seen), inputs[0])
            seen.append(Marked(*_of_mark(equation), inputs[0], tuple(inputs[1:])))
            outputs = [x]
        elif name == "scan" and _has_marks(equation):
            outputs = _evaluate_scan(equation, inputs, seen, given)
        elif name in _CALLS and (is_partial or _has_marks(equation)):
            part = equation.params[_CALLS[name]]
            consts = getattr(part, "consts", ())
            part = getattr(part, "jaxpr", part)
            outputs = _evaluate(part, consts, inputs, seen, given)
        elif _has_marks(equation):
            raise ValueError(
                f"a layer is inside {name}, where its input cannot be seen; expected "
                "nothing but jit, remat, scan and vmap around it: give the same model "
                "without it"
            )
        elif is_partial and not _is_computed(equation, inputs):
            outputs = [Unknown() for _ in equation.outvars]
            for value in inputs:
                if isinstance(value, Unknown):
                    value.use()
        else:
            outputs = _bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_mark(equation: JaxprEqn) -> tuple[int, tuple[int, ...]]:
    return equation.params["site"], equation.params["mapped"]


def _is_computed(equation: JaxprEqn, inputs: Sequence[Any]) -> bool:
    """Return whether an equation depends on known arguments and on no unknown ones."""
    of_variables = [
        value
        for atom, value in zip(equation.invars, inputs, strict=True)
        if not isinstance(atom, Literal)
    ]
    return bool(of_variables) and not any(
        isinstance(value, Unknown) for value in of_variables
    )


def _bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _evaluate_scan(
    equation: JaxprEqn,
    inputs: Sequence[Any],
    seen: list[Marked],
    given: Mapping[int, Any],
) -> list[Any]:
    """Compute a scan step by step."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    # Constants, the carry and what is scanned come in this order. What is scanned has
    # an axis more outside; how JAX tells how many there are of each, varies by version.
    num_scanned = _num_longer(equation.invars, body.jaxpr.invars)
    num_carry = len(equation.outvars)
    num_carry -= _num_longer(equation.outvars, body.jaxpr.outvars)
    num_consts = len(inputs) - num_carry - num_scanned
    consts, carry = inputs[:num_consts], list(inputs[num_consts:][:num_carry])
    scanned = inputs[num_consts + num_carry :]
    results: list[Any] = [None] * length
    steps = range(length)
    for i in reversed(steps) if equation.params["reverse"] else steps:
        xs = [_part(x, i) for x in scanned]
        outputs = _evaluate(
            body.jaxpr, body.consts, [*consts, *carry, *xs], seen, given
        )
        carry, results[i] = outputs[:num_carry], outputs[num_carry:]
    return carry + [_stack(of_steps) for of_steps in zip(*results, strict=True)]


def _num_longer(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """Return how many values have an axis more outside of a scan than inside."""
    pairs = zip(outer, inner, strict=True)
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)


def _part(value: Any, i: int) -> Any:
    return Unknown((value, i)) if isinstance(value, Unknown) else value[i]


def _stack(values: Sequence[Any]) -> Any:
    unknown = [value for value in values if isinstance(value, Unknown)]
    for value in unknown:
        value.use()
    if unknown:
        return Unknown()
    known = all(isinstance(value, np.ndarray) for value in values)
    return np.stack(values) if known else jax.numpy.stack(values)


def _has_marks(equation: JaxprEqn) -> bool:
    return any(map(_is_marked, _parts(equation)))


def _is_marked(jaxpr: Jaxpr) -> bool:
    return any(e.primitive is _mark or _has_marks(e) for e in jaxpr.eqns)


def _parts(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the programs that an equation holds."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
