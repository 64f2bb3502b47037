"""`visard pairs make`: drawn lists that are read back as they are, in folds that share no identity, random and hard."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from visard.cli import main as visard
from visard.data.dataset import open_dataset
from visard.embed import save_embeddings
from visard.protocols.drawing import draw_pairs, hardest_impostors
from visard.protocols.pair_files import Pairs, read_pairs
from visard.protocols.pairs import pair_scores
from visard.records import Embeddings

PEOPLE, IMAGES = 12, 5


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve folders of five grey squares, names with spaces and commas among them."""
    root = tmp_path_factory.mktemp("pairs") / "faces"
    for person in range(PEOPLE):
        folder = root / (f"person {person}" if person % 2 else f"Last, First {person}")
        folder.mkdir(parents=True)
        for image in range(IMAGES):
            cv2.imwrite(str(folder / f"{image}.png"), np.full((16, 16, 3), 10 * person + image, np.uint8))
    return root


def made(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert visard(["pairs", "make", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert visard(["pairs", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_list_is_read_back_as_it_was_drawn(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lists" / "mine.txt"
    value = made(capsys, faces, out, "--count", 40, "--folds", 3, "--seed", 5)
    expected_value = {"out": str(out), "genuine": 40, "impostor": 40, "folds": 3, "identities": PEOPLE}
    assert value == expected_value
    dataset = open_dataset(faces)
    drawn = draw_pairs(dataset.labels, dataset.ids, 40, 3, 5)
    again = read_pairs(out, dataset.ids, folds=7)
    for name in ("left", "right", "same", "fold"):
        np.testing.assert_array_equal(getattr(again, name), getattr(drawn, name))
    people = [set(dataset.labels[np.r_[again.left, again.right][np.r_[again.fold, again.fold] == k]]) for k in range(3)]
    assert sum(map(len, people)) == len(set().union(*people))
    assert made(capsys, faces, tmp_path / "same.txt", "--count", 40, "--folds", 3, "--seed", 5)["genuine"] == 40
    assert (tmp_path / "same.txt").read_bytes() == out.read_bytes()
    made(capsys, faces, tmp_path / "other.txt", "--count", 40, "--folds", 3, "--seed", 6)
    assert (tmp_path / "other.txt").read_bytes() != out.read_bytes()


def test_fewer_pairs_than_asked_for_are_said(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visard(["pairs", "make", str(faces), str(tmp_path / "p.txt"), "--folds", "6"]) == 0
    shown = capsys.readouterr().out
    genuine = PEOPLE * IMAGES * (IMAGES - 1) // 2
    assert f"{genuine} genuine and {6 * IMAGES**2} random impostor pairs" in shown
    assert "3,000 of each were asked for" in shown


def embedded(faces: Path, directory: Path, drop: int = 0) -> Embeddings:
    """Random vectors, the images in another order than the data set's."""
    dataset = open_dataset(faces)
    order = np.random.default_rng(1).permutation(len(dataset))[drop:]
    vectors = np.random.default_rng(2).normal(size=(len(dataset), 8)).astype(np.float32)
    ids = tuple(dataset.ids[int(row)] for row in order)
    embeddings = Embeddings(vectors[order], ids, dataset.labels[order], {})
    save_embeddings(embeddings, directory)
    return embeddings


def test_hard_impostors_are_those_most_alike(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool of 20 x 30 takes in all 3 x 6 x 25 impostors, so the hard ones are the highest scores of each fold."""
    embeddings = embedded(faces, tmp_path / "e")
    options = ["--count", 30, "--folds", 3]
    made(capsys, faces, tmp_path / "random.txt", *options)
    hard = ["--negatives", "hard", "--embeddings", tmp_path / "e"]
    value = made(capsys, faces, tmp_path / "hard.txt", *options, *hard)
    assert (value["genuine"], value["impostor"]) == (30, 30)
    random, chosen = (read_pairs(tmp_path / name, embeddings.ids) for name in ("random.txt", "hard.txt"))
    genuine = [set(zip(p.left[p.same].tolist(), p.right[p.same].tolist(), strict=True)) for p in (random, chosen)]
    assert genuine[0] == genuine[1]
    assert np.bincount(chosen.fold[~chosen.same]).tolist() == [10, 10, 10]
    labels = embeddings.labels
    assert (labels[chosen.left] == labels[chosen.right]).tolist() == chosen.same.tolist()
    for fold in range(3):
        inside = np.flatnonzero(np.isin(labels, labels[chosen.left[chosen.fold == fold]]))
        both = [(a, b) for a in inside for b in inside if a < b and labels[a] != labels[b]]
        everything = Pairs(*(np.array(column) for column in zip(*both, strict=True)), np.zeros(len(both), bool),
                           np.zeros(len(both), np.int64))  # fmt: skip
        best = np.sort(pair_scores(embeddings, everything))[-10:]
        found = pair_scores(embeddings, chosen.select((chosen.fold == fold) & ~chosen.same))
        np.testing.assert_allclose(np.sort(found), best, rtol=1e-6)


def test_hardest_impostors_are_level_over_folds() -> None:
    same = np.array([True, False, False, False, True, False])
    pairs = Pairs(np.arange(6), np.arange(6) + 6, same, np.array([0, 0, 0, 0, 1, 1]))
    kept = hardest_impostors(pairs, np.array([0.9, 0.1, 0.3, 0.2, 0.8, -0.5]), 3)
    assert kept.left.tolist() == [0, 2, 3, 4, 5]


def test_mistakes_are_one_line(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.txt"
    assert "visard pairs make DATA OUT.txt" in refused(capsys)
    assert "visard pairs make DATA OUT.txt" in refused(capsys, "draw")
    assert "belong together" in refused(capsys, "make", faces, out, "--negatives", "hard")
    assert "belong together" in refused(capsys, "make", faces, out, "--embeddings", tmp_path)
    assert "there is no such file or folder" in refused(capsys, "make", tmp_path / "none", out)
    embedded(faces, tmp_path / "part", drop=3)
    error = refused(capsys, "make", faces, out, "--negatives", "hard", "--embeddings", tmp_path / "part")
    assert "has no embedding of 3 images" in error
    assert not out.exists()
    out.write_text("mine")
    assert "exists; choose another name" in refused(capsys, "make", faces, out)
    assert out.read_text() == "mine"
