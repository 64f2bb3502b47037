"""`visard drift`: its numbers by hand where that can be, its files after a short run, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.training.conftest import PaintedFaces, tiny_recipe
from visard.cli import main
from visard.console import progress
from visard.functional.broadface import compensated
from visard.recipes import drift_figures
from visard.training.build import build_parts
from visard.training.drift import Drift, measure_drift

RUN = (
    "train rendered_tiny --data rendered:6x8 --backbone.width 16 --backbone.blocks 1 1 1 1 --run.batch-global 8 "
    "--schedule.max-steps 4 --data.workers 0 --run.no-tensorboard"
)


def unit(*rows: tuple[float, float]) -> np.ndarray:
    points = np.array(rows, np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_errors_are_means_by_age() -> None:
    drift = Drift(
        age=np.array([2, 1, 2]),
        label=np.array([0, 1, 0]),
        past=unit((1, 0), (1, 0), (0, 1)),
        moved=unit((1, 0), (0, 1), (1, 0)),
        now=unit((1, 0), (0, 1), (1, 0)),
    )
    ages, past, moved = drift.errors()
    assert ages.tolist() == [1, 2]
    assert past.tolist() == [1.0, 0.5]
    assert moved.tolist() == [0.0, 0.0]


def test_what_is_kept_is_what_the_step_gave(tmp_path: Path) -> None:
    """Without dropout and with a rate of almost nothing, all embeddings are what they were; with a real one not."""
    found = {}
    for lr in (1e-12, 0.1):
        recipe = tiny_recipe(tmp_path / str(lr))
        parts = build_parts(recipe, PaintedFaces(), torch.device("cpu"))
        batches = (batch for _ in range(9) for batch in parts.loader)
        for part in parts.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        with progress("drift", 16, "batches", quiet=True) as bar:
            drift = measure_drift(parts, batches, steps=8, lr=lr, bar=bar)
        assert drift.age.tolist() == np.repeat(np.arange(1, 9), recipe.run.batch_global).tolist()
        found[lr] = drift.errors()
    assert np.abs(found[1e-12][1]).max() < 1e-5
    assert np.abs(found[1e-12][2]).max() < 1e-5
    assert found[0.1][1][-1] > 0.01
    assert not np.allclose(found[0.1][1], found[0.1][2], atol=1e-3)


def test_a_turned_space_is_what_compensation_takes_back() -> None:
    """Embeddings and centres that turn together: the error falls, to nothing for embeddings at their centre."""
    generator = torch.Generator().manual_seed(0)
    then = torch.randn(50, 4, generator=generator)
    past = 3.0 * then + 0.1 * torch.randn(50, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    moved = compensated(past, then, then @ turn)
    cosines = [torch.cosine_similarity(v, past @ turn).mean().item() for v in (past, moved)]
    assert cosines[1] > 0.98 > cosines[0]
    at_centre = compensated(2.0 * then, then, then @ turn)
    assert torch.allclose(at_centre, 2.0 * then @ turn, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([*shlex.split(RUN), "--out", str(out)]) == 0
    return out


def test_files_of_a_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    capsys.readouterr()
    before = sorted(path for path in Path("run").rglob("*"))
    assert main(shlex.split("drift run out --steps 5 --lr 0.05 --classes 3 --json")) == 0
    value = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    assert value == json.loads(Path("out/drift.json").read_text())
    assert value["age"] == [1, 2, 3, 4, 5]
    assert len(value["cosine_error"]) == len(value["cosine_error_compensated"]) == 5
    assert len(value["classes"]) == 3
    for name in ("drift.png", "plane.png"):
        picture = cv2.imread(f"out/{name}")
        assert picture is not None
        assert picture.std() > 5
    assert sorted(path for path in Path("run").rglob("*")) == before


def test_a_students_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that distils, images without labels among the data; the teacher's embeddings are not made for a look."""
    monkeypatch.chdir(tmp_path)
    student = "--out run --distill.method bigface --data.unlabelled rendered:3x4,first=900"
    assert main([*shlex.split(RUN), *shlex.split(student), "--distill.teacher", str(trained)]) == 0
    before = sorted(path for path in Path("run").rglob("*"))
    assert main(shlex.split("drift run out --steps 4 --lr 0.05 --classes 2")) == 0
    assert sorted(path for path in Path("run").rglob("*")) == before
    shutil.rmtree("run/teacher")
    assert main(shlex.split("drift run out --steps 4 --lr 0.05")) == 2
    assert "run/teacher: the teacher's embeddings are not there yet" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("drift nowhere out", "nowhere: no run there (recipe.json is missing)"),
        ("drift nowhere out --steps 1", "--steps is 1; use at least 2"),
        ("drift nowhere out --lr -1", "must not be negative"),
        ("drift nowhere out --classes 0", "--classes is 0"),
    ],
)
def test_mistakes(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 2
    assert message in capsys.readouterr().err


def test_classes_of_the_plane_are_the_fullest_old_ones(tmp_path: Path) -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    age = np.array([9, 9, 8, 8, 9, 7, 1, 1, 2, 2])  # those of class 3 are young
    points = np.random.default_rng(0).normal(size=(3, 10, 5)).astype(np.float32)
    drift = Drift(age=age, label=labels, past=points[0], moved=points[1], now=points[2])
    assert drift_figures.draw_plane(drift, 2, tmp_path / "plane.png") == [2, 1]
