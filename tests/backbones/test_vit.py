"""What the vision transformer does only while training: hidden tokens, skipped blocks, recomputed activations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from visard.backbones import build
from visard.backbones.vit import Block, VisionTransformer, keep_some, put_back
from visard.config import ViTConfig
from visard.errors import UserError

TINY = ViTConfig(width=16, depth=3, heads=4, embedding_dim=8, input_size=45, drop_path=0.0, mask_ratio=0.0)


@pytest.mark.parametrize(("tokens", "ratio", "kept"), [(144, 0.1, 129), (144, 0.05, 136), (25, 0.5, 12), (4, 0.9, 1)])
def test_tokens_come_back_where_they_were(tokens: int, ratio: float, kept: int) -> None:
    torch.manual_seed(0)
    x_BNC = torch.arange(3 * tokens * 2, dtype=torch.float32).view(3, tokens, 2)
    some_BNC, places_BN = keep_some(x_BNC, ratio)
    assert some_BNC.shape == (3, kept, 2)
    back_BNC = put_back(some_BNC, places_BN, torch.full((1, 1, 2), -1.0))
    gone_BN = (back_BNC == -1).all(2)
    assert (gone_BN.sum(1) == tokens - kept).all()
    assert torch.equal(back_BNC[~gone_BN], x_BNC[~gone_BN])
    # Each image has its own.
    assert tokens - kept < 2 or not torch.equal(gone_BN[0], gone_BN[1])


def test_every_token_is_hidden_as_often() -> None:
    torch.manual_seed(0)
    _, places_BN = keep_some(torch.zeros(4000, 9, 1), 1 / 3)
    share_N = (places_BN >= 6).double().mean(0)
    # 4000 draws at 1/3: a standard deviation of 0.0075.
    assert (share_N - 1 / 3).abs().max() < 4 * 0.0075


def test_masking_happens_in_training_only() -> None:
    torch.manual_seed(0)
    module = build(dataclasses.replace(TINY, mask_ratio=0.4))
    images = torch.randn(4, 3, 45, 45)
    assert not torch.equal(module(images), module(images))
    module.eval()
    assert torch.equal(module(images), module(images))
    plain = build(TINY).eval()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(images), plain(images))


def test_skipped_blocks_keep_the_mean() -> None:
    """E[x + addend * Bernoulli / chance] = x + addend, for each image alone."""
    torch.manual_seed(0)
    block = Block(8, 2, 4.0, skip=0.3)
    addend = torch.ones(20_000, 2, 3)
    drawn = block._sometimes(addend)
    assert drawn.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert drawn.mean() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)
    assert (drawn == drawn[:, :1, :1]).all()
    assert block.eval()._sometimes(addend) is addend


def test_skipping_grows_with_depth() -> None:
    module = build(dataclasses.replace(TINY, drop_path=0.1))
    assert isinstance(module, VisionTransformer)
    assert [block.skip for block in module.blocks] == pytest.approx([0, 0.05, 0.1])
    lone = build(dataclasses.replace(TINY, depth=1, drop_path=0.1))
    assert lone.blocks[0].skip == 0  # type: ignore[index, union-attr]


def test_recomputed_activations_change_nothing() -> None:
    config = dataclasses.replace(TINY, drop_path=0.5, mask_ratio=0.2)
    images = torch.randn(4, 3, 45, 45)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = build(dataclasses.replace(config, checkpointing=checkpointing))
        torch.manual_seed(1)
        embeddings = module(images)
        (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None, name
        assert torch.equal(plain, gradients[1][name]), name  # type: ignore[arg-type]


def test_the_start_is_the_published_one() -> None:
    torch.manual_seed(0)
    state = build(ViTConfig(depth=1)).state_dict()
    for name in ("pos_embed", "mask_token", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "feature.2.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.15), name
    assert not state["blocks.0.mlp.fc1.bias"].any()
    assert state["patch_embed.proj.bias"].any()  # torch's own for a convolution


def test_impossible_settings_are_refused() -> None:
    for change, message in (
        ({"heads": 3}, "multiple of backbone.heads"),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"input_size": 16, "patch": 20}, "one patch"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **change)
