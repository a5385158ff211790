"""Programs in which the calls of layers can be seen, wherever they are.

What is computed inside `jax.jit`, `jax.checkpoint`, `lax.scan` or `jax.vmap` exists
only there. So the calls of layers are marked while a function is traced: `mark` is an
operation that returns its first argument and carries others along. `evaluate` then
computes the traced program, opens these transforms where they hold marks, hands out
what the marks carry, and can put another value in place of the first argument.
"""

from __future__ import annotations

import functools
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
# JAX uses the trace of a function again while this value stays as it is. Each trace of
# ours sets another one, so that functions compiled before are traced with marks, too.
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
      arguments: the leaves of its arguments. Some may be `Unknown`. Computed is then
        only what depends on others and on nothing unknown, as far as a mark or a result
        needs it. An unknown value that is handed on as it is, to a mark or a result,
        stays the same object.
      given: values in place of the first argument of executions of marks, by number.

    Returns:
      The leaves of its results, and the executions of marks in their order.

    Raises:
      ValueError: if a mark is inside something else than `jax.jit`, `jax.checkpoint`,
        `lax.scan` or `jax.vmap`.
    """
    seen: list[Marked] = []
    results = _evaluate(traced.jaxpr, traced.consts, arguments, seen, given)
    return _computed(results), seen


# What computes nothing with the values of an array, but moves, pads or selects them.
_KEEPS_VALUES = frozenset(
    {
        *("convert_element_type", "copy", "reshape", "squeeze", "expand_dims"),
        *("transpose", "broadcast_in_dim", "rev", "slice", "dynamic_slice", "gather"),
        *("pad", "concatenate", "split", "max", "min", "reduce_max", "select_n"),
        *("reduce_window_max", "sharding_constraint", "optimization_barrier"),
    }
)
_TAKES = frozenset({"gather", "dynamic_slice"})
# Numbers in [0, 1] are not divided by this or more, nor is it subtracted from them.
_SIZE_OF_BYTES = 16


def scales_bytes(traced: ClosedJaxpr, values: Sequence[Var]) -> bool:
    """Return whether a program scales its arguments of bytes before it uses them.

    It does where the first that it computes with them in floats is to divide them by a
    constant of their size, as in `x / 255`, to multiply them by the inverse of one, or
    to subtract one. Before, they may get another dtype, shape, order or sign, and be
    multiplied by other constants. Integers of other types that it makes of them may be
    used in any way, as indices are, but not become floats again.

    Args:
      traced: a program, as `trace` returns it.
      values: those of its arguments that are bytes.
    """
    constants = zip(traced.jaxpr.constvars, traced.consts, strict=True)
    sizes = {v: size for v, c in constants if (size := _size(c)) is not None}
    return _scaled(traced.jaxpr, set(values), sizes)


def _scaled(jaxpr: Jaxpr, raw: set[Var], sizes: dict[Var, float]) -> bool:
    """Return whether a program scales what is raw; see `scales_bytes`.

    Args:
      jaxpr: the program.
      raw: those of its variables that hold bytes, to which others are added.
      sizes: of its variables that hold constants, likewise.
    """

    def is_raw(atom: Any) -> bool:
        return isinstance(atom, Var) and atom in raw

    def size_of(atom: Any) -> float | None:
        return _size(atom.val) if isinstance(atom, Literal) else sizes.get(atom)

    for equation in jaxpr.eqns:
        name, outvars = equation.primitive.name, equation.outvars
        inputs = equation.invars
        known = [size for atom in inputs if (size := size_of(atom)) is not None]
        if not any(map(is_raw, inputs)):
            if len(known) == len(inputs) and (size := _combined(name, known)):
                sizes.update((variable, size) for variable in outvars)
            continue
        parts = list(_parts(equation))
        for part in parts:  # what it is given, and returns, stands last in its equation
            pairs = list(zip(part.invars[::-1], inputs[::-1], strict=False))
            of_part = {v for v, atom in pairs if is_raw(atom)}
            given = {v: s for v, atom in pairs if (s := size_of(atom)) is not None}
            if not _scaled(part, of_part, given):
                return False
            results = zip(part.outvars[::-1], outvars[::-1], strict=False)
            raw.update(v for r, v in results if isinstance(r, Var) and r in of_part)
        if parts:
            continue
        if name == "convert_element_type":
            raw.update(outvars)
            continue
        raw.update(_of_type(np.uint8, outvars))
        floats = _of_type(np.inexact, outvars)
        if name in _TAKES and not is_raw(inputs[0]):
            continue  # bytes are the indices
        if name in _KEEPS_VALUES or name == "neg":
            raw.update(outvars)
        elif floats and _is_scaling(name, known):
            continue
        elif floats and name == "mul" and known:
            raw.update(floats)
        elif floats:
            return False
    return True


def _size(value: Any) -> float | None:
    """Return the largest magnitude in a constant, or None of a traced one."""
    if isinstance(value, jax.core.Tracer) or not np.size(value):
        return None
    return float(np.max(np.abs(np.asarray(value, float))))


def _of_type(kind: Any, variables: Sequence[Any]) -> list[Var]:
    return [v for v in variables if jax.numpy.issubdtype(v.aval.dtype, kind)]


def _combined(name: str, sizes: Sequence[float]) -> float | None:
    """Return the size of what is computed of constants, or None if it is not known."""
    if name == "mul":
        return sizes[0] * sizes[1]
    if name == "div" and sizes[1]:
        return sizes[0] / sizes[1]
    return max(sizes) if name in _KEEPS_VALUES or name == "neg" else None


def _is_scaling(name: str, sizes: Sequence[float]) -> bool:
    """Return whether an operation with constants of these sizes scales bytes."""
    if name == "mul":
        return any(0 < size <= 1 / _SIZE_OF_BYTES for size in sizes)
    return name in ("div", "sub", "add") and any(s >= _SIZE_OF_BYTES for s in sizes)


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
        is_known = not is_partial or _is_known(equation, inputs)
        has_marks = _has_marks(equation)
        if equation.primitive is _mark or has_marks:
            inputs = _computed(inputs)
        if equation.primitive is _mark:
            x = given.get(len(seen), inputs[0])
            seen.append(Marked(*_of_mark(equation), inputs[0], tuple(inputs[1:])))
            outputs = [x]
        elif name == "scan" and has_marks:
            outputs = _evaluate_scan(equation, inputs, seen, given)
        elif name in _CALLS and (has_marks or not is_known):
            part = equation.params[_CALLS[name]]
            consts = getattr(part, "consts", ())
            part = getattr(part, "jaxpr", part)
            outputs = _evaluate(part, consts, inputs, seen, given)
        elif has_marks:
            raise ValueError(
                f"a layer is inside {name}, where its input cannot be seen; expected "
                "nothing but jit, remat, scan and vmap around it: give the same model "
                "without it"
            )
        elif not is_known:
            outputs = [Unknown() for _ in equation.outvars]
            for value in inputs:
                if isinstance(value, Unknown):
                    value.use()
        elif is_partial:
            outputs = _deferred(equation, inputs)
        else:
            outputs = _bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_mark(equation: JaxprEqn) -> tuple[int, tuple[int, ...]]:
    return equation.params["site"], equation.params["mapped"]


def _is_known(equation: JaxprEqn, inputs: Sequence[Any]) -> bool:
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


class _Deferred(NamedTuple):
    """A result of an operation that is computed when one of its results is needed."""

    compute: Callable[[], Sequence[Any]]
    number: int  # of the result


def _deferred(equation: JaxprEqn, inputs: Sequence[Any]) -> list[_Deferred]:
    compute = functools.cache(lambda: _bind(equation, _computed(inputs)))
    return [_Deferred(compute, number) for number in range(len(equation.outvars))]


def _computed(values: Sequence[Any]) -> list[Any]:
    return [
        value.compute()[value.number] if isinstance(value, _Deferred) else value
        for value in values
    ]


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
        outputs = _computed(
            _evaluate(body.jaxpr, body.consts, [*consts, *carry, *xs], seen, given)
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
