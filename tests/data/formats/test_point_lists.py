"""Lists of points: IJB's, visard's own, a landmarker's array."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from visard.data.formats.point_lists import read_point_list
from visard.errors import FormatError, UserError

NUMBERS = "38.5 51 73 52 56 71 41 92 70 92.25"
POINTS = np.array(NUMBERS.split(), np.float32).reshape(5, 2)


@pytest.mark.parametrize(
    "text",
    [
        f"1.jpg {NUMBERS} 0.9997\n2.jpg {NUMBERS} 0.5\n",
        f"1.jpg {NUMBERS}\n# a remark\n\n2.jpg {NUMBERS}\n2.jpg {NUMBERS}\n",
        f"1.jpg\t{NUMBERS}\n2.jpg\t{NUMBERS}\n".replace(" ", "\t"),
        f"id,x0,y0,x1,y1,x2,y2,x3,y3,x4,y4\n1.jpg,{NUMBERS}\n2.jpg,{NUMBERS}\n3.jpg,,,,,,,,,,\n".replace(" ", ","),
        f"id,score,x,y,width,height,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n1.jpg,1,2,3,4,5,{NUMBERS}\n2.jpg,1,2,3,4,5,{NUMBERS}\n"
        .replace(" ", ","),
    ],
)  # fmt: skip
def test_lines_of_any_dialect(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    found = read_point_list(tmp_path / "p.csv", [])
    assert found.rows == {"1.jpg": 0, "2.jpg": 1}
    assert np.array_equal(found.points(0, "2.jpg"), POINTS)  # type: ignore[arg-type]
    assert found.points(0, "3.jpg") is None
    first = next(line for line in text.splitlines() if line.startswith("1.jpg"))
    assert found.line("1.jpg", "new.jpg") == first.replace("1.jpg", "new.jpg") + "\n"
    assert found.line("3.jpg", "new.jpg") is None


def test_lines_without_points_and_ends_of_old_macs(tmp_path: Path) -> None:
    numbers = NUMBERS.replace(" ", ",")
    head = "id,faces,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5"
    (tmp_path / "p.csv").write_bytes(f"{head}\r1.jpg,0,,,,,,,,,,\r2.jpg,1,{numbers}\r".encode())
    found = read_point_list(tmp_path / "p.csv", [])
    assert found.rows == {"2.jpg": 0}
    assert np.array_equal(found.points(0, "2.jpg"), POINTS)  # type: ignore[arg-type]


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, points=np.ones((1, 5, 2)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.npy", b"", "is no array that can be read"),
        ("p.npy", zipped(), "is no array that can be read"),
        ("p.npy", b"PK\x03\x04abc", "is no array that can be read"),
        ("p.npy", b"\x93NUMPY\x01\x00\x04\x00{'a(", "is no array that can be read"),
        ("p.csv", b"a" * 200_000 + b",1,2", "is no list of points"),
        ("p.txt", b"a 1 " + b"x" * 9000, "line 1: could not convert string to float: 'xxx"),
    ],
)
def test_files_of_another_kind_are_refused_in_one_short_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_point_list(tmp_path / name, ["a"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_with_commas(tmp_path: Path) -> None:
    head, numbers = "id,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5", NUMBERS.replace(" ", ",")
    (tmp_path / "p.csv").write_text(f'{head}\n"a,b.jpg",{numbers}\n')
    found = read_point_list(tmp_path / "p.csv", [])
    assert found.points(0, "a,b.jpg") is not None
    assert found.line("a,b.jpg", "a,b.masked.jpg") == f'"a,b.masked.jpg",{numbers}\n'


@pytest.mark.parametrize("count", [5, 68, 106, 468, 478])
def test_arrays(tmp_path: Path, count: int) -> None:
    values = np.random.default_rng(count).uniform(0, 112, (3, count, 2))
    values[1, 0] = np.nan
    np.save(tmp_path / "p.npy", values)
    found = read_point_list(tmp_path / "p.npy", ["a", "b", "c"])
    points = found.points(2, "c")
    assert points is not None
    assert points.dtype == np.float32
    assert np.allclose(points, values[2][:468])
    assert found.points(1, "b") is None


def test_a_folder_or_an_array_of_objects(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name the list of points or the \.npy in it"):
        read_point_list(tmp_path, ["a"])
    np.save(tmp_path / "p.npy", np.array([None, "x"]), allow_pickle=True)
    with pytest.raises(FormatError, match=r"can be read \(it holds Python objects\); save"):
        read_point_list(tmp_path / "p.npy", ["a"])


def test_an_array_of_nothing_but_nan(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.full((1, 5, 2), np.nan))
    with pytest.raises(FormatError, match="holds no points"):
        read_point_list(tmp_path / "p.npy", ["a"])
