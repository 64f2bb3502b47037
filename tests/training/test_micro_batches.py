"""k micro-batches are one batch, without batch norm: the same gradients, one all-reduce, one step of the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import processes
from tests.training.conftest import PaintedFaces, tiny_recipe
from tests.training.test_processes import RUN, TINY, assert_close, rows, train
from visard.errors import UserError
from visard.records import Batch
from visard.training import loop

MARGIN = {"kind": "combined", "m2": 0.2, "scale": 16.0}
HEADS: dict[str, dict[str, Any]] = {
    "full": {"classes": "replicated", "margin": MARGIN},
    "sharded": {"classes": "sharded", "margin": MARGIN},
    "sampled": {"classes": "sharded", "margin": MARGIN, "sample_rate": 0.5},
    "queue": {"classes": "sharded", "margin": MARGIN, "queue": {"size": 20}},
}


@pytest.mark.parametrize("kind", HEADS)
def test_micro_batches_equal_one_batch(kind: str, tmp_path: Path) -> None:
    """12 steps of 8 images, whole and in parts of 3, 3 and 2: momentum, clipping and decay at work."""
    whole = train(1, tmp_path / "1", batch_norm=False, run=RUN, head=HEADS[kind])
    parts = train(1, tmp_path / "3", batch_norm=False, run={**RUN, "micro_batches": 3}, head=HEADS[kind])
    assert_close(parts, whole)
    for left, right in zip(rows(tmp_path / "1"), rows(tmp_path / "3"), strict=True):
        for key in ("loss", "gradient_norm", "cos_target", "accuracy", "embedding_norm", "lr"):
            assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), (left["step"], key)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "sharded"])
def test_two_processes_with_micro_batches_equal_one_process(kind: str, tmp_path: Path) -> None:
    one = train(1, tmp_path / "1", batch_norm=False, run=RUN, head=HEADS[kind])
    two = train(2, tmp_path / "2", batch_norm=False, run={**RUN, "micro_batches": 2}, head=HEADS[kind])
    assert_close(two, one)


def test_gradients_are_summed_over_processes_once_a_step(tmp_path: Path) -> None:
    counts = []
    for parts in (1, 4):
        options = {"out": str(tmp_path / str(parts)), "run": {**RUN, "batch_global": 16, "micro_batches": parts}}
        results = processes.run(2, *TINY, json.dumps({**options, "max_steps": 3, "count_reductions": True}))
        counts.append([out.strip() for _, out, _ in results])
    assert counts[0] == counts[1]
    assert counts[0] == ["reductions: 3"] * 2


@pytest.mark.parametrize("kind", HEADS)
def test_one_step_of_parts_equals_the_whole_to_1e_6(kind: str, tmp_path: Path) -> None:
    """After one step the difference is that of sums in another order."""
    run, head = {**RUN, "log_every": 1}, HEADS[kind]
    whole = train(1, tmp_path / "1", batch_norm=False, run=run, head=head, max_steps=1)
    parts = train(1, tmp_path / "4", batch_norm=False, run={**run, "micro_batches": 4}, head=head, max_steps=1)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_parts_too_small_for_batch_norm_are_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", batch_global=6, micro_batches=3)
    loop.train(recipe, PaintedFaces())
    with pytest.raises(UserError, match="fewer than 2 images"):
        tiny_recipe(tmp_path / "run", batch_global=6, micro_batches=4)


def test_batch_split_keeps_every_image_in_order() -> None:
    count = 11
    batch = Batch(
        images=torch.arange(count * 3, dtype=torch.uint8).view(count, 1, 1, 3),
        labels=torch.arange(count),
        ids=tuple(str(i) for i in range(count)),
        flipped=torch.arange(count) % 2 == 0,
        points=torch.arange(count * 2.0).view(count, 1, 2),
        extras={"teacher": torch.arange(count * 4.0).view(count, 4)},
    )
    for parts in (1, 2, 3, 4, 11):
        pieces = batch.split(parts)
        assert len(pieces) == parts
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
        assert tuple(i for piece in pieces for i in piece.ids) == batch.ids
        for name in ("images", "labels", "flipped", "points"):
            assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(batch, name))
        assert torch.equal(torch.cat([p.extras["teacher"] for p in pieces]), batch.extras["teacher"])
