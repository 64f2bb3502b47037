"""The layouts in which lists of pairs are published, each read into names, answers and folds.

In: a file, or CFP's folder of folds. Out: `Listed`. Errors name the file, the line and the remedy.

| dialect | told by | folds |
|---|---|---|
| LFW pairs.txt, pairsDevTrain, pairsDevTest | first line: one or two whole numbers | the header's; if one: dealt out |
| CFP Protocol/Split/FF and FP | a folder | its numbered folders |
| RFW RACE_pairs.txt | first line: `name n1 n2`, no header | equal blocks |
| CALFW, CPLFW | first line: `image number` | the genuine pairs' numbers, or blocks |
| AgeDB-30 as text, one's own | all else: `left right same [fold]` or CSV | the column, equal blocks, or dealt out |
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError, UserError
from visard.records import Int64Array

Lines = list[tuple[int, str]]
"""Line number and text, without blank lines."""

SAME = {"1": True, "true": True, "same": True, "0": False, "false": False, "different": False, "-1": False}

OWN_LIST = "'left right same [fold]'"


@dataclass(frozen=True)
class Listed:
    """What a list says; equal positions belong together.

    Args:
        left, right: names of images, as they are listed.
        same: (P,) bool.
        fold: (P,) int64, numbered from 0 unless the list has numbers of its own.
        where: the line of each pair, for messages.
    """

    left: Sequence[str]
    right: Sequence[str]
    same: NDArray[np.bool_]
    fold: Int64Array
    where: Sequence[str]


def read_dialect(path: str | Path, folds: int) -> Listed:
    """Any of the dialects, told as the table above says.

    Args:
        folds: where the list names none.
    """
    path = Path(path)
    if path.is_dir():
        return cfp_split(path)
    lines = text_lines(path)
    first = next((line for _, line in lines if not line.startswith("#")), "")
    reader = rfw_list if _is_rfw(lines) else _dialect_of(first)
    return reader(path, lines, folds)


def lfw_list(path: str | Path, lines: Lines, folds: int) -> Listed:
    """`folds TAB pairs`, then of each fold the genuine lines `name n1 n2` and the impostors `name1 n1 name2 n2`.

    With one number as header, that of pairs of each kind (View 1: pairsDevTrain, pairsDevTest), there is one fold,
    which says nothing about a threshold: its pairs are dealt out to `folds`.

    Source: vis-www.cs.umass.edu/lfw/README.txt.
    """
    header = lines[0][1].split()
    if len(header) > 2 or not all(word.isdecimal() for word in header):
        raise FormatError(
            path, "line 1: expected the number of folds and of pairs, such as '10<TAB>300'; fetch the file again"
        )
    own_folds, count = (int(header[0]), int(header[1])) if len(header) == 2 else (1, int(header[0]))
    expected = 2 * own_folds * count
    if expected == 0 or len(lines) - 1 != expected:
        raise FormatError(
            path,
            f"line 1 announces 2 x {own_folds} x {count} = {expected} pairs, "
            f"but {len(lines) - 1} lines follow; fetch the file again",
        )
    genuine = (position // count % 2 == 0 for position in range(expected))
    names = [_numbered(path, *row, is_genuine) for row, is_genuine in zip(lines[1:], genuine, strict=True)]
    left, right = [name for name, _ in names], [name for _, name in names]
    same = np.arange(expected) // count % 2 == 0
    fold = np.arange(expected, dtype=np.int64) // (2 * count) if own_folds > 1 else dealt_out(same, folds)
    return Listed(left, right, same, fold, [f"line {number}" for number, _ in lines[1:]])


def rfw_list(path: str | Path, lines: Lines, folds: int) -> Listed:
    """RFW's: LFW's lines without a header, genuine `name n1 n2` and impostor `name1 n1 name2 n2`, fold after fold.

    Source: RACE_pairs.txt of Racial Faces in-the-Wild (Wang et al., ICCV 2019; whdeng.cn/RFW), 6,000 lines in ten folds
    of 300 + 300, as bob.bio.face and others read them.
    """
    same = np.array([len(_words(line)) == 3 for _, line in lines])
    names = [_numbered(path, *row, is_genuine) for row, is_genuine in zip(lines, same.tolist(), strict=True)]
    where = [f"line {number}" for number, _ in lines]
    return Listed([name for name, _ in names], [name for _, name in names], same, _equal_blocks(same, folds), where)


def two_line_list(path: str | Path, lines: Lines, folds: int) -> Listed:
    """CALFW's and CPLFW's: a pair is two lines `image number`, 0 for two people, above 0 for one.

    CALFW numbers the genuine pairs by fold, 1 to 10, and has the impostors after them, in the order of the folds;
    CPLFW has only 1 and 0. Where the numbers do not count folds, each kind in its order is cut into `folds` blocks.

    Source: the files pairs_CALFW.txt and pairs_CPLFW.txt of whdeng.cn/CALFW and /CPLFW.
    """
    if len(lines) % 2:
        raise FormatError(path, f"line {lines[-1][0]}: the last pair has one line, it needs two; fetch the file again")
    names, numbers = [], []
    for number, line in lines:
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdecimal():
            raise FormatError(
                path, f"line {number}: expected 'image number' as in line 1, got {line!r}; fetch the file again"
            )
        names.append(words[0])
        numbers.append(int(words[1]))
    for row in range(0, len(lines), 2):
        if numbers[row] != numbers[row + 1]:
            raise FormatError(
                path,
                f"lines {lines[row][0]} and {lines[row + 1][0]} are one pair but have the numbers {numbers[row]} and "
                f"{numbers[row + 1]}; they must agree (0 = two people, above 0 = one)",
            )
    number_P = np.array(numbers[::2], dtype=np.int64)
    same = number_P > 0
    counts_folds = len(np.unique(number_P[same])) > 1
    folds = int(number_P.max()) if counts_folds else folds
    impostors = ~same
    fold = np.empty(len(same), dtype=np.int64)
    fold[same] = number_P[same] - 1 if counts_folds else _blocks(int(same.sum()), folds)
    fold[impostors] = _blocks(int(impostors.sum()), folds)
    where = [f"lines {lines[row][0]} and {lines[row + 1][0]}" for row in range(0, len(lines), 2)]
    return Listed(names[::2], names[1::2], same, fold, where)


def own_list(path: str | Path, lines: Lines, folds: int) -> Listed:
    """`left right same [fold]`, or CSV with a header; lines that begin with # are comments.

    Without a fold column: where the list, cut into `folds` equal blocks, has as many genuine pairs in each, the blocks
    are the folds (AgeDB-30 as text); otherwise the genuine and the impostor pairs are each dealt out in turn.
    """
    lines = [(number, line) for number, line in lines if not line.startswith("#")]
    if not lines:
        raise FormatError(path, "holds no pairs; write lines such as 'anna/1.jpg anna/2.jpg 1'")
    left, right, same, fold_texts, where = [], [], [], [], []
    for number, words in _csv_rows(path, lines) if _is_csv(lines[0][1]) else _word_rows(lines):
        if len(words) not in (3, 4):
            got = f"got {len(words)} columns: {' '.join(words)!r}"
            raise FormatError(
                path, f"line {number}: expected {OWN_LIST}, {got}; names with spaces need tabs between columns"
            )
        answer = SAME.get(words[2].lower())
        if answer is None:
            raise FormatError(path, f"line {number}: {words[2]!r} does not say whether they are the same; use 1 or 0")
        left.append(words[0])
        right.append(words[1])
        same.append(answer)
        where.append(f"line {number}")
        fold_texts.append(words[3] if len(words) == 4 else "")
        if bool(fold_texts[-1]) != bool(fold_texts[0]):
            raise FormatError(
                path, f"line {number}: some lines have a fold and some have none; give all of them one or none"
            )
        if fold_texts[-1] and not fold_texts[-1].isdecimal():
            raise FormatError(
                path, f"line {number}: the fold {fold_texts[-1]!r} is no whole number; number the folds from 0"
            )
    same_P = np.array(same, dtype=bool)
    if fold_texts and fold_texts[0]:
        fold = np.array([int(text) for text in fold_texts], dtype=np.int64)
    else:
        fold = _equal_blocks(same_P, folds)
    return Listed(left, right, same_P, fold, where)


def cfp_split(folder: str | Path) -> Listed:
    """CFP's `Protocol/Split/FF` or `FP`: folders 01 to 10, each with same.txt and diff.txt of lines `i,j`.

    The numbers count the images of `Protocol/Pair_list_F.txt` (frontal) and, the second ones of FP, of
    `Pair_list_P.txt` (profile), whose lines are `number ../Data/Images/001/frontal/01.jpg`.

    Source: the Readme.txt of cfp-dataset (Sengupta et al., WACV 2016).
    """
    folder = Path(folder)
    parts = sorted(p for p in _subfolders(folder) if (p / "same.txt").is_file() or (p / "diff.txt").is_file())
    kind = folder.resolve().name.upper()
    if not parts or kind not in ("FF", "FP"):
        raise UserError(
            f"{folder}: is a folder but not one of CFP's; give .../Protocol/Split/FF or .../Protocol/Split/FP, "
            "which hold 01/same.txt and 01/diff.txt, or a file of pairs"
        )
    first = _cfp_images(folder, "F")
    second = first if kind == "FF" else _cfp_images(folder, "P")
    left, right, same, fold, where = [], [], [], [], []
    for number, part in enumerate(parts):
        for name, answer in (("same.txt", True), ("diff.txt", False)):
            path = part / name
            for line_number, line in text_lines(path):
                words = [word.strip() for word in line.split(",")]
                if len(words) != 2 or not all(word.isdecimal() for word in words):
                    raise FormatError(
                        path, f"line {line_number}: expected two numbers 'i,j', got {line!r}; unpack CFP again"
                    )
                for word, (list_path, images), names in ((words[0], first, left), (words[1], second, right)):
                    if int(word) not in images:
                        problem = f"line {line_number}: there is no image {word} in {list_path}; unpack CFP again"
                        raise FormatError(path, problem)
                    names.append(images[int(word)])
                same.append(answer)
                fold.append(number)
                where.append(f"{part.name}/{name} line {line_number}")
    return Listed(left, right, np.array(same, dtype=bool), np.array(fold, dtype=np.int64), where)


def dealt_out(same: NDArray[np.bool_], folds: int) -> Int64Array:
    """(P,) fold of each pair: the genuine ones in turn, and the impostors in turn."""
    if folds < 2:
        raise UserError(f"pairs: {folds} folds; a threshold is chosen on the other folds, so use at least 2")
    turn = np.where(same, np.cumsum(same), np.cumsum(~same)) - 1
    return (turn % folds).astype(np.int64)


def text_lines(path: str | Path) -> Lines:
    """The lines of a text file, without blank ones.

    Raises:
        UserError: there is no such file.
        FormatError: no text, or nothing in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file of pairs; check the name") from error
    except IsADirectoryError as error:
        raise FormatError(path, "is a folder, not a file of pairs; name the file in it") from error
    except UnicodeDecodeError as error:
        if error.object.startswith(b"MATLAB"):
            raise FormatError(
                path,
                "is a MATLAB file, as AgeDB's splits are, which visard does not read; give InsightFace's agedb_30.bin "
                "as data instead, or write the pairs as lines 'left right same'",
            ) from error
        raise FormatError(
            path, f"is not a text file of pairs ({error.reason}); save it as UTF-8 text", error.start
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise FormatError(path, f"is empty; expected LFW's pairs.txt or lines {OWN_LIST}")
    return lines


def _dialect_of(first: str) -> Callable[[str | Path, Lines, int], Listed]:
    words = first.split()
    if 1 <= len(words) <= 2 and all(word.isdecimal() for word in words):
        return lfw_list
    if len(words) == 2 and words[1].isdecimal() and not _is_csv(first):
        return two_line_list
    return own_list


def _is_rfw(lines: Lines) -> bool:
    """The first line could be one's own list, too, if ids are numbers: a line of two names with a number each tells."""
    first = _words(lines[0][1])
    if len(first) != 3 or not (first[1].isdecimal() and first[2].isdecimal()):
        return False
    fours = (words for _, line in lines if len(words := _words(line)) == 4)
    return any(
        w[1].isdecimal() and w[3].isdecimal() and not w[2].isdecimal() and w[2].lower() not in SAME for w in fours
    )


def _words(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _numbered(path: str | Path, number: int, line: str, genuine: bool) -> tuple[str, str]:
    """The two images of a line `name n1 n2` or `name1 n1 name2 n2`."""
    words = _words(line)
    if len(words) != (3 if genuine else 4):
        kind = "3 words 'name n1 n2' (same person)" if genuine else "4 words 'name1 n1 name2 n2' (two people)"
        raise FormatError(path, f"line {number}: expected {kind}, got {line!r}; fetch the file again")
    names_numbers = [words[0], words[1], words[0], words[2]] if genuine else words
    if not (names_numbers[1].isdecimal() and names_numbers[3].isdecimal()):
        raise FormatError(path, f"line {number}: an image number is no whole number in {line!r}; fetch the file again")
    return _lfw_id(names_numbers[0], names_numbers[1]), _lfw_id(names_numbers[2], names_numbers[3])


def _lfw_id(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _blocks(count: int, folds: int) -> Int64Array:
    """0 ... 0, 1 ... 1, up to folds - 1: as equal as `count` allows, the first ones longer."""
    return np.repeat(np.arange(folds, dtype=np.int64), [len(part) for part in np.array_split(np.arange(count), folds)])


def _equal_blocks(same: NDArray[np.bool_], folds: int) -> Int64Array:
    if folds >= 2 and len(same) % folds == 0:
        genuine = same.reshape(folds, -1).sum(axis=1)
        if (genuine == genuine[0]).all() and 0 < genuine[0] < len(same) // folds:
            return _blocks(len(same), folds)
    return dealt_out(same, folds)


def _word_rows(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        yield number, [word.strip() for word in line.split("\t")] if "\t" in line else line.split()


def _is_csv(first: str) -> bool:
    """A header names its columns; a first line of fewer than three words with commas was meant to be CSV, too."""
    if "\t" in first or "," not in first:
        return False
    names = {name.strip().lower() for name in next(csv.reader([first]))}
    return {"left", "right", "same"} <= names or len(first.split()) < 3


def _csv_rows(path: str | Path, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    names = [name.strip().lower() for name in next(csv.reader([lines[0][1]]))]
    wanted = ["left", "right", "same"] + (["fold"] if "fold" in names else [])
    if not set(wanted) <= set(names):
        of_cfp = all(name.isdecimal() for name in names) and len(names) == 2
        remedy = "; of CFP give the folder Protocol/Split/FF or FP instead" if of_cfp else "; add that line"
        raise FormatError(
            path, f"line {lines[0][0]}: a CSV list begins with 'left,right,same[,fold]', got {lines[0][1]!r}{remedy}"
        )
    columns = [names.index(name) for name in wanted]
    for number, line in lines[1:]:
        words = [word.strip() for word in next(csv.reader([line]))]
        if len(words) != len(names):
            raise FormatError(
                path, f"line {number}: {len(words)} columns, but the header has {len(names)}; quote names with commas"
            )
        yield number, [words[column] for column in columns]


def _subfolders(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()]


def _cfp_images(folder: Path, kind: str) -> tuple[Path, dict[int, str]]:
    """Pair_list_F.txt or Pair_list_P.txt: number -> path below the folder that holds Protocol."""
    name = f"Pair_list_{kind}.txt"
    split = folder.resolve().parent
    path = next((p for p in (split.parent / name, split / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder}: {split.parent / name} is missing, which names the images; unpack CFP again")
    images = {}
    for number, line in text_lines(path):
        words = line.split(maxsplit=1)
        if len(words) != 2 or not words[0].isdecimal():
            problem = f"line {number}: expected 'number path', got {line!r}; unpack CFP again"
            raise FormatError(path, problem)
        images[int(words[0])] = "/".join(p for p in words[1].replace("\\", "/").split("/") if p not in ("..", "."))
    return path, images
