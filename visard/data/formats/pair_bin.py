"""InsightFace's pair sets (`lfw.bin`, `agedb_30.bin` ...): a pickle of (2 P images, P answers).

In: the file. Out: `PairBinDataset`, whose images 2k and 2k + 1 are pair k, `read_bin_pairs`, which gives the answers,
and `write_bin`. Images are encoded files as bytes or arrays of bytes, or (S, S, 3) uint8 RGB arrays. Nothing in the
pickle is executed (`plain_pickle`).
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.data.formats import plain_pickle
from visard.data.formats.encoded import EncodedDataset
from visard.data.lines import Numbers
from visard.errors import FormatError, UserError
from visard.records import Int64Array

PROTOCOL = 4
"""Of the pickles that are written: Python 3.4 and later."""


@dataclass(frozen=True)
class PairBin:
    """What a file holds.

    Args:
        images: 2 P encoded images (views of the file) or (S, S, 3) uint8 arrays.
        same: (P,) bool, whether images 2k and 2k + 1 show the same person.
        file: the mapped file.
    """

    images: list[memoryview | bytes | NDArray[np.uint8]]
    same: NDArray[np.bool_]
    file: memoryview


def read_bin_pairs(path: str | Path) -> NDArray[np.bool_]:
    """(P,) bool: whether images 2k and 2k + 1 of `open_dataset(path)` show the same person; all may be alike."""
    return read_bin(path).same


def read_bin(path: str | Path) -> PairBin:
    """The whole file; images stay where they are in the memory-mapped file.

    Raises:
        FormatError: no pair set, a damaged one, or a pickle that would execute something.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(path, "is empty; fetch it again", 0)
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FormatError(path, f"cannot be read ({error.strerror}); check the name and its permissions") from error
    value = plain_pickle.load(data, path)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise FormatError(path, "is no pair set: expected two lists, of images and of answers; fetch it again")
    images, answers = (plain_pickle.unwrapped(part) for part in value)
    if not all(isinstance(part, tuple | list) or getattr(part, "ndim", 0) for part in (images, answers)):
        raise FormatError(path, "is no pair set: expected two lists, of images and of answers; fetch it again")
    if len(images) != 2 * len(answers) or not len(answers):
        raise FormatError(path, f"has {len(images)} images for {len(answers)} pairs; expected two each: fetch it again")
    return PairBin([_image(path, i, image) for i, image in enumerate(images)], _answers(path, answers), data)


def write_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool] | NDArray[np.bool_]) -> None:
    """Writes a pair set as InsightFace does, under its name only when it is whole.

    Args:
        images: 2 P encoded images, kept byte for byte; held in memory, as every reader of this format does.
        same: P answers.

    Raises:
        UserError: other than two images a pair.
    """
    path = Path(path)
    if len(images) != 2 * len(same) or not len(same):
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs; two each are needed")
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        pickle.dump(([bytes(image) for image in images], [bool(answer) for answer in same]), file, PROTOCOL)
    os.replace(partial, path)


class PairBinDataset(EncodedDataset):
    """The images of a pair set. Who they show is not known: all are unlabelled. The image id is the image's number.

    Args:
        path: the `.bin` file.
        size, resize: as for `open_dataset`.

    Attributes:
        same: (P,) bool, the answers for images 2k and 2k + 1.
    """

    def __init__(self, path: Path, size: int | None = None, resize: bool = False) -> None:
        self._path, self._resize = Path(path), resize
        found = read_bin(self._path)
        self._images, self.same, self._file = found.images, found.same, found.file
        self.ids: Sequence[str] = Numbers(range(len(self._images)))
        self.identities: Sequence[str] = ()
        self.labels: Int64Array = np.full(len(self._images), -1, np.int64)
        self.size = self._first_size() if size is None else size

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return PairBinDataset, (self._path, self.size, self._resize)

    def encoded(self, index: int) -> bytes:
        image = self._images[index]
        if not isinstance(image, np.ndarray):
            return bytes(image)
        done, data = cv2.imencode(".png", image[:, :, ::-1])  # pixels: the same ones again, without loss
        assert done, image.shape
        return data.tobytes()

    def where(self, index: int) -> tuple[Path, int | None]:
        image = self._images[index]
        if not isinstance(image, memoryview) or not len(image):
            return self._path / str(range(len(self))[index]), None  # not there as it is: the image's number instead
        views = (np.frombuffer(view, np.uint8) for view in (image, self._file))
        return self._path, int(np.subtract(*(view.ctypes.data for view in views)))


def _image(path: Path, number: int, value: Any) -> memoryview | bytes | NDArray[np.uint8]:
    value = plain_pickle.unwrapped(value)
    if isinstance(value, bytes | memoryview):
        return value
    if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.int8):
        if value.ndim == 1 or (value.ndim == 2 and 1 in value.shape):  # an encoded file; OpenCV gives (n, 1)
            return memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))  # a view: one may come often
        if value.ndim == 3 and value.shape[2] == 3 and value.dtype == np.uint8 and value.size:
            return value
    kind = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
    raise FormatError(
        path, f"image {number} is {kind}; expected the bytes of an image, or (S, S, 3) uint8; write the set again"
    )


def _answers(path: Path, values: Any) -> NDArray[np.bool_]:
    same = np.empty(len(values), bool)
    for i, value in enumerate(values):
        value = plain_pickle.unwrapped(value)
        if not isinstance(value, bool | int | np.bool_ | np.integer) or value not in (0, 1):
            raise FormatError(
                path, f"the answer of pair {i} is {str(value)[:40]!r}, not true or false; write the set again"
            )
        same[i] = bool(value)
    return same
