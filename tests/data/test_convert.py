"""`visard convert`: any format to any other, images byte for byte, ids, identities, labels and landmarks kept."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.data.formats.crops import IMAGES, S, contents, encoded, points_of, write_set
from visard.cli import main as visard
from visard.data.convert import ConvertConfig, main
from visard.data.dataset import open_dataset
from visard.data.formats.naming import FileNames
from visard.data.formats.pair_bin import write_bin
from visard.data.formats.pair_list import read_pair_list
from visard.data.writer import DatasetWriter
from visard.errors import FormatError, UserError

KINDS = ("records", "folder", "list", "lst", "shards")


def source(out: Path, kind: str) -> Path:
    """What is opened of a conversion's result."""
    return out / {"list": "list.txt", "lst": "list.lst"}.get(kind, "")


def convert(src: Path, out: Path, kind: str, **options: Any) -> Path:
    main(ConvertConfig(src=str(src), out=out, to=kind, **options))  # type: ignore[arg-type]
    return source(out, kind)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same set in every format."""
    folder = tmp_path_factory.mktemp("convert")
    first = write_set(folder / "set")
    return {kind: convert(first, folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[str | None, bytes, bytes | None]]:
    found = {}
    for i, (image_id, identity) in enumerate(IMAGES):
        suffix = ".png" if image_id.endswith(".png") else ".jpg"
        found[image_id] = (identity, encoded(i, suffix), points_of(i).tobytes() if i % 2 else None)
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(KINDS, KINDS)))
def test_from_each_to_each(before: str, after: str, every: Any, expected: Any, tmp_path: Path) -> None:
    assert contents(every[before]) == expected
    assert contents(convert(every[before], tmp_path / "out", after)) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_records_are_the_same_bytes_again(every: Any, tmp_path: Path) -> None:
    again = convert(every["records"], tmp_path / "again", "records")
    for name in ("train.rec", "train.idx", "ids.txt", "identities.txt", "labels.npy", "points.npy", "property"):
        assert (again / name).read_bytes() == (every["records"] / name).read_bytes(), name
    told = json.loads((again / "dataset.json").read_text())["source"]
    assert told["source"]["source"] == {"made": "for a test"}


def test_labels_stay_what_they_are(tmp_path: Path) -> None:
    """Class centres of a run belong to labels: identities without images keep their places."""
    with DatasetWriter(tmp_path / "set", S, {}) as writing:
        for name in "edcba":
            writing.begin(name)
            if name in "db":
                writing.add(f"{name}.jpg", name, encoded(0))
    data = open_dataset(tmp_path / "set")
    assert (data.labels.tolist(), list(data.identities)) == ([1, 3], list("edcba"))
    for kind in ("records", "list", "shards"):
        found = open_dataset(convert(tmp_path / "set", tmp_path / kind, kind))
        assert found.labels.tolist() == [1, 3]
        assert [found.identities[i] for i in (1, 3)] == ["d", "b"]
        assert len(found.identities) == (4 if kind == "shards" else 5)
    (tmp_path / "set" / "dataset.json").unlink()  # as InsightFace sees it
    bare = open_dataset(tmp_path / "set")
    assert (bare.labels.tolist(), len(bare.identities)) == ([1, 3], 5)


def test_images_of_a_list_are_put_together_by_identity(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i))
    (tmp_path / "a.txt").write_text("".join(f"{i}.jpg {label}\n" for i, label in enumerate([2, 0, -1, 2, 1, 0])))
    data = open_dataset(convert(tmp_path / "a.txt", tmp_path / "out", "records"))
    assert list(data.ids) == ["1.jpg", "5.jpg", "4.jpg", "0.jpg", "3.jpg", "2.jpg"]
    assert data.labels.tolist() == [0, 0, 1, 2, 2, -1]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_bin(tmp_path / "lfw.bin", [encoded(i) for i in range(8)], [True, False, True, True])
    return tmp_path / "lfw.bin"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_set_there_and_back(pairs: Path, kind: str, tmp_path: Path) -> None:
    convert(pairs, tmp_path / "out", kind)
    assert (tmp_path / "out" / "pairs.txt").read_text().splitlines()[1] == "2\t3\t0\t1"
    opened = source(tmp_path / "out", kind)
    again = convert(opened, tmp_path / "again.bin", "bin", pairs=tmp_path / "out" / "pairs.txt")
    assert again.read_bytes() == pairs.read_bytes()
    if opened.is_dir():  # its own pairs are found
        assert convert(opened, tmp_path / "third.bin", "bin").read_bytes() == pairs.read_bytes()


def test_a_pair_set_needs_pairs(every: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs pairs"):
        convert(every["records"], tmp_path / "a.bin", "bin")
    (tmp_path / "p.txt").write_text("# drawn\n17\tx.jpg\t1\nx.jpg\t../z.jpg\t0\t3\n")
    assert (
        main(ConvertConfig(src=str(every["records"]), out=tmp_path / "a.bin", pairs=tmp_path / "p.txt")).value["images"]
        == 4
    )
    data: Any = open_dataset(tmp_path / "a.bin")
    assert (data.same.tolist(), data.encoded(0), data.encoded(1)) == ([True, False], encoded(2), encoded(7))
    for text, message in (
        ("17\tnobody\t1\n", "line 1: there is no image 'nobody'"),
        ("17 x 1\n", "line 1"),
        ("", "no pairs"),
    ):
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(FormatError, match=message):
            read_pair_list(tmp_path / "p.txt", ["17", "x"])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Image 2 is cut off inside its record; everything else is whole."""
    path = write_set(tmp_path / "damaged")
    data = (path / "train.rec").read_bytes()
    at = data.find(encoded(2)) + len(encoded(2)) - 2
    (path / "train.rec").write_bytes(data[:at] + b"\0\0" + data[at + 2 :])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_broken_images_stop_it_or_are_left_out(damaged: Path, kind: str, tmp_path: Path, expected: Any) -> None:
    with pytest.raises(FormatError, match=r"train\.rec at byte \d+: the JPEG is cut off"):
        convert(damaged, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()
    answer = main(ConvertConfig(src=str(damaged), out=tmp_path / "out", to=kind, skip_broken=True))  # type: ignore[arg-type]
    assert (answer.value["images"], len(answer.value["broken"])) == (len(IMAGES) - 1, 1)
    assert "the JPEG is cut off" in (tmp_path / "out" / "left_out.csv").read_text()
    del (wanted := dict(expected))["17"]
    assert contents(source(tmp_path / "out", kind)) == wanted


def test_a_pair_with_a_broken_image_is_left_out(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [encoded(0), encoded(1)[:-9], encoded(2), encoded(3)], [True, False])
    answer = main(ConvertConfig(src=str(tmp_path / "a.bin"), out=tmp_path / "b.bin", skip_broken=True))
    assert answer.value["images"] == 2
    assert (tmp_path / "b.left_out.csv").is_file()
    found: Any = open_dataset(tmp_path / "b.bin")
    assert (found.same.tolist(), found.encoded(1)) == ([False], encoded(3))


def test_decoding_finds_more(tmp_path: Path) -> None:
    """A PNG whose data is damaged: header and end are good."""
    (tmp_path / "p").mkdir()
    data = bytearray(encoded(0, ".png"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "p" / "0.png").write_bytes(data)
    (tmp_path / "p" / "1.png").write_bytes(encoded(1, ".png"))
    assert len(contents(convert(tmp_path, tmp_path / "fast", "records"))) == 2
    with pytest.raises(FormatError, match=r"0\.png: the image cannot be decoded"):
        convert(tmp_path / "p", tmp_path / "slow", "records", decode=True)


@pytest.mark.parametrize("kind", [*KINDS, "bin"])
def test_all_broken_writes_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in" / "p").mkdir(parents=True)
    (tmp_path / "in" / "p" / "0.jpg").write_bytes(encoded(0)[:-9])
    (tmp_path / "in" / "pairs.txt").write_text("p/0.jpg\tp/0.jpg\t1\n")
    with pytest.raises(UserError):
        convert(tmp_path / "in", tmp_path / "out", kind, skip_broken=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_mistakes_are_one_line(every: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    for arguments, message in (
        ([every["records"], tmp_path / "full"], "exists already"),
        (["rendered:2x2", tmp_path / "out"], "`visard render` writes rendered faces"),
        ([tmp_path / "nowhere", tmp_path / "out"], "no such file"),
        ([every["records"], tmp_path / "out", "--pairs", "x"], "only for --to bin"),
    ):
        assert visard(["convert", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("visard convert: ")
        assert message in error


def test_the_command(every: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visard(["convert", str(every["folder"]), str(tmp_path / "out"), "--to", "shards", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["images"], answer["broken"]) == ("shards", len(IMAGES), [])


def test_several_sources_become_one(every: Any, tmp_path: Path) -> None:
    main(ConvertConfig(src=f"{every['records']} + {every['folder']}", out=tmp_path / "out", same_names="merge"))
    data = open_dataset(tmp_path / "out")
    assert len(data) == 2 * len(IMAGES)
    assert len(data.identities) == 5
    assert data.ids[0] == "records/p0/0.jpg"


@pytest.mark.parametrize("kind", ["records", "folder", "shards"])
def test_killed_and_started_again(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in" / "p").mkdir(parents=True)
    for i in range(1500):
        (tmp_path / "in" / "p" / f"{i:04d}.jpg").write_bytes(encoded(i % 7))
    command = [sys.executable, "-m", "visard.cli", "convert", "in", "out", "--to", kind]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(open_dataset(tmp_path / "out")) == 1500
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("image_id", "identity", "path"),
    [
        ("p/a.jpg", "p", "p/a.jpg"),
        ("p/q/a.jpg", "p", "p/q/a.jpg"),
        ("a.jpg", None, "a.jpg"),
        ("a.jpg", "p", "p/000000007.jpg"),
        ("p/a", "p", "p/000000007.jpg"),
        ("q/a.jpg", "p", "p/000000007.jpg"),
        ("p/../../a.jpg", "p", "p/000000007.jpg"),
        ("/a.jpg", None, "000000007.jpg"),
        ("..", "..", "label_00000003/000000007.jpg"),
        ("p/.a.jpg", "p", "p/000000007.jpg"),
        ("p/a:b.jpg", "p", "p/000000007.jpg"),
        ("p\\a.jpg", None, "000000007.jpg"),
        (f"p/{'a' * 300}.jpg", "p", "p/000000007.jpg"),
    ],
)
def test_no_id_leads_out_of_the_folder(image_id: str, identity: str | None, path: str) -> None:
    assert FileNames().path(7, image_id, identity, 3, "jpg") == path


def test_no_path_is_given_twice() -> None:
    names = FileNames()
    given = [names.path(7, i, "p", 0, "jpg") for i in ("p/a.jpg", "p/A.JPG", "p/000000007.jpg", "x", "y")]
    assert len({path.lower() for path in given}) == 5


@pytest.mark.real_data
def test_the_genuine_mxnet_file(shared_data: Path, tmp_path: Path) -> None:
    genuine = shared_data / "formats" / "mxnet-recordio" / "train.rec"
    before = contents(genuine)
    assert len(before) == 16
    for kind in KINDS:
        assert contents(convert(genuine, tmp_path / kind, kind)) == before


def test_nested_folders_scaled(tmp_path: Path) -> None:
    """ALPHABET/CHARACTER/IMAGE: each innermost folder is an identity; images are scaled and written without loss."""
    for alphabet, character in (("A", "c1"), ("A", "c2"), ("B", "c1")):
        folder = tmp_path / "set" / alphabet / character
        folder.mkdir(parents=True)
        for number in range(2):
            picture = np.full((105, 105, 3), 255, np.uint8)
            picture[:, : 20 + 5 * number] = 0
            cv2.imwrite(str(folder / f"{number}.png"), picture)
    assert main(ConvertConfig(src=f"{tmp_path}/set#nested", out=tmp_path / "out", size=35)).value["images"] == 6
    data = open_dataset(tmp_path / "out")
    assert (data.size, list(data.identities)) == (35, ["A/c1", "A/c2", "B/c1"])
    assert data.ids[0] == "A/c1/0.png"
    # 20 of 105 columns are black: 6 of 35 whole ones, and two thirds of the next
    assert data.image(0)[3, :9, 0].tolist() == [0] * 6 + [85, 255, 255]
    assert len(open_dataset(tmp_path / "set", size=35, resize=True).identities) == 2
    with pytest.raises(UserError, match="--size is 8 px"):
        ConvertConfig(src="a", out=tmp_path / "b", size=8)
