"""Where a face lies in its crop: five points of any landmark set, the head's turn, and what is refused.

In: (K, 2) pixels, K = 5, 68, 106 or 468. Out: `Fit`, or the reason why there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visard.functional.face_surface import KNOWN, anchors
from visard.functional.geometry import POSE_MODEL
from visard.masks.records import Refusal
from visard.records import Float32Array

__all__ = ["LARGEST_YAW_DEG", "Fit", "contour", "fit", "five_points"]

LARGEST_YAW_DEG = 66.0
"""Beyond, five points tell too little of where the cheek ends, and detectors guess them."""

LARGEST_PITCH_DEG = 50.0

LARGEST_ERROR = 0.25
"""Root mean square distance of the five points from those of the fitted mean head, in half eye distances; what is
farther off is no face's, or its points are wrong. Of 13,965 crops found by YuNet the largest is 0.08, of 2,000 rendered
faces 0.21."""

LARGEST_STRETCH = 1.75
"""Of the fitted head's width over its height, or the reverse; the same crops reach 1.8 and 2.1 (strong turns)."""

PITCH_BIAS_DEG = 11.0
"""The five points of upright faces look so much bowed to `POSE_MODEL` (the median of those crops is -14 and -17)."""

SMALLEST, LARGEST = 0.035, 0.40
"""Pixels of a unit (half the distance between the eyes) as part of the crop's side; an aligned crop has 0.157."""

Float64Array = NDArray[np.float64]

# Five points and their mean -> the rows of an affine camera: least squares, as in `functional.geometry.pose`.
_CENTRED = POSE_MODEL - POSE_MODEL.mean(axis=0)
_CAMERA_53 = np.linalg.pinv(_CENTRED).T.tolist()
_CENTRED_53 = _CENTRED.tolist()


@dataclass(frozen=True, eq=False)
class Fit:
    """A face's place.

    Args:
        points: five of (x, y), pixels.
        yaw, pitch: radians, signs as in `functional.geometry.pose`.
        unit: pixels of half the distance between the eyes, seen frontally.
    """

    points: list[tuple[float, float]]
    yaw: float
    pitch: float
    unit: float


def five_points(points: Float32Array) -> Float64Array | None:
    """(5, 2): eyes, nose tip, mouth corners of 5, 68, 106 or 468 points; None for any other number."""
    if points.ndim != 2 or points.shape[1] != 2 or len(points) not in KNOWN:
        return None
    return anchors(points)[:5]


def contour(points: Float32Array) -> Float64Array | None:
    """(n, 2) the face's outline from ear to ear over the chin, in any order; None of five points."""
    if len(points) == 5:
        return None
    chosen = {68: range(17), 106: range(33), 468: _OVAL_468}[len(points)]
    return np.asarray(points, np.float64)[list(chosen)]


def fit(points: Float32Array, size: int) -> Fit | Refusal:
    """The face's place and turn, or why it cannot be told.

    Args:
        points: (K, 2) pixels.
        size: S, the crop's side in pixels.
    """
    found = five_points(points)
    if found is None:
        return "points"
    # In numbers, not arrays: of so few an array's operation takes longer than the arithmetic.
    five = [(x, y) for x, y in found.tolist()]
    x, y = sum(px for px, _ in five) / 5, sum(py for _, py in five) / 5
    moved = [(px - x, py - y) for px, py in five]
    a = b = c = d = e = f = 0.0
    for (p, q, r), (px, py) in zip(_CAMERA_53, moved, strict=True):
        a, b, c, d, e, f = a + p * px, b + p * py, c + q * px, d + q * py, e + r * px, f + r * py
    # Scaled orthographic: both rows have length `unit`; the yaw changes x, the pitch y, so the longer is trusted more.
    across, down = math.sqrt(a * a + c * c + e * e), math.sqrt(b * b + d * d + f * f)
    unit = 0.5 * (across + down)
    if not math.isfinite(unit) or min(across, down) < 1e-3 * size:
        return "points"
    if not SMALLEST < unit / size < LARGEST:
        return "outside"
    if not (-0.1 * size < x < 1.1 * size and -0.1 * size < y < 1.1 * size):
        return "outside"
    # The third row of the rotation is the cross product of the first two.
    scale = across * down
    backward_x, backward_y = (c * f - e * d) / scale, (e * b - a * f) / scale
    backward_z = (a * d - c * b) / scale
    if backward_z <= 0:
        return "unlike"
    yaw = math.asin(min(max(-backward_x, -1.0), 1.0))
    pitch = math.atan2(backward_y, backward_z) + math.radians(PITCH_BIAS_DEG)
    if abs(yaw) > math.radians(LARGEST_YAW_DEG) or abs(pitch) > math.radians(LARGEST_PITCH_DEG):
        return "profile"
    off = 0.0
    for (p, q, r), (px, py) in zip(_CENTRED_53, moved, strict=True):
        off += (px - p * a - q * c - r * e) ** 2 + (py - p * b - q * d - r * f) ** 2
    if not 1 / LARGEST_STRETCH < across / down < LARGEST_STRETCH or math.sqrt(off / 5) > LARGEST_ERROR * unit:
        return "unlike"
    return Fit(five, yaw, pitch, unit)


# fmt: off
_OVAL_468 = (
    454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234,
)
# fmt: on
