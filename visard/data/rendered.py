"""Rendered faces as a data set: any number of people of clay, nothing on disk. The project's embedded default data.

In: how many identities and images, a seed, the crop size. Out: aligned crops with identity, image id, landmarks,
pose and the surface itself. Image i of identity j is a pure function of (seed, j, i): the same for ever, in any
order, batch or rank.

Shapes: B images a batch, N images in the data set, S crop size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from visard.data.faces3d.latents import Latents
from visard.data.faces3d.photograph import Photographs, person_points, render_photographs
from visard.data.faces3d.scene import Rendering, render_crops, render_images, true_points
from visard.errors import UserError

__all__ = ["RenderedConfig", "RenderedFaces"]

# Images worked on at once: on the CPU so many that their arrays stay in the cache, on a GPU so many that it is busy.
CHUNK_CPU, CHUNK_GPU = 32, 256


@dataclass(frozen=True, kw_only=True)
class RenderedConfig:
    """Which rendered faces."""

    identities: int = 200
    """How many people."""
    images_per_identity: int = 20
    """How many images of each."""
    seed: int = 0
    """Another seed is another population."""
    size: int = 112
    """Crop size in pixels."""
    first_identity: int = 0
    """Number of the first identity; training and evaluation take ranges that do not overlap."""

    def __post_init__(self) -> None:
        for name, least in (
            ("identities", 1),
            ("images_per_identity", 1),
            ("first_identity", 0),
            ("seed", 0),
            ("size", 16),
        ):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"rendered faces: {name} is {value}; use {least} or more")
        if self.size > 1024:
            raise UserError(f"rendered faces: size is {self.size} px; use 16 to 1024")


class RenderedFaces:
    """A map-style data set of rendered crops; index = identity-major image number.

    Args:
        identities, images_per_identity, seed, size, first_identity: see `RenderedConfig`.
        device: where crops are made.

    Attributes:
        config: the above.
        size: S, crop size in pixels.
        identities: C names of the identities.
        ids: N image ids "identity/image".
    """

    def __init__(
        self,
        identities: int = 200,
        images_per_identity: int = 20,
        seed: int = 0,
        size: int = 112,
        first_identity: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = RenderedConfig(
            identities=identities,
            images_per_identity=images_per_identity,
            seed=seed,
            size=size,
            first_identity=first_identity,
        )
        self.size = size
        self.device = torch.device(device)
        self._labels: NDArray[np.int64] | None = None
        self.identities: Sequence[str] = _Names(first_identity, identities)
        self.ids: Sequence[str] = _Names(first_identity, identities, images_per_identity)

    def __len__(self) -> int:
        return self.config.identities * self.config.images_per_identity

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class number of every image, 0 to identities - 1; made when first asked for."""
        if self._labels is None:
            self._labels = np.repeat(np.arange(self.config.identities, dtype=np.int64), self.config.images_per_identity)
        return self._labels

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes make their own labels: eight bytes an image need not travel.
        return {**self.__dict__, "_labels": None}

    def image(self, index: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB."""
        return self.images([index])[0]

    def points(self, index: int) -> NDArray[np.float32]:
        """(5, 2) float32 crop pixels x, y: eyes, nose tip, mouth corners."""
        return self.all_points([index])[0]

    def all_points(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, 5, 2) float32: `points` of all indices; no picture is made for it."""
        return true_points(self.latents(indices), self.size).cpu().numpy()

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, S, S, 3) uint8 RGB: `image` of all indices, made together."""
        parts = [render_images(self.latents(part), self.size) for part in self._parts(indices)]
        return torch.cat(parts).cpu().numpy()

    def render(self, indices: Sequence[int] | NDArray[np.int64]) -> Rendering:
        """Everything about these images, on the data set's device."""
        parts = [render_crops(self.latents(part), self.size) for part in self._parts(indices)]
        columns: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])}
        return Rendering(**columns)

    def photographs(
        self, indices: Sequence[int] | NDArray[np.int64], size: int = 256, *, faces: int = 1
    ) -> Photographs:
        """The same people in photographs that are not aligned.

        Args:
            size: of the square photographs, pixels.
            faces: 0 nobody, 1 the person, 2 the person before a stranger.
        """
        parts = [render_photographs(self.latents(part), size, faces=faces) for part in self._parts(indices)]
        columns: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])}
        return Photographs(**columns)

    def photograph_points(self, indices: Sequence[int] | NDArray[np.int64], size: int = 256) -> NDArray[np.float32]:
        """(B, 5, 2) float32: the person's landmarks in `photographs`; no picture is made for it."""
        return person_points(self.latents(indices), size).cpu().numpy()

    def latents(self, indices: Sequence[int] | NDArray[np.int64]) -> Latents:
        """The numbers behind these images."""
        index_B = np.asarray(indices, np.int64).reshape(-1)
        identity = self.config.first_identity + index_B // self.config.images_per_identity
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return Latents(self.config.seed, identity, index_B % self.config.images_per_identity, self.device, dtype)

    def _parts(self, indices: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.int64]]:
        index_B = np.asarray(indices, np.int64).reshape(-1)
        if len(index_B) == 0 or index_B.min() < 0 or index_B.max() >= len(self):
            raise IndexError(f"rendered faces: indices must be 0 to {len(self) - 1} and at least one")
        chunk = CHUNK_GPU if self.device.type == "cuda" else CHUNK_CPU
        return [index_B[start : start + chunk] for start in range(0, len(index_B), chunk)]


class _Names(Sequence[str]):
    """Names of identities ("0000007") or, with images, of their images ("0000007/0003"): a million without a
    million strings."""

    def __init__(self, first: int, identities: int, images: int | None = None) -> None:
        self._first, self._identities, self._images = first, identities, images

    def __len__(self) -> int:
        return self._identities * (1 if self._images is None else self._images)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} names")
        number = int(index) % len(self)
        if self._images is None:
            return f"{self._first + number:07d}"
        identity, image = divmod(number, self._images)
        return f"{self._first + identity:07d}/{image:04d}"
