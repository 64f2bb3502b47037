"""The prepared data set: its bytes by a reader written here from the layout, and what must not be left behind."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from visard.data import writer
from visard.data.dataset import open_dataset
from visard.data.writer import DatasetWriter
from visard.errors import FormatError, UserError


def plain_records(folder: Path) -> dict[int, tuple[int, list[float], bytes]]:
    """key -> (flag, labels, image bytes), read with struct only, as arcface_torch's reader sees it."""
    data = (folder / "train.rec").read_bytes()
    records = {}
    for line in (folder / "train.idx").read_text().splitlines():
        key, offset = map(int, line.split("\t"))
        magic, length = struct.unpack_from("<II", data, offset)
        assert magic == 0xCED7230A
        flag, label, identifier, _ = struct.unpack_from("<IfQQ", data, offset + 8)
        assert identifier == key
        body = data[offset + 32 : offset + 8 + length]
        labels = list(struct.unpack_from(f"<{flag}f", body)) if flag else [label]
        records[key] = (flag, labels, body[4 * flag :])
    return records


def test_the_folder_is_what_insightface_reads(tmp_path: Path) -> None:
    points = np.arange(10, dtype=np.float32).reshape(5, 2)
    images = [("b/1.jpg", "b", b"one"), ("b/2.jpg", "b", b"two"), ("a/1.jpg", "a", b"three"), ("c/1.jpg", "c", b"four")]
    out = tmp_path / "deep" / "set"
    with DatasetWriter(out, 64, {"command": "test"}) as writing:
        for image_id, identity, jpeg in images:
            writing.add(image_id, identity, jpeg, points if image_id == "b/2.jpg" else None)
        assert writing.images == 4
        assert not out.exists()
    records = plain_records(out)
    assert records[0] == (2, [5.0, 8.0], b"")
    assert [records[k] for k in range(1, 5)] == [
        (0, [0.0], b"one"),
        (0, [0.0], b"two"),
        (0, [1.0], b"three"),
        (0, [2.0], b"four"),
    ]
    assert [records[k] for k in range(5, 8)] == [(2, [1.0, 3.0], b""), (2, [3.0, 4.0], b""), (2, [4.0, 5.0], b"")]
    assert (out / "ids.txt").read_text() == "b/1.jpg\nb/2.jpg\na/1.jpg\nc/1.jpg\n"
    assert (out / "identities.txt").read_text() == "b\na\nc\n"
    assert (out / "property").read_text() == "3,64,64\n"
    assert np.load(out / "labels.npy").tolist() == [0, 0, 1, 2]
    written = np.load(out / "points.npy")
    assert written.shape == (4, 5, 2)
    assert written.dtype == np.float32
    assert np.isnan(written[[0, 2, 3]]).all()
    assert (written[1] == points).all()
    info = json.loads((out / "dataset.json").read_text())
    assert (info["size"], info["images"], info["identities"]) == (64, 4, 3)
    assert info["source"] == {"command": "test"}
    assert sorted(p.name for p in out.parent.iterdir()) == ["set"]


def test_arrays_grow_past_the_digits_of_their_header(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        for i in range(1234):
            writing.add(str(i), str(i // 100), b"x")
    assert np.load(tmp_path / "set" / "points.npy").shape == (1234, 5, 2)
    assert np.load(tmp_path / "set" / "labels.npy").tolist() == [i // 100 for i in range(1234)]


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        writing.add(f"{name}/ü.jpg", name, b"x")
    data = open_dataset(tmp_path / "set")
    assert list(data.ids) == [f"{name}/ü.jpg"]
    assert list(data.identities) == [name]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with DatasetWriter(tmp_path / "set", 32, {}) as writing:
            writing.add("a", "a", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_hindrance(tmp_path: Path) -> None:
    killed = DatasetWriter(tmp_path / "set", 32, {})
    killed.__enter__()
    killed.add("a", "a", b"x")
    killed._close()
    assert not (tmp_path / "set").exists()
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        writing.add("b", "b", b"y")
    assert list(open_dataset(tmp_path / "set").ids) == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_empty_folder_is_filled_and_a_full_one_kept(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        writing.add("a", "a", b"x")
    with pytest.raises(UserError, match="exists already"):
        DatasetWriter(tmp_path / "set", 32, {})
    assert list(open_dataset(tmp_path / "set").ids) == ["a"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([], "not one image"),
        ([("a", "p"), ("b", "q"), ("c", "p")], "identity 'p' comes back after 'q'"),
        ([("a", "p"), ("b", "p"), ("a", "q")], "the image id 'a' comes twice"),
        ([("a\nb", "p")], "line break"),
        ([("a", "")], "must not be empty"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, added: list[tuple[str, str]], message: str) -> None:
    def build() -> None:
        with DatasetWriter(tmp_path / "set", 32, {}) as writing:
            for image_id, identity in added:
                writing.add(image_id, identity, b"x")

    with pytest.raises(UserError, match=message):
        build()
    assert list(tmp_path.iterdir()) == []


def test_ids_with_equal_digests_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_digest", lambda image_id: 7)
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        writing.add("a", "p", b"x")
        writing.add("b", "p", b"x")
    assert list(open_dataset(tmp_path / "set").ids) == ["a", "b"]


def test_more_identities_than_a_float32_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert float(np.float32(writer.MAX_IDENTITIES - 1)) == writer.MAX_IDENTITIES - 1
    assert float(np.float32(writer.MAX_IDENTITIES + 1)) != writer.MAX_IDENTITIES + 1
    monkeypatch.setattr(writer, "MAX_IDENTITIES", 2)

    def build() -> None:
        with DatasetWriter(tmp_path / "set", 32, {}) as writing:
            for name in "abc":
                writing.add(name, name, b"x")

    with pytest.raises(UserError, match="more than 2 identities"):
        build()


@pytest.mark.parametrize("value", [5, 2**24, 2**24 + 1, 42_474_558, 42_474_559])
def test_record_0_never_promises_images_that_are_not_there(value: int) -> None:
    found = writer._float32_below(value)
    assert found == np.float32(found)
    assert value - 4 < found <= value


def test_dataset_json_is_checked(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", 32, {}) as writing:
        writing.add("a", "a", b"x")
    path = tmp_path / "set" / "dataset.json"
    good = json.loads(path.read_text())
    for change in ({"format": 9}, {"images": 2}, {"images": 0}, {"identities": 3}, {"size": "32"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="set/"):
            open_dataset(tmp_path / "set")
    path.write_text("{")
    with pytest.raises(FormatError, match=r"dataset\.json"):
        open_dataset(tmp_path / "set")
