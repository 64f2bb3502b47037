"""`visard mask --templates`: the templates of one side are masked, everything else stays, and the lists fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from visard.cli import main
from visard.data.dataset import open_dataset
from visard.data.formats.point_lists import read_point_list
from visard.data.formats.template_lists import TemplateList, TemplatePairs, read_template_pairs, read_templates
from visard.data.writer import DatasetWriter
from visard.masks import template
from visard.pages import encode_image

IDS = [f"{number}.jpg" for number in range(1, 9)]
# 1 and 2 stand in the first column only, 11 in the second only, 12 in both, 30 in none. Image 6 is in 2 and in 11.
LISTED = "1.jpg 1 70\n2.jpg 1 71\n3.jpg 2 72\n6.jpg 2 75\n4.jpg 11 73\n6.jpg 11 75\n5.jpg 12 74\n7.jpg 30 76\n"
PAIRED = "1 11 1\n2 11 0\n1 12 0\n12 11 1\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rendered crops, unlabelled as IJB-C's are; 8.jpg is in no template."""
    folder = tmp_path_factory.mktemp("templates")
    faces = open_dataset("rendered:4x2,seed=2", size=112)
    with DatasetWriter(folder / "data", 112, {"command": "test"}) as writer:
        for k, image_id in enumerate(IDS):
            writer.add(image_id, None, encode_image(faces.image(k), quality=97), faces.points(k))
    (folder / "ijbc_face_tid_mid.txt").write_text(LISTED)
    (folder / "ijbc_template_pair_label.txt").write_text(PAIRED)
    return folder


def masked(source: Path, out: Path, *more: str) -> int:
    lists = [
        "--templates",
        str(source / "ijbc_face_tid_mid.txt"),
        "--pairs",
        str(source / "ijbc_template_pair_label.txt"),
    ]
    return main(["mask", str(source / "data"), str(out), *lists, "--tool", "template", *more])


def lists_of(out: Path) -> tuple[TemplateList, TemplatePairs]:
    listed = read_templates(out / "meta" / "ijbc_face_tid_mid.txt")
    return listed, read_template_pairs(out / "meta" / "ijbc_template_pair_label.txt", listed.templates)


def named(listed: TemplateList) -> list[tuple[str, int, str]]:
    return list(zip(listed.images, listed.templates.tolist(), listed.rest, strict=True))


def compared(pairs: TemplatePairs) -> list[tuple[int, int, int]]:
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), strict=True))


def changed(source: Path, out: Path) -> set[str]:
    """Ids of OUT whose pixels are not those of the image that they were made from."""
    before, after = open_dataset(source / "data"), open_dataset(out)
    rows = {image_id: row for row, image_id in enumerate(before.ids)}
    return {
        image_id
        for k, image_id in enumerate(after.ids)
        if not np.array_equal(after.image(k), before.image(rows[image_id.replace(".masked", "")]))
    }


@pytest.mark.parametrize("kind", ["records", "folder"])
def test_the_probes_are_masked(source: Path, tmp_path: Path, kind: str) -> None:
    assert masked(source, tmp_path / "out", "--to", kind) == 0
    listed, pairs = lists_of(tmp_path / "out")
    # Bare lines in their order. 6.jpg is needed twice; template 12 too, so its masked version is template 31.
    assert named(listed) == [
        ("1.jpg", 1, "70"), ("2.jpg", 1, "71"), ("3.jpg", 2, "72"), ("6.jpg", 2, "75"), ("4.jpg", 11, "73"),
        ("6.masked.jpg", 11, "75"), ("5.jpg", 12, "74"), ("7.jpg", 30, "76"), ("5.masked.jpg", 31, "74"),
    ]  # fmt: skip
    assert compared(pairs) == [(1, 11, 1), (2, 11, 0), (1, 31, 0), (12, 11, 1)]
    assert changed(source, tmp_path / "out") == {"4.jpg", "6.masked.jpg", "5.masked.jpg"}
    data = open_dataset(tmp_path / "out")
    assert set(data.ids) == {*IDS, "6.masked.jpg", "5.masked.jpg"}, "8.jpg, which is in no template, too"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["templates"] == 6
    assert report["templates_masked"] == 2
    assert report["renumbered"] == {"12": 31}
    assert report["pairs"] == 4
    assert report["lines_left_out"] == report["pairs_left_out"] == 0


def test_the_gallery_is_masked(source: Path, tmp_path: Path) -> None:
    assert masked(source, tmp_path / "out", "--side", "first") == 0
    listed, pairs = lists_of(tmp_path / "out")
    assert [line for line in named(listed) if "masked" in line[0]] == [
        ("6.masked.jpg", 2, "75"),
        ("5.masked.jpg", 31, "74"),
    ]
    assert compared(pairs) == [(1, 11, 1), (2, 11, 0), (1, 12, 0), (31, 11, 1)]
    assert changed(source, tmp_path / "out") == {"1.jpg", "2.jpg", "3.jpg", "6.masked.jpg", "5.masked.jpg"}


def test_both_sides_by_one_tool_keep_the_lists_to_the_byte(source: Path, tmp_path: Path) -> None:
    assert masked(source, tmp_path / "out", "--side", "both") == 0
    meta = tmp_path / "out" / "meta"
    assert (meta / "ijbc_face_tid_mid.txt").read_text() == LISTED
    assert (meta / "ijbc_template_pair_label.txt").read_text() == PAIRED
    assert changed(source, tmp_path / "out") == {f"{k}.jpg" for k in range(1, 7)}, (
        "not 7.jpg, whose template no pair names"
    )


def test_both_sides_by_two_tools(source: Path, tmp_path: Path) -> None:
    assert masked(source, tmp_path / "out", "--side", "both", "--other-tool", "uv") == 0
    listed, pairs = lists_of(tmp_path / "out")
    assert named(listed)[3] == ("6.masked-template.jpg", 2, "75")
    assert named(listed)[5:] == [
        ("6.masked-uv.jpg", 11, "75"), ("5.masked-template.jpg", 12, "74"), ("7.jpg", 30, "76"),
        ("5.masked-uv.jpg", 31, "74"),
    ]  # fmt: skip
    assert compared(pairs) == [(1, 11, 1), (2, 11, 0), (1, 31, 0), (12, 11, 1)]
    told = {
        (line := json.loads(text))["id"]: line for text in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()
    }
    assert {told[name]["tool"] for name in ("1.jpg", "3.jpg", "6.masked-template.jpg")} == {"template"}
    assert {told[name]["tool"] for name in ("4.jpg", "5.masked-uv.jpg", "6.masked-uv.jpg")} == {"uv"}


def test_a_set_without_pairs_is_masked_whole(source: Path, tmp_path: Path) -> None:
    arguments = ["--templates", str(source / "ijbc_face_tid_mid.txt"), "--tool", "template"]
    assert main(["mask", str(source / "data"), str(tmp_path / "out"), *arguments, "--side", "both"]) == 0
    assert changed(source, tmp_path / "out") == {f"{k}.jpg" for k in range(1, 8)}


def test_the_mask_of_an_image_does_not_depend_on_the_side(source: Path, tmp_path: Path) -> None:
    assert masked(source, tmp_path / "one") == 0
    assert masked(source, tmp_path / "both", "--side", "both") == 0
    one, both = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "both")
    assert np.array_equal(one.image(one.ids.index("6.masked.jpg")), both.image(both.ids.index("6.jpg")))


def test_images_that_are_not_there_or_refused_go_with_their_lines(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = open_dataset(source / "data")
    with DatasetWriter(tmp_path / "data", 112, {"command": "test"}) as writer:
        for k, image_id in enumerate(IDS):
            if image_id not in ("3.jpg", "6.jpg"):  # template 2 loses all of its images
                points = np.full((5, 2), 40, np.float32) if image_id == "5.jpg" else faces.points(k)
                writer.add(image_id, None, encode_image(faces.image(k)), points)
    for name in ("ijbc_face_tid_mid.txt", "ijbc_template_pair_label.txt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert masked(tmp_path, tmp_path / "kept") == 0
    said = capsys.readouterr().out
    assert "3 lines of" in said
    assert "1 refused (1 points), as they were" in said
    listed, pairs = lists_of(tmp_path / "kept")
    assert 2 not in listed.templates
    assert compared(pairs) == [(1, 11, 1), (1, 31, 0), (12, 11, 1)]
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert report["templates_masked"] == 1, "the one image of 31 stayed as it was"
    assert masked(tmp_path, tmp_path / "less", "--refused", "leave-out") == 0
    listed, pairs = lists_of(tmp_path / "less")
    assert 31 not in listed.templates, "the masked version of 12 was its one image"
    assert compared(pairs) == [(1, 11, 1), (12, 11, 1)]
    report = json.loads((tmp_path / "less" / "report.json").read_text())
    assert report["lines_left_out"] == 4
    assert report["pairs_left_out"] == 2


@pytest.mark.parametrize(
    ("listed", "paired", "more", "said"),
    [
        (LISTED, None, [], "--templates needs --pairs, the list of pairs of templates"),
        (LISTED, None, ["--side", "both", "--other-tool", "uv"], "--templates needs --pairs"),
        ("1.jpg 1\n", PAIRED, [], "line 1: '1.jpg 1'; expected 'IMAGE TEMPLATE MEDIA'"),
        ("1.jpg 1 70\n2.jpg one 70\n", PAIRED, [], "line 2: '2.jpg one 70'; expected"),
        ("1.jpg 1 70\n1.jpg 1 71\n", PAIRED, [], "line 2: '1.jpg' comes twice in template 1"),
        ("# none\n", PAIRED, [], "holds no images"),
        ("a.jpg 1 70\n", "1 1 1\n", [], "none of its 1 images (first: a.jpg) is in"),
        (LISTED, "1 11\n", [], "line 1: '1 11'; expected 'TEMPLATE TEMPLATE SAME'"),
        (LISTED, "1 11 1\n1 11 2\n", [], "line 2: '1 11 2'; expected"),
        (LISTED, "1 11 1\nx 11 1\n", [], "line 2: 'x 11 1'; expected"),
        (LISTED, "\n", [], "holds no pairs"),
        (LISTED, "1 11 1\n1 99 0\n", [], "pair 2 (1 99): template 99 has no images"),
        (LISTED, PAIRED, ["--points", "elsewhere/t.txt"], "another list is called t.txt too; rename one"),
    ],
)
def test_mistakes_are_one_line(
    source: Path, tmp_path: Path, listed: str, paired: str | None, more: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "t.txt").write_text(listed)
    arguments = ["mask", str(source / "data"), str(tmp_path / "out"), "--templates", str(tmp_path / "t.txt"), *more]
    if paired is not None:
        (tmp_path / "p.txt").write_text(paired)
        arguments += ["--pairs", str(tmp_path / "p.txt")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} <= {"t.txt", "p.txt"}


def test_an_interrupted_set_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the last of four masks, in the second of two lots."""
    shutil.copytree(source / "data", tmp_path / "data")
    shutil.copy(source / "ijbc_template_pair_label.txt", tmp_path)
    (tmp_path / "ijbc_face_tid_mid.txt").write_text(LISTED + "8.jpg 11 77\n")
    assert masked(tmp_path, tmp_path / "whole") == 0
    worn: list[int] = []

    def stopped(image: Any, points: Any, look: Any) -> Any:
        worn.append(1)
        if len(worn) == 4:
            raise KeyboardInterrupt
        return template.wear(image, points, look)

    with monkeypatch.context() as patch:
        patch.setattr("visard.recipes.mask_writing.tool", lambda name: stopped)
        assert masked(tmp_path, tmp_path / "out") == 130
        assert (tmp_path / "out.partial").is_dir()
        assert masked(tmp_path, tmp_path / "out") == 0
    assert len(worn) == 5
    for name in ("train.rec", "masks.jsonl", "meta/ijbc_face_tid_mid.txt", "meta/ijbc_template_pair_label.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_lists_are_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--templates", "--pairs"):
        lists = {"--templates": str(source / "ijbc_face_tid_mid.txt"), "--pairs": "p.txt"} | {option: "no.txt"}
        assert main(["mask", str(source / "data"), str(tmp_path / "out"), *(w for p in lists.items() for w in p)]) == 2
        assert "no.txt: cannot be read (No such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IJB-C as it is handed round: loose_crop/ with images of several shapes, meta/ with the three lists."""
    folder = tmp_path_factory.mktemp("loose") / "IJBC"
    faces = open_dataset("rendered:3x1,seed=2", size=112)
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    lines = []
    # Small, as large as an aligned crop, so large that the mask is drawn in a smaller window.
    for number, scale in enumerate((0.7, 1.0, 4.5), start=1):
        size = round(112 * scale)
        image = cv2.resize(faces.image(number - 1), (size, size), interpolation=cv2.INTER_AREA)
        top, left = 20 * number, 15
        room = cv2.copyMakeBorder(image, top, 40, left, 60, cv2.BORDER_CONSTANT, value=(90, 120, 90))
        (folder / "loose_crop" / f"{number}.png").write_bytes(encode_image(room, ".png"))
        points = (faces.points(number - 1) + 0.5) * scale - 0.5 + (left, top)  # type: ignore[operator]
        lines.append(" ".join([f"{number}.png", *(f"{value:.3f}" for value in points.ravel()), "0.99"]) + "\n")
    (folder / "meta" / "ijbc_name_5pts_score.txt").write_text("".join(lines))
    (folder / "meta" / "ijbc_face_tid_mid.txt").write_text("1.png 1 7\n2.png 2 8\n3.png 3 9\n")
    (folder / "meta" / "ijbc_template_pair_label.txt").write_text("1 2 0\n1 3 0\n3 2 0\n")
    return folder


def test_loose_crops_with_their_lists_are_ijbc_again(loose: Path, tmp_path: Path) -> None:
    meta = loose / "meta"
    out = tmp_path / "masked"
    lists = ["--templates", str(meta / "ijbc_face_tid_mid.txt"), "--pairs", str(meta / "ijbc_template_pair_label.txt")]
    points = ["--loose", "--points", str(meta / "ijbc_name_5pts_score.txt")]
    assert main(["mask", str(loose / "loose_crop"), str(out), *lists, *points]) == 0
    assert sorted(path.name for path in (out / "loose_crop").iterdir()) == ["1.png", "2.png", "3.masked.png", "3.png"]
    assert (out / "meta" / "ijbc_face_tid_mid.txt").read_text() == "1.png 1 7\n2.png 2 8\n3.png 3 9\n3.masked.png 4 9\n"
    assert (out / "meta" / "ijbc_template_pair_label.txt").read_text() == "1 2 0\n1 4 0\n3 2 0\n"
    # The list of points goes line by line with that of images, as evaluators read them.
    before = (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()
    after = (out / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines()
    assert after == [*before, before[2].replace("3.png", "3.masked.png")]
    for name in ("1.png", "3.png"):
        assert (out / "loose_crop" / name).read_bytes() == (loose / "loose_crop" / name).read_bytes()
    found = read_point_list(meta / "ijbc_name_5pts_score.txt", [])
    for name, source in (("2.png", "2.png"), ("3.masked.png", "3.png")):
        old, new = (cv2.imread(str(f)) for f in (loose / "loose_crop" / source, out / "loose_crop" / name))
        assert old is not None
        assert new is not None
        assert old.shape == new.shape
        assert found.rows is not None
        eyes_nose_mouth = found.values[found.rows[source]]
        apart = (old != new).any(axis=2)
        eyes = np.linalg.norm(eyes_nose_mouth[1] - eyes_nose_mouth[0])
        x, y = eyes_nose_mouth[3:].mean(axis=0).round().astype(int)
        around = slice(int(y - 0.2 * eyes), int(y + 0.2 * eyes)), slice(int(x - 0.3 * eyes), int(x + 0.3 * eyes))
        assert apart[around].mean() > 0.9, "the mouth is covered"
        assert not apart[: int(eyes_nose_mouth[:2, 1].min())].any(), "nothing above the eyes is touched"
        assert 0.02 < apart.mean() < 0.6
    assert "file" in (out / "masks.jsonl").read_text()
    assert (out / "masks.html").read_text().count("<img") == 2


def test_loose_crops_without_points_are_refused(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(loose / "loose_crop")
    assert main(["mask", folder, str(tmp_path / "out"), "--loose", "--refused", "leave-out"]) == 2
    assert "every crop was refused" in capsys.readouterr().err
    for more, said in (
        (["--points", "template"], "--loose and --points template exclude each other"),
        (["--to", "records"], "--loose crops have many shapes"),
    ):
        assert main(["mask", folder, str(tmp_path / "out"), "--loose", *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["mask", str(loose / "meta" / "no"), str(tmp_path / "out"), "--loose"]) == 2
    assert "--loose takes a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_loose_crops_do_not_lie_where_the_lists_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "1.png").write_bytes(encode_image(np.zeros((40, 50, 3), np.uint8), ".png"))
    assert main(["mask", str(folder), str(tmp_path / "out"), "--loose"]) == 2
    assert "meta: OUT keeps its lists under that name; rename the folder" in capsys.readouterr().err
