"""Deep IResNets at their beginning: finite where they are evaluated, alike in size at any depth; and which are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visard.backbones import build
from visard.backbones.iresnet import IResNetBlock
from visard.backbones.named import NETWORKS
from visard.config import IResNetConfig

STAGES = ("layer1", "layer2", "layer3", "layer4")


def narrow(name: str, init: str, width: int = 16) -> nn.Module:
    """A published depth at 16 of its 64 channels, on 32 px."""
    blocks = NETWORKS[name].blocks  # type: ignore[union-attr]
    torch.manual_seed(0)
    return build(IResNetConfig(blocks=blocks, width=width, embedding_dim=32, input_size=32, init=init))  # type: ignore[arg-type]


def deviations(module: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Embeddings, and the standard deviation of each stage's output."""
    found: dict[str, float] = {}
    hooks = [
        getattr(module, name).register_forward_hook(
            lambda part, inputs, output, name=name: found.update({name: output.detach().std().item()})
        )
        for name in STAGES
    ]
    embeddings = module(images)
    for hook in hooks:
        hook.remove()
    return embeddings, found


@pytest.mark.parametrize("name", ["r50", "r240", "r600"])
@pytest.mark.parametrize("init", ["zero", "depth"])
def test_evaluated_before_training_it_is_finite(name: str, init: str) -> None:
    module = narrow(name, init).eval()
    with torch.no_grad():
        embeddings, found = deviations(module, torch.randn(4, 3, 32, 32))
    assert embeddings.isfinite().all()
    assert embeddings.std() > 1e-3
    if init == "depth":
        assert all(0.3 < deviation < 3 for deviation in found.values()), found


def test_the_usual_beginning_overflows() -> None:
    """Why the setting exists: running variances of 1 do not undo what convolutions of N(0, 0.1) multiply."""
    module = narrow("r240", "arcface").eval()
    with torch.no_grad():
        assert not module(torch.randn(2, 3, 32, 32)).isfinite().all()
    # Not depth alone: once the running statistics are those of a batch, the same weights are fine.
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = 1.0
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        module.train()(images)
        assert module.eval()(images).isfinite().all()


@pytest.mark.parametrize("name", ["r50", "r240", "r600", pytest.param("r1200", marks=pytest.mark.slow)])
def test_in_training_every_stage_gets_gradients_of_a_size(name: str) -> None:
    module = narrow(name, "depth", width=8).train()
    embeddings, found = deviations(module, torch.randn(8, 3, 32, 32))
    (nn.functional.normalize(embeddings) * torch.randn_like(embeddings)).sum().backward()
    assert all(0.8 < deviation < 2 for deviation in found.values()), found
    norms = [
        torch.stack([p.grad.norm() for p in getattr(module, s).parameters() if p.grad is not None]) for s in STAGES
    ]
    sizes = [norm.norm().item() for norm in norms]
    assert max(sizes) < 12 * min(sizes), sizes
    assert all(norm.isfinite().all() for norm in norms)


def test_zero_begins_as_the_shortcuts() -> None:
    module = narrow("r50", "zero").eval()
    block = next(b for b in module.modules() if isinstance(b, IResNetBlock) and b.downsample is None)
    x = torch.randn(2, block.bn1.num_features, 8, 8)
    assert torch.equal(block(x), x)


def test_settings_of_the_batch_norms() -> None:
    module = build(IResNetConfig(blocks=(1, 1, 1, 1), width=4, norm_momentum=0.01, norm_eps=1e-3, input_size=32))
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 4 * 4 + 3
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}
