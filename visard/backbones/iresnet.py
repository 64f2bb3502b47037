"""IResNet, the residual network that ArcFace made the field's standard, in arcface_torch's parameter names and shapes.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
With width 64 and S = 112 the state dict is arcface_torch's, key by key; width and S are free, the last layer follows.

Source: Deng et al., ArcFace, arXiv:1801.07698, section 3.1
(the "improved residual unit" BN-Conv-BN-PReLU-Conv-BN; output type E). Beginnings for great depth: Goyal et al.,
arXiv:1706.02677, section 5.1 (a last batch norm of 0); De & Smith, arXiv:2002.10444, section 3 (branches of 1 / sqrt of
their number); He et al., arXiv:1502.01852, Eq. 14 (convolutions that keep the variance).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from visard.backbones.prelu import PReLU
from visard.backbones.recompute import Recomputing
from visard.config import IResNetConfig

NORM_EPS = 1e-5


PRELU_SLOPE = 0.25
"""torch's first slope of a PReLU."""


class IResNet(Recomputing):
    """Stem, four stages that each halve the map, batch norm, dropout, a linear layer, batch norm without a scale."""

    def __init__(self, config: IResNetConfig) -> None:
        super().__init__()
        widths = [config.width * factor for factor in (1, 2, 4, 8)]
        map_size = -(-config.input_size // 16)
        self.conv1 = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width, eps=NORM_EPS)
        self.prelu = PReLU(config.width)
        self.layer1 = stage(config.width, widths[0], config.blocks[0])
        self.layer2 = stage(widths[0], widths[1], config.blocks[1])
        self.layer3 = stage(widths[1], widths[2], config.blocks[2])
        self.layer4 = stage(widths[2], widths[3], config.blocks[3])
        self.bn2 = nn.BatchNorm2d(widths[3], eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(widths[3] * map_size**2, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim, eps=NORM_EPS)
        # As in arcface_torch: before the head's normalisation a scale would only weigh dimensions against each other.
        self.features.weight.requires_grad_(False)
        initialise(self, config.init, sum(config.blocks))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eps, module.momentum = config.norm_eps, config.norm_momentum

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x = self.prelu(self.bn1(self.conv1(images)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.through(layer, x)
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        return float32_embedding(self.fc, self.features, x)


class IResNetBlock(nn.Module):
    """BN-Conv-BN-PReLU-Conv(stride)-BN added to the input, which is projected where its shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=NORM_EPS)
        self.prelu = PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels, eps=NORM_EPS)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels, eps=NORM_EPS),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))


def float32_embedding(linear: nn.Linear, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """`norm(linear(x))` in float32 whatever the autocast: in bf16 an embedding keeps only 8 bits of each dimension.

    Args:
        x: (B, F), any floating type.

    Returns:
        (B, D) float32.
    """
    device = x.device.type
    # Parameter counts are taken on the meta device, which knows no autocast.
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return norm(linear(x))
    with torch.autocast(device, enabled=False):
        return norm(linear(x.float()))


def stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    """Blocks of which the first halves the map."""
    first = IResNetBlock(channels_in, channels, stride=2)
    return nn.Sequential(first, *(IResNetBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


def initialise(network: nn.Module, how: Literal["arcface", "zero", "depth"], blocks: int) -> None:
    """Draws the convolutions of a network of `IResNetBlock`s, and sets the scale of each block's last batch norm.

    "arcface": N(0, 0.1), scale 1. In training every batch norm divides by what its convolution multiplied. In
    evaluation before training the running variances are 1 and it does not: the deviation of a branch grows by
    0.01 * 9 C * sqrt((1 + slope^2) / 2) each block (17 at C = 256), which is beyond float32 after some 30 of them.
    "zero": N(0, 0.1), scale 0: every block begins as its shortcut, and in the first step its convolutions do not move.
    "depth": convolutions that keep the variance, so that running variances of 1 are about right from the start, and a
    scale of 1 / sqrt(blocks), so that the sum of all branches is as large as what enters.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if how == "depth":
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            else:
                nn.init.normal_(module.weight, 0, 0.1)
    if how == "arcface":
        return
    for module in network.modules():
        if isinstance(module, IResNetBlock):
            nn.init.constant_(module.bn3.weight, 0.0 if how == "zero" else 1 / math.sqrt(blocks))
            if how == "depth":
                nn.init.kaiming_normal_(module.conv2.weight, a=PRELU_SLOPE)
