"""The teacher of a distillation: its embeddings of a step's images, and its class centres.

In: `DistillConfig`, the data set that is trained on. Out: a `Teacher`: what the loader looks up beside a batch, what
fills a batch on the device, and centres. It is never trained: no graph, no gradient, evaluation mode, its own spec's
preprocessing.

cached: the teacher embeds the data set once, the plain and the mirrored view, into a mapped float16 file; the step
costs a look-up. Augmentation is not in it: a clean teacher for an augmented student. Two passes of the teacher over the
data are paid once, and the file can be used by any number of runs.
beside: the teacher embeds every batch, clean or augmented. One pass of the teacher for every epoch, and its weights on
the device; nothing on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from visard import checkpoint, dist
from visard.config import DistillConfig, Recipe
from visard.console import say
from visard.data.dataset import FaceDataset
from visard.data.loader import CLEAN, Extras
from visard.device import AUTOCAST
from visard.embed import class_sums, embed_to_directory, hash_model
from visard.errors import UserError
from visard.functional.distill import principal_axes
from visard.heads.centres import INIT_STD, new_centres
from visard.heads.distill import TEACHER, DistillHead
from visard.records import Batch, Float32Array, Int64Array, ModelSpec
from visard.runtime import Embedder, embedder_of, find_model, load, load_module
from visard.training.start import all_centres, numbered
from visard.training.teacher_cache import TeacherCache, probes_of

AtSize = Callable[[int], FaceDataset]
"""Crop size in pixels -> the training's data set with such crops."""

CACHE = "teacher"
"""Folder of a run with the teacher's embeddings."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a distillation needs of its teacher.

    Args:
        dim: E.
        extras: for the loader: embeddings from a cache; None = `fill` computes them.
        keep_clean: the loader shall hand on clean crops besides.
        fill: a batch on the device -> the same with `extras["teacher"]`.
        class_sums: classes -> (C, E) sums of the directions of each one's images.
        moment: () -> (E, E) second moment of directions; None = not known.
        notes: what the user should know.
    """

    dim: int
    fill: Callable[[Batch], Batch]
    class_sums: Callable[[range], Float32Array]
    extras: Extras | None = None
    keep_clean: bool = False
    moment: Callable[[], np.ndarray] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FromCache:
    """What the loader looks up: `extras["teacher"]` of a batch. Pickles into loader processes."""

    cache: TeacherCache

    def __call__(self, indices: Int64Array, flipped: np.ndarray) -> dict[str, np.ndarray]:
        return {TEACHER: self.cache.rows(indices, flipped)}


def open_teacher(
    recipe: Recipe, dataset: FaceDataset, device: torch.device, at_size: AtSize | None, *, resume: bool = False
) -> Teacher | None:
    """The teacher of a recipe; None if it needs none. Every process calls it.

    Args:
        recipe: its `distill`; its `own_cache` is made here where it is not complete.
        dataset: what is trained on.
        device: of this process.
        at_size: opens the data set for a teacher of another crop size; None = cannot.
        resume: centres and axes will be loaded from a checkpoint, and the teacher itself may be gone where its
            embeddings are kept.

    Raises:
        UserError: a teacher or cache that does not fit the data set, or the settings.
    """
    config = recipe.distill
    if not config.uses_teacher:
        return None
    if not config.teacher and (not config.cache or config.embeddings == "beside"):
        raise UserError(f"distill.method {config.method} needs a teacher; give --distill.teacher MODEL")
    if config.embeddings == "beside":
        return _beside(recipe, dataset, device)
    model = Path(config.teacher) if config.teacher else None
    directory = Path(config.cache) if config.cache else own_cache(recipe)
    if directory is None:
        assert model is not None
        return None if resume else _for_centres_alone(model, dataset, device, at_size)
    notes: tuple[str, ...] = ()
    if not config.cache and not dist.broadcast_object(directory.exists()):
        assert model is not None
        notes = (_embed(model, dataset, device, directory, at_size),)
    cache = TeacherCache(directory, dataset)
    if model is not None:
        _together(lambda: check_cache(cache, model, dataset, device, at_size, may_be_gone=resume))
    labels = np.asarray(dataset.labels)
    notes += (f"teacher: embeddings of {cache.dim} dimensions from {directory} (clean crops)",)
    looked_at = config.needs_teacher_embeddings
    if looked_at and cache.flip != "concat" and recipe.data.flip_probability > 0:
        notes += (f"{directory} has one view of each image (flip {cache.flip}), taken for mirrored crops too",)
    return Teacher(
        dim=cache.dim,
        extras=FromCache(cache) if looked_at else None,
        fill=lambda batch: batch,
        class_sums=lambda classes: cache.class_sums(labels, classes),
        moment=lambda: cache.second_moment(len(dataset)),
        notes=notes,
    )


def own_cache(recipe: Recipe) -> Path | None:
    """Where a run keeps embeddings of its teacher that it makes itself; None = it needs none, or has them elsewhere."""
    config = recipe.distill
    wanted = config.needs_teacher_embeddings or (config.uses_teacher and config.projection == "pca")
    return recipe.run.out / CACHE if wanted and config.embeddings == "cached" and not config.cache else None


def require_cache(recipe: Recipe) -> None:
    """Raises UserError where a run of the recipe would have to write its teacher's embeddings first."""
    own = own_cache(recipe)
    if own is not None and recipe.distill.teacher and not own.exists():
        raise UserError(
            f"{own}: the teacher's embeddings are not there yet, and this is no run that would write them; "
            "`visard embed TEACHER DATA DIR --flip concat` and --distill.cache DIR, or --distill.embeddings beside"
        )


def start_distillation(
    head: DistillHead, teacher: Teacher, recipe: Recipe, identities: Sequence[str]
) -> tuple[str, ...]:
    """Sets what of the head comes from the teacher: principal axes, class centres. Every process calls it.

    Returns:
        What was taken, for the log.
    """
    config, notes = recipe.distill, []
    embedding_dim = recipe.backbone.embedding_dim
    if head.pca_ED is not None:
        if teacher.moment is None:
            raise UserError("distill.projection pca needs the teacher's embeddings of the data: use embeddings cached")
        axes = principal_axes(torch.from_numpy(teacher.moment()), embedding_dim) if dist.is_main() else None
        axes = dist.broadcast_object(axes)
        assert axes is not None
        head.pca_ED.copy_(axes)
        notes.append(f"the teacher's {teacher.dim} dimensions on their {embedding_dim} principal axes")
    if config.needs_teacher_centres and head.num_classes:
        centres, note = teacher_centres(config, teacher, identities, head.class_rows())
        head.set_teacher_centres(centres)
        notes.append(note)
    return tuple(notes)


def teacher_centres(
    config: DistillConfig, teacher: Teacher, identities: Sequence[str], rows: range
) -> tuple[Tensor, str]:
    """(C', E) float32 the teacher's centres of `rows`, and what they are.

    Trained centres are read whole by every process, one (C, E) for the moment.

    Raises:
        UserError: those asked for are not there.
    """
    why = ""
    model = Path(config.teacher) if config.teacher else None
    if config.teacher_centres != "class-means":
        trained, why = None, "no model is named"
        if model is not None:
            trained, why = _trained(config, model, teacher.dim, identities)
        if trained is not None:
            chosen = trained[rows.start : rows.stop].float()
            return chosen, f"class centres of the teacher from {model} {config.teacher_centres.replace('-', ' ')}"
    sums = torch.from_numpy(teacher.class_sums(rows))
    # As long as new ones, and an identity without images keeps a random direction.
    known = sums.norm(dim=1, keepdim=True) > 0
    means = INIT_STD * math.sqrt(teacher.dim) * functional.normalize(sums)
    centres = torch.where(known, means, new_centres(rows, (teacher.dim,), 0))
    reason = f" ({why})" if why else ""
    return centres, f"the teacher's class centres are its mean embeddings of each identity{reason}"


def _trained(config: DistillConfig, model: Path, dim: int, identities: Sequence[str]) -> tuple[Tensor | None, str]:
    """(C, E) the teacher's trained centres in the order of `identities`; or None, and why not."""
    if config.teacher_centres == "in-order":
        centres = all_centres(model)
        shape = None if centres is None else tuple(centres.shape)
        if shape != (len(identities), dim):
            raise UserError(
                f"{model}: distill.teacher_centres is in-order, but its class centres are {shape}, not "
                f"{(len(identities), dim)}; use class-means"
            )
        return centres, ""
    source = None if find_model(model).suffix == ".onnx" else checkpoint.checkpoint_of(model)
    if source is None:
        return None, f"{model} has no centres with names"
    known = checkpoint.read_identities(source)
    if numbered(known) or numbered(identities):
        return None, "identities that are only numbered cannot be recognised; in-order takes the teacher's own"
    rows = {name: row for row, name in enumerate(known)}
    missing = [name for name in identities if name not in rows]
    if missing:
        return None, f"{len(missing)} of {len(identities)} identities are not in {model}, {missing[0]} for one"
    centres = all_centres(model)
    if centres is None or centres.shape[1:] != (dim,):
        shape = None if centres is None else tuple(centres.shape)
        return None, f"the centres in {model} are {shape}"
    return centres[torch.tensor([rows[name] for name in identities])], ""


def check_cache(
    cache: TeacherCache,
    model: Path,
    dataset: FaceDataset,
    device: torch.device,
    at_size: AtSize | None,
    *,
    may_be_gone: bool = False,
) -> None:
    """Raises UserError where the cache is of another model than `model`, or of other images than the data set's."""
    if not model.exists():
        if not may_be_gone:
            raise UserError(
                f"{model}: no such teacher; leave distill.teacher out to take {cache.directory} without a check"
            )
        say(f"{model} is not there: its embeddings in {cache.directory} are taken unchecked")
        return
    if cache.weights and cache.weights != hash_model(model):
        raise UserError(f"{cache.directory}: embeddings of other weights than those of {model}; embed again")
    embedder = load(model, str(device))
    images = _for(embedder.spec.input_size, dataset, at_size, model)
    probes = probes_of(len(images))
    embedded = embedder.embed(np.stack([images.image(int(i)) for i in probes]), cache.flip)
    cache.check(embedded, probes, dataset.ids, str(model))


def _embed(model: Path, dataset: FaceDataset, device: torch.device, directory: Path, at_size: AtSize | None) -> str:
    """Writes the teacher's embeddings of both views; interrupted, it goes on the next time."""
    embedder = load(model, str(device))
    images = _for(embedder.spec.input_size, dataset, at_size, model)
    if dist.is_main():
        say(f"the teacher embeds {len(dataset):,} images, plain and mirrored, into {directory}")
    embed_to_directory(embedder, images, directory, "concat", 64, hash_model(model), "float16")
    return f"teacher: {model} embedded the data into {directory}"


def _for_centres_alone(model: Path, dataset: FaceDataset, device: torch.device, at_size: AtSize | None) -> Teacher:
    """A teacher that no step asks: its embeddings are made for class means only, if those are wanted, and not kept."""
    embedder = load(model, str(device))

    def sums(classes: range) -> Float32Array:
        return class_sums(embedder, _for(embedder.spec.input_size, dataset, at_size, model), classes)

    return Teacher(
        dim=embedder.spec.embedding_dim,
        fill=lambda batch: batch,
        class_sums=sums,
        notes=(f"teacher: {model}, for its class centres alone",),
    )


def _for(size: int, dataset: FaceDataset, at_size: AtSize | None, model: Path) -> FaceDataset:
    """The data set with the teacher's crops."""
    if dataset.size == size:
        return dataset
    if at_size is None:
        raise UserError(f"{model}: takes crops of {size} px, the training has {dataset.size} px; embed the data before")
    return at_size(size)


def _beside(recipe: Recipe, dataset: FaceDataset, device: torch.device) -> Teacher:
    path = Path(recipe.distill.teacher)
    found = find_model(path)
    embed: Callable[[Tensor], Tensor]
    if found.suffix == ".onnx":
        embedder = load(found, str(device))
        embed = _through_host(embedder, device)
        spec = embedder.spec
    else:
        module, spec = load_module(found)
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        embed = _of_module(module, spec, recipe.run.precision, device)
        embedder = embedder_of(module, spec)
    if spec.input_size != recipe.data.size:
        raise UserError(
            f"{path}: takes crops of {spec.input_size} px, the student {recipe.data.size} px; beside it must take the "
            "same: use distill.embeddings cached"
        )
    # No more images at once than the student has, whose activations fit.
    size = -(-recipe.run.batch_global // (dist.world_size() * recipe.run.micro_batches))

    def fill(batch: Batch) -> Batch:
        extras = dict(batch.extras)
        images = extras.pop(CLEAN, batch.images)
        extras[TEACHER] = torch.cat([embed(part) for part in torch.split(images, size)])
        return replace(batch, extras=extras)

    return Teacher(
        dim=spec.embedding_dim,
        fill=fill,
        class_sums=lambda classes: class_sums(embedder, dataset, classes),
        keep_clean=recipe.distill.view == "clean",
        notes=(f"teacher: {path} beside the student, on {recipe.distill.view} crops",),
    )


def _of_module(module: nn.Module, spec: ModelSpec, precision: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    module.eval().requires_grad_(False)
    dtype = AUTOCAST[precision]

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found: Tensor = module(spec.normalise(images))
        return found.float()

    return embed


def _through_host(embedder: Embedder, device: torch.device) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime takes and gives arrays of the host, for which every step waits."""
    return lambda images: torch.from_numpy(embedder(images.cpu())).to(device)


def _together(check: Callable[[], None]) -> None:
    """What process 0 finds wrong is raised in all."""
    problem: UserError | None = None
    if dist.is_main():
        try:
            check()
        except UserError as error:
            problem = error
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise problem
