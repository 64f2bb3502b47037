"""Photographs of any shape as square crops: a random part in training, the centre in evaluation.

In: a data set of image files, opened for resizing. Out: `Photographs`, a `FaceDataset` whose crops are the centres, and
which gives random parts to the loader.

H, W: a photograph's height and width, S: the crop's side, pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from visard.config_augment import FramingConfig
from visard.data.decode import decode_whole
from visard.records import Float32Array, Int64Array, UInt8Array

MARGIN = 256 / 224
"""Shorter side before the centre is cut out, over S."""

TRIES = 10
"""Of a random part that does not fit the photograph's shape."""


class Photographs:
    """A data set's photographs, cut to S x S.

    Args:
        dataset: gives the image files (`encoded`, `where`); one without files (rendered faces) gives its crops, which
            `shorter_side(size)` pixels make whole.
        size: S.
    """

    def __init__(self, dataset: Any, size: int) -> None:
        self._dataset, self.size = dataset, size
        self.ids: Sequence[str] = dataset.ids
        self.identities: Sequence[str] = dataset.identities
        self.ks = getattr(dataset, "ks", None)
        self.sought = getattr(dataset, "sought", None)

    @property
    def labels(self) -> Int64Array:
        labels: Int64Array = self._dataset.labels
        return labels

    def __len__(self) -> int:
        return len(self._dataset)

    def whole(self, index: int) -> UInt8Array:
        """(H, W, 3) uint8 RGB."""
        if not hasattr(self._dataset, "encoded"):
            image: UInt8Array = self._dataset.image(index)
            return image
        return decode_whole(self._dataset.encoded(index), *self._dataset.where(index))

    def image(self, index: int) -> UInt8Array:
        """(S, S, 3) uint8 RGB, the centre."""
        return centre(self.whole(index), self.size)

    def part(self, index: int, config: FramingConfig, generator: np.random.Generator) -> UInt8Array:
        """(S, S, 3) uint8 RGB, a random part."""
        return random_part(self.whole(index), self.size, config, generator)

    def points(self, index: int) -> Float32Array | None:
        """None: landmarks are of aligned crops."""
        return None


def shorter_side(size: int) -> int:
    """Pixels of a photograph's shorter side before its centre is cut out: 256 for 224."""
    return round(size * MARGIN)


def centre(image_HW3: UInt8Array, size: int) -> UInt8Array:
    """(S, S, 3) uint8: the shorter side scaled to `shorter_side(size)`, then the centre cut out.

    As torchvision's Resize(256), CenterCrop(224) has sides and offsets; pixels are scaled by area.
    """
    height, width = image_HW3.shape[:2]
    short = shorter_side(size)
    # torchvision cuts the longer side's fraction off
    tall, wide = (short, short * width // height) if height <= width else (short * height // width, short)
    scaled = _scaled(image_HW3, tall, wide)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return np.ascontiguousarray(scaled[top : top + size, left : left + size])


def random_part(image_HW3: UInt8Array, size: int, config: FramingConfig, generator: np.random.Generator) -> UInt8Array:
    """(S, S, 3) uint8: a part of random area and shape, scaled.

    As torchvision's RandomResizedCrop: area uniform, the logarithm of width over height uniform; after ten that do not
    fit, the largest centre of an allowed shape.

    Source: Szegedy et al., Going Deeper with Convolutions (arXiv:1409.4842), 6.
    """
    top, left, tall, wide = part_of(image_HW3.shape[0], image_HW3.shape[1], config, generator.random((TRIES, 4)))
    return _scaled(image_HW3[top : top + tall, left : left + wide], size, size)


def part_of(height: int, width: int, config: FramingConfig, uniform_T4: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height, width in pixels.

    Args:
        height, width: of the photograph.
        config: range of area and shape.
        uniform_T4: (T, 4) numbers from 0 to 1: area, shape, row and column of each try.
    """
    narrowest, widest = config.aspect
    for area, shape, row, column in uniform_T4.tolist():
        target = height * width * (config.area[0] + (config.area[1] - config.area[0]) * area)
        aspect = narrowest * (widest / narrowest) ** shape
        wide, tall = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(row * (height - tall + 1)), int(column * (width - wide + 1)), tall, wide
    wide, tall = width, height
    if width < narrowest * height:
        tall = max(1, min(height, round(width / narrowest)))
    elif width > widest * height:
        wide = max(1, min(width, round(height * widest)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _scaled(image: UInt8Array, height: int, width: int) -> UInt8Array:
    """By area where it shrinks along both sides, else linear."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)  # type: ignore[return-value]
