"""The head's shape in one image: template + lasting differences + age + expression + beard.

In: latents. Out: vertices of the head grid and of both ears in millimetres, not yet turned.

Shapes: B images, R rows, Q columns, M modes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from visard.data.faces3d.anatomy import anatomy, blob, smoothstep
from visard.data.faces3d.latents import Latents, bell
from visard.functional.surface import sample_grid

__all__ = ["EAR_SIDE", "age", "beard_cover", "ears", "head_vertices", "landmarks"]

EAR_SIDE = 11
_SHAPE_ARRAY = 1
# Fields (mm) and their weights are multiples of these, too fine to be seen, so that float32 adds their products
# exactly, in any order, on any device: all sums stay below 2^24 steps, which is 64 mm.
FIELD_STEP, WEIGHT_STEP = 2.0**-9, 2.0**-9
_EXPRESSIONS = ("open", "smile", "frown", "pucker", "brows up", "brows down")


def head_vertices(latents: Latents, beard_B: Tensor) -> Tensor:
    """(B, 3, R, Q) millimetres.

    Args:
        beard_B: (B,) thickness of the beard, 0 to 1.
    """
    template, fields = _fields(latents.device, latents.dtype)
    moved = _weights(latents, beard_B).float() @ fields
    return (template + moved).view(len(latents), 3, len(anatomy().height), -1)


def landmarks(latents: Latents, beard_B: Tensor) -> tuple[Tensor, Tensor]:
    """The five points and the 68 dense ones, as `head_vertices` has them.

    Returns:
        (B, 3, 73) mm; (73,) how far each turns with the head.
    """
    template, fields, turn = _landmark_fields(latents.device, latents.dtype)
    return (template + _weights(latents, beard_B) @ fields).view(len(latents), 3, -1), turn


def age(latents: Latents) -> Tensor:
    """(B,) 0 young adult to 1 old: the person's middle age, some years earlier or later."""
    return (latents.uniform("age", 0.05, 0.75) ** 1.2 + latents.uniform("age shift", -0.16, 0.16)).clamp(0, 1)


def ears(head_B3RQ: Tensor, latents: Latents) -> Tensor:
    """(B, 3, 2, EAR_SIDE, EAR_SIDE) millimetres: left and right ear, hung on the sides of the head."""
    shape_JJ3 = _ear_shape(latents.device, latents.dtype)
    row, column = _ear_place()
    size = (1 + 0.09 * latents.normal("ear size"))[:, None, None, None]
    out = (0.42 + 0.16 * latents.normal("ear out"))[:, None, None]
    local = shape_JJ3[None] * size
    back, up, lift = local.unbind(-1)
    # The ear's plane leaves the head backwards at the angle `out`.
    x = 1.0 + back * torch.sin(out) + lift * torch.cos(out)
    z = -back * torch.cos(out) + lift * torch.sin(out)
    sides = []
    for sign, q in ((-1.0, column), (1.0, head_B3RQ.shape[3] - 1 - column)):
        root = head_B3RQ[:, :, row, q, None, None]
        points = root + torch.stack([sign * (x - 2.5), up, z], 1)
        sides.append(points.flip(3) if sign < 0 else points)
    return torch.stack(sides, 2)


def _weights(latents: Latents, beard_B: Tensor) -> Tensor:
    """(B, M) how much of each field, in steps of `WEIGHT_STEP`."""
    weights = torch.cat([_shape_weights(latents), _moment_weights(latents), beard_B[:, None]], 1)
    return (weights / WEIGHT_STEP).round_() * WEIGHT_STEP


def _shape_weights(latents: Latents) -> Tensor:
    names = anatomy().shape_names
    weights = bell(latents.lasting_array(_SHAPE_ARRAY, len(names))).clamp(-2.2, 2.2)
    gender = latents.uniform("gender", -1.0, 1.0)
    shifts = {"jaw width": 0.6, "brow ridge": 0.7, "chin width": 0.5, "nose length": 0.3, "nose width": 0.3,
              "jaw corner": 0.5, "neck width": 1.0, "eye opening": -0.5, "upper lip": -0.4, "lower lip": -0.4,
              "brow height": -0.5, "face height": 0.4, "cheekbones": -0.2, "chin length": 0.4}  # fmt: skip
    shift = torch.tensor([shifts.get(name, 0.0) for name in names], dtype=latents.dtype, device=latents.device)
    return weights + gender[:, None] * shift


def _moment_weights(latents: Latents) -> Tensor:
    old = age(latents) - 0.35
    # Most mouths are shut or smile; a few are wide open.
    opened = (latents.uniform("open") - 0.62).clamp_min(0) * 2.3
    smile = (latents.uniform("smile", -0.5, 1.25)).clamp_min(0)
    frown = (latents.uniform("frown", -1.6, 1.0)).clamp_min(0) * (1 - smile.clamp_max(1))
    pucker = (latents.uniform("pucker", -5.0, 1.0)).clamp_min(0) * (1 - smile.clamp_max(1))
    up = (latents.uniform("brows up", -1.0, 1.0)).clamp_min(0)
    down = (latents.uniform("brows down", -1.2, 1.0)).clamp_min(0)
    return torch.stack([opened, smile, frown, pucker, up, down, old], 1)


@lru_cache(maxsize=4)
def _fields(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(3 R Q,) the template; (M, 3 R Q) float32 fields in steps of `FIELD_STEP`."""
    head = anatomy()
    expression = np.stack([head.expression[name] for name in _EXPRESSIONS])
    fields = np.concatenate([head.shape, expression, _age_field()[None], _beard_field()[None]])
    fields = np.round(np.moveaxis(fields, 3, 1) / FIELD_STEP) * FIELD_STEP
    template = torch.from_numpy(np.moveaxis(head.template, 2, 0).reshape(-1)).to(dtype).to(device)
    return template, torch.from_numpy(fields.reshape(len(fields), -1)).float().to(device)


@lru_cache(maxsize=4)
def _landmark_fields(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # Bilinear sampling commutes with the sum of fields: sampled fields give sampled vertices.
    head = anatomy()
    template, fields = _fields(device, dtype)
    places = torch.from_numpy(np.concatenate([head.five, head.dense])).to(dtype).to(device)
    grid = torch.cat([template[None], fields.to(dtype)]).view(len(fields) + 1, 3, len(head.height), -1)
    sampled = sample_grid(grid, places[:, 0], places[:, 1]).flatten(1)
    turn = np.interp(places[:, 0].cpu().numpy(), np.arange(len(head.height)), head.turn)
    return sampled[0], sampled[1:], torch.from_numpy(turn).to(dtype).to(device)


def _age_field() -> np.ndarray:
    """Sagging cheeks and jowls, thinner lips, a longer nose, hollow temples: mm for the whole span of age."""
    head = anatomy()
    flat = head.flat
    x = flat[..., 0]
    down = -3.5 * blob(flat, 36, -62, 16, 18) - 2.0 * blob(flat, 0, -42, 14, 9) - 1.6 * blob(flat, 34, 10, 16, 6)
    deep = (
        -2.0 * blob(flat, 27, -52, 4, 10) - 1.5 * blob(flat, 28, -12, 11, 5) - 1.4 * blob(flat, 0, -67, 20, 7)
        + 2.2 * blob(flat, 34, -86, 9, 9) + 3.0 * blob(flat, 0, -124, 26, 9)
    )  # fmt: skip
    front = 1 - smoothstep(62, 95, np.abs(head.angle))[None]
    return np.stack([np.sign(x) * 1.5 * blob(flat, 40, -84, 12, 12), down, deep], -1) * front[..., None]


def beard_cover() -> np.ndarray:
    """(3, R, Q) where moustache, chin beard and cheek beard grow, 0 to 1."""
    head = anatomy()
    x, y = head.flat[..., 0], head.flat[..., 1]
    ax = np.abs(x)
    angle = np.abs(head.angle)[None] * np.ones_like(x)
    lips = 1 - smoothstep(0.75, 1.15, np.sqrt((x / 27) ** 2 + ((y + 67.5) / 10.5) ** 2))
    moustache = np.exp(-((ax / 22) ** 4) - np.abs((y + 57.5 - 0.008 * ax**2 * -1) / 4.8) ** 3)
    moustache = np.maximum(moustache, np.exp(-(np.abs((ax - 27) / 4.5) ** 3) - np.abs((y + 68) / 11) ** 3))
    chin = np.exp(-((ax / 24) ** 4) - np.abs((y + 101) / 20) ** 4)
    line = np.interp(ax, [0, 25, 40, 52, 60, 80], [-200, -80, -62, -45, -30, -20])
    cheek = (1 - smoothstep(line - 9, line + 3, y)) * smoothstep(-142, -122, y) * (1 - smoothstep(66, 76, angle))
    return np.stack([moustache, chin, cheek]) * (1 - lips) * (angle < 90)


def _beard_field() -> np.ndarray:
    head = anatomy()
    cover = beard_cover().max(0) * smoothstep(-140, -108, head.flat[..., 1])
    outward = np.stack([head.template[..., 0], -0.3 * np.abs(head.template[..., 2]), head.template[..., 2]], -1)
    outward /= np.maximum(np.linalg.norm(outward, axis=-1, keepdims=True), 1)
    return 7.0 * cover[..., None] * outward


@lru_cache(maxsize=1)
def _ear_place() -> tuple[int, int]:
    head = anatomy()
    return int(np.argmin(np.abs(head.height + 16))), int(np.argmin(np.abs(head.angle + 90)))


@lru_cache(maxsize=4)
def _ear_shape(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(J, J, 3) mm: back, up, lift off the ear's plane. An oval dish with a rolled rim, narrower at the lobe."""
    t = np.linspace(-1, 1, EAR_SIDE)
    v, u = np.meshgrid(-t, t, indexing="ij")
    # A square grid pressed into a disc.
    x, y = u * np.sqrt(1 - v * v / 2), v * np.sqrt(1 - u * u / 2)
    r = np.sqrt(x * x + y * y)
    wide = 15.5 * (0.78 + 0.22 * y)
    back = 13.0 + wide * x - 3.0 * y
    up = 31.0 * y + 2.0 * x
    rim = np.exp(-(((r - 0.88) / 0.14) ** 2)) * (x > -0.75)
    inner = np.exp(-(((r - 0.52) / 0.12) ** 2)) * (x > -0.3) * (y > -0.5)
    bowl = np.exp(-((x + 0.25) ** 2 + (y + 0.12) ** 2) / 0.09)
    lift = 3.4 * rim + 1.8 * inner - 4.0 * bowl - 6.0 * (r > 0.985)
    return torch.from_numpy(np.stack([back, up, lift], -1)).to(dtype).to(device)
