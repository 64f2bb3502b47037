"""From rendered colours to a photograph: backdrop, lens and sensor, JPEG.

In: linear colours at raster resolution with the background marked. Out: uint8 RGB pictures.

Shapes: B images, H, W raster size, S picture size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from visard.data.faces3d.latents import Latents, bell
from visard.data.faces3d.light import strength
from visard.data.faces3d.noise import SENSOR_SIZE, sensor_noise
from visard.data.faces3d.skin import hue

__all__ = ["backdrop", "develop", "jpeg"]

_BACKDROP_ARRAY = 2
_COARSE, _FINE = 4, 9
# Kinds of blur, and the deviation of the worst in pixels of a 112 px crop.
BLURS, WORST_BLUR = 24, 1.5


def backdrop(latents: Latents, height: int, width: int) -> Tensor:
    """(B, 3, H, W) float32 linear: blurred rooms, walls, gradients and busy places."""
    count = 3 * (_COARSE**2 + _FINE**2)
    numbers = bell(latents.passing_array(_BACKDROP_ARRAY, count)).float()
    coarse = numbers[:, : 3 * _COARSE**2].view(-1, 3, _COARSE, _COARSE)
    fine = numbers[:, 3 * _COARSE**2 :].view(-1, 3, _FINE, _FINE)
    # Mostly grey: rooms and streets are.
    fine = fine.mean(1, keepdim=True) * 0.85 + fine * 0.3
    coarse = coarse.mean(1, keepdim=True) * 0.9 + coarse * 0.45
    kind = latents.uniform("background kind").float()[:, None, None, None]
    rows, columns = -(-height // 7), -(-width // 7)
    soft, hard, slow = (
        _stretch(n, rows, columns, k, latents.device) for n, k in ((_FINE, 2), (_FINE, 0), (_COARSE, 2))
    )
    fine = fine * (kind > 0.25)
    picture = 0.7 * slow[0] @ coarse @ slow[1] + 0.5 * soft[0] @ (fine * (kind <= 0.8)) @ soft[1]
    picture = picture + 0.5 * hard[0] @ (fine * (kind > 0.8)) @ hard[1]
    tone = hue(
        latents.uniform("background hue"),
        latents.uniform("vignette") ** 2 * 0.5,
        latents.uniform("background light", 0.08, 0.95),
    )
    contrast = latents.uniform("background contrast", 0.02, 0.3).float()[:, None, None, None]
    small = (picture * contrast + tone.float().sqrt()[:, :, None, None]).clamp_(0, 1).square_()
    # What lies behind the head is out of focus: a seventh of the resolution is enough.
    down, across = (
        _stretch(rows, height, width, 1, latents.device)[0],
        _stretch(columns, height, width, 1, latents.device)[1],
    )
    return down @ small @ across


@lru_cache(maxsize=32)
def _stretch(places: int, height: int, width: int, order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices (height, places) and (places, width) that stretch a small grid: order 0 in blocks, 1 linearly, 2
    smoothly."""

    def matrix(size: int) -> Tensor:
        at = torch.linspace(0, places - 1, size, dtype=torch.float64)[:, None] - torch.arange(
            places, dtype=torch.float64
        )
        if order == 0:
            return (at.round() == 0).float().to(device)
        near = (1 - at.abs()).clamp_min(0)
        return (near if order == 1 else near * near * (3 - 2 * near)).float().to(device)

    return matrix(height), matrix(width).T.contiguous()


def develop(linear_B3HW: Tensor, latents: Latents, size: int, *, scale: float) -> Tensor:
    """(B, S, S, 3) uint8: lens blur and reduction, exposure, tone, noise, JPEG.

    Args:
        linear_B3HW: (B, 3, H, W) linear colours.
        scale: raster pixels per picture pixel.
    """
    pixels = reduce(linear_B3HW, (latents.uniform("blur") * BLURS).long(), size, scale)

    def w(value: Tensor) -> Tensor:
        return value.float()[:, None, None, None]

    white = latents.uniform("white balance", -0.16, 0.16).float()
    gain = torch.stack([1 + 0.6 * white, torch.ones_like(white), 1 - 0.6 * white], 1)
    # The camera meters the light, as cameras do, and is half right.
    power, ambient = strength(latents)
    metered = (0.85 / (ambient + 0.5 * power)) ** 0.6
    gain = gain * (torch.exp2(latents.uniform("exposure", -0.45, 0.45)) * metered).float()[:, None]
    picture = (pixels * gain[:, :, None, None]).clamp_min(1e-5).sqrt()
    # A shoulder instead of a hard clip of the lights.
    picture = torch.minimum(picture, torch.tanh((picture - 0.8).clamp_min_(0).mul_(5)).mul_(0.2).add_(0.8))
    # Less colour and less or more contrast are one matrix.
    saturation = w(latents.uniform("saturation", 0.55, 1.15) * (latents.uniform("vignette") > 0.04))[..., 0]
    contrast = w(latents.uniform("contrast", 0.8, 1.15))
    grey = torch.tensor([[0.299, 0.587, 0.114]], device=picture.device).expand(3, 3)
    matrix = contrast[..., 0] * (grey + saturation * (torch.eye(3, device=picture.device) - grey))
    picture = (matrix @ picture.flatten(2)).view_as(picture) + (0.45 * (1 - contrast))
    picture = picture + _noise(latents, size, picture.device)
    quality = latents.uniform("quality", 30, 97).float()
    return jpeg(picture * 255, quality).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reduce(linear_B3HW: Tensor, blur_B: Tensor, size: int, scale: float) -> Tensor:
    """(B, 3, S, S): Gaussian blur and reduction in one, as a product with two matrices an image.

    Args:
        blur_B: (B,) int64, which of `BLURS` blurs.
    """
    batch, channels, height, width = linear_B3HW.shape
    weights = _blurs(height, size, scale, linear_B3HW.device)[blur_B]
    across = linear_B3HW.reshape(batch, channels * height, width) @ weights.transpose(1, 2)
    down = weights @ across.view(batch, channels, height, size).transpose(1, 2).reshape(batch, height, channels * size)
    return down.view(batch, size, channels, size).transpose(1, 2)


@lru_cache(maxsize=8)
def _blurs(height: int, size: int, scale: float, device: torch.device) -> Tensor:
    """(BLURS, S, H) weights, from sharp to a deviation of `WORST_BLUR`; steps grow with the blur."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = torch.arange(height, dtype=torch.float64)[None] - place[:, None]
    blur = (torch.arange(BLURS) / (BLURS - 1)) ** 3 * WORST_BLUR * size / 112
    deviation = (blur * scale).square() + (0.42 * scale) ** 2
    weights = torch.exp(-0.5 * distance.square()[None] / deviation[:, None, None])
    return (weights / weights.sum(2, keepdim=True)).float().to(device)


def _noise(latents: Latents, size: int, device: torch.device) -> Tensor:
    bank = sensor_noise(device)
    strength = latents.uniform("noise") ** 3 * 0.05
    free = max(SENSOR_SIZE - size, 1)
    tops = (latents.uniform("noise y") * free).long().tolist()
    lefts = (latents.uniform("noise x") * free).long().tolist()
    pieces = torch.stack([bank[:, t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)])
    if pieces.shape[-1] < size:
        pieces = resize(pieces, size=(size, size), mode="nearest")
    return pieces * strength.float()[:, None, None, None]


# ITU T.81, Annex K.1: the usual tables of steps for brightness and colour.
_LUMA = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17,
22, 29, 51, 87,
         80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
         101, 72, 92,
         95, 98, 112, 100, 103, 99)  # fmt: skip
_CHROMA = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66,
99, 99, 99, 99,
           99, 99) + (99,) * 32  # fmt: skip
# Half the width, in steps, of the ramp that replaces each jump of the quantiser: rounding stays within 2 grey levels of
# itself when its input moves in the last digits, as it does between devices.
RAMP = 0.04


def jpeg(picture_B3SS: Tensor, quality_B: Tensor) -> Tensor:
    """What JPEG at this quality leaves of a picture: 4:2:0 colour, 8 x 8 cosine transform, quantised.

    Equals encoding and decoding (without the final rounding) but for the narrow ramp between two steps of the
    quantiser.
    Source: ITU T.81; quality to table as in the Independent JPEG Group's library.

    Args:
        picture_B3SS: (B, 3, S, S) float32, 0..255 RGB.
        quality_B: (B,) 1..100.

    Returns:
        (B, 3, S, S) float32, 0..255.
    """
    batch, _, size, _ = picture_B3SS.shape
    whole = -(-size // 16) * 16
    to_ycc, from_ycc = _colour_matrices(picture_B3SS.device)
    ycc = (to_ycc @ picture_B3SS.clamp(0, 255).flatten(2)).view(batch, 3, size, size)
    if whole != size:
        ycc = torch.nn.functional.pad(ycc, (0, whole - size, 0, whole - size), mode="replicate")
    factor = torch.where(quality_B < 50, 5000 / quality_B, 200 - 2 * quality_B) / 100

    def round_trip(plane: Tensor, table: tuple[int, ...]) -> Tensor:
        side = plane.shape[-1]
        cosines = _cosines(side, plane.device)
        steps = (
            (torch.tensor(table, device=plane.device).view(8, 8) * factor[:, None, None] + 0.5).floor().clamp(1, 255)
        )
        steps = steps.repeat(1, side // 8, side // 8)[:, None]
        levels = cosines @ plane @ cosines.T / steps
        below = levels.floor()
        nearest = (levels - below).sub_(0.5 - RAMP).mul_(0.5 / RAMP).clamp_(0, 1).add_(below)
        return cosines.T @ (nearest * steps) @ cosines

    luma = round_trip(ycc[:, :1] - 128, _LUMA) + 128
    chroma = round_trip(torch.nn.functional.avg_pool2d(ycc[:, 1:], 2), _CHROMA)
    chroma = resize(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    back = torch.cat([luma, chroma], 1)[:, :, :size, :size]
    return (from_ycc @ back.flatten(2)).view(batch, 3, size, size).clamp(0, 255)


@lru_cache(maxsize=8)
def _colour_matrices(device: torch.device) -> tuple[Tensor, Tensor]:
    to = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return to.to(device), torch.linalg.inv(to.double()).float().to(device)


@lru_cache(maxsize=16)
def _cosines(side: int, device: torch.device) -> Tensor:
    """(side, side): the 8-point orthonormal cosine transform of every 8 pixels, block diagonal."""
    k = torch.arange(8, dtype=torch.float64)
    block = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) / 2
    block[0] /= 2**0.5
    return torch.block_diag(*[block] * (side // 8)).float().to(device)
