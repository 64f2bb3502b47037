"""RecordIO against its layout spelled out in bytes, against plain per-line readings, and against damage."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.data import record_index, recordio
from visard.data.record_index import read_index
from visard.data.recordio import RecordFile, pack, unpack, write_record
from visard.errors import FormatError

MAGIC = struct.pack("<I", 0xCED7230A)


def write(path: Path, payloads: list[bytes]) -> list[int]:
    """Writes a file of records; returns their offsets."""
    offsets = []
    with open(path, "wb") as file:
        for payload in payloads:
            offsets.append(file.tell())
            write_record(file, payload)
    return offsets


def test_layout_of_a_whole_record() -> None:
    file = io.BytesIO()
    write_record(file, pack(3.0, 7, b"jpegs"))
    header = struct.pack("<IfQQ", 0, 3.0, 7, 0)
    assert file.getvalue() == MAGIC + struct.pack("<I", 29) + header + b"jpegs" + b"\0\0\0"


def test_layout_of_labels_behind_the_header() -> None:
    payload = pack((5.0, 9.0), 2, b"x")
    assert payload == struct.pack("<IfQQ", 2, 0.0, 2, 0) + struct.pack("<ff", 5.0, 9.0) + b"x"
    record = unpack(payload, "f", 0)
    assert record.labels.tolist() == [5.0, 9.0]
    assert (record.flag, record.id, record.image) == (2, 2, b"x")


def test_layout_of_a_record_cut_at_the_magic() -> None:
    file = io.BytesIO()
    write_record(file, b"abcd" + MAGIC + b"efgh" + MAGIC + b"i")
    parts = [(1, b"abcd"), (2, b"efgh"), (3, b"i\0\0\0")]
    lengths = [4, 4, 1]
    words = [struct.pack("<I", kind << 29 | n) for (kind, _), n in zip(parts, lengths, strict=True)]
    assert file.getvalue() == b"".join(MAGIC + w + data for w, (_, data) in zip(words, parts, strict=True))


def test_a_magic_off_the_grid_is_not_cut() -> None:
    file = io.BytesIO()
    write_record(file, b"abc" + MAGIC + b"d")
    assert file.getvalue()[4:8] == struct.pack("<I", 8)


pieces = st.lists(st.one_of(st.binary(max_size=9), st.just(MAGIC)), max_size=6).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(payloads=st.lists(pieces, min_size=1, max_size=5))
def test_what_is_written_is_read(payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    offsets = write(path, payloads)
    file = RecordFile(path)
    assert [file.payload(at) for at in offsets] == payloads
    assert list(file.scan()) == list(zip(offsets, payloads, strict=True))
    assert path.stat().st_size % 4 == 0


def test_labels_at_once_equal_labels_one_by_one(tmp_path: Path) -> None:
    magic_id = int.from_bytes(MAGIC, "little")  # puts the magic into the header itself: a record in parts
    payloads = [pack(float(i), i, bytes(i)) for i in range(40)]
    payloads += [pack((2.5, 1.0), 41, b"image"), pack(4.0, magic_id, b"x" * 50), pack((8.0,), 3), pack(9.0, 4)]
    path = tmp_path / "a.rec"
    offsets = np.array(write(path, payloads))[::-1].copy()
    file = RecordFile(path)
    expected = [file.record(int(at)).labels[0] for at in offsets]
    assert file.first_labels(offsets).tolist() == expected
    assert expected[:4] == [9.0, 8.0, 4.0, 2.5]
    with pytest.raises(FormatError, match=f"at byte {offsets[3] + 4}"):
        file.first_labels(np.array([offsets[3] + 4]))


def test_image_skips_header_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    first, second = write(path, [pack(1.0, 0, b"one"), pack((1.0, 2.0, 3.0), 1, b"three")])
    assert (RecordFile(path).image(first), RecordFile(path).image(second)) == (b"one", b"three")


def test_a_record_of_half_a_gibibyte_is_refused() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return recordio.MAX_LENGTH + 1

    with pytest.raises(ValueError, match="at most"):
        write_record(io.BytesIO(), Long())


def test_record_file_pickles_as_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    write(path, [bytes(100_000)])
    data = pickle.dumps(RecordFile(path))
    assert len(data) < 500
    assert pickle.loads(data).payload(0) == bytes(100_000)


@pytest.mark.parametrize("content", [None, b""])
def test_missing_and_empty_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.rec"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.rec.*(no such file|empty)"):
        RecordFile(path)


def read_everything(path: Path) -> None:
    """All ways into a file."""
    file = RecordFile(path)
    offsets = []
    for offset, payload in file.scan():
        offsets.append(offset)
        unpack(payload, path, offset)
    file.first_labels(np.array(offsets, np.int64))


SMALL = [pack(1.0, 1, b"abcdefg"), pack((2.0, 3.0), 2, b"hi" + MAGIC + MAGIC + b"jk"), pack(0.0, 3)]


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    boundaries = write(path, SMALL)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length and length in boundaries:
            read_everything(path)
            continue
        with pytest.raises(FormatError, match=r"a\.rec at byte \d+"):
            read_everything(path)


def test_every_bit_flipped(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    write(path, SMALL)
    data = path.read_bytes()
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_everything(path)
        except FormatError:
            refused += 1
    assert refused > 5 * 32  # at least each bit of the five magics


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(st.one_of(st.just(MAGIC), st.binary(min_size=4, max_size=4)), min_size=1, max_size=30).map(b"".join)
)
def test_random_bytes_give_only_format_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    path.write_bytes(data)
    try:
        read_everything(path)
    except FormatError:
        return
    assert data.startswith(MAGIC)


rows = st.lists(st.integers(0, 10**18 - 1), min_size=1, max_size=50)


@settings(max_examples=100, deadline=None)
@given(offsets=rows, crlf=st.booleans(), last_ends=st.booleans())
def test_index_equals_line_by_line(
    offsets: list[int], crlf: bool, last_ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    end = "\r\n" if crlf else "\n"
    text = end.join(f"{key}\t{offset}" for key, offset in enumerate(offsets)) + (end if last_ends else "")
    path.write_bytes(text.encode())
    keys, found = read_index(path)
    assert keys.tolist() == list(range(len(offsets)))
    assert found.tolist() == offsets


def test_index_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "_CHUNK", 37)
    path = tmp_path / "a.idx"
    path.write_text("".join(f"{key}\t{key * key}\n" for key in range(1000)))
    keys, offsets = read_index(path)
    assert keys.tolist() == list(range(1000))
    assert offsets.tolist() == [key * key for key in range(1000)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0\n1 8\n", r"a\.idx at byte 4: expected 'key TAB offset', got b'1 8"),
        ("0\t0\n1\n", "at byte 4"),
        ("0\t0\n1\t-8\n", "at byte 4"),
        ("0\t0\n1\t8\t9\n", "at byte 4"),
        ("0\t0\n\n", "at byte 4"),
        ("0\t0\n1\t1234567890123456789\n", "at byte 4"),
        ("0\t0\n5\t8\n5\t16\n", "the key 5 comes twice"),
    ],
)
def test_index_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_index(path)


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.text("0123456789\t\n\r", max_size=60).map(str.encode)))
def test_random_index_gives_only_format_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    path.write_bytes(data)
    try:
        keys, offsets = read_index(path)
    except FormatError:
        return
    assert len(keys) == len(offsets) == len(set(keys.tolist()))


@pytest.mark.real_data
def test_a_file_written_by_mxnet(shared_data: Path) -> None:
    folder = shared_data / "formats" / "mxnet-recordio"
    keys, offsets = read_index(folder / "train.idx")
    listed = [line.split("\t") for line in (folder / "train.lst").read_text().splitlines()]
    assert keys.tolist() == [int(row[0]) for row in listed]
    file = RecordFile(folder / "train.rec")
    assert file.first_labels(offsets).tolist() == [float(row[1]) for row in listed]
    assert [at for at, _ in file.scan()] == sorted(offsets.tolist())
    for key, at in zip(keys.tolist(), offsets.tolist(), strict=True):
        record = file.record(at)
        assert record.id == key
        assert record.image.startswith(b"\xff\xd8")
        out = io.BytesIO()
        write_record(out, pack(float(record.labels[0]), key, record.image))
        written = out.getvalue()
        assert (folder / "train.rec").read_bytes()[at : at + len(written)] == written
