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
from visard.masks.shapes import PITCHES_DEG, TEXTURE, YAWS_DEG, View, view_of
from visard.masks.texture import texture
from visard.records import Float32Array, UInt8Array

__all__ = ["wear"]

LEAST_COVERED = 0.01
"""A mask of which less than this part of the crop is seen lies outside of it: refused."""

MARGIN = 5
"""Pixels of a 112 px crop around the mask in which its shadow lies."""

THREAD_OPACITY, THREAD_SHADE = 0.85, 0.9
"""Of loops and straps: they are thinner than a pixel is wide, and lie in the shade of cheek and hair."""

Float64Array = NDArray[np.float64]


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
    view = view_of(look.kind, look.wearing, turned, tilted, scale)
    matrix = _placed(view, face, look, mirrored)
    outline = contour(points)
    stretch = None if outline is None else _stretch(view, matrix, outline)
    patch = _patch(view, matrix, size, 1.0 if stretch is None else max(stretch))
    if patch is None:
        return "outside"
    lit = exposure_of(image, (view.skin @ matrix[:, :2].T + matrix[:, 2]).tolist())
    left, top, right, bottom = patch
    maps = _seen(view, matrix, stretch, patch)
    covered, bright = cv2.extractChannel(maps, 2), cv2.extractChannel(maps, 3)
    places = np.empty((*maps.shape[:2], 2), np.float32)
    cv2.mixChannels([maps], [places], [0, 0, 1, 1])
    if cv2.sumElems(covered)[0] < LEAST_COVERED * 255 * size * size:
        return "outside"
    laid = cv2.remap(
        _flat(look, own, lit, scale, mirrored), places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    coverage = cv2.multiply(cv2.extractChannel(laid, 3), covered, scale=1 / 255, dtype=cv2.CV_8U)
    region = np.zeros((size, size), np.uint8)
    region[top:bottom, left:right] = coverage
    result = _threaded(image, view, matrix, look, lit)
    under = result[top:bottom, left:right]
    colour = _shown(cv2.cvtColor(laid, cv2.COLOR_RGBA2RGB), bright, lit)
    result[top:bottom, left:right] = _over(under, colour, coverage, look, lit, size)
    return Masked(result, region, look.kind, look.wearing)


def _placed(view: View, face: Fit, look: Look, mirrored: bool) -> Float64Array:
    """(2, 3) from the view's pixels to the crop's."""
    five = face.points
    if mirrored:  # the view shows the mirror image: its left eye is the right one
        five = five[_MIRRORED] * (-1, 1)
    matrix = (view.solve @ five).T
    if mirrored:
        matrix[0] *= -1
    # Size, askew and lower: about the mask's middle, in the view.
    angle = -look.tilt if mirrored else look.tilt
    a, b = look.size * math.cos(angle), look.size * math.sin(angle)
    x, y = view.middle.tolist()
    drop = look.drop * view.height
    change = np.array([[a, -b, x - a * x + b * y], [b, a, y - b * x - a * y + drop], [0.0, 0.0, 1.0]])
    return matrix @ change  # type: ignore[no-any-return]


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


def _patch(view: View, matrix: Float64Array, size: int, widest: float) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in the crop of what changes; None if that is nothing."""
    (a, b, x), (c, d, y) = matrix.tolist()
    height, width = view.maps.shape[:2]
    xs, ys = [0.0], [0.0]
    for column, row in ((width, 0), (0, height), (width, height)):
        xs.append(a * column + b * row)
        ys.append(c * column + d * row)
    margin = MARGIN * size / 112
    aside, below = (widest - 1) * 0.5 * (max(xs) - min(xs)) + margin, (widest - 1) * (max(ys) - min(ys)) + margin
    x0, x1 = max(0, int(x + min(xs) - aside)), min(size, int(x + max(xs) + aside) + 1)
    y0, y1 = max(0, int(y + min(ys) - margin)), min(size, int(y + max(ys) + below) + 1)
    return (x0, y0, x1, y1) if x1 - x0 > 4 and y1 - y0 > 4 else None


def _seen(
    view: View, matrix: Float64Array, stretch: tuple[float, float, float] | None, patch: tuple[int, int, int, int]
) -> Float32Array:
    """(h, w, 4) the view's maps at the patch's pixels."""
    left, top, right, bottom = patch
    inverse = cv2.invertAffineTransform(matrix)
    inverse[:, 2] += inverse[:, :2] @ (left, top)
    size = (right - left, bottom - top)
    if stretch is None:
        # Coverage is 0 in the view's border, which is what lies beyond it.
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(view.maps, inverse, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]
    (a, b, x0), (c, d, y0) = inverse.tolist()
    across, down = np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32)[:, None]
    x, y = a * across + b * down + np.float32(x0), c * across + d * down + np.float32(y0)
    mouth, _, _, _, middle = view.jaw
    aside = np.where(x < middle, np.float32(1 / stretch[0]), np.float32(1 / stretch[1]))
    # What is above the mouth keeps its width towards the eyes: the jaw says nothing of cheekbones.
    share = ((y - mouth) / np.float32(0.6 * view.height) + 1).clip(0, 1)
    x = middle + (x - middle) * (1 + share * (aside - 1))
    y = np.where(y > mouth, mouth + (y - mouth) / np.float32(stretch[2]), y)
    return cv2.remap(view.maps, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]


def _flat(look: Look, own: UInt8Array | None, lit: Exposure, scale: int, mirrored: bool) -> UInt8Array:
    """The texture as the view has it, its sides lit as the cheeks are."""
    height, width = TEXTURE[0] * scale, TEXTURE[1] * scale
    if own is None:
        shown = look if lit.chroma == 1 else replace(look, colour=_grey(look.colour, lit.chroma))
        flat = texture(shown, height, width, -lit.side if mirrored else lit.side)
    elif own.shape[:2] == (height, width):
        flat = own
    else:
        flat = cv2.resize(own, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return cv2.flip(flat, 1) if mirrored else flat  # type: ignore[return-value]


def _shown(colour: UInt8Array, bright: Float32Array, lit: Exposure) -> UInt8Array:
    """The mask's pixels (h, w, 3) under the light."""
    lamp = cv2.applyColorMap(cv2.convertScaleAbs(bright), _lamp(lit))
    colour = cv2.multiply(colour, lamp, scale=1 / 128)
    if lit.floor >= 1:
        colour = cv2.convertScaleAbs(colour, alpha=1 - lit.floor / 255, beta=lit.floor)
    return colour


def _threaded(image: UInt8Array, view: View, matrix: Float64Array, look: Look, lit: Exposure) -> UInt8Array:
    """A copy of the crop with loops or straps."""
    result = image.copy()
    if not view.thread_ends:
        return result
    tone = [min(255.0, THREAD_SHADE * c * k) for c, k in zip(_grey(look.loops, lit.chroma), lit.colour, strict=True)]
    (a, b, _), (c, d, _) = matrix.tolist()
    width = max(1, round(view.thread_width * math.sqrt(abs(a * d - b * c))))
    drawn = (16 * (view.threads @ matrix[:, :2].T + matrix[:, 2])).astype(np.int32)  # sixteenths of a pixel
    lines = [drawn[start:end] for start, end in pairwise((0, *view.thread_ends))]
    cv2.polylines(result, lines, False, tone, width, cv2.LINE_AA, 4)
    return cv2.addWeighted(result, THREAD_OPACITY, image, 1 - THREAD_OPACITY, 0)  # type: ignore[return-value]


def _over(
    under: UInt8Array, colour: UInt8Array, coverage: UInt8Array, look: Look, lit: Exposure, size: int
) -> UInt8Array:
    """Skin, shadow and mask, one over the other."""
    if lit.blur > OWN_BLUR:
        sigma = 0.85 * math.sqrt(lit.blur**2 - OWN_BLUR**2)
        both = cv2.GaussianBlur(cv2.merge([colour, coverage]), (0, 0), sigma)
        colour, coverage = cv2.cvtColor(both, cv2.COLOR_RGBA2RGB), cv2.extractChannel(both, 3)
    # A band of shadow around the mask, longer below and where the mask stands off.
    reach = max(1, round(2.2 * look.slack * size / 112))
    shadow = cv2.blur(coverage, (2 * reach + 1, 2 * reach + 1), anchor=(reach, 2 * reach))
    shadow = cv2.convertScaleAbs(shadow, alpha=-0.55 * look.shadow, beta=255)
    # What is left of the skin: its share of the pixel, shadowed.
    rest = cv2.multiply(shadow, cv2.bitwise_not(coverage), scale=1 / 255)
    skin = cv2.multiply(under, cv2.cvtColor(rest, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    return cv2.add(skin, cv2.multiply(colour, cv2.cvtColor(coverage, cv2.COLOR_GRAY2RGB), scale=1 / 255))  # type: ignore[return-value]


OWN_BLUR = 0.45
"""How unsharp the mask is by its own sampling, sigma in pixels."""

STRETCH = (0.80, 1.30)
"""A jaw is taken for at most this much narrower or wider than the mean head's."""

_MIRRORED = np.array([1, 0, 2, 4, 3])
_LEVELS = np.arange(256, dtype=np.float32)[:, None]


def _lamp(lit: Exposure) -> UInt8Array:
    """(256, 1, 3) a table from brightness (128 = 1) to that of each channel under the light."""
    return np.minimum(_LEVELS * np.array(lit.colour, np.float32) + 0.5, 255).astype(np.uint8)[:, None]


def _grey(colour: RGB, chroma: float) -> RGB:
    """The colour, as far as the photograph has any."""
    if chroma == 1:
        return colour
    r, g, b = colour
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    r, g, b = (round(luma + chroma * (c - luma)) for c in colour)
    return r, g, b
