"""A mixture of experts after BigFace's first round: an IResNet whose last stage exists several times, and a gate.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
The slides (BigFace, MFR-ICCV2021, "Plain ResNet is Enough") name "a simple Mixture-Of-Expert structure" and show it in
a picture that says no more; they found a plain network of equal cost better. The reading here: experts differ where
features are of whole faces (the last stage and the embedding), a softmax gate weighs them by the mean of the map before
it, and every image passes every expert, so that nothing is routed, dropped or balanced.

Source: the slides above; Jacobs et al., Adaptive Mixtures of Local Experts, Neural Computation 1991, Eq. 1 (the sum).
Letters: B images, D embedding size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.backbones.iresnet import NORM_EPS, float32_embedding, initialise, stage
from visard.backbones.prelu import PReLU
from visard.backbones.recompute import Recomputing
from visard.config import ExpertsConfig


class IResNetExperts(Recomputing):
    """IResNet's stem and three stages, then E last stages with embeddings, added up by weight."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=NORM_EPS)
        self.prelu = PReLU(width)
        self.layer1 = stage(width, width, config.blocks[0])
        self.layer2 = stage(width, 2 * width, config.blocks[1])
        self.layer3 = stage(2 * width, 4 * width, config.blocks[2])
        self.gate = nn.Linear(4 * width, config.experts)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.experts))
        initialise(self, config.init, sum(config.blocks))
        # All experts count alike at first: a gate that has seen nothing should prefer none.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x = self.prelu(self.bn1(self.conv1(images)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = self.through(layer, x)
        weights_BE = self.gate(x.mean((2, 3))).float().softmax(1)
        embeddings = torch.zeros((), device=x.device)
        for expert, weight_B in zip(self.experts, weights_BE.unbind(1), strict=True):
            assert isinstance(expert, Expert)
            embeddings = embeddings + weight_B.unsqueeze(1) * expert(self.through(expert.layer4, x))
        return embeddings


class Expert(nn.Module):
    """A last stage and what makes its map an embedding, as in IResNet; the stage is called by the network."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        width, map_size = 8 * config.width, -(-config.input_size // 16)
        self.layer4 = stage(width // 2, width, config.blocks[3])
        self.bn2 = nn.BatchNorm2d(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(width * map_size**2, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim, eps=NORM_EPS)
        self.features.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8W, s, s) maps of the last stage -> (B, D) float32."""
        return float32_embedding(self.fc, self.features, self.dropout(torch.flatten(self.bn2(x), 1)))
