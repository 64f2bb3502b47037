"""The mixture of experts: a sum by weight of whole networks that share their first stages."""

from __future__ import annotations

import pytest
import torch

from visard.backbones import build
from visard.backbones.experts import IResNetExperts
from visard.config import ExpertsConfig
from visard.errors import UserError

CONFIG = ExpertsConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=32, experts=3)


def parts(module: IResNetExperts, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(B, E) weights and each expert's (B, D) embeddings, written out."""
    x = module.layer3(module.layer2(module.layer1(module.prelu(module.bn1(module.conv1(images))))))
    return torch.softmax(module.gate(x.mean((2, 3))), 1), [e(e.layer4(x)) for e in module.experts]  # type: ignore[operator, misc]


def test_it_is_the_weighed_sum() -> None:
    torch.manual_seed(0)
    module = build(CONFIG).eval()
    assert isinstance(module, IResNetExperts)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        weights_BE, experts = parts(module, images)
        assert torch.equal(weights_BE, torch.full((5, 3), 1 / 3))
        torch.testing.assert_close(module(images), sum(experts) / 3)
        module.gate.weight.normal_(std=2.0)
        weights_BE, experts = parts(module, images)
        assert weights_BE.std(0).max() > 0.01  # the gate looks at the image
        expected = sum(w.unsqueeze(1) * e for w, e in zip(weights_BE.unbind(1), experts, strict=True))
        torch.testing.assert_close(module(images), expected)


def test_one_expert_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        ExpertsConfig(experts=1)
