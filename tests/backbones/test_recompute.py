"""Computing blocks again changes nothing but memory: losses, gradients and batch-norm statistics to the last bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from visard.backbones import build
from visard.backbones.recompute import MAPS_A_BLOCK, segment_of, set_checkpointing
from visard.config import (
    BackboneConfig,
    Checkpointing,
    ExpertsConfig,
    IRConfig,
    IResNetConfig,
    MobileFaceNetConfig,
    ResNetConfig,
    ViTConfig,
)

LEVELS: tuple[Checkpointing, ...] = ("stage", "segment", "block")
NETWORKS: dict[str, BackboneConfig] = {
    "iresnet": IResNetConfig(blocks=(1, 3, 8, 2), width=4, embedding_dim=16, input_size=32, dropout=0.3),
    "mobilefacenet": MobileFaceNetConfig(blocks=(1, 1, 3, 1), width=8, embedding_dim=16, input_size=48),
    "mobilefacenet (2, ...)": MobileFaceNetConfig(blocks=(2, 0, 1, 1), width=8, activation="relu", input_size=48),
    "resnet": ResNetConfig(blocks=(1, 2, 3, 1), width=4, embedding_dim=16, input_size=48),
    "resnet basic": ResNetConfig(block="basic", blocks=(1, 2, 1, 1), width=4, embedding_dim=16, input_size=48),
    "ir": IRConfig(blocks=(1, 2, 3, 1), width=4, embedding_dim=16, input_size=32, dropout=0.3),
    "vit": ViTConfig(width=16, depth=4, heads=4, patch=8, embedding_dim=16, input_size=32, drop_path=0.5),
    "experts": ExpertsConfig(blocks=(1, 1, 2, 2), width=4, embedding_dim=16, input_size=32, dropout=0.3),
}


def two_steps(
    config: BackboneConfig, level: Checkpointing, dtype: torch.dtype | None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, gradients of the second step, and all tensors after two steps of a random task; the RNG's last word."""
    torch.manual_seed(3)
    module = build(config).train()
    set_checkpointing(module, level)
    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for step in range(2):
        torch.manual_seed(10 + step)
        images = torch.randn(6, 3, config.input_size, config.input_size)
        sgd.zero_grad()
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            embeddings = module(images)
        loss = (nn.functional.normalize(embeddings) * torch.randn_like(embeddings)).sum()
        loss.backward()
        losses.append(loss.detach())
        sgd.step()
    losses.append(torch.rand(1))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return losses, gradients, module.state_dict()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_same_bits(config: BackboneConfig, dtype: torch.dtype | None, level: Checkpointing) -> None:
    plain, recomputed = two_steps(config, "none", dtype), two_steps(config, level, dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputed[0], strict=True))
    for mine, yours in zip(plain[1:], recomputed[1:], strict=True):
        assert isinstance(mine, dict)
        assert isinstance(yours, dict)
        assert mine.keys() == yours.keys()
        assert [name for name in mine if not torch.equal(mine[name], yours[name])] == []
    state = recomputed[2]
    counters = [int(value) for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert set(counters) == {2}


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_statistics_are_counted_once(momentum: float | None) -> None:
    """Plain torch.utils.checkpoint would count every batch twice, which the test sees."""
    from torch.utils.checkpoint import checkpoint

    def states(way: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = build(NETWORKS["iresnet"]).train()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = momentum
        if way == "ours":
            set_checkpointing(module, "block")
        layer = module.layer3
        assert isinstance(layer, nn.Sequential)
        if way == "torch":
            plainly = layer.forward
            layer.forward = lambda x: checkpoint(plainly, x, use_reentrant=False)  # type: ignore[method-assign]
        for _ in range(2):
            module(torch.randn(4, 3, 32, 32)).square().sum().backward()
        return dict(layer.state_dict())

    plain, ours, theirs = states("none"), states("ours"), states("torch")
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert any(not torch.equal(plain[name], theirs[name]) for name in plain)


def test_nothing_is_left_behind() -> None:
    """The module's own buffers come back, also when the second pass fails."""
    module = build(NETWORKS["iresnet"]).train()
    set_checkpointing(module, "segment")
    before = dict(module.named_buffers())
    loss = module(torch.randn(4, 3, 32, 32)).square().sum()
    broken = module.layer2[1].bn2  # type: ignore[index, union-attr]

    def fail(*_: object) -> None:
        raise RuntimeError("second pass")

    hook = broken.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="second pass"):
        loss.backward()
    hook.remove()
    after = dict(module.named_buffers())
    assert all(after[name] is before[name] for name in before)
    assert torch.utils.checkpoint._checkpoint_debug_enabled is None


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_evaluation_recomputes_nothing(config: BackboneConfig) -> None:
    module = build(config)
    images = torch.randn(2, 3, config.input_size, config.input_size)
    module.eval()
    plain = module(images)
    set_checkpointing(module, "block")
    assert torch.equal(module(images), plain)
    assert module.state_dict().keys() == build(config).state_dict().keys()


def kept_bytes(config: BackboneConfig, level: Checkpointing) -> int:
    """Bytes that a forward pass of 4 images keeps for the backward pass, besides weights; each storage once."""
    with torch.device("meta"):
        module = build(config).train()
        set_checkpointing(module, level)
        images = torch.randn(4, 3, config.input_size, config.input_size)
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = module(images)
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    del embeddings
    return total


def test_memory_falls_as_the_formulas_say() -> None:
    blocks = 24
    config = IResNetConfig(blocks=(1, 1, blocks, 1), width=8, input_size=64)
    kept = {level: kept_bytes(config, level) for level in ("none", *LEVELS)}  # type: ignore[arg-type]
    one_map = 4 * 32 * 8 * 8 * 4  # (4, 4 * width, 8, 8) float32
    # From none to block each block of the stage keeps its input alone; all blocks but the first are alike.
    saved_maps = (kept["none"] - kept["block"]) / one_map
    assert saved_maps > (MAPS_A_BLOCK - 1) * blocks
    assert kept["block"] - kept["segment"] == (blocks - -(-blocks // segment_of(blocks))) * one_map
    assert kept["segment"] - kept["stage"] == (-(-blocks // segment_of(blocks)) - 1) * one_map
    assert kept["none"] > 3.5 * kept["block"]


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_network_keeps_less(config: BackboneConfig) -> None:
    wide = dataclasses.replace(config, input_size=2 * config.input_size)
    assert kept_bytes(wide, "block") < 0.8 * kept_bytes(wide, "none")


def test_segments_are_the_best_length() -> None:
    for blocks in (1, 3, 13, 30, 88, 220, 512):
        cost = [-(-blocks // k) + MAPS_A_BLOCK * k for k in range(1, blocks + 1)]
        assert cost[segment_of(blocks) - 1] <= 1.15 * min(cost)


def _ddp_share(rank: int, world: int, folder: str) -> None:
    import torch.distributed as td
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    levels: tuple[Checkpointing, ...] = ("none", "segment")
    for level in levels:
        torch.manual_seed(0)
        module = build(NETWORKS["iresnet"]).train()
        set_checkpointing(module, level)
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        for step in range(2):
            torch.manual_seed(100 * step + rank)
            module.zero_grad()
            wrapped(torch.randn(3, 3, 32, 32)).square().sum().backward()
        if rank == 0:
            gradients = {f"grad.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
            torch.save({**module.state_dict(), **gradients}, os.path.join(folder, f"{level}.pt"))
    td.destroy_process_group()


def test_same_bits_under_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_ddp_share, (2, str(tmp_path)), 2, start_method="spawn")
    plain, recomputed = (torch.load(tmp_path / f"{level}.pt") for level in ("none", "segment"))
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []
