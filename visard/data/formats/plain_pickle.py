"""Reads pickles of plain values and numpy arrays without executing anything.

In: the bytes of a pickle, protocol 0 to 5, of Python 2 or 3. Out: its value, from None, bool, int, float, text, bytes,
list, tuple and numpy arrays and numbers. No class is ever looked up: a name that a pickle calls is compared with the
few that arrays and byte strings need, and those are rebuilt here. A length in the file is believed only if the bytes
are there, and what calls make is counted, so reading allocates no more than a small multiple of the file; byte strings
are views of the file, not copies.

Source: the opcodes as documented in Python's `pickletools`.
"""

from __future__ import annotations

import codecs
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visard.errors import FormatError

_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
_FRAMES = ("numpy.core.numeric", "numpy._core.numeric")
_TYPES = ("b", "i", "u", "f")
"""Kinds of numbers that an array may hold; Python objects are none of them."""

_MARK = object()


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names; only compared, never imported."""

    module: str
    name: str


class _Array:
    """What `_reconstruct` leaves to be filled by BUILD."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


class _Type:
    """A numpy dtype; BUILD gives its byte order."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


def load(data: memoryview, path: str | Path) -> Any:
    """The value of a pickle; arrays in it are still to be opened by `unwrapped`.

    Args:
        data: the whole file; byte strings in the result are views of it.
        path: named in errors.

    Raises:
        FormatError: not a pickle, cut short, or one that asks for more than plain values and arrays.
    """
    reader = _Reader(data, Path(path))
    try:
        return reader.run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise FormatError(
            path, f"is not a sound pickle ({error or type(error).__name__}); fetch it again", reader.at
        ) from error


def unwrapped(value: Any) -> Any:
    """An element of what `load` gave: an array out of its shell, anything else as it is."""
    return value.value if isinstance(value, _Array) else value


class _Reader:
    """The pickle machine: a stack, marks in it, and a memo."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data, self._path = data, path
        self._position = self.at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._allowance = 8 * len(data) + 4096

    def run(self) -> Any:
        while True:
            self.at = self._position
            code = self._number(1)
            if code == 0x2E:  # STOP
                return self._stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self._refused(f"the opcode {bytes([code])!r} has no place in a list of images")
            operation(self)

    def _refused(self, what: str) -> FormatError:
        return FormatError(self._path, f"is not a plain pickle: {what}; nothing was executed", self.at)

    def _take(self, size: int) -> memoryview:
        left = len(self._data) - self._position
        if not 0 <= size <= left:
            problem = f"{size} bytes are announced, {left} are left; the file is cut short or damaged"
            raise FormatError(self._path, problem, self.at)
        start, self._position = self._position, self._position + size
        return self._data[start : self._position]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> bytes:
        """Up to the next line feed, which is left out."""
        step = 256
        end = self._position
        while True:
            piece = bytes(self._data[end : end + step])
            found = piece.find(b"\n")
            if found >= 0:
                line = bytes(self._take(end + found - self._position))
                self._position += 1
                return line
            if len(piece) < step:
                raise FormatError(self._path, "ends in the middle of a line; the file is cut short", self.at)
            end, step = end + step, step * 2

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _to_mark(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # ends in an IndexError without a mark
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("items are appended to something that is no list")
        target.extend(items)

    def _text_line(self) -> None:
        """STRING: Python 2's repr of a byte string."""
        line = self._line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string without quotes")
        self._push(codecs.escape_decode(line[1:-1])[0])  # type: ignore[attr-defined]

    def _integer_line(self) -> None:
        line = self._line()
        if line in (b"00", b"01"):  # False and True before protocol 2
            self._push(line == b"01")
        else:
            self._push(int(line.removesuffix(b"L")[:40]))

    def _long(self, size: int) -> None:
        if size > 64:
            raise ValueError(f"a number of {size} bytes")
        self._push(self._number(size, signed=True))

    def _skip(self, size: int) -> None:
        self._take(size)

    def _text(self, size: int) -> None:
        self._push(str(self._take(size), "utf-8", "surrogatepass"))

    def _tuple(self, size: int) -> None:
        at = len(self._stack) - size
        if at < 0:
            raise ValueError("too few values for a tuple")
        items = tuple(self._stack[at:])
        del self._stack[at:]
        self._push(items)

    def _pop(self) -> None:
        self._stack.pop()

    def _global(self, module: Any, name: Any) -> None:
        if (module, name) not in _ALLOWED:
            raise self._refused(f"it names {module}.{name}, which images and numbers do not need")
        self._push(_Name(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is no function")
        self._spend(arguments)
        self._push(_ALLOWED[function.module, function.name](*arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _Type):
            order = _latin(state[1])
            if order not in ("<", ">", "|", "=") or any(state[i] is not None for i in (2, 3, 4)):
                raise ValueError("a type of records or with a byte order that is unknown")
            target.dtype = target.dtype.newbyteorder(order if order != "|" else "=")
        elif isinstance(target, _Array):
            _, shape, kind, fortran, values = state
            self._spend((values,))
            target.value = _array(_bytes(values), kind, shape, "F" if fortran else "C")
        else:
            raise TypeError("a state for something that has none")

    def _remember(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _spend(self, arguments: tuple[Any, ...]) -> None:
        """The same bytes may be named again and again, and each call may copy them."""
        self._allowance -= sum(len(value) for value in arguments if isinstance(value, str | bytes | memoryview))
        if self._allowance < 0:
            raise self._refused("its calls make more bytes than the file has")


def _bytes(value: Any) -> memoryview | bytes:
    """Byte strings, or what Python 2 and protocol 2 made of them: text of Latin-1."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, bytes | memoryview):
        raise TypeError(f"{type(value).__name__} where bytes should be")
    return value


def _latin(value: Any) -> str:
    return value if isinstance(value, str) else str(bytes(_bytes(value)), "latin-1")


def _dtype(kind: Any, *_: Any) -> _Type:
    text = _latin(kind)
    if not (2 <= len(text) <= 3 and text[0] in _TYPES and text[1:].isdecimal()):
        raise ValueError(f"an array of {text!r}; numbers are expected")
    return _Type(np.dtype(text))


def _array(values: memoryview | bytes, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(shape, tuple) or len(shape) > 8:
        raise TypeError("an array without a type or a shape")
    if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * kind.dtype.itemsize != len(values):
        raise ValueError(f"an array of shape {shape} in {len(values)} bytes")
    if 0 in shape:  # the other sizes could be anything
        return np.empty(0, kind.dtype)
    return np.frombuffer(values, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: Any, values: Any) -> Any:
    return _array(_bytes(values), kind, (), "C")[()]


def _from_buffer(values: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array(_bytes(values), kind, shape, order)
    return array


def _encoded(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: how Python 3 writes bytes in protocols below 3."""
    if _latin(encoding) not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded as {encoding!r}")
    return str(text).encode("latin-1")


def _empty_array(kind: Any, shape: Any, code: Any) -> _Array:
    if kind != _Name("numpy", "ndarray"):
        raise TypeError("an array of another class than numpy's own")
    return _Array()


def _not_called(*_: Any) -> Any:
    raise TypeError("numpy.ndarray is called")


_ALLOWED: dict[tuple[Any, Any], Callable[..., Any]] = {
    ("numpy", "ndarray"): _not_called,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): lambda *values: b"" if not values else bytes(_bytes(*values)),
    ("builtins", "bytes"): lambda *values: b"" if not values else bytes(_bytes(*values)),
    **{(module, "_reconstruct"): _empty_array for module in _NUMPY_CORE},
    **{(module, "scalar"): _scalar for module in _NUMPY_CORE},
    **{(module, "_frombuffer"): _from_buffer for module in _FRAMES},
}

_R = _Reader
_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    ord(code): operation
    for code, operation in {
        "\x80": lambda r: r._skip(1),  # PROTO
        "\x95": lambda r: r._skip(8),  # FRAME
        "(": lambda r: r._push(_MARK),
        "0": _R._pop,
        "N": lambda r: r._push(None),
        "\x88": lambda r: r._push(True),
        "\x89": lambda r: r._push(False),
        "I": _R._integer_line,
        "L": _R._integer_line,
        "J": lambda r: r._push(r._number(4, signed=True)),
        "K": lambda r: r._push(r._number(1)),
        "M": lambda r: r._push(r._number(2)),
        "\x8a": lambda r: r._long(r._number(1)),
        "\x8b": lambda r: r._long(r._number(4)),
        "F": lambda r: r._push(float(r._line()[:64])),
        "G": lambda r: r._push(struct.unpack(">d", r._take(8))[0]),
        "S": _R._text_line,
        "T": lambda r: r._push(r._take(r._number(4))),
        "U": lambda r: r._push(r._take(r._number(1))),
        "B": lambda r: r._push(r._take(r._number(4))),
        "C": lambda r: r._push(r._take(r._number(1))),
        "\x8e": lambda r: r._push(r._take(r._number(8))),
        "\x96": lambda r: r._push(r._take(r._number(8))),  # BYTEARRAY8
        "V": lambda r: r._push(str(r._line(), "raw-unicode-escape")),
        "X": lambda r: r._text(r._number(4)),
        "\x8c": lambda r: r._text(r._number(1)),
        "\x8d": lambda r: r._text(r._number(8)),
        "]": lambda r: r._push([]),
        "l": lambda r: r._push(r._to_mark()),
        "a": lambda r: r._append([r._stack.pop()]),
        "e": lambda r: r._append(r._to_mark()),
        ")": lambda r: r._push(()),
        "t": lambda r: r._push(tuple(r._to_mark())),
        "\x85": lambda r: r._tuple(1),
        "\x86": lambda r: r._tuple(2),
        "\x87": lambda r: r._tuple(3),
        "p": lambda r: r._remember(int(r._line()[:10])),
        "q": lambda r: r._remember(r._number(1)),
        "r": lambda r: r._remember(r._number(4)),
        "\x94": lambda r: r._remember(len(r._memo)),
        "g": lambda r: r._push(r._memo[int(r._line()[:10])]),
        "h": lambda r: r._push(r._memo[r._number(1)]),
        "j": lambda r: r._push(r._memo[r._number(4)]),
        "c": lambda r: r._global(str(r._line(), "ascii"), str(r._line(), "ascii")),
        "\x93": _R._stack_global,
        "R": _R._reduce,
        "b": _R._build,
    }.items()
}
