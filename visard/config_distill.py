"""Settings of distillation: which teacher, what is learnt from it, and how its values reach the training.

In: a recipe's values. Out: `DistillConfig`, a section of `config.Recipe`. A setting that the method would not use is
refused by name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visard.errors import UserError

if TYPE_CHECKING:
    from visard.config import Recipe

Method = Literal[
    "none", "margin", "angular", "triplet-l2", "triplet-cos", "margin-kd", "bigface", "soft-target", "relational"
]

WEIGHTS = {
    "margin": (0.0, 1.0),
    "angular": (1.0, 1.0),
    "triplet-l2": (1.0, 0.0),
    "triplet-cos": (1.0, 0.0),
    "margin-kd": (0.95, 0.05),
    "bigface": (9.0, 1.0),
    "soft-target": (0.95, 0.05),
    "relational": (1.0, 1.0),
}
"""Method -> weights of the teacher's term and of the margin loss: the papers', or their authors' code's."""

TRIPLETS = ("triplet-l2", "triplet-cos")
SOFT = ("soft-target", "margin-kd")
COMPARED = ("angular", "bigface")
WITHOUT_LABELS = (*COMPARED, "relational")

_USED_BY = {
    "weight": tuple(method for method in WEIGHTS if method != "margin"),
    "temperature": SOFT,
    "margins": ("margin",),
    "margin_min": ("margin", *TRIPLETS),
    "margin_max": ("margin", *TRIPLETS),
    "projection": ("margin", *COMPARED),
    "angle_weight": ("relational",),
}
"""Field -> methods that read it; all others are everybody's."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student learns from a teacher besides, or instead of, the labels.

    Weights and centres that are the method's own are filled in when it is made.
    """

    method: Method = "none"
    """margin: MarginDistillation; angular: 1 - cos of both embeddings; triplet-l2, triplet-cos: triplets whose margin
    is the teacher's; margin-kd: soft targets with margins in both logits; bigface: squared distance of both unit
    embeddings; soft-target: Hinton's; relational: distances and angles within the batch."""
    teacher: str = ""
    """Run, model directory or .onnx file; may be left out where `cache` has all that is needed."""
    embeddings: Literal["cached", "beside"] = "cached"
    """The teacher embeds the data once, before training (two views: as it is and mirrored), or every batch anew beside
    the student."""
    cache: str = ""
    """cached: embeddings directory that `visard embed TEACHER DATA DIR --flip concat` wrote; "" = RUN/teacher, made
    when the run begins."""
    view: Literal["clean", "augmented"] = "clean"
    """beside: whether the teacher sees crops without their augmentation (but mirrored alike), as a cache has them."""
    weight: float = -1.0
    """Of the teacher's term; -1 = the method's own (`WEIGHTS`)."""
    hard_weight: float = -1.0
    """Of the margin loss on the labels; -1 = the method's own."""
    temperature: float = 4.0
    """soft-target and margin-kd: T by which both logits are divided; their loss is multiplied by T**2."""
    centres: Literal["auto", "new", "new-frozen", "teacher", "teacher-frozen"] = "auto"
    """What the student's class centres start from, and whether they stay as they are; auto = teacher-frozen for margin,
    new for all others."""
    teacher_centres: Literal["by-name", "in-order", "class-means"] = "by-name"
    """Which class centres are the teacher's: those of its run, by the identities' names (class means where a name is
    missing or it has none); those of its run or model, row by row; or the mean directions of its embeddings."""
    margins: Literal["per-image", "fixed"] = "per-image"
    """margin: each image's own margin by the teacher's cosine, or `head.margin.m2` for all."""
    margin_min: float = 0.2
    """margin, triplets: smallest margin."""
    margin_max: float = 0.5
    """margin, triplets: that of the largest value in the batch."""
    projection: Literal["none", "learned", "pca"] = "none"
    """Where embeddings differ in size: a linear layer on the student's (kept in the run, not in the model), or the
    principal axes of the teacher's."""
    angle_weight: float = 2.0
    """relational: weight of the angles beside that of the distances, 1."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            methods = _USED_BY.get(f.name, tuple(WEIGHTS))
            if f.name != "method" and getattr(self, f.name) != f.default and self.method not in methods:
                where = "needs a distill.method" if self.method == "none" else f"does nothing for {self.method}"
                raise UserError(f"distill.{f.name} {where}; it belongs to {', '.join(methods)}")
        if self.method == "none":
            return
        soft, hard = WEIGHTS[self.method]
        if self.weight == -1 and self.method != "margin":
            object.__setattr__(self, "weight", soft)
        if self.hard_weight == -1:
            object.__setattr__(self, "hard_weight", hard)
        if self.centres == "auto" and self.has_classes:
            object.__setattr__(self, "centres", "teacher-frozen" if self.method == "margin" else "new")
        if self.centres == "new" and not self.has_classes:  # filled in before `hard_weight` became 0
            object.__setattr__(self, "centres", "auto")
        self._check_method()

    def _check_method(self) -> None:
        given = bool(self.teacher) or (self.embeddings == "cached" and bool(self.cache))
        _check(
            self.uses_teacher or not given,
            f"distill.teacher does nothing: margins are fixed and centres {self.centres}; leave it out",
        )
        _check(not self.cache or self.embeddings == "cached", "distill.cache does nothing for embeddings beside")
        _check(
            self.embeddings == "cached" or self.needs_teacher_embeddings,
            "distill.embeddings beside does nothing for margins fixed, which look at no embedding of the teacher's",
        )
        _check(
            self.view == "clean" or self.embeddings == "beside",
            "distill.view augmented needs distill.embeddings beside: a cache holds the embeddings of clean crops",
        )
        _check(
            self.method == "margin" or 0 < self.weight < float("inf"),
            f"distill.weight is {self.weight}; it must be above 0, or -1 for the method's own",
        )
        _check(
            0 <= self.hard_weight < float("inf") and (self.hard_weight > 0 or self.method != "margin"),
            f"distill.hard_weight is {self.hard_weight}; use 0 or more (margin: above 0), or -1 for the method's own",
        )
        _check(0 < self.temperature < float("inf"), f"distill.temperature is {self.temperature}; it must be above 0")
        _check(
            0 <= self.margin_min <= self.margin_max,
            f"distill.margin_min {self.margin_min} must not be negative, nor above margin_max {self.margin_max}",
        )
        _check(
            self.margins == "per-image" or (self.margin_min, self.margin_max) == (0.2, 0.5),
            "distill.margin_min and margin_max do nothing for margins fixed, which are head.margin.m2",
        )
        _check(self.angle_weight >= 0, f"distill.angle_weight is {self.angle_weight}; use 0 or more")
        _check(
            self.has_classes or self.centres == "auto",
            f"distill.centres does nothing for {self.method} while distill.hard_weight is 0",
        )
        _check(
            self.needs_teacher_centres or self.teacher_centres == "by-name",
            f"distill.teacher_centres does nothing for {self.method} with centres {self.centres}",
        )
        _check(
            self.method != "margin" or self.projection != "learned",
            "distill.projection learned does nothing for margin, whose centres are the teacher's; use pca",
        )

    @property
    def has_classes(self) -> bool:
        """Whether the student learns class centres."""
        return self.hard_weight > 0 or self.method in SOFT

    @property
    def frozen(self) -> bool:
        """Whether the student's class centres stay as they are."""
        return self.centres.endswith("-frozen")

    @property
    def uses_teacher(self) -> bool:
        """Whether there is a teacher: not where MarginDistillation's parts are all switched off (Table IV)."""
        return self.method != "none" and not (
            self.method == "margin" and self.margins == "fixed" and self.centres.startswith("new")
        )

    @property
    def needs_teacher_embeddings(self) -> bool:
        """Whether a step looks at the teacher's embeddings of its images, and not at its centres alone."""
        return self.uses_teacher and not (self.method == "margin" and self.margins == "fixed")

    @property
    def needs_teacher_centres(self) -> bool:
        """Whether the teacher's class centres are looked at."""
        return (
            self.method in SOFT
            or (self.method == "margin" and self.margins == "per-image")
            or self.centres.startswith("teacher")
        )


def check_fit(recipe: Recipe) -> None:
    """Raises UserError where a recipe's distillation and its other sections contradict each other."""
    config, head, data, method = recipe.distill, recipe.head, recipe.data, recipe.distill.method
    uniform = data.sampler.kind == "uniform"
    without_labels, unlabelled_too = ", ".join(WITHOUT_LABELS), ", ".join((*WITHOUT_LABELS, *SOFT))
    _check(
        data.labels == "used" or method in WITHOUT_LABELS,
        f"data.labels ignored needs a distill.method that uses none: {without_labels}",
    )
    _check(
        data.labels == "used" or config.hard_weight in (0, WEIGHTS[method][1]),
        "distill.hard_weight does nothing while data.labels are ignored",
    )
    _check(
        data.labels == "used" or (config.centres in ("auto", "new") and recipe.run.init_centres == "by-name"),
        "distill.centres and run.init_centres do nothing while data.labels are ignored: there are no classes",
    )
    _check(
        not data.unlabelled or method in (*WITHOUT_LABELS, *SOFT),
        f"data.unlabelled needs a distill.method that learns from images without labels: {unlabelled_too}",
    )
    _check(
        not data.unlabelled or data.labels == "used",
        "data.unlabelled is no different from data.source while data.labels are ignored; join them: A + B",
    )
    _check(
        uniform or (data.labels == "used" and not data.unlabelled),
        f"data.sampler.kind {data.sampler.kind} draws by labels; images without one need uniform",
    )
    if method == "none":
        return
    _check(
        data.framing.kind == "crop" or config.embeddings == "beside" or not config.needs_teacher_embeddings,
        "distill.embeddings cached are those of photographs' centres, but data.framing.kind photograph trains on "
        "random parts; give --distill.embeddings beside, where the teacher sees the same part",
    )
    combined = head.margin.kind == "combined"
    if method == "margin" and config.margins == "per-image":
        _check(combined, f"distill.method margin takes the place of m2; head.margin.kind {head.margin.kind} has none")
        m2 = head.margin.m2 if head.margin.kind == "combined" else config.margin_max
        _check(
            m2 == config.margin_max,
            f"head.margin.m2 is {m2}, but images' own margins go up to distill.margin_max {config.margin_max}; "
            "give both the same",
        )
    _check(
        method != "margin-kd" or combined,
        f"distill.method margin-kd needs head.margin.kind combined: {head.margin.kind} depends on the student's norms",
    )
    _check(
        not head.queue.size or not (method in ("margin", *SOFT) or config.frozen),
        f"head.queue does not go with distill.method {method} or frozen centres; leave it out",
    )
    _check(
        method not in TRIPLETS or data.sampler.kind == "identities",
        f"distill.method {method} needs several images of each person in a batch; give --data.sampler.kind identities",
    )
    _check(
        method not in (*TRIPLETS, "relational") or recipe.run.micro_batches == 1,
        f"distill.method {method} compares all images of a step; run.micro_batches must be 1",
    )
    teachers = config.centres.startswith("teacher")
    _check(
        not teachers or head.subcentres == 1,
        f"distill.centres {config.centres} needs head.subcentres 1: the teacher has one centre a class",
    )
    _check(
        not teachers or recipe.run.init_centres == "by-name",
        f"run.init_centres does nothing: distill.centres {config.centres} are where they start",
    )
    _check(
        config.has_classes or recipe.run.init_centres == "by-name",
        f"run.init_centres does nothing: distill.method {method} learns no classes while distill.hard_weight is 0",
    )
    _check(
        not config.frozen or head.unsampled == "untouched",
        "head.unsampled does nothing while distill.centres are frozen",
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
