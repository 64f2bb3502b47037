"""Crops named by a list: lines `path label` as trainers of the field use them, or MXNet's `.lst`.

In: the list; paths are below its folder. Out: `ListDataset`, and `write_list`. Three kinds of lines are told apart:

    PATH LABEL                    a space or a tab between; the label is a number (-1: unlabelled) or a name
    INDEX<TAB>LABEL...<TAB>PATH   MXNet's im2rec; further labels are let be
    FLAG<TAB>PATH<TAB>LABEL...    InsightFace's face2rec; further values are let be

The image id is the path as it is written. Beside LIST.txt may lie LIST.ids.txt (line k: the id of line k),
LIST.identities.txt (line c: the name of label c) and LIST.points.npy ((N, 5, 2) float32 pixels, NaN = none).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visard.data.formats.encoded import EncodedDataset
from visard.data.formats.folder import IMAGE_SUFFIXES, read_file
from visard.data.lines import Lines, Numbers, is_name
from visard.data.npy import map_npy
from visard.data.writer import MAX_IDENTITIES
from visard.errors import FormatError
from visard.records import Float32Array, Int64Array

SUFFIXES = (".txt", ".lst", ".tsv", ".list")


class ListDataset(EncodedDataset):
    """The images that a list names, in its order.

    Args:
        path: the list.
        size, resize: as for `open_dataset`; without a size, that of the first image.
    """

    def __init__(self, path: Path, size: int | None = None, resize: bool = False) -> None:
        self._path, self._resize = Path(path), resize
        files, labels = read_list(self._path)
        self._files = Lines.from_strings(files)
        self.labels, named = _numbered(self._path, labels)
        highest = int(self.labels.max())
        self.identities: Sequence[str] = Numbers(range(highest + 1)) if named is None else Lines.from_strings(named)
        self.ids: Sequence[str] = self._files
        ids, identities, points = (_beside(self._path, what) for what in ("ids.txt", "identities.txt", "points.npy"))
        if ids.is_file():
            self.ids = Lines.from_file(ids)
            if len(self.ids) != len(files):
                raise FormatError(
                    ids,
                    f"has {len(self.ids)} lines for the {len(files)} images of {self._path.name}; "
                    "write one a line, in the list's order",
                )
        _check_unique(ids if ids.is_file() else self._path, self.ids)
        if identities.is_file():
            self.identities = Lines.from_file(identities)
            if len(self.identities) <= highest:
                problem = f"has {len(self.identities)} lines, {self._path.name} has label {highest}"
                raise FormatError(identities, problem)
        if points.is_file():
            self._points = map_npy(points, (len(files), 5, 2), np.float32, "write the list again")
        self.size = self._first_size() if size is None else size

    def encoded(self, index: int) -> bytes:
        return read_file(self._path.parent / self._files[index])

    def where(self, index: int) -> tuple[Path, int | None]:
        return self._path.parent / self._files[index], None


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """Paths and labels, as they are written, of all lines but empty ones and comments (#).

    Raises:
        FormatError: a line that is none of the three kinds, or no line at all.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise FormatError(path, f"cannot be read ({error.strerror}); check the name and its permissions") from error
    files, labels = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            file, label = _fields(line.rstrip("\r"))
            if not is_name(file) or not is_name(label) or "\0" in file:
                kinds = "'PATH LABEL' or 'INDEX<TAB>LABEL<TAB>PATH'"
                raise FormatError(path, f"line {number}: expected {kinds}, got {line.strip()[:60]!r}; correct it")
            files.append(file)
            labels.append(label)
    if not files:
        raise FormatError(path, "holds no images; expected lines 'PATH LABEL'")
    return files, labels


def write_list(
    path: Path,
    files: Sequence[str],
    labels: Int64Array,
    ids: Sequence[str],
    identities: Sequence[str],
    points: Float32Array | None,
) -> None:
    """Writes a list and what belongs beside it.

    Args:
        path: with the suffix .lst MXNet's lines, otherwise `path<TAB>label`.
        files: (N) paths below the list's folder.
        labels: (N,) int64, -1 = unlabelled.
        ids: N image ids; written only where one is not the path itself.
        identities: C names; written only where one is not the label itself.
        points: (N, 5, 2) float32 pixels, NaN = none, or None.
    """
    rows = zip(range(len(files)), labels.tolist(), files, strict=True)
    if path.suffix == ".lst":
        lines = [f"{i}\t{label}\t{file}\n" for i, label, file in rows]
    else:
        lines = [f"{file}\t{label}\n" for _, label, file in rows]
    _write(path, lines)
    if any(image_id != file for image_id, file in zip(ids, files, strict=True)):
        _write(_beside(path, "ids.txt"), [f"{image_id}\n" for image_id in ids])
    if any(name != str(label) for label, name in enumerate(identities)) or len(identities) != int(labels.max()) + 1:
        _write(_beside(path, "identities.txt"), [f"{name}\n" for name in identities])
    if points is not None and not np.isnan(points).all():
        np.save(_beside(path, "points.npy"), points)


def _fields(line: str) -> tuple[str, str]:
    """(path, label); empty strings if the line is of no kind."""
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) >= 3:
        if _is_number(columns[0]) and _is_number(columns[1]) and not _is_number(columns[-1]):
            return columns[-1], columns[1]
        if _is_number(columns[0]) and not _is_number(columns[1]) and _is_number(columns[2]):
            return columns[1], columns[2]
        return "", ""
    if len(columns) == 2:
        return columns[0], columns[1]
    file, _, label = line.strip().rpartition(" ")
    return file.rstrip(), label


def _numbered(path: Path, labels: list[str]) -> tuple[Int64Array, list[str] | None]:
    """Labels as numbers, and their names if they are not numbers (in the order in which they come)."""
    if not all(_is_number(label) for label in labels):
        if any(label.lower().endswith(IMAGE_SUFFIXES) for label in labels):
            raise FormatError(path, "its labels look like files; write 'PATH LABEL' in every line")
        places = {name: place for place, name in enumerate(dict.fromkeys(labels))}
        return np.array([places[label] for label in labels], np.int64), list(places)
    values = np.array([float(label) for label in labels])
    wrong = np.flatnonzero((values != np.floor(values)) | ~(values >= -1) | (values >= MAX_IDENTITIES))
    if len(wrong):
        raise FormatError(
            path,
            f"image {wrong[0] + 1}: the label {labels[wrong[0]]!r} is not an identity's number; "
            "use 0, 1, 2 ... or -1 for none",
        )
    return values.astype(np.int64), None


def _is_number(text: str) -> bool:
    """As MXNet writes labels: 3, 3.000000, -1."""
    whole, _, fraction = text.removeprefix("-").partition(".")
    return text.isascii() and whole.isdecimal() and (not fraction or fraction.isdecimal()) and len(text) <= 32


def _check_unique(path: Path, ids: Sequence[str]) -> None:
    seen: set[bytes] = set()
    for number, image_id in enumerate(ids, start=1):
        mark = hashlib.blake2b(image_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        if mark in seen:
            raise FormatError(path, f"image {number}: {image_id!r} comes twice; each image needs its own id")
        seen.add(mark)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}.{what}")


def _write(path: Path, lines: list[str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    os.replace(partial, path)
