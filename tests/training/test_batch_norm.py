"""Running statistics are the mean over processes, and frozen ones stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tests.training import processes
from tests.training.conftest import PaintedFaces, tiny_recipe, weights_of
from visard.training.batch_norm import average_statistics, train_mode
from visard.training.loop import train

SHARE = """
import torch
from torch import nn
from visard import dist
from visard.training.batch_norm import average_statistics
dist.init(torch.device("cpu"))
net = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
images = torch.arange(3 * 2 * 4, dtype=torch.float32).view(3, 2, 2, 2) * (dist.rank() + 1)
torch.manual_seed(0)
nn.init.ones_(net[1].weight), nn.init.zeros_(net[1].bias)
net(images)
average_statistics(net)
print([round(v, 5) for name, b in net.named_buffers() if "running" in name for v in b.tolist()])
print(net[0].num_batches_tracked.item())
third = nn.Sequential(nn.BatchNorm2d(1), nn.Linear(1, 1)).train()
third.register_buffer("constant", torch.tensor([0.1]))
nn.init.constant_(third[0].running_mean, 0.1)
third[0].eval()
for _ in range(50):
    average_statistics(third)
print(bool(third.constant == torch.tensor([0.1]).item() and (third[0].running_mean == torch.tensor(0.1)).all()))
dist.close()
"""


def test_statistics_are_the_mean_over_processes() -> None:
    results = processes.run(3, "-c", SHARE)
    assert len({out for _, out, _ in results}) == 1
    found = torch.tensor(json.loads(results[0][1].splitlines()[0]))
    assert results[0][1].splitlines()[1:] == ["1", "True"]  # frozen statistics and constants keep their bits
    expected = []
    for rank in range(3):
        norm = nn.BatchNorm2d(2)
        norm(torch.arange(24, dtype=torch.float32).view(3, 2, 2, 2) * (rank + 1))
        expected.append(torch.cat([norm.running_mean, norm.running_var]))
    torch.testing.assert_close(found[:4], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-4)


def test_one_process_keeps_its_own() -> None:
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(8, 2))
    before = norm.running_var.clone()
    average_statistics(norm)
    assert torch.equal(norm.running_var, before)


def test_frozen_batch_norm_keeps_statistics_and_learns_weights(tmp_path: Path) -> None:
    first = tiny_recipe(tmp_path / "first")
    train(first, PaintedFaces())
    frozen = tiny_recipe(tmp_path / "frozen", init=str(tmp_path / "first"), freeze_bn=True)
    train(frozen, PaintedFaces(), evaluate=lambda embedder: {"score": float(embedder.spec.input_size)})
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "frozen")
    running = [name for name in before if "running_" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    scales = [name.replace("running_mean", "weight") for name in running if name.endswith("running_mean")]
    assert any((before[name] != after[name]).any() for name in scales if name in before)
    free = replace(frozen, run=replace(frozen.run, freeze_bn=False, out=tmp_path / "free"))
    train(free, PaintedFaces())
    moved = weights_of(tmp_path / "free")
    assert any((before[name] != moved[name]).any() for name in running)


def test_train_mode_freezes_batch_norm_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    train_mode(net, freeze_bn=True)
    assert [part.training for part in net] == [True, False, True]
    train_mode(net, freeze_bn=False)
    assert all(part.training for part in net)
