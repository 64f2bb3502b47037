"""Recipes of the field: their settings are those of the source, and the first losses of their tiny variants are golden.

After an intended change of numbers: `python -m tests.recipes.test_published` writes the file anew; say in the commit
why.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visard.backbones import build
from visard.config import AdaFaceConfig, HeadConfig, MarginConfig, Recipe
from visard.data.dataset import open_dataset
from visard.errors import UserError
from visard.recipes import RECIPES, load_recipe
from visard.recipes.train import parse
from visard.training.loop import train

GOLDEN = Path(__file__).parent / "golden" / "published.json"
NAMES = [name for name, place in RECIPES.items() if place.startswith("visard.recipes.published:")]
TINY = [name for name in NAMES if name.endswith("_tiny")]
STEPS = 4

# margins m1, m2, m3; blocks; weight decay: configs/*.py of arcface_torch
ARCFACE_TORCH = {
    "ms1mv3_r50": ((1.0, 0.5, 0.0), (3, 4, 14, 3), 5e-4),
    "glint360k_r100": ((1.0, 0.0, 0.4), (3, 13, 30, 3), 1e-4),
    "wf42m_pfc02_r100": ((1.0, 0.0, 0.4), (3, 13, 30, 3), 5e-4),
}


def test_each_has_a_tiny_variant() -> None:
    assert len(TINY) == 4
    assert sorted(NAMES) == sorted([*TINY, *(name.removesuffix("_tiny") for name in TINY)])


@pytest.mark.parametrize("name", ARCFACE_TORCH)
def test_settings_of_arcface_torch(name: str) -> None:
    recipe = load_recipe(name)
    margin, blocks, weight_decay = ARCFACE_TORCH[name]
    assert isinstance(recipe.head.margin, MarginConfig)
    assert (recipe.head.margin.m1, recipe.head.margin.m2, recipe.head.margin.m3) == margin
    assert recipe.head.margin.scale == 64
    assert recipe.head.margin.gradient == "straight-through" or margin[1] == 0  # CosFace's is the exact one
    assert recipe.backbone.blocks == blocks  # type: ignore[union-attr]
    assert recipe.backbone.dropout == 0  # type: ignore[union-attr]
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay) == (0.1, 0.9, weight_decay)
    assert recipe.optim.decay_norm_and_bias
    assert recipe.optim.clip_norm == 5
    schedule = recipe.schedule
    assert (schedule.kind, schedule.power, schedule.epochs, schedule.warmup_epochs) == ("polynomial", 2, 20, 0)
    assert (recipe.run.batch_global, recipe.run.precision) == (8 * 128, "fp16")
    with torch.device("meta"):
        assert sum(p.numel() for p in build(recipe.backbone).parameters()) > 43e6


def test_settings_of_adaface() -> None:
    recipe = load_recipe("adaface_ms1mv2_r50")
    assert recipe.head.margin == AdaFaceConfig(m=0.4, h=0.333, t_alpha=0.01, scale=64.0)
    assert (recipe.backbone.kind, recipe.backbone.blocks) == ("ir", (3, 4, 14, 3))  # type: ignore[union-attr]
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip_norm) == (0.1, 5e-4, 0)
    assert (recipe.schedule.epochs, recipe.schedule.milestones, recipe.schedule.gamma) == (26, (12, 20, 24), 0.1)
    assert recipe.run.batch_global == 256
    augment = recipe.data.augment
    assert (augment.crop.probability, augment.light.probability, augment.low_resolution.probability) == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_its_margin_can_be_overridden(name: str) -> None:
    request = parse([name, "--data", "x", "--head.margin.scale", "48", "--head.subcentres", "3"])
    assert request is not None
    assert request.recipe.head.margin.scale == 48
    assert request.recipe.head.subcentres == 3
    assert type(request.recipe.head.margin) is type(load_recipe(name).head.margin)


@pytest.mark.parametrize("words", [["--head.margin.kind", "adaface"], ["--head.margin.kind=adaface"]])
def test_another_margin_by_its_kind(words: list[str]) -> None:
    """Its own fields become options; scale and gradient stay the recipe's."""
    request = parse(["ms1mv3_r50", "--data", "x", *words, "--head.margin.h", "0.5", "--head.subcentres", "2"])
    assert request is not None
    expected = AdaFaceConfig(h=0.5, scale=64.0, gradient="straight-through")
    assert request.recipe.head == HeadConfig(margin=expected, subcentres=2, classes="sharded")


def test_an_unknown_margin_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--head\.margin\.kind: head: margin: kind 'arc' is not one of 'combined', "):
        parse(["ms1mv3_r50", "--head.margin.kind", "arc"])


def short(name: str, out: Path) -> Recipe:
    recipe = load_recipe(name)
    run = replace(recipe.run, out=out, val=(), tensorboard=False, device="cpu", log_every=1, float32_matmul="highest")
    run = replace(run, precision="fp32")
    return replace(recipe, schedule=replace(recipe.schedule, max_steps=STEPS), run=run)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TINY)
def test_losses_are_golden(name: str, tmp_path: Path) -> None:
    recipe = short(name, tmp_path / "run")
    train(recipe, open_dataset(recipe.data.source, size=recipe.data.size))
    assert losses(tmp_path / "run") == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny_learns(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe = replace(recipe, run=replace(recipe.run, out=tmp_path / "run", val=(), tensorboard=False, device="cpu"))
    train(recipe, open_dataset(recipe.data.source, size=recipe.data.size))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.3


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for tiny in TINY:
        with tempfile.TemporaryDirectory() as folder:
            chosen = short(tiny, Path(folder) / "run")
            train(chosen, open_dataset(chosen.data.source, size=chosen.data.size))
            found[tiny] = [round(loss, 6) for loss in losses(chosen.run.out)]
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
