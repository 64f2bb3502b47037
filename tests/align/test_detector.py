"""Which of several faces is taken, and detections read from files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.align.detector import (
    CSV_COLUMNS,
    FileDetector,
    centrality,
    csv_row,
    largest_central,
    read_detections,
)
from visard.errors import FormatError, UserError
from visard.records import Face

POINTS = [[10.5, 20.0], [30.0, 20.0], [20.0, 30.0], [12.0, 40.0], [28.0, 40.25]]


def face(x: float, y: float, side: float, width: int = 400, height: int = 300, score: float = 0.9) -> Face:
    return Face(
        image=np.zeros((height, width, 3), dtype=np.uint8),
        points=np.array(POINTS, dtype=np.float32),
        score=score,
        box=np.array([x, y, side, side], dtype=np.float32),
    )


def test_no_face_gives_none() -> None:
    assert largest_central([]) is None


def test_the_larger_of_two_equally_central_faces_is_taken() -> None:
    small, large = face(180, 130, 40), face(150, 100, 100)
    assert largest_central([small, large]) is large
    assert largest_central([large, small]) is large


def test_a_central_face_wins_over_a_somewhat_larger_one_in_the_corner() -> None:
    central, corner = face(150, 100, 100), face(280, 0, 115)
    assert largest_central([corner, central]) is central


def test_a_much_larger_face_wins_from_the_side() -> None:
    central, aside = face(185, 135, 30), face(220, 60, 180)
    assert largest_central([central, aside]) is aside


def test_confidence_does_not_decide() -> None:
    passer_by, portrait = face(0, 0, 60, score=0.99), face(140, 90, 120, score=0.7)
    assert largest_central([passer_by, portrait]) is portrait


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200), st.floats(5, 200)), min_size=1, max_size=5))
def test_resizing_the_photograph_does_not_change_the_order(boxes: list[tuple[float, float, float]]) -> None:
    for scale in (0.5, 3.0):
        for x, y, side in boxes:
            here = centrality(face(x, y, side))
            there = centrality(face(scale * x, scale * y, scale * side, int(400 * scale), int(300 * scale)))
            assert there == pytest.approx(scale**2 * here, rel=1e-3, abs=1)


def test_json_lines_with_and_without_box_and_score(tmp_path: Path) -> None:
    path = tmp_path / "faces.jsonl"
    lines = [
        {"id": "a/1.jpg", "points": POINTS, "score": 0.5, "box": [1, 2, 30, 40]},
        {"id": "a/1.jpg", "points": POINTS},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    image = np.zeros((50, 60, 3), dtype=np.uint8)
    detector = FileDetector(read_detections(path))
    first, second = detector.detect(image, "a/1.jpg")
    assert first.score == 0.5
    np.testing.assert_array_equal(first.box, [1, 2, 30, 40])
    np.testing.assert_array_equal(first.points, np.float32(POINTS))
    assert second.score == 1
    x, y, width, height = second.box
    assert x < 10.5
    assert y < 20
    assert x + width > 30
    assert y + height > 40.25
    assert detector.detect(image, "b.jpg") == []


def test_csv_gives_back_what_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    points, box, score = random.normal(size=10).astype(np.float32), random.random(4).astype(np.float32), 0.1 + 0.2
    path = tmp_path / "faces.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerow(csv_row("a, b/1.jpg", score, box, points))
    (detection,) = read_detections(path)["a, b/1.jpg"]
    np.testing.assert_array_equal(detection.points.ravel(), points)
    np.testing.assert_array_equal(detection.box, box)
    assert detection.score == np.float32(score)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("f.jsonl", "{", "line 1 is not JSON"),
        ("f.jsonl", '\n{"points": [[1, 2]]}', r"line 2: points have the shape \(1, 2\)"),
        ("f.jsonl", json.dumps({"points": POINTS}), "line 1: 'id' is missing"),
        ("f.jsonl", json.dumps({"id": "a"}), "line 1: 'points' is missing"),
        ("f.jsonl", json.dumps({"id": "a", "points": POINTS, "box": [1, 2]}), "not x, y, width, height"),
        ("f.jsonl", "[1, 2]", "expected an object"),
        ("f.csv", "id,x1,y1\na,1,2\n", "line 1: the column x2 is missing; expected id, x1, y1 ... x5, y5"),
        ("f.csv", ",".join(CSV_COLUMNS) + "\na" + "," * 6 + "7" + "," * 9 + "\n", "line 2: 'points' is missing"),
        ("f.csv", ",".join(CSV_COLUMNS) + "\na" + ",x" * 15 + "\n", "line 2: could not convert"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=problem):
        read_detections(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.jsonl", json.dumps({"id": "a", "points": None}) + "\n" + json.dumps({"id": "b", "points": POINTS})),
        ("f.csv", ",".join(CSV_COLUMNS) + "\na" + "," * 15 + "\nb" + ",1" * 15 + "\n"),
    ],
)
def test_a_line_without_points_says_that_there_is_no_face(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    detector = FileDetector(read_detections(tmp_path / name))
    photograph = np.zeros((9, 9, 3), np.uint8)
    assert [(i, detector.lists(i), len(detector.detect(photograph, i))) for i in "abc"] == [
        ("a", True, 0),
        ("b", True, 1),
        ("c", False, 0),
    ]


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_detections(tmp_path / "none.csv")
    (tmp_path / "faces.xml").write_text("")
    with pytest.raises(UserError, match=r"\.csv or \.jsonl"):
        read_detections(tmp_path / "faces.xml")
