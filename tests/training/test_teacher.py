"""Teachers: cached or beside the student, never changed, runs or ONNX files; their centres; exact resumption."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import processes
from tests.training.conftest import PaintedFaces, assert_same_bits, log_of, student, weights_of, with_steps
from tests.training.test_processes import TINY, assert_close
from visard import checkpoint
from visard.config import DistillConfig, FramingConfig, Recipe
from visard.data.dataset import open_dataset
from visard.data.transforms import Sample
from visard.deploy.export import ExportConfig
from visard.deploy.export import main as export
from visard.errors import UserError
from visard.runtime import load
from visard.training import teacher as teachers
from visard.training.loop import train
from visard.training.teacher_cache import TeacherCache


@pytest.mark.parametrize(
    "method",
    ["margin", "angular", "triplet-l2", "triplet-cos", "margin-kd", "bigface", "soft-target", "relational"],
)
def test_every_method_trains(method: str, tmp_path: Path, teacher: Path, cache: Path) -> None:
    run = train(student(tmp_path / "run", teacher, method, cache=str(cache)), PaintedFaces())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if method == "margin":  # which changes the margins from step to step, and the loss with them
        assert rows[-1]["cos_target"] > rows[0]["cos_target"]
    else:
        assert rows[-1]["distill_loss"] < rows[0]["distill_loss"]
    assert ("head.base.weight" in weights_of(run)) == (not method.startswith("triplet"))
    model = run / "checkpoints" / str(checkpoint.pointed(run, "last")) / "model"
    assert load(model, "cpu").spec.embedding_dim == 16


def test_fixed_margins_look_at_centres_alone(tmp_path: Path, teacher: Path) -> None:
    """Nothing is embedded for trained centres, nor looked up in a step; and once, unkept, for class means."""
    fixed = student(tmp_path / "run", teacher, "margin", margins="fixed")
    run = train(with_steps(fixed, 1), PaintedFaces())
    assert torch.equal(weights_of(run)["head.base.weight"], weights_of(teacher)["head.weight"])
    alone = shutil.copytree(checkpoint.find_model(teacher), tmp_path / "model")
    fixed = student(tmp_path / "means", alone, "margin", margins="fixed")
    means = train(with_steps(fixed, 1), PaintedFaces())
    assert "mean embeddings of each identity" in log_of(means)
    shutil.rmtree(alone)
    train(with_steps(fixed, 2), PaintedFaces(), resume=True)  # they are in the checkpoint
    assert not (run / "teacher").exists()
    assert not (means / "teacher").exists()


@pytest.fixture(scope="module")
def onnx(teacher: Path) -> Path:
    """The teacher as ONNX Runtime has it."""
    file = teacher.parent / "teacher.onnx"
    export(ExportConfig(model=teacher, out=file))
    return file


def test_an_onnx_file_teaches_what_its_run_does(tmp_path: Path, teacher: Path, cache: Path, onnx: Path) -> None:
    """Beside the student and cached, at whatever batch; its weights' hash is the file's own."""
    expected = train(with_steps(student(tmp_path / "run", teacher, cache=str(cache)), 3), PaintedFaces())
    beside = train(with_steps(student(tmp_path / "beside", onnx, embeddings="beside"), 3), PaintedFaces())
    own = train(with_steps(student(tmp_path / "own", onnx), 3), PaintedFaces())
    for run in (beside, own):
        for name, tensor in weights_of(expected).items():
            if name.startswith("backbone.") and tensor.is_floating_point():
                torch.testing.assert_close(weights_of(run)[name], tensor, rtol=0, atol=2e-3, msg=name)
    train(with_steps(student(tmp_path / "again", onnx, cache=str(own / "teacher")), 1), PaintedFaces())
    with pytest.raises(UserError, match="embeddings of other weights than those of"):
        train(student(tmp_path / "x", onnx, cache=str(cache)), PaintedFaces())


@pytest.mark.parametrize("embeddings", ["cached", "beside"])
def test_an_onnx_file_has_class_means_for_centres(embeddings: str, tmp_path: Path, onnx: Path) -> None:
    run = train(with_steps(student(tmp_path / "run", onnx, "margin", embeddings=embeddings), 1), PaintedFaces())
    assert "mean embeddings of each identity" in log_of(run)
    assert "teacher.onnx has no centres with names" in log_of(run)
    directions = torch.nn.functional.normalize(weights_of(run)["head.base.weight"])
    crops = np.stack([PaintedFaces().image(i) for i in range(48)])
    views = [crops, crops[:, :, ::-1]] if embeddings == "cached" else [crops]
    found = [torch.nn.functional.normalize(torch.from_numpy(load(onnx, "cpu")(view))) for view in views]
    means = torch.nn.functional.normalize(torch.stack(found).sum(0).view(6, 8, 16).sum(1))
    assert (directions * means).sum(1).min() > 0.9999
    with pytest.raises(UserError, match="in-order, but its class centres are None"):
        train(
            student(tmp_path / "x", onnx, "margin", embeddings=embeddings, teacher_centres="in-order"), PaintedFaces()
        )


def test_a_teacher_of_another_crop_size_embeds_its_own_crops(tmp_path: Path, teacher: Path) -> None:
    recipe = student(tmp_path / "run", teacher)
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, input_size=32),
        data=replace(recipe.data, size=32),
    )
    recipe = with_steps(recipe, 2)
    with pytest.raises(UserError, match="takes crops of 16 px, the training has 32 px"):
        train(recipe, PaintedFaces(size=32))
    train(recipe, PaintedFaces(size=32), at_size=lambda size: PaintedFaces(size=size))
    beside = replace(recipe, distill=DistillConfig(method="bigface", teacher=str(teacher), embeddings="beside"))
    with pytest.raises(UserError, match="beside it must take the same"):
        train(replace(beside, run=replace(beside.run, out=tmp_path / "beside")), PaintedFaces(size=32))


class Watched(nn.Module):
    """A teacher that keeps what it was shown."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(pixels.clone())
        found: torch.Tensor = self.module(pixels)
        return found


@pytest.mark.parametrize("view", ["clean", "augmented"])
def test_beside_the_student_nothing_of_the_teacher_changes(
    view: str, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and statistics keep their bits, it sees the view asked for, and tensors do not pile up."""
    made: list[Watched] = []
    plain = teachers.load_module

    def watched(path: Path) -> Any:
        module, spec = plain(path)
        made.append(Watched(module))
        return made[-1], spec

    monkeypatch.setattr(teachers, "load_module", watched)
    before = {key: value.clone() for key, value in plain(teacher)[0].state_dict().items()}
    alive: list[int] = []

    def black(sample: Sample, generator: object) -> Sample:
        return replace(sample, image=np.zeros_like(sample.image))

    fill = teachers._beside

    def counting(*arguments: Any) -> Any:
        found = fill(*arguments)

        def counted(batch: Any) -> Any:
            made[0].seen = made[0].seen[-1:]
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            taught = found.fill(batch)
            assert not taught.extras["teacher"].requires_grad
            assert taught.extras.keys() == {"teacher"}
            return taught

        return replace(found, fill=counted)

    monkeypatch.setattr(teachers, "_beside", counting)
    train(student(tmp_path / "run", teacher, embeddings="beside", view=view), PaintedFaces(), augment=black)
    after = made[0].module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None and not p.requires_grad for p in made[0].parameters())
    assert len(alive) == 12
    assert alive[-1] <= alive[3]
    blackest = made[0].seen[-1].max().item()
    assert (blackest == -1) == (view == "augmented")


def test_beside_sees_the_students_part_of_a_photograph(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random parts, the same for both, in no more images at once than the student has in a micro-batch."""
    seen: list[torch.Tensor] = []
    plain, own = teachers._of_module, teachers._beside

    def watched(*arguments: Any) -> Any:
        embed = plain(*arguments)

        def keeping(images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return embed(images)

        return keeping

    parts: list[torch.Tensor] = []

    def counting(*arguments: Any) -> Any:
        found = own(*arguments)

        def counted(batch: Any) -> Any:
            parts.append(batch.images)
            return found.fill(batch)

        return replace(found, fill=counted)

    monkeypatch.setattr(teachers, "_of_module", watched)
    monkeypatch.setattr(teachers, "_beside", counting)
    recipe = student(tmp_path / "run", teacher, embeddings="beside")
    recipe = replace(
        with_steps(recipe, 4),
        data=replace(recipe.data, framing=FramingConfig(kind="photograph", area=(0.2, 0.5))),
        run=replace(recipe.run, micro_batches=2),
    )
    photographs = open_dataset("strokes:4x4", 16, framing="photograph")
    train(recipe, photographs)
    assert [len(images) for images in seen] == 8 * [4]
    assert torch.equal(torch.cat(seen), torch.cat(parts))
    centres = {photographs.image(i).tobytes() for i in range(16)}
    assert not any(part.numpy().tobytes() in centres for part in torch.cat(parts))


def test_beside_and_cached_learn_the_same(tmp_path: Path, teacher: Path, cache: Path) -> None:
    """But for float16's rounding and the batch that an embedding was computed in, for a few steps."""
    cached = train(with_steps(student(tmp_path / "cached", teacher, cache=str(cache)), 3), PaintedFaces())
    beside = train(with_steps(student(tmp_path / "beside", teacher, embeddings="beside"), 3), PaintedFaces())
    for name, tensor in weights_of(cached).items():
        if name.startswith("backbone.") and tensor.is_floating_point():
            torch.testing.assert_close(weights_of(beside)[name], tensor, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("method", "settings", "classes"),
    [
        ("margin", {}, "sharded"),
        ("margin-kd", {}, "sharded"),
        ("bigface", {"projection": "learned"}, "replicated"),
        ("triplet-l2", {}, "replicated"),
        ("bigface", {"embeddings": "beside", "cache": ""}, "replicated"),
    ],
)
def test_two_halves_equal_the_whole(
    method: str, settings: dict[str, Any], classes: Any, tmp_path: Path, teacher: Path, cache: Path
) -> None:
    def recipe(name: str) -> Recipe:
        made = student(tmp_path / name, teacher, method, **{"cache": str(cache), **settings})
        return replace(made, head=replace(made.head, classes=classes), run=replace(made.run, save_every=5))

    whole = train(recipe("whole"), PaintedFaces())
    parts = shutil.copytree(whole, tmp_path / "parts")
    for name in ("step_00000010", "step_00000012"):
        shutil.rmtree(parts / "checkpoints" / name)
    train(recipe("parts"), PaintedFaces(), resume=True)
    assert "going on after step 5" in log_of(parts)
    assert_same_bits(weights_of(whole), weights_of(parts))


def test_frozen_centres_are_the_teachers_and_stay(tmp_path: Path, teacher: Path, cache: Path) -> None:
    """By name: the data has the people in another order."""
    order = (3, 0, 5, 1, 2, 4)

    class Reordered(PaintedFaces):
        def image(self, index: int) -> Any:
            return super().image(8 * order[index // 8] + index % 8)

    faces = Reordered(identities=tuple(f"person{i}" for i in order))
    run = train(student(tmp_path / "run", teacher, "margin", cache=str(cache)), faces)
    theirs = weights_of(teacher)["head.weight"]
    assert torch.equal(weights_of(run)["head.base.weight"], theirs[list(order)])
    assert not any("head" in name for name in weights_of(run) if name.startswith("momentum"))
    again = train(with_steps(student(tmp_path / "again", run, "bigface", centres="teacher"), 1), faces)
    assert "class centres of the teacher from" in log_of(again)  # a distilled student teaches too


def test_without_trained_centres_class_means_are_taken(tmp_path: Path, teacher: Path, cache: Path) -> None:
    model = checkpoint.find_model(teacher)
    alone = shutil.copytree(model, tmp_path / "model")
    run = train(student(tmp_path / "run", alone, "margin", cache=str(cache)), PaintedFaces())
    assert "mean embeddings of each identity (" in log_of(run)
    kept = TeacherCache(cache, PaintedFaces())
    views = [kept.rows(np.arange(48), np.full(48, f)) for f in (False, True)]
    units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in views]
    means = (units[0] + units[1]).reshape(6, 8, 16).sum(1)
    found = weights_of(run)["head.base.weight"].numpy()
    cos = (found * means).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(means, axis=1)
    assert cos.min() > 0.99999
    renamed = PaintedFaces(identities=("person0", "person1", "stranger"))
    beside = student(tmp_path / "beside", teacher, "margin", embeddings="beside")
    assert "1 of 3 identities are not in" in log_of(train(beside, renamed))
    with pytest.raises(UserError, match="in-order, but its class centres are None"):
        train(student(tmp_path / "x", alone, "margin", cache=str(cache), teacher_centres="in-order"), PaintedFaces())


def test_labels_that_are_ignored_are_not_looked_at(tmp_path: Path, teacher: Path, cache: Path) -> None:
    """Other labels, the same run; and no classes in it."""

    class Mislabelled(PaintedFaces):
        @property
        def labels(self) -> Any:
            return super().labels[::-1].copy()

    runs = []
    for name, faces in (("a", PaintedFaces()), ("b", Mislabelled())):
        recipe = student(tmp_path / name, teacher, "angular", cache=str(cache))
        runs.append(train(replace(recipe, data=replace(recipe.data, labels="ignored")), faces))
    assert_same_bits(weights_of(runs[0]), weights_of(runs[1]))
    assert not any(name.startswith("head") for name in weights_of(runs[0]))


def test_principal_axes_of_a_larger_teacher(tmp_path: Path, teacher: Path, cache: Path) -> None:
    recipe = student(tmp_path / "run", teacher, "margin", cache=str(cache), projection="pca")
    run = train(replace(recipe, backbone=replace(recipe.backbone, embedding_dim=8)), PaintedFaces())
    axes = weights_of(run)["head.pca_ED"]
    torch.testing.assert_close(axes.T @ axes, torch.eye(8), atol=1e-5, rtol=0)
    assert weights_of(run)["head.base.weight"].shape == (6, 8)
    with pytest.raises(UserError, match="pca takes off dimensions"):
        train(student(tmp_path / "same", teacher, cache=str(cache), projection="pca"), PaintedFaces())
    small = student(tmp_path / "small", teacher, cache=str(cache))
    with pytest.raises(UserError, match="have 16 dimensions, the student's 8; give "):
        train(replace(small, backbone=replace(small.backbone, embedding_dim=8)), PaintedFaces())
    # Its own centres need not be the teacher's, whose cosines are taken among its own.
    margins = student(tmp_path / "margins", teacher, "margin", cache=str(cache))
    small = replace(margins, backbone=replace(margins.backbone, embedding_dim=8))
    with pytest.raises(UserError, match=r"teacher-frozen: the teacher's .* 16 .*; use pca or new centres"):
        train(small, PaintedFaces())
    small = replace(small, distill=replace(small.distill, centres="new"))
    assert weights_of(train(with_steps(small, 1), PaintedFaces()))["head.teacher_centres"].shape == (6, 16)


def test_two_processes_equal_one(tmp_path: Path, teacher: Path) -> None:
    """Shared frozen centres, margins by the largest cosine of both; the cache is made by both together."""
    options = {
        "batch_norm": False,
        "run": {"log_every": 3},
        "head": {"classes": "sharded", "margin": {"kind": "combined", "m2": 0.5, "scale": 16.0}},
        "distill": {"method": "margin", "teacher": str(teacher)},
    }
    runs = []
    for count in (1, 2):
        out = tmp_path / str(count)
        processes.run(count, *TINY, json.dumps({"out": str(out), **options}))
        runs.append(weights_of(out))
    assert_close(runs[1], runs[0])
