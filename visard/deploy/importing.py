"""`visard import WEIGHTS OUT`: weights from elsewhere -> a visard model directory.

In: the MXNet .params of a MobileFaceNet in InsightFace's layout, its -symbol.json beside it (or the folder of both);
torch files of arcface_torch (model.pt, checkpoint_gpu_K.pt), AdaFace, CVLface or torchvision; any ONNX file. Out:
model.safetensors + spec.json, trainable and exportable, with centres.safetensors where there are class centres; for
ONNX model.onnx + spec.json, frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from visard.backbones.published import SUFFIXES
from visard.console import Answer
from visard.deploy.import_mxnet import import_mxnet
from visard.deploy.import_onnx import import_onnx
from visard.deploy.import_torch import Imported, import_torch
from visard.deploy.macs import count_macs, count_parameters
from visard.errors import UserError
from visard.records import Levels, ModelSpec
from visard.runtime import save_model

EXPECTED = "an MXNet .params, a torch file (.pt, .pth, .ckpt, .safetensors), an .onnx, or the folder of one"


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What is imported, and where to."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """MXNet .params (NAME-symbol.json beside it); arcface_torch's model.pt, or checkpoint_gpu_0.pt (all ranks' files
    beside it); AdaFace's .ckpt, CVLface's or torchvision's weights; an .onnx; or the folder that holds one of them."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Model directory to write; must not exist yet."""
    input_size: int = 0
    """Crop size in pixels where the weights leave it open (ResNet, some ONNX files); 0 = as they say."""
    mean: Levels | None = None
    """Grey level (0..255) subtracted before the network, one or three (red, green, blue); unless given, what the file
    says (ImageNet's for a torchvision classifier), else 127.5."""
    std: Levels | None = None
    """Grey level divided by, likewise."""
    colour: Literal["auto", "RGB", "BGR"] = "auto"
    """Order of colours the network was trained on; auto: BGR for AdaFace's own checkpoints, RGB for all others."""
    classes: int = 0
    """Number of identities it was trained on: fails unless there are as many class centres. 0 = not checked."""

    def __post_init__(self) -> None:
        if self.std is not None and min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise UserError(f"--std is {self.std}; it must be above 0")
        if self.input_size < 0 or self.classes < 0:
            raise UserError("--input-size and --classes must not be negative")


def main(config: ImportConfig) -> Answer:
    """Imports, writes and describes the model."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another name or remove it")
    path = find_weights(config.weights)
    if path.suffix == ".onnx":
        if config.classes:
            raise UserError(f"{path}: an ONNX file has no class centres; leave --classes out")
        colour = None if config.colour == "auto" else config.colour
        spec, notes = import_onnx(
            path, config.out, input_size=config.input_size, mean=config.mean, std=config.std, colour=colour
        )
        return _answer(config.out, spec, {}, "frozen graph", notes)
    found = import_weights(path, input_size=config.input_size, classes=config.classes)
    spec = _with_asked_preprocessing(found.spec, config)
    save_model(found.module, spec, config.out, centres=found.centres)
    parameters, macs = count_parameters(found.module), count_macs(found.module, spec.input_size)
    values = {"parameters": parameters, "macs": macs, "centres": 0 if found.centres is None else len(found.centres)}
    size = f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds"
    return _answer(config.out, spec, values, size, found.notes)


def import_weights(path: Path, *, input_size: int = 0, classes: int = 0) -> Imported:
    """The network, its spec and its class centres from foreign weights (not ONNX, which is frozen).

    Args:
        path: as `ImportConfig.weights`.
        input_size: as `ImportConfig.input_size`.
        classes: as `ImportConfig.classes`.

    Raises:
        UserError: a kind of file or of network that cannot be imported; the layer, operator or tensor is named.
        FormatError: a damaged file.
    """
    path = find_weights(path)
    if path.suffix == ".params":
        module, spec = import_mxnet(path)
        if classes or input_size not in (0, spec.input_size):
            raise UserError(f"{path}: no class centres, and crops of {spec.input_size} px; leave the options out")
        return Imported(module=module, spec=spec)
    if path.suffix in SUFFIXES:
        return import_torch(path, input_size=input_size, classes=classes)
    raise UserError(f"{path}: cannot import {path.suffix or 'this'}; give {EXPECTED}")


def find_weights(path: Path) -> Path:
    """The file that `path` means: itself, or what to import in a folder.

    Raises:
        UserError: nothing there, or several that it could be.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; give {EXPECTED}")
    if not path.is_dir():
        return path
    ranks = sorted(path.glob("checkpoint_gpu_*.pt"))
    if ranks:
        return ranks[0]
    found = sorted(p for p in path.iterdir() if p.suffix in (".params", ".onnx", *SUFFIXES) and p.is_file())
    found = [p for p in found if not p.name.endswith(".softmax_fc.pt")]
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} files with weights in this folder, expected one; name the file")
    return found[0]


def _with_asked_preprocessing(spec: ModelSpec, config: ImportConfig) -> ModelSpec:
    return replace(
        spec,
        mean=spec.mean if config.mean is None else config.mean,
        std=spec.std if config.std is None else config.std,
        colour=spec.colour if config.colour == "auto" else config.colour,
    )


def _answer(out: Path, spec: ModelSpec, values: dict[str, Any], what: str, notes: tuple[str, ...]) -> Answer:
    line = f"{out}: {spec.backbone['kind']}, {what}, {spec.contract} -> {spec.embedding_dim} dimensions"
    value = {"model": str(out), **values, "spec": vars(spec), "notes": list(notes)}
    return Answer(value, "\n".join([line, *notes]))
