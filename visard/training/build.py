"""From a recipe and a data set to the parts that a loop turns over: networks, optimizer, loader, state.

In: `Recipe`, `FaceDataset`, the device, perhaps a model to start from. Out: `Parts`, at step 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from visard import dist
from visard.backbones import build
from visard.backbones.recompute import set_checkpointing
from visard.config import Recipe
from visard.config_distill import COMPARED
from visard.data.augment import in_order
from visard.data.dataset import FaceDataset
from visard.data.loader import Loader
from visard.data.sampler import build_sampler
from visard.data.transforms import Augment
from visard.device import AUTOCAST as AUTOCAST
from visard.device import choose_float32_matmul
from visard.errors import UserError
from visard.heads import build_head
from visard.heads.base import Head
from visard.heads.distill import DistillHead
from visard.masks.augment import mask_augment
from visard.records import Batch, ModelSpec
from visard.runtime import spec_for
from visard.training.optim import Optimizer
from visard.training.parallel import distribute
from visard.training.start import start_from, take_class_means
from visard.training.state import TrainState
from visard.training.teacher import AtSize, Teacher, open_teacher, start_distillation


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Args:
        recipe: the settings.
        device: where the networks are.
        spec: the backbone's, with the preprocessing.
        model: the backbone to call in training; wraps `state.backbone` where several processes train.
        state: what is saved.
        loader: batches from where `state.sampler` stands.
        images: in the data set.
        images_global: images an optimizer step, over all processes.
        images_most: those of one process, at most.
        teach: adds the teacher's values to a batch on the device, where there is a teacher beside the student.
        identities: names of the head's rows.
        notes: what the user should know about how the run starts.
    """

    recipe: Recipe
    device: torch.device
    spec: ModelSpec
    model: nn.Module
    state: TrainState
    loader: Loader
    images: int
    images_global: int
    images_most: int
    identities: Sequence[str]
    notes: tuple[str, ...]
    teach: Callable[[Batch], Batch]


def build_parts(
    recipe: Recipe,
    dataset: FaceDataset,
    device: torch.device,
    *,
    augment: Augment | None = None,
    resume: bool = False,
    at_size: AtSize | None = None,
) -> Parts:
    """Builds everything at step 0, the same on every process.

    Args:
        recipe: with `run.init` naming the model to start from, if any.
        dataset: what is trained on.
        device: of this process.
        augment: see `Loader`.
        resume: the weights will be loaded from a checkpoint, so `run.init` gives nothing but has given the spec before.
        at_size: see `open_teacher`.

    Raises:
        UserError: no identities to train on, or a start model of another shape.
    """
    identities: Sequence[str] = dataset.identities if recipe.data.labels == "used" else ()
    if len(identities) < 2 and recipe.data.labels == "used":
        raise UserError(
            f"{recipe.data.source}: {len(dataset.identities)} identities; training needs at least 2 "
            "(images in folders named after the people in them)"
        )
    # Before the seed: loading a network draws numbers, and a cache that is there already needs none.
    teacher = open_teacher(recipe, dataset, device, at_size, resume=resume)
    torch.manual_seed(recipe.run.seed)
    backbone = build(recipe.backbone)
    set_checkpointing(backbone, recipe.run.checkpointing)
    head = head_of(recipe, len(identities), teacher, device)
    spec = replace(spec_for(recipe.backbone), origin=f"visard train {recipe.name}")
    notes: tuple[str, ...] = ()
    if recipe.run.init and not resume:
        spec, notes = start_from(
            Path(recipe.run.init),
            backbone,
            head,
            spec,
            identities,
            network=recipe.run.init_network,
            centres=recipe.run.init_centres,
        )
    spec = replace(spec, template="none" if recipe.data.framing.kind == "photograph" else "arcface")
    if isinstance(head, DistillHead) and teacher is not None:
        notes = (*notes, *teacher.notes)
        if not resume:
            notes = (*notes, *start_distillation(head, teacher, recipe, identities))
    backbone, head = backbone.to(device), head.to(device)
    if recipe.run.channels_last and device.type == "cpu" and (narrow := overrun_by_onednn(backbone)):
        recipe = replace(recipe, run=replace(recipe.run, channels_last=False))
        notes = (*notes, f"{narrow} is too narrow for oneDNN's channels-last kernel; run.channels_last is off")
    if recipe.run.channels_last and recipe.run.zero < 2:  # FSDP divides contiguous parameters alone
        backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.run.init and not resume and recipe.run.init_centres == "class-means":
        notes = (*notes, take_class_means(backbone, head, spec, dataset))
    model = distribute(backbone, head, device, recipe.run)
    named = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    named += [(f"head.{name}", p) for name, p in head.named_parameters()]
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    run = recipe.run
    sampler = build_sampler(
        recipe.data.sampler, dataset.labels, run.batch_global, run.seed, dist.rank(), dist.world_size()
    )
    if run.micro_batches > 1 and sampler.least_per_rank < 2 * run.micro_batches:
        raise UserError(
            f"run.micro_batches {run.micro_batches}: a process has {sampler.least_per_rank} images of a step, and each "
            "part needs 2 or more; raise run.batch_global or use fewer parts"
        )
    state = TrainState(
        backbone=backbone,
        head=head,
        optimizer=Optimizer(
            named,
            recipe.optim,
            fp16=recipe.run.precision == "fp16",
            sharded=[f"head.{name}" for name in head.sharded() if name in trained],
            shared_memory=recipe.run.zero == 1,
        ),
        sampler=sampler,
        float32_matmul=dist.broadcast_object(choose_float32_matmul(recipe.run.float32_matmul, device)),
    )
    augment = in_order(augment, mask_augment(recipe.data.masks))
    loader = Loader(
        dataset,
        recipe.data,
        sampler,
        augment,
        pin_memory=device.type == "cuda",
        extras=None if teacher is None else teacher.extras,
        keep_clean=teacher is not None and teacher.keep_clean,
    )
    return Parts(
        recipe=recipe,
        device=device,
        spec=spec,
        model=model,
        state=state,
        loader=loader,
        images=len(dataset),
        images_global=sampler.images_per_step,
        images_most=sampler.most_per_rank,
        identities=identities,
        notes=notes,
        teach=_nothing if teacher is None else teacher.fill,
    )


def head_of(recipe: Recipe, classes: int, teacher: Teacher | None, device: torch.device) -> Head:
    """The margin head of a recipe, with the teacher's term if it distils; that alone where no classes are learnt."""
    config, dim = recipe.distill, recipe.backbone.embedding_dim
    wanted = config.has_classes and recipe.data.labels == "used"
    base = build_head(classes, dim, recipe.head, device) if wanted or config.method == "none" else None
    if config.method == "none":
        assert base is not None
        return base
    teacher_dim = dim if teacher is None else teacher.dim
    sizes = f"the teacher's embeddings have {teacher_dim} dimensions, the student's {dim}"
    if config.projection == "pca" and teacher_dim <= dim:
        raise UserError(f"distill.projection pca takes off dimensions, but {sizes}; use none or learned")
    if config.method in COMPARED and config.projection == "none" and teacher_dim != dim:
        raise UserError(f"{sizes}; give --distill.projection pca or learned")
    if config.centres.startswith("teacher") and config.projection != "pca" and teacher_dim != dim:
        raise UserError(f"distill.centres {config.centres}: {sizes}; use pca or new centres")
    return DistillHead(base, config, dim, teacher_dim, recipe.data.sampler.images_per_identity - 1)


def _nothing(batch: Batch) -> Batch:
    return batch


def overrun_by_onednn(backbone: nn.Module) -> str:
    """The first layer, "" if none, whose gradient in channels-last memory oneDNN computes beyond its buffer on a CPU.

    1 x 1 convolutions with a stride and fewer than 16 input channels corrupt memory in torch 2.11 to 2.13
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    for name, layer in backbone.named_modules():
        strided = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
        if strided and layer.groups == 1 and layer.in_channels < 16:
            return name
    return ""


@contextmanager
def numerics(recipe: Recipe, float32_matmul: str) -> Iterator[None]:
    """torch's global settings for the run inside the block, as they were after it."""
    before = (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
    )
    # cuBLAS reads this when it starts; without it torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision(float32_matmul)
    torch.use_deterministic_algorithms(recipe.run.deterministic)
    # It fills every fresh buffer with NaN, which costs time and only finds uses of uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not recipe.run.deterministic
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[3]
