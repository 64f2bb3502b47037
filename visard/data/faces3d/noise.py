"""Fixed noise pictures, made once from a formula, for skin, hair and sensors; images take them at hashed offsets."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from visard.data.faces3d.latents import bell, uniforms

SENSOR_SIZE = 512


@lru_cache(maxsize=8)
def sensor_noise(device: torch.device) -> Tensor:
    """(3, 512, 512) float32, independent, deviation about 1."""
    zero = np.zeros(1, np.int64)
    flat = uniforms(7, zero, zero, np.arange(3 * SENSOR_SIZE * SENSOR_SIZE))[0]
    noise = bell(torch.from_numpy(flat)).clamp(-3, 3).to(torch.float32)
    return noise.view(3, SENSOR_SIZE, SENSOR_SIZE).to(device)


@lru_cache(maxsize=32)
def soft_noise(seed: int, count: int, rows: int, columns: int, wide: float, tall: float) -> Tensor:
    """(count, rows, columns) float32, deviation 1: white noise blurred by `wide` columns and `tall` rows
    (deviations)."""
    zero = np.zeros(1, np.int64)
    flat = uniforms(seed, zero, zero, np.arange(count * rows * columns))[0]
    noise = bell(torch.from_numpy(flat)).view(count, rows, columns)
    noise = _blur_matrix(rows, tall) @ noise @ _blur_matrix(columns, wide).T
    noise = noise - noise.mean((1, 2), keepdim=True)
    return (noise / noise.std((1, 2), keepdim=True)).to(torch.float32)


def _blur_matrix(size: int, deviation: float) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((place[:, None] - place[None]) / max(deviation, 1e-3)) ** 2)
    return weights / weights.sum(1, keepdim=True)
