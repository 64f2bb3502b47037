"""Evaluation during training: validation sets of every kind, and two processes that share it out like one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.recipes.test_train import RECIPE_FILE
from tests.training import processes
from tests.training.conftest import PaintedFaces
from visard.cli import main
from visard.data.formats.pair_bin import write_bin
from visard.errors import UserError
from visard.recipes import load_recipe
from visard.recipes.evaluation import validation
from visard.recipes.train import parse
from visard.runtime import load


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with tiny.py, faces/ to train on and others/ to validate on."""
    root = tmp_path_factory.mktemp("evaluation")
    (root / "tiny.py").write_text(RECIPE_FILE)
    others = PaintedFaces(first=50, identities=tuple(f"other{i}" for i in range(6)))
    for name, faces in (("faces", PaintedFaces()), ("others", others)):
        for index, image_id in enumerate(faces.ids):
            path = root / name / image_id
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.ascontiguousarray(faces.image(index)[:, :, ::-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def test_two_processes_evaluate_like_one(work: Path) -> None:
    """Each embeds a share; the metrics are those of the checkpoint's network in one process, to the last bit."""
    command = ["-m", "visard.cli", "train", f"{work}/tiny.py:tiny", "--data", f"{work}/faces", "--epochs", "1"]
    results = processes.run(2, *command, "--val", f"{work}/others", "--out", f"{work}/run", "--json", fresh=True)
    assert results[1][1] == ""
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in logged] == [6]
    recipe = parse([f"{work}/tiny.py:tiny", "--val", f"{work}/others"])
    assert recipe is not None
    evaluate = validation(recipe.recipe)
    assert evaluate is not None
    alone = evaluate(load(work / "run", "cpu"))
    assert {key: value for key, value in logged[0].items() if key not in ("kind", "step", "epoch")} == alone
    assert 0.5 <= alone["score"] <= 1


def bin_of(work: Path, name: str, same: list[bool]) -> str:
    """A pair set of images of others/, each pair of one person or of two."""
    people = [f"other{i}" for i in range(6)]
    images = []
    for k, answer in enumerate(same):
        other = people[(k + (not answer)) % 6]
        images += [work / "others" / people[k % 6] / f"{k % 8}.png", work / "others" / other / f"{(k + 1) % 8}.png"]
    write_bin(work / name, [path.read_bytes() for path in images], same)
    return str(work / name)


def test_bin_sets_beside_others(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--val a.bin b.bin others`: one without impostors is said once and is not in the score."""
    first, second = bin_of(work, "agedb_30.bin", [True, False] * 10), bin_of(work, "genuine.bin", [True] * 4)
    assert main(["train", "tiny.py:tiny", "--data", "faces", "--epochs", "1", "--out", "bins",
                 "--val", first, second, "others"]) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("genuine.bin has only one kind of pair") + said.count("genuine has only one kind of pair") == 1
    rows = [json.loads(line) for line in (work / "bins" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "val"]
    assert row["score"] == pytest.approx((row["agedb_30/accuracy"] + row["others/accuracy"]) / 2)
    assert not [key for key in row if key.startswith("genuine/")]
    assert main(["train", "tiny.py:tiny", "--data", "faces", "--out", "none", "--val", second]) == 2
    assert "no set has genuine and impostor pairs" in capsys.readouterr().err
    assert not (work / "none").exists()


def test_no_validation_set_is_no_evaluation(work: Path) -> None:
    assert validation(load_recipe("tiny.py:tiny")) is None


def test_two_sets_of_one_name_are_refused(work: Path) -> None:
    request = parse(["tiny.py:tiny", "--val", "others", f"{work}/others"])
    assert request is not None
    with pytest.raises(UserError, match="two sets have the same name"):
        validation(request.recipe)
