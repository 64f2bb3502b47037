"""What a face detector is, which of several faces is taken, and detections that come from a file.

In: a photograph, (H, W, 3) uint8 RGB. Out: `Face` values, pixels of that photograph. Detections from a file are keyed
    by image
id and are given in pixels of the photograph as people see it, that is after its EXIF orientation.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visard.errors import FormatError, UserError
from visard.records import Face, Float32Array, UInt8Array

POINT_COLUMNS = tuple(f"{axis}{k}" for k in range(1, 6) for axis in "xy")
CSV_COLUMNS = ("id", "score", "x", "y", "width", "height", *POINT_COLUMNS)
"""Columns of a detections CSV; `prepare` writes the faces that it took in the same form."""


class Detector(Protocol):
    """Finds faces. Implementations: `YuNet`, `MTCNN`, `FileDetector`."""

    def detect(self, image: UInt8Array, image_id: str = "") -> list[Face]:
        """Every face found, in no particular order.

        Args:
            image: (H, W, 3) uint8 RGB.
            image_id: which photograph this is; only detections from a file need it.
        """
        ...


def largest_central(faces: Sequence[Face]) -> Face | None:
    """The face a portrait is of: the one with the largest `centrality`; the earlier of two equal ones. None of no
    faces."""
    return max(faces, key=centrality, default=None)


def centrality(face: Face) -> float:
    """Box area minus twice the squared distance of the box's centre from the photograph's centre, in square pixels.

    A face in the corner must have an area larger by twice the squared distance to win over one in the middle. The order
    does not change when the photograph is resized. Source: facenet's alignment of LFW and CASIA
    (`detect_multiple_faces` off).
    """
    height, width = face.image.shape[:2]
    x, y, w, h = (float(value) for value in face.box)
    distance_squared = (x + w / 2 - width / 2) ** 2 + (y + h / 2 - height / 2) ** 2
    return float(w * h - 2 * distance_squared)


@dataclass(frozen=True)
class Detection:
    """One face as a file gives it: what `Face` holds, without the photograph.

    Args:
        points: (5, 2) float32 pixels.
        score: confidence, 0..1.
        box: (4,) float32 x, y, width, height.
    """

    points: Float32Array
    score: float
    box: Float32Array


class FileDetector:
    """Another detector's boxes and points, read from a file by `read_detections`."""

    def __init__(self, detections: Mapping[str, Sequence[Detection]]) -> None:
        self._detections = detections

    def lists(self, image_id: str) -> bool:
        """Whether the file has a line for the photograph, be it without a face."""
        return image_id in self._detections

    def detect(self, image: UInt8Array, image_id: str = "") -> list[Face]:
        """The faces listed for `image_id`; none if it is not listed."""
        return [
            Face(image=image, points=d.points, score=d.score, box=d.box) for d in self._detections.get(image_id, ())
        ]


def read_detections(path: Path) -> dict[str, list[Detection]]:
    """Detections by image id from a `.csv` or `.jsonl` file, one face a line.

    CSV: a header with `id`, x1, y1 ... x5, y5, and optionally `score` (1 if absent) and `x`, `y`, `width`, `height`.
    JSON lines: {"id": "a/1.jpg", "points": [[x, y], ... five], "score": 0.98, "box": [x, y, width, height]}, score and
    box optional. A line with an id and no point (empty cells, "points": null) says that the photograph shows no face.
    Without a box, the face's box is the square about the points, twice as wide as they spread.

    Raises:
        FormatError: a line that is none of this, by its number.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of detections; check the name given to --detections")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".json"):
        raise UserError(f"{path}: detections are read from .csv or .jsonl files; rename or convert it")
    found: dict[str, list[Detection]] = {}
    rows = _csv_rows(path) if suffix == ".csv" else _json_rows(path)
    for line, row in rows:
        try:
            image_id, detection = _parse(row)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise FormatError(path, f"line {line}: {problem}; a line needs an id and five points") from error
        faces = found.setdefault(image_id, [])
        if detection is not None:
            faces.append(detection)
    return found


def csv_row(image_id: str, score: float, box: Iterable[float], points: Iterable[float]) -> list[str]:
    """One line of a detections CSV, in the order of `CSV_COLUMNS`; numbers so that float32 comes back exactly."""
    return [image_id, *(repr(float(np.float32(value))) for value in (score, *box, *points))]


def _csv_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        absent = [name for name in ("id", *POINT_COLUMNS) if name not in (reader.fieldnames or ())]
        if absent:
            raise FormatError(path, f"line 1: the column {absent[0]} is missing; expected id, x1, y1 ... x5, y5")
        for row in reader:
            values: dict[str, Any] = {"id": row["id"]} if row.get("id") else {}
            if all(row.get(name) for name in POINT_COLUMNS):
                values["points"] = np.reshape([row[name] for name in POINT_COLUMNS], (5, 2))
            elif not any(row.get(name) for name in POINT_COLUMNS):
                values["points"] = None
            if row.get("score"):
                values["score"] = row["score"]
            box = [row.get(name) for name in ("x", "y", "width", "height")]
            if any(box):
                values["box"] = box
            yield reader.line_num, values


def _json_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise FormatError(
                        path, f"line {number} is not JSON ({error}); one face a line is expected"
                    ) from error


def _parse(row: dict[str, Any]) -> tuple[str, Detection | None]:
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    if row["points"] is None:
        return str(row["id"]), None
    points = np.asarray(row["points"], dtype=np.float32)
    if points.shape != (5, 2):
        raise ValueError(f"points have the shape {points.shape}, expected five of (x, y)")
    box = row.get("box")
    box_values = _box_about(points) if box is None else np.asarray(box, dtype=np.float32)
    if box_values.shape != (4,) or not np.isfinite(box_values).all():
        raise ValueError(f"the box {box!r} is not x, y, width, height")
    score = row.get("score")
    return str(row["id"]), Detection(points=points, score=1.0 if score is None else float(score), box=box_values)


def _box_about(points: Float32Array) -> Float32Array:
    low, high = points.min(axis=0), points.max(axis=0)
    side = 2 * float((high - low).max())
    centre = (low + high) / 2
    return np.array([centre[0] - side / 2, centre[1] - side / 2, side, side], dtype=np.float32)
