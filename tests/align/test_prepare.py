"""`visard prepare` end to end on made photographs: nothing lost, the same bytes however it is run."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.align.photos import bright_square_network, photograph, photograph_folder, squares, write_image
from visard.align.photographs import decode, encode_jpeg
from visard.align.prepare import PrepareConfig, main
from visard.cli import main as command_line
from visard.data.dataset import open_dataset
from visard.errors import UserError
from visard.functional.geometry import ARCFACE_TEMPLATE, crop, template


def prepare(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return main(PrepareConfig(src=source, out=out, **{"processes": 1, **settings})).value


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_out(folder: Path) -> dict[str, tuple[str, str]]:
    with (folder / "left_out.csv").open(newline="", errors="surrogateescape") as file:
        return {row["id"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


def test_crops_ids_points_and_identities(tmp_path: Path) -> None:
    detections = photograph_folder(tmp_path / "src", people=3, images=2)
    value = prepare(tmp_path / "src", tmp_path / "out", detections=detections)
    assert (value["photographs"], value["crops"], value["identities"], value["left_out"]) == (6, 6, 3, 0)
    data = open_dataset(tmp_path / "out")
    assert list(data.ids) == [f"person-{p}/{k}.jpg" for p in range(3) for k in range(2)]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(data.identities) == ["person-0", "person-1", "person-2"]
    for index in range(6):
        photo = decode((tmp_path / "src" / data.ids[index]).read_bytes())
        points = photograph(1000 * (index // 2) + index % 2)[1]
        expected = decode(encode_jpeg(crop(photo, np.float32(points), 112), 95))
        np.testing.assert_array_equal(data.image(index), expected)
        # The points were made by a similarity from the template, so they come back to lie on it.
        np.testing.assert_allclose(data.points(index), ARCFACE_TEMPLATE, atol=1e-3)
    assert not (tmp_path / "out.partial").exists()


def test_photographs_in_no_folder_are_unlabelled_as_in_a_folder_of_crops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images have the same labels whether they are prepared or opened where they lie."""
    for number, name in enumerate(("b/1.png", "alone.png", "c/1.png", "b/2.png", "zoe.png")):
        write_image(tmp_path / "src" / name, crop(photograph(number)[0], photograph(number)[1], 112))
    arguments = ["prepare", str(tmp_path / "src"), str(tmp_path / "out"), "--aligned", "--processes", "1"]
    assert command_line(arguments) == 0
    assert "2 crops have no identity (their photographs lie directly in SRC)" in capsys.readouterr().out
    prepared, folder = open_dataset(tmp_path / "out"), open_dataset(tmp_path / "src")
    assert list(prepared.ids) == ["b/1.png", "b/2.png", "c/1.png", "alone.png", "zoe.png"]
    assert prepared.labels.tolist() == [0, 0, 1, -1, -1]
    assert list(prepared.identities) == list(folder.identities) == ["b", "c"]
    assert dict(zip(folder.ids, folder.labels, strict=True)) == dict(zip(prepared.ids, prepared.labels, strict=True))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["identities"], report["unlabelled"], report["identities_left_out"]) == (2, 2, 0)


def test_photographs_of_nobody_in_particular_can_be_prepared(tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "src" / f"{number}.png", crop(photograph(number)[0], photograph(number)[1], 112))
    assert prepare(tmp_path / "src", tmp_path / "out", aligned=True)["identities"] == 0
    assert open_dataset(tmp_path / "out").labels.tolist() == [-1, -1]


@pytest.mark.parametrize("size", [64, 160])
def test_other_sizes(tmp_path: Path, size: int) -> None:
    detections = photograph_folder(tmp_path / "src", people=1, images=2)
    prepare(tmp_path / "src", tmp_path / "out", detections=detections, size=size)
    data = open_dataset(tmp_path / "out")
    assert data.size == size
    assert data.image(0).shape == (size, size, 3)
    np.testing.assert_allclose(data.points(0), template(size), atol=1e-3)


def test_every_photograph_ends_in_exactly_one_place(tmp_path: Path) -> None:
    source = tmp_path / "src"
    detections = photograph_folder(source, people=2, images=3)
    points = photograph(0)[1]
    image = photograph(0)[0]
    extra: dict[str, dict[str, Any] | None] = {
        "person-0/not-listed.png": None,
        "person-0/unsure.png": {"points": points.tolist(), "score": 0.2},
        "person-0/tiny.png": {"points": points.tolist(), "score": 0.9, "box": [80, 70, 12, 12]},
        "person-1/one-point.png": {"points": [[7, 7]] * 5, "score": 0.9, "box": [0, 0, 50, 50]},
        "only-bad/1.png": {"points": None},
    }
    with detections.open("a") as file:
        for name, face in extra.items():
            write_image(source / name, image)
            if face is not None:
                file.write(json.dumps({"id": name, **face}) + "\n")
    (source / "person-1" / "broken.jpg").write_bytes(b"not a picture")
    (source / "person-1" / "empty.jpg").touch()
    (source / "person-1" / "line\nbreak.jpg").write_bytes(encode_jpeg(image, 90))
    (source / "person-1" / "film.mp4").touch()
    value = prepare(source, tmp_path / "out", detections=detections, min_score=0.5)
    reasons = left_out(tmp_path / "out")
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "person-0/not-listed.png": "not listed",
        "person-0/unsure.png": "low score",
        "person-0/tiny.png": "too small",
        "person-1/one-point.png": "bad points",
        "only-bad/1.png": "no face",
        "person-1/broken.jpg": "unreadable",
        "person-1/empty.jpg": "unreadable",
        "person-1/line\nbreak.jpg": "unusable name",
    }
    assert "0.200, 0.5 is asked for" in reasons["person-0/unsure.png"][1]
    ids = set(open_dataset(tmp_path / "out").ids)
    assert len(ids) == 6
    assert not ids & set(reasons)
    assert (value["photographs"], value["crops"], value["left_out"]) == (14, 6, 8)
    assert value["reasons"] == {
        **{"bad points": 1, "low score": 1, "no face": 1, "not listed": 1},
        **{"too small": 1, "unreadable": 2, "unusable name": 1},
    }
    assert value["identities_left_out"] == 1
    assert value["other_files"] == {".mp4": 1}
    assert json.loads((tmp_path / "out" / "report.json").read_text()).items() <= value.items()


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_a_file_name_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "ann").mkdir(parents=True)
    name = os.fsdecode(b"caf\xe9.jpg")
    for path in (name, os.fsdecode(b"bad\xe9.jpg")):
        (source / "ann" / path).write_bytes(encode_jpeg(squares(112, 112, (0, 0, 50)), 95))
    (source / "ann" / os.fsdecode(b"bad\xe9.jpg")).write_bytes(b"x")
    prepare(source, tmp_path / "out", aligned=True)
    assert (tmp_path / "out" / "ids.txt").read_bytes() == b"ann/caf\xe9.jpg\n"
    assert list(left_out(tmp_path / "out")) == [f"ann/{os.fsdecode(b'bad')}\udce9.jpg"]


def test_a_detector_is_run_and_the_largest_central_face_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bright cells are faces to this network: of three equal ones the most central is cropped."""
    monkeypatch.setenv("VISARD_MODELS", str(tmp_path / "models"))
    bright_square_network(tmp_path / "models" / "face_detection_yunet_2023mar.onnx")
    image = squares(320, 256, (0, 0, 32), (160, 96, 32), (288, 224, 32))
    write_image(tmp_path / "src" / "ann" / "1.png", image)
    write_image(tmp_path / "src" / "ann" / "2.png", squares(320, 256))
    value = prepare(tmp_path / "src", tmp_path / "out")
    assert (value["several_faces"], value["reasons"]) == (1, {"no face": 1})
    with (tmp_path / "out" / "detections.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (float(row["x"]), float(row["y"])) == pytest.approx((160, 96), abs=0.01)
    weights = value["job"]["weights"]
    assert list(weights) == ["face_detection_yunet_2023mar.onnx"]


def test_detections_of_one_run_serve_the_next(tmp_path: Path) -> None:
    detections = photograph_folder(tmp_path / "src")
    prepare(tmp_path / "src", tmp_path / "first", detections=detections)
    prepare(tmp_path / "src", tmp_path / "again", detections=tmp_path / "first" / "detections.csv")
    for name in ("train.rec", "points.npy", "detections.csv", "ids.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_does_not_change_a_byte(tmp_path: Path, processes: int) -> None:
    detections = photograph_folder(tmp_path / "src", people=6, images=6)
    prepare(tmp_path / "src", tmp_path / "one", detections=detections)
    prepare(tmp_path / "src", tmp_path / "many", detections=detections, processes=processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_aligned_crops_keep_their_bytes(tmp_path: Path) -> None:
    source = tmp_path / "src"
    image = photograph(1, 112, 112)[0]
    kept = encode_jpeg(image, 60)
    (source / "ann").mkdir(parents=True)
    (source / "ann" / "1.jpg").write_bytes(kept)
    write_image(source / "ann" / "2.png", image)
    write_image(source / "ann" / "3.png", photograph(1, 224, 224)[0])
    write_image(source / "ann" / "4.png", photograph(1, 178, 218)[0])
    value = prepare(source, tmp_path / "out", aligned=True)
    assert kept in (tmp_path / "out" / "train.rec").read_bytes()
    assert value["reasons"] == {"not square": 1}
    assert left_out(tmp_path / "out")["ann/4.png"] == ("not square", "178 x 218 px; aligned crops are square")
    data = open_dataset(tmp_path / "out")
    assert [data.points(k) for k in range(3)] == [None, None, None]
    assert np.abs(data.image(1).astype(int) - image).mean() < 4
    assert not (tmp_path / "out" / "detections.csv").exists()


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    detections = photograph_folder(tmp_path / "src", people=2, images=2)
    (tmp_path / "out").mkdir()  # an empty folder is no output
    prepare(tmp_path / "src", tmp_path / "out", detections=detections)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        prepare(tmp_path / "src", tmp_path / "out", detections=detections, size=64)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    prepare(tmp_path / "src", tmp_path / "out", detections=detections, size=64, overwrite=True)
    assert open_dataset(tmp_path / "out").size == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "src.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "--size is 8"),
        ({"quality": 0}, "--quality is 0"),
        ({"min_score": 2.0}, "--min-score is 2.0"),
        ({"processes": -1}, "--processes"),
        ({"aligned": True, "detections": Path("x.csv")}, "exclude each other"),
        ({"aligned": True, "min_score": 0.5}, "exclude each other"),
        ({"aligned": True, "min_face_px": 30}, "exclude each other"),
        ({"aligned": True, "detector": "mtcnn"}, "exclude each other"),
        ({"detections": Path("x.csv"), "detector": "mtcnn"}, "exclude each other"),
        ({"detections": Path("none.csv")}, "no such file of detections"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    photograph_folder(tmp_path / "src", people=1, images=1)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "src", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_no_crop_at_all_is_an_error(tmp_path: Path) -> None:
    photograph_folder(tmp_path / "src", people=1, images=2)
    text = {
        "none.jsonl": "".join(json.dumps({"id": f"person-0/{k}.jpg", "points": None}) + "\n" for k in range(2)),
        "strange.jsonl": json.dumps({"id": "elsewhere/person-0/0.jpg", "points": [[k, k] for k in range(5)]}),
        "broken.jsonl": "{",
    }
    messages = {
        "none.jsonl": r"none of the 2 photographs gave a crop: no face 2; the first, person-0/0\.jpg",
        "strange.jsonl": r"names none of the 2 photographs; its ids must be .*/src, such as person-0/0\.jpg",
        "broken.jsonl": "line 1 is not JSON",
    }
    for name, message in messages.items():
        (tmp_path / name).write_text(text[name])
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / "src", tmp_path / "out", detections=tmp_path / name)
        assert not (tmp_path / "out").exists()
    # What the mistakes left is nothing that other settings could spoil.
    assert prepare(tmp_path / "src", tmp_path / "out", detections=tmp_path / "src.jsonl")["crops"] == 2


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    detections = photograph_folder(tmp_path / "src", people=1, images=3)
    arguments = ["prepare", str(tmp_path / "src"), str(tmp_path / "out"), "--processes", "1"]
    assert command_line([*arguments, "--detections", str(detections), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["crops"] == 3
    assert command_line([*arguments, "--detections", str(detections), "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "3 crops of 1 identities from 3 photographs" in text
    assert "one identity only" in text
    monkeypatch.setenv("VISARD_MODELS", str(tmp_path / "nothing"))
    assert command_line([*arguments, "--overwrite"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("visard prepare: no yunet weights")
    assert "\n" not in error
    assert "visard models pull yunet" in error
    assert "VISARD_MODELS" in error


@pytest.mark.real_data
@pytest.mark.parametrize("detector", ["yunet", "mtcnn"])
def test_real_detectors_on_a_photograph(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    monkeypatch.setenv("VISARD_MODELS", str(shared_data / "models"))
    (tmp_path / "src" / "six").mkdir(parents=True)
    (tmp_path / "src" / "six" / "1.jpg").write_bytes((shared_data / "photos" / "t1.jpg").read_bytes())
    value = prepare(tmp_path / "src", tmp_path / "out", detector=detector)
    assert (value["crops"], value["several_faces"]) == (1, 1)
    points = open_dataset(tmp_path / "out").points(0)
    assert points is not None
    assert np.abs(points - ARCFACE_TEMPLATE).mean() < 6


@pytest.mark.parametrize("out", [".", "src", "src/../src", "link"])
def test_the_photographs_are_never_overwritten(tmp_path: Path, out: str) -> None:
    detections = photograph_folder(tmp_path / "src", people=1, images=2)
    (tmp_path / "link").symlink_to(tmp_path / "src")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is the folder of the photographs or holds it"):
        prepare(tmp_path / "src", tmp_path / out, detections=detections, overwrite=True)
    assert contents(tmp_path) == before


def test_only_a_prepared_data_set_is_overwritten(tmp_path: Path) -> None:
    detections = photograph_folder(tmp_path / "src", people=1, images=2)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "kept.txt").write_text("dear")
    for out in ("letters", "letters/kept.txt"):
        with pytest.raises(UserError, match="is not a prepared data set"):
            prepare(tmp_path / "src", tmp_path / out, detections=detections, overwrite=True)
    assert (tmp_path / "letters" / "kept.txt").read_text() == "dear"
    prepare(tmp_path / "src", tmp_path / "out", detections=detections)
    assert prepare(tmp_path / "src", tmp_path / "out", detections=detections, overwrite=True)["crops"] == 2
