"""From a recipe and a data set to the parts that a loop turns over: networks, optimizer, loader, state.

In: `Recipe`, `FaceDataset`, the device, perhaps a model to start from. Out: `Parts`, at step 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from visard import checkpoint, dist
from visard.backbones import build
from visard.config import Recipe
from visard.data.dataset import FaceDataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.data.transforms import Augment
from visard.device import choose_float32_matmul
from visard.errors import UserError
from visard.heads.base import Head
from visard.heads.full import FullHead
from visard.records import ModelSpec
from visard.runtime import load_module, spec_for
from visard.training.optim import Optimizer
from visard.training.parallel import distribute
from visard.training.state import TrainState

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    identities: Sequence[str]
    notes: tuple[str, ...]


def build_parts(
    recipe: Recipe, dataset: FaceDataset, device: torch.device, *, augment: Augment | None = None, resume: bool = False
) -> Parts:
    """Builds everything at step 0, the same on every process.

    Args:
        recipe: with `run.init` naming the model to start from, if any.
        dataset: what is trained on.
        device: of this process.
        augment: see `Loader`.
        resume: the weights will be loaded from a checkpoint, so `run.init` gives nothing but has given the spec before.

    Raises:
        UserError: no identities to train on, or a start model of another shape.
    """
    if len(dataset.identities) < 2:
        raise UserError(
            f"{recipe.data.source}: {len(dataset.identities)} identities; training needs at least 2 "
            "(images in folders named after the people in them)"
        )
    torch.manual_seed(recipe.run.seed)
    backbone = build(recipe.backbone)
    head: Head = FullHead(len(dataset.identities), recipe.backbone.embedding_dim, recipe.head)
    spec = replace(spec_for(recipe.backbone), origin=f"visard train {recipe.name}")
    notes: tuple[str, ...] = ()
    if recipe.run.init and not resume:
        spec, notes = _start_from(Path(recipe.run.init), backbone, head, spec, dataset.identities)
    backbone, head = backbone.to(device), head.to(device)
    if recipe.run.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = distribute(backbone, head, device)
    named = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    named += [(f"head.{name}", p) for name, p in head.named_parameters()]
    sampler = EpochSampler(
        len(dataset), recipe.run.batch_global, recipe.run.seed, rank=dist.rank(), world_size=dist.world_size()
    )
    state = TrainState(
        backbone=backbone,
        head=head,
        optimizer=Optimizer(named, recipe.optim, fp16=recipe.run.precision == "fp16"),
        sampler=sampler,
        float32_matmul=dist.broadcast_object(choose_float32_matmul(recipe.run.float32_matmul)),
    )
    loader = Loader(dataset, recipe.data, sampler, augment, pin_memory=device.type == "cuda")
    return Parts(
        recipe=recipe,
        device=device,
        spec=spec,
        model=model,
        state=state,
        loader=loader,
        images=len(dataset),
        images_global=min(recipe.run.batch_global, len(dataset)),
        identities=dataset.identities,
        notes=notes,
    )


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


def _start_from(
    path: Path, backbone: nn.Module, head: Head, spec: ModelSpec, identities: Sequence[str]
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Loads a model's weights, and from a run's checkpoint the class centres of identities of the same name."""
    module, found = load_module(path)
    if found.backbone != spec.backbone:
        differ = ", ".join(
            f"{key} {found.backbone.get(key)} (here {spec.backbone.get(key)})"
            for key in sorted({*found.backbone, *spec.backbone})
            if found.backbone.get(key) != spec.backbone.get(key)
        )
        raise UserError(f"{path}: its network differs from the recipe's: {differ}; give the recipe the same")
    backbone.load_state_dict(module.state_dict())
    spec = replace(found, origin=f"{spec.origin}, started from {path.name} ({found.origin})", visard=spec.visard)
    return spec, (f"weights from {path}", _take_centres(path, head, identities))


def _take_centres(path: Path, head: Head, identities: Sequence[str]) -> str:
    """Copies the centres of known identities into the head; says how many there were."""
    source = checkpoint.checkpoint_of(path)
    weight = dict(head.named_parameters()).get("weight")
    if source is None or weight is None:
        return f"all {len(identities)} class centres are new ({path} holds a network only)"
    known = checkpoint.read_identities(source)
    if _numbered(known) or _numbered(identities):
        return f"all {len(identities)} class centres are new (identities that are only numbered cannot be recognised)"
    rows = {name: row for row, name in enumerate(known)}
    pairs = [(row, rows[name]) for row, name in enumerate(identities) if name in rows]
    if pairs:
        old = checkpoint.read_tensors(source, {"head.weight"}).get("head.weight")
        if old is None:
            return f"all {len(identities)} class centres are new (the head of {path} has none that could be taken)"
        if old.shape[1:] != weight.shape[1:]:
            shapes = f"{tuple(old.shape[1:])}, not {tuple(weight.shape[1:])}"
            return f"all {len(identities)} class centres are new (those of {path} have the shape {shapes})"
        to, taken = map(list, zip(*pairs, strict=True))
        with torch.no_grad():
            weight[to] = old[taken].to(weight)
    return f"{len(pairs)} of {len(identities)} class centres from {path} by the identities' names, the others are new"


def _numbered(identities: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2 ...: what a bare .rec file has, where 7 in two files is not the same person."""
    return len(identities) > 0 and all(name == str(row) for row, name in enumerate(identities))
