"""MobileFaceNet, laid out as in the InsightFace models that the papers here started from, with their block counts.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
The map is halved four times; what is left (7x7 at 112 px) is weighed by one global depth-wise convolution of exactly
that size, because the corners of an aligned crop matter less than its centre (the reason against average pooling).

Source: Chen et al., MobileFaceNets, arXiv:1804.07573, table 1. Expansions: 2x in a stage, 2x, 4x, 4x into the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visard.backbones.iresnet import float32_embedding
from visard.backbones.prelu import PReLU
from visard.backbones.recompute import Recomputing
from visard.config import MobileFaceNetConfig

EMBEDDING_NORM_EPS = 2e-5


class MobileFaceNet(Recomputing):
    """Stem, four stages of inverted bottlenecks, 1x1 expansion, global depth-wise convolution, linear layer, norm."""

    def __init__(self, config: MobileFaceNetConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        map_size = -(-config.input_size // 16)

        def activation(channels: int) -> nn.Module:
            return PReLU(channels) if config.activation == "prelu" else nn.ReLU(inplace=True)

        def conv(channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
            return _conv(channels_in, channels, kernel, stride, groups, eps, activation)

        def bottleneck(channels_in: int, channels: int, expanded: int, stride: int) -> Bottleneck:
            return Bottleneck(channels_in, channels, expanded, stride, eps, activation)

        def stage(channels: int, expanded: int, blocks: int) -> nn.Sequential:
            return nn.Sequential(*(bottleneck(channels, channels, expanded, 1) for _ in range(blocks)))

        self.stem = conv(3, width, 3, stride=2)
        # InsightFace's reading of the first count: 1 is the paper's lone depth-wise convolution, more are bottlenecks.
        lone = config.blocks[0] == 1
        self.stage1 = conv(width, width, 3, groups=width) if lone else stage(width, width, config.blocks[0])
        self.down2 = bottleneck(width, width, 2 * width, 2)
        self.stage2 = stage(width, 2 * width, config.blocks[1])
        self.down3 = bottleneck(width, 2 * width, 4 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, config.blocks[2])
        self.down4 = bottleneck(2 * width, 2 * width, 8 * width, 2)
        self.stage4 = stage(2 * width, 4 * width, config.blocks[3])
        self.expand = conv(2 * width, 8 * width, 1)
        self.pool = nn.Sequential(
            nn.Conv2d(8 * width, 8 * width, map_size, groups=8 * width, bias=False), nn.BatchNorm2d(8 * width, eps=eps)
        )
        # No bias: the batch norm that follows subtracts any constant.
        self.linear = nn.Linear(8 * width, config.embedding_dim, bias=False)
        self.norm = nn.BatchNorm1d(config.embedding_dim, eps=EMBEDDING_NORM_EPS)
        self.norm.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        lone = (
            isinstance(self.stage1, nn.Sequential) and bool(len(self.stage1)) and isinstance(self.stage1[0], nn.Conv2d)
        )
        x = self.through([self.stage1] if lone else self.stage1, self.stem(images))
        for down, blocks in ((self.down2, self.stage2), (self.down3, self.stage3), (self.down4, self.stage4)):
            x = self.through([down, *blocks], x)
        x = self.pool(self.expand(x))
        return float32_embedding(self.linear, self.norm, torch.flatten(x, 1))


class Bottleneck(nn.Module):
    """1x1 expansion, 3x3 depth-wise, linear 1x1 projection; added to the input where stride 1 keeps its shape."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        expanded: int,
        stride: int,
        norm_eps: float,
        activation: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.expand = _conv(channels_in, expanded, 1, 1, 1, norm_eps, activation)
        self.depthwise = _conv(expanded, expanded, 3, stride, expanded, norm_eps, activation)
        self.project = nn.Sequential(
            nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=norm_eps)
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _conv(
    channels_in: int,
    channels: int,
    kernel: int,
    stride: int,
    groups: int,
    norm_eps: float,
    activation: Callable[[int], nn.Module],
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels, eps=norm_eps),
        activation(channels),
    )
