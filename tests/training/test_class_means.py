"""Class centres that start at the mean embeddings of their images, on one process and divided over two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import visard
from tests.training.conftest import PaintedFaces, tiny_recipe, weights_of, with_steps
from tests.training.test_processes import train as train_processes
from visard.config import Recipe
from visard.training.loop import train

SHARDED = {"classes": "sharded", "margin": {"kind": "combined", "m2": 0.2, "scale": 16.0}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run to start others from."""
    out = tmp_path_factory.mktemp("start") / "run"
    return train(with_steps(tiny_recipe(out), 2), PaintedFaces())


def still(recipe: Recipe, **head: object) -> Recipe:
    """One step that moves nothing to speak of."""
    recipe = with_steps(recipe, 1)
    optim = replace(recipe.optim, lr=1e-30, weight_decay=0.0)
    return replace(recipe, optim=optim, head=replace(recipe.head, **head))  # type: ignore[arg-type]


def expected_directions(start: Path, faces: PaintedFaces) -> torch.Tensor:
    emb = visard.load(start, device="cpu")(np.stack([faces.image(i) for i in range(len(faces))]))
    unit = torch.nn.functional.normalize(torch.from_numpy(emb))
    sums = torch.stack([unit[torch.from_numpy(faces.labels) == label].sum(0) for label in range(6)])
    return torch.nn.functional.normalize(sums)


@pytest.mark.parametrize("head", [{}, {"classes": "sharded"}, {"subcentres": 3}])
def test_centres_are_mean_directions(start: Path, tmp_path: Path, head: dict[str, object]) -> None:
    recipe = still(tiny_recipe(tmp_path / "run", init=str(start), init_centres="class-means"), **head)
    run = train(recipe, PaintedFaces())
    found = weights_of(run)["head.weight"]
    assert "mean embeddings of the identities' images (in this process 6 of them)" in (run / "log.txt").read_text()
    cosines = (torch.nn.functional.normalize(found, dim=-1).flatten(0, -2)
               @ expected_directions(start, PaintedFaces()).T)  # fmt: skip
    own = cosines.view(6, -1, 6)[torch.arange(6), :, torch.arange(6)]
    assert own.min() > (0.97 if recipe.head.subcentres > 1 else 0.99999)
    # As long as new centres are, so that they turn as fast.
    assert found.norm(dim=-1).mean().item() == pytest.approx(0.01 * 16**0.5, rel=0.05)


def test_two_processes_share_the_work_and_the_rows(start: Path, tmp_path: Path) -> None:
    one = train(
        still(
            tiny_recipe(tmp_path / "one", init=str(start), init_centres="class-means"), classes="sharded"
        ),
        PaintedFaces(),
    )  # fmt: skip
    run = {"init": str(start), "init_centres": "class-means"}
    options = {"run": run, "max_steps": 1, "head": SHARDED, "lr": 1e-30}
    two = train_processes(2, tmp_path / "two", **options)
    torch.testing.assert_close(two["head.weight"], weights_of(one)["head.weight"], rtol=1e-5, atol=1e-7)
