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
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from visard.functional.face_surface import CAMERA_MM, KNOWN, Fit, anchors, fit
from visard.masks.light import Light, read_light, shade
from visard.masks.records import Look, Masked, Refusal
from visard.masks.texture import corners, dyed
from visard.masks.worn import COLUMNS, LOOP_POINTS, ROWS, Worn, put_on
from visard.records import UInt8Array

__all__ = ["MAX_YAW_DEG", "place_refused", "wear"]

Array = NDArray[np.float64]
FloatArray = NDArray[np.float32]

MAX_YAW_DEG = 66.0
"""Turned further, half of the mask and its lower edge are guesses: refused."""
MAX_PITCH_DEG = 42.0
MAX_ERROR_MM = 6.5
"""Points that are off the best face by more than this are not those of a face."""
LATTICE_PX = 4.0
"""Distance of the lattice's points in a 112 px crop."""
EYE_MARGIN_MM = 9.0
"""No mask is drawn nearer to the line through the eyes than this."""
MAX_SHAPE = 4.0
"""Standard deviations."""
MARGIN_PX = 6
_MOUTH = (0.0, 71.0, 10.0)
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
    if not math.isfinite(float(given.sum())):
        return "points"
    found = fit(given)
    size = image.shape[0]
    refused = place_refused(found, size)
    if refused is not None:
        return refused
    assert found is not None
    light = read_light(image, found)
    seen = _look_at(put_on(look), found, light, anchors(given)[:2], size)
    if seen is None:
        return "outside"
    return _draw(image, seen, light, look)


def place_refused(found: Fit | None, size: int) -> Refusal | None:
    """Why no mask can be put on a face that stands so in a crop of `size` pixels; None: one can."""
    if found is None:
        return "points"
    if abs(found.yaw) > math.radians(MAX_YAW_DEG) or abs(found.pitch) > math.radians(MAX_PITCH_DEG):
        return "profile"
    if found.error_mm > MAX_ERROR_MM or float(np.abs(found.shape).max()) > MAX_SHAPE:
        return "unlike"
    # The mouth's middle must be in the crop, and the face neither a speck nor larger than the crop.
    (a, b, c), (d, e, f), _ = found.turn().tolist()
    shift_x, shift_y = found.shift.tolist()
    x = found.scale * (a * _MOUTH[0] + b * _MOUTH[1] + c * _MOUTH[2]) + shift_x
    y = found.scale * (d * _MOUTH[0] + e * _MOUTH[1] + f * _MOUTH[2]) + shift_y
    eyes_px = 61.0 * found.scale
    if not (0 <= x < size and 0 <= y < size) or not 0.1 * size < eyes_px < 0.75 * size:
        return "outside"
    return None


@dataclass(frozen=True)
class _Seen:
    """The mask in the crop.

    Args:
        left, top: pixels, of the part that is drawn on.
        places: (H, W, 2) float32: x and y of the texture's pixel that is seen.
        outside: (H, W) float32, pixels from the mask's outline, negative inside.
        lit: (H, W) float32, brightness.
        loops: (N L, 2) pixels, the lines one after the other.
        shown: N, how many points of each line are seen.
    """

    left: int
    top: int
    places: FloatArray
    outside: FloatArray
    lit: FloatArray
    loops: Array
    shown: list[int]


def _look_at(mask: Worn, found: Fit, light: Light, eyes_22: Array, size: int) -> _Seen | None:
    """Where each pixel lies on the mask; None if the mask is outside of the crop."""
    moved_3P = mask.points + (found.shape.astype(np.float32) @ mask.modes).reshape(mask.points.shape)
    turned_3P = found.turn(roll=False).astype(np.float32) @ moved_3P
    flat_2P = turned_3P[:2]
    flat_2P *= np.float32(found.scale * CAMERA_MM) / (np.float32(CAMERA_MM) - turned_3P[2])
    x_VU, y_VU = flat_2P[:, : ROWS * COLUMNS].reshape(2, ROWS, COLUMNS)
    loops_2NL = flat_2P[:, ROWS * COLUMNS : ROWS * COLUMNS + mask.loops * LOOP_POINTS]
    rim = flat_2P[:, ROWS * COLUMNS + mask.loops * LOOP_POINTS :].T

    # The part of the crop that the mask's box covers, in pixels; the box is upright to the face.
    margin = MARGIN_PX * size / 112
    (least_x, most_x, *_), (least_y, most_y, *_) = cv2.minMaxLoc(x_VU), cv2.minMaxLoc(y_VU)
    first_x, first_y, last_x, last_y = least_x - margin, least_y - margin, most_x + margin, most_y + margin
    cos, sin = math.cos(found.roll), math.sin(found.roll)
    shift_x, shift_y = found.shift.tolist()
    half_x, half_y = (last_x - first_x) / 2, (last_y - first_y) / 2
    middle_x, middle_y = (first_x + last_x) / 2, (first_y + last_y) / 2
    reach_x, reach_y = abs(cos) * half_x + abs(sin) * half_y, abs(sin) * half_x + abs(cos) * half_y
    centre_x, centre_y = cos * middle_x - sin * middle_y + shift_x, sin * middle_x + cos * middle_y + shift_y
    left, top = max(math.floor(centre_x - reach_x), 0), max(math.floor(centre_y - reach_y), 0)
    right, bottom = min(math.ceil(centre_x + reach_x) + 1, size), min(math.ceil(centre_y + reach_y) + 1, size)
    if right - left < 8 or bottom - top < 8:
        return None
    # What of the box lies in that part: a lattice over more would be cut off.
    inside = [(x - shift_x, y - shift_y) for x in (left, right) for y in (top, bottom)]
    upright_x, upright_y = [cos * x + sin * y for x, y in inside], [cos * y - sin * x for x, y in inside]
    first_x, last_x = max(first_x, min(upright_x)), min(last_x, max(upright_x))
    first_y, last_y = max(first_y, min(upright_y)), min(last_y, max(upright_y))
    step = LATTICE_PX * size / 112
    lattice_x = np.arange(first_x, last_x + step, step)
    lattice_y = np.arange(first_y, last_y + step, step)
    # The points say where the eyes are, the fitted face only about.
    (ax, ay), (bx, by) = [
        (cos * (x - shift_x) + sin * (y - shift_y), cos * (y - shift_y) - sin * (x - shift_x))
        for x, y in eyes_22.tolist()
    ]
    rise = (by - ay) / max(bx - ax, 1.0)
    eyes_X = np.minimum(np.maximum(lattice_x, ax), max(bx, ax + 1.0))
    eyes_X = eyes_X * rise + (ay - ax * rise + EYE_MARGIN_MM * found.scale)
    uv_YX2, outside_YX = _unfold(x_VU, y_VU, lattice_x, lattice_y, found.yaw, eyes_X, rim)
    levels = shade(light.terms, mask.normals)
    lit_YX = cv2.remap(levels, uv_YX2, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    down, across = _texture_size(size)
    uv_YX2 *= np.array([(across - 1) / (COLUMNS - 1), (down - 1) / (ROWS - 1)], np.float32)
    # Crop pixel -> lattice: back to the upright frame, then to steps.
    x0, y0 = left - shift_x, top - shift_y
    matrix = np.array(
        [
            [cos / step, sin / step, (cos * x0 + sin * y0 - first_x) / step],
            [-sin / step, cos / step, (cos * y0 - sin * x0 - first_y) / step],
        ]
    )
    wide, tall = right - left, bottom - top
    planes = cv2.warpAffine(
        cv2.merge([uv_YX2, outside_YX, lit_YX]),
        matrix,
        (wide, tall),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    places, outside, lit = np.empty((tall, wide, 2), np.float32), *np.empty((2, tall, wide), np.float32)
    cv2.mixChannels([planes], [places, outside, lit], _EACH)
    lines = loops_2NL.T @ np.array([[cos, sin], [-sin, cos]]) + found.shift
    return _Seen(left, top, places, outside, lit, lines, _seen_loops(loops_2NL[0].reshape(mask.loops, LOOP_POINTS)))


_EACH = [0, 0, 1, 1, 2, 2, 3, 3]


def _texture_size(size: int) -> tuple[int, int]:
    """Height and width of the texture for a crop of `size` pixels.

    Large crops share those of every 64 pixels: loose ones have any size, and planes drawn for each would be drawn for
    ever (0.1 s a mask) and fill a gigabyte.
    """
    if size > 112:
        size = -(-size // 64) * 64
    across = max(32, round(1.1 * size))
    return round(0.7 * across), across


def _unfold(
    x_VU: FloatArray,
    y_VU: FloatArray,
    lattice_x: Array,
    lattice_y: Array,
    yaw: float,
    eyes_X: Array,
    rim_N2: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Column (0..U-1) and row (0..V-1), (Y, X, 2), and pixels from the outline, (Y, X), of the lattice's points.

    Args:
        eyes_X: what is above is too near to the eyes.
        rim_N2: the nose's lower rim where it hangs over the mask, or nothing.
    """
    # What is hidden keeps the place of the outline that hides it.
    if yaw < 0:
        # The left side is the one that is turned away.
        x_VU = np.minimum.accumulate(x_VU[:, ::-1], axis=1)[:, ::-1]
        edge_V = COLUMNS - 1 - np.argmin(x_VU[:, ::-1], axis=1)
        shown = np.maximum(edge_V[:, None], _COLUMN_NUMBERS)
    else:
        x_VU = np.maximum.accumulate(x_VU, axis=1)
        edge_V = np.argmax(x_VU, axis=1)
        shown = np.minimum(edge_V[:, None], _COLUMN_NUMBERS)

    # Along the rows: all of them in one increasing sequence, each moved away from the one before. Two values at once
    # are one complex number.
    wide, tall = len(lattice_x), len(lattice_y)
    both = np.empty(shown.shape, np.complex128)
    both.real = shown
    both.imag = y_VU[_EVERY_ROW, shown]
    queries = (lattice_x + _ROW_OFFSETS).ravel()
    found = np.interp(queries, _knots(x_VU, _ROW_RAMPS), both.ravel()).reshape(ROWS, wide)
    beside = np.maximum(x_VU[:, :1] - lattice_x, lattice_x - x_VU[:, -1:])

    # Across them: down every column of the lattice.
    offsets, ramps, numbers = _columns(wide)
    knots = _knots(np.maximum.accumulate(found.imag, axis=0).T, ramps)
    queries = (lattice_y + offsets).ravel()
    both = np.empty((wide, ROWS + 2), np.complex128)
    inner = both[:, 1:-1]
    inner.real, inner.imag = found.real.T, beside.T
    both[:, 0], both[:, -1] = both[:, 1], both[:, -2]
    both = np.interp(queries, knots, both.ravel()).reshape(wide, tall)
    places = np.empty((tall, wide, 2), np.float32)
    places[..., 0] = both.real.T
    places[..., 1] = np.interp(queries, knots, numbers).reshape(wide, tall).T
    upper = np.maximum(found.imag[0], eyes_X)
    if len(rim_N2):
        x, y = rim_N2[np.argsort(rim_N2[:, 0])].T
        upper = np.maximum(upper, np.interp(lattice_x, x, y, left=-_FAR, right=-_FAR))
    down = lattice_y[:, None]
    outside = np.maximum(both.imag.T, upper - down)
    return places, np.maximum(outside, down - found.imag[-1]).astype(np.float32)


# A row's numbers, with its ends once more before and after.
_COLUMN_NUMBERS = np.arange(-1, COLUMNS + 1).clip(0, COLUMNS - 1)
_ROW_NUMBERS = np.arange(-1.0, ROWS + 1).clip(0, ROWS - 1)
_EVERY_ROW = np.arange(ROWS)[:, None]
_ROW_OFFSETS = _FAR * np.arange(ROWS)[:, None]
# Equal numbers would leave the order to chance.
_ROW_RAMPS = _ROW_OFFSETS + np.arange(COLUMNS) * 1e-6


@lru_cache(maxsize=64)
def _columns(count: int) -> tuple[Array, Array, Array]:
    """Of so many columns of the lattice: how far each is moved (X, 1), the same for each of a column's knots, and their
    rows."""
    offsets = _FAR * np.arange(count)[:, None]
    return offsets, offsets + np.arange(ROWS) * 1e-6, np.tile(_ROW_NUMBERS, count)


def _knots(values: NDArray[Any], ramps: Array) -> Array:
    """Rows one after the other, flat: values + ramps, and before and after each row something far beyond it."""
    out = np.empty((values.shape[0], values.shape[1] + 2))
    np.add(values, ramps, out=out[:, 1:-1])
    out[:, 0], out[:, -1] = out[:, 1] - _BEYOND, out[:, -2] + _BEYOND
    return out.ravel()


_BEYOND = 2000.0


def _seen_loops(x_NL: Array) -> list[int]:
    """How many points of each loop are seen (upright frame): it goes behind the outline as soon as it turns back to the
    middle."""
    shown = []
    for number, line in enumerate(x_NL.tolist()):
        outwards = -1.0 if number < len(x_NL) / 2 else 1.0
        seen = 1
        while seen < len(line) and outwards * (line[seen] - line[seen - 1]) > 0:
            seen += 1
        shown.append(seen)
    return shown


def _draw(image: UInt8Array, seen: _Seen, light: Light, look: Look) -> Masked:
    """The mask, its loops and its shadow over the crop."""
    size = image.shape[0]
    unit = size / 112
    height, width = seen.outside.shape
    part = (slice(seen.top, seen.top + height), slice(seen.left, seen.left + width))
    blur = light.blur_px * unit

    def move(planes: UInt8Array) -> UInt8Array:
        moved = cv2.remap(planes, seen.places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return cv2.GaussianBlur(moved, (5, 5), blur) if blur > 0.3 else moved  # type: ignore[return-value]

    # The outline is as soft as the picture. Next to it the mask's edge is folded over and turns away from the light,
    # and little light gets to the skin beside it.
    edge = cv2.addWeighted(seen.outside, EDGE_STEPS / unit, seen.outside, 0.0, 128.0, dtype=cv2.CV_8U)
    coverage = cv2.LUT(edge, _covered(max(1, round(16 * (1.3 / unit + 1.2 * light.blur_px)))))
    lit = cv2.multiply(cv2.convertScaleAbs(seen.lit, alpha=128.0), cv2.LUT(edge, _DARKENED[FOLDED]), scale=1 / 255)
    shadowed = cv2.LUT(edge, _DARKENED[round(32 * min(max(look.shadow, 0.0), 1.0))])
    down, across = _texture_size(size)
    opaque = corners(look.kind, down, across)
    if opaque is not None:
        coverage = cv2.multiply(coverage, move(opaque), scale=1 / 255)
    cloth = dyed(look, down, across, 0.0, move, lit=lit, tint=_tint(light))  # type: ignore[arg-type]
    if light.grain > 0.1:
        cloth = _grainy(cloth, look.wrinkle_seed, light.grain)

    result = image.copy()
    if seen.shown:
        _draw_loops(result, seen.loops, seen.shown, look, light, size)
    region = np.zeros((size, size), np.uint8)
    region[part] = coverage
    rest = cv2.multiply(shadowed, cv2.bitwise_not(coverage), scale=1 / 255)
    skin = cv2.multiply(result[part], cv2.cvtColor(rest, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    mask = cv2.multiply(cloth, cv2.cvtColor(coverage, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    cv2.add(skin, mask, dst=result[part])
    return Masked(result, region, look.kind, look.wearing)


EDGE_STEPS = 24
"""Steps a pixel of a 112 px crop in which distances from the outline are told; five pixels to either side are."""
FOLDED = 13
"""How dark the folded edge is, number in `_DARKENED`."""
_DISTANCE = (np.arange(256) - 128.0) / EDGE_STEPS
_NEAR = np.maximum(1 - np.abs(_DISTANCE) / 5, 0.0) ** 2
_DARKENED = [np.rint(255 * (1 - strength / 64 * _NEAR)).astype(np.uint8) for strength in range(33)]
"""By strength of a shadow, in 64ths: what it leaves of the light, of 255, at every distance."""


@lru_cache(maxsize=64)
def _covered(wide: int) -> UInt8Array:
    """Coverage, of 255, at every distance: from all to nothing over `wide` sixteenths of a pixel of a 112 px crop."""
    covered: UInt8Array = np.rint(255 * (0.5 - _DISTANCE * (16 / wide)).clip(0, 1)).astype(np.uint8)
    return covered


def _tint(light: Light) -> Array:
    """(3, 3) from a colour to the levels that it has in this picture: as grey as that is, under its light."""
    kept = light.colourful
    return np.array(
        [
            [gain / 255 * ((1 - kept) * share + (kept if k == row else 0.0)) for k, share in enumerate(_SHARES)]
            for row, gain in enumerate(light.gain.tolist())
        ]
    )


def _draw_loops(result: UInt8Array, loops: Array, shown: list[int], look: Look, light: Light, size: int) -> None:
    """Thin cords over the skin. They end where it is much darker: there they go under hair."""
    skin = max(float(light.skin @ _LUMA), 30.0)
    x, y = np.minimum(np.maximum(loops, 0.0), size - 1.0).astype(np.intp).T
    luma = (result[y, x] @ _LUMA).tolist()
    drawn = (loops * 16.0).astype(np.int32)
    lines, bright, start = [], 0.0, 0
    for seen in shown:
        count = 0
        while count < seen and luma[start + count] > 0.4 * skin:
            count += 1
        if count > 1:
            lines.append(drawn[start : start + count])
            bright = max(bright, sum(luma[start : start + count]) / count)
        start += LOOP_POINTS
    if lines:
        lit = min(max(bright / skin, 0.55), 1.0) / 255
        colour = [channel * gain * lit for channel, gain in zip(look.loops, light.gain.tolist(), strict=True)]
        cv2.polylines(result, lines, False, colour, max(1, round(1.2 * size / 112)), cv2.LINE_AA, 4)


_SHARES = (0.299, 0.587, 0.114)
_LUMA = np.array(_SHARES)


NOISE_PX = 512
GRAIN_LEVELS = 24.0
"""Standard deviation of the field of noise, grey levels."""


@lru_cache(maxsize=2)
def _noise(times: int) -> UInt8Array:
    """(times * NOISE_PX, times * NOISE_PX, 3) uint8 about 128, the same in all three channels, again and again."""
    field = np.random.default_rng(20211).standard_normal((NOISE_PX, NOISE_PX)).astype(np.float32)
    levels = np.rint(128 + GRAIN_LEVELS * field).clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(np.tile(levels, (times, times)), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def _grainy(cloth: UInt8Array, seed: int, strength: float) -> UInt8Array:
    """The cloth (H, W, 3) with noise: a window of a fixed field, chosen by the seed."""
    height, width = cloth.shape[:2]
    field = _noise(-(-max(height, width) // NOISE_PX))
    y, x = seed % max(len(field) - height, 1), (seed // NOISE_PX) % max(len(field) - width, 1)
    share = strength / GRAIN_LEVELS
    return cv2.addWeighted(cloth, 1.0, field[y : y + height, x : x + width], share, -128 * share)  # type: ignore[return-value]
