"""Lines read eight digits at a time equal lines read by int(), and what is wrong is named at its byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from visard.data.index_text import parse_lines
from visard.errors import FormatError

PATH = Path("a.idx")


def text_of(rows: list[tuple[int, int]], end: str = "\n") -> bytes:
    return "".join(f"{key}\t{offset}{end}" for key, offset in rows).encode()


def naive(text: bytes) -> list[list[int]]:
    return [[int(word) for word in line.split(b"\t")] for line in text.splitlines()]


@pytest.mark.parametrize("digits_of_key", [1, 7, 8, 9, 15, 16, 17, 18])
@pytest.mark.parametrize("digits", [1, 8, 12, 16, 18])
def test_every_width_in_long_runs(digits_of_key: int, digits: int) -> None:
    rng = np.random.default_rng(digits)
    rows = [
        (int(rng.integers(10 ** (digits_of_key - 1), 10**digits_of_key)), int(rng.integers(0, 10**digits)))
        for _ in range(300)
    ]
    text = "".join(f"{key}\t{offset:0{digits}d}\n" for key, offset in rows).encode()
    assert parse_lines(text, PATH, 0).tolist() == [list(row) for row in rows]


def test_an_index_that_grows() -> None:
    rows = [(key, key * 5831) for key in range(120_000)]
    for text in (text_of(rows), text_of(rows).rstrip(b"\n"), text_of(rows, "\r\n")):
        assert (parse_lines(text, PATH, 0) == np.array(rows)).all()


numbers = st.one_of(st.integers(0, 99), st.integers(0, 10**18 - 1))


@given(st.lists(st.tuples(numbers, numbers, st.integers(1, 200)), min_size=1, max_size=8))
@example([(0, 10**18 - 1, 1)])
def test_any_mixture_of_runs(runs: list[tuple[int, int, int]]) -> None:
    text = text_of([(key, offset) for key, offset, times in runs for _ in range(times)])
    assert parse_lines(text, PATH, 0).tolist() == naive(text)


@pytest.mark.parametrize("wrong", [b"x", b"/", b":", b" ", b"\t", b"\n", b"\xff", b"-", b"\x00", b"\xb5"])
@pytest.mark.parametrize("place", [0, 3, 4, 5, 11])
def test_a_wrong_byte_in_a_long_run_is_named(wrong: bytes, place: int) -> None:
    text = bytearray(text_of([(1000 + k, 1_000_000 + k) for k in range(3000)]))
    length = len("1000\t1000000\n")
    at = 1234 * length + place
    if text[at : at + 1] == wrong:
        return
    text[at : at + 1] = wrong
    with pytest.raises(FormatError, match="expected 'key TAB offset'") as caught:
        parse_lines(bytes(text), PATH, 100)
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset - 100 - (at - place) <= length
