"""Tool 2: a mask drawn as a flat template is laid over the lower face, the way commodity masks look from that side.

In: a crop, its landmarks, a `Look`. Out: the crop with the mask on and what of it is covered, or a refusal.

The template is a `View`: the shape of that kind of mask (`shapes`), turned as the head is, as maps from pixels to the
texture. Five points place it by the affine map that takes the view's own five points to them. The lower face follows
from the five points by the head's mean proportions (`shapes`); where the points have a jaw (68, 106, 468), the template
is stretched to it, left, right and downwards each by itself. The texture is lit as the face is (`exposure`), blurred as
the crop is, and throws a soft shadow.

S is the crop's side in pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.masks.exposure import Exposure, exposure_of
from visard.masks.fitting import Fit, contour, fit
from visard.masks.records import RGB, Look, Masked, Refusal
from visard.masks.shapes import BORDER_PX, PITCHES_DEG, TEXTURE, YAWS_DEG, View, view_of
from visard.masks.texture import Move, dyed
from visard.records import Float32Array, UInt8Array

__all__ = ["wear"]

LEAST_COVERED = 0.01
"""A mask of which less than this part of the crop is seen lies outside of it: refused."""

THREAD_OPACITY, THREAD_SHADE = 0.85, 0.9
"""Of loops and straps: they are thinner than a pixel is wide, and lie in the shade of cheek and hair."""

Float64Array = NDArray[np.float64]
Affine = tuple[tuple[float, float, float], tuple[float, float, float]]


def wear(image: UInt8Array, points: Float32Array, look: Look, own: UInt8Array | None = None) -> Masked | Refusal:
    """Puts the mask on.

    About 0.35 ms for a 112 px crop on one core once the views are drawn (see `shapes.view_of`).

    Args:
        image: (S, S, 3) uint8 RGB.
        points: (K, 2) float32 pixels, K = 5, 68, 106 or 468.
        look: the mask. `look.jpeg` is left to the caller.
        own: a texture of `own.read_own` instead of one drawn by `look`, of whose kind only the form remains.

    Returns:
        the masked crop, or why there is none.
    """
    size = image.shape[0]
    face = fit(points, size)
    if isinstance(face, str):
        return face
    scale = max(1, -(-size // 112))
    mirrored = face.yaw < 0
    turned = min(round(abs(math.degrees(face.yaw)) / YAWS_DEG[1]), len(YAWS_DEG) - 1)
    tilted = min(max(round(math.degrees(face.pitch) / PITCHES_DEG[-1]), -1), 1) + 1
    view = view_of(look.kind, look.wearing, turned, tilted, scale, own is None)
    matrix = _placed(view, face, look, mirrored)
    outline = contour(points)
    stretch = None if outline is None else _stretch(view, np.array(matrix), outline)
    (a, b, x0), (c, d, y0) = matrix
    lit = exposure_of(image, [(a * x + b * y + x0, c * x + d * y + y0) for x, y in view.skin.tolist()])
    shadow = max(1, round(2.2 * look.slack * size / 112))
    patch = _patch(view, matrix, size, 1.0 if stretch is None else max(stretch), shadow, math.ceil(3 * _sigma(lit)))
    if patch is None:
        return "outside"
    left, top, right, bottom = patch
    maps = _seen(view, matrix, stretch, patch)
    places = np.empty((bottom - top, right - left, 2), np.float32)
    covered, bright = np.empty(places.shape[:2], np.float32), np.empty(places.shape[:2], np.float32)
    cv2.mixChannels([maps], [places, covered, bright], _EACH)
    if cv2.sumElems(covered)[0] < LEAST_COVERED * 255 * size * size:
        return "outside"

    def move(planes: UInt8Array) -> UInt8Array:
        return cv2.remap(planes, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]

    if own is None:
        # Its sides are lit as the cheeks are.
        shown = look if lit.chroma == 1 else replace(look, colour=_grey(look.colour, lit.chroma))
        colour = dyed(shown, TEXTURE[0] * scale, TEXTURE[1] * scale, lit.side, move, mirrored=mirrored)
        coverage: UInt8Array = cv2.convertScaleAbs(covered)  # type: ignore[assignment]
    else:
        colour, opaque = _moved(own, scale, mirrored, move)
        coverage = cv2.multiply(opaque, covered, scale=1 / 255, dtype=cv2.CV_8U)  # type: ignore[assignment]
    colour = _lit(colour, bright, lit)
    region = np.zeros((size, size), np.uint8)
    region[top:bottom, left:right] = coverage
    result = _threaded(image, view, matrix, look, lit)
    _lay_over(result[top:bottom, left:right], colour, coverage, lit, shadow, look.shadow)
    return Masked(result, region, look.kind, look.wearing)


def _placed(view: View, face: Fit, look: Look, mirrored: bool) -> Affine:
    """From the view's pixels to the crop's."""
    five = face.points
    sign = 1.0
    if mirrored:  # the view shows the mirror image: its left eye is the right one
        (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = five
        five = (-x1, y1), (-x0, y0), (-x2, y2), (-x4, y4), (-x3, y3)
        sign = -1.0
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = five
    (a, d), (b, e), (c, f) = [
        (k0 * x0 + k1 * x1 + k2 * x2 + k3 * x3 + k4 * x4, k0 * y0 + k1 * y1 + k2 * y2 + k3 * y3 + k4 * y4)
        for k0, k1, k2, k3, k4 in view.solve.tolist()
    ]
    a, b, c = sign * a, sign * b, sign * c
    # Size, askew and lower: about the mask's middle, in the view.
    angle = -look.tilt if mirrored else look.tilt
    p, q = look.size * math.cos(angle), look.size * math.sin(angle)
    x, y = view.middle.tolist()
    move_x, move_y = x - p * x + q * y, y - q * x - p * y + look.drop * view.height
    return (
        (a * p + b * q, b * p - a * q, a * move_x + b * move_y + c),
        (d * p + e * q, e * p - d * q, d * move_x + e * move_y + f),
    )


def _stretch(view: View, matrix: Float64Array, outline: Float64Array) -> tuple[float, float, float]:
    """By how much the face's jaw is farther out than the view's: at the left and the right of the view, and below."""
    a, b, c, d = matrix[0, 0], matrix[0, 1], matrix[1, 0], matrix[1, 1]
    inverse = np.array([[d, -b], [-c, a]]) / (a * d - b * c)
    points = (outline - matrix[:, 2]) @ inverse.T
    mouth, left, right, chin, middle = view.jaw
    factors = []
    for side, expected in ((points[points[:, 0] < middle], left), (points[points[:, 0] >= middle], right)):
        side = side[np.argsort(side[:, 1])]
        if len(side) < 2 or not side[0, 1] <= mouth <= side[-1, 1] or abs(expected - middle) < 0.35 * abs(left - right):
            factors.append(1.0)  # this side is turned away: what is seen of it is no jaw
        else:
            found = float(np.interp(mouth, side[:, 1], side[:, 0]))
            factors.append((found - middle) / (expected - middle))
    factors.append((float(points[:, 1].max()) - mouth) / (chin - mouth))
    low, high = STRETCH
    first, second, third = (min(max(factor, low), high) for factor in factors)
    return first, second, third


def _patch(
    view: View, matrix: Affine, size: int, widest: float, shadow: int, blurred: int
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in the crop of what changes; None if that is nothing.

    Args:
        widest: by how much the jaw stretches the mask.
        shadow: pixels that the shadow reaches aside, and half of what it does below.
        blurred: pixels that the mask's blur reaches.
    """
    (a, b, x), (c, d, y) = matrix
    # The view's border is free: pixels that are covered by nothing.
    free = int(BORDER_PX * abs(a * d - b * c) / math.hypot(max(abs(a), abs(b)), max(abs(c), abs(d))))
    height, width = view.maps.shape[:2]
    a, b, c, d = a * width, b * height, c * width, d * height
    least_x, most_x = min(a, 0.0) + min(b, 0.0), max(a, 0.0) + max(b, 0.0)
    least_y, most_y = min(c, 0.0) + min(d, 0.0), max(c, 0.0) + max(d, 0.0)
    # A shadow falls aside and down, but a window that is mirrored at the patch's edge must not see the mask above it.
    above, aside = max(0, 2 * shadow + blurred - free), max(0, shadow + blurred - free)
    aside = (widest - 1) * 0.5 * (most_x - least_x) + aside
    below = (widest - 1) * (most_y - least_y) + above
    x0, x1 = max(0, int(x + least_x - aside)), min(size, int(x + most_x + aside) + 1)
    y0, y1 = max(0, int(y + least_y - above)), min(size, int(y + most_y + below) + 1)
    return (x0, y0, x1, y1) if x1 - x0 > 4 and y1 - y0 > 4 else None


def _seen(
    view: View, matrix: Affine, stretch: tuple[float, float, float] | None, patch: tuple[int, int, int, int]
) -> Float32Array:
    """(h, w, 4) the view's maps at the patch's pixels."""
    left, top, right, bottom = patch
    (a, b, x0), (c, d, y0) = matrix
    x0, y0, of = x0 - left, y0 - top, 1 / (a * d - b * c)
    a, b, c, d = d * of, -b * of, -c * of, a * of
    x0, y0 = -a * x0 - b * y0, -c * x0 - d * y0
    size = (right - left, bottom - top)
    if stretch is None:
        # Coverage is 0 in the view's border, which is what lies beyond it.
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        inverse = np.array(((a, b, x0), (c, d, y0)))
        return cv2.warpAffine(view.maps, inverse, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]
    across, down = np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32)[:, None]
    x, y = a * across + b * down + np.float32(x0), c * across + d * down + np.float32(y0)
    mouth, _, _, _, middle = view.jaw
    aside = np.where(x < middle, np.float32(1 / stretch[0]), np.float32(1 / stretch[1]))
    # What is above the mouth keeps its width towards the eyes: the jaw says nothing of cheekbones.
    share = ((y - mouth) / np.float32(0.6 * view.height) + 1).clip(0, 1)
    x = middle + (x - middle) * (1 + share * (aside - 1))
    y = np.where(y > mouth, mouth + (y - mouth) / np.float32(stretch[2]), y)
    return cv2.remap(view.maps, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]


def _moved(own: UInt8Array, scale: int, mirrored: bool, move: Move) -> tuple[UInt8Array, UInt8Array]:
    """The pixels (h, w, 3) of one's own texture in the crop, and their alpha."""
    height, width = TEXTURE[0] * scale, TEXTURE[1] * scale
    if own.shape[:2] != (height, width):
        own = cv2.resize(own, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    moved = move(cv2.flip(own, 1) if mirrored else own)  # type: ignore[arg-type]
    return cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB), cv2.extractChannel(moved, 3)  # type: ignore[return-value]


def _lit(colour: UInt8Array, bright: Float32Array, lit: Exposure) -> UInt8Array:
    """The mask's pixels (h, w, 3) under the light."""
    lamp = cv2.applyColorMap(cv2.convertScaleAbs(bright), cv2.transform(_LEVELS, np.array(lit.colour)[:, None]))
    colour = cv2.multiply(colour, lamp, scale=1 / 128)  # type: ignore[assignment]
    if lit.floor >= 1:
        colour = cv2.convertScaleAbs(colour, alpha=1 - lit.floor / 255, beta=lit.floor)  # type: ignore[assignment]
    return colour


def _threaded(image: UInt8Array, view: View, matrix: Affine, look: Look, lit: Exposure) -> UInt8Array:
    """A copy of the crop with loops or straps."""
    result = image.copy()
    if not view.thread_ends:
        return result
    tone = [min(255.0, THREAD_SHADE * c * k) for c, k in zip(_grey(look.loops, lit.chroma), lit.colour, strict=True)]
    (a, b, _), (c, d, _) = matrix
    width = max(1, round(view.thread_width * math.sqrt(abs(a * d - b * c))))
    drawn = cv2.transform(view.threads[:, None], 16 * np.array(matrix)).astype(np.int32)  # sixteenths of a pixel
    lines = [drawn[start:end] for start, end in pairwise((0, *view.thread_ends))]
    cv2.polylines(result, lines, False, tone, width, cv2.LINE_AA, 4)
    _, top, _, height = cv2.boundingRect(drawn)
    reach = slice(max(0, (top >> 4) - width - 1), max(0, (top + height >> 4) + width + 2))
    rows = result[reach]
    if rows.size:
        cv2.addWeighted(rows, THREAD_OPACITY, image[reach], 1 - THREAD_OPACITY, 0, dst=rows)
    return result


def _lay_over(
    under: UInt8Array, colour: UInt8Array, coverage: UInt8Array, lit: Exposure, reach: int, strength: float
) -> None:
    """Shadow and mask over the skin, in place.

    Args:
        reach: pixels of the shadow's band: aside, and half of it below, where the mask stands off.
        strength: of the shadow, 0..1.
    """
    sigma = _sigma(lit)
    if sigma:
        both = cv2.GaussianBlur(cv2.merge([colour, coverage]), (0, 0), sigma)
        colour, coverage = cv2.cvtColor(both, cv2.COLOR_RGBA2RGB), cv2.extractChannel(both, 3)
    shadow = cv2.blur(coverage, (2 * reach + 1, 2 * reach + 1), anchor=(reach, 2 * reach))
    shadow = cv2.convertScaleAbs(shadow, alpha=-0.55 * strength, beta=255)
    # What is left of the skin: its share of the pixel, shadowed.
    rest = cv2.multiply(shadow, cv2.bitwise_not(coverage), scale=1 / 255)
    skin = cv2.multiply(under, cv2.cvtColor(rest, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    mask = cv2.multiply(colour, cv2.cvtColor(coverage, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    cv2.add(skin, mask, dst=under)


def _sigma(lit: Exposure) -> float:
    """Of the blur that makes the mask as unsharp as the crop, pixels; 0 = it is."""
    return 0.85 * math.sqrt(lit.blur**2 - OWN_BLUR**2) if lit.blur > OWN_BLUR else 0.0


OWN_BLUR = 0.45
"""How unsharp the mask is by its own sampling, sigma in pixels."""

STRETCH = (0.80, 1.30)
"""A jaw is taken for at most this much narrower or wider than the mean head's."""

_EACH = [0, 0, 1, 1, 2, 2, 3, 3]
_LEVELS = np.arange(256, dtype=np.uint8)[:, None]


def _grey(colour: RGB, chroma: float) -> RGB:
    """The colour, as far as the photograph has any."""
    if chroma == 1:
        return colour
    r, g, b = colour
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    r, g, b = (round(luma + chroma * (c - luma)) for c in colour)
    return r, g, b
