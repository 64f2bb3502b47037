"""Every setting of a training run, as frozen keyword-only dataclasses, and their exact way to JSON and back.

In: a recipe function's values, a JSON file, or overrides from the command line. Out: the dataclasses that each class
takes as its `config`. No heavy import: `visard train --help` and `--dry-run` read this module without torch.
`from_dict` rejects an unknown key, a missing key and a wrong type by name. A union member is told by its `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from visard.config_augment import AugmentConfig
from visard.config_augment import FramingConfig as FramingConfig
from visard.config_backbones import BackboneConfig as BackboneConfig
from visard.config_backbones import Checkpointing as Checkpointing
from visard.config_backbones import ExpertsConfig as ExpertsConfig
from visard.config_backbones import IRConfig as IRConfig
from visard.config_backbones import IResNetConfig as IResNetConfig
from visard.config_backbones import MobileFaceNetConfig as MobileFaceNetConfig
from visard.config_backbones import ResNetConfig as ResNetConfig
from visard.config_backbones import ViTConfig as ViTConfig
from visard.config_distill import DistillConfig as DistillConfig
from visard.config_distill import check_fit
from visard.config_heads import AdaFaceConfig as AdaFaceConfig
from visard.config_heads import AnyMarginConfig as AnyMarginConfig
from visard.config_heads import CurricularFaceConfig as CurricularFaceConfig
from visard.config_heads import HeadConfig as HeadConfig
from visard.config_heads import MagFaceConfig as MagFaceConfig
from visard.config_heads import MarginConfig as MarginConfig
from visard.config_heads import QueueConfig as QueueConfig
from visard.config_json import from_dict as from_dict
from visard.config_json import to_dict as to_dict
from visard.config_masks import MaskConfig as MaskConfig
from visard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Which images an epoch draws and in which batches."""

    kind: Literal["uniform", "balanced", "identities"] = "uniform"
    """Every image once; identities evened out; or batches of P identities x K images, P = `run.batch_global` / K."""
    power: float = 0.0
    """balanced: an identity of n images is drawn in proportion to n ** power; 0 = each identity equally often."""
    images_per_identity: int = 4
    """identities: K; an identity with fewer images gives some of them several times."""
    min_images: int = 1
    """identities: those with fewer images are left out."""

    def __post_init__(self) -> None:
        _check(0 <= self.power <= 1, f"data.sampler.power is {self.power}; use 0 to 1")
        _check(self.kind == "balanced" or self.power == 0, "data.sampler.power belongs to kind balanced")
        k = self.images_per_identity
        _check(k >= 2, f"data.sampler.images_per_identity is {k}; at least 2")
        _check(self.min_images >= 1, f"data.sampler.min_images is {self.min_images}; at least 1")
        _check(
            self.kind == "identities" or (k, self.min_images) == (4, 1),
            "data.sampler.images_per_identity and min_images belong to kind identities",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    source: str = "rendered:400x20"
    """A prepared data set (directory), an image folder, a .rec, .bin or .tar file, a list of images, or
    `rendered:IDENTITIESxIMAGES[,seed=0][,first=0]`; or several: `A + B * 2` (every image of B twice), or a .json
    file."""
    unlabelled: str = ""
    """A data set like `source` (or several) whose labels are not looked at, joined to it: a teacher's embeddings of its
    images are learnt, mixed into the batches by number."""
    labels: Literal["used", "ignored"] = "used"
    """ignored: no label of `source` is looked at; what is learnt is the teacher's alone."""
    same_names: Literal["apart", "merge"] = "apart"
    """Whether people of equal names in several sources are two (called SOURCE/NAME) or one."""
    broken: Literal["error", "skip"] = "error"
    """An image that cannot be read stops the run, or is replaced by the next one that can and counted."""
    size: int = 112
    """Crop size in pixels; must be the data set's own unless `resize` allows another."""
    resize: bool = False
    """Resize crops of another size to `size` (costs time a crop)."""
    framing: FramingConfig = field(default_factory=FramingConfig)
    flip_probability: float = 0.5
    """Chance that a crop is mirrored, drawn from (seed, epoch, image id)."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What is done to crops besides the mirror; nothing at first. `--augment light` takes a preset."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Which crops get a mask; none at first."""

    def __post_init__(self) -> None:
        _check(16 <= self.size <= 1024, f"data.size is {self.size} px; use 16 to 1024")
        _check(0 <= self.flip_probability <= 1, f"data.flip_probability is {self.flip_probability}; use 0 to 1")
        _check(
            self.framing.kind == "crop" or not self.resize,
            "data.resize does nothing where data.framing.kind is photograph; leave it out",
        )
        _check(
            self.framing.kind == "crop" or self.masks.probability == 0,
            "data.masks are for aligned crops of faces; with data.framing.kind photograph leave them out",
        )
        _check(self.workers >= 0, f"data.workers is {self.workers}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with momentum or Adam (torch.optim's definitions), or LARS (arXiv:1708.03888)."""

    kind: Literal["sgd", "adam", "lars"] = "sgd"
    lr: float = 0.1
    """Learning rate at `schedule.base_batch` images a step; linear in `run.batch_global` (arXiv:1706.02677)."""
    momentum: float = 0.9
    """sgd, lars: weight of the past gradients; 0 = none."""
    nesterov: bool = False
    """sgd, lars: step along the gradient and the coming momentum."""
    beta1: float = 0.9
    """adam: weight of the past in the running mean of gradients."""
    beta2: float = 0.999
    """adam: the same of their squares."""
    eps: float = 1e-8
    """adam: added to the root of the latter."""
    trust: float = 0.001
    """lars: a parameter's length over its gradient's, times this, is its own rate (eta in the paper)."""
    weight_decay: float = 5e-4
    """Added to the gradient, times the parameter (adam too: not AdamW)."""
    decay_norm_and_bias: bool = False
    """False leaves batch-norm weights, PReLU slopes and biases without decay."""
    clip_norm: float = 5.0
    """Largest L2 norm of the gradient of backbone and head together; 0 = no clipping."""

    def __post_init__(self) -> None:
        _check(0 < self.lr < float("inf"), f"optim.lr is {self.lr}; it must be above 0 and finite")
        _check(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; use 0 to below 1")
        _check(
            self.weight_decay >= 0 and self.clip_norm >= 0,
            "optim.weight_decay and optim.clip_norm must not be negative",
        )
        _check(not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0")
        _check(
            self.kind != "adam" or (self.momentum, self.nesterov) == (0.9, False),
            "optim.momentum and optim.nesterov belong to kinds sgd and lars",
        )
        _check(
            self.kind == "adam" or (self.beta1, self.beta2, self.eps) == (0.9, 0.999, 1e-8),
            "optim.beta1, beta2 and eps belong to kind adam",
        )
        _check(self.kind == "lars" or self.trust == 0.001, "optim.trust belongs to kind lars")
        _check(self.trust > 0, f"optim.trust is {self.trust}; it must be above 0")
        _check(0 < self.beta1 < 1 and 0 < self.beta2 < 1, "optim.beta1 and optim.beta2: use above 0 to below 1")
        _check(self.eps > 0, f"optim.eps is {self.eps}; it must be above 0")


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
    milestone_steps: tuple[int, ...] = ()
    """multistep: the same in optimizer steps, instead of `milestones`."""
    gamma: float = 0.1
    power: float = 2.0
    """polynomial: (1 - t) ** power."""
    base_batch: int = 0
    """Images a step at which `optim.lr` holds; 0 = `run.batch_global`, so no scaling."""

    def __post_init__(self) -> None:
        _check(self.epochs > 0 or self.max_steps > 0, "schedule.epochs or schedule.max_steps must be above 0")
        _check(self.max_steps >= 0, f"schedule.max_steps is {self.max_steps}; it must not be negative")
        _check(self.max_steps > 0 or self.epochs < float("inf"), "schedule.epochs must be finite; how long is the run?")
        _check(self.warmup_epochs >= 0, f"schedule.warmup_epochs is {self.warmup_epochs}; it must not be negative")
        _check(
            (self.kind == "multistep") == bool(self.milestones or self.milestone_steps),
            "schedule.milestones belong to kind multistep, which needs them",
        )
        _check(
            not (self.milestones and self.milestone_steps),
            "schedule.milestones and schedule.milestone_steps exclude each other; empty one of them",
        )
        for name, passed in (("milestones", self.milestones), ("milestone_steps", self.milestone_steps)):
            _check(list(passed) == sorted(set(passed)), f"schedule.{name} {passed} must increase")
        _check(0 < self.gamma < 1 and self.power > 0, "schedule.gamma must be between 0 and 1, schedule.power above 0")
        _check(self.kind == "multistep" or self.gamma == 0.1, "schedule.gamma belongs to kind multistep")
        _check(self.kind == "polynomial" or self.power == 2.0, "schedule.power belongs to kind polynomial")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run is carried out: nothing here should change what is learnt, but seed, batch_global and precision."""

    out: Path = Path("runs/run")
    """Directory of the run."""
    started_in: str = ""
    """Folder in which `visard train` began the run, written by it: what a resumed run names by relative paths (data,
    val, init) is looked for there."""
    seed: int = 0
    batch_global: int = 128
    """Images a step over all processes."""
    micro_batches: int = 1
    """Parts into which each process divides its images of a step, so that the activations of one part fit: the same
    gradient, but batch norm normalises by the part."""
    zero: Literal[0, 1, 2, 3] = 0
    """What several processes divide among them instead of holding it each: 1 = what the optimizer remembers of the
    backbone, 2 = its gradients too, 3 = its parameters too (arXiv:1910.02054). Same results; nothing on one process.
    Class centres are divided by `head.classes`."""
    gradient_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which the backbone's gradients are summed over processes; fp16 needs the loss scale of precision fp16."""
    freeze_bn: bool = False
    """Batch norm uses its running statistics in training too and leaves them as they are; its weights still learn."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the backbone; the head stays in float32."""
    checkpointing: Checkpointing = "none"
    """Gradient checkpointing: what is computed again in the backward pass instead of being kept; same results, less
    memory, up to a third more time. "segment" keeps least of a deep stage."""
    channels_last: bool = True
    float32_matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    """"auto" takes "medium" on a CPU where a start-up self-test shows that it stays float32 and is faster, else
    "highest"; "high" lets a GPU use TF32."""
    log_every: int = 20
    """Steps between log lines."""
    evaluate_every: int = 0
    """Steps between evaluations and the end; 0 = at the end of every epoch."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at the end of every epoch."""
    keep_last: int = 3
    """Checkpoints kept; the best one is kept besides."""
    val: tuple[str, ...] = ()
    """Sets evaluated during training: `DATA` or `DATA::PAIRS_FILE` in pairs (without a file they are drawn by seed),
    `DATA::retrieval` by Recall@K."""
    val_pairs: int = 3000
    """Genuine and as many impostor pairs drawn from a validation set without a pairs file."""
    init: str = ""
    """Model, run or published torch file whose weights start this run ("" = random)."""
    init_network: Literal["same", "slim"] = "same"
    """What `init` gives to the network: its weights, and its shape besides where the kind is the same; or the weights
    that fit a network with fewer blocks or channels, the recipe's, cut out of it (`backbones.slim`)."""
    init_centres: Literal["by-name", "in-order", "class-means"] = "by-name"
    """Class centres at the start: those of `init` of identities with the same name; or all of them, row by row (an
    imported checkpoint has no names: only where the data has the same identities in the same order); or the mean
    embeddings that `init` gives to each identity's images, which it sees once for that."""
    tensorboard: bool = True
    wandb: str = ""
    """Project on Weights & Biases to log to, besides; "" = none. WANDB_MODE=offline is honoured."""
    deterministic: bool = True

    def __post_init__(self) -> None:
        _check(self.batch_global >= 1, f"run.batch_global is {self.batch_global}; at least 1")
        _check(self.micro_batches >= 1, f"run.micro_batches is {self.micro_batches}; at least 1")
        _check(
            self.micro_batches == 1 or self.batch_global >= 2 * self.micro_batches,
            f"run.micro_batches {self.micro_batches} leaves fewer than 2 images of run.batch_global "
            f"{self.batch_global} to a part",
        )
        _check(
            self.gradient_dtype != "fp16" or self.precision == "fp16",
            "run.gradient_dtype fp16 would lose small gradients without the loss scale of run.precision fp16; use bf16",
        )
        _check(self.log_every >= 1 and self.keep_last >= 1, "run.log_every and run.keep_last must be at least 1")
        _check(
            self.evaluate_every >= 0 and self.save_every >= 0,
            "run.evaluate_every and run.save_every must not be negative",
        )
        _check(self.val_pairs >= 20, f"run.val_pairs is {self.val_pairs}; at least 20")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `visard train NAME --section.key value` overrides any field."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=IResNetConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    """A teacher to learn from; none at first."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(
            self.backbone.input_size == self.data.size,
            f"backbone.input_size {self.backbone.input_size} and data.size {self.data.size} differ; give both the same",
        )
        check_fit(self)
        k, batch = self.data.sampler.images_per_identity, self.run.batch_global
        _check(
            self.data.sampler.kind != "identities" or (batch % k == 0 and batch >= 2 * k),
            f"run.batch_global {batch} is not 2, 3, ... times data.sampler.images_per_identity {k}",
        )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
