"""Small files beside images that say what file names cannot: landmarks, and ids and identities of any spelling.

In: CSV with a header. `points.csv`: file, x0, y0 ... x4, y4 (pixels; empty = none). `images.csv`: file, id, identity
(empty = unlabelled). Files are paths below the folder, with "/". Out: dictionaries by file. Errors name file and line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from visard.errors import FormatError
from visard.records import Float32Array

POINTS, IMAGES = "points.csv", "images.csv"
POINTS_HEADER = ("id", *(f"{axis}{k}" for k in range(5) for axis in "xy"))
IMAGES_HEADER = ("file", "id", "identity")


def read_points(path: Path, files: Sequence[str]) -> Float32Array | None:
    """(N, 5, 2) float32 in the order of `files`, NaN where the table has none; None if there is no table.

    Raises:
        FormatError: a line that is not a file and ten numbers, or a file that comes twice.
    """
    if not path.is_file():
        return None
    found: dict[str, list[float]] = {}
    for line, row in _rows(path, POINTS_HEADER):
        numbers = [text for text in row[1:] if text]
        if numbers:
            try:
                values = [float(text) for text in numbers]
            except ValueError as error:
                raise FormatError(
                    path, f"line {line}: {error}; expected ten numbers after the name, correct it or leave the line out"
                ) from error
            if len(values) != 10 or not np.isfinite(values).all() or max(map(abs, values)) > 1e6:
                raise FormatError(
                    path,
                    f"line {line}: expected ten coordinates in pixels after the name; correct it or leave the line out",
                )
            if row[0] in found:
                raise FormatError(path, f"line {line}: {row[0]!r} comes twice; keep one line for each file")
            found[row[0]] = values
    points = np.full((len(files), 10), np.nan, np.float32)
    for i, file in enumerate(files):
        if file in found:
            points[i] = found[file]
    return points.reshape(-1, 5, 2)


def read_images(path: Path) -> dict[str, tuple[str, str]]:
    """file -> (id, identity); empty if there is no table."""
    if not path.is_file():
        return {}
    found: dict[str, tuple[str, str]] = {}
    for line, row in _rows(path, IMAGES_HEADER):
        if len(row) != 3 or not row[0] or not row[1]:
            raise FormatError(path, f"line {line}: expected 'file,id,identity', got {','.join(row)[:60]!r}; correct it")
        if "\n" in row[1] + row[2] or row[0] in found:
            raise FormatError(
                path,
                f"line {line}: {row[0]!r} comes twice or has a line break in its names; keep one line for each file",
            )
        found[row[0]] = (row[1], row[2])
    return found


def points_row(name: str, points: Float32Array | None) -> list[str]:
    """A line of `points.csv`; nine digits bring a float32 back as it was."""
    return [name] if points is None else [name, *(f"{value:.9g}" for value in points.ravel().tolist())]


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A CSV file with names that need not be UTF-8."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _rows(path: Path, header: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of the lines behind the header."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.reader(file, strict=True)
        try:
            first = next(table, [])
            if tuple(first) != tuple(header):
                problem = f"line 1: expected {','.join(header)}, got {','.join(first)[:60]!r}"
                raise FormatError(path, f"{problem}; if it is no table of visard's, move it away")
            for row in table:
                if row:
                    yield table.line_num, row
        except csv.Error as error:
            raise FormatError(path, f"line {table.line_num}: not a line of CSV ({error}); correct it") from error
