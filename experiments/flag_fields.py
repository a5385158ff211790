"""Command-line flags of a dataclass of options.

A flag for each field that `bn_jax.fields.option` made; a tuple is given with commas
between its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import flags

# --help lists these flags as those of the experiment that defines them.
flags.disclaim_key_flags()

Options = TypeVar("Options")


def define(kind: type) -> None:
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
        table = field.metadata["table"]
        if table is not None:
            help_text += (
                " NAME or NAME:option=value,option=value of these, with defaults: "
                f"{table.help()}."
            )
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


def read(
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
