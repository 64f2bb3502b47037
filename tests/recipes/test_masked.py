"""Recipes with masks have the paper's settings, and masks that are set but never drawn are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visard.config import DataConfig, FramingConfig, IResNetConfig, MarginConfig, MaskConfig
from visard.data.dataset import open_dataset
from visard.errors import UserError
from visard.recipes import load_recipe
from visard.recipes.train import parse
from visard.training.loop import train


def test_the_papers_settings() -> None:
    first, second = load_recipe("mfr_masks_15"), load_recipe("mfr_masks_33")
    for recipe in (first, second):
        margin = recipe.head.margin
        assert isinstance(margin, MarginConfig)
        assert (margin.m1, margin.m2, margin.m3) == (1, 0, 0.4)
        assert isinstance(recipe.backbone, IResNetConfig)
        assert recipe.backbone.dropout == 0.4
        assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0.9, 1e-4)
        assert recipe.schedule.base_batch == 256
    assert (first.data.masks.probability, second.data.masks.probability) == (0.15, 0.33)
    assert (first.schedule.epochs, first.schedule.milestones, first.optim.lr) == (17, (5, 9, 12, 15), 0.1)
    assert second.schedule.epochs == 3
    assert load_recipe("masked_finetune").run.init_centres == "class-means"


def test_masks_that_are_never_drawn_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.masks: its settings do nothing while its probability is 0"):
        parse(["rendered_tiny", "--data.masks.uv-share", "1"])
    request = parse(["rendered_tiny", "--data.masks.probability", "0.2", "--data.masks.kinds.n95", "0"])
    assert request is not None
    assert request.recipe.data.masks.kinds.n95 == 0


def test_masks_on_photographs_that_are_not_aligned_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.masks are for aligned crops of faces"):
        DataConfig(framing=FramingConfig(kind="photograph"), masks=MaskConfig(probability=0.3))


def test_a_run_with_masks_logs_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["--schedule.max-steps", "3", "--run.log-every", "3", "--schedule.milestones", "3.0", "--out", "run"]
    request = parse(["mfr_masks_15_tiny", *overrides, "--data", "rendered:8x8", "--data.masks.probability", "0.5"])
    assert request is not None
    run = train(request.recipe, open_dataset("rendered:8x8", size=56))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in logged if line["kind"] == "train")
    assert 0.25 < last["masked"] + last["mask_refused"] < 0.75
