"""Pairs of images, read from the files that list them against the ids of a data set, and written.

In: a list in any dialect of `pair_dialects.py` and image ids; or the answers of a `.bin` set. Out: `Pairs`. Errors
name the file, the line and the remedy.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visard.errors import FormatError, UserError
from visard.protocols import pair_dialects
from visard.protocols.pair_dialects import Listed
from visard.records import Int64Array

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
"""Image suffixes that an id may have or lack: LFW's list names images without one."""

NAMED_IN_ERRORS = 3

_LINE_BREAKS = frozenset("\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
"""What str.splitlines takes for the end of a line, and the tab between columns."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, as rows of the embeddings. Equal indices in all arrays belong together.

    Args:
        left: (P,) int64, row of the first image, -1 = the image is not there.
        right: (P,) int64, row of the second, likewise.
        same: (P,) bool, one person (genuine) or two (impostor).
        fold: (P,) int64, numbered from 0.
        source: what the pairs are, for the result's settings.
    """

    left: Int64Array
    right: Int64Array
    same: NDArray[np.bool_]
    fold: Int64Array
    source: str = ""

    def __post_init__(self) -> None:
        lengths = {len(self.left), len(self.right), len(self.same), len(self.fold)}
        assert len(lengths) == 1, f"arrays of different lengths: {sorted(lengths)}"
        assert self.same.dtype == np.bool_, self.same.dtype

    def __len__(self) -> int:
        return len(self.left)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(P,) bool: both images are there."""
        return (self.left >= 0) & (self.right >= 0)

    def select(self, chosen: NDArray[Any]) -> Pairs:
        """The pairs that a mask or an index array names."""
        return Pairs(self.left[chosen], self.right[chosen], self.same[chosen], self.fold[chosen], self.source)


def read_pairs(path: str | Path, ids: Sequence[str], *, folds: int = 10, allow_missing: bool = False) -> Pairs:
    """Pairs from a file (or CFP's folder) of any dialect; the dialect is told from its first line.

    An image is found by its id, with or without an image suffix, below any folder: `Ann/Ann_0001` finds
    `lfw/Ann/Ann_0001.jpg`, and `Images/001/frontal/01.jpg` finds `001/frontal/01`, as long as only one id is meant.

    Args:
        path: the list.
        ids: of the embeddings.
        folds: where the list names none.
        allow_missing: let pairs stand whose image is not among `ids` (row -1), for `evaluate_pairs` to skip or count.

    Raises:
        FormatError: a line that cannot be understood.
        UserError: no such file, or images that are not among `ids`, unless `allow_missing`.
    """
    return _resolve(path, ids, pair_dialects.read_dialect(path, folds), allow_missing)


def read_lfw_pairs(path: str | Path, ids: Sequence[str], *, folds: int = 10, allow_missing: bool = False) -> Pairs:
    """LFW's pairs.txt, and no other dialect; see `read_pairs` and `pair_dialects.lfw_list`."""
    lines = pair_dialects.text_lines(path)
    return _resolve(path, ids, pair_dialects.lfw_list(path, lines, folds), allow_missing)


def read_pair_list(path: str | Path, ids: Sequence[str], *, folds: int = 10, allow_missing: bool = False) -> Pairs:
    """One's own list, and no other dialect; see `read_pairs` and `pair_dialects.own_list`."""
    lines = pair_dialects.text_lines(path)
    return _resolve(path, ids, pair_dialects.own_list(path, lines, folds), allow_missing)


def consecutive_pairs(same: ArrayLike, *, folds: int = 10, source: str = "") -> Pairs:
    """The pairs of a `.bin` set: images 2k and 2k + 1 are pair k; folds are blocks of the list, as the field cuts them.

    Equal to scikit-learn's KFold(folds) without shuffling, which InsightFace's published numbers rest on.

    Args:
        same: (P,) bool.
        folds: fewer where there are fewer pairs.
        source: name of the set.
    """
    same_P = np.asarray(same, dtype=bool)
    count = len(same_P)
    parts = np.array_split(np.arange(count), min(folds, max(count, 1)))
    fold = np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts])
    return Pairs(2 * np.arange(count), 2 * np.arange(count) + 1, same_P, fold, source)


def write_pairs(path: str | Path, pairs: Pairs, ids: Sequence[str], *, remark: str = "") -> None:
    """Writes pairs as one's own list: `left TAB right TAB same TAB fold`, which `read_pairs` reads back as they are.

    Args:
        path: written anew or over.
        ids: of the rows that the pairs name.
        remark: one line for people, above the list.

    Raises:
        UserError: an id that such a list cannot hold.
    """
    path = Path(path)
    for row in np.unique(np.concatenate([pairs.left, pairs.right])):
        image_id = ids[int(row)]
        if not _can_be_listed(image_id):
            raise UserError(
                f"{path}: the image id {image_id!r} cannot stand in a list (a tab, a line break, a space at an end, "
                "# at the beginning, or no UTF-8); rename the image"
            )
    rows = zip(pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist(), pairs.fold.tolist(), strict=True)
    head = f"# {remark}\n" if remark else ""
    text = head + "".join(f"{ids[a]}\t{ids[b]}\t{int(same)}\t{fold}\n" for a, b, same, fold in rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def rows_of(names: Iterable[str], ids: Sequence[str]) -> dict[str, int]:
    """Row of each distinct name, -1 where no id or more than one is meant.

    An id is meant if it is the name; else if they are equal but for image suffixes; else if one is the tail of the
    other, folder by folder. A tail that two ids share, or two names as p1/0001 and p2/0001 share 0001, means none.
    """
    distinct = dict.fromkeys(names)
    exact = {image_id: row for row, image_id in enumerate(ids)}
    stems = [_without_suffix(image_id) for image_id in ids]
    by_stem = _unique(stems)
    strong = {name: exact.get(name, by_stem.get(_without_suffix(name), -1)) for name in distinct}
    open_stems = {_without_suffix(name) for name, row in strong.items() if row < 0}
    lengths = {stem.count("/") + 1 for stem in open_stems}
    tails = {n: _unique(["/".join(s.split("/")[-n:]) if s.count("/") >= n else "" for s in stems]) for n in lengths}
    weak = {stem: _by_tail(stem, by_stem, tails[stem.count("/") + 1]) for stem in open_stems}
    wanted = Counter([*weak.values(), *{row for row in strong.values() if row >= 0}])
    return {
        name: row if row >= 0 else found if wanted[found := weak[_without_suffix(name)]] == 1 else -1
        for name, row in strong.items()
    }


def _can_be_listed(image_id: str) -> bool:
    whole = bool(image_id) and image_id == image_id.strip() and _LINE_BREAKS.isdisjoint(image_id)
    # Bytes that are no UTF-8 stand in ids as lone surrogates.
    return whole and image_id[0] != "#" and not any("\ud800" <= c <= "\udfff" for c in image_id)


def _resolve(path: str | Path, ids: Sequence[str], listed: Listed, allow_missing: bool) -> Pairs:
    rows = rows_of([*listed.left, *listed.right], ids)
    left = np.array([rows[name] for name in listed.left], dtype=np.int64)
    right = np.array([rows[name] for name in listed.right], dtype=np.int64)
    absent = (left < 0) | (right < 0)
    if absent.any() and not allow_missing:
        missing = sorted(name for name, row in rows.items() if row < 0)
        first = ", ".join(missing[:NAMED_IN_ERRORS])
        raise UserError(
            f"{path}: {len(missing)} images that it names have no embedding (first: {first}; "
            f"{listed.where[int(absent.argmax())]}), so {int(absent.sum())} of {len(absent)} pairs cannot be scored; "
            "is this the right data set? "
            "If they were left out when it was prepared, choose --missing skip or --missing wrong"
        )
    if not len(listed.left):
        raise FormatError(path, f"holds no pairs; expected lines {pair_dialects.OWN_LIST}")
    return Pairs(left, right, listed.same, listed.fold, source=_source(Path(path)))


def _source(path: Path) -> str:
    """The file's name; of CFP's folder the protocol's."""
    return f"CFP-{path.resolve().name.upper()}" if path.is_dir() else path.name


def _by_tail(stem: str, by_stem: dict[str, int], tails: dict[str, int]) -> int:
    if stem in tails:
        return tails[stem]
    parts = stem.split("/")
    shorter = (by_stem.get("/".join(parts[start:]), -1) for start in range(1, len(parts)))
    return next((row for row in shorter if row >= 0), -1)


def _without_suffix(image_id: str) -> str:
    stem, dot, suffix = image_id.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in SUFFIXES else image_id


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Row of every name that comes once."""
    count = Counter(names)
    return {name: row for row, name in enumerate(names) if count[name] == 1 and name}
