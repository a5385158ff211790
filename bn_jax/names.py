"""Tables of names: what a norm, a model, a data set or an optimizer is called.

A name is written with its options as `name:key=value,...`, on the command line and in
Python, such as `whitening:method=zca,max_group_size=16`. A row of a table is a function
that makes the thing; its keyword-only parameters with a default are the options, and
their annotations give type and range:

    def dropout(x: Array, *, rate: Annotated[float, BELOW_1] = 0.5) -> Array: ...

An option is a bool, an int, a float, a str, a `Literal` of strings, a tuple of one of
these (written with `x` between the values, `512x512`), or one of them and None (written
`none`). A str may hold neither a comma nor an equals sign.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from bn_jax.fields import ConfigError, Range, did_you_mean

T = TypeVar("T")

# In an option's annotation: a sweep may hand the option over as a traced value.
TRACEABLE = "traceable"


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a name."""

    name: str
    kind: Any  # bool, int, float, str or a Literal; of a tuple, that of its values
    default: Any
    is_tuple: bool = False
    may_be_none: bool = False
    valid: Range | None = None
    is_traceable: bool = False

    def parse(self, text: str) -> Any:
        """Return the value that a text writes.

        Raises:
          ConfigError: if it writes none, or one that `check` refuses.
        """
        text = text.strip()
        if self.may_be_none and text.lower() == "none":
            return None
        try:
            if self.is_tuple:
                value: Any = tuple(self._parse_one(part) for part in text.split("x"))
            else:
                value = self._parse_one(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{self.name}={text}; expected {self.words}") from None
        self.check(value)
        return value

    def _parse_one(self, text: str) -> Any:
        if self.kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return self.kind(text) if self.kind in (int, float) else text

    def check(self, value: Any) -> None:
        """Refuse a value that is out of range or of another type.

        Raises:
          ConfigError: naming the option, the value, and what was expected.
        """
        if value is None and self.may_be_none:
            return
        values = value if self.is_tuple else (value,)
        if (
            (self.is_tuple and not (isinstance(value, tuple) and value))
            or not all(self._is_of_kind(v) for v in values)
            or (self.valid and not all(self.valid.holds(v) for v in values))
        ):
            raise ConfigError(
                f"{self.name}={self.written(value)}; expected {self.words}"
            )

    def _is_of_kind(self, value: Any) -> bool:
        if typing.get_origin(self.kind) is Literal:
            return value in typing.get_args(self.kind)
        if self.kind is float:
            return type(value) in (int, float) and value == value  # no NaN
        return type(value) is self.kind

    def written(self, value: Any) -> str:
        """Return the text that `parse` reads as this value."""
        if value is None:
            return "none"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "x".join(map(self.written, value))
        return f"{value:g}" if _is_short(value) else str(value)

    @property
    def words(self) -> str:
        """What the option takes, for people."""
        if typing.get_origin(self.kind) is Literal:
            words = f"one of {', '.join(typing.get_args(self.kind))}"
        elif self.kind is bool:
            words = "true or false"
        elif self.valid is not None:
            words = self.valid.words
            if self.kind is int and words.startswith("a number"):
                words = words.replace("a number", "an integer", 1)
        else:
            words = {int: "an integer", float: "a number", str: "a text"}[self.kind]
        if self.is_tuple:
            words = f"values with x between, each {words}"
        return f"{words}, or none" if self.may_be_none else words


def _is_short(value: Any) -> bool:
    return isinstance(value, float) and float(f"{value:g}") == value


@dataclasses.dataclass(frozen=True)
class Named:
    """A name with the options that were given, as values."""

    name: str
    options: Mapping[str, Any]


class Table(Generic[T]):
    """Constructors by name.

    Args:
      kind: what the table has, for messages: "norm", "model", ...
      rows: functions that make one, by name. Their parameters without a default, and
        those in `given`, are passed by the caller of `make`; the others are options.
      given: names of such parameters.
    """

    def __init__(
        self,
        kind: str,
        rows: Mapping[str, Callable[..., T]],
        *,
        given: frozenset[str] = frozenset(),
    ) -> None:
        self.kind, self.rows, self._given = kind, dict(rows), given

    def __iter__(self) -> typing.Iterator[str]:
        """Iterate over the names."""
        return iter(self.rows)

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of a name, in the order of its parameters."""
        return _options(self.rows[name], self._given)

    def parse(self, text: str) -> Named:
        """Return the name and the options that a text writes.

        Raises:
          ConfigError: in one line, if there is no such name or option, or a value is of
            another type or out of range; it lists what would do.
        """
        name, _, rest = text.partition(":")
        if name not in self.rows:
            first, _, others = name.partition(",")
            hint = did_you_mean(name, self.rows)
            if first in self.rows:
                hint = f" (options follow a colon: {first}:{others})"
            raise ConfigError(
                f"{self.kind}={text!r}; expected one of {', '.join(self.rows)}{hint}"
            )
        options = self.options(name)
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key in values:
                raise ConfigError(
                    f"{self.kind}={text!r}: {part!r}; expected KEY=VALUE with each key "
                    f"once; {self._takes(name)}"
                )
            if key not in options:
                raise ConfigError(
                    f"{self.kind}={text!r}: no option {key!r}"
                    f"{did_you_mean(key, options)}; {self._takes(name)}"
                )
            try:
                values[key] = options[key].parse(value)
            except ConfigError as error:
                raise ConfigError(
                    f"{self.kind}={text!r}: {error}; {self._takes(name)}"
                ) from None
        return Named(name, values)

    def _takes(self, name: str) -> str:
        options = self.options(name).values()
        if not options:
            return f"{name} takes no options"
        listed = (f"{o.name}={o.written(o.default)} ({o.words})" for o in options)
        return f"{name} takes {'; '.join(listed)}"

    def written(self, name: str, options: Mapping[str, Any]) -> str:
        """Return the one text of a name and its options: in order, defaults left out.

        Raises:
          ConfigError: if there is no such option, or a value is of another type or out
            of range.
        """
        known = self.options(name)
        for key, value in options.items():
            if key not in known:
                raise ConfigError(
                    f"{self.kind}={name!r} has no option {key!r}; {self._takes(name)}"
                )
            known[key].check(value)
        parts = [
            f"{key}={option.written(options[key])}"
            for key, option in known.items()
            if key in options and options[key] != option.default
        ]
        return name + (":" + ",".join(parts) if parts else "")

    def canonical(self, text: str) -> str:
        """Return the one text that means the same as `text`.

        Raises:
          ConfigError: as `parse` says.
        """
        named = self.parse(text)
        return self.written(named.name, named.options)

    def value(self, text: str, option: str) -> Any:
        """Return an option's value in a text: as given there, or its default.

        Raises:
          ConfigError: if there is no such option, or as `parse` says.
        """
        named = self.parse(text)
        known = self.options(named.name)
        if option not in known:
            raise ConfigError(
                f"{self.kind}={text!r} has no option {option!r}; "
                f"{self._takes(named.name)}"
            )
        return named.options.get(option, known[option].default)

    def replaced(self, text: str, **options: Any) -> str:
        """Return a text with some options replaced, as `written` writes it.

        Raises:
          ConfigError: as `parse` and `written` say.
        """
        named = self.parse(text)
        return self.written(named.name, {**named.options, **options})

    def make(self, text: str, **given: Any) -> T:
        """Make the thing that a text names.

        Args:
          text: a name with its options.
          **given: further arguments of the constructor; they go before the options, and
            may be traced values of some.

        Raises:
          ConfigError: as `parse` says.
        """
        named = self.parse(text)
        return self.rows[named.name](**{**named.options, **given})

    def help(self) -> str:
        """Return the names with their options, for --help.

        Blanks stand where a line may end: they are not part of what is typed.
        """
        described = []
        for name in self.rows:
            options = self.options(name).values()
            listed = ", ".join(f"{o.name}={o.written(o.default)}" for o in options)
            described.append(f"{name}: {listed}" if listed else name)
        return " | ".join(described)


@functools.cache
def _options(row: Callable[..., Any], given: frozenset[str]) -> dict[str, Option]:
    """Return the options of a row: keyword parameters that have a default."""
    hints = typing.get_type_hints(row, include_extras=True)
    return {
        name: _option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(row).parameters.items()
        if parameter.default is not parameter.empty and name not in given
    }


def _option(name: str, hint: Any, default: Any) -> Option:
    valid, is_traceable = None, False
    may_be_none = is_tuple = False
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint = arguments[0]
            for extra in arguments[1:]:
                valid = extra if isinstance(extra, Range) else valid
                is_traceable |= extra == TRACEABLE
        elif origin in (typing.Union, types.UnionType):
            may_be_none = True
            (hint,) = (a for a in arguments if a is not type(None))
        elif origin is tuple:
            is_tuple, hint = True, arguments[0]
        else:
            return Option(
                name, hint, default, is_tuple, may_be_none, valid, is_traceable
            )
