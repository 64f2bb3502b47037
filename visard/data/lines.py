"""Millions of strings as one sequence: image ids and identity names.

In: a UTF-8 text file, or strings. Out: `Lines`, which is indexed like a list and costs 8 bytes a line besides the text.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from visard.errors import FormatError
from visard.records import Int64Array


class Lines(Sequence[str]):
    """The lines of a UTF-8 text as a sequence that holds no Python strings: a mapped file or bytes, and 8 bytes a line.

    Millions of str objects would be copied into every forked worker, page by page, by their reference counts.
    """

    def __init__(self, text: bytes | mmap.mmap) -> None:
        self._text = text
        self._path: Path | None = None
        data = np.frombuffer(text, np.uint8)
        chunks = range(0, len(data), 1 << 24)
        ends = [np.flatnonzero(data[at : at + (1 << 24)] == ord("\n")) + at for at in chunks]
        self._ends: Int64Array = np.concatenate(ends) if ends else np.empty(0, np.int64)

    @classmethod
    def from_file(cls, path: Path) -> Lines:
        """Raises FormatError if the file is missing or its last line does not end."""
        try:
            with open(path, "rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0
                lines = cls(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise FormatError(path, "is missing; prepare the data set again") from error
        lines._path = path
        if len(lines._text) and lines._text[len(lines._text) - 1] != ord("\n"):
            raise FormatError(path, "is cut off in its last line; prepare the data set again", len(lines._text))
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
