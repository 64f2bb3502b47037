"""LARS against its formula, for whole parameters, class rows and shards alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import weights_of
from tests.training.test_processes import RUN, assert_close, train
from visard.config import OptimConfig
from visard.errors import UserError
from visard.records import RowGrad
from visard.training.optim import Optimizer

SHARDED = {"classes": "sharded", "margin": {"kind": "combined", "m2": 0.2, "scale": 16.0}}


def lars(
    weight: torch.Tensor, grad: torch.Tensor, past: torch.Tensor, lr: float, config: OptimConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of arXiv:1708.03888 in float64: (weight, momentum) after a step."""
    weight, grad, past = weight.double(), grad.double(), past.double()
    local = config.trust * weight.norm() / (grad.norm() + config.weight_decay * weight.norm())
    past = config.momentum * past + local * (grad + config.weight_decay * weight)
    return weight - lr * past, past


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_step_is_the_papers(clip_norm: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    centres = nn.Parameter(torch.randn(7, 5))
    config = OptimConfig(kind="lars", trust=0.01, clip_norm=clip_norm)
    named = {**dict(module.named_parameters()), "centres": centres}
    optimizer = Optimizer(named.items(), config, fp16=False, sharded=["centres"])
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in named.items()}
    rows = torch.tensor([1, 4, 6])
    for step in range(3):
        gradients = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        for name, p in module.named_parameters():
            p.grad = gradients[name].clone()
        gradients["centres"] = torch.randn(3, 5)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        factor = min(1.0, clip_norm / (norm.item() + 1e-6)) if clip_norm else 1.0
        lr = 0.1 * (step + 1)
        report = optimizer.step(lr, torch.tensor(1.0), {"centres": RowGrad(rows, gradients["centres"].clone())})
        assert report.norm.item() == pytest.approx(norm.item(), rel=1e-5)
        for name, (weight, past) in expected.items():
            grad = gradients[name] * factor
            if name == "centres":
                weight[rows], past[rows] = (t.float() for t in lars(weight[rows], grad, past[rows], lr, config))
            elif weight.ndim > 1:
                expected[name] = tuple(t.float() for t in lars(weight, grad, past, lr, config))
            else:  # plain SGD without decay
                past.mul_(config.momentum).add_(grad)
                weight.sub_(lr * past)
    for name, (weight, past) in expected.items():
        torch.testing.assert_close(named[name].detach(), weight, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(optimizer.tensors()["momentum"][name], past, rtol=1e-5, atol=1e-7, msg=name)


def test_a_parameter_or_gradient_of_zeros_has_the_plain_rate() -> None:
    config = OptimConfig(kind="lars", weight_decay=0.0, momentum=0.0, clip_norm=0.0)
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"first": first, "second": second}.items(), config, fp16=False)
    first.grad, second.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step(0.5, torch.tensor(1.0))
    assert torch.equal(first.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(second.detach(), torch.ones(2, 2))


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"weight": weight}.items(), OptimConfig(kind="lars"), fp16=False)
    weight.grad = torch.tensor([[float("inf"), 0.0], [0.0, 1.0]])
    assert optimizer.step(0.5, torch.tensor(1.0)).skipped.item() == 1
    assert torch.equal(weight.detach(), torch.ones(2, 2))
    assert torch.equal(optimizer.tensors()["momentum"]["weight"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    "run", [pytest.param({}, marks=pytest.mark.slow), pytest.param({"zero": 1}, marks=pytest.mark.slow), {"zero": 3}]
)
def test_two_processes_equal_one(run: dict[str, Any], tmp_path: Path) -> None:
    """Norms are those of whole parameters and of all processes' class rows."""
    options: dict[str, Any] = {"batch_norm": False, "head": SHARDED, "optim": {"kind": "lars", "trust": 0.02}}
    one = train(1, tmp_path / "one", run=RUN, **options)
    two = train(2, tmp_path / "two", run={**RUN, **run}, **options)
    assert_close(two, one)
    plain = train(1, tmp_path / "plain", run=RUN, **{**options, "optim": {"kind": "sgd"}})
    assert any((plain[name] - one[name]).abs().max() > 1e-3 for name in weights_of(tmp_path / "one"))


def test_settings_of_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.trust belongs to kind lars"):
        OptimConfig(trust=0.1)
