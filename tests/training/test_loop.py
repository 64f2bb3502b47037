"""Around the steps: evaluations, the best checkpoint, logs, a step that is not finite, starting from a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visard
from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of, with_steps
from visard import checkpoint
from visard.config import MobileFaceNetConfig, Recipe
from visard.data.transforms import Sample
from visard.errors import UserError
from visard.heads.full import FullHead
from visard.runtime import Embedder
from visard.training.logs import Meters, keep_until
from visard.training.loop import train


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_a_network_learns(recipe: Recipe, faces: PaintedFaces) -> None:
    """Painted identities are easy: after 60 steps nearly all are right, and images of one lie closer than of two."""
    run = train(with_steps(recipe, 60), faces)
    last = rows(run)[-1]
    assert last["accuracy"] > 0.9
    assert last["loss"] < 0.3 * rows(run)[0]["loss"]
    embedder = visard.load(run, device="cpu")
    fresh = PaintedFaces(images_each=12)  # image 8 and up of each identity were not trained on
    vectors = embedder(np.stack([fresh.image(i * 12 + 8 + k) for i in range(6) for k in range(3)]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    same = np.kron(np.eye(6), np.ones((3, 3))) > 0
    assert cosines[same].mean() > cosines[~same].mean() + 0.4


def test_run_directory(recipe: Recipe, faces: PaintedFaces) -> None:
    run = train(replace(recipe, run=replace(recipe.run, tensorboard=True, save_every=3, keep_last=2)), faces)
    assert {p.name for p in run.iterdir()} == {"recipe.json", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints"}
    names = [p.name for p in checkpoint.checkpoints(run)]
    assert names == ["step_00000009", "step_00000012"]
    assert list((run / "tensorboard").glob("events*"))
    row = rows(run)[-1]
    assert set(row) == {
        "kind", "step", "epoch", "loss", "lr", "gradient_norm", "cos_target", "accuracy", "embedding_norm", "skipped",
        "images_per_second", "data_wait",
    }  # fmt: skip
    assert [r["step"] for r in rows(run)] == [4, 8, 12]
    assert row["epoch"] == 2
    assert 0 <= row["data_wait"] <= 1
    assert row["images_per_second"] > 0


def test_the_best_checkpoint_is_the_latest_of_the_highest_scores(tmp_path: Path, faces: PaintedFaces) -> None:
    """Scores at steps 2, 4 ... 12; checkpoints are due at 12 only, but the best ones are kept besides."""
    scores = dict(zip(range(2, 13, 2), (0.5, 0.8, 0.6, 0.8, 0.7, 0.1), strict=True))
    recipe = tiny_recipe(tmp_path / "run", evaluate_every=2, save_every=12, keep_last=1)
    seen: list[bool] = []

    def evaluate(embedder: Embedder) -> dict[str, float]:
        vectors = embedder(np.stack([faces.image(0), faces.image(1)]))
        seen.append(bool(np.isfinite(vectors).all()) and vectors.shape == (2, 16))
        return {"score": scores[2 * len(seen)], "painted/accuracy": 0.5}

    run = train(recipe, faces, evaluate=evaluate)
    assert seen == [True] * 6
    assert checkpoint.pointed(run, "best") == "step_00000008"
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step_00000008", "step_00000012"]
    assert [(row["step"], row["score"]) for row in rows(run, "val")] == list(scores.items())
    assert checkpoint.find_model(run).parent.name == "step_00000008"


def test_evaluating_changes_nothing(tmp_path: Path, faces: PaintedFaces) -> None:
    def evaluate(embedder: Embedder) -> dict[str, float]:
        torch.manual_seed(5)
        embedder(np.stack([faces.image(0), faces.image(1)]))
        return {"score": 0.0}

    plain = train(tiny_recipe(tmp_path / "plain"), faces)
    watched = train(tiny_recipe(tmp_path / "watched", evaluate_every=1), faces, evaluate=evaluate)
    assert_same_bits(weights_of(plain), weights_of(watched))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_stops_the_run(
    tmp_path: Path, faces: PaintedFaces, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named: the step, its images, the last good checkpoint; the weights after it are those from before it."""
    calls = 0
    forward = FullHead.forward

    def poisoned(self: FullHead, embeddings: torch.Tensor, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, logs = forward(self, embeddings, batch)
        return (loss * float("nan") if calls == 9 else loss), logs

    monkeypatch.setattr(FullHead, "forward", poisoned)
    recipe = tiny_recipe(tmp_path / "run", precision=precision, save_every=4)
    with pytest.raises(UserError) as caught:
        train(recipe, faces)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 9 gave a loss or gradient that is not finite and was not applied; its images were ")
    assert str(tmp_path / "run" / "checkpoints" / "step_00000008") in message
    found = json.loads((tmp_path / "run" / "nonfinite_step.json").read_text())
    assert found["step"] == 9
    assert len(set(found["ids"])) == 8
    assert set(found["ids"]) <= set(faces.ids)
    assert ", ".join(found["ids"][:4]) + " and 4 more" in message
    assert message in (tmp_path / "run" / "log.txt").read_text()
    assert calls == 10  # read one step late
    monkeypatch.setattr(FullHead, "forward", forward)
    train(recipe, faces, resume=True)
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())


def test_a_bad_step_at_a_checkpoint_is_seen_before_it_is_written(
    tmp_path: Path, faces: PaintedFaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FullHead.forward
    monkeypatch.setattr(FullHead, "forward", lambda s, e, b: (forward(s, e, b)[0] * float("inf"), forward(s, e, b)[1]))
    with pytest.raises(UserError, match=r"step 1 gave .* there is no checkpoint yet"):
        train(tiny_recipe(tmp_path / "run", save_every=1), faces)
    assert checkpoint.checkpoints(tmp_path / "run") == []


def test_init_takes_weights_and_the_centres_of_known_identities(tmp_path: Path, faces: PaintedFaces) -> None:
    source = train(tiny_recipe(tmp_path / "source"), faces)
    old = weights_of(source)
    extended = PaintedFaces(identities=("person5", "stranger", "person0"))
    recipe = replace(with_steps(tiny_recipe(tmp_path / "run", init=str(source)), 1), optim=replace(recipe_lr(1e-12)))
    run = train(recipe, extended)
    new = weights_of(run)
    assert torch.allclose(new["backbone.conv1.weight"], old["backbone.conv1.weight"], atol=1e-6)
    assert torch.allclose(new["head.weight"][0], old["head.weight"][5], atol=1e-6)
    assert torch.allclose(new["head.weight"][2], old["head.weight"][0], atol=1e-6)
    assert new["head.weight"].shape == (3, 16)
    log = (run / "log.txt").read_text()
    assert f"2 of 3 class centres from {source} by the identities' names, the others are new" in log
    model = train(
        replace(recipe, run=replace(recipe.run, out=tmp_path / "m", init=str(alone(source, tmp_path)))), faces
    )
    assert "all 6 class centres are new" in (model / "log.txt").read_text()


def recipe_lr(lr: float) -> Any:
    return replace(tiny_recipe(Path()).optim, lr=lr)


def alone(run: Path, folder: Path) -> Path:
    """The model directory of a run without the run around it."""
    return Path(shutil.copytree(checkpoint.find_model(run), folder / "alone"))


def test_numbered_identities_are_not_recognised(tmp_path: Path) -> None:
    """7 in two bare .rec files is not the same person."""
    numbered = PaintedFaces(identities=tuple(map(str, range(6))))
    source = train(with_steps(tiny_recipe(tmp_path / "source"), 1), numbered)
    run = train(with_steps(tiny_recipe(tmp_path / "run", init=str(source)), 1), numbered)
    assert "identities that are only numbered cannot be recognised" in (run / "log.txt").read_text()


def test_init_from_another_network_is_refused(tmp_path: Path, faces: PaintedFaces) -> None:
    source = train(with_steps(tiny_recipe(tmp_path / "source"), 1), faces)
    recipe = tiny_recipe(tmp_path / "run", init=str(source))
    with pytest.raises(UserError, match=r"its network differs from the recipe's: width 4 \(here 8\)"):
        train(replace(recipe, backbone=replace(recipe.backbone, width=8)), faces)
    other = MobileFaceNetConfig(input_size=32, embedding_dim=16)
    with pytest.raises(UserError, match="its network differs from the recipe's: activation None"):
        train(replace(recipe, backbone=other, data=replace(recipe.data, size=32)), replace(faces, size=32))


def test_one_identity_cannot_be_trained(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="1 identities; training needs at least 2"):
        train(recipe, PaintedFaces(identities=("only",)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_is_kept(tmp_path: Path, faces: PaintedFaces, channels_last: bool) -> None:
    """Both give the same run up to the order of sums."""
    recipe = with_steps(tiny_recipe(tmp_path / "run", channels_last=channels_last), 3)
    loss = rows(train(replace(recipe, run=replace(recipe.run, log_every=3)), faces))[0]["loss"]
    other = with_steps(tiny_recipe(tmp_path / "other", channels_last=not channels_last, log_every=3), 3)
    assert rows(train(other, faces))[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_unlabelled_images_take_part_without_a_loss(tmp_path: Path) -> None:
    class HalfLabelled(PaintedFaces):
        @property
        def labels(self) -> Any:
            labels = super().labels.copy()
            labels[::2] = -1
            return labels

    run = train(with_steps(tiny_recipe(tmp_path / "run"), 4), HalfLabelled())
    assert rows(run)[-1]["loss"] > 0


def test_meters_average_over_steps_and_leave_skipped_ones_out() -> None:
    meters = Meters()
    assert meters.read() == {}
    for loss, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0), (5.0, 0.0)):
        meters.add({"loss": torch.tensor(loss)}, torch.tensor(skipped))
    again = Meters()
    again.load_state_dict(json.loads(json.dumps(meters.state_dict())), torch.device("cpu"))
    assert meters.read() == again.read() == {"loss": 3.0, "skipped": 0.25}
    assert meters.read() == {}


def test_keep_until(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_until(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_torch_settings_are_put_back(recipe: Recipe, faces: PaintedFaces) -> None:
    inside: list[bool] = []

    def augment(sample: Sample, generator: object) -> Sample:
        inside.append(torch.are_deterministic_algorithms_enabled())
        return sample

    before = torch.are_deterministic_algorithms_enabled()
    train(with_steps(recipe, 2), faces, augment=augment)
    assert any(inside)
    assert torch.are_deterministic_algorithms_enabled() == before
