"""The colours of a head: skin, lips, brows, eyes, beard, moles and freckles, painted on the head grid's texture.

In: latents. Out: a texture in linear light (here: the square of the picture's value 0..1).

Shapes: B images, R, Q rows and columns of the head grid, U, W rows and columns of its texture, P, N of a patch of
it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from visard.data.faces3d.anatomy import EYE_X, EYE_Y, MOUTH_HALF_WIDTH, STOMION, anatomy, blob, smoothstep
from visard.data.faces3d.colours import hair_colour, hue, iris_colour, melanin, skin_colour
from visard.data.faces3d.hair import step
from visard.data.faces3d.head import age, beard_cover
from visard.data.faces3d.latents import Latents
from visard.data.faces3d.noise import soft_noise

__all__ = ["beard_thickness", "double", "paint"]

_MOLES = 7
_FRECKLES = 41
# How far a spot reaches beyond its middle, texels.
_SPOT_REACH = 7
# Length of the tables from mm to texels, in steps of half a millimetre.
_SPAN_MM = 170
_LASTING_MARKS, _FRECKLE_MARKS = 2, 3


def paint(texture: Tensor, latents: Latents, scalp_BRQ: Tensor, diffuse_B3RQ: Tensor, shine_BRQ: Tensor) -> None:
    """Fills the head's texture with lit linear colours.

    Args:
        texture: (B, 3, U, W) float32, written; U = 2 R - 1, W = 2 Q - 1.
        scalp_BRQ: (B, R, Q) float32, how much the hair's roots colour the skin.
        diffuse_B3RQ: (B, 3, R, Q) float32, light that multiplies the colour.
        shine_BRQ: (B, R, Q) float32, light that is added.
    """
    constants = _constants(latents.device)
    skin_B3, melanin_B = skin_colour(latents), melanin(latents)
    hair_B3 = hair_colour(latents)
    rows, columns = scalp_BRQ.shape[1:]

    # Smooth regions, at the vertices: redness of cheeks and nose, shadows under the eyes, beard, hair roots.
    flush = (0.35 + 0.45 * latents.uniform("ruddy") + 0.3 * latents.uniform("flush")) * (1 - 0.6 * melanin_B)
    tired = 0.06 + 0.16 * latents.uniform("under eye") + 0.10 * age(latents)
    tint_B3K = torch.stack(
        [
            torch.stack([0.02 * flush, -0.16 * flush, -0.15 * flush], 1),
            torch.stack([-1.0 * tired, -1.15 * tired, -0.95 * tired], 1),
            torch.full_like(skin_B3, 0.05),
        ],
        2,
    ).float()
    colour = skin_B3.float()[:, :, None, None] * (1 + (tint_B3K @ constants["regions"]).view(-1, 3, rows, columns))
    beard = _beard(latents).float()
    beard_colour = (hair_B3 * 0.8).float()[:, :, None, None]
    stubble = constants["stubble"][(latents.uniform("beard dark") * len(constants["stubble"])).long()]
    amount = (beard @ constants["beard"].flatten(1)).view(-1, rows, columns)
    amount = (amount * (1 + 0.25 * stubble)).clamp_(0, 0.93)[:, None]
    colour = colour + (beard_colour - colour) * amount
    roots = scalp_BRQ[:, None] * 0.85
    colour = colour + (hair_B3.float()[:, :, None, None] - colour) * roots
    uneven = constants["uneven"][(latents.uniform("freckles") * len(constants["uneven"])).long()]
    double(torch.addcmul(shine_BRQ[:, None], colour, diffuse_B3RQ).mul_(uneven[:, None]), out=texture)

    _mark(texture, latents, melanin_B)
    _paint_brows(texture, latents, hair_B3, diffuse_B3RQ)
    _paint_eyes(texture, latents, skin_B3, diffuse_B3RQ)
    _paint_mouth(texture, latents, skin_B3, diffuse_B3RQ)
    _paint_clothes(texture, latents, diffuse_B3RQ)


def double(values: Tensor, out: Tensor | None = None) -> Tensor:
    """(..., R, Q) -> (..., 2 R - 1, 2 Q - 1), linear between: bilinear resizing with aligned corners, without its
    weights."""
    *lead, rows, columns = values.shape
    if out is None:
        out = values.new_empty(*lead, 2 * rows - 1, 2 * columns - 1)
    out[..., ::2, ::2] = values
    torch.lerp(values[..., 1:], values[..., :-1], 0.5, out=out[..., ::2, 1::2])
    torch.lerp(out[..., 2::2, :], out[..., :-1:2, :], 0.5, out=out[..., 1::2, :])
    return out


def beard_thickness(latents: Latents) -> Tensor:
    """(B,) how far the beard stands out, 0 to 1."""
    full = _beard(latents)[:, 2]
    return ((full - 0.55) * 2.2).clamp(0, 1)


def _beard(latents: Latents) -> Tensor:
    """(B, 3) strength of moustache, chin and cheek beard, 0 to 1."""
    male = (latents.uniform("gender") > 0.48).to(latents.dtype)
    draw, dark = latents.uniform("beard"), latents.uniform("beard dark")
    shadow = 0.08 + 0.16 * dark + 0.14 * latents.uniform("beard now")
    strong = 0.72 + 0.25 * dark
    none = draw < 0.5
    moustache = torch.where(none, shadow, strong * ((draw < 0.62) | (draw > 0.7)))
    chin = torch.where(none, shadow, strong * (draw > 0.6))
    cheek = torch.where(none | (draw < 0.76), shadow * 0.8, strong * (0.55 + 0.45 * (draw > 0.86)))
    return torch.stack([moustache.clamp_min(0.08), chin.clamp_min(0.08), cheek], 1) * male[:, None]


def _mark(texture: Tensor, latents: Latents, melanin_B: Tensor) -> None:
    """Moles and freckles. Round spots are outer products of bells: one product of matrices."""
    constants = _constants(latents.device)
    moles = latents.lasting_array(_LASTING_MARKS, 4 * _MOLES).view(-1, 4, _MOLES).float()
    there = (moles[:, 3] < 0.45).float() * 0.85
    freckled = ((latents.uniform("freckles") - 0.72).clamp_min(0) * 1.1 * (1 - melanin_B)).float()
    spots = latents.lasting_array(_FRECKLE_MARKS, 3 * _FRECKLES).view(-1, 3, _FRECKLES).float()
    # Places and radii in mm of the template, then in texels.
    x = torch.cat([(moles[:, 1] - 0.5) * 128, (spots[:, 0] - 0.5) * 104], 1)
    y = torch.cat([62 - moles[:, 0] * 170, -4 - 34 * spots[:, 1] * (0.5 + spots[:, 0])], 1)
    radius = torch.cat([1.1 + 1.2 * moles[:, 2], 1.1 + 0.5 * spots[:, 2]], 1)
    strengths = torch.cat([there, freckled[:, None].expand(-1, _FRECKLES)], 1)
    row, row_mm = constants["texel_row"][:, _entry(62.5 - y)]
    column, column_mm = constants["texel_column"][:, _entry(x + 75)]
    # No spot reaches farther than this.
    rows, columns = (
        slice(int(table[0, 0]) - _SPOT_REACH, int(table[0, -1]) + _SPOT_REACH)
        for table in (constants["texel_row"], constants["texel_column"])
    )
    dark = _spots((row, column), (radius / row_mm, radius / column_mm), strengths, (rows, columns))
    for channel, depth in enumerate((0.62, 0.82, 0.9)):
        part = texture[:, channel, rows, columns]
        part.addcmul_(part, dark, value=-depth)


def _entry(millimetres: Tensor) -> Tensor:
    return (millimetres * 2).long().clamp(0, 2 * _SPAN_MM - 1)


def _spots(
    places: tuple[Tensor, Tensor], sizes: tuple[Tensor, Tensor], strength_BK: Tensor, texels: tuple[slice, slice]
) -> Tensor:
    """The sum of K bells on these rows and columns, 0 to 1; places and sizes are (B, K) in texels, down and across."""
    down, across = (
        _ridge((torch.arange(part.start, part.stop, device=at.device) - at[..., None]) * (0.5**0.5 / size[..., None]))
        for part, at, size in zip(texels, places, sizes, strict=True)
    )
    return ((down * strength_BK[..., None]).transpose(1, 2) @ across).clamp_(0, 1)


def _ridge(distance: Tensor) -> Tensor:
    """exp(-distance^2), and never one of the numbers so small that processors take a hundred times as long over
    them."""
    return (distance * distance).clamp_max_(60).neg_().exp_()


def _blend(part: Tensor, light: Tensor, colour: Tensor, amount: Tensor) -> None:
    """Paints `colour` (broadcasts to (B, 3, P, N)) in this light over a part of the texture, `amount` (B, P, N) 0
    to 1."""
    part += (colour * light - part) * amount[:, None]


def _light_on(diffuse_B3RQ: Tensor, patch: tuple[slice, slice]) -> Tensor:
    """(B, 3, P, N) light on a patch of the texture."""
    rows, columns = patch
    near = diffuse_B3RQ[:, :, rows.start // 2 : (rows.stop + 2) // 2, columns.start // 2 : (columns.stop + 2) // 2]
    top, left = rows.start % 2, columns.start % 2
    return double(near)[:, :, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]


def _soft(value: Tensor, width: float) -> Tensor:
    """0 below -width, 1 above width (mm), linear between: an edge without steps."""
    return (value / (2 * width) + 0.5).clamp(0, 1)


def _paint_brows(texture: Tensor, latents: Latents, hair_B3: Tensor, diffuse_B3RQ: Tensor) -> None:
    patch, x, y = _patch(latents.device, "brows")
    part, lit = texture[:, :, patch[0], patch[1]], _light_on(diffuse_B3RQ, patch)
    ax = x.abs()

    def w(value: Tensor) -> Tensor:
        return value.float()[:, None, None]

    gender = latents.uniform("gender", -1, 1)
    arch, tilt = w(2.6 + 1.3 * latents.normal("brow arch") - 0.8 * gender), w(0.05 * latents.normal("brow tilt"))
    start = w(12.5 + 2.2 * latents.normal("brow gap"))
    thick = w((2.5 + 0.75 * latents.normal("brow thick") + 0.5 * gender).clamp_min(1.0))
    t = ((ax - start) / (50 - start)).clamp(0, 1)
    middle = 15.0 + arch * 2.1 * (t * (1.45 - t)) ** 1.2 * 1.6 + tilt * (ax - 30)
    half = thick * (0.55 + 1.1 * t * (1 - t) + 0.45 * (1 - t)) * (1 - 0.65 * step(0.6, 1.0, t))
    amount = _soft(half - (y - middle).abs(), 0.9) * _soft(ax - start, 2.0) * _soft(51 - ax, 3.0)
    dark = w(0.5 + 0.42 * latents.uniform("brow dark"))
    fibre = _constants(latents.device)["fibre"][: ax.shape[0], : ax.shape[1]]
    colour = (hair_B3 * 0.62).float()[:, :, None, None]
    _blend(part, lit, colour, (amount * dark * (0.92 + 0.18 * fibre)).clamp(0, 1))


def _paint_eyes(texture: Tensor, latents: Latents, skin_B3: Tensor, diffuse_B3RQ: Tensor) -> None:
    patch, x, y = _patch(latents.device, "eyes")
    part, lit = texture[:, :, patch[0], patch[1]], _light_on(diffuse_B3RQ, patch)
    side = torch.sign(x)
    ax = x.abs()

    def w(value: Tensor) -> Tensor:
        return value.float()[:, None, None]

    half = w(14.2 * (1 + 0.05 * latents.normal("eye size")))
    round_ = latents.normal("eye round")
    closing = (latents.uniform("close") - 0.93).clamp_min(0) / 0.07
    squint = 0.35 * latents.uniform("squint", -1.0, 1.0).clamp_min(0) + 0.22 * latents.uniform(
        "smile", -0.5, 1.25
    ).clamp_min(0)
    opened = w((1 - squint) * (1 - closing))
    u = (ax - EYE_X) / half
    tilt = 0.05 * half * u
    # Highest point of the upper lid nearer to the nose, lowest of the lower lid nearer to the temple.
    shape_up = (1 - (u + 0.08) ** 2).clamp_min(0) ** 0.75
    shape_low = (1 - (u - 0.12) ** 2).clamp_min(0) ** 0.8
    low = EYE_Y - w(4.4 + 0.3 * round_) * shape_low * (0.55 + 0.45 * opened) + tilt
    up = low + (EYE_Y + w(5.4 + 0.55 * round_) * shape_up + tilt - low) * opened
    inside = _soft(torch.minimum(up - y, y - low), 0.45) * _soft(half - (ax - EYE_X).abs(), 0.6)

    light = skin_B3.float()[:, :, None, None]
    fold = up + w(3.4 + 1.0 * latents.normal("lid fold")) * (1 - 0.35 * u * u)
    crease = _ridge((y - fold) / 0.9) * _soft(half * 1.1 - (ax - EYE_X).abs(), 1.5)
    _blend(part, lit, light * 0.42, 0.5 * crease * w(latents.uniform("lid fold", 0.35, 1.0)))
    bag = _ridge((y - low + 4.2) / 1.3) * _soft(half * 0.9 - (ax - EYE_X).abs(), 3.0)
    _blend(part, lit, light * 0.55, bag * w(0.10 + 0.25 * age(latents)))

    shade = (0.50 + 0.5 * ((up - y) / 4.0).clamp(0, 1)) * (1 - 0.35 * u * u * u.abs())
    white = torch.tensor([0.56, 0.51, 0.48], device=x.device)[None, :, None, None] * shade[:, None]
    gaze_x = w(3.4 * latents.uniform("gaze x", -1, 1) ** 3)
    gaze_y = w(1.8 * latents.uniform("gaze y", -1, 1) ** 3)
    dx = (ax - EYE_X + 0.4) * side - gaze_x
    dy = y - EYE_Y - 0.5 - gaze_y
    radius = (dx * dx + dy * dy).sqrt()
    iris_B3 = iris_colour(latents)
    ring = (0.35 + 0.65 * _soft(5.1 - radius, 0.8)) * (0.75 + 0.45 * (radius / 5.8).clamp(0, 1))
    eye = (
        white
        + (iris_B3.float()[:, :, None, None] * (ring * shade)[:, None] - white) * _soft(5.9 - radius, 0.5)[:, None]
    )
    eye = eye * (1 - 0.96 * _soft(w(2.3 + 0.5 * latents.uniform("iris ring", -1, 1)) - radius, 0.5)[:, None])
    glint_x = w(2.2 * torch.sin(latents.uniform("light azimuth", -1.4, 1.4)))
    glint = _ridge((dx - glint_x) / 1.1**0.5) * _ridge((dy - 1.9) / 1.1**0.5)
    eye = eye + (0.85 - eye) * (0.9 * glint)[:, None]
    _blend(part, lit, eye, inside)
    lash = _ridge((y - up - 0.35) / w(0.75 + 0.35 * latents.uniform("lash"))) * _soft(
        half + 0.8 - (ax - EYE_X).abs(), 0.8
    )
    rim = _ridge((y - low + 0.1) / 0.6) * _soft(half - (ax - EYE_X).abs(), 0.8)
    lash_dark = w(0.62 + 0.3 * latents.uniform("lash"))
    _blend(part, lit, light * 0.06, (lash * lash_dark).clamp(0, 1))
    _blend(part, lit, light * 0.35, 0.45 * rim)


def _paint_mouth(texture: Tensor, latents: Latents, skin_B3: Tensor, diffuse_B3RQ: Tensor) -> None:
    patch, x, y = _patch(latents.device, "mouth")
    part, lit = texture[:, :, patch[0], patch[1]], _light_on(diffuse_B3RQ, patch)
    ax = x.abs()

    def w(value: Tensor) -> Tensor:
        return value.float()[:, None, None]

    half = MOUTH_HALF_WIDTH
    u = (ax / half).clamp(0, 1)
    thick = w(
        1 + 0.2 * latents.normal("mouth thick") - 0.12 * latents.uniform("gender", -1, 1) - 0.3 * (age(latents) - 0.4)
    )
    bow = 1.6 * _ridge(ax / 4.0)
    top = STOMION + thick * (8.0 * (1 - u**1.7) - bow * (1 - u)) + 0.3
    bottom = STOMION - thick * 10.5 * (1 - u**2.2).clamp_min(0) ** 0.85 - 0.3
    amount = _soft(torch.minimum(top - y, y - bottom), 1.0) * _soft(half - ax, 1.2)
    melanin_B = melanin(latents)
    rose = torch.stack([1.02 - 0.22 * melanin_B, 0.52 + 0.1 * melanin_B, 0.56 + 0.12 * melanin_B], 1)
    made_up = (latents.uniform("gender") < 0.45) * latents.uniform("lip dark") ** 2
    rose = rose * torch.stack([1 - 0.05 * made_up, 1 - 0.55 * made_up, 1 - 0.45 * made_up], 1)
    rose = rose * (1 + 0.14 * latents.normal("lip colour"))[:, None]
    lips = (skin_B3 * rose).float()[:, :, None, None]
    _blend(part, lit, lips, amount * 0.85)
    # The row between the lips: a line when shut, teeth above and a dark hollow below when torn open.
    opened = w((latents.uniform("open") - 0.62).clamp_min(0) * 2.3)
    band = _soft(0.85 - (y - STOMION).abs(), 0.3) * _soft(half - 1.0 - ax, 1.5)
    dark = torch.tensor([0.05, 0.016, 0.014], device=x.device)[None, :, None, None]
    _blend(part, lit, dark, band * (0.55 + 0.45 * (opened * 6).clamp(0, 1)))
    teeth = _soft(y - STOMION - 0.1, 0.15) * _soft(STOMION + 0.62 - y, 0.15) * _soft(17 - ax, 3.0)
    ivory = torch.tensor([0.62, 0.58, 0.50], device=x.device)[None, :, None, None]
    _blend(part, lit, ivory, teeth * (opened * 5).clamp(0, 0.9))
    nostril = _ridge((ax - 7.2) / 3.0) * _ridge((y + 48.0) / 1.5)
    _blend(part, lit, (skin_B3 * 0.08).float()[:, :, None, None], (0.85 * nostril).expand(len(latents), -1, -1))


def _paint_clothes(texture: Tensor, latents: Latents, diffuse_B3RQ: Tensor) -> None:
    constants = _constants(latents.device)
    first = int(constants["clothes_row"])
    line = latents.uniform("neckline", -172, -156).float()[:, None, None]
    height, side = constants["clothes_height"], constants["clothes_side"]
    amount = _soft(line - 9 * (1 - side) + 4 * side - height, 3.5)
    colour = hue(
        latents.uniform("clothes hue"),
        latents.uniform("clothes saturation") ** 2 * 0.8,
        latents.uniform("clothes light", 0.03, 0.8),
    )
    patch = (slice(first, texture.shape[2]), slice(0, texture.shape[3]))
    _blend(texture[:, :, patch[0]], _light_on(diffuse_B3RQ, patch), colour.float()[:, :, None, None], amount)


def _texture_flat() -> np.ndarray:
    """(2, U, W) template x, y of the texture's texels."""
    flat = torch.from_numpy(np.ascontiguousarray(anatomy().flat.transpose(2, 0, 1)))[None]
    rows, columns = flat.shape[2:]
    return resize(flat, size=(2 * rows - 1, 2 * columns - 1), mode="bilinear", align_corners=True)[0].numpy()


_PATCHES = {"brows": (10.0, 27.0, 56.0), "eyes": (-14.0, 13.0, 49.0), "mouth": (-80.0, -44.0, 30.0)}


@lru_cache(maxsize=16)
def _patch(device: torch.device, name: str) -> tuple[tuple[slice, slice], Tensor, Tensor]:
    """A patch of the texture: its slices, template x and y (P, N) float32."""
    x, y = _texture_flat()
    low, high, reach = _PATCHES[name]
    middle = x.shape[1] // 2
    rows = np.nonzero((y[:, middle] >= low) & (y[:, middle] <= high))[0]
    front = np.abs(np.arange(x.shape[1]) - middle) < 70
    columns = np.nonzero((np.abs(x[rows[len(rows) // 2]]) <= reach) & front)[0]
    patch = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return patch, torch.from_numpy(x[patch]).float().to(device), torch.from_numpy(y[patch]).float().to(device)


@lru_cache(maxsize=4)
def _constants(device: torch.device) -> dict[str, Tensor]:
    head = anatomy()
    flat = head.flat
    front = 1 - smoothstep(70, 92, np.abs(head.angle))[None]
    cheeks = 0.9 * blob(flat, 38, -32, 15, 14) + 0.9 * blob(flat, 0, -38, 13, 9) + 0.35 * blob(flat, 0, -98, 14, 9)
    under = blob(flat, 25, -9, 9, 4) + 0.5 * blob(flat, 16, 3, 5, 6) + 0.4 * blob(flat, 31, 8, 13, 3)
    forehead = blob(flat, 0, 45, 45, 20)
    regions = np.stack([cheeks, under, forehead]) * front
    rows, columns = flat.shape[:2]
    x, y = _texture_flat()
    clothes = int(np.argmax(y[:, 0] < -140))
    # At the sides the collar lies higher than at the throat.
    angles = np.interp(np.arange(x.shape[1]) / 2, np.arange(columns), np.abs(head.angle))
    # The columns of the face's front, where x grows from one to the next.
    near = slice(int(np.sum(angles[: x.shape[1] // 2] > 85)), int(x.shape[1] - np.sum(angles[x.shape[1] // 2 :] > 85)))
    values: dict[str, Tensor] = {
        "regions": torch.from_numpy(regions.reshape(3, -1)).float(),
        "beard": torch.from_numpy(beard_cover()).float(),
        "stubble": soft_noise(31, 4, rows, columns, 0.3, 0.5),
        "uneven": 1 + 0.035 * soft_noise(32, 6, 2 * rows - 1, 2 * columns - 1, 2.2, 2.2)[:, ::2, ::2].contiguous(),
        "fibre": soft_noise(33, 1, 64, 2 * columns - 1, 0.9, 0.4)[0],
        "texel_row": _texel_table(-y[:, x.shape[1] // 2], -62.5),
        "texel_column": _texel_table(x[int(np.argmax(y[:, 0] < -15)), near], -75.0, int(near.start)),
        "clothes_height": torch.from_numpy(y[clothes:].copy()).float()[None],
        "clothes_side": torch.from_numpy(smoothstep(10, 80, angles)).float()[None, None],
    }
    values = {name: value.to(device) for name, value in values.items()}
    return values | {"clothes_row": torch.tensor(clothes)}


def _texel_table(millimetres: np.ndarray, start: float, first: int = 0) -> Tensor:
    """(2, 2 * _SPAN_MM): texel number, and mm a texel, at every half millimetre from `start`."""
    at = start + np.arange(2 * _SPAN_MM) / 2
    texel = first + np.arange(len(millimetres), dtype=float)
    size = np.gradient(millimetres)
    table = np.stack([np.interp(at, millimetres, texel), np.interp(at, millimetres, size)])
    return torch.from_numpy(table).float()
