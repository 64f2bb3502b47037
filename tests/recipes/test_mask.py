"""`visard mask`: whole copies, ids and identities as they were, the same bytes again, pairs that name their twins."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visard.cli import main
from visard.data.dataset import open_dataset
from visard.data.writer import DatasetWriter
from visard.masks import template
from visard.pages import encode_image
from visard.protocols.pair_files import read_pairs

IDS = ["ann/1.jpg", "ann/2.jpg", "bob/1.jpg", "bob/2.jpg", "cem/1.jpg", "cem/2.jpg"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rendered crops of three people; the points of the last one are no face's."""
    folder = tmp_path_factory.mktemp("mask") / "data"
    faces = open_dataset("rendered:3x2,seed=2", size=112)
    with DatasetWriter(folder, 112, {"command": "test"}) as writer:
        for k, image_id in enumerate(IDS):
            points = faces.points(k) if k < 5 else np.full((5, 2), 40, np.float32)
            writer.add(image_id, image_id.split("/")[0], encode_image(faces.image(k), quality=97), points)
    return folder


def lines(out: Path) -> dict[str, dict[str, object]]:
    read = [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]
    return {line["id"]: line for line in read}


@pytest.mark.parametrize("kind", ["records", "folder"])
def test_a_masked_copy(source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["mask", str(source), str(out), "--tool", "template", "--to", kind, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 6
    assert report["masked"] + sum(report["refused"].values()) == 6
    assert report["refused"]["points"] == 1
    before, after = open_dataset(source), open_dataset(out)
    assert sorted(after.ids) == IDS
    assert list(after.identities) == list(before.identities)
    told = lines(out)
    for k, image_id in enumerate(after.ids):
        row = IDS.index(image_id)
        apart = np.abs(after.image(k).astype(int) - before.image(row)).mean()
        assert (apart > 3) == ("look" in told[image_id]), image_id
        assert np.allclose(after.points(k), before.points(row), atol=1e-3)  # type: ignore[arg-type]
        if "look" in told[image_id]:
            assert told[image_id]["tool"] == "template"
            assert told[image_id]["points"] == "kept"
    assert told["cem/2.jpg"]["refused"] == "points"
    page = (out / "masks.html").read_text()
    assert page.count("<img") == 6
    assert not list(tmp_path.glob(".*"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_masks(source: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, ("1", "1", "2"), strict=True):
        assert main(["mask", str(source), str(out), "--seed", seed]) == 0
    first, second, third = ((out / "train.rec").read_bytes() for out in outs)
    assert first == second != third


def test_one_side_of_pairs(source: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("ann/1.jpg\tann/2.jpg\t1\t0\nann/2.jpg\tbob/1.jpg\t0\t0\nbob/1.jpg\tcem/2.jpg\t0\t1\n")
    out = tmp_path / "out"
    assert main(["mask", str(source), str(out), "--pairs", str(pairs), "--tool", "template"]) == 0
    data = open_dataset(out)
    assert sorted(data.ids) == [
        "ann/1.jpg", "ann/2.jpg", "ann/2.masked.jpg", "bob/1.jpg", "bob/1.masked.jpg", "cem/2.masked.jpg",
    ]  # fmt: skip
    read = read_pairs(out / "pairs.txt", data.ids)
    named = [(data.ids[a], data.ids[b]) for a, b in zip(read.left.tolist(), read.right.tolist(), strict=True)]
    assert named[0] == ("ann/1.jpg", "ann/2.masked.jpg")
    assert read.same.tolist() == [True, False, False]
    assert read.fold.tolist() == [0, 0, 1]
    before = open_dataset(source)
    kept = data.ids.index("ann/2.jpg")
    assert np.array_equal(data.image(kept), before.image(1))
    assert lines(out)["ann/2.masked.jpg"]["source"] == "ann/2.jpg"
    # Pairs of images that are not there are left out, and counted.
    pairs.write_text(pairs.read_text() + "ann/1.jpg\tdan/1.jpg\t0\t1\n")
    assert main(["mask", str(source), str(tmp_path / "four"), "--pairs", str(pairs), "--tool", "template"]) == 0
    report = json.loads((tmp_path / "four" / "report.json").read_text())
    assert (report["pairs"], report["pairs_left_out"]) == (3, 1)
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:3]))
    # A refused image may be left out, with its pairs.
    less = tmp_path / "less"
    arguments = ["mask", str(source), str(less), "--pairs", str(pairs), "--tool", "template", "--refused", "leave-out"]
    assert main(arguments) == 0
    assert json.loads((less / "report.json").read_text())["pairs_left_out"] == 1
    assert len((less / "pairs.txt").read_text().splitlines()) == 3  # the remark and two pairs


def test_both_sides_with_one_tool_and_with_two(source: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("ann/1.jpg\tann/2.jpg\t1\nann/1.jpg\tbob/1.jpg\t0\n")
    common = ["mask", str(source)]
    both = ["--pairs", str(pairs), "--side", "both", "--tool", "template"]
    assert main([*common, str(tmp_path / "one"), *both]) == 0
    data = open_dataset(tmp_path / "one")
    assert sorted(data.ids) == ["ann/1.jpg", "ann/2.jpg", "bob/1.jpg"]
    assert len(read_pairs(pairs, data.ids)) == 2  # the old list still names them
    assert main([*common, str(tmp_path / "two"), *both, "--other-tool", "uv"]) == 0
    data = open_dataset(tmp_path / "two")
    assert sorted(data.ids) == ["ann/1.masked-template.jpg", "ann/2.masked-uv.jpg", "bob/1.masked-uv.jpg"]
    assert {line.get("tool") for line in lines(tmp_path / "two").values()} == {"template", "uv"}


def test_some_of_the_images_and_the_templates_points(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--probability", "0.5", "--points", "template", "--tool", "template", "--kinds", "cloth", "kn95"]
    assert main(["mask", str(source), str(out), *arguments]) == 0
    told = lines(out)
    masked = [line for line in told.values() if "look" in line]
    assert 1 <= len(masked) <= 5
    assert all(line["points"] == "template" for line in masked)
    assert all(line["look"]["kind"] in ("cloth", "kn95") for line in masked)  # type: ignore[index]
    plain = next(name for name, line in told.items() if "tool" not in line)
    before, after = open_dataset(source), open_dataset(out)
    assert np.array_equal(after.image(after.ids.index(plain)), before.image(IDS.index(plain)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--side", "both"], "--side and --other-tool need --pairs"),
        (["--other-tool", "uv"], "--other-tool belongs to --side both"),
        (["--probability", "2"], "--probability is 2.0; use 0 to 1"),
        (["--own-points", "x"], "--own-points belongs to --own"),
        (["--own", "no.png", "--tool", "uv"], "--own is for the 2D tool"),
        (["--own", "no.png"], "no.png: there is no such file"),
        (["--kinds", "veil"], "--kinds"),
        (["--pairs", "no.txt"], "no.txt"),
    ],
)
def test_mistakes_are_one_line(
    source: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mask", str(source), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("visard mask: ")
    assert said in error
    assert not list(tmp_path.iterdir())


def test_an_out_that_exists_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["mask", str(source), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Cut(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, call: int, *, after: bool) -> None:
    """Makes the given call of os.replace, counted from 1, the last thing that happens."""
    original, counter = os.replace, iter(range(1, 1_000_000))

    def stop_there(*arguments: Any, **keywords: Any) -> None:
        last = next(counter) == call
        if last and not after:
            raise Cut
        original(*arguments, **keywords)
        if last:
            raise Cut

    monkeypatch.setattr(os, "replace", stop_there)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """20 crops of five people, which are three shards, and OUT that was made of them without a stop."""
    folder = tmp_path_factory.mktemp("larger")
    faces = open_dataset("rendered:5x4,seed=3", size=112)
    with DatasetWriter(folder / "data", 112, {"command": "test"}) as writer:
        for k, image_id in enumerate(faces.ids):
            writer.add(f"{image_id}.jpg", image_id.split("/")[0], encode_image(faces.image(k), quality=90))
    assert main(["mask", str(folder / "data"), str(folder / "whole"), "--tool", "template"]) == 0
    return folder / "data", folder / "whole"


@pytest.mark.parametrize("kind", ["records", "folder"])
def test_cut_off_before_and_after_every_rename(
    larger: tuple[Path, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every finished file comes into being by os.replace: a command cut off on either side of any of them goes on."""
    arguments = ["mask", str(larger[0]), str(tmp_path / "out"), "--tool", "template", "--to", kind]
    assert main(["mask", str(larger[0]), str(tmp_path / "whole"), "--tool", "template", "--to", kind]) == 0
    whole = contents(tmp_path / "whole")
    calls = 0
    for call in range(1, 30):
        cuts = 0
        for after in (False, True):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            with monkeypatch.context() as patch:
                cut_at(patch, call, after=after)
                try:
                    assert main(arguments) == 0
                except Cut:
                    cuts += 1
            if cuts:
                assert main(arguments) == 0
            assert contents(tmp_path / "out") == whole
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
        if not cuts:
            break
        calls = call
    assert calls >= 1 + 3 + 1  # the record, the shards, and OUT itself


def test_interrupted_it_says_how_to_go_on_and_does_nothing_twice(
    larger: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["mask", str(larger[0]), str(tmp_path / "out"), "--tool", "template"]
    worn: list[int] = []

    def stopped_by_ctrl_c(image: Any, points: Any, look: Any) -> Any:
        worn.append(1)
        if len(worn) == 18:
            raise KeyboardInterrupt
        return template.wear(image, points, look)

    with monkeypatch.context() as patch:
        patch.setattr("visard.recipes.mask_writing.tool", lambda name: stopped_by_ctrl_c)
        assert main(arguments) == 130
    partial = tmp_path / "out.partial"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"visard mask: interrupted; 16 of 20 images are done and kept in {partial}, the same command goes on with the "
        "others"
    )
    assert main([*arguments, "--seed", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"visard mask: {partial} holds an unfinished run with other seed; repeat that command to finish it, or remove "
        "it to begin again"
    )
    worn.clear()
    with monkeypatch.context() as patch:
        patch.setattr("visard.recipes.mask_writing.tool", lambda name: stopped_by_ctrl_c)
        assert main(arguments) == 0
    assert len(worn) == 4
    assert "goes on: 16 of 20 images are done" in capsys.readouterr().err
    assert contents(tmp_path / "out")["train.rec"] == contents(larger[1])["train.rec"]
    assert not partial.exists()


def test_what_others_have_in_the_works_place_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letter = tmp_path / "out.partial" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("dear")
    assert main(["mask", str(source), str(tmp_path / "out")]) == 2
    assert "out.partial is in the way" in capsys.readouterr().err
    assert letter.read_text() == "dear"


def test_where_everything_was_refused_other_settings_are_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = open_dataset("rendered:2x1,seed=2", size=112)
    with DatasetWriter(tmp_path / "data", 112, {"command": "test"}) as writer:
        for k in range(2):
            writer.add(f"{k}.jpg", f"p{k}", encode_image(faces.image(k)), np.full((5, 2), 40, np.float32))
    arguments = ["mask", str(tmp_path / "data"), str(tmp_path / "out"), "--refused", "leave-out"]
    assert main(arguments) == 2
    assert "every crop was refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert main([*arguments, "--points", "template"]) == 0
