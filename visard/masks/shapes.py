"""The shapes of masks, drawn here row by row, and their views: frontal, turned to a side, tilted.

In: kind, wearing, a head's turn. Out: a `View`: what a mask of that kind looks like there, as maps from pixels to the
texture, coverage and shading. Views are drawn when first asked for and kept: some 10 ms and 80 kB each at 112 px.

Coordinates are those of `functional.geometry.POSE_MODEL`: x right, y down, z towards the viewer, the unit is half the
distance between the eyes (32 mm on an average adult), eyes at (+-1, -1, 0), mouth corners at (+-0.83, 1.22, 0.17).
The rows are our own, from a ruler and published head measures (face width 4.3 units, nose tip to chin 2.5).

A mask is a sheet of rows from its upper edge (v = 0) to its lower one (v = 1); a row runs from the left side (u = 0)
over the middle of the face to the right side (u = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from visard.functional import surface
from visard.functional.geometry import POSE_MODEL
from visard.masks.records import Kind, Wearing
from visard.masks.texture import corners
from visard.records import Float32Array

__all__ = ["PITCHES_DEG", "TEXTURE", "YAWS_DEG", "View", "sheet", "view_of"]

YAWS_DEG = (0.0, 7.0, 14.0, 21.0, 28.0, 35.0, 42.0, 49.0, 56.0, 63.0)
"""Views turned to the picture's right; the others are their mirror images."""

PITCHES_DEG = (-18.0, 0.0, 18.0)

TEXTURE = (96, 128)
"""Height and width of the texture that a view of scale 1 maps to, pixels."""

UNIT_PX = 18.0
"""Pixels a unit in a view of scale 1; an aligned 112 px crop has 17.6 across and 18.3 down."""

SUPERSAMPLED = 3
ROWS, COLUMNS = 29, 41

BORDER_PX = 3
"""Pixels of a view around what is covered; values are continued there, so that nothing is mixed with nothing."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class View:
    """A mask seen from one side; P rows and Q columns of pixels.

    Args:
        maps: (P, Q, 4) float32: x and y of the texture's pixel that is seen, coverage 0..255, and brightness under
            light from above, 128 = 1. In one array, because one warp of four channels costs less than two.
        solve: (3, 5) float64: times the crop's five points it is the transposed affine map from view to crop.
        middle: (2,) float64, where the mask's middle is, pixels.
        height: of the mask, pixels.
        skin: (5, 2) float64 pixels: two places on the left cheek, two on the right one, the bridge of the nose.
        threads: what holds the mask, where it is seen: points (n, 2) float64 pixels of one line after the other.
        thread_ends: where in `threads` each line ends.
        thread_width: of all of them, pixels.
        jaw: y of the mouth, x of the jaw's left and right side there, y of the chin, x of the middle; pixels.
    """

    maps: Float32Array
    solve: Float64Array
    middle: Float64Array
    height: float
    skin: Float64Array
    threads: Float64Array
    thread_ends: tuple[int, ...]
    thread_width: float
    jaw: tuple[float, float, float, float, float]


@lru_cache(maxsize=1200)
def view_of(kind: Kind, wearing: Wearing, yaw: int, pitch: int, scale: int, rounded: bool = True) -> View:
    """One view.

    Args:
        rounded: whether what lies beyond the texture's rounded corners covers nothing.
        yaw, pitch: index into `YAWS_DEG` and `PITCHES_DEG`.
        scale: 1 for crops up to 112 px, 2 up to 224, ...
    """
    unit, many = UNIT_PX * scale, SUPERSAMPLED
    flip = np.array([1.0, -1.0, 1.0])  # there y points up
    angles = torch.tensor([[math.radians(YAWS_DEG[yaw]), math.radians(PITCHES_DEG[pitch]), 0.0]])
    turn = flip[:, None] * surface.rotation(angles)[0].double().numpy() * flip
    points = sheet(kind, wearing)
    seen = np.einsum("ij,rqj->irq", turn, points) * unit
    corner = np.floor(seen[:2].min(axis=(1, 2))) - BORDER_PX
    columns, rows = (np.ceil(seen[:2].max(axis=(1, 2))) + BORDER_PX - corner).astype(int).tolist()
    screen = seen[:2] - corner[:, None, None]  # of a pixel's corner, not its centre

    fine = torch.from_numpy(screen * many - 0.5).float().reshape(1, 2, -1)
    depth = torch.from_numpy(40.0 * unit - seen[2]).float().reshape(1, -1)
    cells = surface.grid_cells(ROWS, COLUMNS)
    raster = surface.rasterise(fine, depth, cells, rows * many, columns * many)
    v, u = np.meshgrid(np.linspace(0, 1, ROWS), np.linspace(0, 1, COLUMNS), indexing="ij")
    normal = surface.grid_normals(torch.from_numpy(seen * flip[:, None, None])[None])[0].numpy()
    bright = 128 * (0.66 + 0.30 * normal[2] + 0.24 * normal[1])
    values = np.stack([u * TEXTURE[1] * scale - 0.5, v * TEXTURE[0] * scale - 0.5, 255 + 0 * u, bright], -1)
    planes = surface.corner_planes(surface.cell_triangles(cells), torch.from_numpy(values.reshape(-1, 4)).float())
    drawn = surface.interpolate(raster, planes, torch.zeros(4, rows * many, columns * many))[0].numpy()
    maps = _continued(cv2.resize(drawn, (columns, rows), interpolation=cv2.INTER_AREA), 3 * scale)
    alpha = corners(kind, TEXTURE[0] * scale, TEXTURE[1] * scale) if rounded else None
    if alpha is not None:
        places = np.ascontiguousarray(maps[..., :2])
        maps[..., 2] *= cv2.remap(
            alpha.astype(np.float32) / 255, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def flat(places: Float64Array) -> Float64Array:
        return np.asarray((places @ turn.T)[:, :2] * unit - corner - 0.5)

    five, jaw = flat(POSE_MODEL), flat(_JAW)
    lines = _threads(kind, points, turn)
    return View(
        maps=maps,
        solve=np.linalg.pinv(np.column_stack([five, np.ones(5)])),
        middle=screen[:, ROWS // 2, COLUMNS // 2] - 0.5,
        height=float(np.hypot(*(screen[:, -1, COLUMNS // 2] - screen[:, 0, COLUMNS // 2]))),
        skin=flat(_SKIN),
        threads=flat(np.concatenate(lines)) if lines else np.empty((0, 2)),
        thread_ends=tuple(np.cumsum([len(line) for line in lines]).tolist()),
        thread_width=_THREAD_WIDTH[kind] * unit,
        jaw=(float(jaw[0, 1]), float(jaw[0, 0]), float(jaw[1, 0]), float(jaw[2, 1]), float(jaw[2, 0])),
    )


def sheet(kind: Kind, wearing: Wearing) -> Float64Array:
    """The mask's points.

    Returns:
        (ROWS, COLUMNS, 3) x, y, z.
    """
    v = np.linspace(0, 1, ROWS)
    rows = np.array(_SHAPES[kind])
    middle_y, middle_z, nose, side_x, side_y, side_z = (_smooth(rows[:, 0], rows[:, k], v) for k in range(1, 7))
    roundness, wedge = _SECTIONS[kind]
    if kind in STIFF and wearing != "right":
        # A shell keeps its form.
        down = 0.95 if wearing == "under-nose" else 1.9
        middle_y, side_y = middle_y + down, side_y + down
    elif wearing == "under-nose":
        # Pulled down: the upper edge lies on the lip, the slack gathers below.
        middle_y = middle_y + 1.06 * (1 - v) ** 1.3 + 0.10
        middle_z = np.minimum(middle_z, 0.62 + 0.15 * np.sin(math.pi * v))
        nose, side_y = nose * 0, side_y + 0.50 * (1 - v) + 0.12
    elif wearing == "chin":
        middle_y, middle_z = 1.72 + 1.30 * v, 0.52 + 0.16 * np.sin(math.pi * v) - 0.34 * v * v
        nose, side_y = nose * 0, 0.80 + 0.75 * v
        side_x, side_z = np.minimum(side_x, 1.80), np.minimum(side_z, -0.95)
    t = np.abs(np.linspace(-1, 1, COLUMNS))
    turn = t * roundness
    arc = (1 - wedge) * (1 - np.cos(turn)) / (1 - math.cos(roundness)) + wedge * t
    x = side_x[:, None] * np.sin(turn) / math.sin(roundness) * np.sign(np.linspace(-1, 1, COLUMNS))
    y = middle_y[:, None] + (side_y - middle_y)[:, None] * t**1.4
    z = middle_z[:, None] + (side_z - middle_z)[:, None] * arc + nose[:, None] * np.exp(-((x / 0.42) ** 2))
    return np.stack([x, y, z], -1)


# v, y and z of the row's middle without the nose, how far the nose lifts it, x (of the right), y and z of its side.
_SHAPES: dict[Kind, tuple[tuple[float, ...], ...]] = {
    "surgical": (
        (0.00, -0.50, 0.26, 0.34, 1.90, -0.26, -1.05),
        (0.15, -0.20, 0.44, 0.35, 1.94, -0.03, -1.08),
        (0.30, 0.10, 0.72, 0.22, 1.95, 0.20, -1.10),
        (0.50, 0.75, 0.86, 0.05, 1.91, 0.50, -1.10),
        (0.70, 1.45, 0.84, 0.00, 1.86, 0.78, -1.10),
        (0.85, 2.05, 0.68, 0.00, 1.79, 1.02, -1.08),
        (1.00, 2.62, 0.24, 0.00, 1.70, 1.26, -1.05),
    ),
    "cloth": (
        (0.00, -0.52, 0.30, 0.32, 1.86, -0.16, -1.00),
        (0.15, -0.22, 0.56, 0.28, 1.92, 0.02, -1.06),
        (0.30, 0.10, 0.82, 0.14, 1.94, 0.20, -1.10),
        (0.50, 0.75, 0.94, 0.00, 1.92, 0.50, -1.10),
        (0.70, 1.42, 0.86, 0.00, 1.87, 0.80, -1.10),
        (0.85, 2.00, 0.64, 0.00, 1.78, 1.05, -1.05),
        (1.00, 2.58, 0.22, 0.00, 1.64, 1.28, -1.00),
    ),
    "kn95": (
        (0.00, -0.56, 0.40, 0.20, 1.74, -0.10, -0.80),
        (0.15, -0.26, 0.82, 0.06, 1.83, 0.06, -0.92),
        (0.30, 0.10, 1.12, 0.00, 1.88, 0.22, -1.00),
        (0.50, 0.75, 1.28, 0.00, 1.90, 0.50, -1.04),
        (0.70, 1.40, 1.12, 0.00, 1.86, 0.78, -1.02),
        (0.85, 2.00, 0.78, 0.00, 1.76, 1.04, -0.95),
        (1.00, 2.55, 0.26, 0.00, 1.58, 1.28, -0.88),
    ),
    "n95": (
        (0.00, -0.62, 0.34, 0.24, 0.62, -0.34, 0.14),
        (0.08, -0.42, 0.66, 0.16, 1.02, -0.08, -0.08),
        (0.22, -0.10, 1.02, 0.04, 1.34, 0.26, -0.30),
        (0.50, 0.80, 1.34, 0.00, 1.52, 0.86, -0.46),
        (0.78, 1.72, 1.02, 0.00, 1.32, 1.62, -0.40),
        (0.92, 2.18, 0.62, 0.00, 0.98, 2.06, -0.18),
        (1.00, 2.42, 0.30, 0.00, 0.58, 2.34, 0.04),
    ),
    "bandana": (
        (0.00, -0.44, 0.28, 0.33, 2.08, -0.42, -1.72),
        (0.15, -0.04, 0.50, 0.34, 2.10, -0.06, -1.74),
        (0.30, 0.34, 0.76, 0.16, 2.06, 0.34, -1.72),
        (0.50, 1.05, 0.86, 0.00, 1.94, 0.95, -1.60),
        (0.70, 1.90, 0.84, 0.00, 1.80, 1.65, -1.40),
        (0.85, 2.70, 0.78, 0.00, 1.66, 2.45, -1.05),
        (1.00, 3.55, 0.74, 0.00, 1.20, 3.20, -0.50),
    ),
    "respirator": (
        (0.00, -0.60, 0.36, 0.26, 0.46, -0.30, 0.20),
        (0.14, -0.26, 0.80, 0.14, 0.92, 0.12, 0.00),
        (0.32, 0.25, 1.12, 0.02, 1.42, 0.56, -0.20),
        (0.50, 0.80, 1.24, 0.00, 1.60, 0.92, -0.28),
        (0.72, 1.50, 1.12, 0.00, 1.48, 1.48, -0.26),
        (0.88, 2.02, 0.76, 0.00, 1.08, 2.00, -0.12),
        (1.00, 2.36, 0.32, 0.00, 0.66, 2.30, 0.04),
    ),
}

STIFF: frozenset[Kind] = frozenset({"n95", "respirator"})
"""Kinds with a shell of their own."""

_SECTIONS: dict[Kind, tuple[float, float]] = {
    "surgical": (1.35, 0.0),
    "cloth": (1.25, 0.25),
    "kn95": (1.10, 0.55),
    "n95": (1.45, 0.0),
    "bandana": (1.40, 0.0),
    "respirator": (1.30, 0.15),
}
"""How round a row is, radians to either side, and what part of it is a straight wedge."""

_SKIN = np.array([[-0.95, -0.2, 0.1], [-0.95, 0.5, 0.1], [0.95, -0.2, 0.1], [0.95, 0.5, 0.1], [0.0, -0.6, 0.5]])

_JAW = np.array([[-1.72, 1.22, -1.0], [1.72, 1.22, -1.0], [0.0, 2.5, 0.2]])
"""The head's outline at the height of the mouth, and its chin."""

_EAR = {"upper": (2.14, -0.72, -2.35), "lower": (2.06, 0.22, -2.30)}
_STRAP = {"upper": (2.10, -1.10, -2.30), "lower": (1.90, 1.00, -2.30)}
_THREADS: dict[Kind, tuple[tuple[float, tuple[float, float, float]], ...]] = {
    "surgical": ((0.03, _EAR["upper"]), (0.97, _EAR["lower"])),
    "cloth": ((0.04, _EAR["upper"]), (0.96, _EAR["lower"])),
    "kn95": ((0.06, _EAR["upper"]), (0.94, _EAR["lower"])),
    "n95": ((0.24, _STRAP["upper"]), (0.66, _STRAP["lower"])),
    "respirator": ((0.34, _STRAP["upper"]), (0.66, _STRAP["lower"])),
    "bandana": (),
}
"""Ear loops and straps of a kind: where on the side they begin (v), and where they end on the right."""

_THREAD_WIDTH: dict[Kind, float] = {
    "surgical": 0.060, "cloth": 0.075, "kn95": 0.075, "n95": 0.085, "respirator": 0.120, "bandana": 0.0
}  # fmt: skip


def _threads(kind: Kind, points: Float64Array, turn: Float64Array) -> list[Float64Array]:
    """Lines (n, 3), units, where the side of the head that they lie on is seen."""
    lines = []
    for v, end in _THREADS[kind]:
        for side in (-1, 1):
            start = points[round(v * (ROWS - 1)), 0 if side < 0 else -1]
            t = np.linspace(0, 1, 9)[:, None]
            line = start + (np.array(end) * (side, 1, 1) - start) * t
            line[:, 0] += side * 0.12 * np.sin(math.pi * t[:, 0])  # over the cheek, not through it
            # A cheek's normal turns from oblique to sideways on the way to the ear.
            facing = np.radians(50 + 32 * t[:, 0])
            normals = np.stack([side * np.sin(facing), 0 * facing, np.cos(facing)], -1)
            shown = line[(normals @ turn[2]) > 0.04]
            if len(shown) >= 2:
                lines.append(shown)
    return lines


def _continued(mean: Float32Array, reach: int) -> Float32Array:
    """Values of what is covered from means over whole pixels (the third channel is coverage), and near ones elsewhere.

    Args:
        mean: (P, Q, 4), 0 where nothing is covered.
        reach: pixels that values are continued by at a time.
    """
    coverage = mean[..., 2].copy()
    weight = coverage / 255
    known = mean[..., [0, 1, 3]]
    for step in (0, reach, 3 * reach, 9 * reach):
        size = (2 * step + 1, 2 * step + 1)
        amount = cv2.blur(weight, size) if step else weight
        near = (cv2.blur(known, size) if step else known) / np.maximum(amount, 1e-6)[..., None]
        new = (weight < 0.999) & (amount > 1e-3) if step == 0 else (weight == 0) & (amount > 1e-4)
        known = np.where(new[..., None], near, known)
        weight = np.where(new, 1.0, np.where(weight < 1e-3, 0.0, weight)).astype(np.float32)
    return np.dstack([known[..., :2], coverage, known[..., 2]]).astype(np.float32)


def _smooth(places: Float64Array, values: Float64Array, at: Float64Array) -> Float64Array:
    """A curve through the values (cubic Hermite, slopes of the neighbours' chords)."""
    slopes = np.gradient(values, places)
    k = np.searchsorted(places, at, side="right").clip(1, len(places) - 1) - 1
    step = places[k + 1] - places[k]
    t = (at - places[k]) / step
    first = (1 + 2 * t) * (1 - t) ** 2 * values[k] + t * (1 - t) ** 2 * step * slopes[k]
    return first + t * t * (3 - 2 * t) * values[k + 1] + t * t * (t - 1) * step * slopes[k + 1]
