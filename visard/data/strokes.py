"""Drawn characters that nobody writes: `strokes:CLASSESxIMAGES`, a stand-in for handwriting that needs no download.

In: numbers of classes and images. Out: a `FaceDataset` of square pictures, ink on white; a class is some curves, an
image of it has its own hand: points, slant, size, place and pen differ. Everything follows from (seed, class, image),
so classes that are never trained on are `first=` others. An image of 28 px takes a fraction of a millisecond.

S is the picture's side in pixels; a curve is a quadratic Bezier of three points in a unit square.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.data.lines import Lines
from visard.records import Float32Array, Int64Array, UInt8Array

FINER = 4
"""Drawn at so many times the size, then averaged: the ink's edges are smooth."""

CURVE_POINTS = 16

_SHIFT = 4
"""Bits behind the point of OpenCV's drawing."""

_T = np.linspace(0, 1, CURVE_POINTS)[:, None]
_BERNSTEIN = np.concatenate([(1 - _T) ** 2, 2 * _T * (1 - _T), _T**2], axis=1)


class Strokes:
    """Characters of two to four curves.

    Args:
        classes, images_per_class: how many.
        seed: of all draws.
        size: S.
        first: number of the first class.
    """

    def __init__(self, classes: int, images_per_class: int, seed: int = 0, size: int = 28, first: int = 0) -> None:
        self._seed, self._first, self._each, self.size = seed, first, images_per_class, size
        names = [f"c{first + c:06d}" for c in range(classes)]
        self.identities: Sequence[str] = Lines.from_strings(names)
        self.ids: Sequence[str] = Lines.from_strings(f"{n}/{i:03d}" for n in names for i in range(images_per_class))
        self.labels: Int64Array = np.repeat(np.arange(classes), images_per_class)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> UInt8Array:
        """(S, S, 3) uint8."""
        index = range(len(self))[index]
        number = self._first + index // self._each
        curves = character(np.random.default_rng([self._seed, number]))
        return draw(curves, self.size, np.random.default_rng([self._seed, number, index % self._each]))

    def points(self, index: int) -> Float32Array | None:
        """None: characters have no landmarks."""
        return None


def character(generator: np.random.Generator) -> NDArray[np.float64]:
    """(K, 3, 2) float64: two to four curves; half of them begin where the one before ended."""
    curves = generator.uniform(0.1, 0.9, (int(generator.integers(2, 5)), 3, 2))
    for k in range(1, len(curves)):
        if generator.random() < 0.5:
            curves[k, 0] = curves[k - 1, 2]
    return curves


def draw(curves_K32: NDArray[np.float64], size: int, generator: np.random.Generator) -> UInt8Array:
    """(S, S, 3) uint8: the character by one hand."""
    points = curves_K32 + generator.normal(0, 0.025, curves_K32.shape)
    turn, slant = generator.normal(0, 0.08), generator.normal(0, 0.1)
    scale = generator.uniform(0.85, 1.0, 2)
    cosine, sine = np.cos(turn), np.sin(turn)
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, slant], [0, 1]]) * scale
    points = (points - 0.5) @ matrix.T + 0.5 + generator.normal(0, 0.03, 2)
    side = size * FINER
    lines = [np.rint((_BERNSTEIN @ curve * side - 0.5) * (1 << _SHIFT)).astype(np.int32) for curve in points]
    pen = max(1, round(side * generator.uniform(0.04, 0.06)))
    canvas = np.full((side, side), 255, np.uint8)
    cv2.polylines(canvas, lines, False, 0, thickness=pen, lineType=cv2.LINE_AA, shift=_SHIFT)
    grey = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
