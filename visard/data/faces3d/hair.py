"""Hair (and hats, which are hair of cloth): a second skin over the head that dips under it where nothing grows.

In: latents, the head's vertices. Out: vertices of the hair grid, its cover and colour inputs.

Shapes: B images, G, J rows and columns of the hair grid, R, Q rows and columns of the head grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from visard.data.faces3d.anatomy import anatomy
from visard.data.faces3d.head import age
from visard.data.faces3d.latents import Latents
from visard.data.faces3d.noise import soft_noise

__all__ = ["Hair", "grow", "hair_grid", "step"]

# Lowest row of the hair grid, mm; and how far hair dips under the skin where none grows.
LOWEST = -205.0
DIP = 4.0
STYLES = 8


@dataclass(frozen=True)
class Hair:
    """Args:
    vertices: (B, 3, G, J) mm.
    near: (B, G, J) bool, false where there is no hair and none beside: nothing to draw.
    deep: (B, G, J) bool, true where the head under the hair cannot be seen.
    cover: (B, G, J) 0 skin to 1 hair or hat.
    hat: (B, G, J) 0 hair to 1 hat.
    strands: (B, G, J) about -1 to 1, light and dark strands.
    """

    vertices: Tensor
    near: Tensor
    deep: Tensor
    cover: Tensor
    hat: Tensor
    strands: Tensor


def step(low: Tensor | float, high: Tensor | float, value: Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, smooth between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def hair_grid() -> tuple[np.ndarray, np.ndarray]:
    """Head rows and columns that the hair grid takes: every second."""
    head = anatomy()
    last = int(np.sum(head.height > LOWEST))
    return np.arange(0, last, 2), np.arange(0, len(head.angle), 2)


@lru_cache(maxsize=4)
def _constants(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    head = anatomy()
    rows, columns = hair_grid()
    skull = head.template[np.ix_(rows, columns)]
    up = np.maximum(skull[..., 1] - 20, 0)
    outward = np.stack([skull[..., 0], up, skull[..., 2]], -1)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    angle, height = np.radians(head.angle[columns]), head.height[rows]
    values = {
        "outward": np.moveaxis(outward, 2, 0),
        "angle": head.angle[columns],
        "height": height,
        "sine": np.sin(angle),
        "cosine": np.cos(angle),
        "x": skull[..., 0],
    }
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(dtype).to(device) for name, value in values.items()
    }
    g, j = len(rows), len(columns)
    straight = soft_noise(21, STYLES, g, j, 0.6, 9.0)
    curly = soft_noise(22, STYLES, g, j, 1.0, 1.2)
    edge = soft_noise(23, 1, STYLES, j, 2.0, 0.0)[0]
    tensors |= {
        name: value.to(dtype).to(device) for name, value in (("straight", straight), ("curly", curly), ("edge", edge))
    }
    return tensors


def grow(latents: Latents, head_B3RQ: Tensor, hat_B: Tensor) -> Hair:
    """The hair, and the hat where `hat_B` says so.

    Args:
        hat_B: (B,) bool.
    """
    constants = _constants(latents.device, latents.dtype)
    rows, columns = hair_grid()
    skin = head_B3RQ[:, :, rows[0] : rows[-1] + 1 : 2, columns[0] : columns[-1] + 1 : 2]
    y, angle = constants["height"][None, :, None], constants["angle"][None, None, :]
    side = angle.abs()

    def wide(value: Tensor) -> Tensor:
        return value[:, None, None]

    gender = latents.uniform("gender", -1, 1)
    length = wide(_length(latents))
    bald, receding = _bald(latents)
    style = (latents.uniform("hair style") * STYLES).long().clamp_max(STYLES - 1)
    curl = wide(step(0.55, 0.95, latents.uniform("hair curl")))

    front = 60 + 5 * latents.normal("hair line") + 26 * receding
    fringe = (latents.uniform("hair fringe") > 0.68 + 0.25 * (gender > 0)) & (receding < 0.2)
    fringe_drop = fringe * (latents.uniform("hair fringe", 14, 30) + latents.uniform("fringe now", -10, 6))
    recess = 6 * latents.uniform("hair recess") * (1 + 3 * receding)
    peak = 5 * latents.uniform("hair peak")
    part = latents.uniform("hair part", -34, 34)
    lopsided = wide(torch.sign(part) * (part.abs() > 12) * latents.uniform("hair peak"))
    edge = (
        wide(front - fringe_drop)
        + wide(recess * (~fringe)) * torch.exp(-(((side - 40) / 15) ** 2))
        - wide(peak * (~fringe)) * torch.exp(-((angle / 9) ** 2))
        - 9 * lopsided * (angle / 45).clamp(-1, 1)
        + 1.6 * constants["edge"][style][:, None] * (1 + curl)
    )
    # Behind the temples the edge runs down to where the hair ends: short hair leaves the ears free but for a sideburn.
    short = (length <= 0).to(latents.dtype)
    sideburn = 26 - (24 + 22 * wide(latents.uniform("hair side"))) * torch.exp(-(((side - 66) / 7) ** 2)) * (
        length > -0.6
    )
    free_ear = sideburn * short + (1 - short) * (10 - 215 * length.clamp_min(0))
    nape = torch.minimum(free_ear, torch.full_like(free_ear, -48.0))
    behind = step(104, 124, side)
    bottom = free_ear * (1 - behind) + nape * behind
    corner = 60 + 5 * wide(latents.uniform("hair recess", -1, 1))
    aside = step(corner - 16, corner + 2, side)
    edge = edge * (1 - aside) + bottom * aside
    above = y - edge
    crown = wide(bald) * 260 * (1 - step(62, 80, side)) + wide(bald) * 200 * step(52, 62, y)
    cover = step(-3.0, 5.0, above - crown)

    volume = wide(1 + 0.22 * latents.normal("hair volume"))
    shaven = step(0.0, 0.25, length + 1.0)
    top_thick = wide(latents.uniform("hair top", 4, 24)) * (1 - 0.7 * wide(bald.clamp(0, 1)))
    side_thick = (
        wide(latents.uniform("hair side", 1.5, 8)) * (1 - 0.6 * wide(bald)) + 5 * length.clamp_min(0).sqrt()
    ) * (1 + 0.35 * curl)
    high = step(25, 85, y)
    noise = (constants["straight"][style] * (1 - curl) + constants["curly"][style] * curl).clamp(-2.5, 2.5)
    thick = (top_thick * high * (1 + 0.8 * curl) + side_thick * (1 - high)) * volume * shaven + 1.0
    thick = thick * (above / 30).clamp(0.02, 1).sqrt() + (0.7 + 1.8 * curl) * noise * shaven
    part_line = torch.exp(-(((constants["x"][None] - wide(part)) / 4) ** 2)) * step(55, 80, y) * (side < 75)
    thick = (thick - 4.5 * part_line * shaven).clamp_min(0.6)

    hat_line = wide(latents.uniform("hat line", 38, 58)) - 14 * step(50, 110, side)
    hat = wide(hat_B.to(latents.dtype)) * step(-1.5, 1.5, y - hat_line)
    bulge = (
        wide(torch.where(latents.uniform("hat kind") < 0.5, 11.0, 8.0)) + 7 * wide(latents.uniform("hat kind")) * high
    )
    thick = thick.clamp_max(11) * wide(hat_B.to(latents.dtype)) + thick * wide(1 - hat_B.to(latents.dtype))
    thick = thick * (1 - hat) + (bulge + 3) * hat
    cover = torch.maximum(cover, hat)

    lift = thick * cover - DIP * (1 - cover)
    points = torch.addcmul(skin, constants["outward"], lift[:, None])
    # Long hair falls straight down where face and neck go inwards.
    hang = cover * step(0.12, 0.3, length) * (1 - step(-62, -12, y)) * step(58, 70, side)
    slim = 1 - 0.1 * (1 - step(-180, -60, y))
    x = (73 + 1.1 * side_thick * volume) * slim * constants["sine"][None, None] + 2.5 * noise * curl
    z = (70 + side_thick) * constants["cosine"][None, None] - 8 + 2.0 * noise
    points[:, 0].lerp_(x, hang)
    points[:, 2].lerp_(z, hang)
    near = _widen(cover > 0)
    # Skin under much hair on all sides is never seen.
    deep = ~_widen(_widen(cover * thick <= 2.0))
    return Hair(points, near, deep, cover, hat, noise * (1 - 0.9 * part_line))


def _widen(mask_BGJ: Tensor) -> Tensor:
    """True where it is true, or beside or across a corner."""
    tall = mask_BGJ.clone()
    tall[:, 1:] |= mask_BGJ[:, :-1]
    tall[:, :-1] |= mask_BGJ[:, 1:]
    wide = tall.clone()
    wide[..., 1:] |= tall[..., :-1]
    wide[..., :-1] |= tall[..., 1:]
    return wide


def _length(latents: Latents) -> Tensor:
    """(B,) -1 shaven, 0 short, 1 over the shoulders."""
    gender = latents.uniform("gender", -1, 1)
    draw = latents.uniform("hair length") + 0.32 * gender
    long = (0.62 - draw).clamp_min(0) * 1.9
    short = (draw - 0.62).clamp_min(0) / 0.7
    return torch.where(draw < 0.62, long.clamp(0.02, 1), -short.clamp(0, 1)) + latents.uniform("hair now", -0.05, 0.05)


def _bald(latents: Latents) -> tuple[Tensor, Tensor]:
    """(B,) how bald the crown is, 0 or 1; (B,) how far the front recedes, 0 to 1."""
    male = latents.uniform("gender") > 0.5
    draw = latents.uniform("bald") + 0.3 * (age(latents) - 0.4)
    bald = ((draw > 0.84) & male).to(latents.dtype)
    return bald, male * ((draw - 0.5) * 2.2).clamp(0, 1)
