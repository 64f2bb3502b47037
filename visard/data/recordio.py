"""RecordIO, the container of MXNet and InsightFace: `.rec` holds the records (`record_index.py` reads where they are).

In: paths and byte offsets, or payloads to write. Out: payload bytes, labels as arrays, or FormatError with file and
offset.

A record is the magic 0xced7230a, a word (upper 3 bits: 0 whole, 1 first, 2 middle, 3 last part; lower 29 bits: length
of the part), the bytes, and zeros up to the next multiple of 4; all little-endian. A payload that contains the magic
at a multiple of 4 is cut there into parts, without the magic, so that the start of a record can be found from
anywhere. The payload of an image is the struct `IfQQ` (flag, label, id, id2), `flag` float32 labels if flag > 0, and
the image file's bytes.
Source: the layout of dmlc-core's `recordio.h` and MXNet's `recordio.py`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from visard.errors import FormatError
from visard.records import Float32Array, Int64Array

MAGIC = 0xCED7230A
MAX_LENGTH = (1 << 29) - 1
"""Largest payload in bytes."""

_MAGIC_BYTES = struct.pack("<I", MAGIC)
_WORDS = struct.Struct("<II")
_WORDS_AND_FLAG = struct.Struct("<III")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = 0, 1, 2, 3
_HEADER_ROWS = 1 << 16
_FRONT = np.dtype(
    [
        ("magic", "<u4"),
        ("word", "<u4"),
        ("flag", "<u4"),
        ("label", "<f4"),
        ("id", "<u8"),
        ("id2", "<u8"),
        ("first", "<f4"),
    ]
)


@dataclass(frozen=True)
class Record:
    """An unpacked payload.

    Args:
        labels: (max(flag, 1),) float32; the header's own label if flag is 0.
        flag: number of labels behind the header, 0 = none.
        id: the record's number as its writer gave it.
        image: the image file's bytes, empty for an index record.
    """

    labels: Float32Array
    flag: int
    id: int
    image: bytes


class RecordFile:
    """A `.rec` file, memory-mapped. Pickles as its path, so that it may be handed to worker processes.

    Attributes:
        data: all of the file.

    Raises:
        FormatError: the file is missing or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise FormatError(self.path, "there is no such file; check the name") from error
        except IsADirectoryError as error:
            raise FormatError(self.path, "is a folder, not a record file; name the .rec in it") from error
        except ValueError as error:  # mmap refuses a file of 0 bytes
            raise FormatError(self.path, "is empty; copy it again", 0) from error
        self.size = len(self.data)

    def __reduce__(self) -> tuple[type[RecordFile], tuple[Path]]:
        return RecordFile, (self.path,)

    def payload(self, offset: int) -> bytes:
        """The payload of the record that starts at byte `offset`, its parts joined.

        Raises:
            FormatError: there is no whole record at `offset`.
        """
        return self._read(offset)[0]

    def record(self, offset: int) -> Record:
        """The unpacked record that starts at byte `offset`."""
        return unpack(self.payload(offset), self.path, offset)

    def image(self, offset: int) -> bytes:
        """`record(offset).image` in a third of the time: one look at the header and one copy."""
        ((start, end),) = self.spans((offset,))
        return self.data[start:end] if start else self.record(offset).image

    def spans(self, offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where the image of each record is in `data`: (start, end); (0, 0) if it is in parts or broken."""
        data, size, words = self.data, self.size, _WORDS_AND_FLAG.unpack_from
        front, behind, last = _WORDS.size + _HEADER.size, _WORDS.size, self.size - _WORDS_AND_FLAG.size
        for offset in offsets:
            if 0 <= offset <= last:
                magic, word, flag = words(data, offset)
                start, end = offset + front + 4 * flag, offset + behind + word
                if magic == MAGIC and word <= MAX_LENGTH and start <= end <= size:  # whole, since the kind bits are 0
                    yield start, end
                    continue
            yield 0, 0

    def scan(self, problems: list[FormatError] | None = None) -> Iterator[tuple[int, bytes]]:
        """(offset, payload) of every record from the file's start; needs no index.

        Args:
            problems: where given, what is wrong is added to it and the scan goes on at the next record.
        """
        offset = 0
        while offset < self.size:
            try:
                payload, following = self._read(offset)
            except FormatError as error:
                if problems is None:
                    raise
                problems.append(error)
                offset = self._next_start(offset + 4)
                continue
            yield offset, payload
            offset = following

    def _next_start(self, offset: int) -> int:
        """The first place from `offset` on where a record may begin, the file's size if there is none."""
        at = self.data.find(_MAGIC_BYTES, offset)
        while 0 <= at <= self.size - _WORDS.size:
            if at % 4 == 0 and _WORDS.unpack_from(self.data, at)[1] >> 29 in (_WHOLE, _FIRST):
                return at
            at = self.data.find(_MAGIC_BYTES, at + 1)
        return self.size

    def first_labels(self, offsets: Int64Array, problems: list[FormatError] | None = None) -> Float32Array:
        """(N,) float32: what `record(offset).labels[0]` gives, for all offsets at once (about 100 times faster).

        Args:
            offsets: (N,) int64 byte offsets of records.
            problems: where given, what is wrong is added to it, and the label is NaN.
        """
        labels = np.empty(len(offsets), np.float32)
        data = np.frombuffer(self.data, np.uint8)
        for start in range(0, len(offsets), _HEADER_ROWS):
            rows = offsets[start : start + _HEADER_ROWS]
            whole = rows <= self.size - _FRONT.itemsize
            front = data[np.where(whole, rows, 0)[:, None] + np.arange(_FRONT.itemsize)] if whole.any() else None
            if front is not None:
                fields = front.view(_FRONT)[:, 0]
                labels[start : start + len(rows)] = np.where(fields["flag"] > 0, fields["first"], fields["label"])
                length = fields["word"] & MAX_LENGTH
                whole &= (fields["magic"] == MAGIC) & (fields["word"] >> 29 == _WHOLE)
                whole &= (length >= _FRONT.itemsize - _WORDS.size) & (fields["flag"] <= (length - _HEADER.size) // 4)
                whole &= rows + _WORDS.size + length <= self.size
            for i in np.flatnonzero(~whole):  # parts, tiny records and everything that is wrong go the careful way
                try:
                    labels[start + i] = self.record(int(rows[i])).labels[0]
                except FormatError as error:
                    if problems is None:
                        raise
                    problems.append(error)
                    labels[start + i] = np.nan
        return labels

    def _read(self, offset: int) -> tuple[bytes, int]:
        """Payload and the offset of the next record."""
        parts: list[bytes] = []
        position = offset
        while True:
            if position < 0 or position + _WORDS.size > self.size:
                raise FormatError(
                    self.path, f"a record should start here but the file has {self.size} bytes; copy it again", position
                )
            magic, word = _WORDS.unpack_from(self.data, position)
            if magic != MAGIC:
                problem = f"no record starts here (found {magic:#010x}, expected {MAGIC:#010x})"
                problem += "; copy the file and its index again"
                raise FormatError(self.path, problem, position)
            part, length = word >> 29, word & MAX_LENGTH
            start = position + _WORDS.size
            following = start + (length + 3 & ~3)
            if following > self.size:
                raise FormatError(
                    self.path, f"the record of {length} bytes is cut off at {self.size}; copy the file again", position
                )
            if part not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
                raise FormatError(
                    self.path,
                    f"part kind {part} is out of order in a record of several parts; copy the file again",
                    position,
                )
            parts.append(self.data[start : start + length])
            if part == _WHOLE:
                return parts[0], following
            if part == _LAST:
                return _MAGIC_BYTES.join(parts), following
            position = following


def unpack(payload: bytes, path: str | Path, offset: int) -> Record:
    """Splits a payload into header, labels and image bytes.

    Args:
        path: file named in an error.
        offset: byte offset named in an error.

    Raises:
        FormatError: the payload is shorter than its header says.
    """
    start = _image_start(payload, path, offset)
    flag, label, identifier, _ = _HEADER.unpack_from(payload)
    if flag:
        labels = np.frombuffer(payload, "<f4", flag, _HEADER.size).astype(np.float32)
    else:
        labels = np.array([label], np.float32)
    return Record(labels=labels, flag=flag, id=identifier, image=payload[start:])


def pack(label: float | tuple[float, ...], identifier: int, image: bytes = b"") -> bytes:
    """A payload: a number becomes the header's label (flag 0), a tuple the labels behind it (flag = their count)."""
    if isinstance(label, tuple):
        labels = np.asarray(label, "<f4").tobytes()
        return _HEADER.pack(len(label), 0.0, identifier, 0) + labels + image
    return _HEADER.pack(0, label, identifier, 0) + image


def write_record(file: BinaryIO, payload: bytes) -> None:
    """Appends a payload as one record, in parts where it contains the magic.

    Raises:
        ValueError: the payload is 512 MiB or more.
    """
    if len(payload) > MAX_LENGTH:
        raise ValueError(f"a record holds at most {MAX_LENGTH} bytes, got {len(payload)}")
    parts = _split(payload)
    for i, part in enumerate(parts):
        kind = _WHOLE if len(parts) == 1 else _FIRST if i == 0 else _LAST if i == len(parts) - 1 else _MIDDLE
        file.write(_WORDS.pack(MAGIC, kind << 29 | len(part)))
        file.write(part)
    file.write(bytes(-len(parts[-1]) % 4))


def _image_start(payload: bytes, path: str | Path, offset: int) -> int:
    if len(payload) < _HEADER.size:
        raise FormatError(
            path, f"the record has {len(payload)} bytes, its header alone needs {_HEADER.size}; leave it out", offset
        )
    flag = int.from_bytes(payload[:4], "little")
    start = _HEADER.size + 4 * flag
    if start > len(payload):
        raise FormatError(
            path, f"the header promises {flag} labels, the record has {len(payload)} bytes; leave it out", offset
        )
    return start


def _split(payload: bytes) -> list[bytes]:
    """The parts between the magics that stand at multiples of 4."""
    parts: list[bytes] = []
    start, at = 0, payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0 and at + 4 <= len(payload) & ~3:
            parts.append(payload[start:at])
            start = at + 4
            at = payload.find(_MAGIC_BYTES, start)
        else:
            at = payload.find(_MAGIC_BYTES, at + 1)
    parts.append(payload[start:])
    return parts
