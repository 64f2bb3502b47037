"""Which points a mask is placed by, as `--points` says; and masks on loose crops, where the face lies in them.

In: a row of the data set and its image. Out: (K, 2) points in the image's pixels and a word for where they are from.

A loose crop is a photograph cut about a face with room around it, of any shape (IJB's loose_crop). The mask is put on
in a square window about the face, neither turned nor, unless the face is small or large, resampled: every pixel that
the mask, its cords and its shadow leave alone stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np

from visard.data.decode import decode_whole
from visard.data.formats.folder import FolderDataset
from visard.data.formats.point_lists import PointList, read_point_list
from visard.errors import UserError
from visard.functional.face_surface import anchors
from visard.functional.geometry import (
    ARCFACE_SIZE,
    ARCFACE_TEMPLATE,
    invert,
    scale_of,
    similarity_transform,
    warp_points,
)
from visard.masks.augment import template_points
from visard.masks.records import Masked, Refusal
from visard.protocols.pair_files import rows_of
from visard.recipes.mask import MaskCopyConfig, PointsWay
from visard.records import Float32Array, UInt8Array

WINDOW, LOWER = 1.6, 12.0
"""The window's side in those of an aligned crop, and how much lower than that its middle lies, in pixels of one of 112:
a bandana ends below an aligned crop."""
SMALLEST_PX, LARGEST_PX = 180, 336
"""Sides of the window that masks are drawn in; others are resampled, since views of masks take memory by their size."""
LEAST_PX = 24
"""A smaller window (eyes 5 px apart) holds no face that a mask could be put on."""


def listed_points(config: MaskCopyConfig, ids: Sequence[str]) -> PointList | None:
    """The file that `--points` names, if it names one; its rows by id.

    Raises:
        UserError: no such file, or it names none of the images.
        FormatError: not points.
    """
    if config.points in get_args(PointsWay):
        return None
    listed = read_point_list(Path(config.points), ids)
    if listed.rows is None:
        return listed
    found = rows_of(listed.rows, ids)
    rows = {ids[row]: listed.rows[name] for name, row in found.items() if row >= 0}
    # Of a.jpg and a.png, which are found alike, the one that is called as the image.
    rows |= {name: listed.rows[name] for name, row in found.items() if row >= 0 and ids[row] == name}
    if not rows:
        raise UserError(
            f"{config.points}: none of its {len(found):,} images (first: {next(iter(found))}) is in {config.src}; the "
            "lines must begin with the ids of the data set"
        )
    return replace(listed, rows=rows)


class Points:
    """Landmarks of an image, and where they are from.

    Args:
        config: of the command.
        dataset: the images.
        listed: the points of the file, if there is one.
    """

    PAD = 0.4

    def __init__(self, config: MaskCopyConfig, dataset: Any, listed: PointList | None) -> None:
        self._dataset, self._way, self._listed = dataset, config.points, listed
        self._template = None if config.loose else template_points(dataset.size)
        self._detector: Any = None
        if config.points == "detected":
            from visard.align import models
            from visard.align.yunet import YuNet

            self._detector = YuNet(models.yunet_paths())

    def __call__(self, row: int, image: UInt8Array) -> tuple[Float32Array | None, str]:
        """(K, 2) pixels; None: a loose crop without points."""
        found: Float32Array | None = None
        if self._way == "detected":
            found, origin = self._detected(image), "detected"
        elif self._listed is not None:
            found, origin = self._listed.points(row, self._dataset.ids[row]), "file"
        if found is None and self._way not in ("detected", "template"):
            found, origin = self._dataset.points(row), "kept"
        return (self._template, "template") if found is None else (found, origin)

    def _detected(self, image: UInt8Array) -> Float32Array | None:
        from visard.align.detector import largest_central

        pad = round(self.PAD * image.shape[0])  # a crop ends where the face does; detectors expect some room
        padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        face = largest_central(self._detector.detect(padded))
        return None if face is None else (face.points - pad).astype(np.float32)


class LooseCrops:
    """A folder's images of any shape; ids, identities and points as `FolderDataset` has them.

    Args:
        folder: images in it, or in a folder an identity.
    """

    size = ARCFACE_SIZE
    """Of thumbnails."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: --loose takes a folder of image files, which this is not")
        self._files = FolderDataset(folder, size=self.size)
        self.ids, self.labels, self.identities = self._files.ids, self._files.labels, self._files.identities

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> bytes:
        """The image file."""
        return self._files.encoded(index)

    def image(self, index: int) -> UInt8Array:
        """(H, W, 3) uint8 RGB."""
        return decode_whole(self.encoded(index), *self._files.where(index))

    def points(self, index: int) -> Float32Array | None:
        """(5, 2) pixels of the folder's points.csv."""
        return self._files.points(index)


def wear_in_place(
    image: UInt8Array, points: Float32Array | None, wear: Callable[[UInt8Array, Float32Array], Masked | Refusal]
) -> UInt8Array | Refusal:
    """A loose crop with a mask on.

    Args:
        image: (H, W, 3) uint8 RGB, not changed.
        points: (K, 2) pixels, or None.
        wear: puts the mask on a square crop.

    Returns:
        (H, W, 3), or why the face cannot be masked.
    """
    if points is None or not np.isfinite(points).all():
        return "points"
    try:
        aligned = similarity_transform(anchors(points)[:5], ARCFACE_TEMPLATE)
    except ValueError:  # they coincide
        return "points"
    middle = ARCFACE_SIZE / 2 - 0.5
    (x, y) = warp_points([[middle, middle + LOWER]], invert(aligned))[0].tolist()
    height, width = image.shape[:2]
    side = round(WINDOW * ARCFACE_SIZE / scale_of(aligned))
    if not LEAST_PX <= side <= 4 * max(height, width) or not (0 <= x < width and 0 <= y < height):
        return "outside"
    left, top = round(x - side / 2), round(y - side / 2)
    shift = np.array([[1.0, 0.0, -left], [0.0, 1.0, -top]])
    window = cv2.warpAffine(image, shift, (side, side), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    size = min(max(side, SMALLEST_PX), LARGEST_PX)
    drawn_on = _resized(window, size)  # type: ignore[arg-type]
    moved = (points - (left, top) + 0.5) * (size / side) - 0.5
    masked = wear(drawn_on, moved.astype(np.float32))
    if isinstance(masked, str):
        return masked
    changed = masked.image if size == side else _carried_over(window, drawn_on, masked.image)  # type: ignore[arg-type]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    result = image.copy()
    result[y0:y1, x0:x1] = changed[y0 - top : y1 - top, x0 - left : x1 - left]
    return result


def _carried_over(window: UInt8Array, before: UInt8Array, after: UInt8Array) -> UInt8Array:
    """What changed between two pictures, in a window of another size; the rest of it stays."""
    changed = (before != after).any(axis=2).astype(np.float32)
    side = window.shape[0]
    share = np.minimum(_resized(cv2.dilate(changed, np.ones((3, 3), np.uint8)), side), 1.0)[..., None]  # type: ignore[arg-type]
    mixed = window + share * (_resized(after, side).astype(np.float32) - window)
    return np.where(share > 0, np.rint(mixed), window).astype(np.uint8)


def _resized(image: Any, size: int) -> Any:
    """A square picture of `size` pixels."""
    if image.shape[0] == size:
        return image
    way = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=way)
