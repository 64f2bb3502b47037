"""The pairs that travel with images out of a `.bin` and into one: lines "left TAB right TAB same TAB fold".

In: image ids and answers, or the file. Out: the file, which `visard evaluate pairs --pairs` reads too, or rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError, UserError
from visard.records import Int64Array

NAME = "pairs.txt"
FOLDS = 10


def write_pair_list(path: Path, ids: Sequence[str], same: NDArray[np.bool_]) -> None:
    """Pair k is of images 2k and 2k + 1; its fold the k-th of ten equal blocks, as InsightFace cuts them."""
    folds = np.array_split(np.arange(len(same)), min(FOLDS, len(same)))
    fold_of = np.repeat(np.arange(len(folds)), [len(fold) for fold in folds])
    lines = [f"{ids[2 * k]}\t{ids[2 * k + 1]}\t{int(same[k])}\t{fold_of[k]}\n" for k in range(len(same))]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="\n")


def read_pair_list(path: Path, ids: Sequence[str]) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Rows (P, 2) of `ids` and answers (P,), in the order of the lines.

    Raises:
        FormatError: a line that is not "left TAB right TAB 1 or 0", or an image that is not among `ids`.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: the pairs cannot be read ({error.strerror})") from error
    place = {image_id: row for row, image_id in enumerate(ids)}
    rows: list[tuple[int, int]] = []
    same: list[bool] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.rstrip("\r").split("\t")
        if len(words) not in (3, 4) or words[2] not in ("0", "1"):
            raise FormatError(
                path, f"line {number}: expected 'left TAB right TAB 1 or 0', got {line[:60]!r}; correct it"
            )
        for name in words[:2]:
            if name not in place:
                raise FormatError(path, f"line {number}: there is no image {name!r} in the data set; use its image ids")
        rows.append((place[words[0]], place[words[1]]))
        same.append(words[2] == "1")
    if not rows:
        raise FormatError(path, "holds no pairs; fetch it again")
    return np.array(rows, np.int64), np.array(same, bool)
