"""Pair sets: what `pickle` writes in any protocol is read alike, and nothing in a pickle is executed or believed."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.formats.crops import S, encoded
from visard.data.dataset import PairBinDataset, open_dataset
from visard.data.formats.pair_bin import read_bin, read_bin_pairs, write_bin
from visard.errors import FormatError, UserError
from visard.protocols.pair_files import consecutive_pairs
from visard.protocols.pairs import evaluate_pairs
from visard.records import Embeddings

IMAGES = [encoded(seed) for seed in range(4)]
PYTHON_2 = b"(lp0\n(lp1\nS'%s'\np2\naS'\\xff\\xd8\\'\"\\n'\np3\naa(lp4\nI01\naa."
"""Two byte strings as Python 2's protocol 0 wrote them."""


def dump(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["bytes", "arrays", "columns", "bytearrays", "tuples"])
def test_every_protocol_and_form(tmp_path: Path, protocol: int, form: str) -> None:
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    value: Any = {
        "bytes": (IMAGES, [True, False]),
        "arrays": (arrays, [np.True_, np.False_]),
        "columns": ([array[:, None] for array in arrays], np.array([1, 0])),
        "bytearrays": ([bytearray(image) for image in IMAGES], [1, 0]),
        "tuples": [tuple(IMAGES), (True, False)],
    }[form]
    path = tmp_path / "a.bin"
    if form == "bytearrays" and protocol < 5:
        with pytest.raises(FormatError, match=r"names (builtins|__builtin__)\.bytearray"):
            read_bin(dump(path, value, protocol))
        return
    found = read_bin(dump(path, value, protocol))
    assert [bytes(image) for image in found.images] == IMAGES  # type: ignore[arg-type]
    assert found.same.tolist() == [True, False]


def test_what_python_2_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(PYTHON_2 % b"ab\\x00\\\\c")
    assert [bytes(image) for image in read_bin(path).images] == [b"ab\0\\c", b"\xff\xd8'\"\n"]  # type: ignore[arg-type]
    short = b"\x80\x02]q\x00(]q\x01(U\x02abq\x02T\x03\x00\x00\x00xyzq\x03e]q\x04\x88ae."
    path.write_bytes(short)
    assert pickle.loads(short, encoding="bytes") == [[b"ab", b"xyz"], [True]]
    assert [bytes(image) for image in read_bin(path).images] == [b"ab", b"xyz"]  # type: ignore[arg-type]


def test_written_sets_are_read_by_pickle_and_here(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bin(path, IMAGES, [True, False])
    assert pickle.loads(path.read_bytes()) == (IMAGES, [True, False])
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    data = open_dataset(path)
    assert isinstance(data, PairBinDataset)
    assert (len(data), data.size, data.labels.tolist(), list(data.ids)) == (4, S, [-1] * 4, ["0", "1", "2", "3"])
    assert [data.encoded(i) for i in range(4)] == IMAGES
    again = pickle.loads(pickle.dumps(data))
    assert (again.image(3) == data.image(3)).all()
    assert len(pickle.dumps(data)) < 500
    with pytest.raises(UserError, match="3 images for 2 pairs"):
        write_bin(path, IMAGES[:3], [True, False])


def test_arrays_of_pixels(tmp_path: Path) -> None:
    pixels = [np.random.default_rng(i).integers(0, 256, (S, S, 3), dtype=np.uint8) for i in range(2)]
    data: Any = open_dataset(dump(tmp_path / "a.bin", (pixels, [True])))
    assert all((data.image(i) == pixels[i]).all() for i in range(2))
    data = open_dataset(dump(tmp_path / "a.bin", (np.stack(pixels), [True])))
    assert all((data.image(i) == pixels[i]).all() for i in range(2))


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    """Among the functions are some that a list of allowed modules would let through."""
    done = tmp_path / "done"
    calls = [
        _Calls(subprocess.call, ["touch", str(done)]),
        _Calls(eval, f"open({str(done)!r}, 'w')"),
        _Calls(np.fromfile, str(tmp_path / "a.bin")),
        _Calls(np.load, str(tmp_path / "a.bin")),
        _Calls(getattr, "text", "format"),
        _Calls(bytearray, 1 << 40),
    ]
    for call in calls:
        with pytest.raises(FormatError, match="nothing was executed"):
            read_bin(dump(tmp_path / "a.bin", ([call, b""], [True]), protocol))
    assert not done.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy\nndarray\n(K\x05tR.",  # an allowed name, called as it must not be
        b"cnumpy\ndtype\n(Vobject\ntR.",
        b"cnumpy\ndtype\n(VO8\ntR.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"cbuiltins\nbytes\n(K\x05tR.",
        b"c__builtin__\nbytes\n(I1000000000000\ntR.",
        b"c_codecs\nencode\n.",
        b"\x80\x04cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"P1\n.",
        b"Q.",
        b"].",
        b"(lp0\n(lp1\nS'a'\np2\nag2\naa(lp3\nI01\naa",
    ],
)
def test_names_are_no_way_round(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(code)
    with pytest.raises(FormatError, match=r"a\.bin"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "code",
    [
        b"\x8e" + (1 << 62).to_bytes(8, "little") + b"ab.",
        b"B\xff\xff\xff\xffab.",
        b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"]r\xff\xff\xff\xff.",
        b"]" + b"p9999999999\n" * 100 + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"X\xff\xff\xff\xff.",
        # one text, encoded again and again: 50 bytes of pickle a megabyte
        b"V" + b"a" * 100_000 + b"\np0\n0" + b"c_codecs\nencode\n(g0\nVlatin1\ntR" * 10_000 + b".",
        b"c__builtin__\nbytes\np1\n0T"
        + (100_000).to_bytes(4, "little")
        + bytes(100_000)
        + b"p0\n0"
        + b"g1\n(g0\ntR" * 9999,
    ],
    ids=["bytes8", "bytes4", "bytearray", "memo", "memo text", "long", "text", "encode", "bytes()"],
)
def test_a_small_file_takes_little_memory(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(code)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_bin(tmp_path / "a.bin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000 + 20 * len(code)


def test_an_image_that_comes_often_is_no_copy_each(tmp_path: Path) -> None:
    image = np.frombuffer(bytes(1_000_000), np.uint8)
    path = dump(tmp_path / "a.bin", ([image] * 2000, [True] * 1000))
    tracemalloc.start()
    try:
        assert len(read_bin(path).images) == 2000
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((IMAGES, [True]), "4 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        (IMAGES, "expected two lists"),
        ((IMAGES, 5), "expected two lists"),
        ((["a", "b"], [True]), "image 0 is str"),
        (([np.zeros((4, 4)), b""], [True]), "image 0 is float64"),
        ((IMAGES[:2], [2]), "answer of pair 0 is '2'"),
        ((IMAGES[:2], ["yes"]), "answer of pair 0 is 'yes'"),
        ((IMAGES[:2], np.array([0.5])), "answer of pair 0 is '0.5'"),
    ],
)
def test_what_is_no_pair_set_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_bin(dump(tmp_path / "a.bin", value))


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        read_bin(tmp_path / "a.bin")
    (tmp_path / "a.bin").touch()
    with pytest.raises(FormatError, match="is empty"):
        read_bin(tmp_path / "a.bin")


def test_a_broken_image_is_named_by_its_place(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.bin", ([IMAGES[0], IMAGES[1][:-9]], [True]))
    with pytest.raises(
        FormatError, match=rf"a\.bin at byte {path.read_bytes().find(IMAGES[1][:-9])}: the JPEG is cut off"
    ):
        open_dataset(path).image(1)
    path = dump(tmp_path / "a.bin", ([IMAGES[0], IMAGES[1][:-9]], [True]), protocol=0)  # written as text
    with pytest.raises(FormatError, match=r"a\.bin/1: the JPEG is cut off"):
        open_dataset(path).image(1)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_truncated_at_every_byte(tmp_path: Path, protocol: int) -> None:
    value = ([np.frombuffer(IMAGES[0][:60], np.uint8), b"abc"], [np.True_])
    data = pickle.dumps(value, protocol)
    for length in range(len(data)):
        (tmp_path / "a.bin").write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_bin(tmp_path / "a.bin")


codes = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
words = st.sampled_from([b"numpy\n", b"dtype\n", b"ndarray\n", b"0\n", b"1\n", b"'u1'\n", b"\x01", b"\x00\x00\x00"])


@settings(max_examples=600, deadline=None)
@given(parts=st.lists(st.one_of(codes, words, st.binary(max_size=9)), max_size=30))
def test_random_programs_give_only_format_errors(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    path.write_bytes(b"".join(parts) + b".")
    try:
        found = read_bin(path)
    except FormatError:
        return
    assert len(found.images) == 2 * len(found.same)


@pytest.mark.parametrize("answer", [True, False])
def test_a_set_of_one_kind_is_undefined_and_no_crash(tmp_path: Path, answer: bool) -> None:
    """InsightFace's tools crash on a set without impostors."""
    write_bin(tmp_path / "a.bin", [encoded(seed) for seed in range(40)], [answer] * 20)
    same = read_bin_pairs(tmp_path / "a.bin")
    assert same.tolist() == [answer] * 20
    data = open_dataset(tmp_path / "a.bin")
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    embeddings = Embeddings(vectors, tuple(data.ids), data.labels, {})
    result = evaluate_pairs(embeddings, consecutive_pairs(same))
    assert result.metrics["tar@far=1e-3"] is None
    assert result.metrics["eer"] is None
    assert result.counts["impostor"] == (0 if answer else 20)
