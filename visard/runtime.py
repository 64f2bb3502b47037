"""One way to embed crops, whatever holds the weights: a torch model directory, a run, or an ONNX file.

In: aligned uint8 RGB crops, (B, S, S, 3) or a list of (S, S, 3). Out: (B, D) float32 numpy, raw (not normalised).
`load` makes an Embedder from a path; `embedder_of` from a module in memory (evaluation during training).
`save_model` writes a model directory: model.safetensors + spec.json, which `load` and `load_module` read; imported
class centres lie beside them (`read_centres`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from visard import __version__
from visard.backbones import build, config_from_dict
from visard.device import choose_device
from visard.errors import FormatError, UserError
from visard.records import Float32Array, ModelSpec, UInt8Array

WEIGHTS_NAME = "model.safetensors"
SPEC_NAME = "spec.json"
ONNX_NAME = "model.onnx"
CENTRES_NAME = "centres.safetensors"

Crops = UInt8Array | torch.Tensor | Sequence[UInt8Array]
Flip = Literal["none", "sum", "concat"]
FLIPS: tuple[Flip, ...] = ("none", "sum", "concat")


class Embedder:
    """A model ready to embed: `embedder(crops)`.

    Args:
        spec: preprocessing and sizes; the only place where they come from.
        forward: (b, S, S, 3) uint8 RGB on any device -> (b, D) float32 numpy.
        batch_size: crops handed to `forward` at once; larger inputs are split.
    """

    def __init__(
        self, spec: ModelSpec, forward: Callable[[torch.Tensor], Float32Array], *, batch_size: int = 64
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; at least 1 is needed")
        self.spec = spec
        self.batch_size = batch_size
        self._forward = forward

    def __call__(self, crops: Crops) -> Float32Array:
        """Embeds crops as they are.

        Args:
            crops: (B, S, S, 3) uint8 RGB numpy or torch, or a list of (S, S, 3).

        Returns:
            (B, D) float32, not normalised.

        Raises:
            UserError: another shape, size or type than the model's.
        """
        images = self._checked(crops)
        parts = [self._forward(part) for part in images.split(self.batch_size)] if len(images) else []
        return np.concatenate(parts) if parts else np.zeros((0, self.spec.embedding_dim), np.float32)

    def embed(self, crops: Crops, flip: Flip = "none") -> Float32Array:
        """Embeds crops and, unless flip is "none", their mirror images too.

        Args:
            crops: as for the call.
            flip: "sum" adds the two embeddings (the field's habit), "concat" joins them (MarginDistillation's text).

        Returns:
            (B, D) float32, or (B, 2 D) for "concat"; not normalised.
        """
        if flip not in FLIPS:
            raise UserError(f"flip is {flip!r}; use {', '.join(FLIPS)}")
        images = self._checked(crops)
        straight = self(images)
        if flip == "none":
            return straight
        mirrored = self(images.flip(2))
        return straight + mirrored if flip == "sum" else np.concatenate([straight, mirrored], axis=1)

    def _checked(self, crops: Crops) -> torch.Tensor:
        size = self.spec.input_size
        if isinstance(crops, list | tuple):
            if not crops:
                return torch.zeros((0, size, size, 3), dtype=torch.uint8)
            shapes = {np.shape(crop) for crop in crops}
            if shapes != {(size, size, 3)}:
                wrong = next(shape for shape in shapes if shape != (size, size, 3))
                raise UserError(_wrong_crop("a list of (S, S, 3)", size, wrong))
            crops = np.stack(crops)
        if not isinstance(crops, np.ndarray | torch.Tensor):
            got = type(crops).__name__
            raise UserError(f"crops: expected a numpy array, a torch tensor or a list of arrays, got {got}")
        if crops.dtype not in (np.uint8, torch.uint8):
            got = str(crops.dtype).removeprefix("torch.")
            raise UserError(f"crops: expected uint8 grey levels 0..255, got {got}; the model normalises by itself")
        if crops.ndim != 4 or tuple(crops.shape[1:]) != (size, size, 3):
            raise UserError(_wrong_crop("(B, S, S, 3)", size, tuple(crops.shape)))
        if isinstance(crops, torch.Tensor):
            return crops
        # torch warns of memory that it must not write to, as that of a mapped file.
        return torch.from_numpy(np.require(crops, requirements=["C", "W"]))


def load(path: str | Path, device: str = "auto", *, batch_size: int = 64) -> Embedder:
    """The model at `path`, ready to embed.

    Args:
        path: a run directory (its best checkpoint, else its last), a checkpoint, a model directory, or an .onnx file
            with `NAME.spec.json` or `spec.json` beside it.
        device: auto, cuda, cuda:N, mps or cpu. ONNX files run on cuda or cpu.
        batch_size: crops computed at once; larger inputs are split.

    Raises:
        UserError: nothing there that can be loaded, or a device that is not there.
        FormatError: a file that does not hold what its name promises.
    """
    path = find_model(Path(path))
    if path.suffix == ".onnx":
        spec = read_spec(_onnx_spec_path(path))
        return Embedder(spec, _onnx_forward(path, spec, device), batch_size=batch_size)
    module, spec = load_module(path)
    module.to(choose_device(device), memory_format=torch.channels_last)
    return embedder_of(module, spec, batch_size=batch_size)


def load_module(path: str | Path) -> tuple[nn.Module, ModelSpec]:
    """The trainable network at `path` (as for `load`, but not ONNX), on the CPU in training mode, and its spec.

    Raises:
        UserError: not a torch model, or weights that do not fit the spec's network (the keys are named).
        FormatError: a damaged file.
    """
    directory = find_model(Path(path))
    if directory.suffix == ".onnx":
        raise UserError(
            f"{directory}: an ONNX file is frozen; give the run or the model directory that it was exported from"
        )
    spec = read_spec(directory / SPEC_NAME)
    config = config_from_dict(spec.backbone, where=f"{directory / SPEC_NAME}: backbone")
    if (config.input_size, config.embedding_dim) != (spec.input_size, spec.embedding_dim):
        raise FormatError(
            directory / SPEC_NAME, "input_size and embedding_dim differ from the backbone's; export it again"
        )
    module = build(config)
    weights = directory / WEIGHTS_NAME
    try:
        tensors = safetensors.torch.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(weights, f"not readable as safetensors ({error}); write the model again") from error
    _check_keys(weights, tensors, module.state_dict())
    module.load_state_dict(tensors)
    return module, spec


def embedder_of(module: nn.Module, spec: ModelSpec, *, batch_size: int = 64) -> Embedder:
    """A module in memory as an Embedder: each call uses its current weights and leaves its training mode as found."""

    def forward(images: torch.Tensor) -> Float32Array:
        device = next(module.parameters()).device
        with torch.inference_mode(), _evaluating(module):
            embeddings: torch.Tensor = module(spec.normalise(images.to(device)))
        return embeddings.float().cpu().numpy()

    return Embedder(spec, forward, batch_size=batch_size)


def save_model(
    module: nn.Module, spec: ModelSpec, directory: str | Path, *, centres: torch.Tensor | None = None
) -> Path:
    """Writes a model directory: model.safetensors + spec.json, complete or not at all.

    Args:
        module: the network whose configuration `spec.backbone` is.
        directory: must not exist yet.
        centres: (C, D) class centres to keep beside it, as centres.safetensors.

    Raises:
        UserError: the directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists; choose another name or remove it")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if centres is not None:
            safetensors.torch.save_file({"weight": centres.contiguous()}, temporary / CENTRES_NAME)
        (temporary / SPEC_NAME).write_text(spec.to_json(), encoding="utf-8")
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def read_centres(path: str | Path) -> torch.Tensor | None:
    """The (C, D) float32 class centres beside the model at `path`, None if there are none (a run keeps its own).

    Raises:
        FormatError: a damaged file.
    """
    file = find_model(Path(path)) / CENTRES_NAME
    if not file.is_file():
        return None
    try:
        return safetensors.torch.load_file(file)["weight"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise FormatError(
            file, f"no class centres readable as safetensors ({error}); import the model again"
        ) from error


def spec_for(module_config: object, **values: object) -> ModelSpec:
    """The ModelSpec of a network of ours: sizes from its configuration, preprocessing as the training uses it."""
    from visard.config import to_dict

    backbone = to_dict(module_config)
    return ModelSpec(
        backbone=backbone,
        input_size=backbone["input_size"],
        embedding_dim=backbone["embedding_dim"],
        visard=__version__,
        **values,  # type: ignore[arg-type]
    )


def find_model(path: Path) -> Path:
    """The .onnx file or model directory that `path` means: itself, a checkpoint's, or a run's best (else last) one.

    Raises:
        UserError: none of these is there; the message says what was looked for.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; expected a run, a model directory or an .onnx file")
    if path.is_file():
        if path.suffix == ".onnx":
            return path
        raise UserError(f"{path}: not a model; expected a run, a model directory or an .onnx file")
    if (path / WEIGHTS_NAME).is_file():
        return path
    if (path / ONNX_NAME).is_file():
        return path / ONNX_NAME
    if (path / "model" / WEIGHTS_NAME).is_file():
        return path / "model"
    for name in ("best.json", "last.json"):
        pointer = path / "checkpoints" / name
        if pointer.is_file():
            return _pointed_model(pointer)
    raise UserError(f"{path}: no model here; expected {WEIGHTS_NAME}, {ONNX_NAME} or a run with checkpoints/last.json")


def read_spec(path: Path) -> ModelSpec:
    """The spec in that file. Raises UserError if it is missing or not a spec."""
    try:
        return ModelSpec.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: not found; a model needs its spec (crop size, grey-level mean and std) beside it"
        ) from error
    except UnicodeDecodeError as error:
        raise FormatError(path, "not a text file; export the model again", error.start) from error


def _pointed_model(pointer: Path) -> Path:
    try:
        checkpoint = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            pointer, 'expected {"checkpoint": "step_..."}; name a checkpoint directory instead'
        ) from error
    model = pointer.parent / str(checkpoint) / "model"
    if not (model / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{pointer}: names {checkpoint!r}, but {model / WEIGHTS_NAME} is not there; name another checkpoint"
        )
    return model


def _onnx_spec_path(path: Path) -> Path:
    own = path.with_name(f"{path.stem}.spec.json")
    return own if own.is_file() or not (path.parent / SPEC_NAME).is_file() else path.parent / SPEC_NAME


def _onnx_forward(path: Path, spec: ModelSpec, device: str) -> Callable[[torch.Tensor], Float32Array]:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    available = onnxruntime.get_available_providers()
    provider = "CPUExecutionProvider"
    if device == "auto" and "CUDAExecutionProvider" in available and torch.cuda.is_available():
        provider = "CUDAExecutionProvider"
    elif device.startswith("cuda"):
        if "CUDAExecutionProvider" not in available:
            raise UserError(
                f"{path}: this ONNX Runtime has no CUDA provider; install onnxruntime-gpu or use device cpu"
            )
        provider = "CUDAExecutionProvider"
    elif device not in ("auto", "cpu"):
        raise UserError(f"{path}: ONNX files run on cuda or cpu, not on {device!r}")
    options = onnxruntime.SessionOptions()
    # The same number of threads as torch, so that one setting governs both.
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        raise FormatError(
            path, f"ONNX Runtime cannot read it ({str(error).splitlines()[0][:200]}); export it again"
        ) from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        shapes = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        raise UserError(
            f"{path}: expected one input (B, 3, S, S), its inputs are {shapes}; bring it in with `visard import`"
        )
    name, fixed_batch = inputs[0].name, inputs[0].shape[0]

    def run(pixels: Float32Array) -> Float32Array:
        embeddings: Float32Array = session.run(None, {name: pixels})[0]
        if embeddings.shape != (len(pixels), spec.embedding_dim):
            got = f"{embeddings.shape} for {len(pixels)} crops"
            raise UserError(
                f"{path}: gave {got}, but its spec says {spec.embedding_dim} dimensions; correct embedding_dim there"
            )
        return embeddings.astype(np.float32, copy=False)

    def forward(images: torch.Tensor) -> Float32Array:
        pixels = spec.normalise(images.cpu()).contiguous().numpy()
        if not isinstance(fixed_batch, int):
            return run(pixels)
        # A graph exported for one batch size takes no other: the last part is filled up and cut off again.
        padding = np.zeros((-len(pixels) % fixed_batch, *pixels.shape[1:]), np.float32)
        parts = np.split(np.concatenate([pixels, padding]), (len(pixels) + len(padding)) // fixed_batch)
        return np.concatenate([run(part) for part in parts])[: len(pixels)]

    return forward


def _check_keys(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise FormatError(path, f"not this network's weights: missing {_few(missing)}; not known {_few(surplus)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise FormatError(path, f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # Part by part, because some may be kept in evaluation mode while the rest trains.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _wrong_crop(expected: str, size: int, got: tuple[int, ...]) -> str:
    remedy = f"align crops to {size} px (`visard prepare --size {size}`)"
    return f"crops: expected {expected} with S = {size} px, got {got}; {remedy}"
