"""Bytes of an image file -> (S, S, 3) uint8 RGB; what is broken, cut off or of another size is refused by its header.

In: JPEG, PNG, BMP or WebP bytes. Out: an array, or an error that names the file and the record's byte offset.

Usual JPEG crops are decoded by simplejpeg, which writes the pixels where they belong (a batch); OpenCV decodes what is
left, and everything where simplejpeg is not installed. Both are libjpeg-turbo with its exact DCT and smooth chroma: the
pixels are the same, bit for bit, whichever of them decodes.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

try:
    import simplejpeg
except ImportError:  # no build for this platform: the same pixels, each crop copied once more
    simplejpeg = None

from visard.errors import FormatError, UserError
from visard.records import UInt8Array

MAX_PIXELS = 1 << 26
"""Larger images are refused: a flipped bit in a header must not allocate gigabytes."""

_END = b"\xff\xd9"
_HEAD_BYTES = 2048
_REMEDY = "copy it again or leave it out"
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(data: bytes, size: int, resize: bool, path: str | Path, offset: int | None = None) -> UInt8Array:
    """A crop of exactly `size` pixels.

    Args:
        data: the image file.
        size: S in pixels.
        resize: scale an image of another size (area interpolation down, linear up) instead of refusing it.
        path, offset: named in an error.

    Returns:
        image: (S, S, 3) uint8 RGB.

    Raises:
        FormatError: not a whole image.
        UserError: an image of another size.
    """
    image = crops(1, size)
    decode_into(image, ((data, path, offset),), resize, (False,))
    return image[0]


def crops(count: int, size: int) -> UInt8Array:
    """(count, S, S, 3) uint8, not set, at an odd address, where decoding takes 59 us a crop of 112 px and not 75.

    libjpeg-turbo writes a row that begins at a multiple of 16 or 32 past the cache, and a crop's rows are too short for
    that to pay (Zen 4).
    """
    return np.empty(1 + count * size * size * 3, np.uint8)[1:].reshape(count, size, size, 3)


def decode_into(
    images: UInt8Array,
    files: Iterable[tuple[bytes, str | Path, int | None]],
    resize: bool,
    flipped: Sequence[bool],
) -> None:
    """`images[i] = decode(*files[i])`, mirrored where `flipped`.

    Args:
        images: (B, S, S, 3) uint8, contiguous; best from `crops`.
        files: for each image its data, path and offset, see `decode`; so are the errors.
        resize: see `decode`.
        flipped: for each image whether to mirror it.
    """
    size = _side(images)
    for image, (data, path, offset), mirrored in zip(images, files, flipped, strict=True):
        usual = simplejpeg is not None and data.endswith(_END) and _head(data[:_HEAD_BYTES], size) is not None
        if not usual or not _direct(image.reshape(size, 3 * size), data, mirrored):
            pixels = _decode(data, size, resize, path, offset)
            image[...] = pixels[:, ::-1] if mirrored else pixels


def decode_usual(
    images: UInt8Array, data: mmap.mmap | bytes, spans: Iterable[tuple[int, int]], flipped: Sequence[bool]
) -> list[int]:
    """`decode_into` of files that lie in one, where they are as usual, without copying them.

    Args:
        images, flipped: see `decode_into`.
        data: such as a memory-mapped file.
        spans: first byte of each image file and the one behind its last; nothing is decoded where both are 0.

    Returns:
        left: numbers of the images that were not decoded, increasing; what is in their place means nothing.
    """
    size = _side(images)
    rows = images.reshape(len(images), size, 3 * size)
    view, head, length, left = memoryview(data), b"-", 1, []
    for place, (row, (start, end), mirrored) in enumerate(zip(rows, spans, flipped, strict=True)):
        usual = simplejpeg is not None and data[end - 2 : end] == _END
        if usual and (start + length >= end or data[start : start + length] != head):  # most of a data set begin alike
            head = _head(data[start : min(end, start + _HEAD_BYTES)], size) or b"-"
            length, usual = len(head), len(head) > 1
        if not usual or not _direct(row, view[start:end], mirrored):
            left.append(place)
    return left


def check(data: bytes, size: int, resize: bool, path: str | Path, offset: int | None = None) -> None:
    """What `decode` refuses without decoding, by the header and the end marker; arguments and errors are the same."""
    # the usual JPEG crop shows its size in its first bytes; walking its markers would cost several times as much
    if data.find(_frame(size), 0, 2048) < 0:
        width, height = image_size(data, path, offset)
        if (width, height) != (size, size) and not resize:
            raise UserError(
                f"{_where(path, offset)}: {width}x{height} px, not {size}x{size}; "
                "align photographs with `visard prepare`, give the right size, or allow resizing (--data.resize)"
            )
    # libjpeg fills what is cut off with grey and says nothing; the end marker may be followed by padding
    if data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9") and b"\xff\xd9" not in data:
        raise FormatError(path, f"the JPEG is cut off (no end marker); {_REMEDY}", offset)


def image_size(data: bytes, path: str | Path, offset: int | None = None) -> tuple[int, int]:
    """(width, height) in pixels, from the header for JPEG and PNG, by decoding for other formats.

    Raises:
        FormatError: not an image, or one of more than `MAX_PIXELS`.
    """
    if data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    elif data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        size = struct.unpack(">II", data[16:24])
    else:
        size = _decoded_size(data)
    if size is None or min(size) < 1:
        problem = "is empty" if not data else "is not an image that can be read"
        raise FormatError(path, f"{problem}; {_REMEDY}", offset)
    width, height = size
    if width * height > MAX_PIXELS:
        raise FormatError(path, f"the image claims {width}x{height} px, above {MAX_PIXELS:,} pixels; {_REMEDY}", offset)
    return width, height


def _side(images: UInt8Array) -> int:
    """S of (B, S, S, 3). Of what is not contiguous a copy would be written to, and the pixels lost in silence."""
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    return images.shape[1]


def _direct(row: UInt8Array, data: bytes | memoryview, mirrored: bool) -> bool:
    """Decodes a usual JPEG with the fewest passes over the pixels; False if that cannot be done.

    A crop to be mirrored is decoded with red and blue exchanged: its rows, backwards byte by byte, are the mirrored
    rows in RGB. That takes a quarter of the time of exchanging pixels of three bytes.

    Args:
        row: (S, 3 S) uint8, the pixels' place.
    """
    size = len(row)
    try:
        image = simplejpeg.decode_jpeg(data, "BGR" if mirrored else "RGB", False, False, 0, 0, 1.0, row)
    except ValueError:  # damaged inside: OpenCV tells what can be done with it
        return False
    if image.shape != (size, size, 3):
        return False
    if mirrored:
        cv2.flip(row, 1, dst=row)
    return True


def _head(data: bytes, size: int) -> bytes | None:
    """A JPEG up to its frame's size, where it is baseline, of 3 components, `size` and without Exif; otherwise None.

    A picture with Exif may have to be turned.
    """
    frame = _frame(size)
    at = data.find(frame)
    return data[: at + len(frame)] if at > 0 and data.find(b"Exif", 0, at) < 0 else None


@functools.cache
def _frame(size: int) -> bytes:
    """Start of a baseline JPEG frame of 3 components, 8 bits, size x size."""
    return b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", size, size)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks the marker segments to the frame header."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + max(2, struct.unpack(">H", data[at + 2 : at + 4])[0])
    return None


def _decoded_size(data: bytes) -> tuple[int, int] | None:
    """BMP and WebP are rare among crops; their headers are read by OpenCV, which refuses more than 2**30 pixels."""
    if not data:
        return None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
        image = None if image is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if image is None else (image.shape[1], image.shape[0])


def decode_whole(data: bytes, path: str | Path, offset: int | None = None) -> UInt8Array:
    """(H, W, 3) uint8 RGB: an image of any shape as it is.

    Raises:
        FormatError: not a whole image.
    """
    check(data, 0, True, path, offset)
    return _pixels(data, path, offset)


def _decode(data: bytes, size: int, resize: bool, path: str | Path, offset: int | None) -> UInt8Array:
    check(data, size, resize, path, offset)
    image = _pixels(data, path, offset)
    if image.shape != (size, size, 3):
        if not resize:
            raise FormatError(path, f"the image's header and its {image.shape} pixels differ; {_REMEDY}", offset)
        shrinks = image.shape[0] > size and image.shape[1] > size
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)  # type: ignore[assignment]
    return image


def _pixels(data: bytes, path: str | Path, offset: int | None) -> UInt8Array:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise FormatError(path, f"the image cannot be decoded ({error.err}); {_REMEDY}", offset) from error
    if image is None:
        raise FormatError(path, f"the image cannot be decoded; {_REMEDY}", offset)
    return image  # type: ignore[return-value]


def _where(path: str | Path, offset: int | None) -> str:
    return str(path) if offset is None else f"{path}, record at byte {offset}"
