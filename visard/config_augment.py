"""What augmentation does to crops and how often: settings of `visard.data.augment`, and the presets.

In: a recipe's values or overrides. Out: `AugmentConfig`. No heavy import. Every probability is 0 at first, so nothing
is done; lengths in pixels are those of a 112 px crop and scale with the crop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from visard.errors import UserError

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class FramingConfig:
    """What of an image becomes the crop."""

    kind: Literal["crop", "photograph"] = "crop"
    """crop: images are crops already and used whole. photograph: images of any shape, of which training sees a random
    part, and evaluation the centre once the shorter side is 8/7 of the crop's (256 px for 224)."""
    area: Range = (0.08, 1.0)
    """photograph: of the random part, as part of the image."""
    aspect: Range = (0.75, 4 / 3)
    """photograph: width over height of the random part; its logarithm is uniform."""

    def __post_init__(self) -> None:
        _check(
            self.kind == "photograph" or (self.area, self.aspect) == ((0.08, 1.0), (0.75, 4 / 3)),
            "data.framing.area and aspect belong to kind photograph",
        )
        for name, value, lowest, highest in (("area", self.area, 0.001, 1.0), ("aspect", self.aspect, 0.1, 10.0)):
            _check(
                lowest <= value[0] <= value[1] <= highest,
                f"data.framing.{name} is {value}; use two increasing numbers from {lowest} to {highest}",
            )


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Moves and scales the crop, as a landmark detector's errors do. Landmarks move along."""

    probability: float = 0.0
    distance: float = 0.05
    """Largest shift along x and y, as part of the crop's side."""
    scale: Range = (0.95, 1.05)

    def __post_init__(self) -> None:
        _probability("shift", self.probability)
        _check(0 <= self.distance <= 0.5, f"data.augment.shift.distance is {self.distance}; use 0 to 0.5")
        _range("shift.scale", self.scale, 0.25, 4.0)


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Turns the crop about its centre. Landmarks move along."""

    probability: float = 0.0
    degrees: float = 10.0
    """Largest angle to either side."""

    def __post_init__(self) -> None:
        _probability("rotation", self.probability)
        _check(0 <= self.degrees <= 180, f"data.augment.rotation.degrees is {self.degrees}; use 0 to 180")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Blackens all but a random window, which stays where it is, as in AdaFace. Landmarks stay, some may be hidden."""

    probability: float = 0.0
    area: Range = (0.2, 1.0)
    """Of the window, as part of the crop."""

    def __post_init__(self) -> None:
        _probability("crop", self.probability)
        _range("crop.area", self.area, 0.01, 1.0)


@dataclass(frozen=True, kw_only=True)
class LightConfig:
    """Brightness, contrast and saturation by factors from 1 - x to 1 + x, gamma from 1 / (1 + x) to 1 + x."""

    probability: float = 0.0
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        _probability("light", self.probability)
        strengths = (self.brightness, self.contrast, self.saturation)
        _check(
            all(0 <= s <= 1 for s in strengths), "data.augment.light.brightness, contrast and saturation: use 0 to 1"
        )
        _check(0 <= self.gamma <= 4, f"data.augment.light.gamma is {self.gamma}; use 0 to 4")
        _check(
            max(*strengths, self.gamma) > 0 or self.probability == 0,
            "data.augment.light changes nothing: all strengths are 0",
        )


@dataclass(frozen=True, kw_only=True)
class GreyConfig:
    """Takes the colour away (luma of BT.601)."""

    probability: float = 0.0

    def __post_init__(self) -> None:
        _probability("grey", self.probability)


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """Gaussian blur."""

    probability: float = 0.0
    sigma: Range = (0.5, 2.0)
    """Pixels of a 112 px crop."""

    def __post_init__(self) -> None:
        _probability("blur", self.probability)
        _range("blur.sigma", self.sigma, 0.1, 20.0)


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Motion blur along a straight line in a random direction."""

    probability: float = 0.0
    length: Range = (3.0, 9.0)
    """Pixels of a 112 px crop."""

    def __post_init__(self) -> None:
        _probability("motion", self.probability)
        _range("motion.length", self.length, 1.0, 56.0)


@dataclass(frozen=True, kw_only=True)
class LowResolutionConfig:
    """Scales the crop down and up again, by one of five interpolations each, as in AdaFace."""

    probability: float = 0.0
    side: Range = (0.2, 1.0)
    """Of the small crop, as part of the crop's side."""

    def __post_init__(self) -> None:
        _probability("low_resolution", self.probability)
        _range("low_resolution.side", self.side, 0.02, 1.0)


@dataclass(frozen=True, kw_only=True)
class JpegConfig:
    """Compresses the crop once more."""

    probability: float = 0.0
    quality: tuple[int, int] = (30, 90)

    def __post_init__(self) -> None:
        _probability("jpeg", self.probability)
        _range("jpeg.quality", self.quality, 1, 100)


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Random erasing (arXiv:1708.04896): a rectangle of noise over the crop. Landmarks stay, some may be hidden."""

    probability: float = 0.0
    area: Range = (0.02, 0.25)
    """Of the rectangle, as part of the crop."""

    def __post_init__(self) -> None:
        _probability("erase", self.probability)
        _range("erase.area", self.area, 0.001, 1.0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to crops in training, in this order, after the mirror (`data.flip_probability`)."""

    shift: ShiftConfig = field(default_factory=ShiftConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    light: LightConfig = field(default_factory=LightConfig)
    grey: GreyConfig = field(default_factory=GreyConfig)
    blur: BlurConfig = field(default_factory=BlurConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    low_resolution: LowResolutionConfig = field(default_factory=LowResolutionConfig)
    jpeg: JpegConfig = field(default_factory=JpegConfig)
    erase: EraseConfig = field(default_factory=EraseConfig)


def preset(name: str) -> AugmentConfig:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--augment {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _probability(name: str, value: float) -> None:
    _check(0 <= value <= 1, f"data.augment.{name}.probability is {value}; use 0 to 1")


def _range(name: str, value: tuple[float, float], lowest: float, highest: float) -> None:
    good = len(value) == 2 and lowest <= value[0] <= value[1] <= highest
    _check(good, f"data.augment.{name} is {value}; use two increasing numbers from {lowest} to {highest}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


PRESETS: dict[str, AugmentConfig] = {
    "none": AugmentConfig(),
    "light": AugmentConfig(
        shift=ShiftConfig(probability=0.5, distance=0.03, scale=(0.97, 1.03)),
        rotation=RotationConfig(probability=0.3, degrees=5),
        light=LightConfig(probability=0.3, brightness=0.3, contrast=0.3, saturation=0.3),
        grey=GreyConfig(probability=0.02),
        low_resolution=LowResolutionConfig(probability=0.1, side=(0.4, 1.0)),
        jpeg=JpegConfig(probability=0.1, quality=(50, 95)),
    ),
    "strong": AugmentConfig(
        shift=ShiftConfig(probability=0.5),
        rotation=RotationConfig(probability=0.5),
        crop=CropConfig(probability=0.1, area=(0.4, 1.0)),
        light=LightConfig(probability=0.5, gamma=0.5),
        grey=GreyConfig(probability=0.1),
        blur=BlurConfig(probability=0.1),
        motion=MotionConfig(probability=0.1),
        low_resolution=LowResolutionConfig(probability=0.2),
        jpeg=JpegConfig(probability=0.2),
        erase=EraseConfig(probability=0.2),
    ),
    # Kim, Jain, Liu, AdaFace (CVPR 2022, arXiv:2204.00964), 4.1 and the settings of its published training scripts.
    "adaface": AugmentConfig(
        crop=CropConfig(probability=0.2, area=(0.2, 1.0)),
        light=LightConfig(probability=0.2, brightness=0.5, contrast=0.5, saturation=0.5),
        low_resolution=LowResolutionConfig(probability=0.2, side=(0.2, 1.0)),
    ),
}
"""Names of `visard train --augment`."""
