"""What a margin remembers: brought up to date over the whole step however it is divided, saved, and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.heads.test_full import make_batch
from tests.training import processes
from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of, with_steps
from visard.config import (
    AdaFaceConfig,
    AnyMarginConfig,
    CurricularFaceConfig,
    HeadConfig,
    MagFaceConfig,
    MarginConfig,
    Recipe,
    from_dict,
    to_dict,
)
from visard.errors import UserError
from visard.functional.margins_adaptive import magface
from visard.functional.softmax import margin_softmax_whole
from visard.heads.full import FullHead
from visard.training.loop import train

CONFIGS: dict[str, AnyMarginConfig] = {
    "combined": MarginConfig(scale=16.0),
    "adaface": AdaFaceConfig(scale=16.0, t_alpha=0.3),
    "curricularface": CurricularFaceConfig(scale=16.0, momentum=0.7),
    "magface": MagFaceConfig(scale=16.0, l_a=1.0, u_a=8.0, lambda_g=2.0),
}
KEPT = {"adaface": ["margin.norm_mean", "margin.norm_std"], "curricularface": ["margin.cos_mean"]}


def head_of(name: str, subcentres: int = 1) -> FullHead:
    torch.manual_seed(0)
    return FullHead(9, 6, HeadConfig(margin=CONFIGS[name], subcentres=subcentres))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_holds_what_is_remembered(name: str) -> None:
    assert sorted(head_of(name).state_dict()) == [*KEPT.get(name, []), "weight"]


@pytest.mark.parametrize("name", KEPT)
def test_state_moves_once_a_step(name: str) -> None:
    """Not by looking, only by `after_step`; a forward without it changes nothing."""
    head, emb, batch = head_of(name), 3 * torch.randn(4, 6), make_batch([0, 8, 2, 3])
    before = {key: value.clone() for key, value in head.state_dict().items()}
    head.begin_step(4)
    head(emb, batch)
    assert_same_bits(dict(head.state_dict()), before)
    head.after_step()
    assert all(not torch.equal(head.state_dict()[key], before[key]) for key in KEPT[name])
    after = {key: value.clone() for key, value in head.state_dict().items()}
    head.after_step()
    assert_same_bits(dict(head.state_dict()), after)


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_leave_the_state_of_the_whole_step(name: str) -> None:
    """Three steps in one batch and in uneven parts, with unlabelled images."""
    whole, parts = head_of(name), head_of(name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        emb, labels = 3 * torch.randn(7, 6, generator=generator), [0, 8, -1, 3, 3, 2, -1]
        whole.begin_step(7)
        whole(emb, make_batch(labels))
        whole.after_step()
        parts.begin_step(7)
        for rows in (slice(0, 2), slice(2, 3), slice(3, 7)):
            parts(emb[rows], make_batch(labels[rows]))
        parts.after_step()
    torch.testing.assert_close(dict(parts.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gradient", ["exact", "straight-through"])
def test_loss_is_that_of_the_function(name: str, gradient: str) -> None:
    head = FullHead(9, 6, HeadConfig(margin=replace(CONFIGS[name], gradient=gradient)))  # type: ignore[call-arg]
    emb, batch = 3 * torch.randn(4, 6), make_batch([0, 8, -1, 3])
    state = {key: value.clone() for key, value in head.margin.state().items()}
    loss, _ = head(emb, batch)
    expected = margin_softmax_whole(
        emb, head.weight, batch.labels, head.margin.function, scale=16.0, denominator=4, state=state
    )
    torch.testing.assert_close(loss, expected.loss)


def test_magface_settings_reach_the_function() -> None:
    config = MagFaceConfig(l_a=2.0, u_a=9.0, l_m=0.1, u_m=0.3, lambda_g=5.0)
    head = FullHead(2, 2, HeadConfig(margin=config))
    cos, norms = torch.tensor([0.3, 0.7]), torch.tensor([4.0, 7.0])
    ours = head.margin.function(cos, norms, {}, lambda values: values.sum(1))
    expected = magface(cos, norms, {}, l_a=2.0, u_a=9.0, l_m=0.1, u_m=0.3, lambda_g=5.0)
    assert torch.equal(ours.cos, expected.cos)
    assert ours.regulariser is not None
    assert expected.regulariser is not None
    assert torch.equal(ours.regulariser, expected.regulariser)


def test_subcentres_are_rows_of_a_class() -> None:
    head = head_of("combined", subcentres=3)
    assert head.weight.shape == (9, 3, 6)
    emb = head.weight.detach()[[2, 7], [0, 2]].clone()
    loss, logs = head(emb, make_batch([2, 7]))
    assert logs["accuracy"].item() == 1
    assert logs["cos_target"].item() == pytest.approx(1, abs=1e-6)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.shape == (9, 3, 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_margins_survive_json(name: str) -> None:
    recipe = Recipe(name="a", head=HeadConfig(margin=CONFIGS[name], subcentres=2))
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))), where="x") == recipe


def test_files_without_a_kind_mean_the_combined_margin() -> None:
    """What was written before there were others."""
    recipe = from_dict(Recipe, {"name": "a", "head": {"margin": {"m2": 0.3, "scale": 32.0}}}, where="x")
    assert recipe.head.margin == MarginConfig(m2=0.3, scale=32.0)


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        ({"kind": "sphereface2"}, "margin: kind 'sphereface2' is not one of 'combined', 'adaface'"),
        ({"kind": "adaface", "m2": 0.5}, "margin: unknown key 'm2'; known are"),
        ({"kind": "adaface", "h": 0.0}, "head.margin.h is 0.0"),
        ({"kind": "adaface", "t_alpha": 0.0}, "head.margin.t_alpha is 0.0"),
        ({"kind": "adaface", "m": 2.0}, "head.margin.m is 2.0"),
        ({"kind": "curricularface", "momentum": 1.0}, "head.margin.momentum is 1.0"),
        ({"kind": "magface", "l_a": 120.0}, "head.margin.l_a 120.0 must be above 0 and below u_a 110.0"),
        ({"kind": "magface", "l_m": 0.9}, "head.margin.l_m 0.9 must not be negative, nor above u_m 0.8"),
        ({"kind": "magface", "lambda_g": -1.0}, "head.margin.lambda_g is -1.0"),
    ],
)
def test_mistakes_are_named(margin: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(HeadConfig, {"margin": margin}, where="r.json")
    assert message in str(caught.value)


def test_no_subcentre_is_refused() -> None:
    with pytest.raises(UserError, match=r"head\.subcentres is 0; use 1 to 64"):
        HeadConfig(subcentres=0)


@pytest.mark.parametrize("name", ["adaface", "curricularface", "magface"])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """12 steps against 5 and a resume, running means included; the rate is constant, so the first part is the same."""
    runs = []
    for out, first in (("whole", 0), ("parts", 5)):
        recipe = replace(tiny_recipe(tmp_path / out), head=HeadConfig(margin=CONFIGS[name], subcentres=2))
        recipe = replace(recipe, schedule=replace(recipe.schedule, kind="constant", warmup_epochs=0))
        if first:
            train(with_steps(recipe, first), PaintedFaces())
        train(recipe, PaintedFaces(), resume=bool(first))
        runs.append(weights_of(recipe.run.out))
    assert_same_bits(*runs)
    assert {f"head.{key}" for key in KEPT.get(name, [])} <= runs[0].keys()


@pytest.mark.parametrize("name", ["adaface", "curricularface"])
def test_two_processes_remember_what_one_does(name: str, tmp_path: Path) -> None:
    """2 x 4 images against 1 x 8 for 12 steps without batch norm: statistics are those of the global batch."""
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        options = {"out": str(out), "batch_norm": False, "head": to_dict(HeadConfig(margin=CONFIGS[name]))}
        processes.run(count, "-m", "tests.training.train_tiny", json.dumps(options))
        found.append(weights_of(out))
    for key in found[0]:
        error = (found[0][key] - found[1][key]).abs().max().item()
        assert error <= 2e-5 * max(1.0, found[0][key].abs().max().item()), (key, error)
    assert {f"head.{key}" for key in KEPT[name]} <= found[0].keys()
