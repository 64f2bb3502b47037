"""The lists of the two public retrieval sets, told by their header lines; images lie below the list's
folder, or beside it as DeepFashion's archives unpack them (Eval/LIST, Img/img/...).

In-Shop (DeepFashion), `list_eval_partition.txt`: a line with the number of images, a header, then

    image_name item_id evaluation_status      status: train, query or gallery

Stanford Online Products, `Ebay_train.txt` and `Ebay_test.txt`: a header, then

    image_id class_id super_class_id path

Out: `RetrievalList`: of In-Shop's file one part, "train", "query", "gallery" or "test" (query and gallery). Their
images are photographs of any shape. How many there are is up to the list; its first line's number must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.data.formats.encoded import EncodedDataset
from visard.data.formats.folder import read_file
from visard.data.lines import Lines, is_name
from visard.errors import FormatError, UserError
from visard.records import Int64Array

INSHOP = ("image_name", "item_id", "evaluation_status")
SOP = ("image_id", "class_id", "super_class_id", "path")

PARTS = {"train": ("train",), "query": ("query",), "gallery": ("gallery",), "test": ("query", "gallery")}
"""Parts of In-Shop's list -> the statuses in it."""

KS = {INSHOP: (1, 10, 20, 30), SOP: (1, 10, 100, 1000)}
"""K of Recall@K, as results on these sets are published."""


class RetrievalList(EncodedDataset):
    """The images that one of these lists names, in its order; the image id is the path as it is written.

    Args:
        path: the list.
        part: see `PARTS`; "" for SOP's, which are two files.
        size, resize: as for `open_dataset`; without a size, that of the first image.

    Attributes:
        ks: K of Recall@K, as the field reports them.
        sought: (N,) bool, which images are queries; the others are the gallery. None: each is sought among all others.
    """

    def __init__(self, path: Path, part: str = "", size: int | None = None, resize: bool = False) -> None:
        self._path, self._resize = Path(path), resize
        rows = read_retrieval_list(self._path)
        wanted = _statuses(self._path, part, rows)
        kept = [i for i, status in enumerate(rows.statuses) if status in wanted]
        if not kept:
            raise FormatError(self._path, f"names no image of {part}; is it complete?")
        self._files = Lines.from_strings(rows.files[i] for i in kept)
        self._folder = _folder_of(self._path, self._files[0])
        self.ids: Sequence[str] = self._files
        places = {name: place for place, name in enumerate(dict.fromkeys(rows.classes[i] for i in kept))}
        self.identities: Sequence[str] = Lines.from_strings(places)
        self.labels: Int64Array = np.array([places[rows.classes[i]] for i in kept], np.int64)
        self.ks = KS[rows.header]
        self.sought: NDArray[np.bool_] | None = None
        if part == "test":
            self.sought = np.array([rows.statuses[i] == "query" for i in kept])
        self.size = (
            self._first_size("open it as photographs (--data.framing.kind photograph)") if size is None else size
        )

    def encoded(self, index: int) -> bytes:
        return read_file(self._folder / self._files[index])

    def where(self, index: int) -> tuple[Path, int | None]:
        return self._folder / self._files[index], None


@dataclass(frozen=True)
class Rows:
    """What a list says, a row an image.

    Args:
        header: `INSHOP` or `SOP`.
        files: paths below the list's folder.
        classes: names of the classes.
        statuses: "train", "query" or "gallery"; "" where the list has none.
    """

    header: tuple[str, ...]
    files: list[str]
    classes: list[str]
    statuses: list[str]


def is_retrieval_list(path: Path) -> bool:
    """Whether a text file begins as one of these lists."""
    try:
        with open(path, "rb") as file:
            lines = file.read(4096).decode("utf-8-sig", "replace").split("\n")[:2]
    except OSError:
        return False
    return any(tuple(line.split()) in KS for line in lines)


def read_retrieval_list(path: Path) -> Rows:
    """All rows of a list.

    Raises:
        FormatError: no such list, a line of another kind, an image that comes twice, or another number of images than
            the first line says.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise FormatError(path, f"cannot be read ({error.strerror}); check the name and its permissions") from error
    lines = text.split("\n")
    at = next((i for i, line in enumerate(lines[:2]) if tuple(line.split()) in KS), None)
    if at is None:
        raise FormatError(path, f"expected the header '{' '.join(INSHOP)}' or '{' '.join(SOP)}' in its first two lines")
    header = tuple(lines[at].split())
    rows = Rows(header, [], [], [])
    seen: set[str] = set()
    for number, line in enumerate(lines[at + 1 :], start=at + 2):
        if not line.strip():
            continue
        file, name, status = _fields(header, line.split())
        if not is_name(file) or not is_name(name) or "\0" in file:
            raise FormatError(
                path, f"line {number}: expected '{' '.join(header)}', got {line.strip()[:60]!r}; correct it"
            )
        if file in seen:
            raise FormatError(path, f"line {number}: {file!r} comes twice; leave one of them out")
        seen.add(file)
        rows.files.append(file)
        rows.classes.append(name)
        rows.statuses.append(status)
    if not rows.files:
        raise FormatError(path, "names no images")
    if at == 1 and lines[0].strip() != str(len(rows.files)):
        raise FormatError(
            path, f"line 1: says {lines[0].strip()[:20]!r} images, {len(rows.files)} follow; fetch it again"
        )
    return rows


def _fields(header: tuple[str, ...], words: list[str]) -> tuple[str, str, str]:
    """(file, class, status); empty strings if the line is not of this kind."""
    none = ("", "", "")
    if len(words) != len(header):
        return none
    if header == INSHOP:
        file, name, status = words
        return (file, name, status) if status in ("train", "query", "gallery") else none
    image_id, name, super_class, file = words
    numbers = all(word.isascii() and word.isdecimal() for word in (image_id, name, super_class))
    return (file, name, "") if numbers else none


def _folder_of(path: Path, file: str) -> Path:
    """The folder below which the images lie: the first that has the first image, else the list's own."""
    here = path.parent
    candidates = (here, here / "Img", here.parent, here.parent / "Img")
    return next((folder for folder in candidates if (folder / file).is_file()), here)


def _statuses(path: Path, part: str, rows: Rows) -> tuple[str, ...]:
    if rows.header == SOP:
        if part:
            raise UserError(f"{path}#{part}: this list has no parts (train and test are two files); leave #{part} out")
        return ("",)
    if part not in PARTS:
        given = f"#{part} is none of its parts" if part else "its images are for training and for testing"
        raise UserError(f"{path}: {given}; name one of {', '.join(f'{path.name}#{known}' for known in PARTS)}")
    return PARTS[part]
