"""Counter-based random numbers: every number is a hash of (seed, identity, image, slot), and of nothing else.

In: who and which image. Out: named uniform or normal numbers, the same for ever, on any machine, in any order or
batch. A name's number in the tables of slots.py never changes.

Shapes: B images, M numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visard.data.faces3d.slots import IDENTITY_SLOTS, IMAGE_SLOTS

__all__ = ["Latents", "uniforms"]

# The image number that stands for "the same in all images of this identity".
LASTING = 2**62
# Slots from here on are for arrays of numbers (noise grids, mode weights); below, one slot a name.
ARRAY_SLOT = 4096


def uniforms(
    seed: int, identity_B: NDArray[np.int64], image_B: NDArray[np.int64], slots_M: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Numbers in (0, 1), one for each image and slot.

    A round of SplitMix64's finaliser for each part of the key. Source: Steele, Lea, Flood, "Fast splittable
    pseudorandom
    number generators" (2014).

    Returns:
        (B, M) float64.
    """
    key = _mix(np.array([seed], np.int64).view(np.uint64) + _GOLDEN)
    key_B = _mix(_mix(key + identity_B.view(np.uint64) * _GOLDEN) + image_B.view(np.uint64) * _SILVER)
    bits_BM = _mix(key_B[:, None] + (slots_M.view(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits_BM >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class Latents:
    """The numbers behind a batch of images, float64 on a device.

    Args:
        seed: of the whole data set.
        identity_B: (B,) int64, who.
        image_B: (B,) int64, which image of the identity.
        device: where the numbers are wanted.
        dtype: float64 wherever the device has it, so that hard decisions fall the same everywhere.
    """

    def __init__(
        self,
        seed: int,
        identity_B: NDArray[np.int64],
        image_B: NDArray[np.int64],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.seed, self.device, self.dtype = seed, device, dtype
        self.identity, self.image = identity_B.astype(np.int64), image_B.astype(np.int64)
        self._always = np.full_like(self.identity, LASTING)
        lasting = self._draw(self._always, 0, len(IDENTITY_SLOTS))
        numbers = torch.cat([lasting, self._draw(self.image, 0, len(IMAGE_SLOTS))], 1).T.contiguous()
        # All names at once: one by one, such small tensors cost more in calls than in numbers.
        self._uniform = dict(zip((*IDENTITY_SLOTS, *IMAGE_SLOTS), numbers.unbind(), strict=True))
        self._bell = dict(zip(self._uniform, bell(numbers).unbind(), strict=True))

    def __len__(self) -> int:
        return len(self.identity)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) numbers between `low` and `high`; `name` from `IDENTITY_SLOTS` (lasting) or `IMAGE_SLOTS` (this
        image)."""
        value = self._uniform[name]
        return value if (low, high) == (0, 1) else low + (high - low) * value

    def normal(self, name: str, deviation: float = 1.0, limit: float = 2.5) -> Tensor:
        """(B,) numbers around 0, bell-shaped, cut at `limit` deviations."""
        return deviation * self._bell[name].clamp(-limit, limit)

    def chance(self, name: str, probability: float) -> Tensor:
        """(B,) bool, true with this probability."""
        return self.uniform(name) < probability

    def lasting_array(self, place: int, count: int) -> Tensor:
        """(B, count) numbers in (0, 1) of the identity; `place` (from 1) numbers the array."""
        return self._draw(self._always, ARRAY_SLOT * place, count)

    def passing_array(self, place: int, count: int) -> Tensor:
        """(B, count) numbers in (0, 1) of this image; `place` (from 1) numbers the array."""
        return self._draw(self.image, ARRAY_SLOT * place, count)

    def _draw(self, image_B: NDArray[np.int64], first: int, count: int) -> Tensor:
        numbers = uniforms(self.seed, self.identity, image_B, np.arange(first, first + count))
        return torch.from_numpy(numbers).to(self.dtype).to(self.device)


def bell(uniform: Tensor) -> Tensor:
    """A number close to standard normal from a uniform one: the logistic curve that is nearest to the normal one."""
    return torch.log(uniform / (1 - uniform)) / 1.702


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SILVER = np.uint64(0xD1B54A32D192ED03)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
