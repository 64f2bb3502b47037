"""The step of some rows against torch's SGD: equal on those rows, and not a bit of the others is moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visard.config import HeadConfig, OptimConfig
from visard.heads.sharded import ShardedHead
from visard.records import RowGrad
from visard.training import rows as rows_module
from visard.training.optim import Optimizer, square_of
from visard.training.rows import RowStep, step_rows


def settings(**changes: object) -> RowStep:
    values = {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "nesterov": False,
        "divisor": torch.tensor(4.0),
        "skip": torch.tensor(0.0),
    }
    return RowStep(**{**values, **changes})  # type: ignore[arg-type]


def sgd(parameter: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, step: RowStep) -> torch.Tensor:
    """torch's own step; `momentum` is moved in place."""
    moved = nn.Parameter(parameter.clone())
    optimizer = torch.optim.SGD(
        [moved], lr=step.lr, momentum=step.momentum, weight_decay=step.weight_decay, nesterov=step.nesterov
    )
    if step.momentum:
        optimizer.state[moved]["momentum_buffer"] = momentum
    moved.grad = gradient / step.divisor
    optimizer.step()
    return moved.detach()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("block", [5, 1 << 17])
@pytest.mark.parametrize("shape", [(13, 5), (13, 3, 5)])
@pytest.mark.parametrize("chosen", [[], [4], [0, 3, 4, 9, 12], list(range(13)), None])
def test_equals_sgd_on_the_rows_and_leaves_the_others(
    nesterov: bool, block: int, shape: tuple[int, ...], chosen: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    step = settings(nesterov=nesterov)
    parameter, momentum = torch.randn(shape), torch.randn(shape)
    rows = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    index = torch.arange(13) if rows is None else rows
    gradient = torch.randn(len(index), *shape[1:])
    expected_momentum = momentum[index].clone()
    expected = sgd(parameter[index], expected_momentum, gradient, step)
    before = parameter.clone(), momentum.clone()
    step_rows(parameter, momentum, RowGrad(rows, gradient.clone()), step)
    torch.testing.assert_close(parameter[index], expected)
    torch.testing.assert_close(momentum[index], expected_momentum)
    others = [i for i in range(13) if i not in index.tolist()]
    assert torch.equal(parameter[others], before[0][others])
    assert torch.equal(momentum[others], before[1][others])


def test_others_may_decay_as_in_dense_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 12)
    torch.manual_seed(0)
    parameter, momentum, rows = torch.randn(9, 4), torch.randn(9, 4), torch.tensor([1, 2, 7])
    gradient = torch.randn(3, 4)
    dense = torch.zeros(9, 4).index_copy_(0, rows, gradient)
    expected_momentum = momentum.clone()
    expected = sgd(parameter, expected_momentum, dense, settings())
    step_rows(parameter, momentum, RowGrad(rows, gradient, others_decay=True), settings())
    torch.testing.assert_close(parameter, expected)
    torch.testing.assert_close(momentum, expected_momentum)


def test_without_momentum() -> None:
    torch.manual_seed(0)
    parameter, rows, gradient = torch.randn(9, 4), torch.tensor([0, 8]), torch.randn(2, 4)
    step = settings(momentum=0.0)
    expected = sgd(parameter[rows], torch.zeros(2, 4), gradient, step)
    step_rows(parameter, None, RowGrad(rows, gradient), step)
    torch.testing.assert_close(parameter[rows], expected)


def test_a_skipped_step_moves_nothing() -> None:
    parameter, momentum = torch.ones(4, 2), torch.ones(4, 2)
    gradient = RowGrad(torch.tensor([1, 3]), torch.full((2, 2), float("nan")), others_decay=True)
    step_rows(parameter, momentum, gradient, settings(skip=torch.tensor(1.0)))
    assert (parameter == 1).all()
    assert (momentum == 1).all()


@pytest.mark.parametrize("bad", ["backbone", "rows"])
def test_one_bad_number_anywhere_stops_backbone_and_centres_alike(bad: str) -> None:
    """fp16: the scale is halved once, and neither part has moved."""
    torch.manual_seed(0)
    backbone, head = nn.Linear(3, 4), ShardedHead(7, 4, HeadConfig(classes="sharded"))
    named = [*backbone.named_parameters(), ("centres", head.weight)]
    optimizer = Optimizer(named, OptimConfig(), fp16=True, sharded=["centres"])
    before = [p.detach().clone() for _, p in named]
    for p in backbone.parameters():
        p.grad = torch.ones_like(p)
    rows = {"centres": RowGrad(None, torch.ones(7, 4))}
    (backbone.weight.grad if bad == "backbone" else rows["centres"].grad)[0, 0] = float("inf")  # type: ignore[index]
    report = optimizer.step(0.1, torch.tensor(1.0), rows)
    assert report.skipped.item() == 1
    assert report.failed.item() == 0
    assert optimizer.scaler_state() == {"scale": 2.0**15, "good_steps": 0}
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


@pytest.mark.parametrize("fp16", [False, True])
def test_clipping_is_by_the_norm_of_backbone_and_rows_together(fp16: bool) -> None:
    """Against one torch SGD of both with clip_grad_norm_."""
    torch.manual_seed(0)
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, clip_norm=0.5, decay_norm_and_bias=True)
    backbone, centres = nn.Linear(3, 4), nn.Parameter(torch.randn(7, 4))
    theirs = [nn.Parameter(p.detach().clone()) for p in (*backbone.parameters(), centres)]
    ours = Optimizer([*backbone.named_parameters(), ("centres", centres)], config, fp16=fp16, sharded=["centres"])
    sgd_of_all = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    scale = 2.0**16 if fp16 else 1.0
    for seed in range(3):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in theirs]
        for p, g in zip(backbone.parameters(), gradients, strict=False):
            p.grad = scale * g
        rows = {"centres": RowGrad(None, scale * gradients[-1])}
        report = ours.step(0.1, torch.tensor(1.0), rows, square_of(rows))
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        sgd_of_all.step()
        assert report.norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for left, right in zip((*backbone.parameters(), centres), theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert ours.momentum().keys() == {"weight", "bias", "centres"}


def test_the_scale_grows_after_enough_good_steps() -> None:
    backbone = nn.Linear(2, 2)
    optimizer = Optimizer(backbone.named_parameters(), OptimConfig(), fp16=True)
    optimizer.load_scaler_state({"scale": 8.0, "good_steps": 1998})
    scales = []
    for _ in range(3):
        for p in backbone.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(0.1, torch.tensor(1.0))
        scales.append(optimizer.scaler_state())
    assert [s["scale"] for s in scales] == [8.0, 16.0, 16.0]
    assert [s["good_steps"] for s in scales] == [1999, 0, 1]
