"""A generic face, from tables of proportions, and its fit to the points that there are of a real one.

In: 2D points of a face. Out: where the face stands (`Fit`), and the surface itself as a map over angle and height.

The surface is of no person and from no scan. Its heights, widths and depths are means of adult anthropometry (Farkas,
"Anthropometry of the Head and Face", 1994: mean of both sexes of the North American group, rounded), and between them
it is smooth:

    pupils apart 61 mm (mean of inner 32.5 and outer 89.5 canthi)      nasion to chin (n-gn) 118 mm
    width of the cheekbones (zy-zy) 134 mm                             nasion to nose base (n-sn) 53 mm
    width of the jaw (go-go) 100 mm                                    nose base to lips' line (sn-sto) 21 mm
    nose: protrusion (sn-prn) 19 mm, width (al-al) 33 mm               mouth's width (ch-ch) 52 mm
    nose base to ear (sn-t) 126 mm, chin to ear (gn-t) 139 mm

It is not the renderer's head (`visard/data/faces3d`), whose people it is measured on: it shares no vertex, table or
mode with it.

Axes: millimetres; x right in the picture, y down, z to the viewer; origin between the pupils, on the corneas.
Shapes: K points, A anchors, M modes, R x Q rows and columns of the map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ANGLE_DEG", "AXIS_Z", "HEIGHT_MM", "KNOWN", "MODES", "Fit", "anchors", "fit", "place", "radius", "reshape"]

Array = NDArray[np.float64]
Row = tuple[float, float, float]

AXIS_Z = -60.0
"""The map's axis is vertical through (0, AXIS_Z): between the ears."""
ANGLE_DEG = (-120.0, 120.0, 2.5)
HEIGHT_MM = (-60.0, 190.0, 2.5)
"""First, last, step of the map's columns (angle about the axis, 0 = front, positive = right) and rows."""

KNOWN = (5, 68, 106, 468)
"""Numbers of points that `anchors` understands."""
MODES = ("width", "middle", "lower", "nose", "smile", "depth", "tip")
"""Ways in which faces differ; one standard deviation each:
face 6 % wider · all below the eyes 6 % longer · all below the nose 8 % longer · nose 3.5 mm longer to the front ·
mouth corners 3.5 mm wider, 2 mm higher · mouth and chin 4 mm further in front · tip of the nose 2.5 mm lower."""

CAMERA_MM = 1000.0
"""Taken for the camera's distance: portraits lie between 0.6 and 3 m."""
SMALLEST_PX = 4.0
"""Eyes closer together than this (as the fit has them) are no face to work on."""

# y: half width, z of the widest place, z of the front without nose (lips and chin are in it).
_SECTIONS = (
    (-60, 67, -70, 4), (-40, 69, -69, 8), (-20, 69.5, -67, 9), (-5, 69, -65, 4), (8, 68.5, -64, 3), (20, 68, -63, 6),
    (32, 66.5, -62, 10), (44, 64.5, -61, 14), (52, 62.5, -61, 16.5), (60, 60, -61, 18), (66, 58.5, -61, 18),
    (71, 57, -61, 15.5), (77, 55.5, -61, 16), (86, 52.5, -61, 10.5), (95, 49, -61, 11), (103, 45, -60, 11.5),
    (110, 42, -60, 8.5), (116, 40, -60, 1), (122, 39, -60, -12), (130, 39, -60, -27), (142, 41, -60, -38),
    (160, 43, -60, -42), (190, 46, -60, -44),
)  # fmt: skip
# y: how far the nose stands out, its half width.
_NOSE = (
    (-24, 0, 9), (-12, 4, 8), (-3, 6.5, 7.5), (8, 10.5, 8), (20, 16, 9), (30, 20.5, 11), (37, 22.5, 13), (42, 18.5, 15),
    (47, 10, 15), (52, 2.5, 13), (56, 0, 12),
)  # fmt: skip

# The places that points of any kind are brought to: x, y, z, and the error expected of a point there, mm.
_ANCHORS = (
    (-30.7, 0.0, 0.0, 1.5),  # left eye as the viewer sees it
    (30.7, 0.0, 0.0, 1.5),
    (0.0, 38.0, 34.0, 2.0),  # tip of the nose
    (-26.0, 71.0, 5.0, 2.5),  # corner of the mouth
    (26.0, 71.0, 5.0, 2.5),
    (0.0, -3.0, 10.5, 2.5),  # nasion
    (0.0, 50.0, 17.5, 2.0),  # nose base
    (0.0, 115.0, 3.0, 5.0),  # chin
    (-54.5, 77.0, -46.0, 8.0),  # jaw at the height of the mouth
    (54.5, 77.0, -46.0, 8.0),
)
_FIVE, _INNER = 5, 7
_JAWS = (8, 9)
# A contour found in the picture is the outline, not a place on the jaw; turned further than this they differ.
_CONTOUR_YAW_RAD = math.radians(15)
# Heads in pictures are bowed or raised so much, root mean square; five points alone say little about it.
_PITCH_RAD = math.radians(13)
_STEPS = 3
_SIZE = 6 + len(MODES)
# Yaw, pitch, roll, logarithm of scale, shift, modes: what is known beforehand, in 1 / variance; the largest step.
_PRIOR = np.array([0.0, _PITCH_RAD**-2, 0.0, 0.0, 0.0, 0.0] + [1.0] * len(MODES))
_LIMIT = np.array([0.4, 0.4, 0.4, 0.4, np.inf, np.inf] + [3.0] * len(MODES))
_LEAST = -_LIMIT
_BEGIN = np.zeros(_SIZE)
_STEP_RAD = math.radians(2)
"""Yaw and pitch at which derivatives are taken are this far apart."""


@dataclass(frozen=True)
class Fit:
    """Where a face stands in a picture: pixel = scale * turned xy * CAMERA_MM / (CAMERA_MM - turned z) + shift.

    Args:
        yaw: radians, positive: the face turns to the picture's right.
        pitch: radians, positive: up.
        roll: radians, positive: clockwise in the picture.
        scale: pixels a millimetre.
        shift: (2,) pixels, of the origin.
        shape: (M,) standard deviations of `MODES`.
        error_mm: root mean square of what eyes, nose and mouth are off, at the origin's distance.
    """

    yaw: float
    pitch: float
    roll: float
    scale: float
    shift: Array
    shape: Array
    error_mm: float

    def turn(self, *, roll: bool = True) -> Array:
        """(3, 3) rotation Rz(roll) Ry(yaw) Rx(pitch), to be applied to column vectors."""
        return self._turned if roll else _turn(self.yaw, self.pitch, 0.0)

    @cached_property
    def _turned(self) -> Array:
        return _turn(self.yaw, self.pitch, self.roll)


def anchors(points_K2: ArrayLike) -> Array:
    """The places that the fit uses, of points in one of the known orders: (A, 2) with A = 5 or 10.

    5: left eye, right eye, nose tip, left and right mouth corner. 68: the usual order (300-W). 106: either the order of
    LaPa and JD-landmark (contour 0..32 from ear to ear, pupils 104 and 105) or that of insightface's 2d106det (0 is the
    chin, eyes 33.. and 87.., mouth 52..): which one is told by where the contour's lowest point is. 468: MediaPipe's
    mesh; the 478 with irises are these and ten more, to be cut off.

    Raises:
        ValueError: another number of points.
    """
    p = np.asarray(points_K2, dtype=np.float64)
    count = len(p)
    if count == 5:
        return p
    if count == 68:
        return np.stack([
            p[36:42].mean(0), p[42:48].mean(0), p[30], p[48], p[54], p[27], p[33], p[8], p[4], p[12],
        ])  # fmt: skip
    if count == 106 and p[16, 1] + p[16, 1] - p[0, 1] - p[32, 1] > 0 and p[16, 1] >= p[8, 1]:
        return p[[104, 105, 54, 84, 90, 51, 60, 16, 8, 24]]
    if count == 106:
        return p[[38, 88, 86, 52, 61, 72, 80, 0, 14, 30]]
    if count == 468:
        left, right = p[[33, 133, 159, 145]].mean(0), p[[362, 263, 386, 374]].mean(0)
        return np.vstack([left, right, p[[1, 61, 291, 168, 2, 152, 172, 397]]])
    raise ValueError(f"expected {', '.join(map(str, KNOWN))} points, got {count}")


def fit(points_K2: ArrayLike) -> Fit | None:
    """The generic face where the points are: pose under perspective, and shape as far as the points tell it.

    Least squares with priors: every residual counts in its expected error, every mode in its standard deviation.
    Starts from the affine camera of the mean face (DeMenthon and Davis 1995, POS); then three Gauss-Newton steps over
    yaw, pitch, roll, scale, shift and `MODES`, on the points turned upright and scaled to millimetres. There the
    derivatives depend on yaw and pitch alone, and those of the nearest `_STEP_RAD` serve for all steps: they change
    little, and making them anew is most of a fit's work.

    Args:
        points_K2: (K, 2) pixels, K one of `KNOWN`, finite.

    Returns:
        None if the points lie on a line or closer together than a few pixels.

    Raises:
        ValueError: another number of points.
    """
    given = anchors(points_K2)
    count = len(given)
    tables = _tables(count)
    # In numbers: of so few an array's operation takes longer than the arithmetic.
    wanted = given.tolist()
    mean_x, mean_y = sum(x for x, _ in wanted) / count, sum(y for _, y in wanted) / count
    a = b = c = d = e = f = 0.0
    for (p, q, r), (x, y) in zip(tables.inverse, wanted, strict=True):
        x, y = x - mean_x, y - mean_y
        a, b, c, d, e, f = a + p * x, b + p * y, c + q * x, d + q * y, e + r * x, f + r * y
    start = _pose_of((a, c, e), (b, d, f))
    if start is None:
        return None
    yaw, pitch, roll, scale = start
    # What the affine camera says of pitch is mostly the nose's length.
    pitch = 0.5 * min(max(pitch, -0.5), 0.5)
    cos, sin = math.cos(roll) / scale, math.sin(roll) / scale
    upright = [(cos * (x - mean_x) + sin * (y - mean_y), cos * (y - mean_y) - sin * (x - mean_x)) for x, y in wanted]
    jaws = count == _FIVE or len(np.asarray(points_K2)) == 468 or abs(yaw) <= _CONTOUR_YAW_RAD
    step = _step(count, jaws, round(yaw / _STEP_RAD), round(pitch / _STEP_RAD))
    # What the points are off, x and y of one after the other, and then the state.
    both = np.empty(2 * count + _SIZE)
    state = both[2 * count :]
    (a, b, c), (d, e, f), _ = _rows(yaw, pitch, 0.0)
    x, y, z = tables.centre
    state[:] = _BEGIN
    state[:6] = yaw, pitch, 0.0, 0.0, -(a * x + b * y + c * z), -(d * x + e * y + f * z)
    off = _residual(state, upright, tables)
    for _ in range(_STEPS):
        both[: 2 * count] = off
        change = step @ both
        state += np.minimum(np.maximum(change, _LEAST, out=change), _LIMIT, out=change)
        off = _residual(state, upright, tables)
    yaw, pitch, turn, log_scale, x, y, *shape = state.tolist()
    error = math.sqrt(sum(one * one for one in off[: 2 * _INNER]) / (min(count, _INNER))) * math.exp(-log_scale)
    cos, sin = cos * scale * scale, sin * scale * scale
    scale *= math.exp(log_scale)
    if not math.isfinite(error) or scale * 61.0 < SMALLEST_PX:
        return None
    shift = np.array([cos * x - sin * y + mean_x, sin * x + cos * y + mean_y])
    return Fit(yaw, pitch, roll + turn, scale, shift, np.array(shape), error)


@lru_cache(maxsize=4096)
def _step(count: int, jaws: bool, yaw_steps: int, pitch_steps: int) -> Array:
    """(_SIZE, 2 A + _SIZE): of an upright face of scale 1 that is turned so, times what the points are off (mm) and the
    state it is the Gauss-Newton step.

    Args:
        count: A.
        jaws: whether the contour's points count.
        yaw_steps, pitch_steps: in `_STEP_RAD`.
    """
    tables = _tables(count)
    weight = tables.weight.copy()
    if not jaws:
        weight[list(_JAWS)] = 0.0
    rotation = _turn(_STEP_RAD * yaw_steps, _STEP_RAD * pitch_steps, 0.0)
    turned = tables.places.reshape(count, 3) @ rotation.T
    strength = weight * CAMERA_MM / (CAMERA_MM - turned[:, 2])
    # A turn about axis a moves a point p by a x p: ey for yaw, Ry ex for pitch, ez for roll.
    _, ay, az = rotation[:, 0].tolist()
    # Columns: x of yaw, pitch, roll, scale, then y of them.
    moves = np.array(
        [
            [0.0, 0.0, 0.0, 1.0, 0.0, az, 1.0, 0.0],
            [0.0, -az, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
            [1.0, ay, 0.0, 0.0, 0.0, -rotation[0, 0], 0.0, 0.0],
        ]
    )
    jacobian = np.zeros((count, 2, _SIZE))
    jacobian[:, :, :4] = ((turned * strength[:, None]) @ moves).reshape(count, 2, 4)
    jacobian[:, 0, 4] = jacobian[:, 1, 5] = weight
    jacobian[:, :, 6:] = (rotation[:2] * strength[:, None, None]) @ tables.directions
    rows = jacobian.reshape(-1, _SIZE)
    inverse = np.linalg.inv(rows.T @ rows + np.diag(_PRIOR))
    return np.concatenate([inverse @ (rows.T * np.repeat(weight, 2)), -inverse * _PRIOR], axis=1)


def _residual(state: Array, given: list[tuple[float, float]], tables: _Tables) -> list[float]:
    """What the points are off, x and y of one after the other, in the points' unit."""
    yaw, pitch, roll, log_scale, shift_x, shift_y, *_ = state.tolist()
    ((a, b, c), (d, e, f), (g, h, i)) = _rows(yaw, pitch, roll)
    strength = math.exp(log_scale) * CAMERA_MM
    places = (tables.places + state[6:] @ tables.modes).tolist()
    off = []
    for k, (to_x, to_y) in enumerate(given):
        x, y, z = places[3 * k : 3 * k + 3]
        nearer = strength / (CAMERA_MM - g * x - h * y - i * z)
        off.append(to_x - (a * x + b * y + c * z) * nearer - shift_x)
        off.append(to_y - (d * x + e * y + f * z) * nearer - shift_y)
    return off


def place(points_N3: Array, fit: Fit) -> Array:
    """(N, 2) pixels of points of the surface (mm, already reshaped)."""
    turned = points_N3 @ fit.turn().T
    nearer = fit.scale * CAMERA_MM / (CAMERA_MM - turned[:, 2:])
    pixels: Array = turned[:, :2] * nearer + fit.shift
    return pixels


def reshape(points_N3: Array, shape_M: Array) -> Array:
    """(N, 3): points of the generic surface, or near it, moved as the modes move the face."""
    width, middle, lower, nose, _, depth, tip = shape_M.tolist()
    x, y, z = points_N3[:, 0], points_N3[:, 1], points_N3[:, 2]
    below = np.maximum(y, 0.0)
    on_nose = np.exp(-((x / 14.0) ** 2) - ((y - 36.0) / 16.0) ** 2)
    out = np.empty_like(points_N3)
    np.multiply(x, 1 + 0.06 * width, out=out[:, 0])
    out[:, 1] = y + (0.06 * middle) * below + (0.08 * lower) * np.maximum(y - 45.0, 0.0) + (2.5 * tip) * on_nose
    out[:, 2] = z + (3.5 * nose) * on_nose + (4.0 * depth) * np.minimum(below / 71.0, 1.3)
    return out


@lru_cache(maxsize=1)
def radius() -> Array:
    """(R, Q) mm: how far the surface is from the axis at every height (rows) and angle (columns)."""
    heights, angles = _steps(HEIGHT_MM), np.radians(_steps(ANGLE_DEG))
    table = np.array(_SECTIONS, np.float64)
    half, back, front = (_smooth(heights, table[:, 0], table[:, k]) for k in (1, 2, 3))
    nose = np.array(_NOSE, np.float64)
    out, wide = (_smooth(heights, nose[:, 0], nose[:, k], sigma_mm=2.0) for k in (1, 2))
    result = np.empty((len(heights), len(angles)))
    around = np.radians(np.linspace(-150, 150, 1201))
    for row in range(len(heights)):
        x = half[row] * np.sin(around)
        # Behind its widest place the section goes on as a half circle.
        reach = np.where(np.cos(around) > 0, front[row] - back[row], half[row])
        z = back[row] + reach * np.cos(around) + out[row] * np.exp(-((x / wide[row]) ** 2)) * (np.cos(around) > 0)
        result[row] = np.interp(angles, np.arctan2(x, z - AXIS_Z), np.hypot(x, z - AXIS_Z))
    return result


@dataclass(frozen=True)
class _Tables:
    """What a fit to A anchors needs: the places flat (3 A,), the modes flat (M, 3 A) and as (A, 3, M), the weights
    (1 / mm), the pseudo-inverse of the affine camera (A, 3), and the places' mean (3,)."""

    places: Array
    modes: Array
    directions: Array
    weight: Array
    inverse: list[list[float]]
    centre: list[float]


@lru_cache(maxsize=2)
def _tables(count: int) -> _Tables:
    table = np.array(_ANCHORS[:count], np.float64)
    places = table[:, :3]
    directions = np.stack([_direction(k, places) for k in range(len(MODES))])
    model = places - places.mean(0)
    # Only what the eyes, nose and mouth say starts the fit.
    inverse = np.zeros((3, count))
    first = places[:_FIVE] - places[:_FIVE].mean(0)
    inverse[:, :_FIVE] = np.linalg.pinv(first)
    if count > _FIVE:
        inverse = np.linalg.pinv(model)
    return _Tables(
        places=places.ravel(),
        modes=directions.reshape(len(MODES), -1),
        directions=np.ascontiguousarray(directions.transpose(1, 2, 0)),
        weight=1.0 / table[:, 3],
        inverse=inverse.T.tolist(),
        centre=places.mean(0).tolist(),
    )


def _direction(mode: int, places_A3: Array) -> Array:
    """(A, 3) mm: how one standard deviation of a mode moves the anchors. Eyes stay: they are the unit. The mouth's
    width does not follow the face's, it has a mode of its own."""
    unit = np.zeros(len(MODES))
    unit[mode] = 1.0
    moved = reshape(places_A3, unit) - places_A3
    moved[:_FIVE, 0] = 0.0
    moved[:2] = 0.0
    if MODES[mode] == "smile":
        moved[3], moved[4] = (-3.5, -2.0, -1.0), (3.5, -2.0, -1.0)
    return moved


def _pose_of(across: Row, down: Row) -> tuple[float, float, float, float] | None:
    """Yaw, pitch, roll and scale of the affine camera of these two rows, or None if it has no two directions."""
    (x1, y1, z1), (x2, y2, z2) = across, down
    a, b, c = x1 * x1 + y1 * y1 + z1 * z1, x1 * x2 + y1 * y2 + z1 * z2, x2 * x2 + y2 * y2 + z2 * z2
    if not math.isfinite(a + c) or a * c - b * b < 1e-4 * (a + c) ** 2 or a + c < 1e-8:
        return None
    scale = math.sqrt((a + c) / 2)
    # The nearest orthonormal pair: multiply by the inverse root of the Gram matrix.
    root = math.sqrt(a * c - b * b)
    trace = math.sqrt(a + c + 2 * root)
    p, q, r = (a + root) / trace / root, b / trace / root, (c + root) / trace / root
    x1, y1, z1, x2, y2, z2 = (
        r * x1 - q * x2, r * y1 - q * y2, r * z1 - q * z2, p * x2 - q * x1, p * y2 - q * y1, p * z2 - q * z1,
    )  # fmt: skip
    yaw = math.asin(min(max(z1 * y2 - y1 * z2, -1.0), 1.0))
    pitch = math.atan2(z1 * x2 - x1 * z2, x1 * y2 - y1 * x2)
    return yaw, pitch, math.atan2(x2, x1), scale


def _turn(yaw: float, pitch: float, roll: float) -> Array:
    return np.array(_rows(yaw, pitch, roll))


def _rows(yaw: float, pitch: float, roll: float) -> tuple[Row, Row, Row]:
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    return (
        (cr * cy, cr * sy * sp - sr * cp, cr * sy * cp + sr * sp),
        (sr * cy, sr * sy * sp + cr * cp, sr * sy * cp - cr * sp),
        (-sy, cy * sp, cy * cp),
    )


def _steps(span: tuple[float, float, float]) -> Array:
    first, last, step = span
    return np.arange(first, last + step / 2, step)


def _smooth(at: Array, x: Array, y: Array, sigma_mm: float = 2.5) -> Array:
    """The table's straight pieces, averaged under a bell so that nothing has an edge."""
    offsets = np.linspace(-2.5, 2.5, 21)
    bell = np.exp(-(offsets**2) / 2)
    values = np.interp(at[:, None] + offsets * sigma_mm, x, y)
    result: Array = values @ (bell / bell.sum())
    return result
