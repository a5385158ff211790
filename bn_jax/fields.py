"""Dataclasses of options, checked when they are made.

A field made by `option` knows its help, its choices or its range. Its type is that of
its default: a bool, an int, a float, a str, or a tuple of one of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A value that a config cannot take."""


@dataclasses.dataclass(frozen=True)
class Range:
    """What a value may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Range("a number at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("a number 0 or greater", lambda v: v >= 0)
FINITE = Range("a number 0 or greater and finite", lambda v: 0 <= v < math.inf)
POSITIVE = Range("a number greater than 0 and finite", lambda v: 0 < v < math.inf)
BELOW_1 = Range("a number in [0, 1)", lambda v: 0 <= v < 1)
SHARE = Range("a number in [0, 1]", lambda v: 0 <= v <= 1)


# What a text has to write, by type of the value.
WORDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    valid: Range | None = None,
    table: Any = None,
) -> Any:
    """Return a dataclass's field.

    Args:
      default: its value where none is given; a tuple for several values of one type.
      help: a sentence for --help.
      choices: what it, or each of its values, may be.
      valid: the range of it, or of each of its values.
      table: the `bn_jax.names.Table` of what it names, if it is a name with options.
    """
    metadata = {"help": help, "choices": choices, "valid": valid, "table": table}
    return dataclasses.field(default=default, metadata=metadata)


def option_of(kind: type, name: str, default: Any = None) -> Any:
    """Return a field as another dataclass has it, with another default if given."""
    (field,) = (f for f in dataclasses.fields(kind) if f.name == name)
    default = field.default if default is None else default
    return dataclasses.field(default=default, metadata=field.metadata)


def names_checked(kind: type[T]) -> type[T]:
    """Make a dataclass refuse arguments that are not its fields, with the one meant.

    A decorator, above that of the dataclass.

    Examples:
      >>> @names_checked
      ... @dataclasses.dataclass
      ... class Options:
      ...     learning_rate: float = 1.0
      >>> Options(lr=0.1)
      Traceback (most recent call last):
        ...
      bn_jax.fields.ConfigError: Options has no field lr (did you mean learning_rate?)
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    init = kind.__init__

    @functools.wraps(init)
    def checked(self: T, *args: Any, **given: Any) -> None:
        faults = [
            f"{name}{did_you_mean(name, known)}" for name in given if name not in known
        ]
        if faults:
            likely = any("did you mean" in fault for fault in faults)
            raise ConfigError(
                f"{kind.__name__} has no field {', '.join(faults)}"
                f"{'' if likely else '; expected some of ' + ', '.join(known)}"
            )
        init(self, *args, **given)

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


def check(config: Any) -> None:
    """Refuse a dataclass with bad values.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """
    faults = [
        fault
        for field in dataclasses.fields(config)
        if (fault := _fault(field, getattr(config, field.name)))
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def _fault(field: dataclasses.Field[Any], value: Any) -> str | None:
    """Describe the fault of a field's value, or return None."""
    expected = None
    if not isinstance(field.default, tuple):
        expected = _expected(field, field.default, value)
    elif type(value) is not tuple or not value or len(set(value)) < len(value):
        expected = "one or more values, none of them twice"
    else:
        each = (_expected(field, field.default[0], part) for part in value)
        expected = next(filter(None, each), None)
        expected = expected and f"of each value {expected}"
    return expected and f"{field.name}={value!r}; expected {expected}"


def _expected(field: dataclasses.Field[Any], default: Any, value: Any) -> str | None:
    """Describe the values that are valid, or return None if this one is."""
    choices, valid = field.metadata["choices"], field.metadata["valid"]
    kind = type(default)
    if choices is not None and value not in choices:
        return f"one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    if type(value) is not kind and not (kind is float and type(value) is int):
        if kind is str and valid is not None:
            return f"a text, {valid.words}"
        return f"a value of type {kind.__name__}"
    if valid is not None and not valid.holds(value):
        words: str = valid.words
        return words
    return WORDS[float] if value != value else None  # NaN


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a suggestion of what is known and near to what was given, or nothing."""
    close = nearest(given, known)
    return f" (did you mean {close}?)" if close else ""


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the known name that was meant: by its initials, as lr, or misspelt."""
    known = list(known)
    by_initials = [n for n in known if "".join(w[:1] for w in n.split("_")) == given]
    if len(given) > 1 and by_initials:
        return by_initials[0]
    return next(iter(difflib.get_close_matches(given, known, 1)), None)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 seed" or "5 seeds"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def parse(field: dataclasses.Field[Any], text: str) -> Any:
    """Return the value of a field that a text writes; its range is not checked.

    Raises:
      ConfigError: if it writes no value of the field's type.
    """
    kind: Any = type(field.default)
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        return known[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{field.name}={text!r}; expected {WORDS[kind]}") from None
