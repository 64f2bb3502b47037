"""Glasses and the brim of a cap: small ribbons of surface in front of the head, collapsed to a point where not worn.

In: latents, the head's vertices. Out: vertices and linear colours of all ribbons, which ones are fixed.

Shapes: B images, R, Q rows and columns of the head grid, V vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from visard.data.faces3d.anatomy import anatomy
from visard.data.faces3d.colours import hue
from visard.data.faces3d.latents import Latents
from visard.functional.surface import sample_grid

__all__ = ["PARTS", "Worn", "hat_colour", "wear", "wears_glasses", "wears_hat"]

AROUND = 25
BRIM_ROWS, BRIM_COLUMNS = 4, 17
# How far glasses curve back at 21 mm from the middle; it grows with the square of the distance.
CURVE_MM = 0.6
# name -> rows, columns of its vertex grid, in the order in which vertices are stored.
PARTS = {
    "ring left": (2, AROUND), "ring right": (2, AROUND), "lens left": (2, AROUND), "lens right": (2, AROUND),
    "bridge": (2, 5),
    "arm left": (2, 5), "arm right": (2, 5), "brim": (BRIM_ROWS, BRIM_COLUMNS), "brim below": (BRIM_ROWS, BRIM_COLUMNS),
}  # fmt: skip


@dataclass(frozen=True)
class Worn:
    """Args:
    vertices: (B, 3, V) mm.
    colour: (B, 3, V) float32 linear colour under even light.
    normal: (3, V) float32 for the light.
    """

    vertices: Tensor
    colour: Tensor
    normal: Tensor


def wears_glasses(latents: Latents) -> Tensor:
    """(B,) bool. Some people nearly always wear them, most seldom."""
    return latents.uniform("glasses") < torch.where(latents.uniform("glasses habit") < 0.2, 0.75, 0.09)


def wears_hat(latents: Latents) -> Tensor:
    """(B,) bool."""
    return latents.chance("hat", 0.13)


def hat_colour(latents: Latents) -> Tensor:
    """(B, 3) linear."""
    return hue(
        latents.uniform("hat hue"), latents.uniform("hat saturation") * 0.8, latents.uniform("hat light", 0.06, 0.8)
    )


def wear(latents: Latents, head_B3RQ: Tensor) -> Worn:
    """All ribbons of the batch."""
    five = torch.from_numpy(anatomy().five).to(head_B3RQ)
    eyes = sample_grid(head_B3RQ, five[:2, 0], five[:2, 1]).transpose(1, 2)
    bridge_place = torch.from_numpy(anatomy().place(anatomy().flat[0, :1] * 0 + [[0.0, -2.0]])).to(head_B3RQ)
    bridge = sample_grid(head_B3RQ, bridge_place[:, 0], bridge_place[:, 1])[..., 0]
    worn = wears_glasses(latents)
    sun = worn & latents.chance("glasses kind", 0.3)

    t = torch.linspace(0, 2 * pi, AROUND, dtype=latents.dtype, device=latents.device)[None]
    power = latents.uniform("glasses round", 2.0, 5.5)[:, None]
    wide = latents.uniform("glasses width", 21, 27)[:, None] + 2.0 * sun[:, None]
    tall = latents.uniform("glasses height", 13.5, 21)[:, None] + 3.0 * sun[:, None]
    thick = latents.uniform("glasses thick", 1.3, 3.8)[:, None]
    radius = (t.cos().abs() ** power + t.sin().abs() ** power) ** (-1 / power)
    plane = (bridge[:, 2] + 6.5).clamp_min(0)[:, None]
    pieces, colours = [], []
    frame = hue(
        latents.uniform("glasses colour"),
        latents.uniform("glasses round") * 0.7,
        latents.uniform("glasses thick", 0.05, 0.5) ** 1.3,
    )
    dark = torch.full_like(frame, 0.006) + 0.02 * frame
    centre_x = eyes[..., 0].abs().mean(1)[:, None].clamp_min(1) + 1.0
    centre_y = eyes[..., 1].mean(1)[:, None] - 2.0

    def outline(sign: float, grow: Tensor | float, forward: float) -> Tensor:
        x = sign * centre_x + (wide + grow) * radius * t.cos()
        y = centre_y - (tall + grow) * radius * t.sin()
        return torch.stack([x, y, plane - (x / 21) ** 2 * CURVE_MM + forward], -1)

    def shut(points: Tensor, there: Tensor) -> Tensor:
        return torch.where(there[:, None, None], points, points[:, :1] * 0)

    for sign in (-1.0, 1.0):
        pieces.append(shut(torch.cat([outline(sign, thick, 2.0), outline(sign, 0.0, 2.0)], 1), worn))
        colours.append(frame)
    for sign in (-1.0, 1.0):
        middle = outline(sign, 0.0, 0.0).mean(1, keepdim=True).expand(-1, AROUND, -1)
        pieces.append(shut(torch.cat([outline(sign, 0.3, 0.0), middle], 1), sun))
        colours.append(dark)
    inner = centre_x - wide
    s = torch.linspace(-1, 1, 5, dtype=latents.dtype, device=latents.device)[None]
    x = inner * s
    arc = centre_y + 4.5 - 2.5 * s * s
    top = torch.stack([x, arc + 0.5 * thick + 0.6, (plane + 2.1).expand_as(x)], -1)
    low = torch.stack([x, arc - 0.5 * thick - 0.6, (plane + 2.1).expand_as(x)], -1)
    pieces.append(shut(torch.cat([top, low], 1), worn))
    colours.append(frame)
    half = head_B3RQ[:, 0, 40].abs().amax(1)[:, None]
    outer = centre_x + wide + 0.5 * thick
    reach = torch.linspace(0, 1, 5, dtype=latents.dtype, device=latents.device)[None]
    for sign in (-1.0, 1.0):
        x = outer + (half + 1.5 - outer) * (1 - (1 - reach) ** 2.5)
        z = plane - (outer / 21) ** 2 * CURVE_MM - reach * 92
        rows = [torch.stack([sign * x, (centre_y + 5 + d * (1.1 + 0.4 * thick)).expand_as(x), z], -1) for d in (1, -1)]
        points = torch.cat(rows if sign > 0 else [r.flip(1) for r in rows], 1)
        pieces.append(shut(points, worn))
        colours.append(frame)

    brim = _brim(latents, head_B3RQ)
    cap = wears_hat(latents) & (latents.uniform("hat kind") >= 0.5)
    pieces += [shut(brim, cap), shut(brim.view(len(brim), BRIM_ROWS, -1, 3).flip(1).flatten(1, 2), cap)]
    colours += [hat_colour(latents), hat_colour(latents) * 0.35]
    counts = [rows * columns for rows, columns in PARTS.values()]
    colour = torch.cat([c.float()[..., None].expand(-1, -1, n) for c, n in zip(colours, counts, strict=True)], 2)
    normals = [(0, 0, 1)] * 5 + [(-0.9, 0, 0.3), (0.9, 0, 0.3), (0, 0.9, 0.4), (0, -0.9, 0.3)]
    normal = torch.tensor(normals).float().repeat_interleave(torch.tensor(counts), 0).T.to(latents.device)
    return Worn(torch.cat(pieces, 1).transpose(1, 2), colour, normal)


def _brim(latents: Latents, head_B3RQ: Tensor) -> Tensor:
    """(B, rows * columns, 3) the brim of a cap: from the hat's edge forwards, back row first."""
    angle = torch.linspace(-1.05, 1.05, BRIM_COLUMNS, dtype=latents.dtype, device=latents.device)
    reach = torch.linspace(0, 1, BRIM_ROWS, dtype=latents.dtype, device=latents.device)[:, None]
    line = latents.uniform("hat line", 38, 58)[:, None, None]
    wide = head_B3RQ[:, 0, 18].amax(1)[:, None, None] + 8
    front = head_B3RQ[:, 2, 18].amax(1)[:, None, None] + 6
    x = wide * torch.sin(angle) * (1 - 0.12 * reach)
    z = front * torch.cos(angle) + 55 * reach * torch.cos(angle * 1.35)
    y = line + 1.5 - 12 * reach - 9 * (angle / 1.05) ** 2 * (0.25 + 0.75 * reach)
    return torch.stack([x, y.expand_as(x), z], -1).flatten(1, 2)
