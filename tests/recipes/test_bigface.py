"""Recipes of very large networks have their sources' settings, and their tiny variants train with all of it at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training import processes
from visard.config import IResNetConfig, MarginConfig
from visard.recipes import RECIPES, load_recipe

NAMES = [name for name, place in RECIPES.items() if place.startswith("visard.recipes.bigface:")]
TINY = [name for name in NAMES if name.endswith("_tiny")]
BLOCKS = {"bigface_r240": (3, 25, 88, 3), "bigface_r600": (3, 70, 220, 3), "bigface_r1200": (3, 80, 512, 3)}


def test_each_has_a_tiny_variant() -> None:
    assert len(TINY) == 5
    assert sorted(NAMES) == sorted([*TINY, *(name.removesuffix("_tiny") for name in TINY)])


@pytest.mark.parametrize("name", BLOCKS)
def test_settings_of_the_slides(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe.backbone, IResNetConfig)
    assert recipe.backbone.blocks == BLOCKS[name]
    assert recipe.backbone.init == "depth"
    assert isinstance(recipe.head.margin, MarginConfig)
    assert (recipe.head.margin.m2, recipe.head.margin.m3, recipe.head.margin.scale) == (0, 0.4, 64)
    assert (recipe.optim.kind, recipe.optim.lr, recipe.optim.weight_decay) == ("lars", 0.01, 5e-4)
    assert (recipe.schedule.kind, recipe.schedule.epochs, recipe.schedule.base_batch) == ("multistep", 30, 256)
    assert recipe.run.batch_global % 256 == 0
    assert recipe.data.masks.probability == 0.35
    assert (recipe.run.precision, recipe.run.gradient_dtype) == ("fp16", "fp16")


def test_settings_of_the_sensetime_paper() -> None:
    first, second = load_recipe("mfr_wf42m"), load_recipe("mfr_wf42m_masks33")
    for recipe in (first, second):
        assert isinstance(recipe.head.margin, MarginConfig)
        assert (recipe.head.margin.m2, recipe.head.margin.m3) == (0, 0.4)
        assert isinstance(recipe.backbone, IResNetConfig)
        assert (recipe.backbone.dropout, recipe.backbone.embedding_dim) == (0.4, 512)
        assert (recipe.optim.kind, recipe.optim.momentum, recipe.optim.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (recipe.run.batch_global, recipe.schedule.base_batch) == (4512, 256)
        assert recipe.run.batch_global % 48 == 0
    assert (first.optim.lr, first.schedule.milestones, first.schedule.epochs) == (0.1, (5, 9, 12, 15), 17)
    assert (first.data.masks.probability, second.data.masks.probability, second.schedule.epochs) == (0.15, 0.33, 3)
    assert second.optim.lr == pytest.approx(first.optim.lr * first.schedule.gamma ** len(first.schedule.milestones))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny_learns(name: str, tmp_path: Path) -> None:
    """The whole tiny run on two processes: better than chance on people it has not seen."""
    out = tmp_path / "run"
    processes.run(2, "-m", "visard.cli", "train", name, "--out", str(out), "--run.no-tensorboard", seconds=600)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert [line["score"] for line in lines if line["kind"] == "val"][-1] > 0.6


def test_the_largest_runs_on_two_processes(tmp_path: Path) -> None:
    """LARS, ZeRO 3, micro-batches, checkpointing, masks, sums in bf16: 3 steps, a checkpoint and a model at the end."""
    out = tmp_path / "run"
    options = [
        "--schedule.max-steps",
        "3",
        "--schedule.milestones",
        "2.0",
        "--run.log-every",
        "1",
        "--run.no-tensorboard",
    ]
    few = [
        "--data",
        "rendered:12x4",
        "--val",
        "rendered:6x4,first=9000",
        "--run.val-pairs",
        "20",
        "--run.evaluate-every",
        "3",
    ]
    processes.run(2, "-m", "visard.cli", "train", "bigface_r1200_tiny", "--out", str(out), *options, *few)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert lines[-1]["kind"] == "val"
    assert (out / "checkpoints" / "step_00000003" / "model" / "model.safetensors").is_file()
