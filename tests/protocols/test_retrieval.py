"""`visard evaluate retrieval` and its protocol: leave one out, queries in a gallery, lists with roles, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from visard.cli import main as visard
from visard.config import DataConfig, IResNetConfig, Recipe, RunConfig
from visard.data.dataset import open_dataset
from visard.embed import save_embeddings
from visard.errors import UserError
from visard.protocols.retrieval import Roles, evaluate_retrieval, leave_one_out
from visard.recipes.evaluation import validation
from visard.records import Embeddings, Result
from visard.runtime import load

SIZE = 32


def embeddings(labels: list[int], seed: int = 0) -> Embeddings:
    """Vectors about a centre a class; classes far from one another, noise so that some answers are wrong."""
    numbers = np.random.default_rng(seed)
    centres = numbers.standard_normal((max(labels) + 1, 6))
    vectors = centres[labels] + 0.8 * numbers.standard_normal((len(labels), 6))
    ids = tuple(f"{label}/{n}" for n, label in enumerate(labels))
    return Embeddings(vectors.astype(np.float32), ids, np.array(labels), {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and In-Shop's list over drawn characters as photographs of any shape."""
    from visard.backbones import build
    from visard.runtime import save_model, spec_for

    folder = tmp_path_factory.mktemp("retrieval")
    torch.manual_seed(0)
    config = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=SIZE)
    save_model(build(config), spec_for(config), folder / "model")
    save_model(build(config), spec_for(config, template="none"), folder / "photographs")
    drawn = open_dataset("strokes:6x5", size=48)
    rows = []
    for row, image_id in enumerate(drawn.ids):
        file = folder / "img" / f"{image_id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.pad(drawn.image(row), ((0, row % 7), (0, 0), (0, 0)), constant_values=255))
        status = "train" if row < 10 else "query" if row % 5 < 2 else "gallery"
        rows.append(f"img/{image_id}.png id_{row // 5} {status}\n")
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (folder / "list_eval_partition.txt").write_text(header + "".join(rows))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    assert visard(["evaluate", "retrieval", *map(str, arguments), "--json"]) == 0
    return Result.from_json(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert visard(["evaluate", "retrieval", *map(str, arguments)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_leave_one_out_by_hand() -> None:
    """Recall@K by sorting all cosines; a single image and unlabelled ones are in the gallery and asked for nothing."""
    found = embeddings([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    found.labels[8] = -1
    result = evaluate_retrieval(found, ks=(1, 3), examples=3)
    unit = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T).astype(np.float64)
    np.fill_diagonal(cosines, -2)
    asked = [0, 1, 2, 3, 4, 5, 6, 7]
    order = np.argsort(-cosines, axis=1)
    hits = [found.labels[order[q]] == found.labels[q] for q in asked]
    assert result.metrics["recall@1"] == np.mean([h[0] for h in hits])
    assert result.metrics["recall@3"] == np.mean([h[:3].any() for h in hits])
    assert result.counts["queries"] == 9
    assert result.counts["queries_without_answer"] == 1
    assert result.counts["gallery"] == 10
    assert result.counts["recalled@1"] == sum(bool(h[0]) for h in hits)
    low, high = result.intervals["recall@1"]
    assert low < result.metrics["recall@1"] < high
    curve = result.curves["recall"]
    assert (curve["x"][0], curve["y"][0], curve["y"][-1]) == (1, result.metrics["recall@1"], 1.0)
    assert all(e["score"] > e["answer_score"] and e["answer_rank"] > 1 for e in result.examples["first_is_wrong"])
    assert Result.from_json(result.to_json()) == result


def test_queries_and_gallery_are_disjoint_or_not() -> None:
    """An image that is in both is not an answer to itself: the same numbers as without it in the gallery."""
    found = embeddings([0, 0, 1, 1, 2, 2, 2])
    apart = evaluate_retrieval(found, Roles(np.array([0, 2, 4]), np.array([1, 3, 5, 6])), ks=(1,))
    assert apart.settings["sets"] == "queries and gallery"
    both = evaluate_retrieval(found, Roles(np.array([0]), np.arange(7)), ks=(1, 2))
    alone = evaluate_retrieval(found, Roles(np.array([0]), np.arange(1, 7)), ks=(1, 2))
    assert both.metrics == alone.metrics


def test_what_cannot_be_answered_is_refused() -> None:
    found = embeddings([0, 1, 2])
    with pytest.raises(UserError, match="none of the 3 queries has another image of its identity"):
        evaluate_retrieval(found)
    with pytest.raises(UserError, match="no image has a label"):
        leave_one_out(np.array([-1, -1]))
    with pytest.raises(UserError, match="there are no queries"):
        Roles(np.array([], np.int64), np.array([1]))
    with pytest.raises(UserError, match="comes twice among the gallery"):
        Roles(np.array([0]), np.array([1, 1]))
    with pytest.raises(UserError, match="give different ranks"):
        evaluate_retrieval(found, ks=(0, 1))
    broken = embeddings([0, 0, 1, 1])
    broken.vectors[2] = 0
    with pytest.raises(UserError, match=r"1 vectors are zero or not finite \(first: 1/2\)"):
        evaluate_retrieval(broken)


def test_a_model_on_any_data_set(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = answer(capsys, made / "model", "strokes:5x4", "--out", tmp_path / "out")
    assert (result.counts["queries"], result.settings["ks"]) == (20, [1, 2, 4, 8])
    saved = Result.from_json((tmp_path / "out" / "result.json").read_text())
    assert saved == result
    assert (tmp_path / "out" / result.examples["first_is_wrong"][0]["picture"]).is_file()
    assert visard(["evaluate", "retrieval", str(made / "model"), "strokes:5x4"]) == 0
    assert "Recall@1" in capsys.readouterr().out


def test_embeddings_give_what_their_model_gives(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"{made}/list_eval_partition.txt#test"
    direct = answer(capsys, made / "photographs", data)
    assert visard(["embed", str(made / "photographs"), data, str(tmp_path / "e")]) == 0
    capsys.readouterr()
    again = answer(capsys, tmp_path / "e", data)
    assert again.metrics == direct.metrics
    assert (direct.counts["queries"], direct.counts["gallery"], direct.settings["ks"]) == (8, 12, [1, 10, 20, 30])
    everyone = answer(capsys, tmp_path / "e", "--ks", "1", "5")  # without its list: leave one out
    assert (everyone.counts["queries"], everyone.settings["ks"]) == (20, [1, 5])


def test_a_gallery_of_another_data_set(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People are told by their names; here the gallery holds half of the queries' classes, and the same images."""
    result = answer(capsys, made / "model", "strokes:6x3", "--gallery", "strokes:6x3,first=3", "--ks", "1")
    assert (result.counts["queries"], result.counts["gallery"]) == (18, 18)
    assert result.counts["queries_without_answer"] == 9
    assert result.metrics["recall@1"] == 1.0
    save_embeddings(embeddings([0, 0, 1, 1]), tmp_path / "e")
    said = refused(capsys, tmp_path / "e", "--gallery", "strokes:2x2")
    assert "embeddings know identities by number only" in said


def test_mistakes_are_one_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the data set after the model: visard evaluate retrieval" in refused(capsys, made / "model")
    assert "give different ranks" in refused(capsys, made / "model", "strokes:2x2", "--ks", "1", "1")
    assert "name one of list_eval_partition.txt#train" in refused(
        capsys, made / "model", made / "list_eval_partition.txt"
    )


def test_during_training(made: Path) -> None:
    """Recall@K of In-Shop's test part and of any data set; the score is the mean of their Recall@1."""
    val = (f"{made}/list_eval_partition.txt#test::retrieval", "strokes:4x3::retrieval")
    backbone = IResNetConfig(blocks=(1, 1, 1, 1), width=8, input_size=SIZE)
    recipe = Recipe(name="a", data=DataConfig(size=SIZE), backbone=backbone, run=RunConfig(val=val))
    evaluate = validation(recipe)
    assert evaluate is not None
    metrics = evaluate(load(made / "model", "cpu"))
    own, drawn = metrics["list_eval_partition/recall@1"], metrics["strokes_4x3/recall@1"]
    assert metrics["score"] == pytest.approx((own + drawn) / 2)
    assert "list_eval_partition/recall@30" in metrics
    assert "strokes_4x3/map@r" in metrics


def test_help_names_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert visard(["evaluate", "--json"]) == 2
    capsys.readouterr()
    assert visard(["evaluate", "--help", "--json"]) == 0
    assert "retrieval" in json.loads(capsys.readouterr().out)["protocols"]
