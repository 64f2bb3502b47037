"""Tool 1: a mask as a surface in front of the face, put on an aligned crop.

In: a crop, the points there are, a `Look`. Out: `Masked`, or the reason why not. A generic face is fitted to the points
(`visard.functional.face_surface`), the mask is laid on it in its own plane (`worn`), lit as the skin is (`light`), seen
by the same camera, and laid over the photograph with its shadow.

What is hidden: a row of the mask is a convex curve around the face, so that going from the side that is near to the one
that is turned away, a place is hidden as soon as it comes to lie behind the furthest outline so far. Nothing has to be
sorted. The picture's pixels find their place on the mask by two monotone interpolations, along the rows and then across
them, on a lattice of a few pixels; what is smooth between is left to the bilinear upsampling of the lattice.

S crop size in pixels; V, U rows and columns of the mask's grid; X, Y columns and rows of the lattice; H, W the part of
the crop that is drawn on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from visard.functional.face_surface import CAMERA_MM, KNOWN, Fit, fit, reshape
from visard.masks.light import Light, read_light, shade
from visard.masks.records import Look, Masked, Refusal
from visard.masks.texture import texture
from visard.masks.worn import COLUMNS, ROWS, Worn, put_on
from visard.records import UInt8Array

__all__ = ["MAX_YAW_DEG", "place_refused", "wear"]

Array = NDArray[np.float64]
FloatArray = NDArray[np.float32]

MAX_YAW_DEG = 66.0
"""Turned further, half of the mask and its lower edge are guesses: refused."""
MAX_PITCH_DEG = 42.0
MAX_ERROR_MM = 6.5
"""Points that are off the best face by more than this are not those of a face."""
SHARE_INSIDE = 0.3
"""The eyes may not be closer together than this share of ... see `place_refused`."""

LATTICE_PX = 3.0
"""Distance of the lattice's points in a 112 px crop."""
EYE_MARGIN_MM = 9.0
"""No mask is drawn nearer to the line through the eyes than this."""
MARGIN_PX = 6
_FAR = 1e4


def wear(image: UInt8Array, points: ArrayLike, look: Look) -> Masked | Refusal:
    """The crop with the mask on.

    Args:
        image: (S, S, 3) uint8 RGB, not changed.
        points: (K, 2) pixels of the crop, x before y; K is 5, 68, 106 or 468 (see `face_surface.anchors`).
        look: what is worn and how.

    Returns:
        the masked crop, or why it cannot be masked.

    Raises:
        ValueError: points of another number.
    """
    given = np.asarray(points, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] != 2 or len(given) not in KNOWN:
        raise ValueError(f"expected (K, 2) points with K one of {', '.join(map(str, KNOWN))}, got {given.shape}")
    if not np.isfinite(given).all():
        return "points"
    found = fit(given)
    size = image.shape[0]
    refused = place_refused(found, size)
    if refused is not None:
        return refused
    assert found is not None
    mask = put_on(look)
    seen = _look_at(mask, found, size)
    if seen is None:
        return "outside"
    return _draw(image, seen, read_light(image, found), look, found)


def place_refused(found: Fit | None, size: int) -> Refusal | None:
    """Why no mask can be put on a face that stands so in a crop of `size` pixels; None: one can."""
    if found is None:
        return "points"
    if abs(found.yaw) > math.radians(MAX_YAW_DEG) or abs(found.pitch) > math.radians(MAX_PITCH_DEG):
        return "profile"
    if found.error_mm > MAX_ERROR_MM or float(np.abs(found.shape).max()) > 4.0:
        return "unlike"
    # The mouth's middle must be in the crop, and the face neither a speck nor larger than the crop.
    turn = found.turn()
    mouth = found.scale * (turn[:2] @ (0.0, 71.0, 10.0)) + found.shift
    eyes_px = 61.0 * found.scale
    if not (0 <= mouth[0] < size and 0 <= mouth[1] < size) or not 0.1 * size < eyes_px < 0.75 * size:
        return "outside"
    return None


@dataclass(frozen=True)
class _Seen:
    """The mask in the crop.

    Args:
        left, top: pixels, of the part that is drawn on.
        places: (H, W, 2) float32, column and row on the mask, each 0..1.
        outside: (H, W) float32, pixels from the mask's outline, negative inside.
        normal_places: of `places`, for the shading's grid: columns 0..U-1, rows 0..V-1.
        loops: lines of pixels, each with whether it is to be seen.
    """

    left: int
    top: int
    places: FloatArray
    outside: FloatArray
    normals: Array
    loops: list[Array]


def _look_at(mask: Worn, found: Fit, size: int) -> _Seen | None:
    """Where each pixel lies on the mask; None if the mask is outside of the crop."""
    upright = found.turn(roll=False)
    points = reshape(mask.points, found.shape) @ upright.T
    nearer = found.scale * CAMERA_MM / (CAMERA_MM - points[:, 2])
    x_VU = (points[:, 0] * nearer).reshape(ROWS, COLUMNS)
    y_VU = (points[:, 1] * nearer).reshape(ROWS, COLUMNS)

    # The part of the crop, in pixels and in the upright frame.
    cos, sin = math.cos(found.roll), math.sin(found.roll)
    px, py = cos * x_VU - sin * y_VU + found.shift[0], sin * x_VU + cos * y_VU + found.shift[1]
    left, top = max(int(px.min()) - MARGIN_PX, 0), max(int(py.min()) - MARGIN_PX, 0)
    right, bottom = min(int(px.max()) + MARGIN_PX + 2, size), min(int(py.max()) + MARGIN_PX + 2, size)
    if right - left < 8 or bottom - top < 8:
        return None
    step = LATTICE_PX * size / 112
    corners_x = np.array([left, right, left, right]) - found.shift[0]
    corners_y = np.array([top, top, bottom, bottom]) - found.shift[1]
    upright_x, upright_y = cos * corners_x + sin * corners_y, cos * corners_y - sin * corners_x
    first_x, last_x = max(upright_x.min(), x_VU.min() - 2 * step), min(upright_x.max(), x_VU.max() + 2 * step)
    first_y, last_y = max(upright_y.min(), y_VU.min() - 2 * step), min(upright_y.max(), y_VU.max() + 2 * step)
    lattice_x = np.arange(first_x, last_x + step, step)
    lattice_y = np.arange(first_y, last_y + step, step)

    lattice = _unfold(x_VU, y_VU, lattice_x, lattice_y, found, mask, upright)
    # Crop pixel -> lattice: back to the upright frame, then to steps.
    matrix = np.array(
        [
            [cos / step, sin / step, (cos * (left - found.shift[0]) + sin * (top - found.shift[1]) - first_x) / step],
            [-sin / step, cos / step, (cos * (top - found.shift[1]) - sin * (left - found.shift[0]) - first_y) / step],
        ]
    )
    shape = (right - left, bottom - top)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    places = cv2.warpAffine(lattice[..., :2], matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    outside = cv2.warpAffine(lattice[..., 2], matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    loops = _loops(mask, found)
    return _Seen(left, top, places, outside, mask.normals, loops)  # type: ignore[arg-type]


def _unfold(
    x_VU: Array, y_VU: Array, lattice_x: Array, lattice_y: Array, found: Fit, mask: Worn, upright: Array
) -> FloatArray:
    """(Y, X, 3) float32: column (0..U-1), row (0..V-1) and pixels from the outline, of the lattice's points."""
    if found.yaw < 0:
        # The left side is the one that is turned away.
        x_VU = np.minimum.accumulate(x_VU[:, ::-1], axis=1)[:, ::-1]
        edge = x_VU.shape[1] - 1 - np.argmin(x_VU[:, ::-1], axis=1)
        hidden = np.arange(COLUMNS) < edge[:, None]
        ramp = _RAMP
    else:
        x_VU = np.maximum.accumulate(x_VU, axis=1)
        edge = np.argmax(x_VU, axis=1)
        hidden = np.arange(COLUMNS) > edge[:, None]
        ramp = _RAMP
    nth = np.arange(ROWS)
    u_VU = np.where(hidden, edge[:, None], _COLUMN_NUMBERS)
    y_VU = np.where(hidden, y_VU[nth, edge][:, None], y_VU)
    knots_x = np.empty((ROWS, COLUMNS + 2))
    knots_x[:, 1:-1] = x_VU
    knots_x[:, 1:-1] += ramp
    knots_x[:, 0], knots_x[:, -1] = x_VU[:, 0] - 2000.0, x_VU[:, -1] + 2000.0
    knots_x += _FAR * nth[:, None]
    queries = (lattice_x + _FAR * nth[:, None]).ravel()
    flat = knots_x.ravel()
    u_VX = np.interp(queries, flat, _bordered(u_VU)).reshape(ROWS, -1)
    y_VX = np.interp(queries, flat, _bordered(y_VU)).reshape(ROWS, -1)

    # Across: every column of the lattice goes down through the rows.
    columns = len(lattice_x)
    if mask.nose is not None:
        rim = reshape(mask.nose, found.shape) @ upright.T
        rim = rim[:, :2] * (found.scale * CAMERA_MM / (CAMERA_MM - rim[:, 2:]))
        order = np.argsort(rim[:, 0])
        lowest = np.interp(lattice_x, rim[order, 0], rim[order, 1], left=-_FAR, right=-_FAR)
    else:
        lowest = None
    eyes = EYE_MARGIN_MM * found.scale
    upper = np.maximum(y_VX[0], eyes)
    if lowest is not None:
        upper = np.maximum(upper, lowest)
    lower = y_VX[-1]
    knots_y = np.empty((columns, ROWS + 2))
    np.maximum.accumulate(y_VX.T, axis=1, out=knots_y[:, 1:-1])
    knots_y[:, 1:-1] += _RAMP[:ROWS]
    knots_y[:, 0], knots_y[:, -1] = y_VX[0] - 2000.0, knots_y[:, -2] + 2000.0
    offset = _FAR * np.arange(columns)[:, None]
    knots_y += offset
    queries = (lattice_y + offset).ravel()
    flat = knots_y.ravel()
    v = np.interp(queries, flat, np.tile(_ROW_NUMBERS, columns))
    u = np.interp(queries, flat, _bordered(u_VX.T))
    start = np.interp(v, _ROW_NUMBERS[1:-1], x_VU[:, 0])
    end = np.interp(v, _ROW_NUMBERS[1:-1], x_VU[:, -1])

    x_XY = np.repeat(lattice_x, len(lattice_y))
    outside = np.maximum(start - x_XY, x_XY - end)
    y_XY = np.tile(lattice_y, columns)
    outside = np.maximum(outside, np.repeat(upper, len(lattice_y)) - y_XY)
    outside = np.maximum(outside, y_XY - np.repeat(lower, len(lattice_y)))
    result = np.empty((len(lattice_y), columns, 3), np.float32)
    for k, values in enumerate((u, v, outside)):
        result[..., k] = values.reshape(columns, -1).T
    return result


_RAMP = np.arange(max(ROWS, COLUMNS)) * 1e-6
_COLUMN_NUMBERS = np.arange(COLUMNS, dtype=np.float64)
_ROW_NUMBERS = np.concatenate([[0.0], np.arange(ROWS), [ROWS - 1.0]])


def _bordered(values: Array) -> Array:
    """Rows with their first and last value once more, flat."""
    out = np.empty((values.shape[0], values.shape[1] + 2))
    out[:, 1:-1] = values
    out[:, 0], out[:, -1] = values[:, 0], values[:, -1]
    return out.ravel()


def _loops(mask: Worn, found: Fit) -> list[Array]:
    """Lines (L, 2) in pixels of the loops on the side, or sides, that are seen."""
    if not len(mask.loops):
        return []
    lines = mask.loops
    shown = []
    turned = reshape(lines.reshape(-1, 3), found.shape) @ found.turn().T
    flat = turned[:, :2] * (found.scale * CAMERA_MM / (CAMERA_MM - turned[:, 2:])) + found.shift
    flat = flat.reshape(*lines.shape[:2], 2)
    half = len(lines) // 2
    for k, line in enumerate(flat):
        side = -1.0 if k < half else 1.0
        # Behind the outline as soon as it goes back towards the middle.
        along = np.cos(found.roll) * (line[:, 0]) + np.sin(found.roll) * line[:, 1]
        forward = np.flatnonzero(np.diff(along) * side < 0)
        count = int(forward[0]) + 1 if len(forward) else len(line)
        if count > 1:
            shown.append(line[:count])
    return shown


def _draw(image: UInt8Array, seen: _Seen, light: Light, look: Look, found: Fit) -> Masked:
    """The mask, its loops and its shadow over the crop."""
    size = image.shape[0]
    result = image.copy()
    height, width = seen.outside.shape
    part = (slice(seen.top, seen.top + height), slice(seen.left, seen.left + width))

    # Cloth in the light.
    across = max(32, round(1.15 * size))
    cloth = texture(look, round(across * 0.7), across)
    tall, wide = cloth.shape[:2]
    scale = np.array([(wide - 1) / (COLUMNS - 1), (tall - 1) / (ROWS - 1)], np.float32)
    seen_cloth = cv2.remap(cloth, seen.places * scale, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    levels = shade(light.terms, seen.normals).reshape(ROWS, COLUMNS).astype(np.float32)
    lit = cv2.remap(levels, seen.places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    alpha = np.clip(0.5 - seen.outside, 0.0, 1.0)
    alpha *= seen_cloth[..., 3] * np.float32(1 / 255)
    # The edge is folded over and turns away from the light.
    lit *= 1.0 - 0.16 * np.clip(1.0 + seen.outside * (0.5 * 112 / size), 0.0, 1.0)
    gain = (light.gain / 255.0).astype(np.float32)
    colour = seen_cloth[..., :3].astype(np.float32)
    if light.colourful < 1.0:
        grey = colour @ np.array([0.299, 0.587, 0.114], np.float32)
        colour += (grey[..., None] - colour) * np.float32(1 - light.colourful)
    colour *= lit[..., None] * gain
    if light.grain > 0.1:
        colour += _grain(look.wrinkle_seed, height, width, light.grain)
    if light.blur_px > 0.25:
        colour = cv2.GaussianBlur(colour, (0, 0), light.blur_px * size / 112)
        alpha = cv2.GaussianBlur(alpha, (0, 0), light.blur_px * size / 112)

    if seen.loops:
        _draw_loops(result, seen.loops, look, light, size)
    below = result[part].astype(np.float32)
    # Soft shadow: what little light the gap lets in.
    soft = cv2.GaussianBlur(alpha, (0, 0), 2.2 * size / 112)
    below *= (1.0 - (0.55 * look.shadow) * soft * (1.0 - alpha))[..., None]
    below += (colour - below) * alpha[..., None]
    np.clip(below, 0, 255, out=below)
    result[part] = (below + 0.5).astype(np.uint8)
    region = np.zeros((size, size), np.uint8)
    region[part] = (alpha * 255 + 0.5).astype(np.uint8)
    return Masked(result, region, look.kind, look.wearing)


def _draw_loops(result: UInt8Array, loops: list[Array], look: Look, light: Light, size: int) -> None:
    """Thin cords over the skin; under the hair they are not seen, which is where the picture has not the skin's
    colour."""
    lines = [np.round(line * 16).astype(np.int32)[:, None] for line in loops]
    cover = np.zeros((size, size), np.uint8)
    cv2.polylines(cover, lines, False, 255, max(1, round(1.4 * size / 112)), cv2.LINE_AA, 4)
    y, x = cover.nonzero()
    if not len(y):
        return
    pixels = result[y, x].astype(np.float64)
    off = (pixels - light.skin) * (1 / np.maximum(light.skin, 40.0))
    bare = np.exp(-(off * off).sum(1) * 2.5)
    alpha = cover[y, x] * (0.85 / 255) * bare
    colour = np.array(look.loops, np.float64) * (light.gain / 255) * 0.92
    result[y, x] = (pixels + (colour - pixels) * alpha[:, None] + 0.5).astype(np.uint8)


@lru_cache(maxsize=1)
def _noise() -> FloatArray:
    return np.random.default_rng(20211).standard_normal((512, 512, 1)).astype(np.float32)


def _grain(seed: int, height: int, width: int, strength: float) -> FloatArray:
    """(H, W, 1) noise; a window of a fixed field, chosen by the seed."""
    noise = _noise()
    y, x = seed % max(512 - height, 1), (seed // 512) % max(512 - width, 1)
    return noise[y : y + height, x : x + width] * np.float32(strength)
