"""The step of some rows against torch's own optimizers: equal on those rows, and not a bit of the others is moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visard.config import HeadConfig, OptimConfig
from visard.heads.sharded import ShardedHead
from visard.records import RowGrad
from visard.training import rows as rows_module
from visard.training.optim import Optimizer
from visard.training.rows import step_rows
from visard.training.rules import RULES, RowStep, State


def settings(**changes: object) -> tuple[OptimConfig, RowStep]:
    values = {"lr": 0.1, "weight_decay": 0.01}
    return OptimConfig(**{**values, **changes}), row_step()  # type: ignore[arg-type]


def row_step(skip: float = 0.0) -> RowStep:
    return RowStep(lr=0.1, divisor=torch.tensor(4.0), skip=torch.tensor(skip))


def torchs(parameter: torch.Tensor, state: State, gradient: torch.Tensor, config: OptimConfig) -> torch.Tensor:
    """torch's own step of lr 0.1; `state` is moved in place."""
    moved = nn.Parameter(parameter.clone())
    if config.kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [moved], 0.1, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
        )
    else:
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.Adam([moved], 0.1, betas, config.eps, weight_decay=config.weight_decay, foreach=False)
    rule = RULES[config.kind](config)
    if state:
        optimizer.state[moved].update({theirs: state[ours] for ours, theirs in rule.names.items()})
    moved.grad = gradient / 4
    optimizer.step()
    return moved.detach()


def randoms(shape: tuple[int, ...], config: OptimConfig) -> tuple[torch.Tensor, State]:
    """A parameter and what is remembered of it, in the middle of training; rows were stepped differently often."""
    parameter = torch.randn(shape)
    state = RULES[config.kind](config).begin(nn.Parameter(parameter), rows=True)
    for name, tensor in state.items():
        if name == "steps":
            tensor.copy_(torch.randint(0, 50, tensor.shape))
        else:
            tensor.copy_(torch.rand(tensor.shape) if name == "second_moment" else torch.randn(tensor.shape))
    return parameter, state


def row_by_row(
    parameter: torch.Tensor, state: State, gradient: torch.Tensor, config: OptimConfig
) -> tuple[torch.Tensor, State]:
    """Each row as a parameter of its own to torch."""
    moved, after = [], []
    for row in range(len(parameter)):
        own = {name: tensor[row].clone() for name, tensor in state.items()}
        moved.append(torchs(parameter[row], own, gradient[row], config))
        after.append(own)
    return torch.stack(moved), {name: torch.stack([own[name] for own in after]) for name in state}


KINDS: list[dict[str, object]] = [{}, {"nesterov": True}, {"momentum": 0.0}, {"kind": "adam", "beta2": 0.99}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [5, 1 << 17])
@pytest.mark.parametrize("shape", [(13, 5), (13, 3, 5)])
@pytest.mark.parametrize("chosen", [[], [4], [0, 3, 4, 9, 12], list(range(13)), None])
def test_equals_torchs_step_of_each_row_and_leaves_the_others(
    kind: dict[str, object],
    block: int,
    shape: tuple[int, ...],
    chosen: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    config, step = settings(**kind)
    parameter, state = randoms(shape, config)
    rows = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    index = torch.arange(13) if rows is None else rows
    gradient = torch.randn(len(index), *shape[1:])
    before = {"": parameter.clone(), **{name: tensor.clone() for name, tensor in state.items()}}
    if len(index):
        expected, after = row_by_row(parameter[index], {k: v[index] for k, v in state.items()}, gradient, config)
    step_rows(parameter, state, RowGrad(rows, gradient.clone()), RULES[config.kind](config), step)
    if len(index):
        torch.testing.assert_close(parameter[index], expected)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor[index], after[name])
    others = [i for i in range(13) if i not in index.tolist()]
    for name, tensor in {"": parameter, **state}.items():
        assert torch.equal(tensor[others], before[name][others]), name


@pytest.mark.parametrize("kind", KINDS)
def test_others_may_decay_as_in_a_dense_step(kind: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 12)
    torch.manual_seed(0)
    config, step = settings(**kind)
    parameter, state = randoms((9, 4), config)
    rows, gradient = torch.tensor([1, 2, 7]), torch.randn(3, 4)
    dense = torch.zeros(9, 4).index_copy_(0, rows, gradient)
    expected, after = row_by_row(parameter, state, dense, config)
    step_rows(parameter, state, RowGrad(rows, gradient, others_decay=True), RULES[config.kind](config), step)
    torch.testing.assert_close(parameter, expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, after[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_moves_nothing(kind: dict[str, object]) -> None:
    config, _ = settings(**kind)
    parameter, state = randoms((4, 2), config)
    before = [tensor.clone() for tensor in (parameter, *state.values())]
    gradient = RowGrad(torch.tensor([1, 3]), torch.full((2, 2), float("nan")), others_decay=True)
    step_rows(parameter, state, gradient, RULES[config.kind](config), row_step(skip=1.0))
    assert all(torch.equal(now, then) for now, then in zip((parameter, *state.values()), before, strict=True))


def test_adams_first_step_of_a_row_is_as_long_however_late_it_comes() -> None:
    """lr times the sign of the gradient; with one count of steps for all rows it would be 32 times as long at most."""
    config = OptimConfig(kind="adam", weight_decay=0.0)
    rule, parameter = RULES["adam"](config), torch.zeros(2, 3)
    state = rule.begin(nn.Parameter(parameter), rows=True)
    for _ in range(50):
        step_rows(parameter, state, RowGrad(torch.tensor([0]), torch.ones(1, 3)), rule, row_step())
    step_rows(parameter, state, RowGrad(torch.tensor([1]), torch.full((1, 3), -8.0)), rule, row_step())
    torch.testing.assert_close(parameter[1], torch.full((3,), 0.1))
    assert state["steps"].tolist() == [50, 1]


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
        report = ours.step(0.1, torch.tensor(1.0), rows, ours.squares(rows))
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        sgd_of_all.step()
        assert report.norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for left, right in zip((*backbone.parameters(), centres), theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert ours.tensors()["momentum"].keys() == {"weight", "bias", "centres"}


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
