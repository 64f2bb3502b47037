"""Every network: published sizes, any input size, gradients, memory formats, autocast; arcface_torch's key names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from visard.backbones import KINDS, build, config_from_dict
from visard.backbones.named import NETWORKS, network
from visard.config import (
    BackboneConfig,
    ExpertsConfig,
    IRConfig,
    IResNetConfig,
    MobileFaceNetConfig,
    ResNetConfig,
    ViTConfig,
    to_dict,
)
from visard.deploy.macs import count_macs, count_parameters
from visard.deploy.networks import markdown, size_of
from visard.errors import UserError

# name: parameters and multiply-adds, to the last one; PUBLISHED must agree with them.
TABLE: dict[str, tuple[int, int]] = {
    "r18": (24_025_600, 2_609_954_816),
    "r34": (34_139_328, 4_459_642_880),
    "r50": (43_590_848, 6_309_330_944),
    "r100": (65_156_160, 12_089_606_144),
    "r120": (76_970_560, 14_401_716_224),
    "r140": (87_013_696, 16_713_826_304),
    "r200": (118_833_920, 23_418_945_536),
    "r240": (137_229_376, 28_274_376_704),
    "r600": (306_490_816, 69_198_725_120),
    "r1200": (654_429_376, 139_024_449_536),
    "r50_experts": (69_557_442, 7_137_837_568),
    "mobilefacenet": (1_192_960, 221_161_984),
    "mobilefacenet_broadface": (1_930_240, 468_759_552),
    "mobilefacenet_y1": (1_003_136, 220_965_376),
    "vit_t": (19_137_792, 1_504_882_688),
    "vit_s": (76_023_296, 5_746_548_736),
    "vit_b": (113_833_472, 11_437_170_688),
    "vit_l": (255_684_352, 25_337_794_560),
    "ir18": (24_020_352, 2_597_109_760),
    "ir50": (43_585_600, 6_296_485_888),
    "ir101": (65_150_912, 12_076_761_088),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
}

# name: (millions of parameters, billions of multiply-adds), each with half a unit of its last digit; None = not given.
PUBLISHED: dict[str, tuple[tuple[float, float] | None, tuple[float, float]]] = {
    # Towards Large-scale Masked Face Recognition counts multiply-adds, and a little more than ours: the batch norms.
    "r50": ((43.6, 0.05), (6.32, 0.02)),
    # BigFace's slides.
    "r240": ((137.2, 0.05), (28.3, 0.05)),
    # MarginDistillation's 24.2 and 0.44, and BroadFace's 0.9, count 2 a multiply-add.
    "r100": ((65.2, 0.05), (24.2 / 2, 0.05 / 2)),
    "mobilefacenet": ((1.19, 0.005), (0.44 / 2, 0.005 / 2)),
    "mobilefacenet_broadface": (None, (0.9 / 2, 0.05 / 2)),
    "mobilefacenet_y1": ((1.0, 0.005), (0.44 / 2, 0.005 / 2)),
    # arcface_torch's table of vision transformers: multiply-adds, the products of the attention included.
    "vit_t": (None, (1.5, 0.05)),
    "vit_s": (None, (5.7, 0.05)),
    "vit_b": (None, (11.4, 0.05)),
    "vit_l": (None, (25.3, 0.05)),
    # torchvision states its networks' parameters to the last one: with ImageNet's 1000 outputs they must be these.
    "resnet18": ((11.689512, 1e-9), (1.81, 0.005)),
    "resnet34": ((21.797672, 1e-9), (3.66, 0.005)),
    "resnet50": ((25.557032, 1e-9), (4.09, 0.005)),
    "resnet101": ((44.549160, 1e-9), (7.80, 0.005)),
}

TINY: dict[str, BackboneConfig] = {
    "iresnet": IResNetConfig(blocks=(1, 2, 1, 1), width=4, embedding_dim=16),
    "iresnet dropout": IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, dropout=0.4),
    "mobilefacenet": MobileFaceNetConfig(blocks=(1, 1, 2, 1), width=8, embedding_dim=16),
    "mobilefacenet relu": MobileFaceNetConfig(blocks=(1, 0, 1, 1), width=8, embedding_dim=16, activation="relu"),
    "mobilefacenet (2,...)": MobileFaceNetConfig(blocks=(2, 1, 1, 1), width=8, embedding_dim=16),
    "mobilefacenet (0,...)": MobileFaceNetConfig(blocks=(0, 0, 0, 0), width=8, embedding_dim=16),
    "vit": ViTConfig(width=16, depth=2, heads=4, embedding_dim=16),
    "vit nothing random": ViTConfig(width=12, depth=1, heads=3, embedding_dim=16, drop_path=0, mask_ratio=0),
    "resnet": ResNetConfig(blocks=(1, 2, 1, 1), width=4, embedding_dim=16, input_size=112),
    "resnet basic": ResNetConfig(block="basic", blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=112),
    "ir": IRConfig(blocks=(1, 2, 1, 1), width=4, embedding_dim=16, dropout=0),
    "iresnet by depth": IResNetConfig(blocks=(1, 2, 1, 1), width=4, embedding_dim=16, init="depth"),
    "experts": ExpertsConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, experts=3),
}

# Parameters that keep their first value, by the kind of network.
FIXED = {
    "iresnet": ["features.weight"],
    "mobilefacenet": ["norm.weight"],
    "experts": [f"experts.{expert}.features.weight" for expert in range(3)],
}

tiny = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


@pytest.mark.parametrize("name", NETWORKS)
def test_size(name: str) -> None:
    assert size_of(network(name)) == TABLE[name]


def test_every_network_by_name_has_its_size() -> None:
    assert list(NETWORKS) == list(TABLE)
    with pytest.raises(UserError, match=r"'r24' is unknown; did you mean r240\?"):
        network("r24")


@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_the_papers(name: str) -> None:
    parameters, macs = TABLE[name]
    published_parameters, published_macs = PUBLISHED[name]
    if published_parameters is not None:
        assert parameters / 1e6 == pytest.approx(published_parameters[0], abs=published_parameters[1])
    assert macs / 1e9 == pytest.approx(published_macs[0], abs=published_macs[1])


@tiny
@pytest.mark.parametrize("size", [112, 64, 56, 33])
def test_any_input_size_gives_raw_float32_embeddings(config: BackboneConfig, size: int) -> None:
    torch.manual_seed(0)
    module = build(dataclasses.replace(config, input_size=size)).eval()
    embeddings = module(torch.randn(3, 3, size, size))
    assert embeddings.shape == (3, 16)
    assert embeddings.dtype == torch.float32
    # Before any training step the last batch norm passes values through: a normalised output would have length 1.
    assert (embeddings.norm(dim=1) - 1).abs().min() > 1e-3


@tiny
def test_gradients_reach_every_parameter_but_the_fixed_scale(config: BackboneConfig) -> None:
    torch.manual_seed(0)
    module = build(dataclasses.replace(config, input_size=48))
    embeddings = module(torch.randn(6, 3, 48, 48))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    unmasked = isinstance(config, ViTConfig) and config.mask_ratio == 0
    fixed = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert list(fixed) == (["mask_token"] if unmasked else FIXED.get(config.kind, []))
    assert all((parameter == 1).all() for name, parameter in fixed.items() if name != "mask_token")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@tiny
def test_channels_last_equals_contiguous(config: BackboneConfig) -> None:
    torch.manual_seed(0)
    module = build(dataclasses.replace(config, input_size=56)).eval()
    images = torch.randn(4, 3, 56, 56)
    with torch.inference_mode():
        contiguous = module(images)
        module.to(memory_format=torch.channels_last)
        channels_last = module(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-4, atol=1e-5 * float(contiguous.abs().max()))


@tiny
def test_bf16_autocast_keeps_the_last_layers_in_float32(config: BackboneConfig) -> None:
    torch.manual_seed(0)
    module = build(dataclasses.replace(config, input_size=48)).eval()
    images = torch.randn(4, 3, 48, 48)
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    seen: list[torch.dtype] = []
    linear.register_forward_hook(lambda part, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.inference_mode():
        truth = module(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(images)
    assert seen == [torch.float32] * 4
    assert rounded.dtype == torch.float32
    # The trunk did run in bf16 (8 bits), and the embedding still points the same way.
    assert not torch.equal(rounded, truth)
    assert nn.functional.cosine_similarity(rounded, truth).min() > 0.99


@tiny
def test_the_same_seed_gives_the_same_network(config: BackboneConfig) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build(config).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_configuration_survives_json(config: BackboneConfig) -> None:
    assert config_from_dict(to_dict(config), where="spec.json") == config


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"spec\.json.*'resnext'.*iresnet"):
        config_from_dict({"kind": "resnext"}, where="spec.json")
    assert set(KINDS) == {"iresnet", "mobilefacenet", "vit", "resnet", "ir", "experts"}


def test_iresnet18_has_arcface_torchs_keys_and_shapes() -> None:
    """The rule by which arcface_torch's iresnet.py names and shapes its parameters, written out independently."""
    expected: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{part}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()

    expected["conv1.weight"] = (64, 3, 3, 3)
    norm("bn1", 64)
    expected["prelu.weight"] = (64,)
    channels_in = 64
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            norm(f"{prefix}.bn1", channels_in)
            expected[f"{prefix}.conv1.weight"] = (channels, channels_in, 3, 3)
            norm(f"{prefix}.bn2", channels)
            expected[f"{prefix}.prelu.weight"] = (channels,)
            expected[f"{prefix}.conv2.weight"] = (channels, channels, 3, 3)
            norm(f"{prefix}.bn3", channels)
            if block == 0:
                expected[f"{prefix}.downsample.0.weight"] = (channels, channels_in, 1, 1)
                norm(f"{prefix}.downsample.1", channels)
            channels_in = channels
    norm("bn2", 512)
    expected["fc.weight"], expected["fc.bias"] = (512, 512 * 7 * 7), (512,)
    norm("features", 512)
    with torch.device("meta"):
        found = {name: tuple(t.shape) for name, t in build(IResNetConfig(blocks=(2, 2, 2, 2))).state_dict().items()}
    assert found == expected
    # The order matters to those who zip two state dicts.
    assert list(found) == list(expected)


def test_iresnet_computes_what_the_paper_draws() -> None:
    """One block against the same arithmetic written with functions: BN-Conv-BN-PReLU-Conv(stride 2)-BN + projection."""
    from torch.nn import functional as F  # noqa: N812

    from visard.backbones.iresnet import IResNetBlock

    torch.manual_seed(0)
    block = IResNetBlock(4, 8, stride=2).double().eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    s = block.state_dict()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale = s[f"{name}.weight"] / (s[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - s[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + s[f"{name}.bias"][:, None, None]

    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    y = norm("bn2", F.conv2d(norm("bn1", x), s["conv1.weight"], padding=1))
    y = torch.where(y > 0, y, y * s["prelu.weight"][:, None, None])
    y = norm("bn3", F.conv2d(y, s["conv2.weight"], stride=2, padding=1))
    y = y + norm("downsample.1", F.conv2d(x, s["downsample.0.weight"], stride=2))
    torch.testing.assert_close(block(x), y)


def test_mobilefacenets_global_kernel_is_the_last_map() -> None:
    for size, side in ((112, 7), (113, 8), (64, 4), (56, 4), (32, 2)):
        module = build(MobileFaceNetConfig(input_size=size, width=8))
        assert module.pool[0].kernel_size == (side, side)  # type: ignore[index, union-attr]


def test_counting_leaves_the_network_as_it_was() -> None:
    module = build(TINY["mobilefacenet"])
    module.stem.eval()  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    assert count_macs(module, 112) == count_macs(module, 112) > 0
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


def test_multiply_adds_by_hand() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 5x5 out, 27 weights each: 8 * 25 * 27
        nn.Conv2d(8, 8, 3, groups=4),  # 3x3 out, 18 weights each: 8 * 9 * 18
        nn.Flatten(),
        nn.Linear(72, 5),  # 360
    )
    assert count_macs(module, 10) == 8 * 25 * 27 + 8 * 9 * 18 + 360
    assert count_parameters(module) == (27 + 1) * 8 + (18 + 1) * 8 + 73 * 5


def test_the_documented_table_is_the_codes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    assert markdown(NETWORKS, TABLE) in text
