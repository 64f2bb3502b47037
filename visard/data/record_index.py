"""Where the images of a `.rec` file are: from the text file `.idx`, or by reading the records.

In: a `RecordFile`. Out: `RecordIndex`, keys and byte offsets of the images. The text of 42 million records takes
seconds to read. Where its lines are in order, each is read when it is needed (`text_index`); where not, or once all
offsets were needed, they are kept as arrays (`array_cache`) and memory-mapped from then on.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.data import array_cache
from visard.data.index_text import parse_file
from visard.data.recordio import RecordFile
from visard.data.text_index import TextOffsets
from visard.errors import FormatError
from visard.records import Int64Array

WORTH_KEEPING = 1 << 18
"""Records from which on an index is not read as a whole, and it and the labels are kept in a file; below, reading them
again takes milliseconds."""

_CHUNK = 1 << 24
_ROUNDED = 8
"""A float32 below 2**27 is off by at most so much."""


@dataclass(frozen=True)
class RecordIndex:
    """The images of a `.rec` file, in the order of its index.

    Args:
        keys: (N,) int64, unique; one element if they are consecutive: the first.
        offsets: (N,) int64, bytes, or as good as that; `whole` makes an array of them.
        problems: what was left out, where that was asked for.
    """

    keys: Int64Array
    offsets: Int64Array | TextOffsets
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
    kept = _kept(file)
    if kept is not None:
        return kept
    text = None if tolerant else TextOffsets.of(path)
    if text is not None and len(text) >= WORTH_KEEPING and text[-1] < file.size:
        return _images(file, np.array([text.first_key]), text, [])
    keys, offsets = read_index(path)
    problem = _beyond(file, keys, offsets)
    if problem is None:
        return _keep(file, _images(file, keys, offsets, []))
    if not tolerant:
        raise problem
    inside = offsets < file.size
    return _images(file, keys[inside], offsets[inside], [problem])


def whole(file: RecordFile, index: RecordIndex) -> RecordIndex:
    """The same index with its offsets as an array, for those who need them all; from then on it is kept.

    Raises:
        FormatError: a line of the index that was not looked at before is wrong.
    """
    if not isinstance(index.offsets, TextOffsets):
        return index
    offsets = index.offsets.read()
    problem = _beyond(file, index.keys, offsets)
    if problem is not None:
        raise problem
    return _keep(file, replace(index, offsets=offsets))


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
        most = path.stat().st_size // 4 + 2  # a line has at least 4 bytes; what is not filled is never touched
        keys, offsets = np.empty(most, np.int64), np.empty(most, np.int64)
        count = 0
        for rows, _ in parse_file(path):
            keys[count : count + len(rows)], offsets[count : count + len(rows)] = rows[:, 0], rows[:, 1]
            count += len(rows)
    except FileNotFoundError as error:
        raise FormatError(path, "there is no such file; check the name") from error
    keys, offsets = keys[:count], offsets[:count]
    if not _increasing(keys):
        ordered = np.sort(keys)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise FormatError(path, f"the key {twice[0]} comes twice; each record needs its own")
    return keys, offsets


def _kept(file: RecordFile) -> RecordIndex | None:
    kept = array_cache.load((file.path.with_suffix(".idx"), file.path), "index")
    if kept is None or not {"keys", "offsets"} <= kept.keys() or len(kept["keys"]) not in (1, len(kept["offsets"])):
        return None
    return RecordIndex(kept["keys"], kept["offsets"])


def _keep(file: RecordFile, index: RecordIndex) -> RecordIndex:
    """The same index, kept and mapped if it is large and there is a place for it."""
    assert isinstance(index.offsets, np.ndarray)
    if len(index) < WORTH_KEEPING:
        return index
    sources = (file.path.with_suffix(".idx"), file.path)
    if array_cache.save(sources, "index", {"keys": index.keys, "offsets": index.offsets}) is None:
        return index
    return _kept(file) or index


def _beyond(file: RecordFile, keys: Int64Array, offsets: Int64Array) -> FormatError | None:
    """What is wrong if a record begins beyond the end of the file.

    Args:
        keys: as those of `RecordIndex`.
    """
    for start in range(0, len(offsets), _CHUNK):
        beyond = np.flatnonzero(offsets[start : start + _CHUNK] >= file.size)
        if len(beyond):
            row = start + int(beyond[0])
            problem = f"record {RecordIndex(keys, offsets).key(row)} is at byte {offsets[row]}, "
            problem += f"{file.path.name} has {file.size} bytes; copy both files again"
            return FormatError(file.path.with_suffix(".idx"), problem)
    return None


def _images(
    file: RecordFile, keys: Int64Array, offsets: Int64Array | TextOffsets, problems: list[FormatError]
) -> RecordIndex:
    """Applies record 0, and shortens consecutive keys to the first."""
    keys = _shortened(keys)
    if len(keys) and keys.min() == 0:
        try:
            zero = file.record(int(offsets[int(keys.argmin())]))
        except FormatError as error:
            if not problems:
                raise
            zero = None  # a file that is damaged anyway: all that can be read counts
            problems.append(error)
        if zero is not None and zero.flag > 0:
            promised = float(zero.labels[0])
            if len(keys) == 1:  # consecutive: a row is a key
                end = bisect_left(range(len(offsets)), _first_identity(file, offsets, promised))
                keys, offsets = keys + 1, offsets[1:end]
            else:
                taken = (keys >= 1) & (keys < promised)
                first = int(taken.argmax())
                run = slice(first, first + int(taken.sum()))
                chosen: slice | NDArray[np.bool_] = run if taken[run].all() else taken
                keys, offsets = _shortened(keys[chosen]), offsets[chosen]  # type: ignore[index]
    if not len(offsets):
        raise FormatError(file.path, "holds no image records; is it whole?")
    return RecordIndex(keys, offsets, tuple(problems))


def _first_identity(file: RecordFile, offsets: Int64Array | TextOffsets, promised: float) -> float:
    """The key of the first identity record, which record 0 holds as a float32: from 2**24 on only roughly.

    arcface_torch takes the rounded number, and with it up to 3 records too many or too few; here those near it are
    looked at: an identity record has labels and no image.

    Args:
        offsets: of the keys 0, 1, 2 ...
    """
    if not 1 << 24 <= promised <= len(offsets) + _ROUNDED:
        return promised
    for key in range(int(promised) - _ROUNDED, min(int(promised) + _ROUNDED + 1, len(offsets))):
        record = file.record(int(offsets[key]))
        if record.flag > 0 and not record.image:
            return key
    return promised


def _shortened(keys: Int64Array) -> Int64Array:
    """The first of consecutive keys; others as they are."""
    if len(keys) and int(keys[-1]) - int(keys[0]) == len(keys) - 1 and _increasing(keys):
        return keys[:1].copy()  # a view would hold them all
    return keys


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
