"""The light that a face stands in, read off its skin: a mask is lit by it.

In: a crop, and where the generic face stands in it. Out: `Light`: how bright each direction is lit, the light's colour
and strength, how sharp the picture is.

Brightness is a linear function of the surface's normal (the first four spherical harmonics; Ramamoorthi and Hanrahan
2001 show that a matt surface needs nine, of which these carry most), fitted in linear light to places of bare skin.
What a face hides there (hair, glasses, a beard) is known by its brightness and counts less. Albedo is unknown: the fit
gives brightness relative to a place that looks at the camera; the strength comes from the crop's bright pixels.

S crop size, P places on the skin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.functional.face_surface import ANGLE_DEG, AXIS_Z, CAMERA_MM, HEIGHT_MM, MODES, Fit, radius, reshape
from visard.records import UInt8Array

__all__ = ["Light", "read_light", "shade"]

Array = NDArray[np.float64]
FloatArray = NDArray[np.float32]

COARSE = 28
# 2 x 2 pixels of each 4 x 4 are enough, and three times as fast.
_SHRINK = {112: cv2.INTER_LINEAR}
"""The crop is averaged down to this many pixels a side: a place is 4 px of a 112 px crop."""
GAMMA = 2.2
CONTRAST = 1.2
"""Cloth scatters less light under its surface than skin does: its shading is so much steeper."""
# Shading differences are kept to what is seen on faces, in linear light relative to the front.
DARKEST, BRIGHTEST = 0.28, 1.45

# Height (mm under the eyes) and angles (degrees) of places that are skin on most faces: forehead, cheeks, nose's ridge.
_PLACES = (
    (-38, (-30, -15, 0, 15, 30)), (-28, (-38, -20, 0, 20, 38)),
    (14, (-62, -48, 48, 62)), (22, (-66, -54, -42, -31, 31, 42, 54, 66)), (30, (-62, -50, -39, -28, 28, 39, 50, 62)),
    (40, (-60, -48, -36, 36, 48, 60)), (52, (-58, -46, 46, 58)), (20, (-6, 0, 6)), (32, (-8, 8)),
)  # fmt: skip


@dataclass(frozen=True)
class Light:
    """What a mask needs to know of a crop.

    Args:
        terms: (4,) brightness = terms[0] + terms[1:] @ normal in the face's own axes, linear light, 1 = looking at the
            camera.
        gain: (3,) what a white surface that looks at the camera has, of 255, in the picture's own (sRGB) levels.
        colourful: 1 for a colour picture, 0 for a grey one.
        skin: (3,) the skin's colour, sRGB levels.
        blur_px: standard deviation of the blur that makes a sharp edge as soft as the picture's.
        grain: standard deviation of the noise to add, grey levels.
    """

    terms: Array
    gain: Array
    colourful: float
    skin: Array
    blur_px: float
    grain: float


def read_light(image_SS3: UInt8Array, fit: Fit) -> Light:
    """The light on a face.

    Args:
        image_SS3: (S, S, 3) uint8 RGB.
        fit: where the face is.
    """
    size = image_SS3.shape[0]
    coarse = cv2.resize(image_SS3, (COARSE, COARSE), interpolation=_SHRINK.get(size, cv2.INTER_AREA))
    grey = cv2.cvtColor(coarse, cv2.COLOR_RGB2GRAY).ravel()
    places, modes, normals, products = _places()
    rotation = fit.turn()
    turned_3P = rotation @ (places + fit.shape @ modes).reshape(3, -1)
    nearer = (COARSE / size * CAMERA_MM * fit.scale) / (CAMERA_MM - turned_3P[2])
    first = (fit.shift + 0.5) * (COARSE / size)
    at_2P = (turned_3P[:2] * nearer + first[:, None]).astype(np.intp)
    # Turned away more than this the place is on the outline, or hidden.
    seen = rotation[2] @ normals > 0.3
    # As unsigned numbers negative ones are large.
    seen &= np.maximum.reduce(at_2P.view(np.uintp)) < COARSE
    number = np.flatnonzero(seen)
    at = (COARSE * at_2P[1] + at_2P[0])[number]
    red, blue = cv2.extractChannel(coarse, 0), cv2.extractChannel(coarse, 2)
    chroma = cv2.norm(red, blue, cv2.NORM_L1) / red.size
    colourful = min(max((chroma - 3.0) / 9.0, 0.0), 1.0)
    bright = float(np.partition(grey, -_BRIGHT)[-_BRIGHT])
    if len(at) < 8:
        terms = _UNLIT / float(_UNLIT[0] + _UNLIT[1:] @ rotation[2])
        skin = coarse.reshape(-1, 3).mean(0)
    else:
        luma = grey[at]
        # The brighter half: shadow, hair and glasses are darker than skin.
        brighter = np.argsort(luma, kind="stable")[len(at) // 2 :]
        terms = _fit_terms(luma, luma[brighter[0]], products[number], rotation[2])
        skin = np.add.reduce(coarse.reshape(-1, 3)[at[brighter]], dtype=np.float64) / len(brighter)
    blur, grain = _softness(image_SS3, size)
    return Light(terms, _gain(skin, bright, colourful), colourful, skin, blur, grain)


def shade(terms: Array, normals_VU3: FloatArray) -> FloatArray:
    """(V, U) float32 brightness of surfaces, in the picture's levels: 1 = as one that looks at the camera."""
    linear = cv2.transform(normals_VU3, terms[_LAST])
    linear = np.minimum(np.maximum(linear, DARKEST, out=linear), BRIGHTEST, out=linear)
    result: FloatArray = linear ** np.float32(CONTRAST / GAMMA)
    return result


_LAST = np.array([[1, 2, 3, 0]])
_UNLIT = np.array([0.50, 0.0, -0.24, 0.50])
# White, in levels, and what a skin's colour is under white light, each channel over its luma.
_WHITE = 236.0
_SKIN_TINT = (1.20, 0.93, 0.80)


def _fit_terms(luma_P: UInt8Array, median: np.uint8, products: Array, view_3: Array) -> Array:
    """The four terms, by weighted least squares.

    Args:
        luma_P: of the places, 0..255.
        median: the luma of middling brightness.
        products: (P, 21) of the places, as `_places` has them.
        view_3: the camera's direction.
    """
    relative = _LINEAR[luma_P] * (1 / float(_LINEAR[median]))
    # What the usual light leaves unexplained is weighed down. Much too dark is hair, a brow, a beard, more often than
    # too bright is anything.
    off = relative - products[:, 20]
    weight = (relative >= 0.3) / (1.0 + (off * off) * (1 / 0.25))
    # The prior: light from above and in front, as strong as some places.
    normal, given = weight @ products[:, :16] + _PRIOR, (weight * relative) @ products[:, 16:20] + _PRIOR_TERMS
    # OpenCV's, since numpy takes ten times as long to get to LAPACK; the prior keeps the matrix positive.
    terms = cv2.solve(normal.reshape(4, 4), given[:, None], flags=cv2.DECOMP_CHOLESKY)[1][:, 0]
    front = float(terms[0] + terms[1:] @ view_3)
    return terms / max(front, 0.2)


_LINEAR = (np.maximum(np.arange(256), 2.0) / 255) ** GAMMA
"""Of levels; never quite dark."""
_PRIOR = np.diag([1.0, 1.0, 3.0, 2.0]).ravel()
_PRIOR_TERMS = _PRIOR.reshape(4, 4) @ _UNLIT
_BRIGHT = 40
"""So many pixels of the averaged crop, one in twenty, are brighter than its bright end."""


def _gain(skin_3: Array, bright: float, colourful: float) -> Array:
    """Levels of a white surface: the picture's bright places, and skin, are what says how it is exposed."""
    # In numbers: of three an array's operation takes longer than the arithmetic.
    red, green, blue = skin_3.tolist()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    # Skin of any colour is darker than white cloth beside it; the picture's bright end is rarely brighter.
    level = 0.5 * bright + 0.5 * (luma * 1.25 + 22.0)
    level = min(max(level, luma * 1.02 + 8.0, 70.0), 246.0)
    usual = max(luma, 1.0)
    red, green, blue = (c / (usual * tint) for c, tint in zip((red, green, blue), _SKIN_TINT, strict=True))
    norm = max(0.299 * red + 0.587 * green + 0.114 * blue, 1e-3)
    casts = (1.0 + colourful * 0.6 * (min(max(tint / norm, 0.75), 1.3) - 1.0) for tint in (red, green, blue))
    return np.array([min(cast * level, 250.0) for cast in casts])


def _softness(image_SS3: UInt8Array, size: int) -> tuple[float, float]:
    """Blur and grain of the picture's middle: how fast detail falls off from one scale to the next."""
    rim = size * 3 // 10
    grey = cv2.cvtColor(image_SS3[rim : size - rim, rim : size - rim], cv2.COLOR_RGB2GRAY)
    smooth = cv2.blur(grey, (3, 3))
    fine = cv2.norm(grey, smooth, cv2.NORM_L1)
    wide = cv2.norm(smooth, cv2.blur(smooth, (5, 5)), cv2.NORM_L1)
    ratio = fine / max(wide, 1.0)
    blur = min(max((0.62 - ratio) * 2.2, 0.0), 1.3)
    grain = min(max(fine / grey.size - 1.2, 0.0) * 0.5, 2.5)
    return blur, grain


@lru_cache(maxsize=1)
def _places() -> tuple[Array, Array, Array, Array]:
    """Of `_PLACES`: mm, flat (3 P,), x of all before y; how the face's modes move them (M, 3 P); the normals (3, P);
    and (P, 21): the products of 1 and the normal with each other (16), these four themselves, and the usual light."""
    reach = radius()
    heights = np.arange(HEIGHT_MM[0], HEIGHT_MM[1] + 0.1, HEIGHT_MM[2])
    around = np.radians(np.arange(ANGLE_DEG[0], ANGLE_DEG[1] + 0.1, ANGLE_DEG[2]))
    x, z = reach * np.sin(around), reach * np.cos(around) + AXIS_Z
    points = np.stack([x, np.broadcast_to(heights[:, None], x.shape), z], -1)
    normals = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    rows, columns = [], []
    for height, angles in _PLACES:
        for angle in angles:
            rows.append(round((height - HEIGHT_MM[0]) / HEIGHT_MM[2]))
            columns.append(round((angle - ANGLE_DEG[0]) / ANGLE_DEG[2]))
    chosen = normals[rows, columns]
    places = points[rows, columns]
    modes = np.stack([(reshape(places, one) - places).T.ravel() for one in np.eye(len(MODES))])
    design = np.column_stack([np.ones(len(chosen)), chosen])
    squares = (design[:, :, None] * design[:, None]).reshape(-1, 16)
    products = np.column_stack([squares, design, design @ _UNLIT])
    return places.T.ravel(), modes, chosen.T.copy(), products
