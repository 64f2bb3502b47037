"""Light on the surface: a soft key lamp, a fill and a sky, with the shadows that a head casts on itself.

In: unit normals, latents. Out: how much light of each colour every vertex sends to the camera.

Shapes: B images, V vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from visard.data.faces3d.anatomy import anatomy
from visard.data.faces3d.latents import Latents
from visard.functional.surface import grid_cells, grid_normals, rasterise

__all__ = ["Lamps", "Openness", "harmonics", "lamps", "openness", "shade", "strength"]

HARMONICS = 25
# How many directions, and how large the pictures (pixels of 2 mm), by which the template's own shadows are found.
DIRECTIONS, LOOK = 192, 240


@dataclass(frozen=True)
class Lamps:
    """Everything in the head's own coordinates, float32.

    Args:
        key: (B, 3) unit vector towards the lamp.
        key_colour: (B, 3).
        sky: (B, 3, 4) light from all around for each colour: mean, then its slope along x, y, z.
        half: (B, 3) unit vector between lamp and camera, for highlights.
        wrap: (B, 1) how far the lamp's light reaches around, 0 a point to 1 a window.
    """

    key: Tensor
    key_colour: Tensor
    sky: Tensor
    half: Tensor
    wrap: Tensor


def lamps(latents: Latents, rotation_B33: Tensor) -> Lamps:
    """The lamps of a batch of images, turned with the head."""
    azimuth, height = latents.uniform("light azimuth", -1.4, 1.4), latents.uniform("light height", -0.35, 1.15)
    key = torch.stack([azimuth.sin() * height.cos(), height.sin(), azimuth.cos() * height.cos()], 1)
    camera = torch.zeros_like(key)
    camera[:, 2] = 1
    half = key + camera
    half = half / half.norm(dim=1, keepdim=True)
    power, ambient = strength(latents)
    warm = _warmth(latents.uniform("light warm", -0.22, 0.3))
    sky_warm = _warmth(latents.uniform("ambient warm", -0.28, 0.22))
    slope = torch.stack(
        [
            latents.uniform("ambient side", -0.45, 0.45),
            latents.uniform("ambient tilt", -0.1, 0.55),
            latents.uniform("fill", -0.1, 0.35),
        ],
        1,
    )
    mean = (ambient[:, None] * sky_warm)[:, :, None]
    slope = (slope[:, None] @ rotation_B33)[:, 0]
    back = rotation_B33.transpose(1, 2).to(key)
    return Lamps(
        key=(back @ key[..., None])[..., 0].float(),
        key_colour=(power[:, None] * warm).float(),
        sky=torch.cat([mean, mean * slope[:, None]], 2).float(),
        half=(back @ half[..., None])[..., 0].float(),
        wrap=latents.uniform("light spread", 0.05, 0.6).float()[:, None],
    )


@dataclass(frozen=True)
class Openness:
    """What every vertex of the template sees of the world, so that heads shade themselves.

    Args:
        sky: (V,) float32, cosine-weighted share of the sky, 0..1.
        lamp: (HARMONICS, V) float32, spherical harmonics of the share of a lamp's light that arrives from a direction.
    """

    sky: Tensor
    lamp: Tensor


@lru_cache(maxsize=4)
def openness(device: torch.device) -> Openness:
    """Made once: the template is looked at from all sides, and every vertex notes from where it is seen."""
    head = anatomy()
    rows, columns = head.template.shape[:2]
    template = torch.from_numpy(head.template).permute(2, 0, 1)[None]
    points = template.flatten(2)
    normals = grid_normals(template.contiguous()).view(3, -1).T
    cells = grid_cells(rows, columns)
    number = torch.arange(DIRECTIONS, dtype=torch.float64)
    # A Fibonacci sphere.
    y = 1 - 2 * (number + 0.5) / DIRECTIONS
    turn = number * (torch.pi * (3 - 5**0.5))
    ring = (1 - y * y).sqrt()
    towards = torch.stack([ring * turn.sin(), y, ring * turn.cos()], 1)
    side = torch.linalg.cross(torch.tensor([[0.3, 0.8, 0.52]], dtype=torch.float64).expand_as(towards), towards)
    side = side / side.norm(dim=1, keepdim=True)
    up = torch.linalg.cross(towards, side)
    seen = []
    for k in range(0, DIRECTIONS, 16):
        frame = torch.stack([side[k : k + 16], -up[k : k + 16], towards[k : k + 16]], 1)
        turned = frame @ points
        screen = (turned[:, :2] + torch.tensor([[0.0], [-30.0]])) * 0.5 + LOOK / 2
        depth = 500 - turned[:, 2]
        raster = rasterise(screen, depth, cells, LOOK, LOOK)
        place = screen.round().long().clamp(0, LOOK - 1)
        nearest = raster.depth.flatten(1).gather(1, place[:, 1] * LOOK + place[:, 0])
        slack = 3.0 + 3.0 * (1 - (normals @ towards[k : k + 16].T).clamp(0, 1).T)
        seen.append(depth <= nearest + slack)
    seen_NV = torch.cat(seen).double()
    facing_NV = (normals @ towards.T).T
    weight_NV = facing_NV.clamp_min(0)
    sky = (weight_NV * seen_NV).sum(0) / weight_NV.sum(0).clamp_min(1e-9)
    # Weighted least squares for each vertex; behind the vertex nothing is asked, a ridge holds the answer near its
    # mean.
    basis_NH = harmonics(towards)
    care_NV = (facing_NV > -0.15).double() * (0.3 + weight_NV)
    mean = (care_NV * seen_NV).sum(0) / care_NV.sum(0).clamp_min(1e-9)
    normal_VHH = torch.einsum("nh,nv,nk->vhk", basis_NH, care_NV, basis_NH)
    right_VH = torch.einsum("nh,nv->vh", basis_NH, care_NV * (seen_NV - mean))
    ridge = torch.eye(HARMONICS, dtype=torch.float64) * (0.01 * DIRECTIONS)
    lamp_VH = torch.linalg.solve(normal_VHH + ridge, right_VH[..., None])[..., 0]
    lamp_VH[:, 0] += mean / basis_NH[0, 0]
    return Openness(sky.float().to(device), lamp_VH.T.float().contiguous().to(device))


def harmonics(direction_B3: Tensor) -> Tensor:
    """(B, HARMONICS) real spherical harmonics of degrees 0 to 4, up to constant factors, of unit vectors."""
    x, y, z = direction_B3.unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    terms = [
        torch.ones_like(x), x, y, z, x * y, y * z, 3 * zz - 1, x * z, xx - yy,
        y * (3 * xx - yy), x * y * z, y * (5 * zz - 1), z * (5 * zz - 3), x * (5 * zz - 1), z * (xx - yy), x * (xx
        - 3 * yy),
        x * y * (xx - yy), y * z * (3 * xx - yy), x * y * (7 * zz - 1), y * z * (7 * zz - 3), 35 * zz * zz - 30 *
        zz + 3,
        x * z * (7 * zz - 3), (xx - yy) * (7 * zz - 1), x * z * (xx - 3 * yy), xx * (xx - 3 * yy) - yy * (3 * xx - yy),
    ]  # fmt: skip
    return torch.stack(terms, 1)


def strength(latents: Latents) -> tuple[Tensor, Tensor]:
    """(B,) power of the key lamp, (B,) of the light from all around."""
    return latents.uniform("light power", 0.35, 1.25), latents.uniform("ambient", 0.3, 0.85)


def shade(
    normal_B3V: Tensor, lamps_: Lamps, open_V: Tensor | None, lit_BV: Tensor | None, gloss: float | None
) -> tuple[Tensor, Tensor]:
    """Diffuse light (B, 3, V) to multiply the colour with, highlight (B, V) to add.

    Args:
        normal_B3V: (B, 3, V) or (3, V).
        open_V: (V,) or None, share of the sky that is not hidden, 0..1.
        lit_BV: (B, V) or None, share of the key lamp that arrives, 0..1.
        gloss: exponent of the highlight (Blinn-Phong); None = no highlight is wanted.
    """
    asked = torch.cat([lamps_.key[:, None], lamps_.half[:, None], lamps_.sky[:, :, 1:]], 1)
    answer = asked @ normal_B3V
    facing, gleam, sky = answer[:, 0], answer[:, 1], answer[:, 2:]
    key = ((facing + lamps_.wrap) / (1 + lamps_.wrap)).clamp_min_(0)
    if lit_BV is not None:
        key = key.mul_(lit_BV)
    sky = sky.add_(lamps_.sky[:, :, :1])
    if open_V is not None:
        sky = sky.mul_(open_V)
    diffuse = torch.addcmul(sky.clamp_min_(0.02), lamps_.key_colour[..., None], key[:, None])
    if gloss is None:
        return diffuse, torch.zeros_like(key)
    shine = gleam.clamp_min(0).pow_(gloss).mul_(facing > 0)
    if lit_BV is not None:
        shine = shine.mul_(lit_BV)
    return diffuse, shine.mul_(lamps_.key_colour.mean(1, keepdim=True))


def _warmth(warm_B: Tensor) -> Tensor:
    """(B, 3) gain of red, green, blue; positive = warmer."""
    return torch.stack([1 + 0.5 * warm_B, 1 + 0.02 * warm_B, 1 - 0.75 * warm_B], 1)
