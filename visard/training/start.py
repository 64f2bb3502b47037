"""The weights that a run starts from: another run's, a model's, or a torch file as others publish it.

In: a path, a fresh network and head. Out: both filled with what fits, the spec to go on with, and notes that say what
was taken. Class centres come from a run by its identities' names, or by their order where the user vouches for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from visard import checkpoint
from visard.backbones import config_from_dict
from visard.backbones.published import SUFFIXES, author, config_of, preprocessing_of, read_torch_file, take
from visard.backbones.slim import slim
from visard.config import to_dict
from visard.data.dataset import FaceDataset
from visard.embed import class_sums
from visard.errors import UserError
from visard.heads.base import Head
from visard.heads.centres import INIT_STD
from visard.records import ModelSpec
from visard.runtime import embedder_of, find_model, load_module, read_centres

Matching = Literal["by-name", "in-order", "class-means"]


def start_from(
    path: Path,
    backbone: nn.Module,
    head: Head,
    spec: ModelSpec,
    identities: Sequence[str],
    *,
    network: Literal["same", "slim"] = "same",
    centres: Matching = "by-name",
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Loads a model's weights, and class centres where there are any.

    Args:
        path: a run, a checkpoint, a model directory, or a torch file in one of the published layouts (a ResNet of
            torchvision, say), of which only the embedding's layers may be left out.
        backbone: of the recipe; filled.
        head: of the recipe; filled.
        spec: of the recipe.
        identities: names of the head's rows.
        network: whether the model's network must be the recipe's, or the recipe's is cut out of it.
        centres: whether centres are matched by the identities' names, or row by row; or left for `take_class_means`.

    Returns:
        The spec with the start's preprocessing, and what was taken, for the log.

    Raises:
        UserError: another network, or centres in order that are not as many as the identities.
    """
    if path.is_file() and path.suffix in SUFFIXES:
        if network == "slim":
            raise UserError(f"{path}: run.init_network slim cuts a model; `visard import {path} OUT`, then --init OUT")
        spec, note = _from_file(path, backbone, spec)
        if centres == "in-order":
            raise UserError(
                f"{path}: class centres are taken from a model; `visard import {path} OUT`, then --init OUT"
            )
        return spec, (note,) if centres == "class-means" else (note, f"all {len(identities)} class centres are new")
    module, found = load_module(path)
    # Through the configuration, which gives a model from before a setting was there its default.
    there = config_from_dict(found.backbone, where=str(path))
    origin = f"{spec.origin}, started from {path.name} ({found.origin})"
    weights = f"weights from {path}"
    if network == "slim":
        here = config_from_dict(spec.backbone, where="recipe")
        backbone.load_state_dict(slim(module.state_dict(), there, here))
        counts = [sum(p.numel() for p in whole.parameters()) for whole in (backbone, module)]
        weights += f", cut to {counts[0]:,} of its {counts[1]:,} parameters"
    else:
        _require_same(path, to_dict(there), spec.backbone)
        backbone.load_state_dict(module.state_dict())
    spec = replace(found, backbone=spec.backbone, origin=origin, visard=spec.visard)
    if centres == "class-means" or head.class_centres() is None:
        return spec, (weights,)
    taken = _in_order(path, head, identities) if centres == "in-order" else _by_name(path, head, identities)
    return spec, (weights, taken)


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    differ = ", ".join(
        f"{key} {there.get(key)} (here {here.get(key)})"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    )
    raise UserError(f"{path}: its network differs from the recipe's: {differ}; give the recipe the same")


def take_class_means(backbone: nn.Module, head: Head, spec: ModelSpec, dataset: FaceDataset) -> str:
    """Sets the head's centres to the mean directions that the network gives to each identity's images.

    They are as long as new ones: the length of a centre does not change the loss, but how fast it turns.
    All processes call it: each embeds the images of the classes whose centres it holds. An identity without images
    keeps its new centre; of K sub-centres all start at the mean, with a tenth of their own differences.

    Returns:
        What was taken, for the log.
    """
    weight = head.class_centres()
    assert weight is not None
    rows = head.class_rows()
    sums = torch.from_numpy(class_sums(embedder_of(backbone, spec), dataset, rows))
    directions = functional.normalize(sums)
    known = directions.norm(dim=1) > 0.5
    means = (INIT_STD * math.sqrt(directions.shape[1]) * directions).to(weight)
    with torch.no_grad():
        if weight.ndim == 3:
            means = means.unsqueeze(1) + 0.1 * weight
        weight[known] = means[known]
    return f"class centres are mean embeddings of the identities' images (in this process {int(known.sum())} of them)"


def all_centres(path: Path) -> Tensor | None:
    """(C, D) or (C, K, D) the class centres of a run, or beside a model; None if there are none."""
    if find_model(path).suffix == ".onnx":
        return None
    source = checkpoint.checkpoint_of(path)
    return read_centres(path) if source is None else checkpoint.read_class_centres(source)


def _from_file(path: Path, backbone: nn.Module, spec: ModelSpec) -> tuple[ModelSpec, str]:
    file = read_torch_file(path)
    kind = config_of(file.tensors, where=str(path)).kind
    if kind != spec.backbone["kind"]:
        raise UserError(
            f"{path}: a network of kind {kind}, the recipe's is {spec.backbone['kind']}; give both the same"
        )
    taken, left = take(file.tensors, backbone, kind, where=str(path))
    origin = f"{spec.origin}, started from {path.name} ({author(kind, file)})"
    new = f"; new are {', '.join(left)}" if left else ""
    spec = replace(spec, origin=origin, **preprocessing_of(kind, file))
    note = f"{len(taken)} of {len(taken) + len(left)} tensors from {path}{new}; input {spec.contract}"
    return spec, note


def _by_name(path: Path, head: Head, identities: Sequence[str]) -> str:
    """Copies the centres of known identities into the head; says how many there were."""
    source = checkpoint.checkpoint_of(path)
    weight = head.class_centres()
    if source is None or weight is None:
        if weight is not None and read_centres(path) is not None:
            why = "have no names; --run.init-centres in-order takes them if the identities are the same in this order"
            return f"all {len(identities)} class centres are new (those of {path} {why})"
        return f"all {len(identities)} class centres are new ({path} holds a network only)"
    known = checkpoint.read_identities(source)
    if numbered(known) or numbered(identities):
        return f"all {len(identities)} class centres are new (identities that are only numbered cannot be recognised)"
    rows = {name: row for row, name in enumerate(known)}
    pairs = [(row, rows[name]) for row, name in enumerate(identities) if name in rows]
    if pairs:
        old = checkpoint.read_class_centres(source)
        if old is None:
            return f"all {len(identities)} class centres are new (the head of {path} has none that could be taken)"
        if old.shape[1:] != weight.shape[1:]:
            shapes = f"{tuple(old.shape[1:])}, not {tuple(weight.shape[1:])}"
            return f"all {len(identities)} class centres are new (those of {path} have the shape {shapes})"
        here = [(row - head.class_rows().start, known) for row, known in pairs if row in head.class_rows()]
        with torch.no_grad():
            weight[[row for row, _ in here]] = old[[known for _, known in here]].to(weight)
    others = ", the others are new" if len(pairs) < len(identities) else ""
    return f"{len(pairs)} of {len(identities)} class centres from {path} by the identities' names{others}"


def _in_order(path: Path, head: Head, identities: Sequence[str]) -> str:
    """Copies all centres, row by row, whatever the identities are called."""
    weight = head.class_centres()
    old = all_centres(path)
    if weight is None or old is None:
        where = "the recipe's head" if weight is None else path
        raise UserError(f"run.init_centres is in-order, but {where} has no class centres; leave it at by-name")
    expected = (head.num_classes, *weight.shape[1:])
    if old.shape != expected:
        raise UserError(
            f"{path}: class centres of shape {tuple(old.shape)}, the head's are {expected}; in-order needs "
            "the same identities in the same order"
        )
    with torch.no_grad():
        weight.copy_(old[head.class_rows().start : head.class_rows().stop])
    return f"all {len(identities)} class centres from {path}, in order"


def numbered(identities: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2 ...: what a bare .rec file has, where 7 in two files is not the same person."""
    return len(identities) > 0 and all(name == str(row) for row, name in enumerate(identities))
