"""The text of an `.idx` file, "key TAB offset" a line, as arrays.

In: whole lines, or the file. Out: (n, 2) int64, or FormatError with file and byte. Lines of equal length, of which an
index has long runs (its numbers grow), are read eight digits at a time by arithmetic on 64-bit words: 42 million lines
in 1 to 2 s. Other lines are read digit by digit, and take ten times as long.

Letters: R rows (lines).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError
from visard.records import Int64Array

MAX_DIGITS = 18

_CHUNK = 1 << 22
_ROWS = 1 << 13
"""Lines read at once: what is made of them stays in the cache."""
_FEW = 64
"""A run of fewer lines of one length is left to the other way."""
_TAB, _LF, _ZERO = ord("\t"), ord("\n"), ord("0")
_PAD = bytes(8)
_ZEROS = np.uint64(0x3030303030303030)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_SIXES = np.uint64(0x0606060606060606)
_PAIRS = np.uint64(0x000000FF000000FF)


def parse_file(path: Path, start: int = 0) -> Iterator[tuple[Int64Array, int]]:
    """(R, 2) int64, keys and offsets of some 100,000 lines after the other, and the byte where those begin.

    Args:
        start: byte at which a line begins, and the first one that is read.

    Raises:
        FormatError: as `parse_lines`.
    """
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            chunk += file.readline()  # to the end of a line
            yield parse_lines(chunk, path, start), start
            start += len(chunk)


def parse_lines(text: bytes, path: Path, position: int) -> Int64Array:
    """(R, 2) int64: keys and offsets.

    Args:
        text: whole lines; LF or CR LF ends them, the last one may lack it.
        path: named in an error.
        position: of `text` in the file, bytes.

    Raises:
        FormatError: a line that is not two numbers of at most `MAX_DIGITS` digits.
    """
    if not text.endswith(b"\n"):
        text += b"\n"
    data = np.frombuffer(text + _PAD, np.uint8)
    parts: list[Int64Array] = []
    at, size = 0, len(text)
    while at < size:
        rows, length = _equal_lines(text, data, at)
        if len(rows) >= _FEW:
            parts.append(rows)
            at += len(rows) * length
            continue
        end = text.find(b"\n", min(at + (1 << 12), size - 1)) + 1
        parts.append(_any_lines(text[at:end], path, position + at))
        at = end
    return np.concatenate(parts) if len(parts) != 1 else parts[0]


def _equal_lines(text: bytes, data: NDArray[np.uint8], at: int) -> tuple[Int64Array, int]:
    """The lines from byte `at` on that are as the first one, at most `_ROWS`, and how long they are.

    Args:
        data: the bytes of `text`, and 8 more.
    """
    none = np.empty((0, 2), np.int64)
    tab, end = text.find(b"\t", at, at + MAX_DIGITS + 1), text.find(b"\n", at, at + 2 * MAX_DIGITS + 3)
    length, of_key, of_offset = end + 1 - at, tab - at, end - tab - 1
    if tab < 0 or end < 0 or not (of_key > 0 and 0 < of_offset <= MAX_DIGITS):
        return none, length
    count = min(_ROWS, (len(text) - at) // length)
    lines = data[at : at + count * length].reshape(count, length)
    alike = (lines[:, of_key] == _TAB) & (lines[:, -1] == _LF)
    if not alike.all():
        count = int(alike.argmin())
    rows = np.empty((count, 2), np.int64)
    good = np.ones(count, bool)
    for column, (first, digits) in enumerate(((0, of_key), (of_key + 1, of_offset))):
        rows[:, column], are_digits = _numbers(data, at + first, length, count, digits)
        good &= are_digits
    return (rows if good.all() else rows[: int(good.argmin())]), length


def _numbers(
    data: NDArray[np.uint8], at: int, stride: int, count: int, digits: int
) -> tuple[Int64Array, NDArray[np.bool_]]:
    """(R,) numbers of so many digits each, `stride` bytes apart, and whether these are digits at all."""
    values = np.zeros(count, np.uint64)
    good = np.ones(count, bool)
    for first in range(0, digits, 8):
        width = min(8, digits - first)
        words = np.ndarray((count,), "<u8", data, at + first, (stride,)).astype(np.uint64)
        missing = np.uint64(8 * (8 - width))
        if width < 8:  # leading zeros in place of what follows the number
            words = (words << missing) | (_ZEROS >> np.uint64(8 * width))
        good &= ((words & _HIGH) == _ZEROS) & (((words + _SIXES) & _HIGH) == _ZEROS)
        values *= np.uint64(10**width)
        values += _eight_digits(words)
    return values.astype(np.int64), good


def _eight_digits(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(R,) the number that 8 ASCII digits write, the first one in the lowest byte: digits, pairs, fours at a time."""
    words = words - _ZEROS
    words = words * np.uint64(10) + (words >> np.uint64(8))
    upper = (words & _PAIRS) * np.uint64(100 + (1_000_000 << 32))
    lower = (words >> np.uint64(16) & _PAIRS) * np.uint64(1 + (10_000 << 32))
    return (upper + lower) >> np.uint64(32)


def _any_lines(chunk: bytes, path: Path, position: int) -> Int64Array:
    """(R, 2) int64 from whole lines, by one pass a digit."""
    text = chunk.replace(b"\r\n", b"\n")
    data = np.frombuffer(text, np.uint8)
    digits: NDArray[np.uint8] = data - np.uint8(_ZERO)
    ends = np.flatnonzero(digits > 9)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    good = len(ends) % 2 == 0 and (data[ends[0::2]] == _TAB).all() and (data[ends[1::2]] == _LF).all()
    if not good or lengths.min() < 1 or lengths.max() > MAX_DIGITS:
        raise _line_error(chunk, path, position)
    values = np.zeros(len(ends), np.int64)
    for place in range(int(lengths.max())):
        at = ends - 1 - place
        values += np.where(at >= starts, digits[at], 0).astype(np.int64) * 10**place
    return values.reshape(-1, 2)


def _line_error(chunk: bytes, path: Path, position: int) -> FormatError:
    """The first wrong line of a chunk that holds one."""
    for line in chunk.splitlines(keepends=True):
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != 2 or not all(f.isdigit() and len(f) <= MAX_DIGITS for f in fields):
            break
        position += len(line)
    return FormatError(path, f"expected 'key TAB offset', got {line[:40]!r}; write the index again", position)
