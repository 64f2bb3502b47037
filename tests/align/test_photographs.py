"""Finding photographs in folders, and decoding every kind of file that people have."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.align.photos import photograph, write_image
from visard.align.photographs import UnreadableError, decode, encode_jpeg, find_photographs, read_bytes
from visard.errors import UserError


def test_ids_identities_and_order(tmp_path: Path) -> None:
    image = photograph(0)[0]
    for name in ("b/2.JPG", "b/1.png", "b/album/x.webp", "a b/1.bmp", "b-c/1.jpeg", "a.jpg"):
        write_image(tmp_path / "src" / name, image)
    for junk in (".DS_Store", "b/._1.jpg", "b/Thumbs.db", ".hidden/1.jpg", "__MACOSX/1.jpg", "desktop.ini"):
        (tmp_path / "src" / junk).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / junk).write_bytes(b"junk")
    for other in ("b/notes.txt", "b/clip.heic", "b/README"):
        (tmp_path / "src" / other).write_bytes(b"other")
    found, others = find_photographs(tmp_path / "src")
    assert [(p.id, p.identity) for p in found] == [
        ("a b/1.bmp", "a b"),
        ("b-c/1.jpeg", "b-c"),
        ("b/1.png", "b"),
        ("b/2.JPG", "b"),
        ("b/album/x.webp", "b"),
        ("a.jpg", None),
    ]
    assert others == {".heic": 1, ".txt": 1, "no ending": 1}


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "1.png", photograph(0)[0])
    (tmp_path / "src").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "src" / "ann")
    os.symlink(tmp_path / "src", tmp_path / "elsewhere" / "loop")
    found, _ = find_photographs(tmp_path / "src")
    assert [p.id for p in found] == ["ann/1.png"]


def test_a_dead_link_is_a_photograph_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    os.symlink(tmp_path / "gone.jpg", tmp_path / "ann" / "1.jpg")
    assert [p.id for p in find_photographs(tmp_path)[0]] == ["ann/1.jpg"]
    with pytest.raises(UnreadableError, match="No such file"):
        read_bytes(tmp_path / "ann" / "1.jpg")


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_photographs(tmp_path / "none")
    with pytest.raises(UserError, match="is a file, not a folder"):
        find_photographs(Path(__file__))
    with pytest.raises(UserError, match="no photographs found"):
        find_photographs(tmp_path)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".webp", ".jpg"])
def test_formats(tmp_path: Path, ending: str) -> None:
    image = photograph(1)[0]
    seen = decode(write_image(tmp_path / f"a{ending}", image).read_bytes())
    assert seen.shape == image.shape
    assert np.abs(seen.astype(int) - image).mean() < (0.1 if ending in (".png", ".bmp") else 8)


def test_grey_alpha_and_16_bits_become_8_bit_rgb(tmp_path: Path) -> None:
    image = photograph(2)[0]
    grey = decode(write_image(tmp_path / "grey.png", image[..., 0]).read_bytes())
    np.testing.assert_array_equal(grey, np.repeat(image[..., :1], 3, axis=2))
    alpha = np.concatenate([image, np.full((*image.shape[:2], 1), 90, np.uint8)], axis=2)
    np.testing.assert_array_equal(decode(write_image(tmp_path / "alpha.png", alpha).read_bytes()), image)
    deep = decode(write_image(tmp_path / "deep.png", image.astype(np.uint16) * 257).read_bytes())
    assert deep.dtype == np.uint8
    assert np.abs(deep.astype(int) - image).max() <= 1


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with an EXIF block of one entry."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda image: image),
        (3, lambda image: image[::-1, ::-1]),
        (6, lambda image: np.rot90(image, -1)),
        (8, lambda image: np.rot90(image, 1)),
        (2, lambda image: image[:, ::-1]),
    ],
)
def test_exif_orientation_is_applied(orientation: int, upright) -> None:  # type: ignore[no-untyped-def]
    jpeg = encode_jpeg(photograph(3)[0], 95)
    np.testing.assert_array_equal(decode(with_orientation(jpeg, orientation)), upright(decode(jpeg)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "ends early"),
        (lambda data: data[:-2], "ends early"),
        (lambda data: b"no picture" * 20, "not an image"),
        (lambda data: data[:40] + b"\xff\xd9", "not an image"),
    ],
)
def test_broken_files_are_named(damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnreadableError, match=reason):
        decode(damage(encode_jpeg(photograph(4)[0], 90)))


def test_a_truncated_png_is_not_taken_for_a_picture(tmp_path: Path) -> None:
    data = write_image(tmp_path / "a.png", photograph(4)[0]).read_bytes()
    with pytest.raises(UnreadableError):
        decode(data[: len(data) // 2])


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UnreadableError, match="empty"):
        read_bytes(tmp_path / "a.jpg")


def test_jpeg_quality_and_colour_order() -> None:
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert cv2.imdecode(np.frombuffer(encode_jpeg(red, 95), np.uint8), cv2.IMREAD_COLOR)[16, 16].argmax() == 2
    image = photograph(5)[0]
    assert len(encode_jpeg(image, 50)) < len(encode_jpeg(image, 95))
