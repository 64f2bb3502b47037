"""IResNet, the residual network that ArcFace made the field's standard, in arcface_torch's parameter names and shapes.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
With width 64 and S = 112 the state dict is arcface_torch's, key by key; width and S are free, the last layer follows.

Source: Deng et al., ArcFace, arXiv:1801.07698, section 3.1
(the "improved residual unit" BN-Conv-BN-PReLU-Conv-BN; output type E).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.backbones.prelu import PReLU
from visard.config import IResNetConfig

NORM_EPS = 1e-5


class IResNet(nn.Module):
    """Stem, four stages that each halve the map, batch norm, dropout, a linear layer, batch norm without a scale."""

    def __init__(self, config: IResNetConfig) -> None:
        super().__init__()
        widths = [config.width * factor for factor in (1, 2, 4, 8)]
        map_size = -(-config.input_size // 16)
        self.conv1 = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width, eps=NORM_EPS)
        self.prelu = PReLU(config.width)
        self.layer1 = _stage(config.width, widths[0], config.blocks[0])
        self.layer2 = _stage(widths[0], widths[1], config.blocks[1])
        self.layer3 = _stage(widths[1], widths[2], config.blocks[2])
        self.layer4 = _stage(widths[2], widths[3], config.blocks[3])
        self.bn2 = nn.BatchNorm2d(widths[3], eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(widths[3] * map_size**2, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim, eps=NORM_EPS)
        # As in arcface_torch: before the head's normalisation a scale would only weigh dimensions against each other.
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
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


def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    first = IResNetBlock(channels_in, channels, stride=2)
    return nn.Sequential(first, *(IResNetBlock(channels, channels, stride=1) for _ in range(blocks - 1)))
