"""How each kind of mask lies on the generic face: its outline, how it is tented over nose and chin, its loops.

In: a `Look`. Out: the mask as a grid of points around the face (`Worn`), in the millimetres of
`visard.functional.face_surface`, with normals, and the lines of its loops.

A mask is a rectangle, u from the picture's left edge (-1) to the right one (1), v from the upper edge (0) to the lower
one (1), laid around the face's axis: u is an angle, v a height between two curves. It does not follow the skin: cloth
spans hollows, so it lies on the face's convex hull (meridians first, then horizontal sections), pulled to the skin
where the edge is held. Shells and cups stand out further.

V, U rows and columns of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.functional.face_surface import ANGLE_DEG, AXIS_Z, HEIGHT_MM, MODES, radius, reshape
from visard.masks.records import Kind, Look, Wearing

__all__ = ["COLUMNS", "ROWS", "Worn", "put_on"]

Array = NDArray[np.float64]
FloatArray = NDArray[np.float32]

ROWS, COLUMNS = 13, 25
LOOP_POINTS = 7

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Outline:
    """A kind's cut.

    Args:
        top: (|u|, height in mm) of the upper edge.
        bottom: the same of the lower edge.
        side: (v, angle in degrees) of the side edges.
        held: how tight the upper edge follows the skin, 0 (tented) to 1.
        dome: how far it stands out over the hull, mm; its half width in degrees; its middle height and half height, mm.
        ear: the ends of its loops: (v on the edge, angle and height of the end).
    """

    top: Curve
    bottom: Curve
    side: Curve
    held: float
    dome: tuple[float, float, float, float] | None
    ear: tuple[tuple[float, float, float], ...]


# To the front of the ears' roots; straps go around the head above and below the ears.
_EARS = ((0.06, 104.0, -4.0), (0.94, 103.0, 36.0))
_STRAPS = ((0.28, 112.0, -38.0), (0.70, 112.0, 62.0))
OUTLINES: dict[Kind, Outline] = {
    "surgical": Outline(
        top=((0, 13), (0.10, 15), (0.22, 22), (0.4, 25.5), (0.7, 28), (1, 33)),
        bottom=((0, 122), (0.25, 119), (0.5, 111), (0.75, 100), (1, 88)),
        side=((0, 67), (0.5, 65), (1, 66)),
        held=0.7, dome=None, ear=_EARS,
    ),
    "cloth": Outline(
        top=((0, 10), (0.10, 12), (0.24, 22), (0.45, 28), (0.7, 32), (1, 40)),
        bottom=((0, 122), (0.25, 119), (0.5, 109), (0.75, 96), (1, 83)),
        side=((0, 66), (0.5, 65), (1, 65)),
        held=0.8, dome=(3, 22, 58, 34), ear=((0.08, 104.0, -2.0), (0.92, 103.0, 36.0)),
    ),
    "kn95": Outline(
        top=((0, 8), (0.12, 11), (0.3, 22), (0.5, 29), (0.75, 36), (1, 45)),
        bottom=((0, 123), (0.25, 118), (0.5, 107), (0.75, 92), (1, 78)),
        side=((0, 67), (0.5, 69), (1, 67)),
        held=0.6, dome=(9, 20, 58, 36), ear=((0.1, 104.0, -2.0), (0.9, 103.0, 36.0)),
    ),
    "n95": Outline(
        top=((0, 6), (0.12, 9), (0.3, 19), (0.5, 27), (0.75, 38), (1, 52)),
        bottom=((0, 121), (0.25, 117), (0.5, 107), (0.75, 94), (1, 78)),
        side=((0, 52), (0.5, 58), (1, 54)),
        held=0.6, dome=(10, 38, 60, 40), ear=_STRAPS,
    ),
    "bandana": Outline(
        top=((0, 14), (0.08, 16), (0.18, 23), (0.35, 26), (0.65, 24), (1, 18)),
        bottom=((0, 168), (0.15, 156), (0.4, 126), (0.7, 96), (1, 70)),
        side=((0, 104), (1, 98)),
        held=0.5, dome=(3, 40, 80, 40), ear=(),
    ),
    "respirator": Outline(
        top=((0, 4), (0.14, 8), (0.3, 17), (0.5, 26), (0.75, 40), (1, 54)),
        bottom=((0, 120), (0.3, 117), (0.55, 108), (0.8, 94), (1, 80)),
        side=((0, 46), (0.5, 54), (1, 48)),
        held=0.7, dome=(15, 34, 62, 40), ear=_STRAPS,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Worn:
    """A mask on the generic face.

    Args:
        points: (3, P) float32 mm, x, y, z: the grid's V * U, then those of the loops, from the mask's edge to behind
            the ears (the first half of the loops is on the picture's left), then, where the nose hangs over the mask,
            its lower rim.
        modes: (M, 3 P) float32 mm: how one standard deviation of each of the face's modes moves the points, flat;
            taken where the points of the usual size lie.
        normals: (V, U, 3) float32 unit vectors, outwards.
        loops: how many there are, of `LOOP_POINTS` points.
    """

    points: FloatArray
    modes: FloatArray
    normals: FloatArray
    loops: int


# Lower rim of the nose: wings, nostrils' sills, tip.
_NOSE_RIM = np.array(
    [[-17.5, 41.0, 13.0], [-14.0, 47.5, 17.0], [0.0, 48.0, 30.0], [14.0, 47.5, 17.0], [17.5, 41.0, 13.0]]
)


def put_on(look: Look) -> Worn:
    """The mask where `look` says, on the mean face."""
    cut = _cut(look.kind, look.wearing)
    points, normals = _points(cut, look.size, look.drop, look.tilt, look.slack)
    return Worn(points, cut.modes, normals, cut.loops)


def _points(cut: _Cut, size: float, drop: float, tilt: float, slack: float) -> tuple[FloatArray, FloatArray]:
    """`Worn.points` and `Worn.normals`."""
    points = cut.blank_3P.copy()
    x, y, z = points[:, : ROWS * COLUMNS].reshape(3, ROWS, COLUMNS)
    np.multiply(cut.length_VU, np.float32(size), out=y)
    y += cut.top_U + np.float32(100.0 * drop)
    if tilt:
        y += np.float32(tilt * 60.0) * cut.sine_VU
    # Twice as large is not twice as wide: more of it stands off.
    angle = cut.angle_VU * np.float32(0.4 + 0.6 * size)
    row = (y - np.float32(HEIGHT_MM[0])) * np.float32(1 / HEIGHT_MM[2])
    column = (angle - _FIRST_ANGLE) * _PER_ANGLE
    found = cv2.remap(cut.map_RQ4, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    reach = cv2.remap(_skin(), column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    cv2.polarToCart(cv2.scaleAdd(cv2.extractChannel(found, 3), slack, reach), angle, x=z, y=x)
    z += np.float32(AXIS_Z)
    if cut.loops:
        # They begin at the mask's edge as it is, and end where they always do.
        lines = points[:, ROWS * COLUMNS : ROWS * COLUMNS + cut.loops * LOOP_POINTS].reshape(3, cut.loops, LOOP_POINTS)
        lines += points[:, cut.loop_start, None] * _FADE
    return points, found[..., :3]


_FADE = np.linspace(1, 0, LOOP_POINTS, dtype=np.float32)
_FIRST_ANGLE = np.float32(np.radians(ANGLE_DEG[0]))
_PER_ANGLE = np.float32(180 / np.pi / ANGLE_DEG[2])


@dataclass(frozen=True)
class _Cut:
    """A kind and a way of wearing it, ready: the upper edge and the lengths from it down (mm), angles (radians) and
    their sines, the map of normals and tent (x, y, z, mm over the skin), how many loops there are, the grid places
    they begin at, `Worn.points` before they are known (0 but for the nose's rim, where it hangs over the mask, and for
    the loops, less what their beginnings give them), and `Worn.modes`."""

    top_U: FloatArray
    length_VU: FloatArray
    angle_VU: FloatArray
    sine_VU: FloatArray
    map_RQ4: FloatArray
    loops: int
    loop_start: NDArray[np.intp]
    blank_3P: FloatArray
    modes: FloatArray


@lru_cache(maxsize=1)
def _skin() -> FloatArray:
    return radius().astype(np.float32)


@cache
def _cut(kind: Kind, wearing: Wearing) -> _Cut:
    outline = OUTLINES[kind]
    u, v = np.linspace(-1, 1, COLUMNS), np.linspace(0, 1, ROWS)
    top, bottom = _curve(outline.top, np.abs(u)), _curve(outline.bottom, np.abs(u))
    if wearing == "under-nose":
        # Slid down: the edge hangs below the nose, what is too long bunches under the chin.
        top = _curve(((0, 49), (0.2, 48.5), (0.45, 46), (1, 42)), np.abs(u))
        bottom = bottom + 6.0
    elif wearing == "chin":
        top = _curve(((0, 88), (0.25, 86), (0.5, 78), (0.75, 68), (1, 58)), np.abs(u))
        bottom = bottom + _curve(((0, 14), (0.5, 10), (1, 4)), np.abs(u))
    angle_VU = np.radians(_curve(outline.side, v))[:, None] * u
    length_VU = (bottom - top) * v[:, None]
    starts, lines = [], []
    for edge, sign in ((0, -1.0), (COLUMNS - 1, 1.0)):
        for at, end, height in outline.ear:
            row = round(at * (ROWS - 1))
            starts.append(row * COLUMNS + edge)
            start = float(top[edge] + length_VU[row, edge])
            lines.append(_line(float(angle_VU[row, edge]), start, sign * float(np.radians(end)), height))
    loops = np.array(lines).reshape(-1, LOOP_POINTS, 3)
    rim = _NOSE_RIM if wearing == "under-nose" else np.empty((0, 3))
    fading = (loops - loops[:, :1] * _FADE[:, None]).reshape(-1, 3)
    cut = _Cut(
        top_U=top.astype(np.float32),
        length_VU=length_VU.astype(np.float32),
        angle_VU=angle_VU.astype(np.float32),
        sine_VU=np.sin(angle_VU).astype(np.float32),
        map_RQ4=_tent(kind, wearing),
        loops=len(loops),
        loop_start=np.array(starts, np.intp),
        blank_3P=np.concatenate([np.zeros((ROWS * COLUMNS, 3)), fading, rim]).astype(np.float32).T.copy(),
        modes=np.empty((0, 0), np.float32),
    )
    usual = _points(cut, 1.0, 0.0, 0.0, 1.0)[0].T.astype(np.float64)
    modes = np.stack([(reshape(usual, one) - usual).T.ravel() for one in np.eye(len(MODES))])
    return replace(cut, modes=modes.astype(np.float32))


def _tent(kind: Kind, wearing: Wearing) -> FloatArray:
    """(R, Q, 4): normals of the mask's side that is seen, and how far it is from the skin, mm."""
    outline = OUTLINES[kind]
    skin = radius()
    heights = np.arange(HEIGHT_MM[0], HEIGHT_MM[1] + 0.1, HEIGHT_MM[2])
    angles = np.arange(ANGLE_DEG[0], ANGLE_DEG[1] + 0.1, ANGLE_DEG[2])
    first = {"right": 12.0, "under-nose": 47.0, "chin": 84.0}[wearing]
    last = 120.0 if kind != "bandana" else 150.0
    inside = (heights >= first) & (heights <= last)
    hull = skin.copy()
    for column in range(len(angles)):
        hull[inside, column] = _envelope(heights[inside], skin[inside, column])
    around = np.radians(angles)
    front = np.abs(angles) <= 105
    for row in np.flatnonzero(inside):
        hull[row, front] = _section_hull(hull[row, front], around[front])
    # At the upper edge a wire or the tension holds it to the nose and the cheeks.
    held = outline.held * np.clip(1 - (heights - first) / 14.0, 0, 1)
    if wearing != "right":
        held = held * 0.8
    hull = skin + (hull - skin) * (1 - held)[:, None]
    if outline.dome is not None and wearing != "chin":
        out, wide, middle, half = outline.dome
        bump = np.exp(-((angles[None] / wide) ** 2) - ((heights[:, None] - middle) / half) ** 4)
        hull = hull + out * bump
    # Cloth has no edges sharper than this.
    hull = cv2.GaussianBlur(hull, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
    # Cloth, and room: most of it where the nose holds it off.
    hull = np.maximum(hull, skin) + 2.0
    if wearing == "right":
        hull = hull + 4.5 * np.exp(-((angles[None] / 12.0) ** 2) - ((heights[:, None] - 38.0) / 16.0) ** 2)
    x, z = hull * np.sin(around), hull * np.cos(around)
    points = np.stack([x, np.broadcast_to(heights[:, None], x.shape), z], -1)
    down, across = np.gradient(points, axis=0), np.gradient(points, axis=1)
    normals = np.cross(across, down)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.concatenate([normals, (hull - skin)[..., None]], -1).astype(np.float32)


def _envelope(x: Array, y: Array) -> Array:
    """The smallest concave function over the points (x increasing), at x."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    result: Array = np.interp(x, x[kept], y[kept])
    return result


def _section_hull(reach: Array, around: Array) -> Array:
    """Distances from the axis to the convex hull of a horizontal section, at the same angles."""
    x, z = reach * np.sin(around), reach * np.cos(around)
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            # From left to right over the front: a turn to the back (clockwise seen from above) is convex.
            if (x[b] - x[a]) * (z[i] - z[a]) - (z[b] - z[a]) * (x[i] - x[a]) < 0:
                break
            kept.pop()
        kept.append(i)
    # Between two kept points the hull is a straight line: 1 / r is linear in cosine and sine of the angle.
    result = reach.copy()
    for a, b in pairwise(kept):
        inner = slice(a + 1, b)
        dx, dz = x[b] - x[a], z[b] - z[a]
        result[inner] = (x[a] * dz - z[a] * dx) / (np.sin(around[inner]) * dz - np.cos(around[inner]) * dx)
    return result


def _line(angle: float, height: float, end_angle: float, end_height: float) -> Array:
    """(L, 3): along the skin from the mask's edge to the ear."""
    along = np.linspace(0, 1, LOOP_POINTS)
    around, heights = angle + (end_angle - angle) * along, height + (end_height - height) * along
    row = ((heights - HEIGHT_MM[0]) / HEIGHT_MM[2]).astype(np.float32)[None]
    column = ((np.degrees(around) - ANGLE_DEG[0]) / ANGLE_DEG[2]).astype(np.float32)[None]
    reach = cv2.remap(_skin(), column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0] + 2.0
    return np.stack([reach * np.sin(around), heights, reach * np.cos(around) + AXIS_Z], -1)


def _curve(curve: Curve, at: Array) -> Array:
    """The table between its points, without corners: a cubic in each piece whose slopes do not overshoot (Fritsch and
    Carlson 1980, with the harmonic mean)."""
    x, y = np.array(curve, np.float64).T
    if len(x) == 2:
        straight: Array = np.interp(at, x, y)
        return straight
    step, rise = np.diff(x), np.diff(y) / np.diff(x)
    slope = np.zeros_like(y)
    same = rise[:-1] * rise[1:] > 0
    slope[1:-1][same] = 2 * rise[:-1][same] * rise[1:][same] / (rise[:-1] + rise[1:])[same]
    slope[-1] = rise[-1]
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(step) - 1)
    t, h = (at - x[k]) / step[k], step[k]
    result: Array = (
        y[k] * (1 + 2 * t) * (1 - t) ** 2
        + h * slope[k] * t * (1 - t) ** 2
        + y[k + 1] * t * t * (3 - 2 * t)
        + h * slope[k + 1] * t * t * (t - 1)
    )
    return result
