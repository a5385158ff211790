"""Dataclasses of options, checked when they are made, and as flags.

A field made by `option` knows its help, its choices or its range. Its type is that of
its default: a bool, an int, a float, a str, or a tuple of one of these, which a flag
takes with commas between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import flags

# Flags that this module defines for an entry point are listed by that one's --help.
flags.disclaim_key_flags()

Options = TypeVar("Options")


class ConfigError(ValueError):
    """A value that a config cannot take."""


@dataclasses.dataclass(frozen=True)
class Range:
    """What a value may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Range("a number at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("a number 0 or greater", lambda v: v >= 0)
POSITIVE = Range("a number greater than 0 and finite", lambda v: 0 < v < math.inf)
BELOW_1 = Range("a number in [0, 1)", lambda v: 0 <= v < 1)
SHARE = Range("a number in [0, 1]", lambda v: 0 <= v <= 1)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    valid: Range | None = None,
) -> Any:
    """Return a dataclass's field.

    Args:
      default: its value where none is given; a tuple for several values of one type.
      help: a sentence for --help.
      choices: what it, or each of its values, may be.
      valid: the range of it, or of each of its values.
    """
    metadata = {"help": help, "choices": choices, "valid": valid}
    return dataclasses.field(default=default, metadata=metadata)


def option_of(kind: type, name: str, default: Any = None) -> Any:
    """Return a field as another dataclass has it, with another default if given."""
    (field,) = (f for f in dataclasses.fields(kind) if f.name == name)
    default = field.default if default is None else default
    return dataclasses.field(default=default, metadata=field.metadata)


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
    """Return what is wrong with a field's value, or None."""
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
    """Return what a value should have been, or None where it is that."""
    choices, valid = field.metadata["choices"], field.metadata["valid"]
    kind = type(default)
    if choices is not None and value not in choices:
        return f"one of {', '.join(choices)}"
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"a value of type {kind.__name__}"
    if valid is not None and not valid.holds(value):
        words: str = valid.words
        return words
    return None


def define_flags(kind: type) -> None:
    """Define an absl flag for each field of a dataclass."""
    define: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple: _define_tuple,
    }
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        help_text = field.metadata["help"]
        if choices is not None:
            several = ",..." if isinstance(field.default, tuple) else ""
            help_text = f"<{'|'.join(choices)}>{several}: {help_text}"
        define[type(field.default)](field.name, field.default, help_text)


class _TupleParser(flags.ArgumentParser[Any]):
    """Reads values of one type with commas between."""

    def __init__(self, default: tuple[Any, ...]) -> None:
        self._kind = type(default[0])
        self._example = ",".join(map(str, default[:2]))
        self.syntactic_help = "one or more, with commas between"

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        try:
            return tuple(self._kind(part.strip()) for part in argument.split(","))
        except ValueError:
            raise ValueError(
                f"expected values of type {self._kind.__name__} with commas between, "
                f"such as {self._example}"
            ) from None


class _TupleSerializer(flags.ArgumentSerializer[Any]):
    def serialize(self, value: Any) -> str:
        return ",".join(map(str, value))


def _define_tuple(name: str, default: tuple[Any, ...], help_text: str) -> None:
    parser = _TupleParser(default)
    flags.DEFINE(parser, name, default, help_text, serializer=_TupleSerializer())


def from_flags(
    kind: type[Options],
    values: flags.FlagValues,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Options:
    """Return the dataclass that the parsed flags give.

    Args:
      kind: the dataclass whose flags were defined.
      values: `flags.FLAGS` after parsing.
      defaults: values for fields whose flag was not given on the command line.

    Raises:
      ConfigError: if a value is out of range.
    """
    defaults = defaults or {}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        flag = values[field.name]
        use_default = field.name in defaults and not flag.present
        fields[field.name] = defaults[field.name] if use_default else flag.value
    return kind(**fields)
