"""Checkpoints on disk: complete or not there, the right ones kept, loadable as a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from visard import checkpoint
from visard.backbones import build
from visard.config import IResNetConfig
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import spec_for

CONFIG = IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=16)


def spec() -> ModelSpec:
    return spec_for(CONFIG)


def save(run: Path, step: int, value: float = 0.0, **numbers: Any) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(step)
    content = {"step": step, "best_step": -1, "best_score": None, **numbers}
    return checkpoint.save(
        run,
        step=step,
        tensors={"head": {"weight": torch.full((3, 2), value)}},
        numbers=content,
        backbone=build(CONFIG),
        spec=spec(),
        identities=["ann", "bob", "cleo"],
    )


def test_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7, 1.5, colour="red")
    tensors = {"head": {"weight": torch.zeros(3, 2)}}
    assert checkpoint.load(path, tensors)["colour"] == "red"
    assert (tensors["head"]["weight"] == 1.5).all()
    assert checkpoint.read_identities(path) == ["ann", "bob", "cleo"]
    assert checkpoint.read_spec_of(path) == spec()
    assert set(checkpoint.read_tensors(path)) == {"head.weight"}
    assert checkpoint.read_tensors(path, {"nobody"}) == {}


def test_a_checkpoint_is_a_model(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint.find_model(tmp_path) == checkpoint.find_model(path) == path / "model"
    save(tmp_path, 8)
    assert checkpoint.find_model(tmp_path).parent.name == "step_00000008"
    checkpoint.point(tmp_path, "best", "step_00000007", step=7, score=0.9)
    assert checkpoint.find_model(tmp_path).parent.name == "step_00000007"
    assert checkpoint.checkpoint_of(tmp_path) == path
    assert checkpoint.checkpoint_of(path / "model") == path


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
        if step == 2:
            checkpoint.point(tmp_path, "best", "step_00000002", step=2, score=1.0)
        checkpoint.prune(tmp_path, keep_last=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.suffix) == ["best.json", "last.json"]


def test_leftovers_of_a_kill_are_removed_and_pointers_mended(tmp_path: Path) -> None:
    """Killed between the rename of step 2, the best, and the files that name it; and while step 3 was written."""
    save(tmp_path, 1)
    first = (tmp_path / "checkpoints" / "last.json").read_text()
    save(tmp_path, 2, best_step=2, best_score=0.75)
    (tmp_path / "checkpoints" / "last.json").write_text(first)
    (tmp_path / "checkpoints" / ".step_00000003.tmp" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_00000000.old").mkdir()
    (tmp_path / "checkpoints" / ".last.json.tmp").write_text("{")
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000002"
    checkpoint.clean(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoint.pointed(tmp_path, "last") == checkpoint.pointed(tmp_path, "best") == "step_00000002"
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["score"] == 0.75


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*arguments: object, **named: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_model", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    assert checkpoint.pointed(tmp_path, "last") == "step_00000001"


@pytest.mark.parametrize(
    ("weight", "reason"), [(torch.zeros(4, 2), "does not fit"), (None, "does not fit")], ids=["shape", "missing"]
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, weight: torch.Tensor | None, reason: str) -> None:
    path = save(tmp_path, 1)
    tensors = {"head": {"weight": weight}} if weight is not None else {"head": {"bias": torch.zeros(2)}}
    with pytest.raises(UserError, match=reason) as caught:
        checkpoint.load(path, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error"), [("{", FormatError), ('{"format": 99}', UserError), ("[]", UserError)], ids=str
)
def test_damaged_or_foreign_numbers_are_named(tmp_path: Path, content: str, error: type[UserError]) -> None:
    path = save(tmp_path, 1)
    (path / "numbers.json").write_text(content)
    with pytest.raises(error, match=r"numbers\.json"):
        checkpoint.load(path, {})


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.pointed(tmp_path, "last") is None
    checkpoint.clean(tmp_path)
