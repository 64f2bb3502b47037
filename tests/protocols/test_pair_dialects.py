"""Published lists of pairs, made here in their layouts: names, answers, folds, and every way to be damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visard.errors import FormatError, UserError
from visard.protocols.pair_files import Pairs, read_pairs

PEOPLE, FRONTAL, PROFILE, CFP_PAIRS = 20, 10, 4, 7


def named(pairs: Pairs, ids: list[str]) -> list[tuple[str, str, bool, int]]:
    left, right = ([ids[row] for row in rows] for rows in (pairs.left, pairs.right))
    return list(zip(left, right, pairs.same.tolist(), pairs.fold.tolist(), strict=True))


@pytest.fixture
def cfp(tmp_path: Path) -> Path:
    """cfp-dataset/Protocol with 20 people instead of 500 and 7 + 7 pairs a fold instead of 350 + 350."""
    protocol = tmp_path / "cfp-dataset" / "Protocol"
    people = range(1, PEOPLE + 1)
    for name, pose, images in (("F", "frontal", FRONTAL), ("P", "profile", PROFILE)):
        paths = [
            f"../Data/Images/{person:03d}/{pose}/{image:02d}.jpg" for person in people for image in range(1, images + 1)
        ]
        protocol.mkdir(parents=True, exist_ok=True)
        lines = [f"{number} {path}" for number, path in enumerate(paths, start=1)]
        (protocol / f"Pair_list_{name}.txt").write_text("\r\n".join(lines) + "\r\n")
    for kind, images in (("FF", FRONTAL), ("FP", PROFILE)):
        for fold in range(10):
            folder = protocol / "Split" / kind / f"{fold + 1:02d}"
            folder.mkdir(parents=True)
            mine, other = 2 * fold, 2 * fold + 1
            same = [f"{mine * FRONTAL + 1},{mine * images + 1 + k % images}" for k in range(CFP_PAIRS)]
            diff = [f"{mine * FRONTAL + 1 + k},{other * images + 1}" for k in range(CFP_PAIRS)]
            (folder / "same.txt").write_text("\n".join(same) + "\n")
            (folder / "diff.txt").write_text("\n".join(diff))
    return protocol


def cfp_ids(pattern: str = "{:03d}/{}/{:02d}.jpg") -> list[str]:
    poses = (("frontal", FRONTAL), ("profile", PROFILE))
    return [pattern.format(p, pose, k) for p in range(1, PEOPLE + 1) for pose, n in poses for k in range(1, n + 1)]


@pytest.mark.parametrize(
    "pattern", ["{:03d}/{}/{:02d}.jpg", "Data/Images/{:03d}/{}/{:02d}.png", "cfp/Data/Images/{:03d}/{}/{:02d}"]
)
def test_cfp(cfp: Path, pattern: str) -> None:
    ids = cfp_ids(pattern)
    for kind, second in (("FF", "frontal"), ("FP", "profile")):
        pairs = read_pairs(cfp / "Split" / kind, ids)
        found = named(pairs, ids)
        assert len(found) == 10 * 2 * CFP_PAIRS
        assert np.bincount(pairs.fold).tolist() == [2 * CFP_PAIRS] * 10
        assert found[1] == (pattern.format(1, "frontal", 1), pattern.format(1, second, 2), True, 0)
        assert found[CFP_PAIRS + 2] == (pattern.format(1, "frontal", 3), pattern.format(2, second, 1), False, 0)
        assert found[-1] == (pattern.format(19, "frontal", 7), pattern.format(20, second, 1), False, 9)
        assert pairs.source == f"CFP-{kind}"


def test_cfp_images_that_are_not_there_are_named_with_their_line(cfp: Path) -> None:
    ids = [image_id for image_id in cfp_ids() if image_id != "002/profile/01.jpg"]
    with pytest.raises(UserError, match=r"1 images .*002/profile/01.jpg; 01/diff.txt line 1\), so 7 of 140 pairs"):
        read_pairs(cfp / "Split" / "FP", ids)
    pairs = read_pairs(cfp / "Split" / "FP", ids, allow_missing=True)
    assert (~pairs.present).sum() == CFP_PAIRS
    # "frontal/01" of another person must never stand in.
    assert not read_pairs(cfp / "Split" / "FF", ["frontal/01.jpg", "01.jpg"], allow_missing=True).present.any()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Split/FP/03/same.txt", "1,2\n1;2\n", r"03/same.txt: line 2: expected two numbers 'i,j'"),
        ("Split/FP/03/diff.txt", "1,81\n", r"03/diff.txt: line 1: there is no image 81 in .*Pair_list_P.txt"),
        ("Split/FP/03/diff.txt", "", r"03/diff.txt: is empty"),
        (
            "Pair_list_F.txt",
            "one ../Data/Images/001/frontal/01.jpg\n",
            r"Pair_list_F.txt: line 1: expected 'number path'",
        ),
    ],
)
def test_damaged_cfp_is_refused_by_file_and_line(cfp: Path, file: str, text: str, message: str) -> None:
    (cfp / file).write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        read_pairs(cfp / "Split" / "FP", cfp_ids())
    assert "\n" not in str(caught.value)


def test_parts_of_cfp_that_are_missing_or_meant(cfp: Path) -> None:
    for folder in (cfp, cfp / "Split", cfp / "Split" / "FP" / "01", cfp.parent):
        with pytest.raises(UserError, match=r"give \.\.\./Protocol/Split/FF"):
            read_pairs(folder, cfp_ids())
    (cfp / "Split/FF/02/diff.txt").unlink()
    with pytest.raises(UserError, match=r"02/diff.txt: there is no such file"):
        read_pairs(cfp / "Split" / "FF", cfp_ids())
    (cfp / "Pair_list_P.txt").unlink()
    with pytest.raises(UserError, match=r"Pair_list_P.txt is missing, which names the images"):
        read_pairs(cfp / "Split" / "FP", cfp_ids())


def calfw(folds: int = 10, each: int = 3) -> tuple[str, list[str]]:
    """Genuine pairs first, numbered by fold from 1; then the impostors, all 0, in the order of the folds."""
    genuine = [
        (f"P{f}_000{2 * k + 1}.jpg", f"P{f}_000{2 * k + 2}.jpg", f + 1) for f in range(folds) for k in range(each)
    ]
    impostor = [(f"P{f}_0001.jpg", f"Q{f}_000{k + 1}.jpg", 0) for f in range(folds) for k in range(each)]
    text = "".join(f"{a} {number}\n{b} {number}\n" for a, b, number in genuine + impostor)
    return text, sorted({name for a, b, _ in genuine + impostor for name in (a, b)})


@pytest.mark.parametrize("below", ["", "aligned images/", "calfw/aligned images/"])
def test_calfw(tmp_path: Path, below: str) -> None:
    text, names = calfw()
    (tmp_path / "pairs_CALFW.txt").write_text(text)
    ids = [below + name for name in names]
    pairs = read_pairs(tmp_path / "pairs_CALFW.txt", ids)
    assert len(pairs) == 60
    assert named(pairs, ids)[4] == (below + "P1_0003.jpg", below + "P1_0004.jpg", True, 1)
    assert named(pairs, ids)[-1] == (below + "P9_0001.jpg", below + "Q9_0003.jpg", False, 9)
    assert pairs.fold[pairs.same].tolist() == pairs.fold[~pairs.same].tolist() == np.repeat(np.arange(10), 3).tolist()


def test_cplfw_has_only_ones_and_zeros(tmp_path: Path) -> None:
    text, names = calfw()
    lines = [line.split() for line in text.splitlines()]
    (tmp_path / "p.txt").write_text("".join(f"{name} {min(int(number), 1)}\n" for name, number in lines))
    pairs = read_pairs(tmp_path / "p.txt", names)
    assert pairs.fold[pairs.same].tolist() == pairs.fold[~pairs.same].tolist() == np.repeat(np.arange(10), 3).tolist()
    assert np.bincount(read_pairs(tmp_path / "p.txt", names, folds=4).fold).tolist() == [16, 16, 14, 14]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", "line 3: the last pair has one line"),
        ("a.jpg 1\nb.jpg 0\n", "lines 1 and 2 are one pair but have the numbers 1 and 0"),
        ("a.jpg 1\nb.jpg 1\nc.jpg\nd.jpg 0\n", "line 3: expected 'image number'"),
        ("a.jpg 1\nb.jpg one\n", "line 2: expected 'image number'"),
    ],
)
def test_a_damaged_two_line_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_pairs(tmp_path / "p.txt", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])


def test_agedb_30_as_text_keeps_its_folds(tmp_path: Path) -> None:
    """6,000 lines, 300 genuine and 300 impostor ones a fold, the folds one after another without a number."""
    lines, fold = [], []
    for f in range(10):
        for k in range(600):
            other = f"{f}{k:03d}_B.jpg" if k < 300 else f"{f}{k:03d}_C.jpg"
            lines.append(f"{f}{k:03d}_A.jpg {other} {int(k < 300)}")
            fold.append(f)
    (tmp_path / "agedb_30_pair.txt").write_text("\n".join(lines) + "\n")
    ids = sorted({word for line in lines for word in line.split()[:2]})
    pairs = read_pairs(tmp_path / "agedb_30_pair.txt", ids)
    assert pairs.fold.tolist() == fold
    assert pairs.same.sum() == 3000
    # Sorted by kind, blocks would have one kind only: the kinds are dealt out then.
    (tmp_path / "sorted.txt").write_text("\n".join(sorted(lines, key=lambda line: line[-1])) + "\n")
    dealt = read_pairs(tmp_path / "sorted.txt", ids)
    assert np.bincount(dealt.fold[dealt.same]).tolist() == [300] * 10
    assert dealt.fold[:3].tolist() == [0, 1, 2]


def rfw_lines(folds: int = 10, each: int = 3) -> list[str]:
    lines = []
    for fold in range(folds):
        lines += [f"m.0{fold}x\t{k + 1}\t{k + 2}" for k in range(each)]
        lines += [f"m.0{fold}x\t{k + 1}\tm.0{fold}y\t{k + 1}" for k in range(each)]
    return lines


def test_rfw_is_lfw_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "African_pairs.txt"
    path.write_text("\n".join(rfw_lines()) + "\n")
    ids = [f"African/m.0{f}{w}/m.0{f}{w}_{k:04d}.jpg" for f in range(10) for w in "xy" for k in range(1, 5)]
    pairs = read_pairs(path, ids)
    found = named(pairs, ids)
    assert len(found) == 60
    assert found[1] == ("African/m.00x/m.00x_0002.jpg", "African/m.00x/m.00x_0003.jpg", True, 0)
    assert found[9] == ("African/m.01x/m.01x_0001.jpg", "African/m.01y/m.01y_0001.jpg", False, 1)
    assert np.bincount(pairs.fold).tolist() == [6] * 10
    assert np.bincount(pairs.fold, pairs.same).tolist() == [3] * 10


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("m.00x\t1\tm.00y", "line 2: an image number is no whole number"),
        ("m.00x\t1", "line 2: expected 4 words"),
        ("m.00x\tone\tm.00y\t2", "line 2: an image number is no whole number"),
    ],
)
def test_a_damaged_line_of_rfw_is_named(tmp_path: Path, line: str, problem: str) -> None:
    lines = rfw_lines()
    lines[1] = line
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    with pytest.raises(FormatError, match=problem):
        read_pairs(tmp_path / "pairs.txt", [])


def test_an_own_list_of_numbered_images_is_not_taken_for_rfw(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("1 2 1\n3 4 0\n1 3 0\n2 1 1\n")
    pairs = read_pairs(tmp_path / "own.txt", ["1", "2", "3", "4"], folds=2)
    assert pairs.same.tolist() == [True, False, False, True]
    (tmp_path / "own.txt").write_text("1 2 1 0\n3 4 0 0\n1 3 0 1\n2 1 1 1\n")
    assert read_pairs(tmp_path / "own.txt", ["1", "2", "3", "4"]).fold.tolist() == [0, 0, 1, 1]


def test_matlab_splits_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "04_FINAL_protocol_30_years.mat").write_bytes(b"MATLAB 5.0 MAT-file\x00\x01IM\xff\xfe")
    with pytest.raises(FormatError, match=r"MATLAB file.*agedb_30\.bin"):
        read_pairs(tmp_path / "04_FINAL_protocol_30_years.mat", [])
