"""Caches of a teacher's embeddings: both views, found by id; wrong, stale or incomplete ones; who makes one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import PaintedFaces, embedded, log_of, student, tiny_recipe, with_steps
from visard import checkpoint
from visard.config import DistillConfig
from visard.embed import load_embeddings, save_embeddings
from visard.errors import UserError
from visard.runtime import load
from visard.training import teacher as teachers
from visard.training.checks import overfit_batch, profile
from visard.training.loop import train
from visard.training.teacher_cache import TeacherCache, matching_rows


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


def test_a_cache_of_added_views_is_checked_too(tmp_path: Path, teacher: Path) -> None:
    """Without a hash: by what the teacher gives now, of the same views."""
    summed = embedded(teacher, PaintedFaces(), tmp_path / "sum", "sum")
    (summed / "spec.json").write_text(json.dumps(json.loads((summed / "spec.json").read_text()) | {"weights": ""}))
    run = train(with_steps(student(tmp_path / "run", teacher, cache=str(summed)), 1), PaintedFaces())
    assert "one view of each image (flip sum), taken for mirrored crops too" in log_of(run)
    other = train(with_steps(tiny_recipe(tmp_path / "other", seed=1), 1), PaintedFaces())
    with pytest.raises(UserError, match="holds other embeddings than"):
        train(student(tmp_path / "wrong", other, cache=str(summed)), PaintedFaces())


def test_a_run_without_a_cache_makes_its_own_and_keeps_it(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(checkpoint.find_model(teacher), tmp_path / "model")
    run = train(with_steps(student(tmp_path / "run", model), 2), PaintedFaces())
    assert (run / "teacher" / "vectors.npy").is_file()
    monkeypatch.setattr(teachers, "embed_to_directory", None)  # would be an error to call
    shutil.rmtree(model)  # its embeddings are enough to go on
    train(with_steps(student(tmp_path / "run", model), 4), PaintedFaces(), resume=True)
    assert checkpoint.latest(run) == run / "checkpoints" / "step_00000004"


def test_a_misspelt_teacher_is_no_unchecked_cache(tmp_path: Path, teacher: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"mispelt: no such teacher; leave distill.teacher out to take .*cache without"):
        train(student(tmp_path / "run", teacher.with_name("mispelt"), cache=str(cache)), PaintedFaces())
    assert not (tmp_path / "run").exists()
    unnamed = replace(student(tmp_path / "run", teacher), distill=DistillConfig(method="bigface", cache=str(cache)))
    train(with_steps(unnamed, 1), PaintedFaces())


@pytest.mark.parametrize("look", [overfit_batch, profile])
def test_a_look_at_a_recipe_makes_no_cache(look: Any, tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UserError, match="teacher: the teacher's embeddings are not there yet, and this is no run"):
        look(student(tmp_path / "run", teacher), PaintedFaces())
    assert not (tmp_path / "run").exists()


def test_a_look_takes_a_cache_of_other_crops(tmp_path: Path, teacher: Path, cache: Path) -> None:
    recipe = student(tmp_path / "run", teacher, cache=str(cache))
    recipe = replace(recipe, backbone=replace(recipe.backbone, input_size=32), data=replace(recipe.data, size=32))
    profile(recipe, PaintedFaces(size=32), lambda size: PaintedFaces(size=size))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["profile"]
