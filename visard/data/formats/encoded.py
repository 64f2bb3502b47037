"""What all data sets of encoded images have in common: an image file's bytes by index, decoded to one size.

In: a subclass that gives the bytes and says where they are. Out: crops and landmarks as `FaceDataset` asks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visard.data.decode import decode, decode_into, image_size
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array, UInt8Array


class EncodedDataset(ABC):
    """Image files with ids, labels and perhaps landmarks. A subclass sets the attributes and pickles as its arguments.

    Attributes:
        ids: N image ids, unique.
        labels: (N,) int64, -1 = unlabelled.
        identities: C names.
        size: S that `image` gives, pixels.
        problems: what was left out on opening, where the caller allowed that.
    """

    ids: Sequence[str]
    labels: Int64Array
    identities: Sequence[str]
    size: int
    problems: tuple[FormatError, ...] = ()
    _resize: bool
    _points: Float32Array | None = None
    """(N, 5, 2) float32 in the pixels of each image's own size, NaN = none."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The image file, as it is stored."""

    @abstractmethod
    def where(self, index: int) -> tuple[Path, int | None]:
        """The file that holds the image, and the byte offset of its record if it holds several."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> UInt8Array:
        """(S, S, 3) uint8 RGB."""
        path, offset = self.where(index)
        return decode(self.encoded(index), self.size, self._resize, path, offset)

    def images_into(self, indices: Int64Array, images: UInt8Array, flipped: NDArray[np.bool_]) -> None:
        """See `WritingDataset`."""
        files = ((self.encoded(i), *self.where(i)) for i in indices.tolist())
        decode_into(images, files, self._resize, flipped.tolist())

    def points(self, index: int) -> Float32Array | None:
        """(5, 2) float32 landmarks in crop pixels, or None."""
        (points,) = self.all_points(np.array([index]))
        return None if np.isnan(points).any() else points

    def all_points(self, indices: Int64Array) -> Float32Array:
        """(n, 5, 2) float32, NaN for a crop without landmarks; 20 times faster than one by one."""
        if self._points is None:
            return np.full((len(indices), 5, 2), np.nan, np.float32)
        points = np.asarray(self._points[indices], np.float32)
        if not self._resize:
            return points
        widths = [image_size(self.encoded(i), *self.where(i))[0] for i in np.asarray(indices).tolist()]
        return scale_points(points, self.size / np.array(widths, np.float64)[:, None, None])

    def _first_size(self, remedy: str = "align photographs first with `visard prepare`") -> int:
        """Width of the first image that can be read at all."""
        for index in range(len(self)):
            path, offset = self.where(index)
            try:
                width, height = image_size(self.encoded(index), path, offset)
            except FormatError:
                if index + 1 == len(self):
                    raise
                continue
            if width != height:
                where = path if offset is None else f"{path} at byte {offset}"
                raise UserError(f"{where}: {width}x{height} px is not a square crop; {remedy}")
            return width
        raise AssertionError("a data set without images is refused before")


def scale_points(points: Float32Array, scale: float | np.ndarray) -> Float32Array:
    """Points after the image is resized by `scale`: the top left pixel's corner, (-0.5, -0.5), stays where it is."""
    return ((points + 0.5) * scale - 0.5).astype(np.float32)
