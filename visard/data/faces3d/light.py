"""Light on the surface: a soft key lamp, a fill and a sky, with the shadows that a head casts on itself.

In: unit normals, latents. Out: how much light of each colour every vertex sends to the camera.

Shapes: B images, V vertices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visard.data.faces3d.latents import Latents

__all__ = ["Lamps", "lamps", "shade"]


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
    power, ambient = latents.uniform("light power", 0.25, 1.15), latents.uniform("ambient", 0.25, 0.8)
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


def shade(normal_BV3: Tensor, lamps_: Lamps, open_BV: Tensor | None, lit_BV: Tensor | None, gloss: float) -> tuple[Tensor, Tensor]:
    """Diffuse light (B, 3, V) to multiply the colour with, highlight (B, V) to add.

    Args:
        open_BV: (B, V) or None, share of the sky that is not hidden, 0..1.
        lit_BV: (B, V) or None, share of the key lamp that arrives, 0..1.
        gloss: exponent of the highlight (Blinn-Phong).
    """
    facing = (normal_BV3 @ lamps_.key[..., None])[..., 0]
    wrap = lamps_.wrap
    key = ((facing + wrap) / (1 + wrap)).clamp_min(0)
    if lit_BV is not None:
        key = key * lit_BV
    sky = lamps_.sky[:, :, :1] + lamps_.sky[:, :, 1:] @ normal_BV3.transpose(1, 2)
    if open_BV is not None:
        sky = sky * open_BV[:, None]
    diffuse = sky.clamp_min(0.02) + lamps_.key_colour[..., None] * key[:, None]
    shine = (normal_BV3 @ lamps_.half[..., None])[..., 0].clamp_min(0) ** gloss * (facing > 0)
    if lit_BV is not None:
        shine = shine * lit_BV
    return diffuse, shine * lamps_.key_colour.mean(1, keepdim=True)


def _warmth(warm_B: Tensor) -> Tensor:
    """(B, 3) gain of red, green, blue; positive = warmer."""
    return torch.stack([1 + 0.5 * warm_B, 1 + 0.02 * warm_B, 1 - 0.75 * warm_B], 1)
