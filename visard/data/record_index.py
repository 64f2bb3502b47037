"""Where the images of a `.rec` file are: from the text file `.idx`, or by reading the records; kept, once it is known.

In: a `RecordFile`. Out: `RecordIndex`, keys and byte offsets of the images. The text of 42 million records takes
seconds to read, so large indices are kept as arrays (`array_cache`) and memory-mapped after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.data import array_cache
from visard.data.index_text import parse_lines
from visard.data.recordio import RecordFile
from visard.errors import FormatError
from visard.records import Int64Array

WORTH_KEEPING = 1 << 18
"""Records from which on an index or labels are kept in a file; below, reading them again takes milliseconds."""

_CHUNK = 1 << 24
_TEXT_CHUNK = 1 << 22
_ROUNDED = 8
"""A float32 below 2**27 is off by at most so much."""


@dataclass(frozen=True)
class RecordIndex:
    """The images of a `.rec` file, in the order of its index.

    Args:
        keys: (N,) int64, unique; one element if they are consecutive: the first.
        offsets: (N,) int64, bytes.
        problems: what was left out, where that was asked for.
    """

    keys: Int64Array
    offsets: Int64Array
    problems: tuple[FormatError, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def consecutive(self) -> bool:
        """Whether `keys` is only the first of them."""
        return len(self.keys) == 1

    def key(self, i: int) -> int:
        """The key of image i."""
        return int(self.keys[0]) + i if self.consecutive else int(self.keys[i])


def image_index(file: RecordFile, *, tolerant: bool = False) -> RecordIndex:
    """The images of a file.

    Where record 0 has the labels (first identity record, end), as InsightFace writes, the images are the records
    1 .. first - 1, as arcface_torch takes them; otherwise all records are images.

    Args:
        tolerant: leave out records that are beyond the end or, without an index, cannot be read.

    Raises:
        FormatError: index and records do not fit together, or there is no image.
    """
    path = file.path.with_suffix(".idx")
    if not path.is_file():
        keys, offsets, problems = _scan(file, tolerant)
        return _images(file, keys, offsets, problems)
    sources = (path, file.path)
    kept = array_cache.load(sources, "index")
    if kept is not None and {"keys", "offsets"} <= kept.keys() and len(kept["keys"]) in (1, len(kept["offsets"])):
        return RecordIndex(kept["keys"], kept["offsets"])
    keys, offsets = read_index(path)
    problems = []
    beyond = offsets >= file.size
    if beyond.any():
        key, at = keys[np.flatnonzero(beyond)[0]], offsets[np.flatnonzero(beyond)[0]]
        problem = FormatError(
            path, f"record {key} is at byte {at}, {file.path.name} has {file.size} bytes; copy both files again"
        )
        if not tolerant:
            raise problem
        problems = [problem]
        keys, offsets = keys[~beyond], offsets[~beyond]
    index = _images(file, keys, offsets, problems)
    if len(index) >= WORTH_KEEPING and not problems:
        array_cache.save(sources, "index", {"keys": index.keys, "offsets": index.offsets})
    return index


def read_index(path: str | Path) -> tuple[Int64Array, Int64Array]:
    """The text file `.idx`, lines of "key TAB offset".

    Returns:
        keys: (N,) int64, in the order of the file, unique.
        offsets: (N,) int64, bytes.

    Raises:
        FormatError: a line that is not two numbers of at most 18 digits, or a key that comes twice.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            most = path.stat().st_size // 4 + 2  # a line has at least 4 bytes; what is not filled is never touched
            keys, offsets = np.empty(most, np.int64), np.empty(most, np.int64)
            position = count = 0
            while chunk := file.read(_TEXT_CHUNK):
                chunk += file.readline()  # to the end of a line
                rows = parse_lines(chunk, path, position)
                keys[count : count + len(rows)], offsets[count : count + len(rows)] = rows[:, 0], rows[:, 1]
                position, count = position + len(chunk), count + len(rows)
    except FileNotFoundError as error:
        raise FormatError(path, "there is no such file; check the name") from error
    keys, offsets = keys[:count], offsets[:count]
    if not _increasing(keys):
        ordered = np.sort(keys)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise FormatError(path, f"the key {twice[0]} comes twice; each record needs its own")
    return keys, offsets


def _images(file: RecordFile, keys: Int64Array, offsets: Int64Array, problems: list[FormatError]) -> RecordIndex:
    """Applies record 0, and shortens consecutive keys to the first."""
    if len(keys) and keys.min() == 0:
        row = int(keys.argmin())
        try:
            zero = file.record(int(offsets[row]))
        except FormatError as error:
            if not problems:
                raise
            zero = None  # a file that is damaged anyway: all that can be read counts
            problems.append(error)
        if zero is not None and zero.flag > 0:
            taken = (keys >= 1) & (keys < _first_identity(file, keys, offsets, float(zero.labels[0])))
            first = int(taken.argmax())
            run = slice(first, first + int(taken.sum()))
            chosen: slice | NDArray[np.bool_] = run if taken[run].all() else taken
            keys, offsets = keys[chosen], offsets[chosen]
    if not len(keys):
        raise FormatError(file.path, "holds no image records; is it whole?")
    if int(keys[-1]) - int(keys[0]) == len(keys) - 1 and _increasing(keys):
        keys = keys[:1]
    return RecordIndex(keys, offsets, tuple(problems))


def _first_identity(file: RecordFile, keys: Int64Array, offsets: Int64Array, promised: float) -> float:
    """The key of the first identity record, which record 0 holds as a float32: from 2**24 on only roughly.

    arcface_torch takes the rounded number, and with it up to 3 records too many or too few; here those near it are
    looked at: an identity record has labels and no image.
    """
    rounded = 1 << 24 <= promised <= len(keys) + _ROUNDED
    if not rounded or int(keys[-1]) - int(keys[0]) != len(keys) - 1 or not _increasing(keys):
        return promised
    for key in range(int(promised) - _ROUNDED, min(int(promised) + _ROUNDED, int(keys[-1])) + 1):
        record = file.record(int(offsets[key - int(keys[0])]))
        if record.flag > 0 and not record.image:
            return key
    return promised


def _increasing(keys: Int64Array) -> bool:
    """In pieces: a difference of 42 million keys would double the memory."""
    pieces = (keys[at : at + _CHUNK + 1] for at in range(0, len(keys), _CHUNK))
    return all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)


def _scan(file: RecordFile, tolerant: bool) -> tuple[Int64Array, Int64Array, list[FormatError]]:
    """Without an index: the record's own number is its key; where those are not unique, its place in the file."""
    problems: list[FormatError] = []
    found: list[tuple[int, int]] = []
    for offset, _ in file.scan(problems if tolerant else None):
        try:
            found.append((file.record(offset).id, offset))
        except FormatError as error:
            if not tolerant:
                raise
            problems.append(error)
    offsets = np.array([offset for _, offset in found], np.int64)
    numbers = {number for number, _ in found}
    unique = len(numbers) == len(found) and max(numbers, default=0) < 1 << 62
    keys = np.array([number for number, _ in found] if unique else range(len(found)), np.int64)
    return keys, offsets, problems
