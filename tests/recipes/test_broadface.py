"""BroadFace's recipe has the settings of the paper's Sec. 4.1; its tiny variant learns with a full queue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visard.backbones import build
from visard.config import MarginConfig, QueueConfig
from visard.data.dataset import open_dataset
from visard.errors import UserError
from visard.recipes import load_recipe
from visard.recipes.train import parse
from visard.training.loop import train
from visard.training.schedule import learning_rate, total_steps

SAMPLE = 3_800_000 // 512


def test_settings_of_section_4_1() -> None:
    recipe = load_recipe("broadface_ms1m_r100")
    assert recipe.head.margin == MarginConfig(m1=1.0, m2=0.5, m3=0.0, scale=64.0)
    assert recipe.head.queue == QueueConfig(size=32_768, compensation=True)
    assert (recipe.run.batch_global, recipe.backbone.embedding_dim) == (512, 512)
    assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0.9, 5e-4)
    assert total_steps(recipe.schedule, SAMPLE) == 80_000
    rates = [
        learning_rate(step, recipe.schedule, peak=recipe.optim.lr, steps_per_epoch=SAMPLE)
        for step in (0, 49_999, 50_000, 69_999, 70_000, 79_999)
    ]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    with torch.device("meta"):
        assert sum(p.numel() for p in build(recipe.backbone).parameters()) == pytest.approx(65.2e6, rel=0.01)


def test_the_queue_by_its_options() -> None:
    words = ["ms1mv3_r50", "--data", "x", "--head.queue.size", "1024", "--head.queue.no-compensation"]
    request = parse(words)
    assert request is not None
    assert request.recipe.head.queue == QueueConfig(size=1024, compensation=False)
    for wrong, message in (
        (["adaface_ms1mv2_r50", "--head.queue.size", "8"], "head.queue.size needs head.classes sharded"),
        (["ms1mv3_r50", "--head.queue.no-compensation"], "head.queue.compensation does nothing without a queue"),
        (["broadface_ms1m_r100", "--head.subcentres", "3"], "a queue needs 1 sub-centre"),
    ):
        with pytest.raises(UserError, match=message):
            parse(wrong)


def test_milestones_in_epochs_or_in_steps() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        parse(["broadface_ms1m_r100", "--schedule.milestones", "3"])
    with pytest.raises(UserError, match=r"milestone_steps .* must increase"):
        parse(["broadface_ms1m_r100", "--schedule.milestone-steps", "3", "2"])
    request = parse(["broadface_ms1m_r100", "--schedule.kind", "cosine"])
    assert request is not None
    assert request.recipe.schedule.milestone_steps == ()


@pytest.mark.slow
def test_tiny_learns_with_a_full_queue(tmp_path: Path) -> None:
    recipe = load_recipe("broadface_ms1m_r100_tiny")
    recipe = replace(recipe, run=replace(recipe.run, out=tmp_path / "run", val=(), tensorboard=False, device="cpu"))
    train(recipe, open_dataset(recipe.data.source, size=recipe.data.size))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["queue"] == recipe.head.queue.size
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.3
