"""Lists in the field's three kinds of lines, and the tables beside folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.formats.crops import S, encoded, points_of
from visard.data.dataset import FolderDataset, ListDataset, open_dataset
from visard.data.formats.lists import read_list
from visard.errors import FormatError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(["p0/0.jpg", "p0/1.jpg", "p1/0 b.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(i))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "p0/0.jpg 0\np0/1.jpg 0\np1/0 b.jpg 1\n"),
        ("list.txt", "\ufeffp0/0.jpg\t0\r\np0/1.jpg\t0\r\n# p1\n\np1/0 b.jpg\t1"),
        ("train.lst", "7\t0.000000\tp0/0.jpg\n8\t0.000000\tp0/1.jpg\n1\t1.000000\tp1/0 b.jpg\n"),
        ("train.lst", "0\t0\t3.5\t0.25\tp0/0.jpg\n1\t0\t1\t1\tp0/1.jpg\n2\t1\t0\t0\tp1/0 b.jpg\n"),
        ("faces.lst", "1\tp0/0.jpg\t0\n1\tp0/1.jpg\t0\n1\tp1/0 b.jpg\t1\n"),
        ("faces.lst", "1\tp0/0.jpg\t0\t12\t13\n1\tp0/1.jpg\t0\t1\t1\n1\tp1/0 b.jpg\t1\t2\t2\n"),
    ],
)
def test_kinds_of_lines(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    data = open_dataset(folder / name)
    assert isinstance(data, ListDataset)
    assert list(data.ids) == ["p0/0.jpg", "p0/1.jpg", "p1/0 b.jpg"]
    assert (data.labels.tolist(), list(data.identities), data.size) == ([0, 0, 1], ["0", "1"], S)
    assert data.encoded(2) == encoded(2)


def test_names_as_labels_and_unlabelled_images(folder: Path) -> None:
    (folder / "a.txt").write_text("p0/0.jpg bob\np0/1.jpg ann\np1/0 b.jpg bob\n")
    data = open_dataset(folder / "a.txt")
    assert (data.labels.tolist(), list(data.identities)) == ([0, 1, 0], ["bob", "ann"])
    (folder / "a.txt").write_text("p0/0.jpg -1\np0/1.jpg 3\n")
    data = open_dataset(folder / "a.txt")
    assert (data.labels.tolist(), list(data.identities)) == ([-1, 3], ["0", "1", "2", "3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no images"),
        ("p0/0.jpg 0\np0/1.jpg\n", "line 2: expected 'PATH LABEL'"),
        ("p0/0.jpg 0\np0/0.jpg 1\n", "image 2: 'p0/0.jpg' comes twice"),
        ("p0/0.jpg 0.5\n", "image 1: the label '0.5' is not an identity's number"),
        ("p0/0.jpg 99999999\n", "not an identity's number"),
        ("p0/0.jpg p0/1.jpg\n", "labels look like files"),
        ("0\t1\t2\n", "line 1: expected"),
    ],
)
def test_mistakes_are_named(folder: Path, text: str, message: str) -> None:
    (folder / "a.txt").write_text(text)
    with pytest.raises(FormatError, match=message):
        open_dataset(folder / "a.txt")


def test_an_image_that_is_missing_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("p0/9.jpg 0\n")
    with pytest.raises(UserError, match=r"p0/9\.jpg: cannot be read"):
        open_dataset(folder / "a.txt")


def test_what_lies_beside_a_list(folder: Path) -> None:
    (folder / "a.txt").write_text("p0/0.jpg 0\np0/1.jpg 0\n")
    (folder / "a.ids.txt").write_text("one\ntwo\n")
    (folder / "a.identities.txt").write_text("ann\nbob\n")
    np.save(folder / "a.points.npy", np.stack([points_of(0), np.full((5, 2), np.nan, np.float32)]))
    data = open_dataset(folder / "a.txt")
    assert (list(data.ids), list(data.identities)) == (["one", "two"], ["ann", "bob"])
    first = data.points(0)
    assert first is not None
    np.testing.assert_array_equal(first, points_of(0))
    assert data.points(1) is None
    resized = open_dataset(folder / "a.txt", size=2 * S, resize=True).points(0)
    assert resized is not None
    np.testing.assert_allclose(resized, (points_of(0) + 0.5) * 2 - 0.5, rtol=1e-6)
    for name, text in (("ids.txt", "one\n"), ("ids.txt", "one\none\n"), ("identities.txt", "")):
        whole = (folder / f"a.{name}").read_bytes()
        (folder / f"a.{name}").write_text(text)
        with pytest.raises(FormatError, match=rf"a\.{name}"):
            open_dataset(folder / "a.txt")
        (folder / f"a.{name}").write_bytes(whole)
    np.save(folder / "a.points.npy", np.zeros((3, 5, 2), np.float32))
    with pytest.raises(FormatError, match=r"a\.points\.npy: is <f4 \(3, 5, 2\)"):
        open_dataset(folder / "a.txt")


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.text("ab.jpg01-\t \n\r#/", max_size=60).map(str.encode)))
def test_random_lists_give_only_format_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("list") / "a.txt"
    path.write_bytes(data)
    try:
        files, labels = read_list(path)
    except FormatError:
        return
    assert len(files) == len(labels) > 0


def test_tables_beside_a_folder(folder: Path) -> None:
    (folder / "images.csv").write_text('file,id,identity\np0/0.jpg,17,"Ann, B."\np1/0 b.jpg,x,\n')
    rows = ",".join(f"{value:.9g}" for value in points_of(0).ravel())
    header = "id," + ",".join(f"{axis}{k}" for k in range(5) for axis in "xy")
    (folder / "points.csv").write_text(f"{header}\np0/0.jpg,{rows}\np0/1.jpg\nnobody.jpg,{rows}\n")
    data = open_dataset(folder)
    assert isinstance(data, FolderDataset)
    assert list(data.ids) == ["17", "p0/1.jpg", "x"]
    assert (data.labels.tolist(), list(data.identities)) == ([0, 1, -1], ["Ann, B.", "p0"])
    found = data.points(0)
    assert found is not None
    np.testing.assert_array_equal(found, points_of(0))
    assert data.points(1) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("points.csv", "a,b\n", "line 1: expected id,x0,y0"),
        ("points.csv", "HEADER\np0/0.jpg,1,2\n", "line 2: expected ten coordinates"),
        ("points.csv", "HEADER\np0/0.jpg,a\n", "line 2: could not convert"),
        ("points.csv", "HEADER\np0/0.jpg,nan" + ",1" * 9 + "\n", "line 2: expected ten coordinates"),
        ("points.csv", "HEADER\n" + ("p0/0.jpg" + ",1" * 10 + "\n") * 2, "line 3: 'p0/0.jpg' comes twice"),
        ("images.csv", "file,id,identity\na,b\n", "line 2: expected 'file,id,identity'"),
        ("images.csv", "file,id,identity\np0/0.jpg,x,p\np0/1.jpg,x,p\n", "the image id 'x' comes twice"),
        ("images.csv", 'file,id,identity\n"p0', "not a line of CSV"),
    ],
)
def test_tables_that_are_damaged(folder: Path, name: str, text: str, message: str) -> None:
    header = "id," + ",".join(f"{axis}{k}" for k in range(5) for axis in "xy")
    (folder / name).write_text(text.replace("HEADER", header))
    with pytest.raises(FormatError, match=message):
        open_dataset(folder)
