"""`visard export RUN OUT.onnx`: a network -> an ONNX file that gives the same embeddings, proved before it appears.

In: a run, a checkpoint or a model directory. Out: OUT.onnx (float32; input "input" (batch, 3, S, S) normalised, output
"embedding" (batch, D) not normalised, any batch size) and OUT.spec.json with the preprocessing; `visard.load` takes it.
Both are written only after ONNX Runtime has repeated the network's embeddings at batch 1 and 7.
OUT.pt instead is a torch state dict for the code that the layout is of (`export_torch.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn

from visard import __version__
from visard.console import Answer
from visard.deploy.export_torch import export_torch
from visard.errors import UserError
from visard.records import Float32Array, ModelSpec, UInt8Array
from visard.runtime import Embedder, embedder_of, load, load_module

if TYPE_CHECKING:
    import onnx

# 18 is what torch's exporter writes without converting; every runtime of the last years reads it.
OPSET = 18
BATCHES = (1, 7)
# Between ONNX Runtime and torch 1e-7 to 2e-6 was measured (docs/export.md); a wrong epsilon, order of channels or
# padding shows as 1e-3 and more.
TOLERANCE = 1e-5
LARGEST_FILE_BYTES = 2**31 - 2**20
REAL_CROPS = 64


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, and where to."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory (its best checkpoint, else its last), a checkpoint or a model directory."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write: .onnx, with OUT.spec.json beside it, or .pt, a state dict for arcface_torch (or AdaFace, or
    torchvision), with class centres in OUT.softmax_fc.pt beside it. An older export is replaced."""
    crops: str = ""
    """A data set of aligned crops: parity is checked on its first 64 crops too, besides random pixels."""
    tolerance: float = TOLERANCE
    """Largest difference allowed in any dimension of the normalised embeddings, and in relative length."""

    def __post_init__(self) -> None:
        if self.out.suffix not in (".onnx", ".pt"):
            raise UserError(f"{self.out}: the exported file's name must end in .onnx or .pt")
        if self.out.suffix == ".pt" and self.crops:
            raise UserError(f"{self.out}: --crops is for .onnx; a .pt holds the weights themselves")
        if self.tolerance <= 0:
            raise UserError(f"tolerance is {self.tolerance}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the exported file is from the network.

    Args:
        direction: largest absolute difference in any dimension of the normalised embeddings.
        length: largest relative difference of the embeddings' lengths.
        crops: how many crops were compared.
        batches: the batch sizes at which they were.
    """

    direction: float
    length: float
    crops: int
    batches: tuple[int, ...]


def main(config: ExportConfig) -> Answer:
    """Exports, proves parity, writes and describes the file."""
    if config.out.suffix == ".pt":
        return export_torch(config.model, config.out)
    module, spec = load_module(config.model)
    real = _real_crops(config.crops, spec) if config.crops else None
    parity = export_onnx(module, spec, config.out, crops=real, tolerance=config.tolerance)
    size_mb = config.out.stat().st_size / 1e6
    text = (
        f"{config.out}: {size_mb:.1f} MB, opset {OPSET}, (batch, 3, {spec.input_size}, {spec.input_size}) -> "
        f"(batch, {spec.embedding_dim})\nparity with the network on {parity.crops} crops at batch "
        f"{' and '.join(map(str, parity.batches))}: {parity.direction:.1e} in direction, {parity.length:.1e} in length "
        f"(limit {config.tolerance:.0e})"
    )
    value = {"model": str(config.out), "opset": OPSET, "megabytes": size_mb, "parity": dataclasses.asdict(parity)}
    return Answer(value, text)


def export_onnx(
    module: nn.Module,
    spec: ModelSpec,
    out: Path,
    *,
    crops: UInt8Array | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Writes `out` and its spec, if ONNX Runtime gives the module's embeddings; otherwise no file appears.

    Args:
        module: the network on the CPU; exported in evaluation mode, its mode left as found.
        spec: its spec.
        out: NAME.onnx; NAME.spec.json goes beside it.
        crops: (N, S, S, 3) uint8 RGB to compare on, besides random pixels.
        tolerance: see `ExportConfig.tolerance`.

    Raises:
        UserError: the network is too large for one ONNX file, or parity fails.
    """
    import onnx

    model = _graph(module, spec)
    exported_spec = dataclasses.replace(
        spec,
        backbone={"kind": "onnx", "network": spec.backbone, "weights_sha256": weights_hash(module)},
        visard=__version__,
    )
    model.producer_name, model.producer_version = "visard", __version__
    onnx.checker.check_model(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{out.stem}.{os.getpid()}.tmp"
    temporary, temporary_spec = out.with_name(f"{stem}.onnx"), out.with_name(f"{stem}.spec.json")
    try:
        temporary.write_bytes(model.SerializeToString())
        temporary_spec.write_text(exported_spec.to_json(), encoding="utf-8")
        parity = compare(embedder_of(module, spec), load(temporary, "cpu"), crops)
        # Written so that NaN fails.
        if not (parity.direction <= tolerance and parity.length <= tolerance):
            differences = f"{parity.direction:.1e} in direction and {parity.length:.1e} in length"
            raise UserError(
                f"{out}: not written: ONNX Runtime is {differences} off the network; the limit is {tolerance:.0e}; "
                "allow more with --tolerance if that is enough"
            )
        os.replace(temporary_spec, out.with_name(f"{out.stem}.spec.json"))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_spec.unlink(missing_ok=True)
    return parity


def compare(reference: Embedder, other: Embedder, crops: UInt8Array | None = None) -> Parity:
    """Largest differences between two models of the same spec, on random pixels and on `crops`, at each of BATCHES."""
    size = reference.spec.input_size
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
    images = pixels if crops is None else np.concatenate([pixels, crops])
    differences: list[tuple[float, float]] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for batch in BATCHES:
            for start in range(0, len(images), batch):
                part = images[start : start + batch]
                differences.append(_difference(reference(part), other(part)))
    finally:
        torch.set_float32_matmul_precision(before)
    direction, length = np.array(differences).max(axis=0)
    return Parity(direction=float(direction), length=float(length), crops=len(images), batches=BATCHES)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and running statistics; the same on every machine."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _difference(first_BD: Float32Array, second_BD: Float32Array) -> tuple[float, float]:
    lengths = [np.linalg.norm(e.astype(np.float64), axis=1, keepdims=True) for e in (first_BD, second_BD)]
    direction = np.abs(first_BD / lengths[0] - second_BD / lengths[1]).max()
    return float(direction), float(np.abs(lengths[1] / lengths[0] - 1).max())


def _graph(module: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    values = sum(tensor.numel() for tensor in module.state_dict().values())
    if values * 4 > LARGEST_FILE_BYTES:
        raise UserError(f"export: {values * 4 / 1e9:.1f} GB of weights; one ONNX file holds at most 2 GB")
    # Two images, because the exporter would take a batch of one for a constant.
    example = torch.zeros(2, 3, spec.input_size, spec.input_size)
    modes = [(part, part.training) for part in module.modules()]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                input_names=["input"],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
                external_data=False,
            )
    finally:
        for part, training in modes:
            part.training = training
    assert program is not None
    model = program.model_proto
    _strip_metadata(model.graph)
    return model


def _strip_metadata(graph: onnx.GraphProto) -> None:
    """The exporter notes for every node the source lines and folders of this machine, nobody else's business."""
    items: list[Any] = [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]
    for item in items:
        del item.metadata_props[:]
        item.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter reports that torchvision is not there and that torch's own code is deprecated: nothing for our user.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _real_crops(source: str, spec: ModelSpec) -> UInt8Array:
    from visard.data.dataset import open_dataset

    dataset = open_dataset(source, size=spec.input_size, resize=True, framing=spec.framing)
    count = min(REAL_CROPS, len(dataset))
    if count == 0:
        raise UserError(f"{source}: no crops in it to compare on; name a data set that has some")
    return np.stack([dataset.image(index) for index in range(count)])
