"""Finds the photographs under a folder and decodes them.

In: SRC/identity/.../image.jpg. Out: `Photograph` entries sorted by image id, and (H, W, 3) uint8 RGB pixels, upright.

The image id is the path relative to SRC with "/" between folders. The identity is the top folder. Images directly in
SRC are unlabelled, as in a folder of crops (`visard.data.formats.folder`), and come last.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from visard.errors import UserError
from visard.records import UInt8Array

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
JUNK_NAMES = ("thumbs.db", "desktop.ini", "__macosx")


class UnreadableError(ValueError):
    """A file that does not hold a picture; the message is the reason for the list of what was left out."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """One image file.

    Args:
        id: path relative to the source folder, "/" between folders.
        identity: whose picture it is: the top folder; None for an image directly in the source folder.
        bytes: size of the file.
    """

    id: str
    identity: str | None
    bytes: int


def find_photographs(source: Path) -> tuple[list[Photograph], dict[str, int]]:
    """All photographs under `source`, and how many files of each other ending were passed over.

    Sorted by id, unlabelled ones last.

    Links are followed, each folder once. Names that begin with a dot, Thumbs.db, desktop.ini and __MACOSX are not
    counted.

    Raises:
        UserError: `source` is not a folder, or holds no photograph.
    """
    if not source.is_dir():
        what = "is a file, not a folder" if source.exists() else "no such folder"
        raise UserError(f"{source}: {what}; give the folder that holds one folder of photographs per person")
    found: list[Photograph] = []
    others: Counter[str] = Counter()
    seen_folders: set[tuple[int, int]] = set()
    for folder, folder_names, file_names in os.walk(source, followlinks=True):
        folder_names[:] = sorted(name for name in folder_names if not _is_junk(name))
        status = os.stat(folder)
        if os.name != "nt":
            if (status.st_dev, status.st_ino) in seen_folders:
                folder_names.clear()
                continue
            seen_folders.add((status.st_dev, status.st_ino))
        relative = Path(folder).relative_to(source).parts
        for name in file_names:
            if _is_junk(name):
                continue
            ending = os.path.splitext(name)[1].lower()
            if ending not in IMAGE_ENDINGS:
                others[ending or "no ending"] += 1
                continue
            image_id = "/".join((*relative, name))
            size = os.stat(os.path.join(folder, name)).st_size if os.path.exists(os.path.join(folder, name)) else -1
            found.append(Photograph(id=image_id, identity=relative[0] if relative else None, bytes=size))
    if not found:
        raise UserError(
            f"{source}: no photographs found ({', '.join(IMAGE_ENDINGS)}); expected {source}/PERSON/IMAGE.jpg"
        )
    found.sort(key=lambda photograph: (photograph.identity is None, photograph.id))
    return found, dict(sorted(others.items()))


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises UnreadableError with the reason."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"unreadable: {error.strerror or error}") from error
    if not data:
        raise UnreadableError("unreadable: the file is empty")
    return data


def decode(data: bytes) -> UInt8Array:
    """(H, W, 3) uint8 RGB from the bytes of an image file, turned upright by its EXIF orientation.

    Grey becomes RGB, 16 bits become 8, transparency is dropped (the colours stored under it stay).

    Raises:
        UnreadableError: not an image, or a JPEG that ends early (its lower part would be grey).
    """
    if is_jpeg(data) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        # Inside the coded pixels 0xff is always followed by 0, so the last end marker must come after the last scan
        # marker.
        raise UnreadableError("unreadable: the JPEG ends early")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UnreadableError(f"unreadable: {' '.join(str(error.err).split())[:100]}") from error
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise UnreadableError("unreadable: not an image that OpenCV can decode")
    return np.asarray(image, dtype=np.uint8)


def encode_jpeg(image: UInt8Array, quality: int) -> bytes:
    """JPEG bytes of (H, W, 3) uint8 RGB."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "JPEG encoding of a checked uint8 crop cannot fail"
    return bytes(data.tobytes())


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK_NAMES
