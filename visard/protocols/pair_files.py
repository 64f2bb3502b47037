"""Pairs of images, and the files that list them, read against the ids of a data set.

In: LFW's pairs.txt, or one's own list: `left right same [fold]`, one pair a line, separated by white space (by tabs
    alone if the
line has one), or CSV with a header. Out: `Pairs`. Errors name the file, the line and the remedy.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError, UserError
from visard.records import Int64Array

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
"""Image suffixes that an id may have or lack: LFW's list names images without one."""

SAME = {"1": True, "true": True, "same": True, "0": False, "false": False, "different": False, "-1": False}

NAMED_IN_ERRORS = 3


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
    """Pairs from a file of either kind; LFW's begins with a line of one or two whole numbers.

    Args:
        path: the file.
        ids: of the embeddings.
        folds: for a list without a fold column: its pairs are dealt out in turn, the genuine and the impostors each.
        allow_missing: let pairs stand whose image is not among `ids` (row -1), for `evaluate_pairs` to skip or count.
    """
    lines = _lines(path)
    first = lines[0][1].split()
    if len(first) <= 2 and all(word.isdigit() for word in first):
        return read_lfw_pairs(path, ids, allow_missing=allow_missing)
    return read_pair_list(path, ids, folds=folds, allow_missing=allow_missing)


def read_lfw_pairs(path: str | Path, ids: Sequence[str], *, allow_missing: bool = False) -> Pairs:
    """The official list: `folds<TAB>pairs`, then a fold's genuine lines `name n1 n2` and its impostors `name1 n1
    name2 n2`.

    Image 4 of Abel_Pacheco is looked up as the id "Abel_Pacheco/Abel_Pacheco_0004" with any image suffix or none,
    below any folder.

    Source: vis-www.cs.umass.edu/lfw/README.txt.

    Raises:
        FormatError: a line that is neither, or a number of pairs that is not the header's.
        UserError: images that are not among `ids`, unless `allow_missing`.
    """
    lines = _lines(path)
    header = lines[0][1].split()
    if len(header) > 2 or not all(word.isdigit() for word in header):
        raise FormatError(path, "line 1: expected the number of folds and of pairs, such as '10<TAB>300'")
    folds, count = (int(header[0]), int(header[1])) if len(header) == 2 else (1, int(header[0]))
    expected = 2 * folds * count
    if expected == 0 or len(lines) - 1 != expected:
        raise FormatError(
            path,
            f"line 1 announces 2 x {folds} x {count} = {expected} pairs, "
            f"but {len(lines) - 1} lines follow; fetch the file again",
        )
    left, right, same = [], [], []
    for position, (number, line) in enumerate(lines[1:]):
        words = line.split("\t") if "\t" in line else line.split()
        genuine = position // count % 2 == 0
        if len(words) != (3 if genuine else 4):
            kind = "3 words 'name n1 n2' (same person)" if genuine else "4 words 'name1 n1 name2 n2' (two people)"
            raise FormatError(path, f"line {number}: expected {kind}, got {line!r}")
        names_numbers = [words[0], words[1], words[0], words[2]] if genuine else words
        if not (names_numbers[1].isdigit() and names_numbers[3].isdigit()):
            raise FormatError(path, f"line {number}: an image number is no whole number in {line!r}")
        left.append(_lfw_id(names_numbers[0], names_numbers[1]))
        right.append(_lfw_id(names_numbers[2], names_numbers[3]))
        same.append(genuine)
    fold = np.arange(expected, dtype=np.int64) // (2 * count)
    return _resolve(path, ids, left, right, same, fold, allow_missing)


def read_pair_list(path: str | Path, ids: Sequence[str], *, folds: int = 10, allow_missing: bool = False) -> Pairs:
    """One's own list: image ids (suffix optional), 1/same/true or 0/different/false, and a fold if there are any.

    A first line that names the columns `left,right,same[,fold]` makes it CSV; lines that begin with # are comments.

    Raises:
        FormatError: a line that cannot be understood.
        UserError: images that are not among `ids`, unless `allow_missing`.
    """
    lines = [(number, line) for number, line in _lines(path) if not line.startswith("#")]
    if not lines:
        raise FormatError(path, "holds no pairs; write lines such as 'anna/1.jpg anna/2.jpg 1'")
    rows = list(_csv_rows(path, lines) if "," in lines[0][1] else _word_rows(lines))
    left, right, same, fold_texts = [], [], [], []
    for number, words in rows:
        if len(words) not in (3, 4):
            raise FormatError(
                path, f"line {number}: expected 'left right same [fold]', got {len(words)} columns: {' '.join(words)!r}"
            )
        answer = SAME.get(words[2].lower())
        if answer is None:
            raise FormatError(path, f"line {number}: {words[2]!r} does not say whether they are the same; use 1 or 0")
        left.append(words[0])
        right.append(words[1])
        same.append(answer)
        fold_texts.append(words[3] if len(words) == 4 else "")
        if bool(fold_texts[-1]) != bool(fold_texts[0]):
            raise FormatError(
                path, f"line {number}: some lines have a fold and some have none; give all of them one or none"
            )
        if fold_texts[-1] and not fold_texts[-1].isdigit():
            raise FormatError(path, f"line {number}: the fold {fold_texts[-1]!r} is no whole number")
    if fold_texts[0]:
        fold = np.array([int(text) for text in fold_texts], dtype=np.int64)
    else:
        if folds < 2:
            raise UserError(f"pairs: {folds} folds; use at least 2")
        is_same = np.array(same, dtype=bool)
        turn = np.where(is_same, np.cumsum(is_same), np.cumsum(~is_same)) - 1
        fold = (turn % folds).astype(np.int64)
    return _resolve(path, ids, left, right, same, fold, allow_missing)


def _lines(path: str | Path) -> list[tuple[int, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file of pairs") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise FormatError(path, f"is not a text file of pairs ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise FormatError(path, "is empty; expected LFW's pairs.txt or lines 'left right same [fold]'")
    return lines


def _word_rows(lines: list[tuple[int, str]]) -> Iterable[tuple[int, list[str]]]:
    for number, line in lines:
        yield number, [word.strip() for word in line.split("\t")] if "\t" in line else line.split()


def _csv_rows(path: str | Path, lines: list[tuple[int, str]]) -> Iterable[tuple[int, list[str]]]:
    names = [name.strip().lower() for name in next(csv.reader([lines[0][1]]))]
    wanted = ["left", "right", "same"] + (["fold"] if "fold" in names else [])
    if not set(wanted) <= set(names):
        raise FormatError(
            path, f"line {lines[0][0]}: a CSV list begins with 'left,right,same[,fold]', got {lines[0][1]!r}"
        )
    columns = [names.index(name) for name in wanted]
    for number, line in lines[1:]:
        words = [word.strip() for word in next(csv.reader([line]))]
        if len(words) != len(names):
            raise FormatError(path, f"line {number}: {len(words)} columns, but the header has {len(names)}")
        yield number, [words[column] for column in columns]


def _lfw_id(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _without_suffix(image_id: str) -> str:
    stem, dot, suffix = image_id.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in SUFFIXES else image_id


def _resolve(
    path: str | Path,
    ids: Sequence[str],
    left: list[str],
    right: list[str],
    same: list[bool],
    fold: Int64Array,
    allow_missing: bool,
) -> Pairs:
    """Ids to rows: an id as it is, else without its suffix, else its last two parts, where that is unique."""
    exact = {image_id: row for row, image_id in enumerate(ids)}
    stems = _unique({row: _without_suffix(image_id) for row, image_id in enumerate(ids)})
    tails = _unique({row: "/".join(PurePosixPath(_without_suffix(i)).parts[-2:]) for row, i in enumerate(ids)})

    def row(name: str) -> int:
        stem = _without_suffix(name)
        return exact.get(name, stems.get(stem, tails.get(stem, -1)))

    left_rows = np.array([row(name) for name in left], dtype=np.int64)
    right_rows = np.array([row(name) for name in right], dtype=np.int64)
    absent = (left_rows < 0) | (right_rows < 0)
    if absent.any() and not allow_missing:
        missing = sorted({n for n, r in zip(left + right, [*left_rows, *right_rows], strict=True) if r < 0})
        first = ", ".join(missing[:NAMED_IN_ERRORS])
        raise UserError(
            f"{path}: {len(missing)} images that it names have no embedding (first: {first}), "
            f"so {int(absent.sum())} of {len(left)} pairs cannot be scored; is this the right data set? "
            "If they were left out when it was prepared, choose --missing skip or --missing wrong"
        )
    return Pairs(left_rows, right_rows, np.array(same, dtype=bool), fold, source=Path(path).name)


def _unique(names: dict[int, str]) -> dict[str, int]:
    count = Counter(names.values())
    return {name: row for row, name in names.items() if count[name] == 1}
