"""Pleats, seams, folds and printed patterns as functions of the place on a mask.

In: u and v, 0..1, of every pixel (from the left edge to the right one, from the upper to the lower). Out: relative
brightness (0 = unchanged) of a kind's folds, or how much of a pattern's second colour there is, 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.masks.records import Kind

__all__ = ["FOLDS", "PATTERNS", "noise"]

FloatArray = NDArray[np.float32]


def _surgical(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """Three pleats that open towards the middle, welded borders, the nose wire's tunnel."""
    shade = np.zeros_like(u)
    middle = 1 - (2 * u - 1) ** 4
    for k, place in enumerate((0.30, 0.49, 0.67)[: 3 if variant else 2]):
        bent = place + 0.02 * (1 - (2 * u - 1) ** 2) * (1 if k == 0 else -0.5)
        shade += _ledge(v, bent, 0.030, 0.26) * (0.35 + 0.65 * (1 - middle * 0.35))
    shade += _groove(v, 0.075, 0.010, 0.10) + _groove(v, 0.945, 0.010, 0.12)
    shade += _groove(u, 0.040, 0.010, 0.14) + _groove(u, 0.960, 0.010, 0.14)
    edge = np.minimum(u, 1 - u)
    shade -= 0.06 * (edge < 0.040) * (np.sin(v * 150) > 0)
    shade += _bump(v, 0.035, 0.02, 0.05)
    return shade


def _cloth(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """Bound edges with stitches; a seam down the middle or darts from it."""
    edge = np.minimum(np.minimum(u * 1.5, (1 - u) * 1.5), np.minimum(v, 1 - v))
    shade = _groove(edge, 0.060, 0.010, 0.16)
    shade += 0.05 * (edge < 0.055)
    stitches = np.sin((u + v) * 170) > 0.1
    shade -= 0.10 * stitches * (np.abs(edge - 0.082) < 0.010)
    if variant in (0, 1):
        bend = 0.5 + 0.012 * np.sin(v * 5)
        shade += _groove(u, bend, 0.009, 0.20) + _ledge(u, bend, 0.06, 0.05)
    if variant == 2:
        for place in (0.36, 0.64):
            shade += _groove(v, place + 0.05 * np.abs(2 * u - 1), 0.012, 0.16)
    return shade + 0.03 * np.sin(u * 420) * np.sin(v * 330)


def _kn95(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """The fold down the middle, embossed double lines along the edges, welds at the sides."""
    ridge = 0.5 + 0.004 * np.sin(v * 4)
    shade = _groove(u, ridge, 0.008, 0.22) + 0.05 * np.tanh((ridge - u) / 0.05)
    for inset in (0.050, 0.085):
        dots = 0.5 + 0.5 * np.sign(np.sin(u * 260))
        shade += dots * (_groove(v, inset + 0.03 * np.abs(2 * u - 1), 0.010, 0.13))
        shade += dots * (_groove(v, 1 - inset - 0.03 * np.abs(2 * u - 1), 0.010, 0.13))
    dashes = 0.5 + 0.5 * np.sign(np.sin(v * 95))
    shade += dashes * (_groove(u, 0.06, 0.008, 0.15) + _groove(u, 0.94, 0.008, 0.15))
    if variant % 2:
        shade += _bump(v, 0.15, 0.035, 0.06) * (np.abs(u - 0.5) < 0.22)
    return shade


def _n95(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """A pressed cup: flange, rings of the mould, fine grain."""
    r = np.hypot((u - 0.5) / 0.5, (v - 0.52) / 0.52)
    shade = _groove(r, 0.88, 0.02, 0.20) + 0.05 * (r > 0.90)
    if variant % 2:
        shade += _groove(v, 0.36 + 0.05 * (2 * u - 1) ** 2, 0.014, 0.15) * (r < 0.85)
        shade += _groove(v, 0.68 - 0.05 * (2 * u - 1) ** 2, 0.014, 0.15) * (r < 0.85)
    else:
        shade += _groove(r, 0.55, 0.016, 0.09)
    return shade + 0.02 * np.sin(u * 300) * np.sin(v * 240)


def _bandana(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """Cloth that hangs: folds that fan out from the nose and deepen downwards."""
    phase = variant * 1.7
    fan = (u - 0.5) / (0.35 + 0.65 * v)
    shade = 0.13 * v * np.sin(fan * 21 + phase) + 0.07 * v * np.sin(fan * 43 + 2 * phase)
    across = v - 0.16 - 0.18 * (2 * u - 1) ** 2
    return shade + _ledge(across, np.zeros_like(across), 0.05, 0.12)


def _respirator(u: FloatArray, v: FloatArray, variant: int) -> FloatArray:
    """Rubber: a raised nose piece and a rim."""
    edge = np.minimum(np.minimum(u, 1 - u) * 1.4, np.minimum(v, 1 - v))
    shade = _groove(edge, 0.07, 0.02, 0.25)
    shade += _bump(u, 0.5, 0.09, 0.16) * (v < 0.45)
    return shade + _groove(v, 0.36, 0.018, 0.18) * (np.abs(u - 0.5) < 0.2 + 0.02 * variant)


FOLDS: dict[Kind, Callable[[FloatArray, FloatArray, int], FloatArray]] = {
    "surgical": _surgical,
    "cloth": _cloth,
    "kn95": _kn95,
    "n95": _n95,
    "bandana": _bandana,
    "respirator": _respirator,
}


def _groove(x: FloatArray, place: FloatArray | float, width: float, depth: float) -> FloatArray:
    """A pressed line: dark, with a lighter lip behind it."""
    t = (x - place) / width
    return -depth * np.exp(-t * t) + 0.4 * depth * np.exp(-((t - 1.6) ** 2))


def _ledge(x: FloatArray, place: FloatArray | float, width: float, depth: float) -> FloatArray:
    """The edge of a pleat: light above it, and its shadow below, which fades."""
    t = (x - place) / width
    return depth * np.where(t < 0, 0.35 * np.exp(t * 1.5), -np.exp(-t * 1.6) * (1 - np.exp(-8 * t.clip(0))))


def _bump(x: FloatArray, place: float, width: float, height: float) -> FloatArray:
    t = (x - place) / width
    return height * np.exp(-t * t)


def _stripes(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    angle = random.choice([0.0, math.pi / 2, math.pi / 4, -math.pi / 4])
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * random.uniform(22, 60))
    return (wave > random.uniform(-0.3, 0.6)).astype(np.float32)


def _checks(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    rate = random.uniform(20, 45)
    return 0.5 * (np.sin(x * rate) > 0) + 0.5 * (np.sin(y * rate) > 0)


def _plaid(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    rate = random.uniform(12, 24)
    wide, narrow = np.sin(x * rate) > 0.2, np.sin(x * rate * 2 + 1) > 0.9
    wide_y, narrow_y = np.sin(y * rate) > 0.2, np.sin(y * rate * 2 + 1) > 0.9
    return (0.35 * wide + 0.35 * wide_y + 0.5 * (narrow | narrow_y)).astype(np.float32)


def _dots(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    step = random.uniform(0.07, 0.16)
    row = np.floor(y / step)
    a, b = (x + 0.5 * step * (row % 2)) % step - step / 2, y % step - step / 2
    return (np.hypot(a, b) < step * random.uniform(0.2, 0.36)).astype(np.float32)


def _camouflage(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    seed, wide = int(random.integers(1 << 30)), x.shape[1]
    first, second = noise(x.shape, seed, wide / 16), noise(x.shape, seed + 1, wide / 20)
    return 0.45 * (first > 0.1) + 0.55 * (second > 0.5)


def _flowers(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    plane = np.zeros_like(x)
    petals = random.integers(4, 7)
    for _ in range(random.integers(14, 34)):
        cx, cy, size, turn = random.uniform(0, 1.6), random.random(), random.uniform(0.03, 0.09), random.random() * 6
        part = _around(x, y, cx, cy, size)
        a, b = x[part] - cx, y[part] - cy
        r, angle = np.hypot(a, b), np.arctan2(b, a)
        flower = (r < size * (0.6 + 0.4 * np.cos(petals * angle + turn))) & (r > 0.22 * size)
        plane[part] = np.maximum(plane[part], flower * random.uniform(0.6, 1.0))
    return plane


def _stars(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    plane = np.zeros_like(x)
    for _ in range(random.integers(10, 26)):
        cx, cy, size, turn = random.uniform(0, 1.6), random.random(), random.uniform(0.03, 0.07), random.random() * 6
        part = _around(x, y, cx, cy, size)
        a, b = x[part] - cx, y[part] - cy
        r, angle = np.hypot(a, b), np.arctan2(b, a) + turn
        fifth = np.abs((angle % (2 * math.pi / 5)) - math.pi / 5)
        plane[part] = np.maximum(plane[part], r < size * (0.42 + 0.58 * (fifth / (math.pi / 5)) ** 1.5))
    return plane


def _around(x: FloatArray, y: FloatArray, at_x: float, at_y: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns of the places up to `reach` away: drawing there alone takes a tenth of the time."""
    left, right = np.searchsorted(x[0], (at_x - reach, at_x + reach)).tolist()
    top, bottom = np.searchsorted(y[:, 0], (at_y - reach, at_y + reach)).tolist()
    return slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)


def _paisley(x: FloatArray, y: FloatArray, random: np.random.Generator) -> FloatArray:
    plane = np.zeros_like(x)
    for _ in range(random.integers(16, 26)):
        cx, cy, size, turn = random.uniform(0, 1.6), random.random(), random.uniform(0.05, 0.13), random.random() * 6
        # Along it reaches 1.55 sizes, and across 2, from an axis that is bent by 1.45.
        part = _around(x, y, cx, cy, 3.8 * size)
        along, down = x[part] - cx, y[part] - cy
        a = along * math.cos(turn) + down * math.sin(turn)
        b = -along * math.sin(turn) + down * math.cos(turn) + 2.0 * a * a / size * 0.3
        drop = np.hypot(a / (1.0 + 0.55 * np.sign(a)), b * (1.4 - 0.9 * (a / size).clip(-1, 1)))
        plane[part] = np.maximum(plane[part], ((drop < size) & (drop > 0.78 * size)) | (drop < 0.38 * size))
    border = np.minimum(np.minimum(x, 1.6 - x), np.minimum(y, 1 - y))
    return np.maximum(plane * (border > 0.07), (np.abs(border - 0.045) < 0.012).astype(np.float32))


PATTERNS: dict[str, Callable[[FloatArray, FloatArray, np.random.Generator], FloatArray]] = {
    "stripes": _stripes,
    "checks": _checks,
    "plaid": _plaid,
    "dots": _dots,
    "camouflage": _camouflage,
    "flowers": _flowers,
    "stars": _stars,
    "paisley": _paisley,
}
"""By name; `Look.pattern` above 0 is a number in this order, modulo their number."""


def noise(shape: tuple[int, ...], seed: int, sigma: float) -> FloatArray:
    """Smooth noise of variance 1; sigma in oversampled pixels."""
    step = max(1, int(sigma / 3))
    small = np.random.default_rng(seed).standard_normal((shape[0] // step + 2, shape[1] // step + 2), np.float32)
    smooth = cv2.GaussianBlur(small, (0, 0), max(sigma / step, 0.4))
    smooth = cv2.resize(smooth, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return (smooth - smooth.mean()) / (smooth.std() + 1e-6)
