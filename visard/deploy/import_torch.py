"""arcface_torch's, AdaFace's, CVLface's and torchvision's torch files -> our network, with its class centres.

In: model.pt, checkpoint_gpu_K.pt with all ranks' files beside it, adaface_*.ckpt, a torchvision .pth. Out: `Imported`.
arcface_torch shards class centres over its ranks: rank r of W has C // W rows, one more if r < C % W, in order; they
are joined here. Nothing in the files is executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visard.backbones import build
from visard.backbones.published import TorchFile, author, check_fit, config_of, preprocessing_of, read_torch_file
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import spec_for

RANK_FILE = re.compile(r"checkpoint_gpu_(\d+)\.pt")
CENTRES_SUFFIX = ".softmax_fc.pt"
"""`visard export RUN NAME.pt` writes centres to NAME.softmax_fc.pt: the state dict of arcface_torch's PartialFC_V2."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was found.

    Args:
        module: the network.
        spec: its spec.
        centres: (C, D) float32 class centres, in the order of the labels it was trained on; None if there are none.
        notes: what the user should know.
    """

    module: nn.Module
    spec: ModelSpec
    centres: Tensor | None = None
    notes: tuple[str, ...] = ()


def import_torch(path: Path, *, input_size: int = 0, classes: int = 0) -> Imported:
    """The network in a torch file, recognised by names and shapes, and its centres.

    Args:
        path: the file; for a checkpoint_gpu_K.pt all ranks' files in its folder are read.
        input_size: see `config_of`.
        classes: number of classes that the centres must have; 0 = any.

    Raises:
        UserError: no known network, or ranks are missing.
        FormatError: a damaged file.
    """
    ranks = rank_files(path)
    file = read_torch_file(ranks[0] if ranks else path)
    where = str(ranks[0] if ranks else path)
    config = config_of(file.tensors, where=where, input_size=input_size)
    module = build(config)
    # Files of torch before 1.0 have no counters; nothing reads them at a fixed momentum.
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    tensors = counters | file.tensors
    check_fit(tensors, module, where=where)
    module.load_state_dict(tensors)
    centres, notes = _centres(path, file, ranks, checked=classes > 0)
    if centres is not None and centres.shape[1] != config.embedding_dim:
        raise UserError(f"{where}: centres of {centres.shape[1]} dimensions, embeddings of {config.embedding_dim}")
    if classes and (centres is None or len(centres) != classes):
        found = "no class centres" if centres is None else f"{len(centres)} class centres"
        raise UserError(f"{path}: {found}, but --classes says {classes}; files of the last ranks may be missing")
    if author(config.kind, file) == "CVLface":
        notes.append("RGB is assumed; give --colour BGR if the color_space of the model's own configuration says so")
    origin = f"imported from {author(config.kind, file)}: {path.resolve().parent.name}/{path.name}"
    spec = spec_for(config, origin=origin, **preprocessing_of(config.kind, file))
    return Imported(module=module, spec=spec, centres=centres, notes=tuple(notes))


def rank_files(path: Path) -> list[Path]:
    """All ranks' files, in rank order, of the run to which a checkpoint_gpu_K.pt belongs; empty for any other file.

    Raises:
        UserError: a rank below the highest is missing.
    """
    if not RANK_FILE.fullmatch(path.name):
        return []
    found = {int(m[1]): p for p in path.parent.iterdir() if (m := RANK_FILE.fullmatch(p.name))}
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise UserError(
            f"{path.parent}: checkpoint_gpu_{missing[0]}.pt is missing, but there is one of rank {max(found)}; class "
            "centres are spread over all ranks (several machines wrote theirs to their own disks): copy them together"
        )
    return [found[rank] for rank in sorted(found)]


def _centres(path: Path, file: TorchFile, ranks: list[Path], *, checked: bool) -> tuple[Tensor | None, list[str]]:
    if ranks:
        return _joined(ranks, file, checked=checked)
    beside = path.with_name(path.stem + CENTRES_SUFFIX)
    if beside.is_file():
        return _weight(read_torch_file(beside).tensors, beside), [f"class centres from {beside.name}"]
    softmax = file.content.get("state_dict_softmax_fc")
    if isinstance(softmax, dict):
        centres = _weight(softmax, path)
        return centres, [
            f"{len(centres)} class centres; of one rank, if there were several: name it checkpoint_gpu_0.pt"
        ]
    named = file.content.get("state_dict")
    kernel = named.get("head.kernel") if isinstance(named, dict) else None
    if isinstance(kernel, Tensor) and kernel.ndim == 2:
        # AdaFace keeps a centre a column.
        return kernel.to(torch.float32).t().contiguous(), [f"{kernel.shape[1]} class centres"]
    return None, []


def _joined(ranks: list[Path], first: TorchFile, *, checked: bool) -> tuple[Tensor | None, list[str]]:
    if "state_dict_softmax_fc" not in first.content:
        return None, [f"{ranks[0].name} has no class centres"]
    shards: list[Tensor] = []
    moment = _moment(first.content)
    for path in ranks:
        content = first.content if path == ranks[0] else read_torch_file(path).content
        if _moment(content) != moment:
            raise UserError(
                f"{path}: of {_said(_moment(content))}, but {ranks[0].name} is of {_said(moment)}; all ranks' files "
                "must be of one moment"
            )
        softmax = content.get("state_dict_softmax_fc")
        if not isinstance(softmax, dict):
            raise FormatError(path, "no class centres (state_dict_softmax_fc) in it, though other ranks have some")
        shards.append(_weight(softmax, path))
    classes, world = sum(map(len, shards)), len(shards)
    for rank, (path, shard) in enumerate(zip(ranks, shards, strict=True)):
        expected = classes // world + (rank < classes % world)
        if len(shard) != expected or shard.shape[1] != shards[0].shape[1]:
            raise UserError(
                f"{path}: {len(shard)} centres of {shard.shape[1]} dimensions, but where {classes} classes are shared "
                f"out, rank {rank} of {world} has {expected} of {shards[0].shape[1]}; ranks' files are missing or mixed"
            )
    unchecked = "" if checked else "; --classes N checks that no later rank's file is missing"
    return torch.cat(shards), [f"{classes} class centres from {world} ranks{unchecked}"]


def _weight(softmax: dict[str, Any], path: Path) -> Tensor:
    weight = softmax.get("weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise FormatError(path, "class centres expected as 'weight' (classes, dimensions)")
    if not weight.isfinite().all():
        raise UserError(f"{path}: a class centre holds NaN or infinity; its training had failed")
    return weight.to(torch.float32)


def _moment(content: dict[str, Any]) -> tuple[Any, Any]:
    return content.get("epoch"), content.get("global_step")


def _said(moment: tuple[Any, Any]) -> str:
    return f"epoch {moment[0]}, step {moment[1]}"
