"""Pair files: LFW's list, one's own lists in both dialects, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.errors import FormatError, UserError
from visard.protocols.pair_files import (
    Pairs,
    _can_be_listed,
    consecutive_pairs,
    read_lfw_pairs,
    read_pair_list,
    read_pairs,
    write_pairs,
)

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


def test_view_1_is_one_fold_and_dealt_out(tmp_path: Path) -> None:
    """pairsDevTrain.txt and pairsDevTest.txt: one number, that many genuine lines, as many impostors."""
    text = "3\nAnn\t1\t2\nAnn\t1\t3\nCy\t1\t2\nAnn\t2\tCy\t1\nAnn\t3\tBo_Li\t1\nCy\t3\tBo_Li\t2\n"
    pairs = read_pairs(write(tmp_path, text), IDS, folds=2)
    assert pairs.same.tolist() == [True, True, True, False, False, False]
    assert pairs.fold.tolist() == [0, 1, 0, 0, 1, 0]


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
    with pytest.raises(UserError, match=r"2 images .*first: Ann/Ann_0001, Cy/Cy_0003; line 2\), so 2 of 4") as caught:
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
        ("1,2\n3,4\n", "give the folder Protocol/Split/FF or FP"),
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
    with pytest.raises(UserError, match="a folder but not one of CFP's"):
        read_pairs(tmp_path, IDS)
    with pytest.raises(FormatError, match="is a folder, not a file"):
        read_lfw_pairs(tmp_path, IDS)
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(FormatError, match="not a text file"):
        read_pairs(tmp_path / "image.jpg", IDS)


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        (["p1/0001", "p2/0001"], [0, 1]),
        (["x/p1/0001.png", "y/p2/0001.png"], [0, 1]),
        (["0001.png", "0002.png"], [-1, -1]),  # two people of the list end in 0001
        (["x/p1/0001.png", "y/p1/0001.png", "p2/0001"], [-1, 2]),
        (["x/p1/0001.png", "p1/0001.jpg", "p2/0001.jpg"], [1, 2]),
    ],
)
def test_an_image_is_found_below_folders_only_if_it_alone_is_meant(
    tmp_path: Path, ids: list[str], rows: list[int]
) -> None:
    pairs = read_pairs(write(tmp_path, "p1/0001.jpg p2/0001.jpg 0\n"), ids, allow_missing=True)
    assert [pairs.left[0], pairs.right[0]] == rows


def test_a_list_that_names_more_folders_than_the_ids(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, "data/lfw/Ann/1.jpg data/lfw/Cy/1.jpg 0\n"), ["Ann/1.jpg", "Cy/1.jpg"])
    assert (pairs.left.tolist(), pairs.right.tolist()) == ([0], [1])


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8), min_size=2, max_size=6, unique=True
    ),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=8),
    st.sampled_from(["", "mine: 3 of each, seed 0", "10 300", "a,b"]),
)
def test_written_pairs_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], rows: list[tuple[int, int, bool, int]], remark: str
) -> None:
    path = tmp_path_factory.mktemp("pairs") / "list.txt"
    left, right, same, fold = (np.array(column) for column in zip(*rows, strict=True))
    pairs = Pairs(left % len(ids), right % len(ids), same.astype(bool), fold)
    if not all(_can_be_listed(ids[row]) for row in (*pairs.left, *pairs.right)):
        with pytest.raises(UserError, match="cannot stand in a list"):
            write_pairs(path, pairs, ids, remark=remark)
        assert not list(path.parent.iterdir())
        return
    write_pairs(path, pairs, ids, remark=remark)
    again = read_pairs(path, ids)
    for name in ("left", "right", "same", "fold"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pairs, name))
    assert [p.name for p in path.parent.iterdir()] == ["list.txt"]


@pytest.mark.parametrize("bad", ["a\tb", "#a", " a", "a\n", "a\u2028b", "a\udcff", ""])
def test_an_id_that_a_list_cannot_hold_is_refused(tmp_path: Path, bad: str) -> None:
    pairs = Pairs(np.array([0]), np.array([1]), np.array([True]), np.array([0]))
    with pytest.raises(UserError, match="cannot stand in a list"):
        write_pairs(tmp_path / "list.txt", pairs, ["good", bad])


@pytest.mark.parametrize(("count", "folds"), [(6000, 10), (7, 3), (3, 10), (1, 10), (0, 10)])
def test_pairs_of_a_bin_set_are_cut_into_blocks(count: int, folds: int) -> None:
    pairs = consecutive_pairs(np.arange(count) % 2 == 0, folds=folds, source="x")
    assert pairs.left.tolist() == list(range(0, 2 * count, 2))
    assert pairs.right.tolist() == list(range(1, 2 * count, 2))
    # KFold without shuffling: the first count % folds blocks are one longer.
    sizes = [count // folds + (k < count % folds) for k in range(folds)]
    assert np.bincount(pairs.fold, minlength=folds).tolist() == sizes
    assert (np.diff(pairs.fold) >= 0).all()


@pytest.mark.real_data
def test_the_official_list(shared_data: Path) -> None:
    path = shared_data / "lfw-pairs.txt"
    pairs = read_pairs(path, [], allow_missing=True)
    assert len(pairs) == 6000
    assert pairs.same.sum() == 3000
    assert not pairs.present.any()
