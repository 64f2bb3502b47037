"""Crops on disk behind one interface: image by index -> (S, S, 3) uint8 RGB, with id, label and landmarks.

In: a path or a name, to `open_dataset`. Out: a `FaceDataset`: one of the kinds in `formats/`, rendered faces, or
several of them joined. All are map-style, without state, and pickle cheaply into worker processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from visard.data.formats.folder import FolderDataset
from visard.data.formats.joined import JoinedDataset, SameNames, Source
from visard.data.formats.lists import SUFFIXES as LIST_SUFFIXES
from visard.data.formats.lists import ListDataset
from visard.data.formats.pair_bin import PairBinDataset
from visard.data.formats.records import RecordDataset
from visard.data.formats.retrieval_lists import RetrievalList, is_retrieval_list
from visard.data.formats.shards import ShardDataset
from visard.data.framing import Photographs, shorter_side
from visard.data.parts import MADE, split_part
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Framing, Int64Array, UInt8Array

__all__ = [
    "BatchedDataset",
    "BatchedPoints",
    "FaceDataset",
    "FolderDataset",
    "JoinedDataset",
    "ListDataset",
    "PairBinDataset",
    "RecordDataset",
    "ShardDataset",
    "WritingDataset",
    "open_dataset",
]


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
class WritingDataset(Protocol):
    """A data set that writes crops where they belong: a copy and an allocation less for each."""

    def images_into(self, indices: Int64Array, images: UInt8Array, flipped: NDArray[np.bool_]) -> None:
        """Writes the crops of (n,) int64 into `images`, (n, S, S, 3) uint8, contiguous; mirrored where `flipped`."""


@runtime_checkable
class BatchedPoints(Protocol):
    """A data set that gives the landmarks of many crops at once."""

    def all_points(self, indices: Int64Array) -> Float32Array:
        """(n,) int64 -> (n, 5, 2) float32 as `FaceDataset.points`, NaN where that is None."""


def open_dataset(
    source: str | Path,
    size: int | None = None,
    resize: bool = False,
    *,
    same_names: SameNames = "apart",
    tolerant: bool = False,
    framing: Framing = "crop",
    unlabelled: str = "",
) -> FaceDataset:
    """Opens whatever holds crops.

    Args:
        source: a prepared folder, a folder with `train.rec`, a `.rec` file, a folder of identities, a `.bin` pair set,
            tar shards (a `.tar`, a folder of them, `train-{000..031}.tar`), a list (`.lst`, `.txt`, `.tsv`, `.list`),
            `rendered:IDENTITIESxIMAGES[,seed=0][,first=0]`, drawn characters `strokes:...` likewise, or several of
            these: `A + B * 2` (B counts twice) or a
            `.json` file {"sources": [{"source": A, "name": "a", "weight": 1}, ...], "same_names": "apart"}.
            `FOLDER#nested` is a folder whose innermost folders are the identities. In-Shop's list is opened in parts,
            `list_eval_partition.txt#train` and `#test`; SOP's are `Ebay_train.txt` and `Ebay_test.txt`.
        size: S the caller needs, pixels; None takes the data set's own (112 for rendered faces).
        resize: scale crops of another size to `size` instead of refusing them.
        same_names: what identities of one name in several sources are, see `JoinedDataset`.
        unlabelled: more sources, joined as by `A + B`, whose labels are not looked at; a `.json` file has
            "labelled": false for such.
        tolerant: open damaged records as far as they can be read, see `RecordDataset`.
        framing: "photograph" = images may have any shape; crops are their centres, see `Photographs`.

    Raises:
        UserError: there is nothing of that kind, or its crops have another size.
    """
    if framing == "photograph":
        if size is None:
            raise UserError(f"{source}: photographs need a size that they are cut to")
        side = shorter_side(size)
        inner = open_dataset(source, side, resize=True, same_names=same_names, tolerant=tolerant, unlabelled=unlabelled)
        return Photographs(inner, size)
    if size is None and resize:
        raise UserError("resize needs a size to resize to")
    text, path = str(source), Path(source)
    if unlabelled:
        parts, of_file = _parts_of(text)
        more = [replace(part, labelled=False) for part in _parts_of(unlabelled)[0]]
        return _join([*parts, *more], size, resize, of_file or same_names, tolerant)
    if not path.exists():
        if " + " in text or " * " in text:
            parts = [_part(part, Path()) for part in text.split(" + ")]
            return _join(parts, size, resize, same_names, tolerant)
        if text.startswith(MADE):
            return _open_made(text, size)
        if path.suffix == ".tar" and "{" in text:
            return ShardDataset(text, size, resize)
        place, part = split_part(text)
        if part:
            return _open_part(Path(place), part, size, resize)
        raise UserError(f"{path}: there is no such file or folder; check the name")
    if path.is_dir():
        if (path / "dataset.json").is_file() or (path / "train.rec").is_file():
            return RecordDataset(path, size, resize, tolerant=tolerant)
        return ShardDataset(path, size, resize) if _has_shards(path) else FolderDataset(path, size, resize)
    if path.suffix == ".rec":
        return RecordDataset(path, size, resize, tolerant=tolerant)
    if path.suffix == ".bin":
        return PairBinDataset(path, size, resize)
    if path.suffix == ".tar":
        return ShardDataset(path, size, resize)
    if path.suffix == ".json":
        parts, same_names = _read_sources(path)
        return _join(parts, size, resize, same_names, tolerant)
    if path.suffix in LIST_SUFFIXES:
        return RetrievalList(path, "", size, resize) if is_retrieval_list(path) else ListDataset(path, size, resize)
    raise UserError(
        f"{path}: not a data set; give a prepared folder, a folder of identities, a .rec, .bin or .tar file or a list"
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One source of several, not opened yet, as a `.json` file names it."""

    source: str
    name: str = ""
    weight: float = 1.0
    labelled: bool = True


def _join(
    parts: Sequence[_Part], size: int | None, resize: bool, same_names: SameNames, tolerant: bool
) -> JoinedDataset:
    opened = []
    for part in parts:
        dataset = open_dataset(part.source, size, resize, same_names=same_names, tolerant=tolerant)
        opened.append(Source(name=part.name, dataset=dataset, weight=part.weight, labelled=part.labelled))
    return JoinedDataset(opened, same_names)


def _parts_of(source: str) -> tuple[list[_Part], SameNames | None]:
    """The sources that a text names, one or several; and how a `.json` file wants equal names treated."""
    if not Path(source).exists():
        return [_part(part, Path()) for part in source.split(" + ")], None
    if Path(source).suffix == ".json":
        return _read_sources(Path(source))
    return [_in_folder(source, "", 1.0, Path())], None


def _part(text: str, folder: Path) -> _Part:
    """`SOURCE` or `SOURCE * WEIGHT`; the name is the path's last word."""
    source, star, weight = text.strip().rpartition(" * ")
    if not star:
        source, weight = weight, "1"
    try:
        number = float(weight)
    except ValueError as error:
        raise UserError(f"{text!r}: {weight!r} is no weight; write SOURCE * 2") from error
    if not source.strip():
        raise UserError(f"{text!r}: a source is missing; write A + B * 2")
    return _in_folder(source.strip(), "", number, folder)


def _in_folder(source: str, name: str, weight: float, folder: Path) -> _Part:
    made = source.startswith(MADE)
    name = name or (source.replace(":", "-").replace(",", "-") if made else Path(source).stem)
    return _Part(source=source if made else str(folder / source), name=name, weight=weight)


def _read_sources(path: Path) -> tuple[list[_Part], SameNames]:
    """A `.json` of sources; their paths are below its folder."""
    from visard.config import from_dict

    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(path, f"cannot be read as JSON ({error}); correct it") from error
    known = {"sources", "same_names"}
    if not isinstance(values, dict) or not set(values) <= known or not isinstance(values.get("sources"), list):
        raise FormatError(path, 'expected {"sources": [{"source": ..., "name": ..., "weight": 1}], "same_names": ...}')
    same_names = values.get("same_names", "apart")
    if same_names not in ("apart", "merge"):
        raise FormatError(path, f"same_names is {same_names!r}; use 'apart' or 'merge'")
    entries = [from_dict(_Part, value, where=f"{path}: sources[{i}]") for i, value in enumerate(values["sources"])]
    for entry in entries:
        if entry.source.endswith(".json") or " + " in entry.source or " * " in entry.source:
            raise FormatError(path, f"{entry.source!r}: a source of several is one data set, not several again")
    return [_in_folder(e.source, e.name, e.weight, path.parent) for e in entries], same_names


def _open_part(path: Path, part: str, size: int | None, resize: bool) -> FaceDataset:
    if path.is_dir():
        if part != "nested":
            raise UserError(
                f"{path}#{part}: of a folder there is #nested, which makes its innermost folders identities"
            )
        return FolderDataset(path, size, resize, nested=True)
    if path.suffix in LIST_SUFFIXES and is_retrieval_list(path):
        return RetrievalList(path, part, size, resize)
    raise UserError(f"{path}#{part}: this file has no parts; leave #{part} out")


def _has_shards(folder: Path) -> bool:
    """Tar files and no folders: not a folder of identities in which a tar lies about."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(entry.suffix == ".tar" for entry in entries) and not any(entry.is_dir() for entry in entries)


def _open_made(source: str, size: int | None) -> FaceDataset:
    kind, _, described = source.partition(":")
    usage = f"{source!r}: expected {kind}:IDENTITIESxIMAGES[,seed=0][,first=0], such as {kind}:400x20"
    counts, *options = described.split(",")
    numbers = counts.split("x")
    settings = {"seed": 0, "first": 0}
    for option in options:
        key, _, value = option.partition("=")
        if key not in settings or not value.isdecimal():
            raise UserError(usage)
        settings[key] = int(value)
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(usage)
    if kind == "strokes":
        from visard.data.strokes import Strokes

        return Strokes(int(numbers[0]), int(numbers[1]), size=28 if size is None else size, **settings)
    from visard.data.rendered import RenderedFaces

    return RenderedFaces(
        identities=int(numbers[0]),
        images_per_identity=int(numbers[1]),
        seed=settings["seed"],
        size=112 if size is None else size,
        first_identity=settings["first"],
    )
