"""Several data sets as one, each with a weight.

In: data sets, names, weights. Out: `JoinedDataset`: image ids "NAME/ID", identities kept apart or merged by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import numpy as np

from visard.data.lines import Lines
from visard.data.transforms import scramble_array
from visard.errors import UserError
from visard.records import Float32Array, Int64Array, UInt8Array

SameNames = Literal["apart", "merge"]

MAX_WEIGHT = 1000.0


class _Dataset(Protocol):
    """As `visard.data.dataset.FaceDataset`, which stands above this module."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Int64Array: ...
    @property
    def identities(self) -> Sequence[str]: ...
    @property
    def size(self) -> int: ...
    def __len__(self) -> int: ...
    def image(self, index: int) -> UInt8Array: ...
    def points(self, index: int) -> Float32Array | None: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part.

    Args:
        name: put before its image ids, and before its identities where they are kept apart.
        dataset: the images.
        labelled: False = its labels are not looked at: -1 for all its images.
        weight: how often each image counts: 2 = every image twice, 0.5 = every other image, always the same ones.
    """

    name: str
    dataset: _Dataset
    weight: float = 1.0
    labelled: bool = True


class JoinedDataset:
    """The sources one after the other.

    With a weight w, an image of a source of N images comes floor(w) times, and round(w N) - floor(w) N of them, chosen
    by their number, once more. A repetition has "#1", "#2" ... behind its id, so that it is mirrored and augmented on
    its own.

    Args:
        sources: at least one, all of one crop size.
        same_names: "apart": identities are called NAME/IDENTITY, so people of two sources are never the same; "merge":
            equal names are one identity. Identities that are only numbered are kept apart in any case: 7 in two
            sources is not the same person.

    Raises:
        UserError: no source, two of one name, sizes that differ, or a weight that leaves nothing.
    """

    def __init__(self, sources: Sequence[Source], same_names: SameNames = "apart") -> None:
        if not sources:
            raise UserError("a joined data set needs at least one source; write A + B * 2")
        self._sources = tuple(sources)
        names = [source.name for source in self._sources]
        if len(set(names)) != len(names):
            raise UserError(f"two sources have the same name ({', '.join(names)}); name them otherwise")
        sizes = {source.dataset.size for source in self._sources}
        if len(sizes) > 1:
            described = ", ".join(f"{source.name} {source.dataset.size} px" for source in self._sources)
            raise UserError(f"the sources' crops differ in size ({described}); set data.size and data.resize")
        self.size = sizes.pop()
        self._rows = [_rows(source) for source in self._sources]
        self._starts = np.cumsum([0, *map(len, self._rows)])
        self.identities, self.labels = self._map_identities(same_names)
        self.ids: Sequence[str] = _JoinedIds(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int, int]:
        """(source, index in it, how often the image came before)."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self._starts, index, "right")) - 1
        inside = index - int(self._starts[part])
        return part, int(self._rows[part][inside]), inside // len(self._sources[part].dataset)

    def image(self, index: int) -> UInt8Array:
        part, row, _ = self.place(index)
        return self._sources[part].dataset.image(row)

    def points(self, index: int) -> Float32Array | None:
        part, row, _ = self.place(index)
        return self._sources[part].dataset.points(row)

    def encoded(self, index: int) -> bytes:
        """The image file of a source that has files."""
        part, row, _ = self.place(index)
        return self._of_file(part).encoded(row)

    def where(self, index: int) -> tuple[Any, int | None]:
        """The file that holds the image, and the byte offset of its record."""
        part, row, _ = self.place(index)
        return self._of_file(part).where(row)

    def all_points(self, indices: Int64Array) -> Float32Array:
        """(n, 5, 2) float32, NaN for a crop without landmarks."""
        points = np.full((len(indices), 5, 2), np.nan, np.float32)
        for part, chosen, rows in self._by_source(indices):
            dataset: Any = self._sources[part].dataset
            if hasattr(dataset, "all_points"):
                points[chosen] = dataset.all_points(rows)
                continue
            for place, row in zip(chosen.tolist(), rows.tolist(), strict=True):
                found = dataset.points(row)
                if found is not None:
                    points[place] = found
        return points

    def images(self, indices: Int64Array) -> UInt8Array:
        """(n, S, S, 3) uint8 RGB; sources that make many at once are asked for many."""
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for part, chosen, rows in self._by_source(indices):
            dataset: Any = self._sources[part].dataset
            if hasattr(dataset, "images"):
                images[chosen] = dataset.images(rows)
                continue
            for place, row in zip(chosen.tolist(), rows.tolist(), strict=True):
                images[place] = dataset.image(row)
        return images

    def _by_source(self, indices: Int64Array) -> list[tuple[int, Int64Array, Int64Array]]:
        """(source, places in `indices`, rows in the source) of the sources that take part."""
        indices = np.asarray(indices)
        parts = np.searchsorted(self._starts, indices, "right") - 1
        found = []
        for part in np.unique(parts).tolist():
            chosen = np.flatnonzero(parts == part)
            found.append((part, chosen, self._rows[part][indices[chosen] - self._starts[part]]))
        return found

    def _of_file(self, part: int) -> Any:
        source = self._sources[part]
        if not hasattr(source.dataset, "encoded"):
            raise UserError(f"{source.name}: its images are no files; write them with `visard render` first")
        return source.dataset

    def _map_identities(self, same_names: SameNames) -> tuple[Sequence[str], Int64Array]:
        places: dict[str, int] = {}
        pieces = []
        for source, rows in zip(self._sources, self._rows, strict=True):
            if not source.labelled:
                pieces.append(np.full(len(rows), -1, np.int64))
                continue
            identities = source.dataset.identities
            apart = same_names == "apart" or _numbered(identities)
            names = (f"{source.name}/{name}" if apart else name for name in identities)
            # the last element stands for -1
            labels = np.array([*(places.setdefault(name, len(places)) for name in names), -1], np.int64)
            pieces.append(labels[np.asarray(source.dataset.labels)[rows]])
        return Lines.from_strings(places), np.concatenate(pieces)


class _JoinedIds(Sequence[str]):
    def __init__(self, joined: JoinedDataset) -> None:
        self._joined = joined

    def __len__(self) -> int:
        return len(self._joined)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row, before = self._joined.place(index)
        source = self._joined._sources[part]
        return f"{source.name}/{source.dataset.ids[row]}" + (f"#{before}" if before else "")


def _rows(source: Source) -> Int64Array:
    """The rows of a source in the joined data set: all of them floor(weight) times, then a share."""
    length = len(source.dataset)
    if not (math.isfinite(source.weight) and 0 < source.weight <= MAX_WEIGHT):
        raise UserError(f"{source.name}: its weight is {source.weight}; use more than 0 and at most {MAX_WEIGHT:g}")
    count = round(source.weight * length)
    if count < 1:
        raise UserError(f"{source.name}: of {length} images, the weight {source.weight} leaves none; raise it")
    whole, rest = divmod(count, length)
    share = np.sort(np.argsort(scramble_array(np.arange(length, dtype=np.uint64)))[:rest]) if rest else np.empty(0, int)
    return np.concatenate([np.tile(np.arange(length), whole), share]).astype(np.int64)


def _numbered(identities: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2 ..., as in a bare .rec file."""
    return all(name == str(row) for row, name in enumerate(identities))
