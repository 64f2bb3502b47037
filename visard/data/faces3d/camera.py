"""From rendered colours to a photograph: backdrop, lens and sensor, JPEG.

In: linear colours at raster resolution with the background marked. Out: uint8 RGB pictures.

Shapes: B images, H, W raster size, S picture size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from visard.data.faces3d.colours import hue
from visard.data.faces3d.latents import Latents, bell
from visard.data.faces3d.light import strength
from visard.data.faces3d.noise import SENSOR_SIZE, sensor_noise

__all__ = ["backdrop", "develop", "jpeg", "stretch_backdrop"]

_BACKDROP_ARRAY = 2
_COARSE, _FINE = 4, 9
# Kinds of blur, and the deviation of the worst in pixels of a 112 px crop.
BLURS, WORST_BLUR = 24, 1.5
# Pixels of a picture reduced together.
BLOCK = 28
# Pictures developed together on a CPU.
AT_ONCE = 8
# Pixels of a backdrop along a side, at most: it has a place on the faces' texture.
BACKDROP_MOST = 72


def backdrop(latents: Latents, raster: int) -> Tensor:
    """(B, 3, s, s) float32 linear: blurred rooms, walls, gradients and busy places.

    What lies behind the head is out of focus: a seventh of the raster's resolution is enough, to be stretched linearly
    over `raster` pixels, corner pixels on corner pixels (`stretch_backdrop`).
    """
    count = 3 * (_COARSE**2 + _FINE**2)
    numbers = bell(latents.passing_array(_BACKDROP_ARRAY, count)).float()
    coarse = numbers[:, : 3 * _COARSE**2].view(-1, 3, _COARSE, _COARSE)
    fine = numbers[:, 3 * _COARSE**2 :].view(-1, 3, _FINE, _FINE)
    # Mostly grey: rooms and streets are.
    fine = fine.mean(1, keepdim=True) * 0.85 + fine * 0.3
    coarse = coarse.mean(1, keepdim=True) * 0.9 + coarse * 0.45
    kind = latents.uniform("background kind").float()[:, None, None, None]
    side = min(-(-raster // 7), BACKDROP_MOST)
    soft, hard, slow = (_stretch(n, side, k, latents.device) for n, k in ((_FINE, 2), (_FINE, 0), (_COARSE, 2)))
    fine = fine * (kind > 0.25)
    picture = 0.7 * slow @ coarse @ slow.T + 0.5 * soft @ (fine * (kind <= 0.8)) @ soft.T
    picture = picture + 0.5 * hard @ (fine * (kind > 0.8)) @ hard.T
    tone = hue(
        latents.uniform("background hue"),
        latents.uniform("vignette") ** 2 * 0.5,
        latents.uniform("background light", 0.08, 0.95),
    )
    contrast = latents.uniform("background contrast", 0.02, 0.3).float()[:, None, None, None]
    return (picture * contrast + tone.float().sqrt()[:, :, None, None]).clamp_(0, 1).square_()


def stretch_backdrop(small_B3ss: Tensor, raster: int) -> Tensor:
    """(B, 3, raster, raster) the backdrop alone."""
    return resize(small_B3ss, size=(raster, raster), mode="bilinear", align_corners=True)


@lru_cache(maxsize=32)
def _stretch(places: int, size: int, order: int, device: torch.device) -> Tensor:
    """(size, places) that stretches a small line of pixels: order 0 in blocks, 2 smoothly."""
    at = torch.linspace(0, places - 1, size, dtype=torch.float64)[:, None] - torch.arange(places, dtype=torch.float64)
    if order == 0:
        return (at.round() == 0).float().to(device)
    near = (1 - at.abs()).clamp_min(0)
    return (near * near * (3 - 2 * near)).float().to(device)


def develop(linear_B3HW: Tensor, latents: Latents, size: int, *, scale: float) -> Tensor:
    """(B, S, S, 3) uint8: lens blur and reduction, exposure, tone, noise, JPEG.

    Args:
        linear_B3HW: (B, 3, H, W) linear colours.
        scale: raster pixels per picture pixel.
    """
    white = latents.uniform("white balance", -0.16, 0.16).float()
    gain = torch.stack([1 + 0.6 * white, torch.ones_like(white), 1 - 0.6 * white], 1)
    # The camera meters the light, as cameras do, and is half right.
    power, ambient = strength(latents)
    metered = (0.85 / (ambient + 0.5 * power)) ** 0.6
    gain = gain * (torch.exp2(latents.uniform("exposure", -0.45, 0.45)) * metered).float()[:, None]
    # Less colour and less or more contrast are one matrix.
    saturation = latents.uniform("saturation", 0.55, 1.15) * (latents.uniform("vignette") > 0.04)
    contrast = latents.uniform("contrast", 0.8, 1.15).float()[:, None, None]
    grey = torch.tensor([[0.299, 0.587, 0.114]], device=gain.device).expand(3, 3)
    own = torch.eye(3, device=gain.device) - grey
    matrix = contrast * (grey + saturation.float()[:, None, None] * own)

    blur = (latents.uniform("blur") * BLURS).long()
    noise_strength, noise_y, noise_x = _noise_place(latents, size)
    quality = latents.uniform("quality", 30, 97).float()
    out = torch.empty(len(latents), size, size, 3, dtype=torch.uint8, device=gain.device)
    # As in the rasteriser: few pictures at a time stay in a core's cache.
    some = len(latents) if gain.is_cuda else AT_ONCE
    for start in range(0, len(latents), some):
        part = slice(start, start + some)
        picture = reduce(linear_B3HW[part], blur[part], size, scale)
        picture = picture.mul_(gain[part, :, None, None]).clamp_min_(1e-5).sqrt_()
        # A shoulder instead of a hard clip of the lights: from 0.8 on a parabola that ends level, at 1.
        over = (picture - 0.8).clamp_(0, 0.4)
        picture = torch.minimum(picture, 0.8 + over - 1.25 * over * over)
        picture = torch.baddbmm(0.45 * (1 - contrast[part]), matrix[part], picture.flatten(2)).view_as(picture)
        _add_noise(picture, noise_strength[part], noise_y[part], noise_x[part])
        developed = jpeg(picture.mul_(255), quality[part]).round_().to(torch.uint8)
        for channel in range(3):
            out[part, ..., channel] = developed[:, channel]
    return out


def reduce(linear_B3HW: Tensor, blur_B: Tensor, size: int, scale: float) -> Tensor:
    """(B, 3, S, S): Gaussian blur and reduction in one, as a product with two matrices an image.

    The matrices are zero far from their diagonal, so they are taken in blocks, each with the pixels that it needs.

    Args:
        blur_B: (B,) int64, which of `BLURS` blurs.
    """
    batch, channels, height, width = linear_B3HW.shape
    rows = linear_B3HW.reshape(batch, channels * height, width)
    across = torch.cat(
        [
            rows[:, :, start : start + table.shape[2]] @ table.index_select(0, blur_B).transpose(1, 2)
            for start, table in _blurs(width, size, scale, linear_B3HW.device)
        ],
        2,
    ).view(batch * channels, height, size)
    blur_B = blur_B.repeat_interleave(channels)
    down = torch.cat(
        [
            table.index_select(0, blur_B) @ across[:, start : start + table.shape[2]]
            for start, table in _blurs(height, size, scale, linear_B3HW.device)
        ],
        1,
    )
    return down.view(batch, channels, size, size)


@lru_cache(maxsize=8)
def _blurs(length: int, size: int, scale: float, device: torch.device) -> list[tuple[int, Tensor]]:
    """Blocks of weights, from sharp to a deviation of `WORST_BLUR`; steps grow with the blur.

    Returns:
        For each block of `BLOCK` pixels of the picture the first raster pixel it needs, and (BLURS, pixels of the
        picture, pixels of the raster) float32.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = torch.arange(length, dtype=torch.float64)[None] - place[:, None]
    blur = (torch.arange(BLURS) / (BLURS - 1)) ** 3 * WORST_BLUR * size / 112
    deviation = ((blur * scale).square() + (0.42 * scale) ** 2).sqrt()
    weights = torch.exp(-0.5 * (distance[None] / deviation[:, None, None]).square().clamp_max(100))
    # Three deviations of the worst blur, beside which nothing is seen.
    reach = int(3 * float(deviation.max())) + 1
    blocks = []
    for first in range(0, size, BLOCK):
        mine = place[first : first + BLOCK]
        start = max(int(mine[0]) - reach, 0)
        part = weights[:, first : first + BLOCK, start : int(mine[-1]) + 2 + reach]
        blocks.append((start, (part / part.sum(2, keepdim=True)).float().to(device)))
    return blocks


def _noise_place(latents: Latents, size: int) -> tuple[list[float], list[int], list[int]]:
    """How strong each image's noise is, and where in the bank it begins."""
    free = max(SENSOR_SIZE - size, 1)
    top, left = ((latents.uniform(name) * free).long().tolist() for name in ("noise y", "noise x"))
    return (latents.uniform("noise") ** 3 * 0.05).tolist(), top, left


def _add_noise(picture_B3SS: Tensor, strength: list[float], top: list[int], left: list[int]) -> None:
    bank, size = sensor_noise(picture_B3SS.device), picture_B3SS.shape[-1]
    for picture, amount, t, x in zip(picture_B3SS, strength, top, left, strict=True):
        piece = bank[:, t : t + size, x : x + size]
        if piece.shape[-1] < size:
            piece = resize(piece[None], size=(size, size), mode="nearest")[0]
        picture.add_(piece, alpha=amount)


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
    device = picture_B3SS.device
    to_ycc, from_ycc = _colour_matrices(device)
    ycc = (to_ycc.expand(batch, 3, 3) @ picture_B3SS.clamp(0, 255).flatten(2)).view(batch, 3, size, size)
    if whole != size:
        ycc = torch.nn.functional.pad(ycc, (0, whole - size, 0, whole - size), mode="replicate")
    factor = torch.where(quality_B < 50, 5000 / quality_B, 200 - 2 * quality_B) / 100
    back = torch.empty_like(ycc)
    back[:, :1] = _quantise(ycc[:, :1] - 128, _luma(device), factor).add_(128)
    chroma = ycc[:, 1:, ::2] + ycc[:, 1:, 1::2]
    chroma = (chroma[..., ::2] + chroma[..., 1::2]).mul_(0.25)
    _enlarge(_quantise(chroma, _chroma(device), factor), back[:, 1:])
    back = back[:, :, :size, :size].reshape(batch, 3, -1)
    return (from_ycc.expand(batch, 3, 3) @ back).view(batch, 3, size, size).clamp_(0, 255)


def _quantise(plane_BCHW: Tensor, table: Tensor, factor_B: Tensor) -> Tensor:
    """Cosine transform of every 8 x 8 pixels, rounded to whole steps, and back."""
    batch, channels, height, width = plane_BCHW.shape
    cosines = _cosines(plane_BCHW.device)
    steps = (table * factor_B[:, None] + 0.5).floor_().clamp_(1, 255)[:, None]
    # (B, blocks, 64): a block's pixels side by side.
    blocks = plane_BCHW.view(batch, -1, 8, width // 8, 8).transpose(2, 3).reshape(batch, -1, 64)
    levels = (blocks @ cosines.T).div_(steps)
    below = levels.floor()
    nearest = levels.sub_(below).sub_(0.5 - RAMP).mul_(0.5 / RAMP).clamp_(0, 1).add_(below)
    blocks = nearest.mul_(steps) @ cosines
    return blocks.view(batch, -1, width // 8, 8, 8).transpose(2, 3).reshape(batch, channels, height, width)


def _enlarge(plane_BCHW: Tensor, out: Tensor) -> None:
    """Twice the size, bilinear: every pixel three quarters of the nearest and a quarter of the next one."""
    batch, channels, height, width = plane_BCHW.shape
    tall = plane_BCHW.new_empty(batch, channels, 2 * height, width)
    for source, target in ((plane_BCHW, tall), (tall.transpose(2, 3), out.transpose(2, 3))):
        torch.lerp(source[:, :, 1:], source[:, :, :-1], 0.25, out=target[:, :, 2::2])
        torch.lerp(source[:, :, :-1], source[:, :, 1:], 0.25, out=target[:, :, 1:-1:2])
        target[:, :, 0], target[:, :, -1] = source[:, :, 0], source[:, :, -1]


@lru_cache(maxsize=4)
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(_LUMA, device=device)


@lru_cache(maxsize=4)
def _chroma(device: torch.device) -> Tensor:
    return torch.tensor(_CHROMA, device=device)


@lru_cache(maxsize=8)
def _colour_matrices(device: torch.device) -> tuple[Tensor, Tensor]:
    to = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return to.to(device), torch.linalg.inv(to.double()).float().to(device)


@lru_cache(maxsize=4)
def _cosines(device: torch.device) -> Tensor:
    """(64, 64): the orthonormal cosine transform of 8 x 8 pixels, row by row."""
    k = torch.arange(8, dtype=torch.float64)
    block = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) / 2
    block[0] /= 2**0.5
    return torch.kron(block, block).float().to(device)
