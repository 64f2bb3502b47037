"""The scaling figure: sizes from checkpoints, errors from runs and results, the law that made them found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.test_pages import Checked
from visard.cli import main as visard
from visard.config import IResNetConfig, Recipe, to_dict
from visard.errors import UserError
from visard.records import Result
from visard.report.scaling import parameters_of, scaling
from visard.report.sources import read_sources

CLASSES, DIM = 7, 16


def make_run(folder: Path, weights: int, errors: dict[str, float]) -> Path:
    """A run of `weights` network parameters whose last evaluation had these errors; earlier ones were worse."""
    model = folder / "checkpoints" / "step_00000010" / "model"
    model.mkdir(parents=True)
    tensors = {"conv.weight": np.zeros(weights, np.float32), "bn.running_var": np.ones(99, np.float32)}
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    (model.parent / "identities.txt").write_text("".join(f"p{i}\n" for i in range(CLASSES)))
    (folder / "checkpoints" / "last.json").write_text(json.dumps({"checkpoint": "step_00000010"}))
    recipe = replace(Recipe(name="tiny"), backbone=IResNetConfig(embedding_dim=DIM))
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    lines = []
    for step, factor in ((5, 2.0), (10, 1.0)):
        scores = {f"{name}/accuracy": 1 - factor * error for name, error in errors.items()}
        lines.append(json.dumps({"kind": "val", "step": step, "epoch": step / 10, "score": 0.5, **scores}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def error(parameters: float, b: float) -> float:
    return float(0.02 * (parameters / 10_000) ** -b)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = []
    for weights in (1_000, 3_000, 10_000, 30_000, 100_000):
        total = weights + CLASSES * DIM
        folders.append(
            make_run(tmp_path / f"w{weights}", weights, {"clean": error(total, 0.3), "masked": error(total, 0.2)})
        )
    return folders


def test_the_laws_are_found(runs: list[Path]) -> None:
    records, _ = read_sources(runs)
    assert [parameters_of(run) for run in records] == [w + CLASSES * DIM for w in (1000, 3000, 10_000, 30_000, 100_000)]
    clean, masked = scaling(records, [], "accuracy")
    assert (clean.name, masked.name) == ("clean", "masked")
    assert clean.law.b == pytest.approx(0.3)
    assert masked.law.b == pytest.approx(0.2)
    assert clean.law.c == 0.0  # five sizes are too few for a floor
    assert clean.band is not None
    np.testing.assert_allclose(clean.law.at(clean.sizes), clean.errors)


def test_seven_sizes_have_a_floor(tmp_path: Path) -> None:
    folders = []
    for weights in np.geomspace(1000, 100_000, 7).astype(int):
        total = weights + CLASSES * DIM
        folders.append(make_run(tmp_path / f"w{weights}", weights, {"clean": 0.01 + error(total, 0.5)}))
    (series,) = scaling(read_sources(folders)[0], [], "accuracy")
    assert series.law.c == pytest.approx(0.01, rel=0.02)
    assert series.law.b == pytest.approx(0.5, rel=0.01)


def test_results_count_too(runs: list[Path], tmp_path: Path) -> None:
    paths = []
    for run in runs:
        total = parameters_of(read_sources([run])[0][0])
        result = Result(
            protocol="pairs",
            metrics={"eer": error(total, 0.4), "accuracy": None},
            counts={"pairs": 10},
            settings={"model": str(run), "data": "lfw"},
        )
        path = tmp_path / f"result-{run.name}.json"
        path.write_text(result.to_json())
        paths.append(path)
    records, results = read_sources([*runs, *paths])
    (series,) = scaling(records, results, "eer")
    assert (series.name, len(series.sizes)) == ("lfw", 5)
    assert series.law.b == pytest.approx(0.4)


def test_the_page_draws_them(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert visard(["report", *map(str, runs), str(out), "--scaling", "accuracy", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["scaling"]["clean"]["b"] == pytest.approx(0.3)
    text = out.read_text()
    Checked(text)
    assert "1 - accuracy against parameters" in text
    assert "0.300 (0.300 to 0.300)" in text
    assert "the classification weight included" in text
    assert visard(["report", *map(str, runs), str(out)]) == 0
    assert "against parameters" not in out.read_text()


def test_mistakes(runs: list[Path], tmp_path: Path) -> None:
    records, _ = read_sources(runs)
    with pytest.raises(UserError, match=r"no test set with 3 different sizes.*clean \(2\)"):
        scaling(records[:2], [], "accuracy")
    with pytest.raises(UserError, match="sizes: none"):
        scaling(records, [], "tar@far=1e-9")
    with pytest.raises(UserError, match="needs runs"):
        scaling([], [], "accuracy")
    perfect = make_run(tmp_path / "perfect", 5, {"clean": 0.0})
    with pytest.raises(UserError, match="leaves no error"):
        scaling(read_sources([perfect])[0], [], "accuracy")
    (perfect / "checkpoints" / "last.json").unlink()
    with pytest.raises(UserError, match="no checkpoint in it"):
        scaling(read_sources([perfect])[0], [], "accuracy")
