"""Points that any landmarker found, from a file: five or many an image.

In: a list of lines `ID x1 y1 ... xK yK [SCORE]`, between them spaces, tabs or commas (IJB's name_5pts_score.txt, the
points.csv of a folder), perhaps under a header; a table whose header names columns x1, y1 ... among others (`visard
prepare`'s detections.csv); or a .npy of (N, K, 2) in the order of the images. Out: `PointList`: points by image, and
each line as it was written.

K is one of `KNOWN`, the same all over a file; the 478 points of MediaPipe's mesh with irises are taken for its 468.
Coordinates are pixels of the image, x before y, (0, 0) at the centre of the top left pixel. NaN = none found.
"""

from __future__ import annotations

import csv
import itertools
import re
import tokenize
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError, UserError
from visard.functional.face_surface import KNOWN
from visard.records import Float32Array

MESH, MESH_WITH_IRISES = 468, 478
COUNTS = (*KNOWN, MESH_WITH_IRISES)
EXPECTED = "expected lines 'ID x1 y1 ... xK yK', K one of " + ", ".join(map(str, COUNTS))
_LARGEST = 1e6
_NORMALISED = 2.0
"""Points of a whole file that all lie below this many pixels are fractions of the image's size."""


@dataclass(frozen=True, eq=False)
class PointList:
    """Points by image.

    Args:
        values: (M, K, 2) pixels, perhaps memory-mapped, NaN = none.
        rows: the list's name of an image -> row of `values`; None = the rows are those of the data set.
        lines: what each line says behind the name, as it was written; empty of a .npy.
        separator: between the columns of a line.
        header: the line above the others, "" = none.
    """

    values: NDArray[Any]
    rows: dict[str, int] | None
    lines: Sequence[str] = ()
    separator: str = " "
    header: str = ""

    def points(self, row: int, image_id: str) -> Float32Array | None:
        """(K, 2) float32 of the image with this row and id in the data set, None = none are known."""
        place = row if self.rows is None else self.rows.get(image_id, -1)
        if place < 0:
            return None
        found = np.asarray(self.values[place], np.float32)
        return None if np.isnan(found).any() else found

    def line(self, image_id: str, name: str) -> str | None:
        """The image's line under another name."""
        place = -1 if self.rows is None else self.rows.get(image_id, -1)
        quoted = '"' + name.replace('"', '""') + '"' if self.separator == "," and set(name) & set(',"') else name
        return None if place < 0 else f"{quoted}{self.separator}{self.lines[place]}\n"


def read_point_list(path: Path, ids: Sequence[str]) -> PointList:
    """The points of a file.

    Args:
        path: a list, or a .npy.
        ids: of the images, whose order that of a .npy is.

    Raises:
        UserError: no such file, or a folder.
        FormatError: no points, or as many of them as nothing is known to have.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the list of points or the .npy in it")
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; give kept, template, detected, or a file: a list of points or a .npy"
        )
    try:
        found = _from_npy(path, len(ids)) if path.suffix == ".npy" else _from_lines(path)
    except csv.Error as error:
        raise FormatError(path, f"is no list of points ({error}); {EXPECTED}") from error
    largest = float(np.nanmax(np.abs(found.values), initial=-1.0))
    if largest < 0:
        raise FormatError(path, f"holds no points; {EXPECTED}")
    if not largest < _LARGEST:
        raise FormatError(path, f"has points at {largest:g}, which are no pixels; write NaN for images without points")
    if largest <= _NORMALISED:
        raise FormatError(path, "its points are fractions of the image, not pixels; multiply them by width and height")
    return found


def _from_npy(path: Path, count: int) -> PointList:
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)  # `load` below would take zip archives and pickles too
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, tokenize.TokenError) as error:  # a damaged header is taken for Python
        reason = "it holds Python objects" if re.search("Python objects|pickle", str(error)) else error
        raise FormatError(
            path, f"is no array that can be read ({reason}); save (N, K, 2) floats with np.save"
        ) from error
    if values.ndim != 3 or values.shape[2] != 2 or values.shape[1] not in COUNTS or values.dtype.kind != "f":
        counts = ", ".join(map(str, COUNTS))
        raise FormatError(path, f"is {values.dtype} {values.shape}; expected floats (N, K, 2), K one of {counts}")
    if len(values) != count:
        raise FormatError(
            path, f"has points for {len(values):,} images, the data set has {count:,}; give its order, NaN = none"
        )
    return PointList(_known(values), None)


def _from_lines(path: Path) -> PointList:
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    numbered = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    first = numbered[0][1] if numbered else ""
    separator = "," if "," in first else "\t" if "\t" in first else " "
    header = first if numbered and _is_header(_columns(first, separator)) else ""
    places = _point_columns(_columns(header, separator)[1:]) if header else []
    rows: dict[str, int] = {}
    lines: list[str] = []
    values = array("f")
    width = 0
    for number, line in numbered[1 if header else 0 :]:
        image_id, *columns = _columns(line, separator)
        if not any([columns[k] for k in places if k < len(columns)] if places else columns):
            continue  # an image without points, as `visard convert` writes it
        if image_id in rows:
            if lines[rows[image_id]] != separator.join(columns):
                raise FormatError(path, f"line {number}: {image_id!r} comes again with other points; keep one line")
            continue  # IJB's lists have a line for each template that an image belongs to
        try:
            numbers = [float(columns[k]) for k in places] if places else [float(column) for column in columns]
        except IndexError as error:
            raise FormatError(path, f"line {number}: has fewer columns than the header; complete it") from error
        except ValueError as error:
            raise FormatError(path, f"line {number}: {str(error)[:80]}; {EXPECTED}") from error
        width = width or len(numbers)
        if len(numbers) // 2 not in COUNTS or len(numbers) != width:
            other = f", {width} in the lines before" if len(numbers) != width else ""
            raise FormatError(path, f"line {number}: {len(numbers)} numbers behind the id{other}; {EXPECTED}")
        rows[image_id] = len(lines)
        lines.append(separator.join(columns))
        values.extend(numbers[: width // 2 * 2])  # an odd one is the score
    points = np.frombuffer(values, np.float32).reshape(len(lines), -1, 2) if lines else np.empty((0, 5, 2), np.float32)
    return PointList(_known(points), rows, lines, separator, header)


def _columns(line: str, separator: str) -> list[str]:
    if separator == " ":
        return line.split()
    return [column.strip() for column in (next(csv.reader([line])) if separator == "," else line.split(separator))]


def _point_columns(names: Sequence[str]) -> list[int]:
    """Places of x1, y1, x2, y2 ... (or from x0 on) in a header; none if it has no such names."""
    start = 0 if "x0" in names else 1
    numbers = itertools.takewhile(lambda k: f"x{k}" in names and f"y{k}" in names, itertools.count(start))
    return [names.index(f"{axis}{k}") for k in numbers for axis in "xy"]


def _is_header(columns: Sequence[str]) -> bool:
    """No number behind the first column."""
    return len(columns) > 2 and any(columns[1:]) and not any(_is_number(column) for column in columns[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known(points: NDArray[Any]) -> NDArray[Any]:
    return points[:, :MESH] if points.shape[1] == MESH_WITH_IRISES else points
