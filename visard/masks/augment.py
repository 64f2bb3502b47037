"""Masks while training: some crops of every epoch get one, drawn from (seed, epoch, image id) and from nothing else.

In: a sample of the loader (its `image`, `points`, `extras`), its generator, `MaskConfig`. Out: the sample with a mask
on or as it was, and in its extras what was done:

    mask_region      0 = none, 1 = over nose and mouth, 2 = mouth only, 3 = chin
    mask_tool        0 = none, 1 = `uv` (3D), 2 = `template` (2D)
    log_masked       1.0 or 0.0; the run's log has the mean of what begins with log_
    log_mask_refused 1.0 where a mask was drawn, but the face is turned too far or its points are wrong

A crop without points is taken for one whose points lie where alignment puts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from visard.config_masks import KindShares, MaskConfig, WearingShares
from visard.functional import geometry
from visard.masks import template
from visard.masks.records import DRAWN, WEARINGS, Look, Masked, Refusal, draw_look
from visard.records import Float32Array, UInt8Array

__all__ = ["TOOLS", "MaskAugment", "jpeg", "mask_augment", "shares_of", "template_points", "tool"]

Wear = Callable[[UInt8Array, Float32Array, Look], Masked | Refusal]

TOOLS = ("uv", "template")
"""Number in `mask_tool` less 1 -> name."""


def mask_augment(config: MaskConfig) -> MaskAugment | None:
    """The augmentation, or None where no crop is ever masked."""
    return MaskAugment(config) if config.probability > 0 else None


@dataclass(frozen=True)
class MaskAugment:
    """`augment(sample, generator) -> sample`, as `config` says."""

    config: MaskConfig

    def __call__(self, sample: Any, generator: np.random.Generator) -> Any:
        config = self.config
        drawn, by_uv = generator.random(2).tolist()
        masked: Masked | Refusal | None = None
        name = TOOLS[0 if by_uv < config.uv_share else 1]
        if drawn < config.probability:
            look = draw_look(generator, *self._shares)
            points = template_points(sample.image.shape[0]) if sample.points is None else sample.points
            masked = tool(name)(sample.image, points, look)
        else:
            generator.random(DRAWN)  # what comes after draws the same numbers whether there is a mask or not
        if masked is None:
            return _told(sample, sample.image, _UNMASKED)
        if isinstance(masked, str):
            return _told(sample, sample.image, _UNMASKED | {"log_mask_refused": np.float32(1)})
        image = jpeg(masked.image, look.jpeg) if config.jpeg and look.jpeg is not None else masked.image
        region, number = 1 + WEARINGS.index(masked.wearing), 1 + TOOLS.index(name)
        return _told(
            sample, image, _UNMASKED | {"mask_region": region, "mask_tool": number, "log_masked": np.float32(1)}
        )

    @cached_property
    def _shares(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return shares_of(self.config.kinds, self.config.wearings)


_UNMASKED: dict[str, Any] = {
    "mask_region": 0,
    "mask_tool": 0,
    "log_masked": np.float32(0),
    "log_mask_refused": np.float32(0),
}


def _told(sample: Any, image: UInt8Array, extras: dict[str, Any]) -> Any:
    return replace(sample, image=image, extras={**sample.extras, **extras})


def shares_of(kinds: KindShares, wearings: WearingShares) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How often each of `records.KINDS` and `records.WEARINGS` is drawn; each of sum 1."""
    first = (kinds.surgical, kinds.cloth, kinds.kn95, kinds.n95, kinds.bandana, kinds.respirator)
    second = (wearings.right, wearings.under_nose, wearings.chin)
    return tuple(share / sum(first) for share in first), tuple(share / sum(second) for share in second)


def tool(name: str) -> Wear:
    """The `wear` of "uv" or "template"."""
    if name == "uv":
        from visard.masks import uv

        return uv.wear
    return template.wear


def template_points(size: int) -> Float32Array:
    """(5, 2) float32: where alignment puts the points of a frontal face."""
    return geometry.template(size).astype(np.float32)


def jpeg(image: UInt8Array, quality: int) -> UInt8Array:
    """The crop compressed (4:2:0) and decompressed."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)  # type: ignore[return-value]
