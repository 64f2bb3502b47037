"""One's own mask: a PNG with transparency and six key points, laid flat once so that the 2D tool can wear it.

In: `mask.png` and one line of key points, in a `mask.txt` beside it or given as text, in pixels of the PNG:

    left=12,40 nose=128,8 right=244,40 left-low=30,150 chin=128,210 right-low=226,150

left and right are the upper corners (as the viewer sees the mask from the front), nose the middle of the upper edge,
the others those of the lower edge. Out: an RGBA texture whose sides are the lines between these points; what lies
outside of them (painted ear loops, say) is cut off. A photograph of a mask laid on a table does, too.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError, UserError
from visard.records import UInt8Array

__all__ = ["KEY_POINTS", "flatten", "parse_key_points", "read_own"]

KEY_POINTS = ("left", "nose", "right", "left-low", "chin", "right-low")

EXAMPLE = "left=12,40 nose=128,8 right=244,40 left-low=30,150 chin=128,210 right-low=226,150"

_POINT = re.compile(r"([a-z-]+)\s*[=:\s]\s*([^\s,;=:]+)\s*,\s*([^\s,;=:]+)\s*[,;]?\s*")

Float64Array = NDArray[np.float64]


def read_own(path: Path, key_points: str, height: int, width: int) -> UInt8Array:
    """The mask laid flat.

    Args:
        path: a PNG with an alpha channel.
        key_points: the line; "" = that of the .txt file beside it.
        height, width: of the texture, pixels.

    Returns:
        (height, width, 4) uint8 RGBA.

    Raises:
        UserError: no such file.
        FormatError: no PNG with transparency, or key points that cannot be.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a PNG of your mask")
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None or picture.ndim != 3 or picture.shape[2] != 4 or picture.dtype != np.uint8:
        raise FormatError(path, "is no 8-bit PNG with transparency; save the mask as PNG with an alpha channel")
    where = path
    if not key_points:
        where = path.with_suffix(".txt")
        if not where.is_file():
            raise UserError(f"{where}: there is no such file; write one line there: {EXAMPLE} (or give --own-points)")
        key_points = where.read_text(encoding="utf-8", errors="replace")
    points = parse_key_points(key_points, where, (picture.shape[1], picture.shape[0]))
    return flatten(cv2.cvtColor(picture, cv2.COLOR_BGRA2RGBA), points, height, width)  # type: ignore[arg-type]


def parse_key_points(text: str, where: Path, size: tuple[int, int]) -> Float64Array:
    """(6, 2) float64 pixels in the order of `KEY_POINTS`.

    Args:
        text: one line of names and coordinates.
        where: named in errors.
        size: width and height of the picture.

    Raises:
        FormatError: a name that is unknown, missing or comes twice, a number that is none or outside of the picture, or
            points that are not in the order of their names.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1:
        raise FormatError(where, f"has {len(lines)} lines; expected one: {EXAMPLE}")
    line, found, at = lines[0].strip(), dict[str, tuple[float, float]](), 0
    while at < len(line):
        matched = _POINT.match(line, at)
        if matched is None:
            raise FormatError(where, f"cannot be read from {line[at : at + 30]!r} on; expected {EXAMPLE}")
        name, at = matched.group(1), matched.end()
        if name not in KEY_POINTS or name in found:
            what = "comes twice" if name in found else "is not a key point"
            raise FormatError(where, f"{name!r} {what}; expected each of {', '.join(KEY_POINTS)} once")
        try:
            x, y = float(matched.group(2)), float(matched.group(3))
        except ValueError as error:
            raise FormatError(where, f"{name}: {error}; expected x,y in pixels") from error
        if not (math.isfinite(x) and math.isfinite(y) and -1 <= x <= size[0] and -1 <= y <= size[1]):
            raise FormatError(where, f"{name}: {x:g},{y:g} is not in the picture of {size[0]} x {size[1]} pixels")
        found[name] = (x, y)
    if missing := [name for name in KEY_POINTS if name not in found]:
        raise FormatError(where, f"{', '.join(missing)} missing; expected {EXAMPLE}")
    points = np.array([found[name] for name in KEY_POINTS])
    for corners, half in (((0, 1, 4, 3), "left"), ((1, 2, 5, 4), "right")):
        if not _is_convex(points[list(corners)]):
            raise FormatError(
                where,
                f"the points of the {half} half make no convex patch; left and right are the viewer's, y points down",
            )
    return points


def flatten(picture: UInt8Array, points_62: Float64Array, height: int, width: int) -> UInt8Array:
    """Each half between its four key points drawn out to a rectangle by a homography; (height, width, 4)."""
    result = np.empty((height, width, 4), np.uint8)
    middle = width // 2
    for corners, left, right in (((0, 1, 4, 3), 0, middle), ((1, 2, 5, 4), middle, width)):
        wide = right - left
        target = np.array([[0, 0], [wide, 0], [wide, height], [0, height]], np.float32) - 0.5
        matrix = cv2.getPerspectiveTransform(points_62[list(corners)].astype(np.float32), target)
        # Averaged down from four times the size: a photograph of a mask has far more pixels than a crop shows.
        large = np.diag([4.0, 4.0, 1.0])
        large[:2, 2] = 1.5
        half = cv2.warpPerspective(_weighted(picture), large @ matrix, (4 * wide, 4 * height), flags=cv2.INTER_LINEAR)
        small = cv2.resize(half, (wide, height), interpolation=cv2.INTER_AREA)
        alpha = small[..., 3:]
        colour = small[..., :3] / np.maximum(alpha, 1e-3)
        result[:, left:right] = np.rint(np.concatenate([colour * 255, alpha * 255], -1).clip(0, 255)).astype(np.uint8)
    return result


def _weighted(picture: UInt8Array) -> NDArray[np.float32]:
    """Colours times alpha, 0..1: what is transparent must not bleed in."""
    values = picture.astype(np.float32) / 255
    values[..., :3] *= values[..., 3:]
    return values


def _is_convex(corners_42: Float64Array) -> bool:
    """Clockwise as seen, without a notch."""
    a, b = np.roll(corners_42, -1, 0) - corners_42, np.roll(corners_42, -2, 0) - np.roll(corners_42, -1, 0)
    return bool((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0] > 1.0).all())
