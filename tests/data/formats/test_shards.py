"""Tar shards against Python's tarfile and against webdataset's rule of keys; damage is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.formats.crops import S, encoded, points_of
from visard.data.dataset import ShardDataset, open_dataset
from visard.data.formats import shards
from visard.data.formats.shards import ShardWriter
from visard.data.formats.tar_index import members
from visard.errors import FormatError, UserError


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=6, unique_by=lambda f: f[0]),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_of_tarfile(
    files: list[tuple[str, bytes]], form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", files, form)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    found = [(name.rstrip("/"), at, size) for name, at, size in members(path)]
    assert found == [(name.rstrip("/"), at, size) for name, at, size in expected]


def test_links_folders_and_junk_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/link.jpg"), (tarfile.LNKTYPE, "d/hard.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        for name in ("d/._1.jpg", "d/.DS_Store", "d/1.jpg", "d/1.txt", "d/Thumbs.db", "README"):
            info = tarfile.TarInfo(name)
            info.size = len(encoded(0))
            tar.addfile(info, io.BytesIO(encoded(0)))
    assert list(open_dataset(tmp_path / "a.tar").ids) == ["d/1.jpg"]


def test_samples_as_webdataset_groups_them(tmp_path: Path) -> None:
    """Files of others: label only, name only, nothing; the key ends at the first dot of the file's name."""
    files = [
        ("a.b/1.jpg", encoded(0)),
        ("a.b/1.cls", b"2\n"),
        ("a.b/2.cls", b"0"),
        ("a.b/2.seg.png", b"another file of the sample"),
        ("a.b/2.PNG", encoded(1, ".png")),
        ("3.json", json.dumps({"other": [1, 2], "points": points_of(3).tolist()}).encode()),
        ("3.webp", encoded(2, ".webp")),
        ("4.cls", b"1"),
        ("5.jpeg", encoded(4)),
        ("5.cls", b"-1"),
    ]
    data = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert list(data.ids) == ["a.b/1.jpg", "a.b/2.PNG", "3.webp", "5.jpeg"]
    assert data.labels.tolist() == [2, 0, -1, -1]
    assert list(data.identities) == ["0", "1", "2"]
    assert data.size == S
    found = data.points(2)
    assert found is not None
    np.testing.assert_array_equal(found, points_of(3))
    assert data.points(0) is None


def test_identities_by_name_alone_are_numbered_as_they_come(tmp_path: Path) -> None:
    files = []
    for i, name in enumerate(["ann", "bob", "ann"]):
        files += [(f"{i}.jpg", encoded(i)), (f"{i}.json", json.dumps({"identity": name}).encode())]
    data = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert (data.labels.tolist(), list(data.identities)) == ([0, 1, 0], ["ann", "bob"])


def test_writer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", shard_bytes=4000) as writing:
        for i in range(7):
            writing.add(f"p/{i}", i // 2, f"person {i // 2}", encoded(i), points_of(i) if i % 2 else None)
        assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out").iterdir())) > 1
    for source in (
        tmp_path / "out",
        f"{tmp_path}/out/{{000000..{len(list((tmp_path / 'out').iterdir())) - 1:06d}}}.tar",
    ):
        data: Any = open_dataset(source)
        assert isinstance(data, ShardDataset)
        assert [data.encoded(i) for i in range(7)] == [encoded(i) for i in range(7)]
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3]
        assert list(data.ids) == [f"p/{i}" for i in range(7)]
        again = pickle.loads(pickle.dumps(data))
        assert (again.image(5) == data.image(5)).all()
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert [info.name for info in tar][:3] == ["000000000.jpg", "000000000.cls", "000000000.json"]


def test_more_shards_than_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    with ShardWriter(tmp_path / "out", shard_bytes=1) as writing:
        for i in range(5):
            writing.add(str(i), 0, None, encoded(i))
    data: Any = open_dataset(tmp_path / "out")
    for i in (0, 4, 1, 3, 2, 0):
        assert data.encoded(i) == encoded(i)


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WORTH_KEEPING", 1)
    path = write_tar(tmp_path / "a.tar", [("1.jpg", encoded(0)), ("1.cls", b"0")])
    assert list(open_dataset(path).ids) == ["1.jpg"]
    assert (tmp_path / "a.tar.tar.cache").is_file()
    monkeypatch.setattr(shards, "members", lambda path: pytest.fail("indexed again"))
    assert list(open_dataset(path).ids) == ["1.jpg"]
    monkeypatch.undo()
    write_tar(path, [("1.jpg", encoded(0)), ("2.jpg", encoded(1)), ("2.cls", b"3")])
    assert open_dataset(path).labels.tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("1.jpg", b"x"), ("1.cls", b"one")], "'1.cls': b'one' is no identity's number"),
        ([("1.jpg", b"x"), ("1.cls", b"99999999")], "is no identity's number"),
        ([("1.jpg", b"x"), ("1.json", b"{")], "'1.json': not JSON"),
        ([("1.jpg", b"x"), ("1.json", b"[]")], "expected an object"),
        ([("1.jpg", b"x"), ("1.json", b'{"points": [1, 2]}')], "five times x, y"),
        ([("1.jpg", b"x"), ("1.json", b'{"id": "a\\nb"}')], "line break"),
        ([("1.jpg", b"x"), ("1.json", b'{"id": "\\ud800"}')], "line break"),
        ([("1.jpg", b"x"), ("1.png", b"x")], "a second image with this key"),
        ([("1.jpg", b"x"), ("1.json", b'{"id": "a"}'), ("2.jpg", b"x"), ("2.json", b'{"id": "a"}')], "comes twice"),
        (
            [
                (f"{i}.{s}", d)
                for i in "12"
                for s, d in (("jpg", b"x"), ("cls", b"0"), ("json", b'{"identity": "%s"}' % i.encode()))
            ],
            "label 0 is '2' here and '1' before",
        ),
        ([("1.txt", b"x")], "holds no images"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_dataset(write_tar(tmp_path / "a.tar", files), size=S)


def test_the_same_name_in_two_shards_is_told_apart(tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", [("1.jpg", encoded(0))])
    assert list(open_dataset(tmp_path).ids) == ["1.jpg", "b/1.jpg"]


def test_truncated_at_every_block_and_flipped_headers(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", [("1.jpg", encoded(0)), ("1.cls", b"0")]).read_bytes()
    ends = 512 + -(-len(encoded(0)) // 512) * 512 + 1024  # behind the last file's data
    for length in range(0, ends, 97):
        (tmp_path / "a.tar").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"a\.tar"):
            open_dataset(tmp_path / "a.tar")
    for at in range(0, 512, 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(FormatError, match=r"at byte 0: no file starts here|at byte 0: a file of"):
            open_dataset(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    with pytest.raises(FormatError, match="is compressed"):
        open_dataset(tmp_path / "a.tar")


def test_a_label_without_end_takes_no_memory(tmp_path: Path) -> None:
    data = open_dataset(write_tar(tmp_path / "a.tar", [("1.jpg", encoded(0)), ("1.cls", b"16777215")]))
    assert len(data.identities) == 1 << 24
    assert data.identities[9_999_999] == "9999999"


def test_shards_that_are_missing(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", [("1.jpg", encoded(0))])
    with pytest.raises(UserError, match=r"a-1\.tar: there is no such shard"):
        open_dataset(f"{tmp_path}/a-{{0..1}}.tar")
