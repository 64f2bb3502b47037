"""Offsets read from the mapped text equal those of the whole text, and no damage makes them others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.test_record_index import write
from visard.data import record_index
from visard.data.dataset import open_dataset
from visard.data.formats import records
from visard.data.record_index import image_index, read_index, whole
from visard.data.recordio import RecordFile
from visard.data.text_index import TextOffsets
from visard.errors import FormatError


def text_of(first: int, offsets: list[int], end: str = "\n") -> bytes:
    return "".join(f"{key}\t{offset}{end}" for key, offset in enumerate(offsets, first)).encode()


def mapped(path: Path) -> TextOffsets:
    found = TextOffsets.of(path)
    assert found is not None
    return found


def check(path: Path) -> None:
    """One by one, some at once and all equal the whole text."""
    found = mapped(path)
    keys, offsets = read_index(path)
    assert (found.first_key, len(found)) == (keys[0], len(offsets))
    np.testing.assert_array_equal(found.read(), offsets)
    rows = np.random.default_rng(0).integers(-len(offsets), len(offsets), 500)
    np.testing.assert_array_equal(found[rows], offsets[rows])
    assert [found[i] for i in rows[:50].tolist()] == offsets[rows[:50]].tolist()
    assert (found[0], found[-1]) == (offsets[0], offsets[-1])
    half = found[len(offsets) // 3 : -1]
    np.testing.assert_array_equal(half.read(), offsets[len(offsets) // 3 : -1])
    if len(half):
        assert half.first_key == keys[len(offsets) // 3]
        assert half[0] == offsets[len(offsets) // 3]
        assert half[np.array([-1])].tolist() == [offsets[-2]]


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("count", [1, 9, 10, 11, 99, 100, 101, 102, 999, 1000, 1001])
def test_keys_and_offsets_that_grow_longer(tmp_path: Path, first: int, count: int) -> None:
    path = tmp_path / "a.idx"
    for step in (1, 9, 36, 5831, 10**13):
        path.write_bytes(text_of(first, [step * i for i in range(count)]))
        check(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_hundred_thousand_lines(tmp_path: Path, end: str) -> None:
    offsets = np.cumsum(np.random.default_rng(1).integers(40, 9000, 120_000)).tolist()
    text = text_of(0, [0, *offsets], end)
    path = tmp_path / "a.idx"
    for whole_text in (text, text[: -len(end)]):
        path.write_bytes(whole_text)
        check(path)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(0, 9), st.integers(1, 10**15)), min_size=1, max_size=120),
    first=st.one_of(st.integers(0, 12), st.integers(0, 10**17)),
    end=st.sampled_from(["\n", "\r\n"]),
    last_ends=st.booleans(),
)
@example(steps=[99], first=10**18 - 1, end="\n", last_ends=True)
def test_any_offsets_that_grow(
    steps: list[int], first: int, end: str, last_ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    text = text_of(first, np.cumsum(steps).tolist(), end)
    path.write_bytes(text if last_ends else text[: -len(end)])
    check(path)


def test_other_orders_are_left_to_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    lines = text_of(0, [36 * i for i in range(2000)]).splitlines(keepends=True)
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(2000)]
    backwards = lines[::-1]
    gap, twice, blank = lines[:500] + lines[501:], lines[:500] + lines[499:], [*lines[:500], b"\n", *lines[500:]]
    for case in ([], [b"\n"], [b"0 5\n"], shuffled, backwards, gap, twice, blank, [*lines, b"\n"], [b"\xff" * 90]):
        path.write_bytes(b"".join(case))
        assert TextOffsets.of(path) is None
    falling = text_of(0, np.random.default_rng(0).integers(0, 10**9, 2000).tolist())
    path.write_bytes(falling)
    assert TextOffsets.of(path) is None


def small() -> bytes:
    return text_of(0, [0, 36, 72, 96, 108, 992, 1004, 1040, 1111, 9000, 9036, 10_000, 10_036])


def never_wrong(path: Path) -> tuple[int, int]:
    """Each offset is that of the one line with its key, or an error; all at once are the whole text's, or an error.

    Returns:
        how many files were taken, how many errors came.
    """
    found = TextOffsets.of(path)
    if found is None:
        return 0, 0
    lines = [line.split(b"\t") for line in path.read_bytes().splitlines()]
    pairs = [(int(line[0]), int(line[1])) for line in lines if len(line) == 2 and all(word.isdigit() for word in line)]
    refused = 0
    for row in range(len(found)):
        try:
            offset = found[row]
        except FormatError:
            refused += 1
            continue
        assert (found.first_key + row, offset) in pairs
    try:
        offsets = found.read()
    except FormatError:
        return 1, refused + 1
    keys, expected = read_index(path)
    assert keys.tolist() == list(range(found.first_key, found.first_key + len(keys)))
    assert offsets.tolist() == expected.tolist()
    return 1, refused


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    text = small()
    taken = 0
    for size in range(len(text)):
        path.write_bytes(text[:size])
        more, refused = never_wrong(path)
        taken += more
        assert not refused
    assert taken > len(text) // 3  # cut within an offset or behind it, as ever


def test_every_byte_flipped(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    text = small()
    taken = refused = 0
    for at in range(len(text)):
        for byte in {text[at] ^ 1 << bit for bit in range(8)} | set(b"\t\n\r 0159") - {text[at]}:
            path.write_bytes(text[:at] + bytes([byte]) + text[at + 1 :])
            one, errors = never_wrong(path)
            taken, refused = taken + one, refused + errors
    assert taken > 100
    assert refused > 10


def test_a_long_text_with_a_wrong_line_in_it(tmp_path: Path) -> None:
    """Bisection does not look there: the line is refused when it is read, at its byte, and no other."""
    path = tmp_path / "a.idx"
    lines = text_of(0, [10**9 + 36 * i for i in range(90_000)]).splitlines(keepends=True)
    lines[51_234], lines[51_235] = lines[51_235], lines[51_234]
    path.write_bytes(b"".join(lines))
    found = mapped(path)
    at = sum(map(len, lines[:51_234]))
    message = rf"a\.idx at byte {at}: expected '51234 TAB offset' .*, got b'51235.*'; sort the lines by key"
    for use in (lambda: found[51_234], lambda: found[np.array([3, 51_234])], found.read, found[40_000:60_000].read):
        with pytest.raises(FormatError, match=message):
            use()
    assert found[51_233] == 10**9 + 36 * 51_233
    assert found[51_236:].read().tolist() == [10**9 + 36 * i for i in range(51_236, 90_000)]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .rec whose index counts as large."""
    monkeypatch.setattr(record_index, "WORTH_KEEPING", 1)
    monkeypatch.setattr(records, "WORTH_KEEPING", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "train.rec", images=200)
    (tmp_path / "property").write_text("67,16,16\n")
    return path


def test_a_large_file_opens_without_reading_its_index(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, offsets = read_index(large.with_suffix(".idx"))
    monkeypatch.setattr(record_index, "read_index", lambda path: pytest.fail("the whole text was read"))
    data: Any = open_dataset(large)
    assert isinstance(image_index(RecordFile(large)).offsets, TextOffsets)
    assert not list(large.parent.glob("*.cache"))
    assert (len(data), data.ids[0], data.ids[-1], len(data.identities)) == (200, "1", "200", 67)
    before = [data.where(i) for i in range(200)]
    assert [at for _, at in before] == offsets[1:201].tolist()
    batch = np.empty((3, 16, 16, 3), np.uint8), np.empty((3, 16, 16, 3), np.uint8)
    indices = np.array([199, 0, 57])
    data.images_into(indices, batch[0], np.zeros(3, bool))
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 500
    assert data.labels.tolist() == [i // 3 for i in range(200)]
    assert [data.where(i) for i in range(200)] == [again.where(i) for i in range(200)] == before
    data.images_into(indices, batch[1], np.zeros(3, bool))
    np.testing.assert_array_equal(*batch)
    assert isinstance(image_index(RecordFile(large)).offsets, np.ndarray)  # kept by the labels


def test_a_large_file_without_a_place_to_keep_anything(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index.array_cache, "_places", lambda source, name: [Path("/dev/null/no")])
    data: Any = open_dataset(large)
    assert data.labels.tolist() == [i // 3 for i in range(200)]
    file = RecordFile(large)
    index = image_index(file)
    assert isinstance(index.offsets, TextOffsets)
    assert whole(file, index).offsets[np.arange(200)].tolist() == index.offsets.read().tolist()


def test_a_wrong_line_of_a_large_file(large: Path) -> None:
    """An error when it is needed; with `tolerant`, the whole text decides."""
    path = large.with_suffix(".idx")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[150], lines[151] = lines[151], lines[150]
    path.write_bytes(b"".join(lines))
    data: Any = open_dataset(large)
    assert data.where(0)[1] == int(lines[1].split(b"\t")[1])
    for use in (lambda: data.image(149), lambda: data.labels):
        with pytest.raises(FormatError, match=rf"train\.idx at byte {sum(map(len, lines[:150]))}: expected '150 TAB"):
            use()
    tolerant: Any = open_dataset(large, tolerant=True)
    assert [tolerant.ids[149], tolerant.ids[150]] == ["151", "150"]
    assert tolerant.labels.tolist()[148:152] == [49, 50, 49, 50]


def test_a_large_file_that_is_cut_off(large: Path) -> None:
    file = RecordFile(large)
    at = image_index(file).offsets[170]
    assert isinstance(at, int)
    large.write_bytes(large.read_bytes()[:at])
    with pytest.raises(FormatError, match=rf"record 171 is at byte {at}, train.rec has {at} bytes; copy both"):
        open_dataset(large)
    assert len(open_dataset(large, tolerant=True)) == 170


def test_offsets_beyond_the_end_in_the_middle(large: Path) -> None:
    """Where offsets do not grow, the last one says nothing of the others."""
    path = large.with_suffix(".idx")
    lines = path.read_bytes().splitlines(keepends=True)
    key, offset = lines[150].split()
    lines[150] = key + b"\t" + b"9" * len(offset) + b"\n"
    path.write_bytes(b"".join(lines))
    data: Any = open_dataset(large)
    with pytest.raises(FormatError, match=rf"train\.rec at byte {'9' * len(offset)}"):
        data.image(149)
    with pytest.raises(FormatError, match=r"train\.idx: record 150 is at byte 9+, train\.rec has"):
        _ = data.labels
