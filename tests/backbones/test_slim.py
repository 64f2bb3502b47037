"""A network cut out of a larger one: what carries nothing goes first, and the rest computes what it computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from visard.backbones import build
from visard.backbones.slim import slim, slimmed
from visard.config import BackboneConfig, IResNetConfig, MobileFaceNetConfig, ResNetConfig
from visard.errors import UserError

IRESNET = IResNetConfig(blocks=(2, 3, 4, 1), width=12, embedding_dim=8, input_size=40, init="depth")
MOBILE = MobileFaceNetConfig(blocks=(1, 4, 3, 2), width=12, embedding_dim=8, input_size=40)
BOTTLENECKS = replace(MOBILE, blocks=(3, 2, 0, 2), activation="relu")


def network(config: BackboneConfig, seed: int = 0) -> nn.Module:
    """In float64, in evaluation, with batch norms that all differ."""
    torch.manual_seed(seed)
    module = build(config).double().eval()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.running_var.uniform_(0.5, 2)
    return module


def images() -> torch.Tensor:
    return torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def kill(module: nn.Module, width: int, left: int) -> None:
    """Only `left` of each `width` channels carry anything: other ones in each size of group."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            factor = norm.num_features // width
            order = torch.randperm(norm.num_features, generator=torch.Generator().manual_seed(factor))
            dead = order[factor * left :]
            norm.weight[dead] = 0
            norm.bias[dead] = 0


def outputs(config: BackboneConfig, state: dict[str, torch.Tensor]) -> torch.Tensor:
    module = build(config).double().eval()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(images())


@pytest.mark.parametrize("config", [IRESNET, MOBILE, BOTTLENECKS])
def test_nothing_to_cut_is_a_copy(config: BackboneConfig) -> None:
    state = network(config).state_dict()
    same = slim(state, config, config)
    assert list(same) == list(state)
    assert all(torch.equal(same[name], state[name]) for name in state)


@pytest.mark.parametrize("config", [IRESNET, MOBILE, BOTTLENECKS])
@pytest.mark.parametrize("left", [8, 11])
def test_channels_that_carry_nothing_are_cut(config: IResNetConfig | MobileFaceNetConfig, left: int) -> None:
    large = network(config)
    kill(large, config.width, left)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    small = replace(config, width=left)
    with torch.no_grad():
        expected = large(images())
    torch.testing.assert_close(outputs(small, slim(before, config, small)), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[name], tensor) for name, tensor in large.state_dict().items())


@pytest.mark.parametrize(
    ("config", "blocks", "gone"),
    [
        (IRESNET, (1, 2, 2, 1), ["layer1.1.bn3", "layer2.1.bn3", "layer3.1.bn3", "layer3.2.bn3"]),
        (MOBILE, (1, 2, 1, 0), ["stage2.1", "stage2.2", "stage3.1", "stage3.2", "stage4.0", "stage4.1"]),
        (BOTTLENECKS, (2, 1, 0, 2), ["stage1.1", "stage2.1"]),
    ],
)
def test_blocks_between_the_kept_ones_are_cut(
    config: IResNetConfig | MobileFaceNetConfig, blocks: tuple[int, int, int, int], gone: list[str]
) -> None:
    """Those of even spacing stay: without what the others add, nothing changes."""
    large = network(config)
    for name in gone:
        norm = large.get_submodule(name if name.endswith("bn3") else f"{name}.project.1")
        nn.init.zeros_(norm.weight)
    small = replace(config, blocks=blocks)
    with torch.no_grad():
        expected = large(images())
    torch.testing.assert_close(outputs(small, slim(large.state_dict(), config, small)), expected, rtol=1e-12, atol=0)


def test_the_best_channels_of_a_group_stay() -> None:
    """By hand, in the first block's inside: scale squared times the squared weights that read it."""
    config = replace(IRESNET, blocks=(1, 1, 1, 1))
    large = network(config)
    block = large.get_submodule("layer1.0")
    with torch.no_grad():
        worth = block.bn2.weight.square() * block.conv2.weight.square().sum((0, 2, 3))
        best = worth.argsort(descending=True)[:9].sort().values
    small = slim(large.state_dict(), config, replace(config, width=9))
    assert torch.equal(small["layer1.0.bn2.weight"], block.bn2.weight[best])
    assert torch.equal(small["layer1.0.prelu.weight"], block.prelu.weight[best])


def test_the_smaller_configuration_is_the_larger_one_with_the_asked_sizes() -> None:
    model = replace(MOBILE, norm_eps=1e-3, embedding_dim=7)
    asked = MobileFaceNetConfig(blocks=(1, 2, 3, 0), width=9)
    assert slimmed(model, asked) == replace(model, blocks=(1, 2, 3, 0), width=9)
    with pytest.raises(UserError, match="may differ from it in blocks and width alone"):
        slim(network(MOBILE).state_dict(), MOBILE, replace(MOBILE, embedding_dim=4))


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        (IRESNET, MOBILE, "of kind mobilefacenet cannot be cut out of one of kind iresnet"),
        (ResNetConfig(), ResNetConfig(), "of kind resnet cannot be cut out"),
        (IRESNET, replace(IRESNET, width=13), "none may be larger"),
        (MOBILE, replace(MOBILE, blocks=(1, 4, 4, 2)), "none may be larger"),
        (BOTTLENECKS, replace(BOTTLENECKS, blocks=(1, 2, 0, 2)), r"blocks\[0\] is 1, the larger network's 3"),
    ],
)
def test_what_cannot_be_cut_is_refused(source: BackboneConfig, sizes: BackboneConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        slimmed(source, sizes)
