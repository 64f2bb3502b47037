"""The head that all heads are made from: a grid of vertices, and the ways in which people and moments differ from it.

In: nothing. Out: constants, made once: the template (millimetres; x right in the picture, y up, z to the front,
origin between the eyes' height and the ears), displacement fields of identity, age and expression, landmark places.

The head is a grid: rows run from the crown over face and neck to the chest, columns around it from ear to ear, dense
where eyes, nose and lips are. Numbers are those of adult anthropometry (Farkas, "Anthropometry of the Head and
Face", 1994), rounded; nothing is measured from anybody.

Shapes: R rows, Q columns, M modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# y: half width, reach to the front, reach to the back. The face without nose, lips and eyes; cut by the jaw further
# down.
_SKULL = (
    (115, 0, 0, 0), (113.5, 17, 20, 26), (110, 32, 36, 47), (104, 45, 50, 64), (95, 56, 63, 78), (80, 66, 76, 91),
    (62, 72, 85.5, 99), (45, 74.5, 91, 102), (25, 74.5, 93, 103), (10, 73, 91.5, 102), (-5, 71, 89.5, 99),
    (-20, 69, 88.5, 95), (-35, 66.5, 89.5, 90), (-50, 63, 91.5, 84), (-67, 58.5, 92.5, 79), (-84, 52.5, 91, 77),
    (-100, 45.5, 89.5, 77), (-115, 38, 85, 77), (-140, 32, 78, 77), (-330, 32, 70, 77),
)  # fmt: skip
_NECK = (
    (115, 50, 44, 76), (-60, 50, 40, 76), (-120, 50, 37, 75), (-142, 52, 36, 76), (-156, 59, 39, 78),
    (-168, 82, 46, 82), (-180, 122, 58, 90), (-195, 165, 76, 98), (-215, 192, 94, 104), (-245, 205, 108, 110),
    (-330, 212, 118, 115),
)  # fmt: skip
# Angle from the front: height of the lower edge of jaw and skull.
_JAW = (
    (0, -114), (15, -113), (32, -107), (48, -97), (62, -85), (74, -72), (84, -56), (95, -46), (120, -46), (165, -52),
)  # fmt: skip
_ROW_SPACING = (
    (115, 5), (95, 7.5), (60, 6), (34, 4.4), (26, 2.6), (10, 1.9), (-9, 2.1), (-16, 3.6), (-30, 2.9), (-38, 2.1),
    (-52, 2.4), (-58, 2.3), (-80, 3), (-90, 4.2), (-112, 4.5), (-125, 7), (-150, 5), (-182, 5), (-200, 20), (-330, 110),
)  # fmt: skip
COLUMNS = 77
STOMION = -67.0
EYE_X, EYE_Y = 31.0, 0.0
MOUTH_HALF_WIDTH = 25.0


@dataclass(frozen=True)
class Anatomy:
    """Constants of the head grid.

    Args:
        angle: (Q,) degrees from the front, negative on the picture's left.
        height: (R,) mm, of the rows in the template.
        template: (R, Q, 3) mm.
        flat: (R, Q, 2) mm: the places on the skin (x, y) at which eyes, lips and marks are painted.
        shape: (M, R, Q, 3) mm for one standard deviation: lasting differences between people.
        shape_names: M names.
        expression: name -> (R, Q, 3) mm at full strength.
        turn: (R,) 1 where the surface turns with the head, 0 where with the chest.
        dense: (68, 2) row and column (fractions) of the dense landmarks.
        five: (5, 2) row and column of eye centres, nose tip, mouth corners.
    """

    angle: Array
    height: Array
    template: Array
    flat: Array
    shape: Array
    shape_names: tuple[str, ...]
    expression: dict[str, Array]
    turn: Array
    dense: Array
    five: Array

    def place(self, points_K2: Array) -> Array:
        """(K, 2) template x, y in front -> (K, 2) fractional row and column on the grid."""
        return _place(points_K2, self.angle, self.height, self.flat)


@lru_cache(maxsize=1)
def anatomy() -> Anatomy:
    """The one head grid of this version."""
    angle, height = _angles(), _heights()
    base = _bare_head(angle, height)
    flat = base[..., :2].copy()
    template = base + _features(flat, _front(angle))
    shape, names = _shape_modes(template, flat, _front(angle))
    half = MOUTH_HALF_WIDTH
    five = np.array([(-EYE_X, EYE_Y), (EYE_X, EYE_Y), (0, -38.5), (-half, STOMION), (half, STOMION)], float)
    return Anatomy(
        angle=angle,
        height=height,
        template=template,
        flat=flat,
        shape=shape,
        shape_names=names,
        expression=_expressions(template, flat, _front(angle)),
        turn=smoothstep(-165.0, -112.0, height),
        dense=_place(_dense_places(), angle, height, flat),
        five=_place(five, angle, height, flat),
    )


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blob(flat: Array, x: float, y: float, wide: float, tall: float) -> Array:
    """A bell around (x, y) and its mirror image, mm."""
    vertical = ((flat[..., 1] - y) / tall) ** 2
    right = np.exp(-0.5 * (((flat[..., 0] - x) / wide) ** 2 + vertical))
    if x == 0:
        return right
    return right + np.exp(-0.5 * (((flat[..., 0] + x) / wide) ** 2 + vertical))


def _place(points_K2: Array, angle: Array, height: Array, flat: Array) -> Array:
    rows = np.interp(-points_K2[:, 1], -height, np.arange(len(height)))
    low = np.clip(rows.astype(int), 0, len(height) - 2)
    columns = np.empty(len(rows))
    front = np.abs(angle) <= 90
    numbers = np.arange(len(angle))[front]
    for k, (x, row, part) in enumerate(zip(points_K2[:, 0], low, rows - low, strict=True)):
        line = flat[row, front, 0] * (1 - part) + flat[row + 1, front, 0] * part
        columns[k] = np.interp(x, line, numbers)
    return np.stack([rows, columns], 1)


def _angles() -> Array:
    # Three quarters of the columns within 50 degrees of the front.
    t = np.linspace(-1, 1, COLUMNS)
    return np.sign(t) * np.interp(np.abs(t), [0, 0.38, 0.74, 0.9, 1], [0, 20, 50, 90, 152])


def _heights() -> Array:
    table = np.array(_ROW_SPACING)
    rows = [115.0]
    while rows[-1] > -560:
        rows.append(rows[-1] - float(np.interp(-rows[-1], -table[:, 0], table[:, 1])))
    height = np.array(rows)
    # Three rows lie at the line between the lips, so that the mouth can open along it.
    height = height[np.abs(height - STOMION) > 1.6]
    return np.sort(np.concatenate([height, STOMION + np.array([-0.8, 0.0, 0.8])]))[::-1].copy()


def _curve(table: tuple[tuple[float, ...], ...], at: Array) -> Array:
    """Smooth interpolation (cubic Hermite, slopes from neighbours) of the columns of a table sorted by its first
    column."""
    rows = np.array(sorted(table), float)
    x, y = rows[:, 0], rows[:, 1:]
    slope = np.gradient(y, x, axis=0)
    k = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    step = (x[k + 1] - x[k])[..., None]
    t = np.clip((at - x[k])[..., None] / step, 0, 1)
    a, b = y[k], y[k + 1]
    return (
        a * (1 + 2 * t) * (1 - t) ** 2
        + b * t * t * (3 - 2 * t)
        + slope[k] * step * t * (1 - t) ** 2
        - slope[k + 1] * step * t * t * (1 - t)
    )


def _front(angle: Array) -> Array:
    """(Q,) 1 on the face, fading to 0 towards the ears."""
    return 1 - smoothstep(62, 88, np.abs(angle))


def _ring(table: tuple[tuple[float, ...], ...], angle: Array, height: Array, power: float) -> Array:
    size = np.maximum(_curve(table, height), 0)
    wide, front, back = size[:, 0:1], size[:, 1:2], size[:, 2:3]
    sine, cosine = np.sin(np.radians(angle))[None], np.cos(np.radians(angle))[None]
    # A superellipse: a little flatter in front and at the sides than an ellipse.
    radius = (np.abs(sine) ** power + np.abs(cosine) ** power) ** (-1 / power)
    x = wide * sine * radius
    z = np.where(cosine >= 0, front, back) * cosine * radius
    return np.stack([x, np.broadcast_to(height[:, None], x.shape), z], -1)


def _bare_head(angle: Array, height: Array) -> Array:
    skull, neck = _ring(_SKULL, angle, height, 2.15), _ring(_NECK, angle, height, 2.2)
    edge = np.interp(np.abs(angle), *np.array(_JAW, float).T)[None]
    above = height[:, None] - edge
    inside = smoothstep(-8, 5, above)[..., None]
    # Below the edge the surface goes inwards, and a little upwards under the chin.
    return neck + (skull - neck) * inside


def _features(flat: Array, front: Array) -> Array:
    """(R, Q, 3) what makes a bare head a face: sockets, brows, nose, lips, chin."""
    x, y = flat[..., 0], flat[..., 1]

    def at(*place: float) -> Array:
        return blob(flat, *place)

    depth = (
        -6.5 * at(29, 1, 17, 11) - 4.0 * at(15, 4, 6, 9)
        + 5.2 * at(EYE_X, EYE_Y - 0.5, 11, 7)
        + 2.6 * at(27, 19, 19, 6) + 1.5 * at(0, 17, 12, 7)
        + 1.5 * at(31, 8.5, 13, 2.6) - 1.3 * at(31, -11, 13, 3.5)
        + 4.0 * at(40, -24, 15, 12) - 2.0 * at(46, -58, 12, 15)
        + 3.0 * at(17, -58, 10, 10) - 1.2 * at(29, -53, 5, 10)
        - 3.5 * at(0, -85.5, 20, 4.5) + 4.5 * at(0, -101, 17, 9) + 2.5 * at(11, -104, 8, 8)
        + 1.0 * at(27, 52, 16, 14)
    )  # fmt: skip
    depth += _nose(x, y) + _lips(x, y)
    out = np.zeros((*x.shape, 3))
    out[..., 2] = depth * front
    cheek = at(44, -22, 13, 13) * front
    out[..., 0] = np.sign(x) * 2.0 * cheek
    return out


def _nose(x: Array, y: Array) -> Array:
    profile = ((16, 0, 7.5), (9, 1.2, 7.2), (3, 3.2, 6.6), (-5, 7.2, 6.8), (-15, 12.6, 7.8), (-25, 18, 9.4), (-31,
    21.8, 10.8),
               (-36, 24.2, 11.8), (-40, 24.4, 12), (-43.5, 21, 11.5), (-46.5, 13, 10), (-49.5, 5.5, 8.5), (-53,
               1.2, 7), (-60, 0, 7))  # fmt: skip
    reach, half = np.moveaxis(_curve(profile, y), -1, 0)
    reach = np.where((y > 14) | (y < -60), 0, np.maximum(reach, 0))
    ridge = reach * np.exp(-(np.abs(x / np.maximum(half, 5)) ** 2.1))
    wing = 8.5 * np.exp(-(np.abs((np.abs(x) - 12.5) / 5.2) ** 2.4) - np.abs((y + 41.5) / 6.0) ** 2.6)
    groove = -2.0 * np.exp(-(((np.abs(x) - 20.5) / 3) ** 2) - ((y + 42) / 6) ** 2)
    nostril = -4.0 * np.exp(-(((np.abs(x) - 7.0) / 3.0) ** 2) - ((y + 47.5) / 2.0) ** 2)
    return ridge + wing + groove + nostril


def _lips(x: Array, y: Array) -> Array:
    across = np.clip(1 - (x / (MOUTH_HALF_WIDTH + 2)) ** 2, 0, 1)
    upper = 4.6 * across**0.8 * np.exp(-(np.abs((y - STOMION - 5.0) / 5.2) ** 2.4))
    lower = 5.4 * across * np.exp(-(np.abs((y - STOMION + 6.0) / 5.2) ** 2.4))
    line = -4.2 * across**0.5 * np.exp(-(((y - STOMION) / 1.9) ** 2))
    corner = -2.4 * blob(np.stack([x, y], -1), MOUTH_HALF_WIDTH + 1.5, STOMION, 4, 4)
    groove = -1.3 * np.exp(-((x / 3.2) ** 2) - ((y + 55) / 4) ** 2)
    return upper + lower + line + corner + groove


def _shape_modes(template: Array, flat: Array, front: Array) -> tuple[Array, tuple[str, ...]]:
    """Displacement of one standard deviation, each symmetric unless its name says otherwise."""
    x, y, z = np.moveaxis(template, -1, 0)
    head = smoothstep(-135, -112, y)
    side, face = np.sign(x), front[None] * np.ones_like(x)
    outward = np.stack([x, 0 * x, np.maximum(z, 0) * 0.8], -1)
    outward = outward / np.maximum(np.linalg.norm(outward, axis=-1, keepdims=True), 1)

    def at(*place: float) -> Array:
        return blob(flat, *place)

    def push(dx: Array | float = 0.0, dy: Array | float = 0.0, dz: Array | float = 0.0) -> Array:
        return np.stack([np.broadcast_to(d, x.shape) for d in (dx, dy, dz)], -1)

    def swell(amount: Array) -> Array:
        return amount[..., None] * outward

    lower = 1 - smoothstep(-50, 5, y)
    modes: dict[str, Array] = {
        "face width": push(dx=0.045 * x * head),
        "head depth": push(dz=0.035 * z * head),
        "skull height": push(dy=4.5 * smoothstep(20, 110, y)),
        "face height": push(dy=-4.0 * lower * smoothstep(-150, -120, y)),
        "forehead slope": push(dz=-4.0 * smoothstep(15, 75, y) * face),
        "forehead width": push(dx=side * 3.2 * at(50, 45, 22, 24)),
        "temples": swell(-2.4 * at(62, 15, 14, 20)),
        "brow ridge": push(dz=1.7 * at(24, 17, 20, 6) + 1.3 * at(0, 15, 12, 7)),
        "brow height": push(dy=1.8 * at(28, 18, 20, 8)),
        "eye spacing": push(dx=side * 1.9 * at(31, 2, 16, 14)),
        "eye height": push(dy=1.8 * at(31, 0, 18, 11)),
        "eye tilt": push(dy=1.5 * (at(43, 0, 8, 8) - at(18, 0, 8, 8))),
        "eye depth": push(dz=2.2 * at(31, 0, 16, 10)),
        "eye width": push(dx=side * 1.5 * (at(44, 0, 8, 9) - at(19, 0, 7, 9))),
        "eye opening": push(dy=1.0 * (at(31, 7, 13, 4) - at(31, -7, 13, 4))),
        "nose length": push(dy=-2.8 * at(0, -42, 20, 11)),
        "nose reach": push(dz=3.0 * at(0, -38, 12, 11)),
        "nose bridge": push(dz=2.6 * at(0, -3, 9, 13)),
        "nose hump": push(dz=2.0 * at(0, -17, 7, 8)),
        "nose width": push(dx=side * 2.2 * at(14, -42, 8, 9)),
        "bridge width": push(dx=side * 1.5 * at(9, -12, 8, 15)),
        "nose tip up": push(dy=2.4 * at(0, -42, 9, 7), dz=-0.6 * at(0, -36, 9, 7)),
        "nose tip round": push(dx=side * 1.3 * at(7, -38, 6, 7), dz=0.9 * at(0, -38, 10, 6)),
        "nostrils flare": push(dx=side * 1.3 * at(15, -44, 6, 5), dy=1.0 * at(14, -46, 5, 5)),
        "mouth height": push(dy=2.4 * at(0, -66, 34, 14)),
        "mouth width": push(dx=side * 2.3 * at(22, -67, 14, 12)),
        "upper lip": push(dy=1.3 * at(0, -60, 20, 3.5), dz=1.1 * at(0, -62, 17, 5)),
        "lower lip": push(dy=-1.6 * at(0, -75, 18, 4), dz=1.3 * at(0, -73, 15, 5)),
        "lips forward": push(dz=2.4 * at(0, -66, 24, 15)),
        "mouth corners": push(dy=1.4 * at(25, -67, 8, 7)),
        "cheekbones": swell(2.6 * at(46, -20, 15, 12) * face),
        "cheeks": swell(3.6 * at(45, -50, 17, 18)),
        "jaw width": push(dx=side * 4.5 * at(52, -84, 20, 24)),
        "jaw corner": push(dy=-4.5 * at(54, -82, 20, 16) * smoothstep(-150, -110, y)),
        "chin length": push(dy=-3.6 * at(0, -108, 32, 17)),
        "chin reach": push(dz=3.4 * at(0, -100, 24, 15)),
        "chin width": push(dx=side * 3.0 * at(17, -102, 14, 12)),
        "chin cleft": push(dz=-0.9 * at(0, -101, 3.2, 7)),
        "double chin": push(dz=4.5 * at(0, -122, 30, 9), dy=-2.0 * at(0, -118, 32, 8)),
        "weight": swell(3.4 * at(42, -62, 24, 26) + 3.0 * at(50, -95, 30, 22)) + push(dx=0.02 * x * head),
        "neck width": push(dx=0.08 * x * (1 - smoothstep(-125, -95, y)) * smoothstep(-190, -150, y)),
        "under eyes": push(dz=-1.0 * at(28, -12, 11, 5)),
        "lopsided jaw": push(dx=1.6 * at(0, -95, 45, 25)),
        "lopsided nose": push(dx=1.0 * at(0, -36, 12, 13)),
        "lopsided mouth": push(dy=1.0 * np.tanh(x / 15) * at(0, -67, 30, 14)),
        "lopsided eyes": push(dy=0.8 * np.tanh(x / 15) * at(31, 4, 18, 16)),
    }
    # Nameless differences: soft bumps spread over the face, the rest of what makes a face one's own.
    places = [(0, 50), (24, 36), (52, 30), (14, 22), (40, 16), (20, -16), (55, -8), (30, -34), (48, -38), (22,
    -58), (36, -74),
              (12, -90), (30, -96), (56, -64), (0, -24), (0, -58)]  # fmt: skip
    for number, (px, py) in enumerate(places):
        modes[f"bump {number}"] = swell(1.5 * at(px, py, 9, 9) * face)
        if px:
            modes[f"pull {number}"] = push(dx=side * 1.2 * at(px, py, 10, 10) * face)
        modes[f"lift {number}"] = push(dy=1.2 * at(px, py, 12, 10) * face)
    return np.stack(list(modes.values())), tuple(modes)


def _expressions(template: Array, flat: Array, front: Array) -> dict[str, Array]:
    x, y = flat[..., 0], flat[..., 1]
    zero = np.zeros_like(x)

    def at(*place: float) -> Array:
        return blob(flat, *place)

    def push(dx: Array = zero, dy: Array = zero, dz: Array = zero) -> Array:
        return np.stack([dx, dy, dz], -1) * front[None, :, None]

    side = np.sign(x)
    # Between the lips the surface tears open; beside the mouth the skin stretches smoothly.
    inside = np.sqrt(np.clip(1 - (x / MOUTH_HALF_WIDTH) ** 2, 0, 1))
    torn = 1 - smoothstep(STOMION - 0.8, STOMION + 0.8, y)
    stretched = 1 - smoothstep(-96, -38, y)
    jaw = (torn * inside + stretched * (1 - inside)) * smoothstep(-165, -118, y)
    hollow = inside * np.exp(-(((y - STOMION) / 0.7) ** 2))
    fades = _fade(np.abs(np.degrees(np.arctan2(template[..., 0], template[..., 2]))), 95, 40)
    open_mouth = np.stack([-0.03 * x * jaw, -15.0 * jaw, -3.0 * jaw * stretched - 9.0 * hollow], -1) * fades[..., None]
    smile = push(
        dx=side * 5.0 * at(25, -66, 10, 10),
        dy=5.5 * at(27, -66, 9, 8) + 2.6 * at(40, -32, 14, 12) - 1.0 * at(0, -67, 12, 10),
        dz=2.5 * at(40, -30, 14, 11) - 2.5 * at(24, -67, 10, 8) - 0.8 * at(31, -47, 4, 9),
    )
    frown = push(dy=-4.0 * at(25, -68, 9, 9), dx=-side * 1.0 * at(25, -67, 10, 9))
    pucker = push(dx=-side * 5.0 * at(24, -67, 12, 10), dz=4.5 * at(0, -67, 16, 11))
    brows_up = push(dy=5.0 * at(28, 18, 20, 9) + 2.0 * at(0, 34, 40, 12))
    brows_down = push(dy=-3.2 * at(18, 16, 14, 8), dx=-side * 1.5 * at(14, 16, 9, 8), dz=1.2 * at(14, 15, 10, 7))
    return {
        "open": open_mouth,
        "smile": smile,
        "frown": frown,
        "pucker": pucker,
        "brows up": brows_up,
        "brows down": brows_down,
    }


def _fade(value: Array, end: float, width: float) -> Array:
    return 1 - smoothstep(end - width, end, value)


def _dense_places() -> Array:
    """(68, 2) template x, y in the order of the usual 68-point scheme (jaw 17, brows 10, nose 9, eyes 12, mouth 20)."""
    jaw = [(-71, -8), (-69.5, -28), (-66.5, -47), (-61, -66), (-52, -84), (-41, -97), (-28, -107), (-14, -112.5)]
    brow = [(-48, 17), (-40, 21.5), (-31, 22.5), (-22, 20.5), (-13, 16.5)]
    eye = [(-45.5, 0.5), (-36.5, 5.0), (-26, 4.8), (-17, -1.5), (-26, -4.6), (-36.5, -4.6)]
    mouth = [
        (-25, -67),
        (-16, -62.5),
        (-6, -59.5),
        (0, -61),
        (-7.5, -77),
        (-16, -74),
        (-21, -67),
        (-8, -66.3),
        (-8, -67.7),
    ]

    def mirror(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(-px, py) for px, py in points]

    outer_left, outer_right = mouth[0:3], mirror(mouth[0:3])[::-1]
    return np.array(
        jaw + [(0, -114)] + mirror(jaw)[::-1]
        + brow + mirror(brow)[::-1]
        + [(0, 3), (0, -11), (0, -25), (0, -38), (-12, -47), (-6, -49), (0, -50), (6, -49), (12, -47)]
        + eye + [(-eye[k][0], eye[k][1]) for k in (3, 2, 1, 0, 5, 4)]
        + outer_left + [mouth[3]] + outer_right
        + mirror([mouth[5], mouth[4]]) + [(0, -78)] + [mouth[4], mouth[5]]
        + [mouth[6], mouth[7], (0, -66.3)] + mirror([mouth[7], mouth[6]]) + mirror([mouth[8]]) + [(0, -67.7), mouth[8]],
        float,
    )  # fmt: skip
