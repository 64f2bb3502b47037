"""Lists of template sets: read as IJB-C's are, written to the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visard.data.formats.template_lists import read_template_pairs, read_templates
from visard.errors import FormatError, UserError


@pytest.mark.parametrize(
    ("images", "pairs"),
    [
        ("1.jpg 1 69544\n2.jpg 11065 3720\n", "1 11065 1\n11065 1 0\n"),
        ("a/1.jpg\t1\tv7\tann\nb c.jpg\t11065\ts2\tbob\n", "1\t11065\t1\n11065\t1\t0\n"),
        ("1.jpg,1,69544\n2.jpg,11065,3720\n", "1,11065,1\n11065,1,0\n"),
    ],
)
def test_a_list_is_read_and_written_back(tmp_path: Path, images: str, pairs: str) -> None:
    (tmp_path / "images.txt").write_text(images)
    (tmp_path / "pairs.txt").write_text(pairs)
    listed = read_templates(tmp_path / "images.txt")
    assert listed.templates.tolist() == [1, 11065]
    compared = read_template_pairs(tmp_path / "pairs.txt", listed.templates)
    assert compared.first.tolist() == [1, 11065]
    assert compared.second.tolist() == [11065, 1]
    assert compared.same.tolist() == [1, 0]
    listed.write(tmp_path / "images2.txt")
    compared.write(tmp_path / "pairs2.txt")
    assert (tmp_path / "images2.txt").read_text() == images
    assert (tmp_path / "pairs2.txt").read_text() == pairs
    assert len(compared.among(np.array([1]))) == 0
    assert listed.take([1]).images == [listed.images[1]]


def test_remarks_empty_lines_and_windows_ends(tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf# made by hand\r\n\r\n1.jpg 1 7\r\n1.jpg 2 7\r\n")
    (tmp_path / "pairs.txt").write_bytes(b"\xef\xbb\xbf1 2 1\r\n\r\n# more\r\n2 1 1\r\n")
    listed = read_templates(tmp_path / "images.txt")
    assert listed.images == ["1.jpg", "1.jpg"]
    assert listed.rest == ["7", "7"]
    assert len(read_template_pairs(tmp_path / "pairs.txt", listed.templates)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 2\n", "line 1: '1 2'"),
        ("1 2 1\n1 2\n", "line 2: '1 2'"),
        ("1 2 1 9\n", "line 1: '1 2 1 9'"),
        ("1 2 1.0\n", "line 1: '1 2 1.0'"),
        ("1 -2 1\n", "line 1: '1 -2 1'"),
        ("1 2 1\n1 99999999999999999999 1\n", "line 2: '1 99999999999999999999 1'"),
        ("1,2,1,\n", "line 1: '1,2,1,'"),
        ("# nothing\n", "holds no pairs"),
        ("# caf\xe9\n1 2 1\n", "is not UTF-8 throughout"),
    ],
)
def test_what_is_no_pair_of_templates(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "pairs.txt").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError) as caught:
        read_template_pairs(tmp_path / "pairs.txt", np.array([1, 2]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ijbc_face_tid_mid\.txt"):
        read_templates(tmp_path / "no.txt")
    with pytest.raises(UserError, match=r"ijbc_template_pair_label\.txt"):
        read_template_pairs(tmp_path / "no.txt", np.array([1]))
