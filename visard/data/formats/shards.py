"""Crops in tar shards, as webdataset lays them out: a sample is the files of one key, KEY.jpg, KEY.cls, KEY.json.

In: a `.tar`, a folder of them, or their names with a range in braces. Out: `ShardDataset`, and `ShardWriter`.

    KEY.jpg (png, webp ...)  the image
    KEY.cls                  the label as decimal digits; -1 or no such file: unlabelled
    KEY.json                 {"id", "identity", "points": [[x, y] x 5] in pixels}; each may be missing

The key is the path up to the first dot of the file name. Without "id" the image's path in the tar is its id (with the
shard's name before it where that comes twice). The offsets are found once and kept (`array_cache`); no library is
needed, and any tar reader reads what is written here.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import shutil
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from visard.data import array_cache
from visard.data.formats.encoded import EncodedDataset
from visard.data.formats.folder import IMAGE_SUFFIXES
from visard.data.formats.naming import suffix_of
from visard.data.formats.tar_index import members
from visard.data.lines import Lines, PartlyNamed, is_name
from visard.data.writer import MAX_IDENTITIES
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array

WORTH_KEEPING = 1 << 14
"""Images from which on the index is kept in a file: 16,384 take about a second to find again."""

SHARD_BYTES = 1 << 28

_TEXT = ("utf-8", "surrogateescape")
_MAX_SMALL_FILE = 1 << 20
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1 << 20
_MAX_OPEN = 64
"""Shards that are mapped at once: a process may have only so many files open."""


class ShardDataset(EncodedDataset):
    """The images of tar shards, in the order of shards and files.

    Args:
        source: a `.tar` file, a folder with `.tar` files, or a name such as `train-{000000..000031}.tar`.
        size, resize: as for `open_dataset`; without a size, that of the first image.
    """

    def __init__(self, source: str | Path, size: int | None = None, resize: bool = False) -> None:
        self._arguments = (source, size, resize)
        self._resize = resize
        self._paths = shard_paths(source)
        found = array_cache.load(self._paths, "tar")
        if found is None or set(found) != set(_COLUMNS):
            found = _index(self._paths)
            if len(found["at"]) >= WORTH_KEEPING:
                array_cache.save(self._paths, "tar", found)
        self._shard, self._at, self._bytes = found["shard"], found["at"], found["bytes"]
        self.labels: Int64Array = found["label"]
        self.ids: Sequence[str] = Lines(found["ids"].tobytes())
        count = int(found["identities"][0])
        self.identities: Sequence[str] = PartlyNamed(count, found["named"], Lines(found["names"].tobytes()))
        self._points = found["points"] if len(found["points"]) else None
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.size = self._first_size() if size is None else size

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return ShardDataset, self._arguments

    def encoded(self, index: int) -> bytes:
        shard, size = int(self._shard[index]), int(self._bytes[index])
        if shard not in self._maps:
            with open(self._paths[shard], "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > _MAX_OPEN:
                self._maps.popitem(last=False)
        at = int(self._at[index])
        data = self._maps[shard][at : at + size]
        if len(data) != size:
            raise FormatError(self._paths[shard], "the file became shorter since it was indexed; copy it again", at)
        return data

    def where(self, index: int) -> tuple[Path, int | None]:
        return self._paths[int(self._shard[index])], int(self._at[index])


class ShardWriter:
    """Context manager that writes shards OUT/000000.tar, OUT/000001.tar ...; the folder appears on a clean exit only.

    Args:
        out: folder to make; it must not exist or be empty.
        shard_bytes: a shard is closed when it has reached this size.
    """

    def __init__(self, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self._shard_bytes = Path(out), shard_bytes
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise UserError(f"{self.out} exists already; name another folder or remove it")
        self.folder = self.out.parent / f".{self.out.name}.partial"
        """Where they are built; what else is put there appears with them."""
        self._tar: tarfile.TarFile | None = None
        self._shards = self._images = 0

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed writer left
        self.folder.mkdir(parents=True)
        return self

    def add(
        self, image_id: str, label: int, identity: str | None, image: bytes, points: Float32Array | None = None
    ) -> None:
        """Appends one sample; the image's bytes are written untouched."""
        if self._tar is None:
            # ustar: plain headers that every reader knows; all names here are short
            path = self.folder / f"{self._shards:06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115, closed in __exit__
            self._shards += 1
        known: dict[str, Any] = {"id": image_id}
        if identity is not None:
            known["identity"] = identity
        if points is not None:
            known["points"] = points.tolist()
        key = f"{self._images:09d}"
        self._file(f"{key}.{suffix_of(image)}", image)
        self._file(f"{key}.cls", b"%d" % label)
        self._file(f"{key}.json", json.dumps(known).encode())
        self._images += 1
        if self._tar.offset >= self._shard_bytes:  # type: ignore[attr-defined]
            self._tar.close()
            self._tar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()
        try:
            if kind is None:
                if not self._images:
                    raise UserError(f"{self.out}: not one image was added, so nothing is written")
                if self.out.exists():
                    self.out.rmdir()  # empty, as checked at the start
                os.replace(self.folder, self.out)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def shard_paths(source: str | Path) -> list[Path]:
    """The shards that a name stands for.

    Raises:
        UserError: there is none, or one of a range is missing.
    """
    text = str(source)
    path = Path(source)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
    elif found := _RANGE.search(text):
        low, high = found.groups()
        numbers = range(int(low), int(high) + 1)
        if len(numbers) > _MAX_SHARDS or len(high) > 12:
            raise UserError(f"{text}: a range of {len(numbers)} shards")
        paths = [Path(f"{text[: found.start()]}{n:0{len(low)}d}{text[found.end() :]}") for n in numbers]
    else:
        paths = [path]
    for one in paths:
        if not one.is_file():
            raise UserError(f"{one}: there is no such shard; check the name and the range")
    if not paths:
        raise UserError(f"{text}: there are no .tar files")
    return paths


_COLUMNS = ("shard", "at", "bytes", "label", "ids", "identities", "named", "names", "points")


class _Sample:
    """What the files of one key say."""

    def __init__(self) -> None:
        self.image: tuple[str, int, int] | None = None
        self.label: int | None = None
        self.known: dict[str, Any] = {}


def _index(paths: Sequence[Path]) -> array_cache.Arrays:
    shard, at, size, label = array("i"), array("q"), array("q"), array("q")
    ids, names = bytearray(), {}
    points, any_points = array("f"), False
    seen: set[bytes] = set()
    by_name: dict[str, int] = {}
    for number, path in enumerate(paths):
        for sample in _samples(path):
            assert sample.image is not None
            name, offset, length = sample.image
            image_id = str(sample.known.get("id", name))
            if _mark(image_id) in seen and "id" not in sample.known:
                image_id = f"{path.stem}/{name}"
            if not is_name(image_id) or _mark(image_id) in seen:
                raise FormatError(
                    path,
                    f"the image id {image_id!r} comes twice, is empty or has a line break; give each its own",
                    offset,
                )
            seen.add(_mark(image_id))
            ids += image_id.encode(*_TEXT) + b"\n"
            identity = sample.known.get("identity")
            number_of = sample.label
            if number_of is None and identity is not None:
                number_of = by_name.setdefault(str(identity), len(by_name))
            number_of = -1 if number_of is None else number_of
            if number_of >= 0 and identity is not None and names.setdefault(number_of, str(identity)) != str(identity):
                problem = f"label {number_of} is {identity!r} here and {names[number_of]!r} before"
                raise FormatError(path, problem, offset)
            shard.append(number)
            at.append(offset)
            size.append(length)
            label.append(number_of)
            place = sample.known.get("points")
            points.extend([np.nan] * 10 if place is None else place)
            any_points |= place is not None
    if not len(shard):
        raise FormatError(paths[0], "holds no images; name the folder, list or shards that do")
    count = max(label) + 1
    _check_names(paths[0], names, count)
    return {
        "shard": np.frombuffer(shard, np.int32),
        "at": np.frombuffer(at, np.int64),
        "bytes": np.frombuffer(size, np.int64),
        "label": np.frombuffer(label, np.int64),
        "ids": np.frombuffer(bytes(ids), np.uint8),
        "identities": np.array([count], np.int64),
        "named": np.array(sorted(names), np.int64),
        "names": np.frombuffer("".join(f"{names[n]}\n" for n in sorted(names)).encode(*_TEXT), np.uint8),
        "points": np.frombuffer(points, np.float32)[: None if any_points else 0].reshape(-1, 5, 2),
    }


def _samples(path: Path) -> Iterator[_Sample]:
    """The samples with an image; the files of one key follow one another."""
    key, sample = None, _Sample()
    with open(path, "rb") as file:
        for name, offset, size in members(path):
            folder, slash, base = name.rpartition("/")
            if base.startswith(".") or not base:
                continue
            stem, _, suffix = base.partition(".")
            if f"{folder}{slash}{stem}" != key:
                if sample.image is not None:
                    yield sample
                key, sample = f"{folder}{slash}{stem}", _Sample()
            suffix = suffix.lower()
            if f".{suffix}" in IMAGE_SUFFIXES:
                if sample.image is not None:
                    raise FormatError(path, f"{name!r}: a second image with this key; give each its own", offset)
                sample.image = (name, offset, size)
            elif suffix in ("cls", "json"):
                if size > _MAX_SMALL_FILE:
                    raise FormatError(
                        path, f"{name!r} has {size} bytes; expected a label or a few values; correct the shard", offset
                    )
                file.seek(offset)
                data = file.read(size)
                if suffix == "cls":
                    sample.label = _label(path, name, data, offset)
                else:
                    sample.known = _known(path, name, data, offset)
        if sample.image is not None:
            yield sample


def _label(path: Path, name: str, data: bytes, offset: int) -> int:
    text = data.strip()
    if not text.removeprefix(b"-").isdigit() or len(text) > 18 or not -1 <= int(text) < MAX_IDENTITIES:
        raise FormatError(
            path, f"{name!r}: {text[:20]!r} is no identity's number; use 0, 1, 2 ... or -1 for none", offset
        )
    return int(text)


def _known(path: Path, name: str, data: bytes, offset: int) -> dict[str, Any]:
    """What a .json says of id, identity and points; other keys are let be."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"{name!r}: not JSON ({error}); correct it", offset) from error
    if not isinstance(values, dict):
        raise FormatError(path, f'{name!r}: expected an object such as {{"id": ...}}; correct it', offset)
    known = {key: values[key] for key in ("id", "identity") if isinstance(values.get(key), str | int)}
    if not all(is_name(str(value)) for value in known.values()):
        raise FormatError(path, f"{name!r}: an id or identity that is empty or has a line break; correct it", offset)
    points = values.get("points")
    if points is not None:
        try:
            place = np.asarray(points, np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(
                path, f"{name!r}: points are not five times x, y ({error}); correct them or leave them out", offset
            ) from error
        if place.shape != (5, 2) or not np.isfinite(place).all():
            raise FormatError(path, f"{name!r}: points are not five times x, y; correct them or leave them out", offset)
        known["points"] = place.ravel().tolist()
    return known


def _check_names(path: Path, names: dict[int, str], count: int) -> None:
    """No two labels have one name, given or by number."""
    numbers = (int(name) for name in names.values() if name.isdecimal() and name.isascii() and len(name) < 9)
    taken = [n for n in numbers if n < count and n not in names]
    if taken or len(set(names.values())) != len(names):
        raise FormatError(path, "two labels have the same identity's name; give each its own, or use one label")


def _mark(image_id: str) -> bytes:
    """8 bytes instead of the id: the set of a million ids stays small."""
    return hashlib.blake2b(image_id.encode(*_TEXT), digest_size=8).digest()
