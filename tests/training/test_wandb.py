"""Logging to wandb, against a stand-in that writes down what it is told: one page a run, resumed with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import PaintedFaces, tiny_recipe, with_steps
from visard.config import to_dict
from visard.errors import UserError
from visard.training.loop import train

STAND_IN = """
import json, os, pathlib

class errors:
    class Error(Exception):
        pass

def note(**values):
    with open(os.environ["STAND_IN_NOTES"], "a") as file:
        file.write(json.dumps(values) + "\\\\n")

class Page:
    def log(self, values, step):
        note(call="log", values=values, step=step)

    def finish(self, exit_code):
        note(call="finish", exit_code=exit_code)

def init(**settings):
    if os.environ.get("WANDB_MODE") != "offline":
        raise errors.Error("No API key configured.\\\\nUse `wandb login`")
    note(call="init", mode=os.environ["WANDB_MODE"], **settings)
    return Page()
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in, first on the path, writes its calls; wandb is offline."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text(STAND_IN.replace("\\\\", "\\"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    monkeypatch.setenv("STAND_IN_NOTES", str(tmp_path / "notes.jsonl"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path / "notes.jsonl"


def calls(notes: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in notes.read_text().splitlines()]
    return [row for row in rows if row["call"] == kind]


def test_a_run_and_its_continuation_are_one_page(notes: Path, tmp_path: Path, faces: PaintedFaces) -> None:
    out = tmp_path / "runs" / "mine"
    recipe = tiny_recipe(out, wandb="faces")
    train(with_steps(recipe, 6), faces, evaluate=lambda embedder: {"score": 0.5})
    train(recipe, faces, evaluate=lambda embedder: {"score": 0.5}, resume=True)
    first, second = calls(notes, "init")
    assert (first["project"], first["name"], first["dir"], first["mode"]) == ("faces", "mine", str(out), "offline")
    assert first["resume"] == second["resume"] == "allow"
    assert first["id"] == second["id"] == (out / "wandb_id.txt").read_text().strip()
    assert len(first["id"]) == 8
    assert first["config"] == json.loads(json.dumps(to_dict(with_steps(recipe, 6))))
    logged = [(row["step"], key, value) for row in calls(notes, "log") for key, value in row["values"].items()]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(logged) == sorted(
        (row["step"], f"{row['kind']}/{key}", value)
        for row in rows
        for key, value in row.items()
        if key not in ("kind", "step", "epoch")
    )
    assert [row["exit_code"] for row in calls(notes, "finish")] == [0, 0]


def test_a_run_that_fails_is_marked(notes: Path, tmp_path: Path, faces: PaintedFaces) -> None:
    def fails(embedder: object) -> dict[str, float]:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        train(with_steps(tiny_recipe(tmp_path / "run", wandb="faces"), 2), faces, evaluate=fails)
    assert [row["exit_code"] for row in calls(notes, "finish")] == [1]


def test_what_wandb_refuses_is_one_line(
    notes: Path, tmp_path: Path, faces: PaintedFaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(
        UserError, match=r"wandb: No API key configured\. Use .*login`; or set WANDB_MODE=offline"
    ) as caught:
        train(tiny_recipe(tmp_path / "run", wandb="faces"), faces)
    assert "\n" not in str(caught.value)


def test_without_wandb_installed_nothing_is_begun(
    tmp_path: Path, faces: PaintedFaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.wandb is 'faces' but wandb is not installed; `pip install wandb`"):
        train(tiny_recipe(tmp_path / "run", wandb="faces"), faces)
    assert not (tmp_path / "run").exists()


def test_no_project_is_no_wandb(notes: Path, tmp_path: Path, faces: PaintedFaces) -> None:
    train(with_steps(tiny_recipe(tmp_path / "run"), 1), faces)
    assert not notes.exists()
    assert not (tmp_path / "run" / "wandb_id.txt").exists()
