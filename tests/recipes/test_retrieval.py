"""The retrieval recipes: their settings, their tiny runs, and Adam with a queue resumed and shared out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import assert_same_bits, weights_of
from visard import checkpoint
from visard.config import Recipe
from visard.data.dataset import open_dataset
from visard.recipes import load_recipe
from visard.recipes.evaluation import validation
from visard.runtime import load
from visard.training.loop import train
from visard.training.schedule import learning_rate


@pytest.mark.parametrize("name", ["broadface_inshop_r50", "broadface_sop_r50"])
def test_settings_of_section_4_3(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.head.queue.size, recipe.head.queue.compensation) == (32768, True)
    assert (recipe.optim.kind, recipe.optim.lr, recipe.optim.weight_decay) == ("adam", 1e-4, 1e-5)
    assert (recipe.run.batch_global, recipe.data.size, recipe.schedule.epochs) == (128, 224, 100)
    rates = [learning_rate(e * 10, recipe.schedule, peak=1e-4, steps_per_epoch=10) for e in (0, 39, 40, 60, 80, 99)]
    assert rates == pytest.approx([1e-4, 1e-4, 2e-5, 4e-6, 8e-7, 8e-7])


def run(recipe: Recipe, out: Path, *, resume: bool = False) -> Path:
    recipe = replace(
        recipe,
        schedule=replace(recipe.schedule, max_steps=6),
        run=replace(recipe.run, out=out, save_every=3, log_every=1, tensorboard=False, float32_matmul="highest"),
    )
    dataset = open_dataset(recipe.data.source, recipe.data.size, framing=recipe.data.framing.kind)
    return train(recipe, dataset, evaluate=validation(recipe), resume=resume)


def test_the_tiny_run_and_its_resume(tmp_path: Path) -> None:
    """ArcFace, queue, Adam, parts of photographs: 6 steps equal 3, a restart and 3; the spec says what it was fed."""
    recipe = load_recipe("broadface_inshop_r50_tiny")
    recipe = replace(recipe, data=replace(recipe.data, source="strokes:12x4"))
    recipe = replace(recipe, run=replace(recipe.run, val=("strokes:6x3,first=100::retrieval",), evaluate_every=6))
    whole = run(recipe, tmp_path / "run")
    weights = weights_of(whole)
    names = checkpoint.read_tensors(checkpoint.checkpoints(whole)[-1])
    assert names["steps.head.weight"].shape == (12,)
    assert {name.partition(".")[0] for name in names} >= {"momentum", "second_moment", "steps"}
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    val = [row for row in rows if row["kind"] == "val"]
    assert val[-1]["score"] == val[-1]["strokes_6x3/recall@1"]
    assert load(whole, "cpu").spec.framing == "photograph"
    (newest,) = [c for c in checkpoint.checkpoints(whole) if c.name.endswith("6")]
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    again = run(recipe, tmp_path / "run", resume=True)
    assert "going on after step 3" in (again / "log.txt").read_text()
    assert_same_bits(weights_of(again), weights)


@pytest.mark.slow
def test_tiny_learns_with_a_full_queue(tmp_path: Path) -> None:
    """All 8 epochs: characters that were not learnt are found better than after the first of them."""
    recipe = load_recipe("broadface_inshop_r50_tiny")
    sop = load_recipe("broadface_sop_r50_tiny")
    assert replace(sop, name=recipe.name, run=replace(sop.run, out=recipe.run.out)) == recipe  # the same run twice
    recipe = replace(recipe, run=replace(recipe.run, out=tmp_path / "run", tensorboard=False, device="cpu"))
    data = open_dataset(recipe.data.source, recipe.data.size, framing=recipe.data.framing.kind)
    train(recipe, data, evaluate=validation(recipe))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained, judged = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    assert trained[-1]["queue"] == recipe.head.queue.size
    assert trained[-1]["loss"] < 0.75 * trained[0]["loss"]
    assert len(judged) == 8
    assert judged[-1]["score"] > judged[0]["score"]
    assert judged[-1]["score"] > 0.4 > 10 / 400  # a guess finds one of 9 right images among 399


def test_omniglots_tiny_recipe_learns(tmp_path: Path) -> None:
    """Two epochs of drawn characters: those that were not learnt are found far more often than by chance."""
    recipe = load_recipe("omniglot_tiny")
    recipe = replace(recipe, schedule=replace(recipe.schedule, epochs=2), run=replace(recipe.run, out=tmp_path / "run"))
    assert recipe.data.flip_probability == 0
    evaluate = validation(recipe)
    assert evaluate is not None
    data = open_dataset(recipe.data.source, recipe.data.size)
    out = train(recipe, data, evaluate=evaluate)
    scores = [json.loads(line)["score"] for line in (out / "metrics.jsonl").read_text().splitlines() if "score" in line]
    assert len(scores) == 2
    assert scores[-1] > 0.5 > 10 / 400  # a guess finds one of 9 right images among 399


def test_drawn_characters() -> None:
    data = open_dataset("strokes:5x4,seed=3,first=10", size=32)
    assert (len(data), data.size, next(iter(data.identities)), data.ids[5]) == (20, 32, "c000010", "c000011/001")
    assert data.labels.tolist() == np.repeat(np.arange(5), 4).tolist()
    assert (data.image(7) == data.image(7)).all()
    assert (data.image(7) != data.image(6)).any()
    same = open_dataset("strokes:9x4,seed=3", size=32)
    assert (same.image(4 * 8) != data.image(0)).any()
    longer = open_dataset("strokes:12x4,seed=3", size=32)
    assert (longer.image(4 * 10 + 1) == data.image(1)).all()
    ink = [(data.image(i)[..., 0] < 128).mean() for i in range(20)]
    assert 0.02 < min(ink) <= max(ink) < 0.6
