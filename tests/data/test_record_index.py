"""The kept index of a large `.rec`, record 0 above 2**24, and what can be had from a damaged file."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.formats.crops import S, encoded
from visard.data import array_cache, record_index
from visard.data.dataset import open_dataset
from visard.data.formats import records
from visard.data.record_index import image_index
from visard.data.recordio import RecordFile, pack, write_record
from visard.errors import FormatError

MAGIC = struct.pack("<I", 0xCED7230A)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .rec whose index counts as large."""
    monkeypatch.setattr(record_index, "WORTH_KEEPING", 1)
    monkeypatch.setattr(records, "WORTH_KEEPING", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    return write(tmp_path / "set" / "train.rec")


def write(path: Path, images: int = 5, keys: list[int] | None = None) -> Path:
    """Record 0 as InsightFace writes it, images of two identities, two identity records; in the order of `keys`."""
    payloads = [pack((images + 1.0, images + 3.0), 0)]
    payloads += [pack(float(i // 3), i + 1, encoded(i)) for i in range(images)]
    payloads += [pack((1.0, 4.0), images + 1), pack((4.0, images + 1.0), images + 2)]
    with open(path, "wb") as rec, open(path.with_suffix(".idx"), "w") as idx:
        for key in range(len(payloads)) if keys is None else keys:
            idx.write(f"{key}\t{rec.tell()}\n")
            write_record(rec, payloads[key])
    return path


def check(path: Path) -> None:
    data: Any = open_dataset(path)
    assert list(data.ids) == ["1", "2", "3", "4", "5"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert [data.encoded(i) for i in range(5)] == [encoded(i) for i in range(5)]


def test_the_index_is_kept_and_used(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(large)
    assert sorted(p.name for p in large.parent.iterdir()) == [
        "train.idx",
        "train.idx.index.cache",
        "train.idx.labels.cache",
        "train.rec",
    ]
    monkeypatch.setattr(record_index, "read_index", lambda path: pytest.fail("the text was read again"))
    monkeypatch.setattr(RecordFile, "first_labels", lambda *_: pytest.fail("the labels were read again"))
    check(large)
    assert not open_dataset(large).labels.flags.writeable  # mapped


def test_a_changed_file_is_read_again(large: Path) -> None:
    check(large)
    write(large, images=4)
    os.utime(large.with_suffix(".idx"), ns=(1, 1))
    assert len(open_dataset(large)) == 4


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_read_only_folder_keeps_it_elsewhere(large: Path, tmp_path: Path) -> None:
    large.parent.chmod(0o500)
    try:
        check(large)
    finally:
        large.parent.chmod(0o700)
    assert len(list((tmp_path / "cache").rglob("*.cache"))) == 2


def test_a_folder_that_refuses_keeps_it_elsewhere(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "_places", lambda source, name: [Path("/dev/null/no"), tmp_path / f"{name}.cache"])
    check(large)
    assert (tmp_path / "index.cache").is_file()
    monkeypatch.setattr(record_index, "read_index", lambda path: pytest.fail("the text was read again"))
    check(large)
    monkeypatch.undo()
    monkeypatch.setattr(array_cache, "_places", lambda source, name: [Path("/dev/null/no")])
    check(large)  # nowhere to keep it: read each time


def test_small_files_leave_nothing_behind(tmp_path: Path) -> None:
    check(write(tmp_path / "train.rec"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.idx", "train.rec"]


def test_a_damaged_cache_is_made_anew(large: Path) -> None:
    check(large)
    kept = large.with_name("train.idx.index.cache")
    data = kept.read_bytes()
    for damaged in (b"", data[:20], data[:-8], b"x" + data[1:], data.replace(b'"at": 64', b'"at": -9')):
        kept.write_bytes(damaged)
        check(large)


def test_arrays_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"1")
    arrays = {
        "a": np.arange(7),
        "b": np.zeros((0, 5, 2), np.float32),
        "c": np.arange(9, dtype=np.uint8).reshape(3, 3),
        "d": np.array([-1], np.int32),
    }
    assert array_cache.load((tmp_path / "source",), "x") is None
    array_cache.save((tmp_path / "source",), "x", arrays)
    found = array_cache.load((tmp_path / "source",), "x")
    assert found is not None
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)
    assert array_cache.load((tmp_path / "source",), "y") is None
    (tmp_path / "source").write_bytes(b"12")
    assert array_cache.load((tmp_path / "source",), "x") is None


@pytest.mark.parametrize("keys", [[0, 5, 4, 3, 2, 1, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 4, 5, 3, 6, 7]])
def test_keys_in_any_order(tmp_path: Path, keys: list[int]) -> None:
    data: Any = open_dataset(write(tmp_path / "a.rec", keys=keys))
    expected = [key for key in keys if 1 <= key <= 5]
    assert [int(i) for i in data.ids] == expected
    assert [data.encoded(i) for i in range(5)] == [encoded(key - 1) for key in expected]


def test_record_0_above_2_to_the_24(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float32 names the first identity record only roughly; all images and nothing else are taken."""
    images = (1 << 24) + 10
    record = np.dtype([("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("rest", "<u8", 2)])
    rows = np.zeros(images + 3, np.dtype([(n, record[n]) for n in record.names or ()] + [("image", "<f4", 2)]))  # type: ignore[misc]
    rows["magic"], rows["word"] = 0xCED7230A, rows.itemsize - 8
    rows["flag"][[0, -2, -1]] = 2
    rows.tofile(tmp_path / "a.rec")
    for wrong in (images + 1 - 3, images + 1 + 5, images + 1):
        rows["image"][0] = wrong, wrong + 2
        assert abs(float(rows["image"][0, 0]) - (images + 1)) < 8
        with open(tmp_path / "a.rec", "r+b") as file:
            file.write(rows[:1].tobytes())
        offsets = np.arange(len(rows)) * rows.itemsize
        monkeypatch.setattr(record_index, "read_index", lambda path, o=offsets: (np.arange(len(o)), o))
        (tmp_path / "a.idx").touch()
        monkeypatch.setattr(array_cache, "_places", lambda source, name: [])
        index = image_index(RecordFile(tmp_path / "a.rec"))
        assert (len(index), index.key(0), index.key(len(index) - 1)) == (images, 1, images)


def test_a_damaged_file_opens_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec")
    offsets = [int(line.split("\t")[1]) for line in path.with_suffix(".idx").read_text().splitlines()]
    data = bytearray(path.read_bytes())
    data[offsets[2]] ^= 1  # the magic of record 2
    data[offsets[4] + 12 : offsets[4] + 16] = struct.pack("<f", 0.5)  # the label of record 4
    path.write_bytes(data[: offsets[6]])  # and the identity records are gone
    with pytest.raises(FormatError):
        open_dataset(path)
    tolerant: Any = open_dataset(path, tolerant=True)
    assert list(tolerant.ids) == ["1", "2", "3", "4", "5"]
    assert tolerant.labels.tolist() == [0, -1, 0, -1, 1]
    assert tolerant.image(0).shape == (S, S, 3)
    with pytest.raises(FormatError, match=f"at byte {offsets[2]}: no record starts here"):
        tolerant.image(1)
    messages = " ".join(map(str, tolerant.problems))
    assert len(tolerant.problems) == 3
    assert f"at byte {offsets[2]}" in messages
    assert "label of record 4 is 0.5" in messages
    assert "record 6 is at byte" in messages


def test_a_damaged_file_without_an_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec")
    offsets = [int(line.split("\t")[1]) for line in path.with_suffix(".idx").read_text().splitlines()]
    path.with_suffix(".idx").unlink()
    data = bytearray(path.read_bytes())
    data[offsets[2] + 4 : offsets[2] + 8] = struct.pack("<I", 50)  # a length that ends in the middle of the image
    path.write_bytes(data[: offsets[5] + 40])
    with pytest.raises(FormatError, match=r"a\.rec at byte"):
        open_dataset(path)
    found: Any = open_dataset(path, tolerant=True)
    assert list(found.ids) == ["1", "2", "3", "4"]
    assert found.encoded(2) == encoded(2)
    with pytest.raises(FormatError):
        found.image(1)
    assert len(found.problems) == 2


def test_a_magic_inside_an_image_starts_no_record(tmp_path: Path) -> None:
    """After damage the next record is looked for; a magic off the grid, or of a middle part, is none."""
    path = tmp_path / "a.rec"
    with open(path, "wb") as file:
        for i in range(3):
            write_record(file, pack(0.0, i + 1, b"abc" + MAGIC + encoded(i) + MAGIC * 2))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    problems: list[FormatError] = []
    assert [RecordFile(path).record(at).id for at, _ in RecordFile(path).scan(problems)] == [2, 3]
    assert [problem.offset for problem in problems] == [0]


@pytest.mark.slow
def test_millions_open_at_once(tmp_path: Path) -> None:
    """2 million entries by the benchmark, which makes 42 million of them."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "index.py"
    arguments = ["--images", "2000000", "--identities", "100000", "--folder", str(tmp_path), "--prepared"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.count("reached") == 4, done.stdout
    assert "NOT" not in done.stdout
    shutil.rmtree(tmp_path)
