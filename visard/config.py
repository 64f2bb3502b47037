"""Every setting of a training run, as frozen keyword-only dataclasses, and their exact way to JSON and back.

In: a recipe function's values, a JSON file, or overrides from the command line. Out: the dataclasses that each class takes as
its `config`. No heavy import: `visard train --help` and `--dry-run` read this module without torch.
`from_dict` rejects an unknown key, a missing key and a wrong type by name. A union member is told by its `kind`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from visard.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    source: str = "rendered:400x20"
    """A prepared data set (directory), an image folder, a .rec file, or `rendered:IDENTITIESxIMAGES[,seed=0][,first=0]`."""
    size: int = 112
    """Crop size in pixels; must be the data set's own unless `resize` allows another."""
    resize: bool = False
    """Resize crops of another size to `size` (costs time a crop)."""
    flip_probability: float = 0.5
    """Chance that a crop is mirrored, drawn from (seed, epoch, image id)."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _check(16 <= self.size <= 1024, f"data.size is {self.size} px; use 16 to 1024")
        _check(0 <= self.flip_probability <= 1, f"data.flip_probability is {self.flip_probability}; use 0 to 1")
        _check(self.workers >= 0, f"data.workers is {self.workers}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class IResNetConfig:
    """IResNet of ArcFace (arXiv:1801.07698); key names and shapes of arcface_torch for width 64 and size 112."""

    kind: Literal["iresnet"] = "iresnet"
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """Blocks a stage: 18 = (2,2,2,2), 34 = (3,4,6,3), 50 = (3,4,14,3), 100 = (3,13,30,3), 200 = (6,26,60,6)."""
    width: int = 64
    """Channels of the first stage; the following have 2x, 4x and 8x."""
    embedding_dim: int = 512
    input_size: int = 112
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(len(self.blocks) == 4 and min(self.blocks) >= 1, f"backbone.blocks is {self.blocks}; four numbers of at least 1")
        _check(self.width >= 1 and self.embedding_dim >= 1, "backbone.width and backbone.embedding_dim must be at least 1")
        _check(self.input_size >= 16, f"backbone.input_size is {self.input_size} px; at least 16")
        _check(0 <= self.dropout < 1, f"backbone.dropout is {self.dropout}; use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class MobileFaceNetConfig:
    """MobileFaceNet (arXiv:1804.07573) with the block counts of the papers that use it."""

    kind: Literal["mobilefacenet"] = "mobilefacenet"
    blocks: tuple[int, int, int, int] = (1, 4, 6, 2)
    """Residual depth-wise blocks a stage: (1,4,6,2) MarginDistillation, (2,8,16,4) BroadFace."""
    activation: Literal["prelu", "relu"] = "prelu"
    embedding_dim: int = 512
    input_size: int = 112
    width: int = 64
    """Channels of the stem; 64 in the paper, everything else scales with it."""
    norm_eps: float = 1e-5
    """Epsilon of the batch norms in the trunk; 1e-3 (MXNet's default) in InsightFace's published weights."""

    def __post_init__(self) -> None:
        _check(self.norm_eps > 0, f"backbone.norm_eps is {self.norm_eps}; it must be above 0")
        _check(len(self.blocks) == 4 and min(self.blocks) >= 0, f"backbone.blocks is {self.blocks}; four numbers of at least 0")
        _check(self.width >= 8 and self.embedding_dim >= 1, "backbone.width must be at least 8, embedding_dim at least 1")
        _check(self.input_size >= 32, f"backbone.input_size is {self.input_size} px; at least 32")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Vision transformer of arcface_torch (Partial FC, arXiv:2203.15565): its key names and shapes; 112 px are 12 x 12 patches."""

    kind: Literal["vit"] = "vit"
    width: int = 256
    """Dimensions of a token: T 256, S and B 512, L 768."""
    depth: int = 12
    """Blocks: T and S 12, B and L 24."""
    heads: int = 8
    patch: int = 9
    """Pixels a side of a patch; pixels beyond the last whole patch are not seen."""
    mlp_ratio: float = 4.0
    embedding_dim: int = 512
    input_size: int = 112
    drop_path: float = 0.1
    """Chance that the last block is skipped for an image while training; falls linearly to 0 at the first block."""
    mask_ratio: float = 0.1
    """Part of an image's patches that is hidden while training."""
    checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations: less memory, a third more time."""

    def __post_init__(self) -> None:
        _check(self.heads >= 1 and self.width % self.heads == 0, f"backbone.width {self.width} must be a multiple of backbone.heads {self.heads}")
        _check(min(self.width, self.depth, self.embedding_dim, self.patch) >= 1, "backbone.width, depth, patch and embedding_dim must be at least 1")
        _check(self.mlp_ratio > 0, f"backbone.mlp_ratio is {self.mlp_ratio}; it must be above 0")
        _check(self.input_size >= max(16, self.patch), f"backbone.input_size is {self.input_size} px; at least 16 and one patch")
        _check(0 <= self.drop_path < 1 and 0 <= self.mask_ratio < 1, "backbone.drop_path and mask_ratio: use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """ResNet (arXiv:1512.03385) with torchvision's key names; `fc` gives the embedding. Any input size with the same weights."""

    kind: Literal["resnet"] = "resnet"
    block: Literal["basic", "bottleneck"] = "bottleneck"
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks a stage: 18 = basic (2,2,2,2), 34 = basic (3,4,6,3), 50 = bottleneck (3,4,6,3), 101 = bottleneck (3,4,23,3)."""
    width: int = 64
    embedding_dim: int = 512
    input_size: int = 224

    def __post_init__(self) -> None:
        _check(len(self.blocks) == 4 and min(self.blocks) >= 1, f"backbone.blocks is {self.blocks}; four numbers of at least 1")
        _check(self.width >= 1 and self.embedding_dim >= 1, "backbone.width and backbone.embedding_dim must be at least 1")
        _check(self.input_size >= 32, f"backbone.input_size is {self.input_size} px; at least 32")


@dataclass(frozen=True, kw_only=True)
class IRConfig:
    """The IResNet of AdaFace and CVLface (IR-18, IR-50, IR-101), with their key names: its plain shortcuts have no weights."""

    kind: Literal["ir"] = "ir"
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """Blocks a stage: 18 = (2,2,2,2), 34 = (3,4,6,3), 50 = (3,4,14,3), 101 = (3,13,30,3)."""
    width: int = 64
    embedding_dim: int = 512
    input_size: int = 112
    dropout: float = 0.4

    def __post_init__(self) -> None:
        _check(len(self.blocks) == 4 and min(self.blocks) >= 1, f"backbone.blocks is {self.blocks}; four numbers of at least 1")
        _check(self.width >= 1 and self.embedding_dim >= 1, "backbone.width and backbone.embedding_dim must be at least 1")
        _check(self.input_size >= 16, f"backbone.input_size is {self.input_size} px; at least 16")
        _check(0 <= self.dropout < 1, f"backbone.dropout is {self.dropout}; use 0 to below 1")


BackboneConfig = IResNetConfig | MobileFaceNetConfig | ViTConfig | ResNetConfig | IRConfig


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """The general margin cos(m1 * theta + m2) - m3 on the target logit, and the scale of all logits (ArcFace, Eq. 4)."""

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    scale: float = 64.0
    gradient: Literal["exact", "straight-through"] = "exact"
    """"straight-through" repeats arcface_torch's estimator: the margin is applied without a gradient of its own."""

    def __post_init__(self) -> None:
        _check(self.scale > 0, f"head.margin.scale is {self.scale}; it must be above 0")
        _check(self.m1 > 0, f"head.margin.m1 is {self.m1}; it must be above 0")
        _check(self.m2 >= 0 and self.m3 >= 0, "head.margin.m2 and m3 must not be negative")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier: one centre a class, margin softmax cross-entropy."""

    margin: MarginConfig = field(default_factory=MarginConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with momentum (torch.optim.SGD's definition)."""

    lr: float = 0.1
    """Learning rate at `schedule.base_batch` images a step; scaled linearly with `run.batch_global` (arXiv:1706.02677)."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    """False leaves batch-norm weights, PReLU slopes and biases without decay."""
    clip_norm: float = 5.0
    """Largest L2 norm of the gradient of backbone and head together; 0 = no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, f"optim.lr is {self.lr}; it must be above 0")
        _check(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; use 0 to below 1")
        _check(self.weight_decay >= 0 and self.clip_norm >= 0, "optim.weight_decay and optim.clip_norm must not be negative")
        _check(not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    kind: Literal["cosine", "polynomial", "multistep", "constant"] = "cosine"
    epochs: float = 20.0
    """Length of the run in passes over the data."""
    max_steps: int = 0
    """If above 0, the length of the run in optimizer steps instead of `epochs`."""
    warmup_epochs: float = 1.0
    """Linear warm-up from 0, part of `epochs`."""
    milestones: tuple[float, ...] = ()
    """multistep: epochs after which the rate is multiplied by `gamma`."""
    gamma: float = 0.1
    power: float = 2.0
    """polynomial: (1 - t) ** power."""
    base_batch: int = 0
    """Images a step at which `optim.lr` holds; 0 = `run.batch_global`, so no scaling."""

    def __post_init__(self) -> None:
        _check(self.epochs > 0 or self.max_steps > 0, "schedule.epochs or schedule.max_steps must be above 0")
        _check(self.warmup_epochs >= 0, f"schedule.warmup_epochs is {self.warmup_epochs}; it must not be negative")
        _check((self.kind == "multistep") == bool(self.milestones), "schedule.milestones belong to kind multistep, which needs them")
        _check(list(self.milestones) == sorted(set(self.milestones)), f"schedule.milestones {self.milestones} must increase")
        _check(0 < self.gamma < 1 and self.power > 0, "schedule.gamma must be between 0 and 1, schedule.power above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run is carried out: nothing here should change what is learnt, but seed, batch_global and precision."""

    out: Path = Path("runs/run")
    """Directory of the run."""
    seed: int = 0
    batch_global: int = 128
    """Images a step over all processes."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the backbone; the head stays in float32."""
    channels_last: bool = True
    float32_matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    """"auto" takes "medium" where a start-up self-test shows that it stays float32 and is faster (performance.md), else "highest"."""
    log_every: int = 20
    """Steps between log lines."""
    evaluate_every: int = 0
    """Steps between evaluations and the end; 0 = at the end of every epoch."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at the end of every epoch."""
    keep_last: int = 3
    """Checkpoints kept; the best one is kept besides."""
    val: tuple[str, ...] = ()
    """Pair sets evaluated during training: `DATA` or `DATA::PAIRS_FILE`; without a pairs file, pairs are drawn by seed."""
    val_pairs: int = 3000
    """Genuine and as many impostor pairs drawn from a validation set without a pairs file."""
    init: str = ""
    """Model or run whose weights start this run ("" = random)."""
    tensorboard: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        _check(self.batch_global >= 1, f"run.batch_global is {self.batch_global}; at least 1")
        _check(self.log_every >= 1 and self.keep_last >= 1, "run.log_every and run.keep_last must be at least 1")
        _check(self.evaluate_every >= 0 and self.save_every >= 0, "run.evaluate_every and run.save_every must not be negative")
        _check(self.val_pairs >= 20, f"run.val_pairs is {self.val_pairs}; at least 20")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `visard train NAME --section.key value` overrides any field."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=IResNetConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(
            self.backbone.input_size == self.data.size,
            f"backbone.input_size {self.backbone.input_size} and data.size {self.data.size} differ; give both the same",
        )


def to_dict(value: Any) -> Any:
    """A dataclass as plain JSON values: tuples become lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def from_dict(cls: type[T], values: Any, *, where: str) -> T:
    """The dataclass `cls` from JSON values.

    Args:
        where: file (and field) named in the error.

    Raises:
        UserError: an unknown key, a missing key, a wrong type or an impossible combination.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with the fields of {cls.__name__}, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(fields))}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: the key {name!r} is missing")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        variadic = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if not variadic and len(value) != len(arguments):
            raise UserError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        item_hints = [arguments[0]] * len(value) if variadic else list(arguments)
        return origin(_convert(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(item_hints, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    tagged = {
        typing.get_args(typing.get_type_hints(m)["kind"])[0]: m for m in members if dataclasses.is_dataclass(m)
    }
    if tagged and isinstance(value, dict):
        kind = value.get("kind")
        if kind not in tagged:
            raise UserError(f"{where}: kind {kind!r} is not one of {', '.join(map(repr, tagged))}")
        return from_dict(tagged[kind], value, where=where)
    for member in members:
        if member is not type(None):
            try:
                return _convert(member, value, where)
            except UserError:
                continue
    raise UserError(f"{where}: {value!r} fits none of {', '.join(getattr(m, '__name__', str(m)) for m in members)}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
