"""Augmentation of uint8 crops: shift, rotation, window, light, grey, two blurs, low resolution, JPEG, erasing.

In: a `Sample` and its own generator (`transforms`), `AugmentConfig`. Out: a new `Sample` of the same size; landmarks
move with the pixels, the label stays. The order is fixed: how the face lies (shift and rotation are one warp, so that
pixels are interpolated once; then the window), how it is lit, what the camera and the file do to it, and last what
lies over it.

Each transformation has its own numbers, whether it is used or not: switching one on or off leaves the others as they
were for every image. All of them together depend on (seed, epoch, image id) alone.

S is the crop's side in pixels; image_SS3 is (S, S, 3) uint8 RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from visard.config_augment import AugmentConfig, LightConfig
from visard.data.transforms import Augment, Sample
from visard.records import Float32Array, UInt8Array

NAMES = tuple(f.name for f in fields(AugmentConfig))
"""The transformations, in their order."""

NUMBERS = 6
"""Uniform numbers that each transformation is given: the first says whether it is used."""

_LUMA = np.array([0.299, 0.587, 0.114])
_INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
_LEVELS = np.arange(256, dtype=np.float64)

FloatArray = NDArray[np.float64]


def augmentation(config: AugmentConfig) -> Augment | None:
    """The transformations of `config` as one, or None where none is ever used."""
    made = Augmentation(config)
    return made if made.probabilities.any() else None


def in_order(*augments: Augment | None) -> Augment | None:
    """One augmentation after the other, as one; None where there is none."""
    given = tuple(augment for augment in augments if augment is not None)
    return given[0] if len(given) == 1 else _InOrder(given) if given else None


@dataclass(frozen=True)
class Augmentation:
    """`augment(sample, generator) -> Sample`, as `config` says."""

    config: AugmentConfig

    @cached_property
    def probabilities(self) -> FloatArray:
        """Of each of `NAMES`."""
        c = self.config
        parts = (c.shift, c.rotation, c.crop, c.light, c.grey, c.blur, c.motion, c.low_resolution, c.jpeg, c.erase)
        return np.array([part.probability for part in parts])

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        numbers = generator.random((len(NAMES), NUMBERS))
        chosen = np.flatnonzero(numbers[:, 0] < self.probabilities).tolist()
        if not chosen:
            return sample
        uniform = {NAMES[i]: numbers[i, 1:] for i in chosen}
        config, image, points = self.config, sample.image, sample.points
        size = image.shape[0]
        if "shift" in uniform or "rotation" in uniform:
            matrix = _motion_of(config, uniform, size)
            image = warp(image, matrix)
            points = None if points is None else warp_points(points, matrix)
        if "crop" in uniform:
            image = window(image, *rectangle(size, config.crop.area, uniform["crop"], 4 / 3))
        if "light" in uniform:
            image = light(image, *_light_of(config.light, uniform["light"]))
        if "grey" in uniform:
            image = grey(image)
        if "blur" in uniform:
            image = blur(image, _within(config.blur.sigma, uniform["blur"][0]) * size / 112)
        if "motion" in uniform:
            length = _within(config.motion.length, uniform["motion"][0]) * size / 112
            image = motion_blur(image, length, uniform["motion"][1] * math.pi)
        if "low_resolution" in uniform:
            u = uniform["low_resolution"]
            down, up = (_INTERPOLATIONS[int(v * len(_INTERPOLATIONS))] for v in u[1:3])
            image = low_resolution(image, _within(config.low_resolution.side, u[0]), down, up)
        if "jpeg" in uniform:
            lowest, highest = config.jpeg.quality
            image = jpeg(image, lowest + int(uniform["jpeg"][0] * (highest - lowest + 1)))
        if "erase" in uniform:
            image = erase(image, *rectangle(size, config.erase.area, uniform["erase"], 10 / 3), generator)
        return Sample(image, points, sample.label, sample.id, sample.flipped, sample.extras)


def warp(image_SS3: UInt8Array, matrix_23: FloatArray) -> UInt8Array:
    """The crop moved by a matrix, bilinear; black where nothing was, as alignment leaves it."""
    size = image_SS3.shape[:2]
    return cv2.warpAffine(image_SS3, matrix_23, size, flags=cv2.INTER_LINEAR)  # type: ignore[return-value]


def warp_points(points_52: Float32Array, matrix_23: FloatArray) -> Float32Array:
    """Landmarks moved as the pixels are; they may leave the crop."""
    moved: Float32Array = (points_52 @ matrix_23[:, :2].T + matrix_23[:, 2]).astype(np.float32)
    return moved


def motion_matrix(size: int, angle_rad: float, scale: float, shift_x: float, shift_y: float) -> FloatArray:
    """(2, 3) float64: turned about the crop's centre (clockwise as seen, since y points down), scaled, then shifted.

    Args:
        size: S, pixels; the centre is at (S - 1) / 2.
        shift_x, shift_y: pixels.
    """
    cosine, sine, centre = scale * math.cos(angle_rad), scale * math.sin(angle_rad), (size - 1) / 2
    x = centre - cosine * centre + sine * centre + shift_x
    y = centre - sine * centre - cosine * centre + shift_y
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


def window(image_SS3: UInt8Array, top: int, left: int, height: int, width: int) -> UInt8Array:
    """The crop, black outside of a window that stays where it is.

    Source: AdaFace (arXiv:2204.00964), 4.1: not resized, unlike torchvision's RandomResizedCrop.
    """
    result = np.zeros_like(image_SS3)
    inside = slice(top, top + height), slice(left, left + width)
    result[inside] = image_SS3[inside]
    return result


def light(image_SS3: UInt8Array, brightness: float, contrast: float, saturation: float, gamma: float) -> UInt8Array:
    """Brightness and contrast (about the mean luma) and gamma as one table, then saturation (about each pixel's luma).

    All four are 1 where nothing changes. As torchvision's ColorJitter in this fixed order, but clipped once after the
    table, not after each part.
    """
    result = image_SS3
    if (brightness, contrast, gamma) != (1, 1, 1):
        mean = brightness * float(np.dot(cv2.mean(image_SS3)[:3], _LUMA))
        levels = np.clip((brightness * _LEVELS - mean) * contrast + mean, 0, 255)
        if gamma != 1:
            levels = 255 * (levels / 255) ** gamma
        result = cv2.LUT(result, np.rint(levels).astype(np.uint8))  # type: ignore[assignment]
    if saturation != 1:
        result = cv2.addWeighted(result, saturation, grey(result), 1 - saturation, 0)  # type: ignore[assignment]
    return result


def grey(image_SS3: UInt8Array) -> UInt8Array:
    """Three times the luma (ITU-R BT.601)."""
    return cv2.cvtColor(cv2.cvtColor(image_SS3, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def blur(image_SS3: UInt8Array, sigma: float) -> UInt8Array:
    """Gaussian blur; sigma in pixels."""
    return cv2.GaussianBlur(image_SS3, (0, 0), sigma)  # type: ignore[return-value]


def motion_blur(image_SS3: UInt8Array, length: float, angle_rad: float) -> UInt8Array:
    """The mean along a straight line through each pixel; length in pixels."""
    return cv2.filter2D(image_SS3, -1, line(length, angle_rad))  # type: ignore[return-value]


def line(length: float, angle_rad: float) -> Float32Array:
    """(k, k) float32 of sum 1: a line about the centre, k odd; each point shared by the four pixels around it."""
    half = max(0.0, (length - 1) / 2)
    reach = math.ceil(half)
    along = np.linspace(-half, half, 4 * reach + 1)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    x, y = along * math.cos(angle_rad) + reach + 1, along * math.sin(angle_rad) + reach + 1
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    right, below = x - column, y - row
    np.add.at(kernel, (row, column), (1 - below) * (1 - right))
    np.add.at(kernel, (row, column + 1), (1 - below) * right)
    np.add.at(kernel, (row + 1, column), below * (1 - right))
    np.add.at(kernel, (row + 1, column + 1), below * right)
    return (kernel / len(along)).astype(np.float32)


def low_resolution(image_SS3: UInt8Array, side: float, down: int, up: int) -> UInt8Array:
    """Scaled to `side` of the side length and back.

    Args:
        side: 0 to 1; the small crop has at least 2 pixels a side.
        down, up: OpenCV's interpolations.
    """
    size = image_SS3.shape[0]
    small = max(2, round(size * side))
    shrunk = cv2.resize(image_SS3, (small, small), interpolation=down)
    return cv2.resize(shrunk, (size, size), interpolation=up)  # type: ignore[return-value]


def jpeg(image_SS3: UInt8Array, quality: int) -> UInt8Array:
    """Compressed (4:2:0) and decompressed; quality 1 to 100."""
    bgr = cv2.cvtColor(image_SS3, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)  # type: ignore[return-value]


def erase(
    image_SS3: UInt8Array, top: int, left: int, height: int, width: int, generator: np.random.Generator
) -> UInt8Array:
    """A rectangle replaced by uniform noise. Source: random erasing (arXiv:1708.04896), RE-R."""
    result = image_SS3.copy()
    noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    result[top : top + height, left : left + width] = noise
    return result


def rectangle(size: int, area: tuple[float, float], uniform: FloatArray, widest: float) -> tuple[int, int, int, int]:
    """Top, left, height, width in pixels.

    Args:
        size: S, pixels.
        area: range of its part of the crop.
        uniform: at least four numbers from 0 to 1: area, shape, row, column.
        widest: largest width over height; the logarithm of that is uniform between its two ends. A side that is longer
            than the crop is cut to it, so that a rectangle of a large area may come out smaller.
    """
    root = size * math.sqrt(_within(area, uniform[0]))
    stretch = math.sqrt(widest) ** (2 * uniform[1] - 1)
    height, width = (min(size, max(1, round(side))) for side in (root / stretch, root * stretch))
    return int(uniform[2] * (size - height + 1)), int(uniform[3] * (size - width + 1)), height, width


@dataclass(frozen=True)
class _InOrder:
    augments: tuple[Augment, ...]

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        for augment in self.augments:
            sample = augment(sample, generator)
        return sample


def _within(limits: tuple[float, float], uniform: float) -> float:
    return float(limits[0] + (limits[1] - limits[0]) * uniform)


def _motion_of(config: AugmentConfig, uniform: dict[str, FloatArray], size: int) -> FloatArray:
    angle, scale, x, y = 0.0, 1.0, 0.0, 0.0
    if "rotation" in uniform:
        angle = math.radians(config.rotation.degrees) * (2 * uniform["rotation"][0] - 1)
    if "shift" in uniform:
        u = uniform["shift"]
        x, y = config.shift.distance * size * (2 * u[:2] - 1)
        scale = _within(config.shift.scale, u[2])
    return motion_matrix(size, angle, scale, x, y)


def _light_of(config: LightConfig, uniform: FloatArray) -> tuple[float, float, float, float]:
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = (1 + strength * (2 * u - 1) for strength, u in zip(strengths, uniform.tolist(), strict=False))
    brightness, contrast, saturation = factors
    return brightness, contrast, saturation, (1 + config.gamma) ** (2 * uniform[3] - 1)
