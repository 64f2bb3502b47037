"""One decoder's pixels are the other's: simplejpeg, which writes into a batch, against OpenCV, bit for bit."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visard.data import decode as decoding
from visard.data.decode import crops, decode, decode_into, decode_usual
from visard.errors import FormatError

S = 48


def picture(size: int = S) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def jpeg(*options: int, size: int = S) -> bytes:
    return cv2.imencode(".jpg", picture(size), options)[1].tobytes()


def by_opencv(data: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


SAMPLING = [
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]


@pytest.mark.parametrize("quality", [20, 75, 95, 100])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("size", [S, 47, 112])
def test_usual_jpegs_are_decoded_by_simplejpeg_to_the_same_pixels(
    quality: int, sampling: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, size=size)
    expected = by_opencv(data)
    monkeypatch.setattr(decoding, "_decode", None)  # OpenCV's way is not taken
    pytest.importorskip("simplejpeg", reason="no build of it for this platform")
    assert (decode(data, size, False, "a.jpg") == expected).all()
    batch = np.full((3, size, size, 3), 7, np.uint8)
    decode_into(batch[1:2], [(data, "a.jpg", None)], False, [False])
    assert (batch[1] == expected).all()
    assert (batch[[0, 2]] == 7).all()
    decode_into(batch[1:], [(data, "a.jpg", None)] * 2, False, [True, False])
    assert (batch[1] == expected[:, ::-1]).all()
    assert (batch[2] == expected).all()


def unusual(kind: str) -> bytes:
    if kind == "progressive":
        return jpeg(cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    if kind == "restarts":
        return jpeg(cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    if kind == "padded":
        return jpeg() + bytes(3)
    if kind == "grey":
        return cv2.imencode(".jpg", picture()[:, :, 0])[1].tobytes()
    if kind == "png":
        return cv2.imencode(".png", picture())[1].tobytes()
    file = io.BytesIO()
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        Image.fromarray(picture()).save(file, "jpeg", exif=exif)
    else:
        Image.fromarray(picture()).convert("CMYK").save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["progressive", "restarts", "padded", "grey", "png", "turned", "cmyk"])
def test_what_is_unusual_is_what_opencv_makes_of_it(kind: str) -> None:
    data = unusual(kind)
    assert (decode(data, S, False, "a") == by_opencv(data)).all()


@pytest.mark.parametrize("size", [S, 47])
def test_crops_are_where_no_row_is_written_past_the_cache(size: int) -> None:
    images = crops(3, size)
    assert images.shape == (3, size, size, 3)
    assert images.flags.c_contiguous
    assert images.ctypes.data % 2 == 1


KINDS = ["usual", "other quality", "short", "broken", "empty", "progressive", "grey", "png", "turned", "padded"]


def of_kind(kind: str) -> bytes:
    if kind in ("short", "broken"):  # less than the head of a usual one, and damage behind it
        return jpeg()[:40] + b"\xff\xd9" if kind == "short" else jpeg()[:300] + b"\xff\xd9"
    named = {"usual": jpeg(), "other quality": jpeg(cv2.IMWRITE_JPEG_QUALITY, 40), "empty": b""}
    return named[kind] if kind in named else unusual(kind)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=8))
def test_of_files_in_one_the_usual_ones_are_decoded_and_the_others_left(files: list[tuple[str, bool]]) -> None:
    pytest.importorskip("simplejpeg", reason="no build of it for this platform")
    data, spans = jpeg(), []  # an empty file lies behind one that ends as it should
    for kind, _ in files:
        file = of_kind(kind)
        spans.append((len(data), len(data) + len(file)))
        data += file
    mirrored = [flip for _, flip in files]
    images = crops(len(files), S)
    left = decode_usual(images, data, spans, mirrored)
    assert left == [i for i, (kind, _) in enumerate(files) if kind not in ("usual", "other quality")]
    for i in set(range(len(files))) - set(left):
        expected = by_opencv(of_kind(files[i][0]))
        assert expected is not None
        assert (images[i] == (expected[:, ::-1] if mirrored[i] else expected)).all()


@pytest.mark.parametrize("images", [np.zeros((1, S, S, 3), np.uint16), crops(1, S).transpose(0, 2, 1, 3)])
def test_pixels_are_never_lost_in_a_copy(images: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        decode_into(images, [(jpeg(), "a.jpg", None)], False, [False])
    with pytest.raises(AssertionError):
        decode_usual(images, jpeg(), [(0, len(jpeg()))], [False])


def test_without_simplejpeg_all_files_in_one_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert decode_usual(crops(1, S), jpeg(), [(0, len(jpeg()))], [True]) == [0]


@given(st.lists(st.tuples(st.integers(0, len(jpeg()) - 1), st.integers(0, 7)), min_size=1, max_size=4))
def test_damage_is_seen_alike_with_and_without_simplejpeg(bits: list[tuple[int, int]]) -> None:
    damaged = bytearray(jpeg())
    for at, bit in bits:
        damaged[at] ^= 1 << bit

    def outcome() -> object:
        try:
            return decode(bytes(damaged), S, True, "a.jpg").tobytes()
        except FormatError as error:
            return str(error)

    with_it = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "simplejpeg", None)
        assert outcome() == with_it
