"""Arrays that were computed once from large files, kept in a file and memory-mapped when they are needed again.

In: the files that they come from, a name, arrays. Out: the arrays, or None where nothing valid is kept. The file lies
beside its source as SOURCE.NAME.cache, or, where that folder cannot be written to, in $XDG_CACHE_HOME/visard/arrays
(~/.cache/visard/arrays). It holds the sizes and times of the sources: when one of them changes, it is made anew.

Layout: 8 bytes of magic, the length of the head as uint64, the head as JSON, the arrays at multiples of 64 bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_MAGIC = b"visardA1"
_LENGTH = struct.Struct("<Q")
_ALIGN = 64
_MAX_HEAD = 1 << 26
_TYPES = ("<i8", "<i4", "<f4", "|u1")


def load(sources: Sequence[Path], name: str) -> Arrays | None:
    """What `save` kept for these files, mapped read-only; None if there is nothing, or it is out of date or damaged."""
    stamp = _stamp(sources)
    for path in _places(sources[0], name):
        arrays = _read(path, stamp)
        if arrays is not None:
            return arrays
    return None


def save(sources: Sequence[Path], name: str, arrays: Arrays) -> Path | None:
    """Keeps arrays for `load`.

    Args:
        sources: what the arrays come from; the file lies beside the first.
        name: what they are, part of the file's name.
        arrays: of int64, int32, float32 or uint8.

    Returns:
        where; None if no place can be written to (the arrays are then computed again the next time).
    """
    entries, position = {}, 0
    for key, array in arrays.items():
        entries[key] = {"type": array.dtype.str, "shape": array.shape, "at": position}
        assert array.dtype.str in _TYPES, array.dtype
        position += -(-array.nbytes // _ALIGN) * _ALIGN
    head = json.dumps({"stamp": _stamp(sources), "arrays": entries}).encode()
    for path in _places(sources[0], name):
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(_MAGIC + _LENGTH.pack(len(head)) + head)
                for array in arrays.values():
                    file.write(bytes(-file.tell() % _ALIGN))
                    array.tofile(file)
                file.write(bytes(-file.tell() % _ALIGN))
            os.replace(partial, path)
        except OSError:  # a read-only or full disk: the next place
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            continue
        return path
    return None


def _places(source: Path, name: str) -> tuple[Path, Path]:
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "visard" / "arrays"
    digest = hashlib.blake2b(os.fsencode(source.absolute()), digest_size=12).hexdigest()
    return source.with_name(f"{source.name}.{name}.cache"), folder / f"{digest}.{name}.cache"


def _stamp(sources: Sequence[Path]) -> list[list[Any]]:
    found = [(path.name, path.stat()) for path in sources]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _read(path: Path, stamp: list[list[Any]]) -> Arrays | None:
    """A damaged file is as good as none: everything in its head is checked before an array is made."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC) + _LENGTH.size)
            if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
                return None
            (length,) = _LENGTH.unpack_from(start, len(_MAGIC))
            if length > _MAX_HEAD:
                return None
            head = json.loads(file.read(length))
            first = -(-(len(start) + length) // _ALIGN) * _ALIGN
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if head["stamp"] != stamp:
                return None
            return {str(key): _array(data, entry, first) for key, entry in head["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _array(data: mmap.mmap, entry: dict[str, Any], first: int) -> NDArray[Any]:
    shape, at = entry["shape"], entry["at"]
    sizes = [*shape, at]
    if entry["type"] not in _TYPES or not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in sizes):
        raise ValueError("no array of ours")
    return np.frombuffer(data, entry["type"], math.prod(shape), first + at).reshape(shape)
