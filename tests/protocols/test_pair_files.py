"""Pair files: LFW's list, one's own lists in both dialects, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from visard.errors import FormatError, UserError
from visard.protocols.pair_files import Pairs, read_lfw_pairs, read_pair_list, read_pairs

IDS = [f"{name}/{name}_{number:04d}.jpg" for name in ("Ann", "Bo_Li", "Cy") for number in (1, 2, 3)]

LFW = "2\t1\nAnn\t1\t3\nAnn\t2\tCy\t1\nBo_Li\t1\t2\nBo_Li\t3\tCy\t3\n"


def write(folder: Path, text: str, name: str = "pairs.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def named(pairs: Pairs, ids: list[str] = IDS) -> list[tuple[str, str, bool, int]]:
    left, right = ([ids[row] for row in rows] for rows in (pairs.left, pairs.right))
    return list(zip(left, right, pairs.same.tolist(), pairs.fold.tolist(), strict=True))


@pytest.mark.parametrize("text", [LFW, LFW.replace("\t", " "), "\ufeff" + LFW.replace("\n", "\r\n")])
def test_lfw_list(tmp_path: Path, text: str) -> None:
    pairs = read_pairs(write(tmp_path, text), IDS)
    assert named(pairs) == [
        ("Ann/Ann_0001.jpg", "Ann/Ann_0003.jpg", True, 0),
        ("Ann/Ann_0002.jpg", "Cy/Cy_0001.jpg", False, 0),
        ("Bo_Li/Bo_Li_0001.jpg", "Bo_Li/Bo_Li_0002.jpg", True, 1),
        ("Bo_Li/Bo_Li_0003.jpg", "Cy/Cy_0003.jpg", False, 1),
    ]
    assert pairs.source == "pairs.txt"


@pytest.mark.parametrize("change", ["{}", "lfw/{}", "a/b/{}.png"])
def test_lfw_ids_with_another_suffix_or_below_folders(tmp_path: Path, change: str) -> None:
    ids = [change.format(image_id.removesuffix(".jpg")) for image_id in IDS]
    assert read_pairs(write(tmp_path, LFW), ids).left.tolist() == [0, 1, 3, 5]


def test_an_id_that_two_images_could_mean_is_missing(tmp_path: Path) -> None:
    ids = [f"x/{image_id}" for image_id in IDS] + [f"y/{image_id}" for image_id in IDS]
    with pytest.raises(UserError, match="have no embedding"):
        read_pairs(write(tmp_path, LFW), ids)


def test_one_number_as_header_is_one_fold(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, "1\nAnn\t1\t3\nAnn\t2\tCy\t1\n"), IDS)
    assert pairs.fold.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\t2\nAnn\t1\t3\n", r"announces 2 x 2 x 2 = 8 pairs, but 1 lines follow"),
        (LFW.replace("Ann\t1\t3", "Ann\t1\tCy\t1"), r"line 2: expected 3 words"),
        (LFW.replace("Ann\t2\tCy\t1", "Ann\t2\t3"), r"line 3: expected 4 words"),
        (LFW.replace("Bo_Li\t1\t2", "Bo_Li\tone\t2"), r"line 4: an image number"),
        ("0\t0\n", "announces"),
    ],
)
def test_a_damaged_lfw_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_pairs(write(tmp_path, text), IDS)


def test_read_lfw_pairs_wants_its_header(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="line 1: expected the number of folds"):
        read_lfw_pairs(write(tmp_path, "a.jpg b.jpg 1\n"), IDS)


def test_missing_images_are_named_or_kept(tmp_path: Path) -> None:
    path, ids = write(tmp_path, LFW), IDS[1:-1]
    with pytest.raises(UserError, match=r"2 images .*first: Ann/Ann_0001, Cy/Cy_0003\), so 2 of 4 pairs") as caught:
        read_pairs(path, ids)
    assert "--missing" in str(caught.value)
    pairs = read_pairs(path, ids, allow_missing=True)
    assert pairs.present.tolist() == [False, True, True, False]
    assert pairs.left.tolist() == [-1, 0, 2, 4]


@pytest.mark.parametrize(
    "text",
    [
        "# mine\na.jpg b.jpg 1 0\na c.jpg 0 0\n\nb.jpg a.jpg same 1\nc b different 1\n",
        "left,right,same,fold\na.jpg,b.jpg,1,0\na.jpg,c.jpg,0,0\nb.jpg,a.jpg,TRUE,1\nc.jpg,b.jpg,false,1\n",
        "note, fold, same, right, left\n-,0,1,b,a\n-,0,0,c,a\n-,1,1,a,b\n-,1,0,b,c\n",
        "a.jpg\tb.jpg\t1\t0\na.jpg\tc.jpg\t0\t0\nb.jpg\ta.jpg\t1\t1\nc.jpg\tb.jpg\t0\t1\n",
    ],
)
def test_own_list_in_every_dialect(tmp_path: Path, text: str) -> None:
    pairs = read_pairs(write(tmp_path, text), ["a.jpg", "b.jpg", "c.jpg"])
    assert pairs.left.tolist() == [0, 0, 1, 2]
    assert pairs.right.tolist() == [1, 2, 0, 1]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]


def test_ids_with_spaces_and_commas(tmp_path: Path) -> None:
    ids = ["a b.jpg", "c, d.jpg"]
    tabs = read_pairs(write(tmp_path, "a b.jpg\tc, d.jpg\t1\n".replace(", ", " ")), ["a b.jpg", "c d.jpg"])
    assert (tabs.left.tolist(), tabs.right.tolist()) == ([0], [1])
    quoted = read_pairs(write(tmp_path, 'left,right,same\na b.jpg,"c, d.jpg",0\n'), ids)
    assert (quoted.left.tolist(), quoted.right.tolist()) == ([0], [1])


def test_without_folds_each_kind_is_dealt_out_in_turn(tmp_path: Path) -> None:
    text = "".join(f"a b {same}\n" for same in (1, 1, 1, 0, 0, 0, 1))
    pairs = read_pair_list(write(tmp_path, text), ["a", "b"], folds=3)
    assert pairs.fold.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b 1\na b\n", r"line 2: expected 'left right same \[fold\]', got 2 columns"),
        ("a b 1\na b maybe\n", r"line 2: 'maybe' does not say"),
        ("a b 1 0\na b 0\n", "line 2: some lines have a fold"),
        ("a b 1 x\n", "line 1: the fold 'x'"),
        ("a,b,1\n", "line 1: a CSV list begins with"),
        ("left,right,same\na,b\n", "line 2: 2 columns, but the header has 3"),
        ("# nothing\n", "holds no pairs"),
        ("\n \n", "is empty"),
    ],
)
def test_a_damaged_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_pairs(write(tmp_path, text), ["a", "b"])
    assert str(tmp_path) in str(caught.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_pairs(tmp_path / "none.txt", IDS)
    with pytest.raises(FormatError, match="not a text file"):
        read_pairs(tmp_path, IDS)
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(FormatError, match="not a text file"):
        read_pairs(tmp_path / "image.jpg", IDS)


@pytest.mark.real_data
def test_the_official_list(shared_data: Path) -> None:
    path = shared_data / "lfw-pairs.txt"
    pairs = read_pairs(path, [], allow_missing=True)
    assert len(pairs) == 6000
    assert pairs.same.sum() == 3000
    assert not pairs.present.any()
