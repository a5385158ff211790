"""Read pickles of plain values and numpy arrays, and run nothing that they name.

A pickle is a program that may call any function; `pickle.load` on a file from elsewhere
hands the machine to whoever wrote it. Here the three names that numpy needs stand for
inert records, and every other name is refused, so that a pickle gives dicts, lists,
bytes, numbers and arrays of bytes or nothing.
"""

import io
import pickle
from typing import Any

import numpy as np


class PickleError(ValueError):
    """A pickle that is damaged, or holds more than plain values; in one line."""


class _Record:
    """What a name from numpy was called with, and the state that it was given."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    pass


_ADMITTED = {
    # Of an array: _reconstruct(ndarray, (0,), "b"), then the state.
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # since numpy 2
    ("numpy", "ndarray"): _Record,
    ("numpy", "dtype"): _Record,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise PickleError(
                f"names {module}.{name}, which was not called; only plain values and "
                "numpy arrays of bytes are read"
            ) from None


def loads(content: bytes) -> Any:
    """Read a pickle.

    Args:
        content: The pickle. Texts of Python 2 are read as bytes.

    Returns:
        The object: dicts, lists, tuples, bytes, texts and numbers; where it is a dict,
        its values may be uint8 arrays.

    Raises:
        PickleError: If it is damaged, or names anything else.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except PickleError:
        raise
    except Exception as error:  # a damaged pickle raises what it likes
        words = " ".join(str(error).split())
        raise PickleError(f"is damaged ({type(error).__name__}: {words})") from None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return the array that a record stands for, and other values as they are."""
    if not isinstance(value, _Record | type):
        return value
    if isinstance(value, _Array):
        try:
            _, shape, dtype, is_fortran, values = value.state
            if dtype.args[0] in ("u1", b"u1"):
                array = np.frombuffer(values, np.uint8)
                return array.reshape(shape, order="F" if is_fortran else "C")
        except (AttributeError, IndexError, TypeError, ValueError):
            pass  # of another dtype, or a shape that does not fit the bytes
    raise PickleError("holds an array that is no array of unsigned bytes")
