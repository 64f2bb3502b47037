"""One's own mask: its key points come to the corners of the texture, and every mistake in them is one clear line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from visard.errors import FormatError, UserError
from visard.masks.augment import template_points
from visard.masks.own import KEY_POINTS, parse_key_points, read_own
from visard.masks.records import Look, Masked
from visard.masks.template import wear

LINE = "left=20,40 nose=128,10 right=236,40 left-low=40,150 chin=128,200 right-low=216,150"


def picture(folder: Path, alpha: bool = True) -> Path:
    """Left half red, right half blue, transparent outside of the key points' hull."""
    image = np.zeros((220, 256, 4), np.uint8)
    image[:, :128, 2], image[:, 128:, 0] = 220, 220  # BGR, as cv2 writes
    hull = parse_key_points(LINE, Path("x"), (256, 220))[[0, 1, 2, 5, 4, 3]]
    inside = np.zeros((220, 256), np.uint8)
    cv2.fillPoly(inside, [np.rint(hull).astype(np.int32)], 255)
    image[..., 3] = inside
    path = folder / "mask.png"
    cv2.imwrite(str(path), image if alpha else image[..., :3])
    return path


def test_the_points_span_the_texture(tmp_path: Path) -> None:
    path = picture(tmp_path)
    path.with_suffix(".txt").write_text(f"# a comment\n{LINE}\n")
    flat = read_own(path, "", 48, 64)
    assert flat.shape == (48, 64, 4)
    assert flat[2:-2, 2:-2, 3].min() > 240  # nothing transparent is within
    assert (flat[4:-4, 4:28, 0] > 200).all()
    assert (flat[4:-4, 36:-4, 2] > 200).all()


@pytest.mark.parametrize("shift", [-4, 4])
def test_it_is_worn_the_right_way_round(tmp_path: Path, shift: int) -> None:
    """Also by a face that turns to the other side, whose view is a mirror image."""
    flat = read_own(picture(tmp_path), LINE, 96, 128)
    image = np.full((112, 112, 3), (190, 140, 110), np.uint8)
    points = template_points(112)
    points[2, 0] += shift
    masked = wear(image, points, Look(kind="surgical"), flat)
    assert isinstance(masked, Masked)
    left, right = masked.image[85, 40].astype(int), masked.image[85, 72].astype(int)
    assert left[0] > left[2] + 80
    assert right[2] > right[0] + 80


def test_the_order_of_names_is_free() -> None:
    words = LINE.split()
    one = parse_key_points(" ".join(reversed(words)), Path("x"), (256, 220))
    assert np.array_equal(one, parse_key_points(LINE, Path("x"), (256, 220)))
    assert one.shape == (len(KEY_POINTS), 2)
    assert np.array_equal(one, parse_key_points(LINE.replace("=", " "), Path("x"), (256, 220)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "has 0 lines; expected one"),
        (f"{LINE}\n{LINE}", "has 2 lines"),
        (LINE.replace("chin", "beard"), "'beard' is not a key point"),
        (LINE + " chin=1,1", "'chin' comes twice"),
        (LINE.replace("chin=128,200", ""), "chin missing"),
        (LINE.replace("128,200", "128,many"), "chin: could not convert"),
        (LINE.replace("128,200", "128,900"), "chin: 128,900 is not in the picture of 256 x 220 pixels"),
        (LINE.replace("128,200", "nan,200"), "is not in the picture"),
        (LINE.replace("128,200", "30,90"), "half make no convex patch"),
        (LINE.replace("left=20,40", "left=236,40").replace("right=236,40", "right=20,40"), "no convex patch"),
        ("20,40 128,10 236,40 40,150 128,200 216,150", "cannot be read from '20,40"),
    ],
)
def test_mistakes_in_the_line_are_named(line: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_key_points(line, Path("mask.txt"), (256, 220))
    assert said in str(caught.value)
    assert str(caught.value).startswith("mask.txt")
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_own(tmp_path / "no.png", LINE, 48, 64)
    with pytest.raises(UserError, match=r"mask.txt: there is no such file; write one line there"):
        read_own(picture(tmp_path), "", 48, 64)
    with pytest.raises(FormatError, match="no 8-bit PNG with transparency"):
        read_own(picture(tmp_path, alpha=False), LINE, 48, 64)
