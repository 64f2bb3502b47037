"""Byte offsets of millions of records, read from the memory-mapped text of an `.idx` when they are asked for.

In: an `.idx` file, lines of "key TAB offset". Out: `TextOffsets`, indexed like the array of its offsets, or None where
the lines are not as every writer makes them: keys one after the other and offsets that grow.

Such lines are all of one length until the key or the offset gets one more digit. So the text is at most some 30 pieces
of equal lines, whose ends bisection finds in a millisecond, however long it is. The lines between those that it looked
at are checked when they are read: the place must hold one whole line, and the key of its row. Anything else is an error
that names the byte; what a line of another key says is never taken.
"""

from __future__ import annotations

import mmap
import os
import re
from bisect import bisect_left
from pathlib import Path
from typing import overload

import numpy as np

from visard.data.index_text import MAX_DIGITS, parse_file
from visard.errors import FormatError
from visard.records import Int64Array

_LINE = re.compile(rb"(\d{1,%d})\t(\d{1,%d})\r?(?:\n|\Z)" % (MAX_DIGITS, MAX_DIGITS))
_LF = ord("\n")
_Piece = tuple[int, int, int]
_MOST_PIECES = 2 * MAX_DIGITS + 2
"""One for each number of digits of key and offset, and a last line that does not end."""


class TextOffsets:
    """Offsets of consecutive keys; made by `of`.

    Args:
        path: named in an error.
        text: the mapped file.
        first_key: the key of its first line.
        pieces: of equal lines, the whole text: (row of the first line, byte where that begins, bytes of a line).
        rows: the lines that count.
    """

    def __init__(self, path: Path, text: mmap.mmap, first_key: int, pieces: list[_Piece], rows: range) -> None:
        self._path, self._text, self._first_key, self._pieces, self._rows = path, text, first_key, pieces, rows

    @classmethod
    def of(cls, path: Path) -> TextOffsets | None:
        """The offsets of an `.idx` file, None if it has to be read as a whole: other order, gaps, blanks."""
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return None
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first = _LINE.match(text)
        if first is None:
            return None
        first_key, row, at = int(first[1]), 0, 0
        pieces: list[_Piece] = []
        while at < len(text):
            length, count = _equal_lines(text, at, first_key + row)
            if not count or len(pieces) == _MOST_PIECES:
                return None
            pieces.append((row, at, length))
            row, at = row + count, at + count * length
        return cls(path, text, first_key, pieces, range(row))

    @property
    def first_key(self) -> int:
        """The key of the first offset."""
        return self._first_key + self._rows.start

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> TextOffsets: ...
    @overload
    def __getitem__(self, index: Int64Array) -> Int64Array: ...
    def __getitem__(self, index: int | slice | Int64Array) -> int | TextOffsets | Int64Array:
        """As of an array: one offset, those of a slice without a step (nothing is read), or (n,) int64.

        Raises:
            FormatError: a line is not what its neighbours promise.
        """
        if isinstance(index, slice):
            rows = self._rows[index]
            assert rows.step == 1, index
            return TextOffsets(self._path, self._text, self._first_key, self._pieces, rows)
        if isinstance(index, np.ndarray):
            return np.array([self._offset(self._rows[i]) for i in index.tolist()], np.int64)
        return self._offset(self._rows[index])

    def read(self) -> Int64Array:
        """(N,) int64, all of them in one pass over the text, 15 times faster than line by line.

        Raises:
            FormatError: as above; lines of other lengths than promised will do here, if their keys are right.
        """
        offsets = np.empty(len(self), np.int64)
        count = 0
        for lines, position in parse_file(self._path, self._place(self._rows.start)[0]):
            lines = lines[: len(offsets) - count]
            keys = np.arange(self.first_key + count, self.first_key + count + len(lines))
            wrong = np.flatnonzero(lines[:, 0] != keys)
            if len(wrong):
                for _ in range(int(wrong[0])):
                    position = self._text.find(b"\n", position) + 1
                raise self._error(int(keys[wrong[0]]), position)
            offsets[count : count + len(lines)] = lines[:, 1]
            count += len(lines)
            if count == len(offsets):
                return offsets
        raise self._error(self.first_key + count, len(self._text))

    def _offset(self, row: int) -> int:
        at, length = self._place(row)
        offset = _offset_at(self._text, at, length, self._first_key + row)
        if offset is None:
            raise self._error(self._first_key + row, at)
        return offset

    def _place(self, row: int) -> tuple[int, int]:
        """Where the line begins and how long it is, bytes."""
        first, at, length = self._pieces[bisect_left(self._pieces, (row + 1,)) - 1]
        return at + (row - first) * length, length

    def _error(self, key: int, at: int) -> FormatError:
        found = self._text[at : at + 40].partition(b"\n")[0]
        problem = f"expected '{key} TAB offset' as the other lines promise, got {found!r}"
        return FormatError(self._path, f"{problem}; sort the lines by key, or write the index again", at)


def _equal_lines(text: mmap.mmap, at: int, key: int) -> tuple[int, int]:
    """Length and number of the equal lines from byte `at` on, the first of them with this key; 0 if it is none."""
    line = _LINE.match(text, at)
    if line is None or int(line[1]) != key:
        return 0, 0
    length = line.end() - at
    most = min((len(text) - at) // length, 10 ** len(line[1]) - key)

    def ended(i: int) -> bool:
        return _offset_at(text, at + i * length, length, key + i) is None

    return length, bisect_left(range(most), True, key=ended)


def _offset_at(text: mmap.mmap, at: int, length: int, key: int) -> int | None:
    """The offset that the line at this place says, None if it is no whole line or that of another key."""
    end = at + length
    line = _LINE.fullmatch(text, at, end)
    if line is None or int(line[1]) != key:
        return None
    begins, ends = at == 0 or text[at - 1] == _LF, end == len(text) or text[end - 1] == _LF
    return int(line[2]) if begins and ends else None
