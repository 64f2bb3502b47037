"""The shapes of every backbone as frozen keyword-only dataclasses; `kind` tells them apart on disk.

In: a recipe's values. Out: the configuration that `visard.backbones.build` takes. No heavy import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visard.errors import UserError

Checkpointing = Literal["none", "stage", "segment", "block"]
"""How much of a network is computed again in the backward pass; `visard.backbones.recompute` explains each."""


@dataclass(frozen=True, kw_only=True)
class IResNetConfig:
    """IResNet of ArcFace (arXiv:1801.07698); key names and shapes of arcface_torch for width 64 and size 112."""

    kind: Literal["iresnet"] = "iresnet"
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """Blocks a stage: 18 = (2,2,2,2), 34 = (3,4,6,3), 50 = (3,4,14,3), 100 = (3,13,30,3), 200 = (6,26,60,6)."""
    width: int = 64
    """Channels of the first stage; the following have 2x, 4x and 8x."""
    embedding_dim: int = 512
    input_size: int = 112
    dropout: float = 0.0
    init: Literal["arcface", "zero", "depth"] = "arcface"
    """First weights: arcface_torch's, with which a network of 100 blocks and more overflows where it is evaluated
    before it is trained; blocks that begin as their shortcut (arXiv:1706.02677); or scaled by depth (docs/networks.md).
    """
    norm_momentum: float = 0.1
    """Part of a batch's statistics in the batch norms' running ones."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_iresnet(self)
        _check(0 < self.norm_momentum <= 1, f"backbone.norm_momentum is {self.norm_momentum}; use above 0 to 1")
        _check(self.norm_eps > 0, f"backbone.norm_eps is {self.norm_eps}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """IResNet whose last stage exists several times, weighed by a gate that sees the face (BigFace's first round)."""

    kind: Literal["experts"] = "experts"
    experts: int = 2
    """Last stages with an embedding layer each; every image passes all of them."""
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """As IResNet's; the last number is that of each expert."""
    width: int = 64
    embedding_dim: int = 512
    input_size: int = 112
    dropout: float = 0.0
    init: Literal["arcface", "zero", "depth"] = "arcface"
    """As IResNet's."""

    def __post_init__(self) -> None:
        _check(self.experts >= 2, f"backbone.experts is {self.experts}; at least 2 (one is an iresnet)")
        _check_iresnet(self)


@dataclass(frozen=True, kw_only=True)
class MobileFaceNetConfig:
    """MobileFaceNet (arXiv:1804.07573) with the block counts of the papers that use it."""

    kind: Literal["mobilefacenet"] = "mobilefacenet"
    blocks: tuple[int, int, int, int] = (1, 4, 6, 2)
    """Residual depth-wise blocks a stage: (1,4,6,2) MarginDistillation, (2,8,16,4) BroadFace."""
    activation: Literal["prelu", "relu"] = "prelu"
    embedding_dim: int = 512
    input_size: int = 112
    width: int = 64
    """Channels of the stem; 64 in the paper, everything else scales with it."""
    norm_eps: float = 1e-5
    """Epsilon of the batch norms in the trunk; 1e-3 (MXNet's default) in InsightFace's published weights."""

    def __post_init__(self) -> None:
        _check(self.norm_eps > 0, f"backbone.norm_eps is {self.norm_eps}; it must be above 0")
        _check(
            len(self.blocks) == 4 and min(self.blocks) >= 0,
            f"backbone.blocks is {self.blocks}; four numbers of at least 0",
        )
        _check(
            self.width >= 8 and self.embedding_dim >= 1, "backbone.width must be at least 8, embedding_dim at least 1"
        )
        _check(self.input_size >= 32, f"backbone.input_size is {self.input_size} px; at least 32")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Vision transformer of arcface_torch (Partial FC, arXiv:2203.15565): its key names; 112 px are 12 x 12 patches."""

    kind: Literal["vit"] = "vit"
    width: int = 256
    """Dimensions of a token: T 256, S and B 512, L 768."""
    depth: int = 12
    """Blocks: T and S 12, B and L 24."""
    heads: int = 8
    patch: int = 9
    """Pixels a side of a patch; pixels beyond the last whole patch are not seen."""
    mlp_ratio: float = 4.0
    embedding_dim: int = 512
    input_size: int = 112
    drop_path: float = 0.1
    """Chance that the last block is skipped for an image while training; falls linearly to 0 at the first block."""
    mask_ratio: float = 0.1
    """Part of an image's patches that is hidden while training."""
    checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping activations: less memory, a third more time."""

    def __post_init__(self) -> None:
        _check(
            self.heads >= 1 and self.width % self.heads == 0,
            f"backbone.width {self.width} must be a multiple of backbone.heads {self.heads}",
        )
        _check(
            min(self.width, self.depth, self.embedding_dim, self.patch) >= 1,
            "backbone.width, depth, patch and embedding_dim must be at least 1",
        )
        _check(self.mlp_ratio > 0, f"backbone.mlp_ratio is {self.mlp_ratio}; it must be above 0")
        _check(
            self.input_size >= max(16, self.patch),
            f"backbone.input_size is {self.input_size} px; at least 16 and one patch",
        )
        _check(
            0 <= self.drop_path < 1 and 0 <= self.mask_ratio < 1, "backbone.drop_path and mask_ratio: use 0 to below 1"
        )


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """ResNet (arXiv:1512.03385) with torchvision's key names; `fc` gives the embedding. Any input size fits."""

    kind: Literal["resnet"] = "resnet"
    block: Literal["basic", "bottleneck"] = "bottleneck"
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks a stage: 18 = basic (2,2,2,2), 34 = basic (3,4,6,3), 50 = bottleneck (3,4,6,3), 101 = bottleneck
    (3,4,23,3)."""
    width: int = 64
    embedding_dim: int = 512
    input_size: int = 224

    def __post_init__(self) -> None:
        _check(
            len(self.blocks) == 4 and min(self.blocks) >= 1,
            f"backbone.blocks is {self.blocks}; four numbers of at least 1",
        )
        _check(
            self.width >= 1 and self.embedding_dim >= 1, "backbone.width and backbone.embedding_dim must be at least 1"
        )
        _check(self.input_size >= 32, f"backbone.input_size is {self.input_size} px; at least 32")


@dataclass(frozen=True, kw_only=True)
class IRConfig:
    """IResNet of AdaFace and CVLface (IR-18, IR-50, IR-101), with their key names; plain shortcuts without weights."""

    kind: Literal["ir"] = "ir"
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """Blocks a stage: 18 = (2,2,2,2), 34 = (3,4,6,3), 50 = (3,4,14,3), 101 = (3,13,30,3)."""
    width: int = 64
    embedding_dim: int = 512
    input_size: int = 112
    dropout: float = 0.4

    def __post_init__(self) -> None:
        _check_iresnet(self)


BackboneConfig = IResNetConfig | MobileFaceNetConfig | ViTConfig | ResNetConfig | IRConfig | ExpertsConfig


def _check_iresnet(config: IResNetConfig | IRConfig | ExpertsConfig) -> None:
    _check(
        len(config.blocks) == 4 and min(config.blocks) >= 1,
        f"backbone.blocks is {config.blocks}; four numbers of at least 1",
    )
    _check(
        config.width >= 1 and config.embedding_dim >= 1, "backbone.width and backbone.embedding_dim must be at least 1"
    )
    _check(config.input_size >= 16, f"backbone.input_size is {config.input_size} px; at least 16")
    _check(0 <= config.dropout < 1, f"backbone.dropout is {config.dropout}; use 0 to below 1")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
