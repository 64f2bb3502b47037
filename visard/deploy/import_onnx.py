"""Any ONNX file that turns one image into one vector -> a frozen model with a spec, after it has been run.

In: x.onnx, and the preprocessing it expects. Out: a directory with model.onnx and spec.json, which `visard.load` takes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from visard import __version__
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Levels, ModelSpec
from visard.runtime import ONNX_NAME, SPEC_NAME, load, read_spec

if TYPE_CHECKING:
    import onnx

LARGEST_FILE_BYTES = 2**31 - 2**20
# Operators with which a graph normalises grey levels by itself, as those that MXNet exported do.
NORMALISING = ("Sub", "Mul", "Div", "Add")
BATCHES = (1, 3)


def import_onnx(
    path: Path, out: Path, *, input_size: int, mean: Levels | None, std: Levels | None, colour: str | None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Writes the directory `out` if the graph gives finite vectors that depend on the image, the same at any batch.

    Args:
        path: the .onnx file.
        out: must not exist.
        input_size: pixels; 0 = as the graph says.
        mean: grey level that its users subtract; None = what NAME.spec.json beside it says; without one 0 if the graph
            begins with its own normalisation, else 127.5.
        std: what they divide by; None = likewise, 1 or 127.5.
        colour: "RGB" or "BGR"; None = likewise, RGB.

    Returns:
        The spec, and what the user should know.

    Raises:
        UserError: not one image in and one vector out, or one that does not depend on the image.
        FormatError: not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
    except (DecodeError, OSError) as error:
        raise FormatError(path, f"not an ONNX file ({str(error).strip().splitlines()[0][:150]})") from error
    size = _input_size(path, model, input_size)
    preprocessing, note = _preprocessing(path, model)
    notes = (note,) if mean is None and std is None else ()
    values = model.SerializeToString()
    if len(values) > LARGEST_FILE_BYTES:
        raise UserError(f"{path}: {len(values) / 1e9:.1f} GB with its weights; one ONNX file holds at most 2 GB")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / ONNX_NAME).write_bytes(values)
        spec = ModelSpec(
            backbone={"kind": "onnx", "sha256": hashlib.sha256(values).hexdigest()},
            input_size=size,
            embedding_dim=_dimensions(temporary / ONNX_NAME, path, size),
            colour=preprocessing.colour if colour is None else colour,
            mean=preprocessing.mean if mean is None else mean,
            std=preprocessing.std if std is None else std,
            origin=f"imported from ONNX: {path.resolve().parent.name}/{path.name}",
            visard=__version__,
        )
        (temporary / SPEC_NAME).write_text(spec.to_json(), encoding="utf-8")
        _try_out(temporary, spec, path)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return spec, notes


def _image_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = f"inputs {[v.name for v in inputs]}, outputs {[v.name for v in model.graph.output]}"
        raise UserError(f"{path}: expected one image in and one vector out, it has {names}")
    return inputs[0]


def _input_size(path: Path, model: onnx.ModelProto, asked: int) -> int:
    sides = [d.dim_value for d in _image_input(path, model).type.tensor_type.shape.dim]
    if len(sides) != 4 or sides[1] not in (0, 3):
        raise UserError(f"{path}: expected an input (B, 3, S, S), its shape is {sides} (0 = free)")
    fixed = {side for side in sides[2:] if side}
    if len(fixed) > 1 or (asked and fixed - {asked}):
        raise UserError(f"{path}: its input is {sides[2]} x {sides[3]} px; square crops of --input-size are needed")
    if not fixed and not asked:
        raise UserError(f"{path}: its input may have any size; give --input-size, the one it was trained on")
    return asked or fixed.pop()


@dataclass(frozen=True)
class _Preprocessing:
    mean: Levels
    std: Levels
    colour: str


def _preprocessing(path: Path, model: onnx.ModelProto) -> tuple[_Preprocessing, str]:
    """What is known of it, and from where."""
    beside = path.with_name(f"{path.stem}.spec.json")
    if beside.is_file():
        spec = read_spec(beside)
        return _Preprocessing(spec.mean, spec.std, spec.colour), f"mean, std and colours from {beside.name}"
    name = _image_input(path, model).name
    first = [node.op_type for node in model.graph.node if name in node.input]
    if len(first) == 1 and first[0] in NORMALISING:
        return _Preprocessing(0.0, 1.0, "RGB"), f"it begins with {first[0]} on its input, so mean 0 and std 1"
    usual = "mean and std are the field's usual 127.5; give --mean and --std where its training had others"
    return _Preprocessing(127.5, 127.5, "RGB"), usual


def _dimensions(file: Path, path: Path, size: int) -> int:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (image,) = session.get_inputs()
        batch = image.shape[0] if isinstance(image.shape[0], int) else 1
        result = session.run(None, {image.name: np.zeros((batch, 3, size, size), np.float32)})[0]
    except (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        raise FormatError(path, f"ONNX Runtime cannot run it ({str(error).splitlines()[0][:200]})") from error
    if result.ndim != 2 or len(result) != batch:
        raise UserError(f"{path}: expected embeddings (B, D), it gave {result.shape} for {batch} images")
    return int(result.shape[1])


def _try_out(directory: Path, spec: ModelSpec, path: Path) -> None:
    """The contract of an embedding: finite, of the image, and of nothing but the image."""
    embedder = load(directory, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), spec.input_size, spec.input_size, 3), np.uint8)
    results: list[Float32Array] = []
    for batch in BATCHES:
        results.append(np.concatenate([embedder(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]))
    first = results[0]
    if not np.isfinite(first).all():
        raise UserError(f"{path}: gives NaN or infinity for random pixels")
    if not np.allclose(first, results[1], rtol=1e-3, atol=1e-3 * float(np.abs(first).max())):
        raise UserError(f"{path}: an image's vector depends on the batch around it (exported in training mode?)")
    if np.allclose(first[0], first[1]):
        raise UserError(f"{path}: gives the same vector for two random images; it is no embedding of them")
