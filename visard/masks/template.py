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

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.masks.exposure import Exposure, exposure_of
from visard.masks.fitting import Fit, fit
from visard.masks.records import RGB, Look, Masked, Refusal
from visard.masks.shapes import PITCHES_DEG, TEXTURE, YAWS_DEG, View, view_of
from visard.masks.texture import texture
from visard.records import Float32Array, UInt8Array

__all__ = ["wear"]

LEAST_COVERED = 0.01
"""A mask of which less than this part of the crop is seen lies outside of it: refused."""

MARGIN = 6
"""Pixels of a 112 px crop around the mask in which its shadow lies."""

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
    patch = _patch(view, matrix, size)
    if patch is None:
        return "outside"
    lit = exposure_of(image, (view.skin @ matrix[:, :2].T + matrix[:, 2]).tolist())
    left, top, right, bottom = patch
    inverse = cv2.invertAffineTransform(matrix)
    inverse[:, 2] += inverse[:, :2] @ (left, top)
    width, height = right - left, bottom - top
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    places = cv2.warpAffine(view.places, inverse, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    planes = cv2.warpAffine(view.planes, inverse, (width, height), flags=flags)
    under = image[top:bottom, left:right]
    laid = _laid(look, own, lit, places, planes, scale)
    region = np.zeros((size, size), np.uint8)
    covered = laid[..., 3]
    region[top:bottom, left:right] = covered
    if cv2.sumElems(region)[0] < LEAST_COVERED * 255 * size * size:
        return "outside"
    result = image.copy()
    result[top:bottom, left:right] = _over(under, laid, planes, look, lit, size)
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
    return np.ascontiguousarray(matrix @ change)


def _patch(view: View, matrix: Float64Array, size: int) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in the crop of what changes; None if that is nothing."""
    left, top, right, bottom = view.box
    corners = matrix[:, :2] @ np.array([[left, right, left, right], [top, top, bottom, bottom]]) + matrix[:, 2:]
    margin = MARGIN * size / 112
    low, high = corners.min(axis=1) - margin, corners.max(axis=1) + margin
    x0, y0 = (max(0, int(c)) for c in low.tolist())
    x1, y1 = (min(size, int(c) + 1) for c in high.tolist())
    return (x0, y0, x1, y1) if x1 - x0 > 4 and y1 - y0 > 4 else None


def _laid(
    look: Look, own: UInt8Array | None, lit: Exposure, places: Float32Array, planes: UInt8Array, scale: int
) -> UInt8Array:
    """The mask's pixels, lit, with its coverage as alpha."""
    size = (TEXTURE[0] * scale, TEXTURE[1] * scale)
    if own is None:
        flat = texture(replace(look, colour=_grey(look.colour, lit.chroma)), *size)
    else:
        flat = own if own.shape[:2] == size else cv2.resize(own, size[::-1], interpolation=cv2.INTER_AREA)
    laid = cv2.remap(flat, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    coverage = cv2.multiply(cv2.extractChannel(laid, 3), cv2.extractChannel(planes, 0), scale=1 / 255)
    # Light from above is drawn in the view; that from the side is added: 128 = 1.
    shade = cv2.addWeighted(
        cv2.extractChannel(planes, 2), 1.0, cv2.extractChannel(planes, 3), lit.side, -128 * lit.side
    )
    colour = cv2.multiply(cv2.cvtColor(laid, cv2.COLOR_RGBA2RGB), cv2.applyColorMap(shade, _lamp(lit)), scale=1 / 128)
    if lit.floor:
        colour = cv2.convertScaleAbs(colour, alpha=1 - lit.floor / 255, beta=lit.floor)
    result = cv2.cvtColor(colour, cv2.COLOR_RGB2RGBA)
    return cv2.insertChannel(coverage, result, 3)


def _over(under: UInt8Array, laid: UInt8Array, planes: UInt8Array, look: Look, lit: Exposure, size: int) -> UInt8Array:
    """Skin, shadow, loops and mask, one over the other."""
    if lit.blur > 0.3:
        laid = cv2.GaussianBlur(laid, (0, 0), lit.blur)
    coverage = cv2.extractChannel(laid, 3)
    loops = cv2.extractChannel(planes, 1)
    # A band of shadow around the mask, longer below and where the mask stands off.
    reach = max(1, round(2.2 * look.slack * size / 112))
    shadow = cv2.blur(cv2.max(coverage, loops), (2 * reach + 1, 2 * reach + 1), anchor=(reach, 2 * reach))
    shadow = cv2.convertScaleAbs(shadow, alpha=-0.55 * look.shadow, beta=255)
    base = cv2.multiply(under, cv2.cvtColor(shadow, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    tone = [min(255, round(c * k)) for c, k in zip(_grey(look.loops, lit.chroma), lit.colour, strict=True)]
    base = _mixed(base, np.array(tone, np.uint8), loops)
    return _mixed(base, cv2.cvtColor(laid, cv2.COLOR_RGBA2RGB), coverage)


def _mixed(under: UInt8Array, over: UInt8Array, weight: UInt8Array) -> UInt8Array:
    """`over` (an image or one colour) on `under` with weights (h, w) 0..255."""
    weights = cv2.cvtColor(weight, cv2.COLOR_GRAY2RGB)
    if over.ndim == 1:
        top = cv2.applyColorMap(weight, _scaled(over))
    else:
        top = cv2.multiply(over, weights, scale=1 / 255)
    return cv2.add(top, cv2.multiply(under, cv2.bitwise_not(weights), scale=1 / 255))


_MIRRORED = np.array([1, 0, 2, 4, 3])
_LEVELS = np.arange(256, dtype=np.float32)[:, None]


def _lamp(lit: Exposure) -> UInt8Array:
    """(256, 1, 3) a table from brightness (128 = 1) to that of each channel under the light."""
    return np.minimum(_LEVELS * lit.colour + 0.5, 255).astype(np.uint8)[:, None]


def _scaled(colour: UInt8Array) -> UInt8Array:
    return (_LEVELS * (colour.astype(np.float32) / 255) + 0.5).astype(np.uint8)[:, None]


def _grey(colour: RGB, chroma: float) -> RGB:
    """The colour, as far as the photograph has any."""
    if chroma == 1:
        return colour
    r, g, b = colour
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    r, g, b = (round(luma + chroma * (c - luma)) for c in colour)
    return r, g, b
