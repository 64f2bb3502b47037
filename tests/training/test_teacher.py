"""Teachers: cached or beside the student, never changed; wrong and stale caches; centres; runs that resume exactly."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import processes
from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of, with_steps
from tests.training.test_processes import TINY, assert_close
from visard import checkpoint
from visard.config import DistillConfig, HeadConfig, MarginConfig, Recipe, SamplerConfig
from visard.data.transforms import Sample
from visard.embed import embed_to_directory, hash_model, load_embeddings, save_embeddings
from visard.errors import UserError
from visard.runtime import load
from visard.training import teacher as teachers
from visard.training.loop import train
from visard.training.teacher_cache import TeacherCache, matching_rows

ARC = MarginConfig(m2=0.5, scale=16.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on the painted faces."""
    return train(tiny_recipe(tmp_path_factory.mktemp("teacher") / "run"), PaintedFaces())


@pytest.fixture(scope="module")
def cache(teacher: Path) -> Path:
    return embedded(teacher, PaintedFaces(), teacher.parent / "cache")


def embedded(model: Path, faces: PaintedFaces, out: Path, flip: Any = "concat") -> Path:
    embed_to_directory(load(model, "cpu"), faces, out, flip, 16, hash_model(model), "float16")
    return out


def student(out: Path, teacher: Path, method: Any = "bigface", **settings: Any) -> Recipe:
    recipe = tiny_recipe(out)
    sampler = SamplerConfig(kind="identities") if method.startswith("triplet") else SamplerConfig()
    distill = DistillConfig(**{"method": method, "teacher": str(teacher), **settings})
    return replace(recipe, distill=distill, head=HeadConfig(margin=ARC), data=replace(recipe.data, sampler=sampler))


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


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


def test_a_cache_has_both_views_of_every_image(teacher: Path, cache: Path) -> None:
    faces = PaintedFaces()
    kept = TeacherCache(cache, faces)
    at = np.array([5, 0, 47, 5])
    flipped = np.array([False, True, True, True])
    crops = np.stack(
        [faces.image(int(i))[:, ::-1] if f else faces.image(int(i)) for i, f in zip(at, flipped, strict=True)]
    )
    expected = load(teacher, "cpu")(crops)
    assert kept.vectors().dtype == np.float16
    assert kept.dim == 16
    np.testing.assert_allclose(kept.rows(at, flipped), expected, rtol=2e-3, atol=2e-3)


def test_another_order_and_more_images_are_found_by_id(cache: Path, tmp_path: Path) -> None:
    whole = load_embeddings(cache)
    shuffled = np.random.default_rng(0).permutation(len(whole.ids))
    ids = tuple(whole.ids[i] for i in shuffled)
    save_embeddings(replace(whole, vectors=whole.vectors[shuffled], ids=ids), tmp_path / "shuffled")
    fewer = PaintedFaces(identities=("person4", "person1"))
    found = TeacherCache(tmp_path / "shuffled", fewer)
    plain = np.zeros(16, np.bool_)
    rows = [whole.ids.index(i) for i in fewer.ids]
    np.testing.assert_array_equal(found.rows(np.arange(16), plain), whole.vectors[rows, :16])
    assert matching_rows(["a", "b"], ["a", "b"], where="x") is None


class Painted(PaintedFaces):
    """The same ids, other pictures from the fourth person on."""

    def image(self, index: int) -> Any:
        return 255 - super().image(index) if index >= 24 else super().image(index)


def truncated(cache: Path) -> None:
    vectors = (cache / "vectors.npy").read_bytes()
    (cache / "vectors.npy").write_bytes(vectors[: len(vectors) // 2])


MISTAKES: dict[str, tuple[Callable[[Path], Any], PaintedFaces, str]] = {
    "other images": (lambda cache: None, Painted(), "the model or the images have changed"),
    "more people": (
        lambda cache: None,
        PaintedFaces(identities=tuple(f"person{i}" for i in range(8))),
        r"16 of the 64 images that are trained on have no embedding there \(person6/0.png, ",
    ),
    "no vectors": (lambda cache: (cache / "vectors.npy").unlink(), PaintedFaces(), "no embeddings here"),
    "half of the vectors": (truncated, PaintedFaces(), "is not a whole .npy array"),
    "no spec": (lambda cache: (cache / "spec.json").unlink(), PaintedFaces(), "spec.json is missing"),
    "an id too few": (
        lambda cache: (cache / "ids.txt").write_text("a\n"),
        PaintedFaces(),
        "48 vectors but 1 ids",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_stale_or_incomplete_cache_is_refused(name: str, tmp_path: Path, teacher: Path, cache: Path) -> None:
    spoil, faces, said = MISTAKES[name]
    copy = shutil.copytree(cache, tmp_path / "cache")
    spoil(copy)
    with pytest.raises(UserError, match=said) as caught:
        train(student(tmp_path / "run", teacher, cache=str(copy)), faces)
    assert "\n" not in str(caught.value)


def test_embeddings_of_other_weights_are_refused(tmp_path: Path, teacher: Path, cache: Path) -> None:
    other = train(with_steps(tiny_recipe(tmp_path / "other", seed=1), 1), PaintedFaces())
    with pytest.raises(UserError, match="embeddings of other weights than those of"):
        train(student(tmp_path / "run", other, cache=str(cache)), PaintedFaces())
    # Embeddings from elsewhere have no hash: what the teacher gives now tells.
    spec = json.loads((cache / "spec.json").read_text()) | {"weights": ""}
    unknown = shutil.copytree(cache, tmp_path / "unknown")
    (unknown / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="holds other embeddings than"):
        train(student(tmp_path / "run", other, cache=str(unknown)), PaintedFaces())
    train(with_steps(student(tmp_path / "run", teacher, cache=str(unknown)), 1), PaintedFaces())


def test_a_run_without_a_cache_makes_its_own_and_keeps_it(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(with_steps(student(tmp_path / "run", teacher), 2), PaintedFaces())
    assert (run / "teacher" / "vectors.npy").is_file()
    monkeypatch.setattr(teachers, "embed_to_directory", None)  # would be an error to call
    train(with_steps(student(tmp_path / "run", teacher), 4), PaintedFaces(), resume=True)
    assert checkpoint.latest(run) == run / "checkpoints" / "step_00000004"


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
