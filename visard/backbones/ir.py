"""The IResNet of AdaFace and CVLface (IR-18, -34, -50, -101), in their parameter names and shapes.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised (AdaFace's own code divides by
the length and hands it out besides). It computes what `iresnet.py` does but for two things: a block that keeps the
channels has a shortcut without weights (every stride-th pixel), and the last batch norm has neither scale nor shift.

Source: Kim et al., AdaFace, arXiv:2204.00964, after face.evoLVe's IR networks; ArcFace, arXiv:1801.07698, section 3.1.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from visard.backbones.iresnet import NORM_EPS, float32_embedding
from visard.backbones.prelu import PReLU
from visard.backbones.recompute import Recomputing
from visard.config import IRConfig


class IR(Recomputing):
    """Stem, four stages that each halve the map, batch norm, dropout, a linear layer, batch norm without weights."""

    def __init__(self, config: IRConfig) -> None:
        super().__init__()
        last = 8 * config.width
        map_size = -(-config.input_size // 16)
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, config.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.width, eps=NORM_EPS),
            PReLU(config.width),
        )
        # Numbered as in the published files: 0, 3 and 4 have tensors.
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last, eps=NORM_EPS),
            nn.Dropout(config.dropout),
            nn.Flatten(),
            nn.Linear(last * map_size**2, config.embedding_dim),
            nn.BatchNorm1d(config.embedding_dim, eps=NORM_EPS, affine=False),
        )
        blocks: list[nn.Module] = []
        channels_in = config.width
        for stage, count in enumerate(config.blocks):
            channels = config.width << stage
            for step in range(count):
                blocks.append(IRBlock(channels_in, channels, stride=2 if step == 0 else 1))
                channels_in = channels
        self.body = nn.Sequential(*blocks)
        self.blocks = config.blocks
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x, blocks = self.input_layer(images), iter(self.body)
        for count in self.blocks:
            x = self.through(list(itertools.islice(blocks, count)), x)
        norm, dropout, flatten, linear, last = self.output_layer
        assert isinstance(linear, nn.Linear)
        assert isinstance(last, nn.BatchNorm1d)
        return float32_embedding(linear, last, flatten(dropout(norm(x))))


class IRBlock(nn.Module):
    """BN-Conv-BN-PReLU-Conv(stride)-BN added to the input: projected to more channels, else every stride-th pixel."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if channels_in == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels, eps=NORM_EPS)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels_in, eps=NORM_EPS),
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, eps=NORM_EPS),
            PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels, eps=NORM_EPS),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return y
