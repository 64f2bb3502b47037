"""In-Shop's and SOP's lists, as the tests write them: parts, labels, roles, and every kind of damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.data.dataset import open_dataset
from visard.data.formats.retrieval_lists import KS, RetrievalList, is_retrieval_list, read_retrieval_list
from visard.errors import FormatError, UserError

INSHOP_ROWS = (
    ("img/a/1.jpg", "id_7", "train"),
    ("img/a/2.jpg", "id_7", "train"),
    ("img/b/1.jpg", "id_3", "train"),
    ("img/c/1.jpg", "id_9", "query"),
    ("img/c/2.jpg", "id_9", "gallery"),
    ("img/d/1.jpg", "id_1", "gallery"),
    ("img/d/2.jpg", "id_1", "query"),
)
SOP_ROWS = (
    ("1", "1", "1", "bicycle_final/1_0.JPG"),
    ("2", "1", "1", "bicycle_final/1_1.JPG"),
    ("3", "5", "2", "x/y.png"),
)


def write_inshop(folder: Path, rows: Sequence[tuple[str, str, str]] = INSHOP_ROWS) -> Path:
    path = folder / "list_eval_partition.txt"
    body = "".join(f"{file:<40}{name:<12}{status}\n" for file, name, status in rows)
    path.write_text(f"{len(rows)}\nimage_name item_id evaluation_status\n{body}")
    return path


def write_sop(folder: Path, rows: Sequence[tuple[str, ...]] = SOP_ROWS) -> Path:
    path = folder / "Ebay_test.txt"
    path.write_text("image_id class_id super_class_id path\n" + "".join(" ".join(row) + "\n" for row in rows))
    return path


def draw(folder: Path, files: Sequence[str]) -> None:
    """Images of another shape each: 40 px high, 30 px and more wide."""
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture = np.full((40, 30 + number, 3), 20 * number, np.uint8)
        (folder / file).write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())


def test_parts_of_inshop(tmp_path: Path) -> None:
    path = write_inshop(tmp_path)
    draw(tmp_path, [row[0] for row in INSHOP_ROWS])
    train = open_dataset(f"{path}#train", size=32, resize=True)
    assert list(train.ids) == ["img/a/1.jpg", "img/a/2.jpg", "img/b/1.jpg"]
    assert (train.labels.tolist(), list(train.identities)) == ([0, 0, 1], ["id_7", "id_3"])
    assert train.image(2).shape == (32, 32, 3)
    test = open_dataset(f"{path}#test", size=32, resize=True)
    assert isinstance(test, RetrievalList)
    assert (test.labels.tolist(), list(test.identities)) == ([0, 0, 1, 1], ["id_9", "id_1"])
    assert test.sought is not None
    assert test.sought.tolist() == [True, False, False, True]
    assert test.ks == (1, 10, 20, 30)
    assert set(test.identities).isdisjoint(train.identities)
    gallery = open_dataset(f"{path}#gallery", size=32, resize=True)
    assert list(gallery.ids) == ["img/c/2.jpg", "img/d/1.jpg"]


def test_as_deepfashions_archives_unpack(tmp_path: Path) -> None:
    (tmp_path / "Eval").mkdir()
    path = write_inshop(tmp_path / "Eval")
    draw(tmp_path / "Img", [row[0] for row in INSHOP_ROWS])
    data = open_dataset(f"{path}#query", size=32, resize=True)
    assert data.image(1).shape == (32, 32, 3)


def test_sop(tmp_path: Path) -> None:
    path = write_sop(tmp_path)
    draw(tmp_path, [row[-1] for row in SOP_ROWS])
    data = open_dataset(path, size=32, resize=True)
    assert isinstance(data, RetrievalList)
    assert list(data.ids) == [row[-1] for row in SOP_ROWS]
    assert (data.labels.tolist(), list(data.identities), data.sought) == ([0, 0, 1], ["1", "5"], None)
    assert data.ks == (1, 10, 100, 1000)
    assert len(data) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("list_eval_partition.txt", "its images are for training and for testing; name one of list_eval_partition"),
        ("list_eval_partition.txt#val", "#val is none of its parts; name one of"),
        ("Ebay_test.txt#train", "this list has no parts"),
        ("plain.txt#train", "this file has no parts"),
        (".#train", "of a folder there is #nested"),
    ],
)
def test_parts_that_are_not_there(source: str, said: str, tmp_path: Path) -> None:
    write_inshop(tmp_path)
    write_sop(tmp_path)
    (tmp_path / "plain.txt").write_text("a.jpg 1\n")
    with pytest.raises(UserError, match=said):
        open_dataset(f"{tmp_path}/{source}", size=32, resize=True)


def test_a_part_without_images(tmp_path: Path) -> None:
    path = write_inshop(tmp_path, INSHOP_ROWS[:3])
    with pytest.raises(FormatError, match="names no image of query"):
        open_dataset(f"{path}#query", size=32, resize=True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train\n", "trian\n", "line 3: expected 'image_name item_id evaluation_status', got 'img/a/1.jpg"),
        ("id_3 ", "     ", "line 5: expected"),
        ("img/a/2.jpg", "img/a/1.jpg", "line 4: 'img/a/1.jpg' comes twice"),
        ("7\n", "8\n", "line 1: says '8' images, 7 follow"),
        ("7\n", "\n", "line 1: says '' images, 7 follow"),
        ("img/d/2.jpg", "img/d 2.jpg", "line 9: expected"),
    ],
)
def test_damage_is_named_by_its_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = write_inshop(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(FormatError, match=said):
        read_retrieval_list(path)


@pytest.mark.parametrize("line", ["4 1 1", "4 1 1 a.jpg b", "4 one 1 a.jpg", "4 1 x a.jpg", "a.jpg 1"])
def test_damage_in_sops_list(line: str, tmp_path: Path) -> None:
    path = write_sop(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(FormatError, match="line 5: expected 'image_id class_id super_class_id path'"):
        read_retrieval_list(path)


@given(st.binary(max_size=80), st.integers(0, 200), st.sampled_from(["inshop", "sop"]))
def test_any_damage_is_one_clear_line(tmp_path_factory: pytest.TempPathFactory, put: bytes, at: int, kind: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = (write_inshop if kind == "inshop" else write_sop)(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + put + whole[at + len(put) :])
    try:
        rows = read_retrieval_list(path)
    except FormatError as error:
        said = str(error)
        rows = None
    if rows is None:
        assert said.startswith(f"{path}: ")
        assert "\n" not in said
    else:
        assert rows.header in KS
        assert len(rows.files) == len(set(rows.files)) == len(rows.classes) == len(rows.statuses) > 0


def test_other_lists_are_no_such_lists(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg 1\nb.jpg 2\n")
    assert not is_retrieval_list(tmp_path / "list.txt")
    assert is_retrieval_list(write_sop(tmp_path))
    with pytest.raises(FormatError, match="expected the header"):
        read_retrieval_list(tmp_path / "list.txt")
