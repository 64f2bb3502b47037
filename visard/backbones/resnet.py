"""ResNet-18 to -101 in torchvision's parameter names, with an embedding where ImageNet's classes were.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
The last map is averaged, so the same weights take any input size.

Source: He et al., arXiv:1512.03385, table 1; bottlenecks halve the map in their 3x3 convolution, as torchvision's do
("v1.5").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from visard.backbones.recompute import Recomputing
from visard.config import ResNetConfig


class ResNet(Recomputing):
    """7x7 stem and pooling (a quarter of the size), four stages, average, linear layer."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        block = BasicBlock if config.block == "basic" else BottleneckBlock
        self.conv1 = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        channels_in = config.width
        stages: list[nn.Sequential] = []
        for index, count in enumerate(config.blocks):
            channels, stride = config.width << index, 1 if index == 0 else 2
            parts: list[nn.Module] = []
            for step in range(count):
                parts.append(block(channels_in, channels, stride if step == 0 else 1))
                channels_in = channels * block.expansion
            stages.append(nn.Sequential(*parts))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels_in, config.embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.through(layer, x)
        x = x.mean((2, 3))
        device = x.device.type
        # Parameter counts are taken on the meta device, which knows no autocast.
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            embeddings: Tensor = self.fc(x)
            return embeddings
        with torch.autocast(device, enabled=False):  # in bf16 an embedding keeps only 8 bits of each dimension
            embeddings = self.fc(x.float())
        return embeddings


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the input, which is projected where its shape changes."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nn.Module):
    """1x1 to a quarter of the channels, 3x3 with the stride, 1x1 back; added to the input as in `BasicBlock`."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample = _projection(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _projection(channels_in: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
