"""Draws the parts of a mask that have a colour of their own: valves, filters, nose clips, prints.

In: shapes, their places and sizes as parts of a texture's sides, colours. Out: the part as the texture has it, colours
times weight and what is left of the texture under it.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.records import UInt8Array

__all__ = ["OVERSAMPLED", "Canvas"]

OVERSAMPLED = 3
"""Planes are drawn so many times larger and averaged down."""


class Canvas:
    """Draws shapes of one colour each, oversampled; positions and sizes are parts of the texture's sides."""

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._size = (height * OVERSAMPLED, width * OVERSAMPLED)
        self._colour = np.zeros((*self._size, 3), np.float32)
        self._weight = np.zeros(self._size, np.float32)

    def polygon(self, points: list[tuple[float, float]], colour: tuple[int, ...], weight: float) -> None:
        scaled = np.rint([(x * self._size[1], y * self._size[0]) for x, y in points]).astype(np.int32)
        first = scaled.min(axis=0).clip(0)
        columns, rows = np.minimum(scaled.max(axis=0) + 1, self._size[::-1]) - first
        if rows <= 0 or columns <= 0:
            return
        area = np.zeros((rows, columns), np.uint8)
        cv2.fillPoly(area, [scaled - first], 255)
        part = (slice(first[1], first[1] + rows), slice(first[0], first[0] + columns))
        self._put(part, area > 0, colour, weight)

    def box(self, x: float, y: float, half_x: float, half_y: float, colour: tuple[int, ...], weight: float) -> None:
        corners = [
            (x - half_x, y - half_y),
            (x + half_x, y - half_y),
            (x + half_x, y + half_y),
            (x - half_x, y + half_y),
        ]
        self.polygon(corners, colour, weight)

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, ...], weight: float) -> None:
        """Round on the worn mask: a texture is about 1.6 times as wide as high."""
        turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        self.polygon([(x + radius * math.cos(t), y + 1.6 * radius * math.sin(t)) for t in turns], colour, weight)

    def valve(self, x: float, y: float, size: float, colour: tuple[int, ...]) -> None:
        darker = tuple(round(0.72 * c) for c in colour)
        self.box(x, y, size * 1.06, size * 1.70, tuple(round(0.5 * c) for c in colour), 0.8)
        self.box(x, y, size, size * 1.6, colour, 1.0)
        for k in range(-2, 3):
            self.box(x, y + 0.5 * k * size, 0.78 * size, 0.10 * size, darker, 0.9)

    def lettering(self, x: float, y: float, size: float, colour: tuple[int, ...], weight: float, seed: int) -> None:
        """Strokes that look like two lines of print from afar."""
        random = np.random.default_rng(40_000 + seed)
        for line in range(2):
            at = x - size
            while at < x + size:
                wide = size * random.uniform(0.08, 0.22)
                self.box(at, y + 0.55 * line * size, wide / 2, 0.17 * size, colour, weight)
                at += wide + size * random.uniform(0.07, 0.16)

    def part(self) -> UInt8Array | None:
        """What was drawn, at the texture's own size; None if nothing was."""
        if not self._weight.any():
            return None
        size = (self._width, self._height)
        weight = cv2.resize(self._weight, size, interpolation=cv2.INTER_AREA)
        colour = cv2.resize(self._colour * self._weight[..., None], size, interpolation=cv2.INTER_AREA)
        part: UInt8Array = np.rint(np.dstack([colour.clip(0, 255), 255 * (1 - weight)])).astype(np.uint8)
        part.flags.writeable = False
        return part

    def _put(self, part: tuple[slice, slice], area: NDArray[np.bool_], colour: tuple[int, ...], weight: float) -> None:
        under, weights = self._colour[part], self._weight[part]
        under[area] = (1 - weight) * under[area] + weight * np.array(colour, np.float32)
        under[area & (weights == 0)] = colour
        weights[area] = np.maximum(weights[area], weight)
