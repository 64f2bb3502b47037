"""A run that is saved, loaded and gone on with equals one that was never interrupted, bit for bit.

Compared: every tensor of the last checkpoint (backbone with batch-norm statistics, head, momentum), the numbers beside
it, and the logged losses. The network has dropout and batch norm; checkpoints fall into the middle of an epoch.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of
from visard import checkpoint
from visard.config import Recipe
from visard.data.transforms import Sample
from visard.errors import Interrupted, UserError
from visard.training.loop import train


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert len(steps) == len(set(steps))
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def numbers(run: Path) -> dict[str, Any]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return checkpoint.read_numbers(newest)


def stop_at(step: int, recipe: Recipe, number: int = signal.SIGTERM) -> Any:
    """An augmentation that sends this process a signal while the images of about that step are made."""
    seen = 0

    def augment(sample: Sample, generator: object) -> Sample:
        nonlocal seen
        seen += 1
        if seen == (step - 1) * recipe.run.batch_global + 1:
            os.kill(os.getpid(), number)
        return sample

    return augment


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_halves_equal_the_whole(tmp_path: Path, faces: PaintedFaces, precision: str) -> None:
    """12 steps against 5 + 7, where 6 steps make an epoch."""
    whole = tiny_recipe(tmp_path / "whole", precision=precision)
    train(whole, faces)
    parts = tiny_recipe(tmp_path / "parts", precision=precision)
    with pytest.raises(Interrupted) as caught:
        train(parts, faces, augment=stop_at(5, parts))
    stopped = numbers(parts.run.out)["step"]
    assert 2 <= stopped < 12
    assert stopped != 6
    assert caught.value.signal == signal.SIGTERM
    assert str(caught.value) == (
        f"stopped after step {stopped} of 12; go on with: visard train --resume {parts.run.out}"
    )
    train(parts, faces, resume=True)
    assert_same_bits(weights_of(whole.run.out), weights_of(parts.run.out))
    assert numbers(whole.run.out) == numbers(parts.run.out)
    assert losses(whole.run.out) == losses(parts.run.out)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path, faces: PaintedFaces) -> None:
    runs = [tiny_recipe(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    for recipe in runs:
        train(recipe, faces)
    first, again, other = (weights_of(recipe.run.out) for recipe in runs)
    assert_same_bits(first, again)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_sigint_leaves_with_its_own_number(tmp_path: Path, faces: PaintedFaces) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train(recipe, faces, augment=stop_at(3, recipe, signal.SIGINT))
    assert caught.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_is_not_overwritten(recipe: Recipe, faces: PaintedFaces) -> None:
    train(recipe, faces)
    with pytest.raises(UserError, match="holds a run already; go on with it by --resume"):
        train(recipe, faces)


def test_a_finished_run_resumes_to_itself(recipe: Recipe, faces: PaintedFaces) -> None:
    train(recipe, faces)
    before = weights_of(recipe.run.out)
    train(recipe, faces, resume=True)
    assert_same_bits(before, weights_of(recipe.run.out))


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path, recipe: Recipe, faces: PaintedFaces) -> None:
    """What a kill before the first checkpoint leaves: a recipe, some log lines, half a checkpoint."""
    whole = tiny_recipe(tmp_path / "whole")
    train(whole, faces)
    run = recipe.run.out
    (run / "checkpoints" / ".step_00000006.tmp" / "state").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "loss": 1.0}\n{"kind": "tr')
    train(recipe, faces, resume=True)
    assert_same_bits(weights_of(whole.run.out), weights_of(run))
    assert losses(run) == losses(whole.run.out)
    assert not list((run / "checkpoints").glob(".*"))


def test_longer_schedule_goes_on(recipe: Recipe, faces: PaintedFaces) -> None:
    train(recipe, faces)
    train(replace(recipe, schedule=replace(recipe.schedule, epochs=3)), faces, resume=True)
    assert numbers(recipe.run.out)["step"] == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "the saved run has 0 as seed, this one 5"),
        ({"batch_global": 16}, "the saved run has 8 images a step, this one 16"),
    ],
)
def test_what_the_order_of_samples_hangs_on_cannot_change(
    recipe: Recipe, faces: PaintedFaces, change: dict[str, Any], message: str
) -> None:
    train(recipe, faces)
    with pytest.raises(UserError, match=message):
        train(replace(recipe, run=replace(recipe.run, **change)), faces, resume=True)


def test_other_identities_are_refused(recipe: Recipe, faces: PaintedFaces) -> None:
    train(recipe, faces)
    others = PaintedFaces(identities=tuple(f"stranger{i}" for i in range(6)))
    with pytest.raises(UserError, match="was trained on other identities than painted holds now"):
        train(recipe, others, resume=True)


def test_another_network_is_refused(recipe: Recipe, faces: PaintedFaces) -> None:
    train(recipe, faces)
    wider = replace(recipe, backbone=replace(recipe.backbone, width=8))
    with pytest.raises(UserError, match="its state does not fit this recipe and data"):
        train(wider, faces, resume=True)


def test_matmul_choice_is_kept(tmp_path: Path, faces: PaintedFaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run uses the saved choice though the self-test would now choose otherwise; torch is left as it was."""
    recipe = tiny_recipe(tmp_path / "run", float32_matmul="auto")
    monkeypatch.setattr("visard.training.build.choose_float32_matmul", lambda setting, device: "high")
    train(recipe, faces)
    assert numbers(recipe.run.out)["float32_matmul"] == "high"
    assert json.loads((recipe.run.out / "recipe.json").read_text())["run"]["float32_matmul"] == "high"
    monkeypatch.setattr("visard.training.build.choose_float32_matmul", lambda setting, device: "medium")
    used: list[str] = []
    longer = replace(recipe, schedule=replace(recipe.schedule, epochs=3))
    before = torch.get_float32_matmul_precision()

    def note_precision(sample: Sample, generator: object) -> Sample:
        used.append(torch.get_float32_matmul_precision())
        return sample

    train(longer, faces, resume=True, augment=note_precision)
    assert "high" in used
    assert "medium" not in used
    assert numbers(recipe.run.out)["float32_matmul"] == "high"
    assert torch.get_float32_matmul_precision() == before
