"""Recipes of distillation: the papers' settings, tiny ones that learn from a run, and options that contradict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from visard.backbones import build
from visard.config import DistillConfig, Recipe, to_dict
from visard.config_distill import WEIGHTS
from visard.data.dataset import open_dataset
from visard.errors import UserError
from visard.recipes import RECIPES, load_recipe
from visard.recipes.train import _override, parse
from visard.training.loop import train

NAMES = [name for name, place in RECIPES.items() if place.startswith("visard.recipes.distill:")]
TINY = [name for name in NAMES if name.endswith("_tiny")]


def test_settings_of_margindistillation() -> None:
    recipe = load_recipe("margindistillation_r100_mobilefacenet")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(recipe.backbone).parameters())
    assert parameters == pytest.approx(1.19e6, rel=0.01)
    assert (recipe.run.batch_global, recipe.optim.lr, recipe.optim.weight_decay) == (512, 0.1, 5e-4)
    assert (recipe.schedule.milestone_steps, recipe.schedule.gamma) == ((100_000, 160_000, 220_000), 0.1)
    distill = recipe.distill
    assert (distill.margin_min, distill.margin_max, distill.centres) == (0.2, 0.5, "teacher-frozen")
    kd = load_recipe("margin_kd_r100_mobilefacenet").distill
    assert (kd.temperature, kd.weight, kd.hard_weight) == (4, 0.95, 0.05)


def test_settings_of_bigface() -> None:
    recipe = load_recipe("bigface_distill_r600_r240")
    assert recipe.backbone.blocks == (3, 25, 88, 3)  # type: ignore[union-attr]
    assert to_dict(recipe.head.margin) | {"m1": 1.0, "m2": 0.0, "m3": 0.4, "scale": 64.0} == to_dict(recipe.head.margin)
    assert (recipe.distill.weight, recipe.distill.hard_weight, recipe.data.masks.probability) == (9, 1, 0.35)
    alone = load_recipe("bigface_r240")
    assert (recipe.optim.kind, recipe.optim, recipe.schedule) == ("lars", alone.optim, alone.schedule)
    assert (recipe.schedule.epochs, recipe.run.batch_global % 256) == (30, 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rendered_tiny as the tiny recipes' headers name it, two of its epochs."""
    recipe = load_recipe("rendered_tiny")
    run = replace(recipe.run, out=tmp_path_factory.mktemp("teacher") / "run", val=(), tensorboard=False, device="cpu")
    recipe = replace(recipe, run=run, schedule=replace(recipe.schedule, epochs=2))
    return train(recipe, open_dataset(recipe.data.source, size=recipe.data.size))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith(("triplet", "bigface"))])
def test_tiny_learns(name: str, teacher: Path, tmp_path: Path) -> None:
    """The whole tiny run: its loss falls, and so does what it takes from the teacher where that is not centres.

    Not those on triplets, whose rate is that of fine-tuning; bigface_r240_tiny is trained in test_bigface.py.
    """
    recipe = load_recipe(name)
    run = replace(recipe.run, out=tmp_path / "run", val=(), tensorboard=False, device="cpu", log_every=1)
    recipe = replace(recipe, run=run, distill=replace(recipe.distill, teacher=str(teacher)))
    train(recipe, open_dataset(recipe.data.source, size=recipe.data.size))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss",) if recipe.distill.method == "margin" else ("loss", "distill_loss")
    for key in kept:
        values = [row[key] for row in rows]
        assert len(values) == 60
        assert sum(values[-5:]) < 0.95 * sum(values[:5]), key


def test_tiny_variants_take_a_run_for_teacher(tmp_path: Path) -> None:
    faces = open_dataset("rendered:12x8", size=56)

    def small(recipe: Recipe, out: Path) -> Recipe:
        run = replace(recipe.run, out=out, batch_global=16, val=(), tensorboard=False, device="cpu")
        return replace(recipe, run=run, schedule=replace(recipe.schedule, max_steps=2))

    teacher = train(small(load_recipe("rendered_tiny"), tmp_path / "teacher"), faces)
    assert len(TINY) == 6
    assert sorted(NAMES) == sorted([*TINY, *(name.removesuffix("_tiny") for name in TINY)])
    for name in TINY:
        recipe = load_recipe(name)
        cache = str(tmp_path / TINY[0] / "teacher") if name != TINY[0] else ""
        distill = replace(recipe.distill, teacher=str(teacher), cache=cache)
        assert train(small(replace(recipe, distill=distill), tmp_path / name), faces).is_dir()


def test_without_a_teacher_the_option_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(TINY[0])
    recipe = replace(recipe, run=replace(recipe.run, out=tmp_path / "run"))
    with pytest.raises(UserError, match="give --distill"):
        train(recipe, open_dataset("rendered:4x4", size=56))


@pytest.mark.parametrize("method", WEIGHTS)
def test_own_values_are_filled_in_and_come_back_from_json(method: Any) -> None:
    config = DistillConfig(method=method, teacher="run")
    assert method == "margin" or (config.weight, config.hard_weight) == WEIGHTS[method]
    assert DistillConfig(**to_dict(config)) == config


def test_another_method_takes_the_teacher_along() -> None:
    """And is judged with all that the command line says, not before."""
    theirs = DistillConfig(method="margin", teacher="t", embeddings="beside", margin_max=0.5)
    recipe = replace(load_recipe("margindistillation_r100_mobilefacenet"), distill=theirs)
    found = _override(recipe, ["--distill.method", "angular", "--distill.hard-weight", "0"]).distill
    assert found == DistillConfig(method="angular", teacher="t", embeddings="beside", hard_weight=0.0)
    words = ["--head.margin.kind", "adaface", "--distill.method", "bigface"]
    assert _override(recipe, words).distill == DistillConfig(method="bigface", teacher="t", embeddings="beside")
    assert _override(recipe, ["--distill.method", "none"]).distill == DistillConfig()
    unlabelled = replace(recipe, distill=DistillConfig(method="bigface", teacher="t"))
    unlabelled = replace(unlabelled, data=replace(recipe.data, labels="ignored"))
    assert _override(unlabelled, ["--distill.method", "angular"]).distill.teacher == "t"
    with pytest.raises(UserError, match="method: 'anglar' is not one of"):
        _override(recipe, ["--distill.method", "anglar"])


def test_labels_can_be_weighed_by_nothing() -> None:
    recipe = replace(load_recipe("rendered_tiny"), distill=DistillConfig(method="bigface", teacher="t"))
    assert recipe.distill.centres == "new"
    assert not _override(recipe, ["--distill.hard-weight", "0"]).distill.has_classes


def test_another_method_brings_its_own_values() -> None:
    request = parse(["margindistillation_r100_mobilefacenet", "--distill.method", "bigface", "--distill.teacher", "t"])
    assert request is not None
    assert request.recipe.distill == DistillConfig(method="bigface", teacher="t")


TEACHER = ("--distill.teacher", "t")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--distill.weight", "3"), "distill.weight needs a distill.method"),
        (("--distill.method", "bigface", *TEACHER, "--distill.temperature", "2"), "does nothing for bigface"),
        (("--distill.method", "margin", *TEACHER), "head.margin.m2 is 0.0, but images' own margins go up to"),
        (("--distill.method", "triplet-l2", *TEACHER), "give --data.sampler.kind identities"),
        (("--data.labels", "ignored"), "data.labels ignored needs a distill.method that uses none: angular, bigface,"),
        (("--data.unlabelled", "x"), "data.unlabelled needs a distill.method that learns from images without labels"),
        (
            ("--distill.method", "bigface", *TEACHER, "--distill.view", "augmented"),
            "distill.view augmented needs distill.embeddings beside",
        ),
        (
            ("--distill.method", "bigface", *TEACHER, "--distill.embeddings", "beside", "--distill.view", "augmented"),
            "distill.view augmented does nothing without an augmentation",
        ),
        (
            ("--distill.method", "bigface", *TEACHER, "--distill.embeddings", "beside", "--distill.cache", "c"),
            "distill.cache does nothing for embeddings beside",
        ),
        (
            ("--distill.method", "bigface", *TEACHER, "--data.labels", "ignored", "--head.margin.m3", "0.1"),
            "head.* does nothing: distill.method bigface learns no classes here",
        ),
        (
            ("--distill.method", "bigface", *TEACHER, "--distill.teacher-centres", "in-order"),
            "distill.teacher_centres does nothing for bigface with centres new",
        ),
        (
            ("--distill.method", "bigface", *TEACHER, "--data.framing.kind", "photograph"),
            "distill.embeddings cached are those of photographs' centres",
        ),
        (
            ("--distill.method", "margin", *TEACHER, "--distill.margins", "fixed", "--distill.embeddings", "beside"),
            "distill.embeddings beside does nothing for margins fixed",
        ),
        (
            ("--distill.method", "margin", *TEACHER, "--distill.margins", "fixed", "--distill.centres", "new"),
            "distill.teacher does nothing: margins are fixed and centres new",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["rendered_tiny", *arguments])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


TABLE_IV = {
    (start, own, frozen): ("teacher" if start else "new") + ("-frozen" if frozen else "")
    for start in (True, False)
    for own in (True, False)
    for frozen in (True, False)
}


@pytest.mark.parametrize("cell", TABLE_IV)
def test_all_eight_cells_of_table_iv_can_be_asked_for(cell: tuple[bool, bool, bool]) -> None:
    centres: Any = TABLE_IV[cell]
    margins: Any = "per-image" if cell[1] else "fixed"
    needed = cell[0] or cell[1]
    config = DistillConfig(method="margin", centres=centres, margins=margins, teacher="t" if needed else "")
    assert (config.uses_teacher, config.frozen, config.needs_teacher_centres) == (needed, cell[2], needed)
