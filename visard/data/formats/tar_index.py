"""Where the files in an uncompressed tar are, from its headers alone.

In: the path. Out: (name, byte offset, size) of every regular file. Python's `tarfile` reads the same, but its versions
up to 2025 can be made to loop for ever by a damaged header, and it is several times slower; it writes the shards.

Source: POSIX.1-2001 (ustar, pax), GNU tar's manual (long names, numbers in base 256).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from visard.errors import FormatError

BLOCK = 512

_NOTHING = bytes(BLOCK)
_MAX_EXTENDED = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_LEFT_OUT = tuple(bytes([c]) for c in b"123456gKDVMN")
"""Links, devices, folders, and headers that say nothing about a file's bytes."""


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the first byte, size) of the regular files, in their order.

    Raises:
        FormatError: not a tar, damaged, or cut off (it must end in a block of zeros).
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(path, "is empty; copy it again", 0)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(path, f"cannot be read ({error.strerror}); check the name and its permissions") from error
    with data:
        yield from _members(path, data)


def _members(path: Path, data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    at, name_ahead, size_ahead = 0, None, None
    while True:
        head = data[at : at + BLOCK]
        if len(head) < BLOCK:
            raise FormatError(path, "is cut off: the closing block of zeros is missing; copy it again", at)
        if head == _NOTHING:
            return
        if head[:3] == b"\x1f\x8b\x08" or head[:3] == b"BZh":
            raise FormatError(path, "is compressed; unpack it, images are compressed already", at)
        if _number(head[148:156]) != sum(head) - sum(head[148:156]) + 8 * 32:
            raise FormatError(path, "no file starts here: the header's checksum is wrong; copy the tar again", at)
        size, kind, start = _number(head[124:136]), head[156:157], at + BLOCK
        if size_ahead is not None and kind in _REGULAR:
            size = size_ahead
        if size is None or start + size > len(data):
            raise FormatError(path, f"a file of {size} bytes is cut off at {len(data)}; copy it again", at)
        following = start + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x") and size > _MAX_EXTENDED:
            raise FormatError(path, f"a name of {size} bytes, more than any file has; copy the tar again", at)
        if kind == b"L":
            name_ahead = data[start : start + size].rstrip(b"\0")
        elif kind == b"x":
            name, size_text = _pax(path, data[start : start + size], start)
            name_ahead = name_ahead if name is None else name
            size_ahead = size_ahead if size_text is None else _decimal(path, size_text, start)
        elif kind in _REGULAR:
            yield _name(head) if name_ahead is None else name_ahead.decode("utf-8", "surrogateescape"), start, size
            name_ahead = size_ahead = None
        elif kind in _LEFT_OUT:
            name_ahead, size_ahead = (name_ahead, size_ahead) if kind in (b"g", b"K") else (None, None)
        else:
            raise FormatError(
                path, f"a file of kind {kind!r} that is unknown; write the tar again as ustar, GNU or pax", at
            )
        at = following


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 if the first bit is set; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not text:
        return 0
    return int(text, 8) if all(0x30 <= c <= 0x37 for c in text) else None


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0] if head[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(path: Path, data: bytes, start: int) -> tuple[bytes | None, bytes | None]:
    """The path and the size among the records "LENGTH KEY=VALUE\\n"."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + 12].partition(b" ")
        end = at + int(length) if length.isdigit() and space else at
        key, equals, value = data[at + len(length) + 1 : end].partition(b"=")
        if end <= at or end > len(data) or not equals or not value.endswith(b"\n"):
            raise FormatError(path, "an extended header is damaged; copy the tar again", start + at)
        found[key] = value[:-1]
        at = end
    if b"GNU.sparse.major" in found or b"GNU.sparse.map" in found:
        raise FormatError(path, "holds a sparse file, which is not supported; pack it again without --sparse", start)
    return found.get(b"path"), found.get(b"size")


def _decimal(path: Path, text: bytes, start: int) -> int:
    if not text.isdigit() or len(text) > 18:
        raise FormatError(path, f"a size of {text[:20]!r} bytes is no number; copy the tar again", start)
    return int(text)
