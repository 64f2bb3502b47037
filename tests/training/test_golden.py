"""The first losses of the tiny recipes against files in golden/, to 1e-4 relative: a refactor must not move them.

After an intended change of numbers: `python -m tests.training.test_golden` writes the files anew; say in the commit
why.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import PaintedFaces, tiny_recipe
from visard.config import Recipe
from visard.data.dataset import FaceDataset, open_dataset
from visard.recipes import load_recipe
from visard.training.loop import train

GOLDEN = Path(__file__).parent / "golden"


def painted(out: Path) -> tuple[Recipe, FaceDataset]:
    return tiny_recipe(out), PaintedFaces()


def rendered_tiny(out: Path) -> tuple[Recipe, FaceDataset]:
    recipe = load_recipe("rendered_tiny")
    recipe = replace(
        recipe,
        schedule=replace(recipe.schedule, max_steps=10),
        run=replace(recipe.run, out=out, val=(), tensorboard=False, device="cpu"),
    )
    return recipe, open_dataset(recipe.data.source, size=recipe.data.size)


CASES = {"painted": painted, "rendered_tiny": rendered_tiny}


def losses(name: str, out: Path, float32_matmul: str) -> list[float]:
    recipe, dataset = CASES[name](out)
    run = replace(recipe.run, log_every=1, float32_matmul=float32_matmul)
    train(replace(recipe, run=run), dataset)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "matmul"), [("painted", "highest"), ("painted", "medium"), ("rendered_tiny", "highest")]
)
def test_losses_are_golden(name: str, matmul: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert losses(name, tmp_path / "run", matmul) == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(case, Path(folder) / "run", "highest")
        (GOLDEN / f"{case}.json").write_text(json.dumps([round(loss, 6) for loss in found], indent=1) + "\n")
