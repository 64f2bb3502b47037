"""What colour people and their clothes are, before any light falls on them.

In: latents. Out: linear colours (the square of the picture's value 0..1).

Shapes: B images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visard.data.faces3d.hair import step
from visard.data.faces3d.head import age
from visard.data.faces3d.latents import Latents

__all__ = ["hair_colour", "hue", "iris_colour", "melanin", "skin_colour"]

_SKIN = ((231, 194, 174), (220, 178, 150), (205, 157, 124), (183, 132, 99), (139, 94, 68), (98, 64, 47), (68, 45, 35))
_HAIR = ((20, 17, 17), (36, 27, 23), (62, 43, 32), (96, 66, 44), (140, 104, 66), (196, 162, 112), (150, 72, 38))
_IRIS = ((58, 36, 22), (86, 56, 32), (104, 92, 52), (88, 110, 86), (92, 126, 150), (110, 122, 132))


def melanin(latents: Latents) -> Tensor:
    """(B,) how dark the skin is, 0 to 1."""
    return latents.uniform("melanin") ** 1.15


def skin_colour(latents: Latents) -> Tensor:
    """(B, 3) linear colour of the skin under white light."""
    colour = _table(_SKIN, melanin(latents) * (len(_SKIN) - 1))
    under = latents.normal("undertone", 0.035)
    tone = torch.stack([1 + 0.4 * under, 1 - 0.2 * under, 1 - 1.6 * under], 1)
    return colour * tone


def hair_colour(latents: Latents) -> Tensor:
    """(B, 3) linear colour of the hair in this image: the person's own, greyer with age."""
    draw = latents.uniform("hair colour")
    place = torch.where(melanin(latents) > 0.45, draw * 1.6, draw**0.9 * 6.0)
    own = _table(_HAIR, place) * (1 + 0.25 * latents.uniform("hair shade", -1, 1))[:, None]
    grey = step(0.0, 0.35, age(latents) - latents.uniform("grey from", 0.3, 0.9))[:, None]
    silver = torch.tensor([0.40, 0.39, 0.37], dtype=own.dtype, device=own.device)
    return own + (silver - own) * grey * 0.9


def iris_colour(latents: Latents) -> Tensor:
    """(B, 3) linear colour of the iris: dark eyes in dark faces."""
    draw = latents.uniform("iris")
    place = torch.where(melanin(latents) > 0.4, draw * 1.2, draw * (len(_IRIS) - 1))
    return _table(_IRIS, place) * latents.uniform("iris light", 0.8, 1.5)[:, None]


def hue(hue_B: Tensor, saturation_B: Tensor, light_B: Tensor) -> Tensor:
    """(B, 3) linear colour from hue 0..1 (around the circle), saturation 0..1 and lightness 0..1."""
    shifts = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=hue_B.dtype, device=hue_B.device)
    wave = 0.5 + 0.5 * torch.cos(2 * torch.pi * (hue_B[:, None] - shifts))
    return (light_B[:, None] * (1 - saturation_B[:, None] * (1 - wave))) ** 2


def _table(colours: tuple[tuple[int, int, int], ...], place: Tensor) -> Tensor:
    """(B, 3) linear colour at a fractional place of a table of picture values."""
    table = (torch.tensor(colours, dtype=place.dtype, device=place.device) / 255) ** 2
    low = place.floor().clamp(0, len(colours) - 2)
    part = (place - low).clamp(0, 1)[:, None]
    low = low.long()
    return table[low] * (1 - part) + table[low + 1] * part
