"""What masks look like laid flat: cloth, pleats, folds, seams, valves, filters, prints and creases, all drawn here.

In: a `Look` and a size in pixels. Out: RGBA of the outer side, from the mask's left edge to its right one (as the
viewer of the worn mask sees them) and from its upper edge to its lower one; the alpha is 255 but for rounded corners.
Or the same as `Layers`: what is one colour is shaped, lit and moved to the crop as one plane, and coloured there.

A texture is put together from planes that are drawn once and kept: pleats and seams (of a kind), creases (64 of them),
patterns (some hundreds), parts with a colour of their own (valves, filters, prints). Colours and depths are the look's
own and are never rounded, so that there are as many textures as looks: `texture` costs about 50 us at 96 x 128,
`layers` 8.

H, W texture height and width in pixels; shade planes are int around 128 = unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.masks.canvas import OVERSAMPLED, Canvas
from visard.masks.motifs import FOLDS, PATTERNS, noise
from visard.masks.records import Kind, Look
from visard.records import UInt8Array

__all__ = ["CREASES", "Layers", "Move", "corners", "dyed", "layers", "texture"]

CREASES = 64
"""Different planes of creases; `Look.wrinkle_seed` is taken modulo this, its next bit mirrors them."""

PATTERN_DRAWS = 16
"""Different draws of each pattern."""

PRINTS = 48
"""Different logos and prints."""

NAMES, DRAWN = tuple(PATTERNS), tuple(PATTERNS.values())

KEPT = 2048
"""Planes of a sort that are kept. There are at most 256 of a sort and size (12 kB each at 96 x 128, parts 48 kB), and
each tool has a size of its own: a store that holds less than all draws some anew for ever."""

FloatArray = NDArray[np.float32]
Float64Array = NDArray[np.float64]
RGB = tuple[int, int, int]

Move = Callable[[UInt8Array], UInt8Array]
"""(H, W) or (H, W, 4) planes -> (h, w) or (h, w, 4), at the places where they are seen."""


class Layers(NamedTuple):
    """A mask laid flat, before it has its colour.

    Args:
        shade: (H, W) uint8 brightness of folds, creases and slope, 128 = unchanged.
        pattern: (H, W) uint8 from the look's colour to a second one; None: there is only one.
        parts: what lies on it, one over the other, not shaded: (H, W, 4) uint8 colour times weight, 255 - weight.
    """

    shade: UInt8Array
    pattern: UInt8Array | None
    parts: list[UInt8Array]


def layers(look: Look, height: int, width: int, side: float = 0.0, *, mirrored: bool = False) -> Layers:
    """The planes that `texture` is made of. They are shared: not to be written to.

    Args:
        look: kind, pattern, folds, creases, print; and whether the base colour is dark, for prints and patterns.
        height, width: H, W, pixels.
        side: how much brighter it becomes from the left to the right, -0.5..0.5; 0 = evenly lit.
        mirrored: right and left change places, but for the slope.
    """
    creases = look.wrinkle_seed % (2 * CREASES)
    shade = cv2.addWeighted(
        _folds(look.kind, look.pattern_seed % 4, height, width, mirrored),
        look.folds,
        _creases((creases + CREASES) % (2 * CREASES) if mirrored else creases, look.kind in _STIFF, height, width),
        look.wrinkles,
        128 - 128 * (look.folds + look.wrinkles),
    )
    if side:
        shade = cv2.addWeighted(shade, 1.0, _slope(height, width), side, -128 * side)
    return Layers(
        shade,  # type: ignore[arg-type]
        _pattern_of(look, height, width, mirrored),
        _parts(look, height, width, mirrored),
    )


def texture(look: Look, height: int, width: int, side: float = 0.0) -> UInt8Array:
    """The mask laid flat.

    Args:
        look: kind, colours, pattern, folds, creases, print.
        height, width: H, W, pixels.
        side: how much brighter it becomes from the left to the right, -0.5..0.5; 0 = evenly lit.

    Returns:
        (H, W, 4) uint8 RGBA, not multiplied by alpha. A new array.
    """
    shade, pattern, parts = layers(look, height, width, side)
    colour = _coloured(look, shade, pattern)
    for part in parts:
        colour = _with(colour, part)
    result = cv2.cvtColor(colour, cv2.COLOR_RGB2RGBA)
    opaque = corners(look.kind, height, width)
    if opaque is not None:
        cv2.insertChannel(opaque, result, 3)
    return result


def dyed(
    look: Look,
    height: int,
    width: int,
    side: float,
    move: Move,
    *,
    mirrored: bool = False,
    lit: UInt8Array | None = None,
    tint: Float64Array | None = None,
) -> UInt8Array:
    """The mask's pixels (h, w, 3) in a crop.

    Equals, but for rounding, the colours of `move(texture(...))`, times `tint`, times `lit` / 128. What is one colour
    is moved and lit as one plane and coloured there, where it has a third of the pixels.

    Args:
        look, height, width, side, mirrored: as `layers` has them.
        move: to the crop.
        lit: (h, w) uint8, brightness in the crop, 128 = unchanged; None: evenly lit.
        tint: (3, 3), from a colour to the one that it has under the crop's light; None: the same.
    """
    shade, pattern, parts = layers(look, height, width, side, mirrored=mirrored)
    shade = move(shade)
    if pattern is None and not parts:
        if lit is not None:
            shade = cv2.multiply(shade, lit, scale=1 / 128)  # type: ignore[assignment]
        return _coloured(look, shade, None, tint)
    colour = _coloured(look, shade, None if pattern is None else move(pattern))
    for part in parts:
        colour = _with(colour, move(part))
    if tint is not None:
        colour = cv2.transform(colour, tint)  # type: ignore[assignment]
    if lit is not None:
        colour = cv2.multiply(colour, cv2.cvtColor(lit, cv2.COLOR_GRAY2RGB), scale=1 / 128)  # type: ignore[assignment]
    return colour


def _coloured(
    look: Look, shade: UInt8Array, pattern: UInt8Array | None, tint: Float64Array | None = None
) -> UInt8Array:
    """(h, w, 3) of shade and pattern; under a light where there is no pattern."""
    if pattern is None:
        dye = np.array([(c / 128, 0.0) for c in look.colour])
        table = cv2.transform(_LEVELS, dye if tint is None else tint @ dye)
        return cv2.applyColorMap(shade, table)  # type: ignore[return-value]
    dye = np.array([((b - a) / 255, float(a)) for a, b in zip(look.colour, _second(look), strict=True)])
    colour = cv2.applyColorMap(pattern, cv2.transform(_LEVELS, dye))
    return cv2.multiply(colour, cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB), scale=1 / 128)  # type: ignore[return-value]


def _with(colour: UInt8Array, part: UInt8Array) -> UInt8Array:
    """A part of `Layers` over the colour."""
    rest = cv2.cvtColor(cv2.extractChannel(part, 3), cv2.COLOR_GRAY2RGB)
    over = cv2.multiply(colour, rest, scale=1 / 255)
    return cv2.add(over, cv2.cvtColor(part, cv2.COLOR_RGBA2RGB))  # type: ignore[return-value]


def _second(look: Look) -> RGB:
    """The pattern's colour: clearly lighter or darker than the base, or of another hue."""
    grey = sum(look.colour) / 3
    draw = (look.pattern_seed % 1009) * 2654435761 % 2**32  # Knuth's hash: a generator would take longer than the rest
    target = 235 if grey < 110 else 28 if draw >> 31 else 250 - grey
    r, g, b = (round(min(max(target + ((draw >> bits) & 63) * 1.4 - 45, 5), 250)) for bits in (4, 12, 20))
    return r, g, b


_LEVELS = np.arange(256, dtype=np.uint8)[:, None]


# --- pleats, seams and folds of each kind -------------------------------------------------------------------------

_STIFF: frozenset[Kind] = frozenset({"n95", "respirator"})


@lru_cache(maxsize=KEPT)
def _folds(kind: Kind, variant: int, height: int, width: int, mirrored: bool) -> UInt8Array:
    """(H, W) shade of a kind's pleats and seams at full depth."""
    if mirrored:
        return _turned(_folds(kind, variant, height, width, False))
    u, v = _grid(height, width)
    shade = FOLDS[kind](u, v, variant)
    shade += 0.018 * noise(u.shape, 7 + variant, 1.2)  # fibres
    return _averaged(128 * (1 + shade), height, width)


# --- creases ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=KEPT)
def _creases(seed: int, stiff: bool, height: int, width: int) -> UInt8Array:
    """(H, W) shade of creases and bulges at full depth; those of stiff kinds are faint."""
    if seed >= CREASES:
        return _turned(_creases(seed - CREASES, stiff, height, width))
    random = np.random.default_rng(10_000 + seed)
    u, v = _grid(height, width)
    shade = 0.09 * noise(u.shape, 100 + seed, u.shape[1] / 9) + 0.05 * noise(u.shape, 300 + seed, u.shape[1] / 22)
    for _ in range(random.integers(4, 10)):
        # Creases run from the nose and the ears' pull towards the mouth, a little bent.
        x, y = random.random(2)
        angle = math.atan2(0.55 - y, (0.5 - x) or 0.01) + random.normal() * 0.5
        along = (u - x) * math.cos(angle) + (v - y) * math.sin(angle)
        across = -(u - x) * math.sin(angle) + (v - y) * math.cos(angle) + random.normal() * 0.6 * along**2
        length, wide = 0.08 + 0.22 * random.random(), 0.010 + 0.022 * random.random()
        t = across / wide
        shade -= (0.10 + 0.16 * random.random()) * t * np.exp(0.5 - t * t) * np.exp(-((along / length) ** 2))
    return _averaged(128 * (1 + shade * (0.35 if stiff else 1.0)), height, width)


# --- patterns -----------------------------------------------------------------------------------------------------


def _pattern_of(look: Look, height: int, width: int, mirrored: bool) -> UInt8Array | None:
    """(H, W) uint8 from the base colour to the second one, None for a plain mask."""
    if look.pattern == 0 or look.kind in _STIFF:
        return None
    if look.kind == "bandana":  # printed bandanas are paisley or dotted
        number = (NAMES.index("paisley"), NAMES.index("dots"))[look.pattern % 2]
    else:
        number = look.pattern % len(NAMES)
    return _pattern(number, look.pattern_seed % PATTERN_DRAWS, height, width, mirrored)


@lru_cache(maxsize=KEPT)
def _pattern(number: int, draw: int, height: int, width: int, mirrored: bool) -> UInt8Array:
    if mirrored:
        return _turned(_pattern(number, draw, height, width, False))
    random = np.random.default_rng(20_000 + PATTERN_DRAWS * number + draw)
    u, v = _grid(height, width)
    plane = DRAWN[number](u * 1.6, v, random)  # about as wide as high in centimetres
    return _averaged(255 * plane.astype(np.float32).clip(0, 1), height, width)


# --- parts with a colour of their own -----------------------------------------------------------------------------


def _parts(look: Look, height: int, width: int, mirrored: bool) -> list[UInt8Array]:
    """`Layers.parts`."""
    parts = []
    fitted = _fitted(look.kind, look.pattern_seed % 8, height, width, mirrored)
    if fitted is not None:
        parts.append(fitted)
    if look.logo_seed is not None:
        parts.append(_print(look.logo_seed % PRINTS, sum(look.colour) < 330, height, width, mirrored))
    return parts


@lru_cache(maxsize=KEPT)
def _fitted(kind: Kind, variant: int, height: int, width: int, mirrored: bool) -> UInt8Array | None:
    """Nose clips, valves and filters."""
    if mirrored:
        fitted = _fitted(kind, variant, height, width, False)
        return None if fitted is None else _turned(fitted)
    canvas = Canvas(height, width)
    if kind == "n95":
        canvas.box(0.5, 0.07, 0.11, 0.022, (168, 170, 172), 1.0)
        if variant < 3:
            x, y = (0.5, 0.56) if variant == 0 else (0.66, 0.60) if variant == 1 else (0.34, 0.60)
            canvas.valve(x, y, 0.085, (222, 222, 216) if variant else (206, 184, 120))
        elif variant in (3, 4):
            canvas.lettering(0.5, 0.30, 0.10, (60, 80, 130), 0.55, variant)
    elif kind == "kn95":
        if variant < 2:
            canvas.valve(0.72 if variant else 0.28, 0.58, 0.06, (226, 226, 224))
        elif variant < 5:
            canvas.lettering(0.76, 0.50, 0.06, (110, 112, 116), 0.5, variant)
    elif kind == "respirator":
        colour = ((214, 72, 140), (70, 72, 76), (186, 188, 190), (120, 124, 60))[variant % 4]
        for x in (0.20, 0.80):
            canvas.disc(x, 0.54, 0.145, (34, 35, 37), 1.0)
            canvas.disc(x, 0.54, 0.128, colour, 1.0)
            canvas.disc(x, 0.54, 0.055, tuple(round(c * 0.82) for c in colour), 0.9)
        canvas.disc(0.5, 0.62, 0.098, (30, 31, 33), 1.0)
        canvas.disc(0.5, 0.62, 0.072, (92, 94, 98), 1.0)
        for k in range(-2, 3):
            canvas.box(0.5, 0.62 + 0.034 * k, 0.05, 0.007, (24, 24, 26), 0.9)
    elif kind == "surgical" and variant == 0:
        canvas.lettering(0.5, 0.50, 0.05, (120, 140, 160), 0.25, 1)
    return canvas.part()


@lru_cache(maxsize=KEPT)
def _print(seed: int, dark: bool, height: int, width: int, mirrored: bool) -> UInt8Array:
    """A made-up sign, or some lines that look like words."""
    if mirrored:
        return _turned(_print(seed, dark, height, width, False))
    random = np.random.default_rng(30_000 + seed)
    canvas = Canvas(height, width)
    tint = random.integers(0, 255, 3)
    target = (232, 230, 226) if dark else (36, 40, 52)
    red, green, blue = (round(0.65 * t + 0.35 * int(c)) for t, c in zip(target, tint, strict=True))
    colour = (red, green, blue)
    x, y = (random.choice([0.27, 0.5, 0.73]), random.uniform(0.38, 0.66))
    size, shape = random.uniform(0.05, 0.10), int(random.integers(6))
    if shape == 0:
        canvas.disc(x, y, size, colour, 0.95)
        canvas.disc(x, y, 0.6 * size, tuple(255 - c for c in colour), 0.9)
    elif shape == 1:
        canvas.polygon([(x, y - size * 1.5), (x + size, y + size), (x - size, y + size)], colour, 0.95)
    elif shape == 2:
        canvas.box(x, y, size, size * 1.2, colour, 0.9)
        canvas.disc(x, y, 0.6 * size, tuple(255 - c for c in colour), 0.85)
    elif shape == 3:
        wave = [(x + size * math.cos(t * 0.7) * (1 if t % 2 else 0.45), y + 1.6 * size * math.sin(t * 0.7))
                for t in range(9)]  # fmt: skip
        canvas.polygon(wave, colour, 0.95)
    else:
        canvas.lettering(x, y, size * (1.6 if shape == 5 else 1.0), colour, 0.9, seed)
    part = canvas.part()
    assert part is not None
    return part


# --- planes -------------------------------------------------------------------------------------------------------

_CORNER = {"surgical": 0.03, "cloth": 0.10, "kn95": 0.08, "n95": 0.0, "bandana": 0.0, "respirator": 0.0}


@lru_cache(maxsize=32)
def corners(kind: Kind, height: int, width: int) -> UInt8Array | None:
    """(H, W) alpha: 255 but beyond the rounded corners; None of a kind without."""
    radius = _CORNER[kind]
    if not radius:
        return None
    u, v = _grid(height, width)
    x, y = np.minimum(u, 1 - u) * 1.6, np.minimum(v, 1 - v)
    outside = np.hypot((radius - x).clip(0), (radius - y).clip(0)) > radius
    return _averaged(255 * (1 - outside.astype(np.float32)), height, width)


@lru_cache(maxsize=8)
def _slope(height: int, width: int) -> UInt8Array:
    """(H, W) 128 in the middle, darker to the left and brighter to the right as a cylinder's sides are."""
    u = (np.arange(width, dtype=np.float32) + 0.5) / width
    row = 128 + 120 * np.sin((u - 0.5) * 2.6)
    return np.ascontiguousarray(np.broadcast_to(np.rint(row).astype(np.uint8), (height, width)))


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[FloatArray, FloatArray]:
    """u from left to right and v from top to bottom, 0..1, of every oversampled pixel."""
    rows, columns = height * OVERSAMPLED, width * OVERSAMPLED
    u, v = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
    return u.astype(np.float32), v.astype(np.float32)


def _turned(plane: UInt8Array) -> UInt8Array:
    """The mirror image."""
    turned: UInt8Array = np.ascontiguousarray(plane[:, ::-1])
    turned.flags.writeable = False
    return turned


def _averaged(plane: FloatArray, height: int, width: int) -> UInt8Array:
    small = cv2.resize(plane.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    plane_HW: UInt8Array = np.rint(small.clip(0, 255)).astype(np.uint8)
    plane_HW.flags.writeable = False
    return plane_HW
