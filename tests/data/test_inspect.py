"""`visard inspect`: counts against a set whose damage and doubles are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.data.formats.crops import IMAGES, S, encoded, write_set
from visard.cli import main as visard
from visard.data import inspect
from visard.data.formats.pair_bin import write_bin
from visard.data.inspect import InspectConfig, main
from visard.data.writer import DatasetWriter


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_a_sound_set(tmp_path: Path) -> None:
    answer = main(InspectConfig(data=str(write_set(tmp_path / "set")), out=tmp_path / "out"))
    value = answer.value
    assert (value["images"], value["identities"], value["unlabelled"], value["size"]) == (len(IMAGES), 5, 2, S)
    assert (value["broken"], value["duplicate_sets"], value["with_landmarks"]) == (0, 0, len(IMAGES) // 2)
    assert value["images_per_identity"] | {"mean": 0} == {
        "least": 1,
        "quarter": 1,
        "median": 1,
        "three_quarters": 2,
        "most": 2,
        "mean": 0,
    }
    assert value["histogram"] == [{"images": "1", "identities": 3}, {"images": "2-3", "identities": 2}]
    assert f"{len(IMAGES)} images of 5 identities, {S} px" in answer.text
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["images"] == len(IMAGES)
    sheet = cv2.imread(str(tmp_path / "out" / "contact_sheet.jpg"))
    assert sheet is not None
    assert sheet.shape[1] > 8 * 112
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "broken.csv",
        "contact_sheet.jpg",
        "duplicates.csv",
        "inspect.json",
    ]


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Two images cut off, one of another size, three with the same bytes over two people, two within one."""
    files = [
        ("ann/1", encoded(0)),
        ("ann/2", encoded(1)),
        ("ann/3", encoded(0)),
        ("bob/1", encoded(0)),
        ("bob/2", encoded(2)[:-6]),
        ("eve/1", encoded(3)),
        ("eve/2", encoded(3)),
        ("eve/3", encoded(4, size=2 * S)),
        ("eve/4", b""),
    ]
    with DatasetWriter(tmp_path / "set", S, {}) as writing:
        for image_id, data in files:
            writing.add(image_id, image_id.split("/")[0], data)
    return tmp_path / "set"


@pytest.mark.parametrize("decode", [True, False])
def test_broken_and_double(bad: Path, tmp_path: Path, decode: bool) -> None:
    answer = main(InspectConfig(data=str(bad), out=tmp_path / "out", decode=decode))
    assert (answer.value["broken"], answer.value["duplicate_sets"]) == (3, 2)
    assert answer.value["duplicates_across_identities"] == 1
    assert [row[0] for row in rows(tmp_path / "out" / "broken.csv")] == ["id", "bob/2", "eve/3", "eve/4"]
    assert "train.rec at byte" in rows(tmp_path / "out" / "broken.csv")[1][1]
    assert rows(tmp_path / "out" / "duplicates.csv")[1:] == [
        ["0", "ann/1", "ann"],
        ["0", "ann/3", "ann"],
        ["0", "bob/1", "bob"],
        ["1", "eve/1", "eve"],
        ["1", "eve/2", "eve"],
    ]
    assert "ann/1 (ann) = ann/3 (ann) = bob/1 (bob)" in answer.text
    assert main(InspectConfig(data=str(bad), duplicates=False)).value["duplicate_sets"] is None


def test_equal_digests_are_compared(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes of digest find candidates; what differs is told apart by its bytes."""
    real = inspect.hashlib.blake2b

    class Same:
        def digest(self) -> bytes:
            return b"8 bytes."

    monkeypatch.setattr(
        inspect.hashlib, "blake2b", lambda data, digest_size=64: Same() if digest_size == 8 else real(data)
    )
    assert main(InspectConfig(data=str(bad))).value["duplicate_sets"] == 2


def test_a_bare_file_that_is_damaged(bad: Path) -> None:
    for name in ("dataset.json", "ids.txt", "identities.txt", "labels.npy", "offsets.npy"):
        (bad / name).unlink()
    data = bytearray((bad / "train.rec").read_bytes())
    offsets = [int(line.split("\t")[1]) for line in (bad / "train.idx").read_text().splitlines()]
    data[offsets[2]] ^= 1
    (bad / "train.rec").write_bytes(data)
    value = main(InspectConfig(data=str(bad))).value
    assert (value["images"], value["broken"], value["unlabelled"]) == (9, 4, 1)
    assert value["identities"] == 3


def test_a_pair_set_and_rendered_faces(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [encoded(i) for i in range(4)], [True, False])
    answer = main(InspectConfig(data=str(tmp_path / "a.bin")))
    assert (answer.value["genuine_pairs"], answer.value["impostor_pairs"]) == (1, 1)
    assert answer.value["images_per_identity"] is None
    value = main(InspectConfig(data="rendered:2x2")).value
    assert (value["images"], value["broken"], value["kilobytes_per_image"]) == (4, 0, None)


def test_histogram_ranges_double() -> None:
    counts = np.array([0, 1, 1, 2, 3, 4, 7, 8, 100])
    assert inspect._histogram(counts) == [
        ("0", 1),
        ("1", 2),
        ("2-3", 2),
        ("4-7", 2),
        ("8-15", 1),
        ("16-31", 0),
        ("32-63", 0),
        ("64-127", 1),
    ]


def test_the_command(bad: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert visard(["inspect", str(bad), "--no-decode", "--out", str(tmp_path / "out"), "--pictures", "0"]) == 0
    assert "broken: 3" in capsys.readouterr().out
    assert not (tmp_path / "out" / "contact_sheet.jpg").exists()
    assert visard(["inspect", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("visard inspect: ")
    value: Any
    assert visard(["inspect", str(bad), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["broken"] == 3
