"""What the two mask tools share: the mask that is worn, how it is drawn at random, and why a crop is refused.

In: a numpy generator, seeded by the caller (by image id, so that a look does not depend on order or process). Out: a
`Look`, which both tools turn into a `Masked` crop; or a `Refusal`: a crop that cannot be masked rightly is left out and
counted, never smeared.

S is the crop's side in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from visard.records import UInt8Array

__all__ = ["KINDS", "REFUSALS", "WEARINGS", "Kind", "Look", "Masked", "Refusal", "Wearing", "count", "draw_look"]

Kind = Literal["surgical", "cloth", "kn95", "n95", "bandana", "respirator"]
Wearing = Literal["right", "under-nose", "chin"]
Refusal = Literal["profile", "points", "outside", "unlike"]
"""Why a crop is not masked: the face is turned too far; the points are not finite, coincide or are not as many as a
tool understands; the face lies outside of the crop or is too small or too large for it; the points are not those of a
face (a bad fit)."""

KINDS: tuple[Kind, ...] = get_args(Kind)
WEARINGS: tuple[Wearing, ...] = get_args(Wearing)
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)

RGB = tuple[int, int, int]

KIND_SHARES = (0.44, 0.22, 0.13, 0.09, 0.07, 0.05)
"""How often each of `KINDS` is drawn: what streets show, not a measurement."""
WEARING_SHARES = (0.86, 0.09, 0.05)

DRAWN = 24
"""Uniform numbers that `draw_look` takes."""

COLOURS: dict[Kind, tuple[RGB, ...]] = {
    "surgical": (
        (158, 196, 222), (140, 186, 216), (172, 207, 226), (150, 204, 205), (226, 231, 235), (236, 238, 238),
        (128, 190, 172), (232, 190, 204), (196, 184, 220), (44, 45, 48),
    ),
    "cloth": (
        (36, 36, 40), (22, 30, 56), (120, 24, 34), (196, 190, 178), (92, 96, 102), (38, 74, 60), (182, 120, 96),
        (208, 170, 60), (88, 118, 160), (150, 84, 120), (232, 230, 224), (64, 48, 40),
    ),
    "kn95": ((238, 238, 236), (228, 230, 232), (242, 240, 234), (40, 41, 44), (150, 154, 160), (206, 176, 168)),
    "n95": ((236, 235, 230), (228, 228, 226), (240, 238, 228), (222, 214, 196)),
    "bandana": ((150, 26, 34), (24, 30, 66), (24, 24, 26), (52, 84, 62), (212, 206, 196), (86, 60, 110)),
    "respirator": ((72, 76, 82), (112, 118, 124), (44, 46, 50), (150, 130, 126), (60, 84, 110)),
}  # fmt: skip
"""Base colours, sRGB."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything that is drawn at random about one mask.

    Args:
        kind: what is worn.
        wearing: how: over nose and chin, the nose free, or under the chin.
        size: the mask's size, 1 = the kind's usual one on an average face (0.88..1.14).
        colour: base colour, sRGB 0..255.
        pattern: number of a pattern; 0 = plain, others mean what `texture` makes of them.
        pattern_seed: of the pattern's places and second colour.
        folds: how deep pleats or seams show, 0..1.
        logo_seed: of a logo or print on it; None = none.
        wrinkle_seed: of creases.
        wrinkles: how deep they are, 0..1.
        drop: how much lower than usual it sits, in mask heights (-0.04..0.08).
        tilt: how far it hangs askew, radians, positive clockwise as the viewer sees it.
        slack: how far it stands off the skin, 1 = usual (0.5..1.6).
        loops: colour of the ear loops or straps, sRGB.
        shadow: strength of its shadow on the skin, 0..1.
        jpeg: quality that the finished crop is compressed with, None = it is not. The caller's job, not a tool's.
    """

    kind: Kind
    wearing: Wearing = "right"
    size: float = 1.0
    colour: RGB = (158, 196, 222)
    pattern: int = 0
    pattern_seed: int = 0
    folds: float = 0.6
    logo_seed: int | None = None
    wrinkle_seed: int = 0
    wrinkles: float = 0.4
    drop: float = 0.0
    tilt: float = 0.0
    slack: float = 1.0
    loops: RGB = (236, 236, 234)
    shadow: float = 0.6
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.wearing not in WEARINGS:
            raise ValueError(f"mask wearing {self.wearing!r} is unknown; use one of {', '.join(WEARINGS)}")


@dataclass(frozen=True)
class Masked:
    """A crop with a mask on.

    Args:
        image: (S, S, 3) uint8 RGB.
        region: (S, S) uint8, how much of a pixel the mask covers, 0..255; loops and straps are not counted.
        kind: what is worn.
        wearing: how.
    """

    image: UInt8Array
    region: UInt8Array
    kind: Kind
    wearing: Wearing

    def __post_init__(self) -> None:
        assert self.image.shape == (*self.region.shape, 3), (self.image.shape, self.region.shape)
        assert self.image.dtype == self.region.dtype == np.uint8


def draw_look(
    generator: np.random.Generator,
    kind_shares: Sequence[float] = KIND_SHARES,
    wearing_shares: Sequence[float] = WEARING_SHARES,
) -> Look:
    """A mask at random; the same generator state gives the same mask.

    Args:
        generator: gives `DRAWN` uniform numbers.
        kind_shares, wearing_shares: how often each of `KINDS` and `WEARINGS` is drawn, of sum 1.

    Every number has its own place in the stream, so that a new one can be added at the end without changing the others.
    """
    u = generator.random(DRAWN)
    kind = KINDS[_choice(kind_shares, u[0])]
    wearing = WEARINGS[_choice(wearing_shares, u[1])]
    base = COLOURS[kind][int(u[2] * len(COLOURS[kind]))]
    # Dye and washing: a common factor, and a little for each channel.
    factor = 0.92 + 0.14 * u[3]
    colour = [min(max(round(c * factor + 12 * (u[4 + k] - 0.5)), 8), 248) for k, c in enumerate(base)]
    dark = sum(base) < 220
    loop_grey = 40 if dark and u[7] < 0.8 else 238 - round(14 * u[7])
    loops = (226, 196, 120) if kind == "n95" and u[7] < 0.5 else (loop_grey, loop_grey, loop_grey)
    # A chin mask is pulled far enough to hold there; the kinds with a hard shell are not worn under the nose.
    if kind in ("n95", "respirator") and wearing != "right":
        wearing = "right"
    return Look(
        kind=kind,
        wearing=wearing,
        size=0.92 + 0.18 * float(u[8]),
        colour=(colour[0], colour[1], colour[2]),
        pattern=0 if u[9] < (0.45 if kind in ("cloth", "bandana") else 0.94) else 1 + int(u[10] * 1000),
        pattern_seed=int(u[11] * 2**31),
        folds=0.35 + 0.65 * float(u[12]),
        logo_seed=int(u[13] * 2**31) if u[14] < (0.12 if kind in ("cloth", "kn95", "n95") else 0.02) else None,
        wrinkle_seed=int(u[15] * 2**31),
        wrinkles=float(u[16]),
        drop=-0.03 + 0.08 * float(u[17]),
        tilt=0.09 * float(u[18] + u[19] - 1),
        slack=0.7 + 0.6 * float(u[20]),
        loops=loops,
        shadow=0.4 + 0.5 * float(u[21]),
        jpeg=40 + round(50 * float(u[23])) if u[22] < 0.3 else None,
    )


def count(refusals: Iterable[Refusal]) -> dict[Refusal, int]:
    """How often each reason was given, all of `REFUSALS` named."""
    counter = Counter(refusals)
    return {reason: counter[reason] for reason in REFUSALS}


def _choice(shares: Sequence[float], uniform: float) -> int:
    """Index into `shares` (which sum to 1) that a number in 0..1 falls on."""
    edge = 0.0
    for index, share in enumerate(shares):
        edge += share
        if uniform < edge:
            return index
    return len(shares) - 1
