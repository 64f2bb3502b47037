"""Settings of the classifier: margins, centres, queue.

In: a recipe's values. Out: `HeadConfig`, a section of `config.Recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from visard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """The general margin cos(m1 * theta + m2) - m3 on the target, and the scale of all logits (ArcFace, Eq. 4)."""

    kind: Literal["combined"] = "combined"
    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    scale: float = 64.0
    gradient: Literal["exact", "straight-through"] = "exact"
    """"straight-through" repeats arcface_torch's estimator: the margin is applied without a gradient of its own."""

    def __post_init__(self) -> None:
        _check(self.scale > 0, f"head.margin.scale is {self.scale}; it must be above 0")
        _check(self.m1 > 0, f"head.margin.m1 is {self.m1}; it must be above 0")
        _check(self.m2 >= 0 and self.m3 >= 0, "head.margin.m2 and m3 must not be negative")


@dataclass(frozen=True, kw_only=True)
class AdaFaceConfig:
    """A margin that is angular for poor images and additive for good ones, told apart by norm (arXiv:2204.00964)."""

    kind: Literal["adaface"] = "adaface"
    m: float = 0.4
    h: float = 0.333
    """How far one standard deviation of the norm moves the margin between its two ends."""
    t_alpha: float = 0.01
    """Weight of the present step in the running mean and deviation of the norms."""
    scale: float = 64.0
    gradient: Literal["exact", "straight-through"] = "exact"

    def __post_init__(self) -> None:
        _check(self.scale > 0, f"head.margin.scale is {self.scale}; it must be above 0")
        _check(0 < self.m < 1.5, f"head.margin.m is {self.m}; use above 0 to below 1.5")
        _check(self.h > 0, f"head.margin.h is {self.h}; it must be above 0")
        _check(0 < self.t_alpha <= 1, f"head.margin.t_alpha is {self.t_alpha}; use above 0 to 1")


@dataclass(frozen=True, kw_only=True)
class CurricularFaceConfig:
    """ArcFace's margin, and hard negatives that weigh more the further training has come (arXiv:2004.00288)."""

    kind: Literal["curricularface"] = "curricularface"
    m: float = 0.5
    momentum: float = 0.99
    """Weight of the past in the running mean of the target cosines."""
    scale: float = 64.0
    gradient: Literal["exact", "straight-through"] = "exact"

    def __post_init__(self) -> None:
        _check(self.scale > 0, f"head.margin.scale is {self.scale}; it must be above 0")
        _check(self.m >= 0, f"head.margin.m is {self.m}; it must not be negative")
        _check(0 <= self.momentum < 1, f"head.margin.momentum is {self.momentum}; use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class MagFaceConfig:
    """A margin that grows with the norm, which a regulariser draws upwards (arXiv:2103.06627)."""

    kind: Literal["magface"] = "magface"
    l_a: float = 10.0
    """Norm at which the margin is `l_m`; below, the norm has no gradient."""
    u_a: float = 110.0
    """Norm at which the margin is `u_m`; above, the norm has no gradient."""
    l_m: float = 0.45
    u_m: float = 0.8
    lambda_g: float = 35.0
    """Weight of the regulariser 1 / a + a / u_a^2."""
    scale: float = 64.0
    gradient: Literal["exact", "straight-through"] = "exact"
    """Of the cosine; that of the norm is always exact."""

    def __post_init__(self) -> None:
        _check(self.scale > 0, f"head.margin.scale is {self.scale}; it must be above 0")
        _check(0 < self.l_a < self.u_a, f"head.margin.l_a {self.l_a} must be above 0 and below u_a {self.u_a}")
        _check(0 <= self.l_m <= self.u_m, f"head.margin.l_m {self.l_m} must not be negative, nor above u_m {self.u_m}")
        _check(self.lambda_g >= 0, f"head.margin.lambda_g is {self.lambda_g}; it must not be negative")


AnyMarginConfig = MarginConfig | AdaFaceConfig | CurricularFaceConfig | MagFaceConfig


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """BroadFace's queue: the class centres learn from past embeddings too (arXiv:2008.06674)."""

    size: int = 0
    """Past embeddings that are kept, over all processes together; 0 = none (the paper: 32768)."""
    compensation: bool = True
    """Move each by as much as its class centre has moved since (Eq. 7), so that old ones may stay."""

    def __post_init__(self) -> None:
        _check(self.size >= 0, f"head.queue.size is {self.size}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier: margin softmax cross-entropy over the cosines to the class centres."""

    margin: AnyMarginConfig = field(default_factory=MarginConfig, metadata={"kind": "combined"})
    subcentres: int = 1
    """Centres a class; an image belongs to the nearest of them (Sub-centre ArcFace, ECCV 2020; 3 for noisy data)."""
    classes: Literal["replicated", "sharded"] = "replicated"
    """Whether every process holds all class centres, or its share of them (distributed FC): the way for more than some
    ten thousand identities, on one process too."""
    sample_rate: float = 1.0
    """sharded: part of the classes that a step uses, those of its images always among them (Partial FC)."""
    unsampled: Literal["untouched", "decayed"] = "untouched"
    """What a step does to the other classes: nothing (arXiv:2010.05222), or momentum and weight decay as if their
    gradient were 0 (arXiv:2203.15565)."""
    conflict_cos: float = 1.0
    """Negatives with a larger cosine are left out of the sum: likely the same person under two names; 1 = none."""
    products: Literal["fp32", "bf16"] = "fp32"
    """Type that the classifier's matrix products take; sums, targets and centres stay float32."""
    queue: QueueConfig = field(default_factory=QueueConfig)
    """BroadFace: past embeddings for the class centres to learn from; needs sharded."""
    kernel: Literal["chunked", "triton"] = "chunked"
    """What computes the softmax: plain torch, or Triton kernels (CUDA, extra `kernels`; not yet timed on a GPU)."""

    def __post_init__(self) -> None:
        _check(1 <= self.subcentres <= 64, f"head.subcentres is {self.subcentres}; use 1 to 64")
        _check(0 < self.sample_rate <= 1, f"head.sample_rate is {self.sample_rate}; use above 0 to 1")
        _check(
            self.sample_rate == 1 or self.classes == "sharded",
            "head.sample_rate below 1 needs head.classes sharded",
        )
        _check(
            self.unsampled == "untouched" or self.sample_rate < 1,
            "head.unsampled belongs to a head.sample_rate below 1",
        )
        _check(
            self.queue.size == 0 or self.classes == "sharded",
            "head.queue.size needs head.classes sharded (which works on one process too)",
        )
        _check(
            self.queue.size == 0 or self.subcentres == 1,
            f"head.queue.size is {self.queue.size} and head.subcentres {self.subcentres}; a queue needs 1 sub-centre: "
            "an entry follows its class's only centre",
        )
        _check(0 < self.conflict_cos <= 1, f"head.conflict_cos is {self.conflict_cos}; use above 0 to 1")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
