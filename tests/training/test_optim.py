"""The optimizer against torch's plain ones with separate clipping; what it does with a gradient that is not finite."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from visard.config import OptimConfig
from visard.training.optim import Optimizer, decayed_names


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 5))
    return layers.to(memory_format=torch.channels_last)


def loss_of(module: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    return module(images).square().mean()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_equals_sgd_with_clip_grad_norm(nesterov: bool, clip_norm: float) -> None:
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov, clip_norm=clip_norm)
    ours, theirs = network(), network()
    optimizer = Optimizer(ours.named_parameters(), config, fp16=False)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False, fused=False)
    for step, lr in enumerate((0.1, 0.1, 0.02)):
        loss = loss_of(ours, step)
        optimizer.backward(loss)
        report = optimizer.step(lr, loss.detach())
        sgd.param_groups[0]["lr"] = sgd.param_groups[1]["lr"] = lr
        sgd.zero_grad()
        loss_of(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        sgd.step()
        assert report.norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert report.skipped.item() == report.failed.item() == 0
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_equals_adam_with_clip_grad_norm(clip_norm: float) -> None:
    """Weight decay goes through the moments (not AdamW); the counts of steps are state. A large eps, because the bias
    before a batch norm has a gradient of rounding alone, which Adam would make as long as any other."""
    config = OptimConfig(kind="adam", lr=0.01, beta1=0.8, beta2=0.99, eps=1e-3, weight_decay=0.1, clip_norm=clip_norm)
    ours, theirs = network(), network()
    optimizer = Optimizer(ours.named_parameters(), config, fp16=False)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-3, foreach=False, fused=False)
    for step, lr in enumerate((0.01, 0.01, 0.002)):
        loss = loss_of(ours, step)
        optimizer.backward(loss)
        report = optimizer.step(lr, loss.detach())
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = lr
        adam.zero_grad()
        loss_of(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        adam.step()
        assert report.norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert optimizer.tensors().keys() == {"momentum", "second_moment", "steps"}
    assert all(count == 3 for count in optimizer.tensors()["steps"].values())


def test_norms_biases_and_slopes_do_not_decay_unless_asked() -> None:
    module = network()
    named = dict(module.named_parameters())
    assert decayed_names(named, OptimConfig()) == {"0.weight", "4.weight"}
    assert decayed_names(named, OptimConfig(decay_norm_and_bias=True)) == set(named)


def test_frozen_parameters_are_left_out() -> None:
    module = network()
    module[4].weight.requires_grad = False
    optimizer = Optimizer(module.named_parameters(), OptimConfig(), fp16=False)
    assert "4.weight" not in optimizer.parameters
    assert "4.weight" not in optimizer.tensors()["momentum"]


def test_without_momentum_there_is_no_state() -> None:
    assert Optimizer(network().named_parameters(), OptimConfig(momentum=0.0), fp16=False).tensors() == {}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_moves_nothing(bad: float, where: str, kind: Literal["sgd", "adam"]) -> None:
    module = network()
    optimizer = Optimizer(module.named_parameters(), OptimConfig(kind=kind, lr=0.1), fp16=False)
    optimizer.backward(loss_of(module, 0))
    optimizer.step(0.1, torch.zeros(()))
    before = snapshot(module, optimizer)
    optimizer.backward(loss_of(module, 1))
    if where == "gradient":
        gradient = module[0].weight.grad
        assert gradient is not None
        gradient[0, 0, 0, 0] = bad
    report = optimizer.step(0.1, torch.tensor(bad if where == "loss" else 0.0))
    assert (report.skipped.item(), report.failed.item()) == (1, 1)
    assert all(torch.equal(now, then) for now, then in zip(snapshot(module, optimizer), before, strict=True))
    assert all(p.grad is None for p in module.parameters())


def snapshot(module: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    remembered = [tensor for by_name in optimizer.tensors().values() for tensor in by_name.values()]
    return [t.detach().clone() for t in (*module.parameters(), *remembered)]


def test_fp16_overflow_is_skipped_and_cured_by_the_scaler() -> None:
    """A gradient that overflows only because of the loss scale: the step is skipped, the scale halved, all is well."""
    module = network()
    optimizer = Optimizer(module.named_parameters(), OptimConfig(), fp16=True)
    state: dict[str, Any] = {**optimizer.scaler_state(), "scale": 2.0**127}
    optimizer.load_scaler_state(state)
    before = snapshot(module, optimizer)
    loss = loss_of(module, 0) * 16
    optimizer.backward(loss)
    report = optimizer.step(0.1, loss.detach())
    assert (report.skipped.item(), report.failed.item()) == (1, 0)
    assert optimizer.scaler_state()["scale"] == 2.0**126
    assert all(torch.equal(now, then) for now, then in zip(snapshot(module, optimizer), before, strict=True))


@pytest.mark.parametrize(("scale", "loss_value"), [(1.0, 0.0), (2.0**16, float("nan"))])
def test_fp16_fails_where_no_scale_helps(scale: float, loss_value: float) -> None:
    """At the smallest scale, or when the loss itself is not finite."""
    module = network()
    optimizer = Optimizer(module.named_parameters(), OptimConfig(), fp16=True)
    optimizer.load_scaler_state({**optimizer.scaler_state(), "scale": scale})
    optimizer.backward(loss_of(module, 0) * float("nan"))
    report = optimizer.step(0.1, torch.tensor(loss_value))
    assert (report.skipped.item(), report.failed.item()) == (1, 1)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_fp16_equals_fp32_when_nothing_overflows(kind: Literal["sgd", "adam"]) -> None:
    """A power of two as scale changes no bit of float32 gradients."""
    finals = []
    for fp16 in (False, True):
        module = network()
        optimizer = Optimizer(module.named_parameters(), OptimConfig(kind=kind), fp16=fp16)
        for step in range(3):
            loss = loss_of(module, step)
            optimizer.backward(loss)
            optimizer.step(0.1, loss.detach())
        finals.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))
