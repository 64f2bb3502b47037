"""Crops in RecordIO: a folder as `DatasetWriter` makes it, or InsightFace's and MXNet's bare `.rec` with its `.idx`.

In: the folder or the `.rec` file. Out: `RecordDataset`. Arrays are memory-mapped; labels of a bare file are read from
its records when they are first asked for, and kept (`array_cache`) where there are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.data import array_cache
from visard.data.decode import decode_into, decode_usual
from visard.data.formats.encoded import EncodedDataset, scale_points
from visard.data.lines import Lines, Numbers
from visard.data.npy import map_npy
from visard.data.record_index import WORTH_KEEPING, image_index, whole
from visard.data.recordio import RecordFile
from visard.data.text_index import TextOffsets
from visard.data.writer import MAX_IDENTITIES, DatasetInfo
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array, UInt8Array

_LABELS_AT_ONCE = 1 << 22
_AGAIN = "prepare the data set again"


class RecordDataset(EncodedDataset):
    """A prepared folder, or a bare `.rec` with its `.idx` (without one, the file is read once to find the records).

    In a bare `.rec` the image id is the record's key and the identities are named by their numbers; `image_index` says
    which records are images.

    Args:
        path: the folder or the `.rec` file.
        size, resize: as for `open_dataset`.
        tolerant: open a damaged bare file: lost records are left out, those without a good label unlabelled, and
            `problems` names them.
    """

    def __init__(self, path: Path, size: int | None = None, resize: bool = False, *, tolerant: bool = False) -> None:
        path = Path(path)
        self._arguments = (path, size, resize, tolerant)
        self._tolerant = tolerant
        self._file = RecordFile(path if path.suffix == ".rec" and path.is_file() else path / "train.rec")
        self._labels: Int64Array | None = None
        folder = self._file.path.parent
        if (folder / "dataset.json").is_file() and self._file.path.name == "train.rec":
            own_size = self._open_prepared(folder)
        else:
            own_size = self._open_bare()
        self._own_size = own_size
        self.size = own_size if size is None else size
        self._resize = self.size != own_size
        if self._resize and not resize:
            raise UserError(
                f"{path}: its crops are {own_size} px, {self.size} px are asked for; "
                f"set the size to {own_size} or allow resizing (--data.resize)"
            )

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, self._arguments

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def labels(self) -> Int64Array:  # type: ignore[override]
        if self._labels is None:
            self._labels, _ = self._read_labels()
        return self._labels

    def encoded(self, index: int) -> bytes:
        return self._file.image(int(self._offsets[index]))

    def where(self, index: int) -> tuple[Path, int | None]:
        return self._file.path, int(self._offsets[index])

    def images_into(self, indices: Int64Array, images: UInt8Array, flipped: NDArray[np.bool_]) -> None:
        offsets, mirrored = self._offsets[indices], flipped.tolist()
        for i in decode_usual(images, self._file.data, self._file.spans(offsets.tolist()), mirrored):
            path, offset = self.where(int(indices[i]))
            file = (self.encoded(int(indices[i])), path, offset)
            decode_into(images[i : i + 1], (file,), self._resize, (mirrored[i],))

    def all_points(self, indices: Int64Array) -> Float32Array:
        if self._points is None:
            return np.full((len(indices), 5, 2), np.nan, np.float32)
        points = self._points[indices]
        return scale_points(points, self.size / self._own_size) if self._resize else points

    def _open_prepared(self, folder: Path) -> int:
        info = DatasetInfo.read(folder / "dataset.json")
        self.ids: Sequence[str] = Lines.from_file(folder / "ids.txt")
        self.identities: Sequence[str] = Lines.from_file(folder / "identities.txt")
        self._labels = map_npy(folder / "labels.npy", (info.images,), np.int64, _AGAIN)
        self._offsets: Int64Array | TextOffsets = map_npy(folder / "offsets.npy", (info.images,), np.int64, _AGAIN)
        self._points = map_npy(folder / "points.npy", (info.images, 5, 2), np.float32, _AGAIN)
        for name, found, promised in (
            ("ids.txt", len(self.ids), info.images),
            ("identities.txt", len(self.identities), info.identities),
        ):
            if found != promised:
                problem = f"has {found} lines, dataset.json says {promised}; prepare the data set again"
                raise FormatError(folder / name, problem)
        if int(self._offsets[-1]) >= self._file.size and not self._tolerant:
            raise FormatError(self._file.path, "is shorter than offsets.npy says; prepare it again", self._file.size)
        return info.size

    def _open_bare(self) -> int:
        self._classes: int | None = None
        index = image_index(self._file, tolerant=self._tolerant)
        self._index, self._offsets, self.problems = index, index.offsets, index.problems
        first = int(index.keys[0])
        self.ids = Numbers(range(first, first + len(index)) if index.consecutive else index.keys)
        classes, own_size = self._property()
        if classes is None:
            self._labels, highest = self._read_labels()
            classes = highest + 1
        self._classes = classes
        self.identities = Numbers(range(classes))
        if len(index) < WORTH_KEEPING:  # a label that is wrong is found now; of millions, when they are first needed
            _ = self.labels
        return self._first_size() if own_size is None else own_size

    def _read_labels(self) -> tuple[Int64Array, int]:
        """(N,) int64 from the records' headers, and the highest; kept in a file if there are many.

        Raises:
            FormatError: a label that is no identity's number, or above what `property` promises.
        """
        index_path = self._file.path.with_suffix(".idx")
        sources = (index_path, self._file.path) if index_path.is_file() else (self._file.path,)
        kept = array_cache.load(sources, "labels")
        if kept is not None and {"labels", "highest"} <= kept.keys() and kept["labels"].shape == (len(self),):
            labels, highest = kept["labels"], int(kept["highest"][0])
        else:
            labels, highest = self._labels_of_records()
            if len(labels) >= WORTH_KEEPING and not self.problems:
                array_cache.save(sources, "labels", {"labels": labels, "highest": np.array([highest], np.int64)})
        if self._classes is not None and self._classes <= highest:
            problem = f"says {self._classes} identities, {self._file.path.name} has label {highest}"
            problem += "; correct it or remove the file"
            raise FormatError(self._file.path.parent / "property", problem)
        return labels, highest

    def _labels_of_records(self) -> tuple[Int64Array, int]:
        self._index = whole(self._file, self._index)
        self._offsets = offsets = self._index.offsets
        assert isinstance(offsets, np.ndarray)
        labels = np.empty(len(offsets), np.int64)
        problems: list[FormatError] | None = list(self.problems) if self._tolerant else None
        highest = -1
        for start in range(0, len(labels), _LABELS_AT_ONCE):
            raw = self._file.first_labels(offsets[start : start + _LABELS_AT_ONCE], problems)
            wrong = (raw != np.floor(raw)) | ~(raw >= -1) | (raw > MAX_IDENTITIES)
            for row in np.flatnonzero(wrong):
                if problems is not None and np.isnan(raw[row]):
                    continue  # named already
                at, key = int(offsets[start + row]), self._index.key(start + int(row))
                problem = f"the label of record {key} is {raw[row]}, not an identity's number; give it one"
                if problems is None:
                    raise FormatError(self._file.path, problem, at)
                problems.append(FormatError(self._file.path, problem, at))
            labels[start : start + len(raw)] = np.where(wrong, -1, raw)
            highest = max(highest, int(labels[start : start + len(raw)].max()))
        self.problems = self.problems if problems is None else tuple(problems)
        return labels, highest

    def _property(self) -> tuple[int | None, int | None]:
        """Number of identities and crop size from InsightFace's `property`, None without one."""
        path = self._file.path.parent / "property"
        if not path.is_file():
            return None, None
        fields = path.read_text(encoding="utf-8", errors="replace").strip().split(",")
        numbers = [int(f) for f in fields if f.strip().isdecimal() and len(f) < 10]
        if len(fields) != 3 or len(numbers) != 3 or numbers[1] != numbers[2] or not 0 < numbers[1] < 1 << 16:
            raise FormatError(
                path, f"expected 'identities,size,size', got {','.join(fields)[:60]!r}; correct it or remove the file"
            )
        if numbers[0] > MAX_IDENTITIES:
            raise FormatError(
                path, f"says {numbers[0]} identities, a float32 label counts to {MAX_IDENTITIES}; correct it"
            )
        return numbers[0], numbers[1]


def _reopen(path: Path, size: int | None, resize: bool, tolerant: bool) -> RecordDataset:
    return RecordDataset(path, size, resize, tolerant=tolerant)
