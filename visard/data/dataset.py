"""Crops on disk behind one interface: image by index -> (S, S, 3) uint8 RGB, with id, label and landmarks.

In: a path or a name, to `open_dataset`. Out: a `FaceDataset`: `RecordDataset` (a prepared folder, or InsightFace's
bare `.rec/.idx`), `FolderDataset` (a folder of identities, each a folder of crops), or rendered faces. All are
map-style, without state, and pickle cheaply into worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from visard.data.decode import decode, image_size
from visard.data.lines import Lines
from visard.data.recordio import RecordFile, read_index
from visard.data.writer import MAX_IDENTITIES, DatasetInfo
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array, UInt8Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class FaceDataset(Protocol):
    """Crops with their identities.

    Attributes:
        ids: N image ids, unique.
        labels: (N,) int64 index into `identities`, -1 = unlabelled.
        identities: C names.
        size: S; every crop is S x S pixels.
    """

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Int64Array: ...

    @property
    def identities(self) -> Sequence[str]: ...

    @property
    def size(self) -> int: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> UInt8Array:
        """(S, S, 3) uint8 RGB."""

    def points(self, index: int) -> Float32Array | None:
        """(5, 2) float32 landmarks in crop pixels, or None."""


@runtime_checkable
class BatchedDataset(Protocol):
    """A data set that makes many crops at once faster than one by one."""

    def images(self, indices: Int64Array) -> UInt8Array:
        """(n,) int64 -> (n, S, S, 3) uint8 RGB."""


@runtime_checkable
class BatchedPoints(Protocol):
    """A data set that gives the landmarks of many crops at once."""

    def all_points(self, indices: Int64Array) -> Float32Array:
        """(n,) int64 -> (n, 5, 2) float32 as `FaceDataset.points`, NaN where that is None."""


def open_dataset(source: str | Path, size: int | None = None, resize: bool = False) -> FaceDataset:
    """Opens whatever holds crops.

    Args:
        source: a prepared folder, a folder with `train.rec`, a `.rec` file, a folder of identities, or
            `rendered:IDENTITIESxIMAGES[,seed=0][,first=0]`.
        size: S the caller needs, pixels; None takes the data set's own (112 for rendered faces).
        resize: scale crops of another size to `size` instead of refusing them.

    Raises:
        UserError: there is nothing of that kind, or its crops have another size.
    """
    if size is None and resize:
        raise UserError("resize needs a size to resize to")
    text = str(source)
    if text.startswith("rendered:"):
        return _open_rendered(text, size)
    path = Path(source)
    if path.is_file() and path.suffix == ".rec":
        return RecordDataset(path, size, resize)
    if (path / "dataset.json").is_file() or (path / "train.rec").is_file():
        return RecordDataset(path, size, resize)
    if path.is_dir():
        return FolderDataset(path, size, resize)
    if path.is_file():
        raise UserError(f"{path}: not a data set; give a prepared folder, a .rec file or a folder of identities")
    raise UserError(f"{path}: there is no such file or folder")


class RecordDataset:
    """A prepared folder, or InsightFace's `.rec` with its `.idx` (without one, the file is read once to find them).

    In a bare `.rec` the image id is the record's key and the identities are named by their numbers. Where record 0
    has the labels (first identity record, end), as InsightFace writes, the images are the records 1 .. first - 1, as
    arcface_torch takes them; otherwise all records are images.

    Args:
        path: the folder or the `.rec` file.
        size, resize: as for `open_dataset`.
    """

    def __init__(self, path: Path, size: int | None = None, resize: bool = False) -> None:
        path = Path(path)
        self._arguments = (path, size, resize)
        self._file = RecordFile(path if path.suffix == ".rec" and path.is_file() else path / "train.rec")
        self.ids: Sequence[str]
        self.identities: Sequence[str]
        self.labels: Int64Array
        self._points: Float32Array | None = None
        folder = self._file.path.parent
        if (folder / "dataset.json").is_file() and self._file.path.name == "train.rec":
            own_size = self._open_prepared(folder)
        else:
            own_size = self._open_bare()
        self._own_size = own_size
        self.size = own_size if size is None else size
        if self.size != own_size and not resize:
            raise UserError(
                f"{path}: its crops are {own_size} px, {self.size} px are asked for; "
                f"set the size to {own_size} or allow resizing (--data.resize)"
            )

    def __reduce__(self) -> tuple[type[RecordDataset], tuple[Path, int | None, bool]]:
        return RecordDataset, self._arguments

    def __len__(self) -> int:
        return len(self._offsets)

    def image(self, index: int) -> UInt8Array:
        offset = int(self._offsets[index])
        data = self._file.image(offset)
        return decode(data, self.size, self._own_size != self.size, self._file.path, offset)

    def points(self, index: int) -> Float32Array | None:
        (points,) = self.all_points(np.array([index]))
        return None if np.isnan(points).any() else points

    def all_points(self, indices: Int64Array) -> Float32Array:
        """(n, 5, 2) float32, NaN for a crop without landmarks; 20 times faster than one by one."""
        if self._points is None:
            return np.full((len(indices), 5, 2), np.nan, np.float32)
        points = self._points[indices]
        return points if self.size == self._own_size else scale_points(points, self.size / self._own_size)

    def encoded(self, index: int) -> bytes:
        """The crop's image file as it is in the record."""
        return self._file.image(int(self._offsets[index]))

    def _open_prepared(self, folder: Path) -> int:
        info = DatasetInfo.read(folder / "dataset.json")
        self.ids = Lines.from_file(folder / "ids.txt")
        self.identities = Lines.from_file(folder / "identities.txt")
        self.labels = _load_array(folder / "labels.npy", (info.images,), np.int64)
        self._offsets = _load_array(folder / "offsets.npy", (info.images,), np.int64)
        self._points = _load_array(folder / "points.npy", (info.images, 5, 2), np.float32)
        for name, found, promised in (
            ("ids.txt", len(self.ids), info.images),
            ("identities.txt", len(self.identities), info.identities),
        ):
            if found != promised:
                problem = f"has {found} lines, dataset.json says {promised}; prepare the data set again"
                raise FormatError(folder / name, problem)
        if int(self._offsets[-1]) >= self._file.size:
            raise FormatError(self._file.path, "is shorter than offsets.npy says; prepare it again", self._file.size)
        return info.size

    def _open_bare(self) -> int:
        path = self._file.path
        keys, offsets = self._index()
        if len(keys) and keys.min() == 0:
            zero = self._file.record(int(offsets[np.flatnonzero(keys == 0)[0]]))
            if zero.flag > 0:
                taken = (keys >= 1) & (keys < int(zero.labels[0]))
                keys, offsets = keys[taken], offsets[taken]
        if not len(keys):
            raise FormatError(path, "holds no image records")
        raw = self._file.first_labels(offsets)
        wrong = np.flatnonzero((raw != np.floor(raw)) | ~(raw >= -1) | (raw > MAX_IDENTITIES))
        if len(wrong):
            at = int(offsets[wrong[0]])
            key, label = keys[wrong[0]], raw[wrong[0]]
            raise FormatError(path, f"the label of record {key} is {label}, not an identity's number", at)
        self.labels = raw.astype(np.int64)
        self._offsets = offsets
        self.ids = Lines.from_strings(str(key) for key in keys)
        classes, own_size = self._property()
        needed = int(self.labels.max()) + 1
        if classes is not None and classes < needed:
            problem = f"says {classes} identities, {path.name} has label {needed - 1}"
            raise FormatError(path.parent / "property", problem)
        self.identities = Lines.from_strings(str(c) for c in range(classes or needed))
        return own_size

    def _index(self) -> tuple[Int64Array, Int64Array]:
        index = self._file.path.with_suffix(".idx")
        if not index.is_file():
            found = [(self._file.record(at).id, at) for at, _ in self._file.scan()]
            rows = np.array(found, np.uint64).reshape(-1, 2).astype(np.int64)
            return rows[:, 0], rows[:, 1]
        keys, offsets = read_index(index)
        beyond = np.flatnonzero(offsets >= self._file.size)
        if len(beyond):
            key, at = keys[beyond[0]], offsets[beyond[0]]
            raise FormatError(
                index, f"record {key} is at byte {at}, {self._file.path.name} has {self._file.size} bytes"
            )
        return keys, offsets

    def _property(self) -> tuple[int | None, int]:
        """Number of identities and crop size from InsightFace's `property`, otherwise the size of the first image."""
        path = self._file.path.parent / "property"
        if path.is_file():
            fields = path.read_text(encoding="utf-8", errors="replace").strip().split(",")
            if len(fields) != 3 or not all(f.strip().isdecimal() for f in fields) or fields[1] != fields[2]:
                raise FormatError(path, f"expected 'identities,size,size', got {','.join(fields)[:60]!r}")
            return int(fields[0]), int(fields[1])
        at = int(self._offsets[0])
        width, height = image_size(self._file.image(at), self._file.path, at)
        if width != height:
            raise FormatError(self._file.path, f"the first image is {width}x{height} px, not a square crop", at)
        return None, width


class FolderDataset:
    """`root/<identity>/.../<crop>`; the image id is the path below `root`. Images in `root` itself are unlabelled.

    What starts with a dot or is not an image by its suffix (.DS_Store, ._photo.jpg, Thumbs.db, lists) is left out.
    Order: by path.

    Args:
        root: the folder.
        size, resize: as for `open_dataset`; without a size, that of the first crop.
    """

    def __init__(self, root: Path, size: int | None = None, resize: bool = False) -> None:
        self.root, self._resize = Path(root), resize
        names: list[str] = []
        ids: list[str] = []
        labels: list[int] = []
        for entry in _sorted_entries(self.root):
            if entry.is_dir():
                found = [f"{entry.name}/{name}" for name in _images_below(Path(entry.path))]
                if found:
                    ids += found
                    labels += [len(names)] * len(found)
                    names.append(entry.name)
            elif _is_image(entry.name):
                ids.append(entry.name)
                labels.append(-1)
        if not ids:
            raise UserError(f"{root}: holds no images; expected a folder an identity, such as {root}/NAME/IMAGE.jpg")
        self.ids: Sequence[str] = Lines.from_strings(ids)
        self.identities: Sequence[str] = Lines.from_strings(names)
        self.labels: Int64Array = np.array(labels, np.int64)
        self.size = self._first_size() if size is None else size

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> UInt8Array:
        path = self.root / self.ids[index]
        return decode(_read(path), self.size, self._resize, path)

    def points(self, index: int) -> Float32Array | None:
        return None

    def encoded(self, index: int) -> bytes:
        """The crop's file."""
        return _read(self.root / self.ids[index])

    def _first_size(self) -> int:
        path = self.root / self.ids[0]
        width, height = image_size(_read(path), path)
        if width != height:
            raise UserError(
                f"{path}: {width}x{height} px is not a square crop; "
                f"align photographs first with `visard prepare {self.root} OUT`"
            )
        return width


def scale_points(points: Float32Array, scale: float) -> Float32Array:
    """Points after the image is resized by `scale`: the top left pixel's corner, (-0.5, -0.5), stays where it is."""
    return ((points + 0.5) * scale - 0.5).astype(np.float32)


def _open_rendered(source: str, size: int | None) -> FaceDataset:
    usage = f"{source!r}: expected rendered:IDENTITIESxIMAGES[,seed=0][,first=0], such as rendered:400x20"
    counts, *options = source.removeprefix("rendered:").split(",")
    numbers = counts.split("x")
    settings = {"seed": 0, "first": 0}
    for option in options:
        key, _, value = option.partition("=")
        if key not in settings or not value.isdecimal():
            raise UserError(usage)
        settings[key] = int(value)
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(usage)
    from visard.data.rendered import RenderedFaces

    return RenderedFaces(
        identities=int(numbers[0]),
        images_per_identity=int(numbers[1]),
        seed=settings["seed"],
        size=112 if size is None else size,
        first_identity=settings["first"],
    )


def _load_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """A memory-mapped .npy of exactly this shape and type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(path, f"cannot be read ({error}); prepare the data set again") from error
    if array.shape != shape or array.dtype != dtype:
        raise FormatError(path, f"is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; prepare it again")
    return np.asarray(array)  # a plain view: np.memmap costs microseconds at each index


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is not junk: hidden files and folders (.DS_Store, ._photo.jpg) are."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _images_below(folder: Path, prefix: str = "") -> Iterable[str]:
    for entry in _sorted_entries(folder):
        if entry.is_dir():
            yield from _images_below(Path(entry.path), f"{prefix}{entry.name}/")
        elif _is_image(entry.name):
            yield prefix + entry.name


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
