"""Millions of strings as one sequence: image ids and identity names.

In: a UTF-8 text file, strings, or numbers. Out: `Lines`, which is indexed like a list and costs 8 bytes a line besides
the text, `Numbers` and `PartlyNamed`, whose strings are made when they are asked for, and `is_name`: can it be a line?
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from visard.data import array_cache
from visard.errors import FormatError
from visard.records import Int64Array

WORTH_KEEPING = 1 << 24
"""Bytes of a text from which on the ends of its lines are kept in a file (`array_cache`)."""

_CHUNK = 1 << 24


class Lines(Sequence[str]):
    """The lines of a UTF-8 text as a sequence that holds no Python strings: a mapped file or bytes, and 8 bytes a line.

    Millions of str objects would be copied into every forked worker, page by page, by their reference counts.
    """

    def __init__(self, text: bytes | mmap.mmap, ends: Int64Array | None = None) -> None:
        self._text = text
        self._path: Path | None = None
        self._ends = _line_ends(text) if ends is None else ends

    @classmethod
    def from_file(cls, path: Path) -> Lines:
        """The lines of a file; where they end is kept for the next time if it is large.

        Raises:
            FormatError: the file is missing or its last line does not end.
        """
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError as error:
            raise FormatError(path, "is missing; prepare the data set again") from error
        if size and text[size - 1] != ord("\n"):
            raise FormatError(path, "is cut off in its last line; prepare the data set again", size)
        ends: Int64Array | None = None
        if size >= WORTH_KEEPING:
            kept = array_cache.load((path,), "lines")
            if kept is not None and len(kept.get("ends", ())) and kept["ends"][-1] == size - 1:
                ends = kept["ends"]
            else:
                ends = _line_ends(text)
                array_cache.save((path,), "lines", {"ends": ends})
        lines = cls(text, ends)
        lines._path = path
        return lines

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> Lines:
        """Strings without line breaks."""
        return cls("".join(f"{s}\n" for s in strings).encode("utf-8", "surrogateescape"))

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return (Lines.from_file, (self._path,)) if self._path else (Lines, (self._text,))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]  # IndexError beyond the last one
        start = 0 if index in (0, -len(self._ends)) else self._ends[index - 1] + 1
        return self._text[start:end].decode("utf-8", "surrogateescape")

    def take(self, indices: Int64Array) -> tuple[str, ...]:
        """`tuple(self[i] for i in indices)`, for (n,) int64 of 0 or more, in half the time."""
        starts, ends = np.where(indices > 0, self._ends[indices - 1] + 1, 0).tolist(), self._ends[indices].tolist()
        text = self._text
        return tuple([text[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, ends, strict=True)])


def take(strings: Sequence[str], indices: Int64Array) -> tuple[str, ...]:
    """Many strings of a sequence: `tuple(strings[i] for i in indices)`."""
    if isinstance(strings, Lines):
        return strings.take(indices)
    return tuple([strings[i] for i in indices.tolist()])


class Numbers(Sequence[str]):
    """Whole numbers as a sequence of their decimal strings.

    Args:
        numbers: a range, or (N,) int64, perhaps memory-mapped.
    """

    def __init__(self, numbers: range | Int64Array) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [str(number) for number in self._numbers[index]]
        return str(self._numbers[index])


class PartlyNamed(Sequence[str]):
    """Names of labels of which only some are known: the others are called by their number.

    Args:
        count: C, labels are 0 .. C - 1.
        labels: (K,) int64 increasing, those that have a name.
        names: K names.
    """

    def __init__(self, count: int, labels: Int64Array, names: Sequence[str]) -> None:
        assert len(labels) == len(names), (len(labels), len(names))
        self._range, self._labels, self._names = range(count), labels, names

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in self._range[index]]
        label = self._range[index]
        place = int(np.searchsorted(self._labels, label))
        named = place < len(self._labels) and self._labels[place] == label
        return self._names[place] if named else str(label)


def _line_ends(text: bytes | mmap.mmap) -> Int64Array:
    """(N,) int64, the places of the line feeds; counted first, so that memory is taken once."""
    data = np.frombuffer(text, np.uint8)
    chunks = range(0, len(data), _CHUNK)
    ends = np.empty(sum(int(np.count_nonzero(data[at : at + _CHUNK] == ord("\n"))) for at in chunks), np.int64)
    count = 0
    for at in chunks:
        found = np.flatnonzero(data[at : at + _CHUNK] == ord("\n"))
        np.add(found, at, out=ends[count : count + len(found)])
        count += len(found)
    return ends


def is_name(text: str) -> bool:
    """Whether an id or identity can be a line: not empty, no line break, UTF-8 or bytes that were a file's name."""
    if not text or "\n" in text or "\r" in text:
        return False
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True
