"""Students that learn from a teacher, with the settings of their papers, and of each a tiny variant.

In: the papers' data as `--data` and a trained teacher as `--distill.teacher RUN` (the tiny ones render faces; their
teacher is a run of rendered_tiny). Out: a recipe. None of the full ones was run here; scores are the papers' own.

MarginDistillation (arXiv:2003.02586), Sec. IV-A: IResNet-100 teaches MobileFaceNet (ReLU, 512-D, 1.19 M parameters) on
MS1MV2, 5.8 million images of 85,742 identities; SGD, 512 images a step, rate 0.1 divided by 10 after 100,000, 160,000
and 220,000 steps, ArcFace with scale 64. The compared methods share these but where theirs say otherwise. The end, not
in the paper, is 240,000 steps (21 epochs). LFW and AgeDB-30 are Table II, MegaFace Table III; the teacher has 99.76,
98.21 and 98.35 %, the student alone 99.51, 96.13 and 90.62 %.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.config import (
    DataConfig,
    DistillConfig,
    HeadConfig,
    MarginConfig,
    MobileFaceNetConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    SamplerConfig,
    ScheduleConfig,
)


def margindistillation_r100_mobilefacenet() -> Recipe:
    """MarginDistillation: MobileFaceNet on the frozen class centres of an IResNet-100, each image with its own margin.

    Paper: arXiv:2003.02586, Eq. 3 and 4, margins from 0.2 to 0.5. Data: MS1MV2 (faces_emore).
    Command: visard train margindistillation_r100_mobilefacenet --data faces_emore/train.rec --distill.teacher RUN
        --val lfw.bin cfp_fp.bin agedb_30.bin
    Hardware: one GPU. Hours: not published. Expected: LFW 99.61 %, AgeDB-30 96.55 %, MegaFace 91.70 %.
    """
    return _mobilefacenet("margindistillation_r100_mobilefacenet", DistillConfig(method="margin"))


def margindistillation_r100_mobilefacenet_tiny() -> Recipe:
    """`margindistillation_r100_mobilefacenet` on rendered faces, in seconds: `--distill.teacher runs/rendered_tiny`."""
    return _tiny(margindistillation_r100_mobilefacenet())


def angular_r100_mobilefacenet() -> Recipe:
    """Angular distillation (ShrinkTeaNet): ArcFace + 1 - cos of both embeddings.

    Paper: arXiv:1905.10620 as in arXiv:2003.02586; weight 1, as in the latter's code. Data, command, hardware: as
    margindistillation_r100_mobilefacenet. Expected: LFW 99.55 %, AgeDB-30 96.01 %, MegaFace 90.73 %.
    """
    return _mobilefacenet("angular_r100_mobilefacenet", DistillConfig(method="angular"))


def angular_r100_mobilefacenet_tiny() -> Recipe:
    """`angular_r100_mobilefacenet` on rendered faces, in seconds: `--distill.teacher runs/rendered_tiny`."""
    return _tiny(angular_r100_mobilefacenet())


def margin_kd_r100_mobilefacenet() -> Recipe:
    """Margin-based knowledge distillation: soft targets at T = 4, both logits with ArcFace's margin.

    Paper: Nekhaev et al., ICMV 2019, as in arXiv:2003.02586, whose code weighs 0.95 soft and 0.05 hard; that code never
    uses the teacher, this does. Data, command, hardware: as margindistillation_r100_mobilefacenet.
    Expected: LFW 99.41 %, AgeDB-30 96.01 %, MegaFace 90.77 %.
    """
    return _mobilefacenet("margin_kd_r100_mobilefacenet", DistillConfig(method="margin-kd"))


def margin_kd_r100_mobilefacenet_tiny() -> Recipe:
    """`margin_kd_r100_mobilefacenet` on rendered faces, in seconds: `--distill.teacher runs/rendered_tiny`."""
    return _tiny(margin_kd_r100_mobilefacenet())


def triplet_l2_r100_mobilefacenet() -> Recipe:
    """Triplet distillation, squared distances: an ArcFace student is fine-tuned on triplets with the teacher's margins.

    Paper: arXiv:1905.04457 as in arXiv:2003.02586, whose code has 10 people x 18 images a step at a rate of 0.001.
    Data, hardware: as margindistillation_r100_mobilefacenet. Command: that one with --init STUDENT, an ArcFace run.
    Expected: LFW 99.56 %, AgeDB-30 96.23 %, MegaFace 89.10 %.
    """
    return _triplets("triplet_l2_r100_mobilefacenet", DistillConfig(method="triplet-l2"))


def triplet_l2_r100_mobilefacenet_tiny() -> Recipe:
    """`triplet_l2_r100_mobilefacenet` on rendered faces, in seconds: `--distill.teacher runs/rendered_tiny`."""
    return _tiny(triplet_l2_r100_mobilefacenet())


def triplet_cos_r100_mobilefacenet() -> Recipe:
    """Triplet distillation, angles: an ArcFace student is fine-tuned on triplets with the teacher's margins.

    As triplet_l2_r100_mobilefacenet. Expected: LFW 99.55 %, AgeDB-30 95.60 %, MegaFace 86.52 %.
    """
    return _triplets("triplet_cos_r100_mobilefacenet", DistillConfig(method="triplet-cos"))


def triplet_cos_r100_mobilefacenet_tiny() -> Recipe:
    """`triplet_cos_r100_mobilefacenet` on rendered faces, in seconds: `--distill.teacher runs/rendered_tiny`."""
    return _tiny(triplet_cos_r100_mobilefacenet())


def bigface_distill_r600_r240() -> Recipe:
    """BigFace-Distill: IResNet-240 on masked crops learns the clean crops' embeddings of an IResNet-600.

    Source: BigFace (ICCV 2021 masked face challenge), CosFace 0.4 at scale 64 + 9 * the squared distance of unit
    embeddings. Everything else is `bigface_r240`'s, as the slides say of all their runs: LARS, 30 epochs, masks on 35 %
    of the crops; teacher: a run of bigface_r600. Data: WebFace42M, 42,474,557 images of 2,059,906 identities; the
    teacher's cache of both views is 87 GB. For images without labels besides: --data.unlabelled MORE.
    Command: as in bigface.py, with --distill.teacher RUN_OF_R600 --distill.cache R600_ON_WEBFACE42M
    Hardware: 64 GPUs x 256 images (the slides: 32 to 64 V100). Hours: not published. Expected, the slides: FNMR 0.0769
    masked, 0.0241 clean on WebFace260M's test, without the teacher 0.0803, 0.0235.
    """
    from visard.recipes.bigface import bigface_r240  # imports torch, which the other recipes here do without

    return _taught(bigface_r240(), "bigface_distill_r600_r240")


def bigface_distill_r600_r240_tiny() -> Recipe:
    """`bigface_distill_r600_r240` on rendered faces, in about a minute: `--distill.teacher runs/rendered_tiny`."""
    from visard.recipes.bigface import bigface_r240_tiny

    return _taught(bigface_r240_tiny(), "bigface_distill_r600_r240_tiny")


def _taught(recipe: Recipe, name: str) -> Recipe:
    """A run of `bigface.py` with a teacher besides."""
    distill = DistillConfig(method="bigface")
    return replace(recipe, name=name, distill=distill, run=replace(recipe.run, out=Path("runs") / name))


def _mobilefacenet(name: str, distill: DistillConfig) -> Recipe:
    """The student and the training of MarginDistillation's comparison."""
    return Recipe(
        name=name,
        data=DataConfig(source="", size=112, workers=4),
        backbone=MobileFaceNetConfig(blocks=(1, 4, 6, 2), activation="relu", embedding_dim=512),
        head=HeadConfig(margin=MarginConfig(m1=1.0, m2=0.5, m3=0.0, scale=64.0)),
        distill=distill,
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=True, clip_norm=0.0),
        schedule=ScheduleConfig(
            kind="multistep", milestone_steps=(100_000, 160_000, 220_000), max_steps=240_000, warmup_epochs=0
        ),
        run=RunConfig(out=Path("runs") / name, batch_global=512, evaluate_every=4000),
    )


def _triplets(name: str, distill: DistillConfig) -> Recipe:
    """`_mobilefacenet` on batches of 10 people with 18 images each."""
    recipe = _mobilefacenet(name, DistillConfig())
    return replace(
        recipe,
        distill=distill,
        data=replace(recipe.data, sampler=SamplerConfig(kind="identities", images_per_identity=18)),
        optim=replace(recipe.optim, lr=0.001),
        run=replace(recipe.run, batch_global=180),
    )


def _tiny(recipe: Recipe) -> Recipe:
    """The recipe's loss and optimizer with a narrow student on 56 px rendered faces of 60 people, for two epochs.

    With a smaller margin and scale and a warm-up: such a student would not leave the paper's plateau in so short a run.
    """
    name = f"{recipe.name}_tiny"
    margin = MarginConfig(m2=0.3, scale=16.0)
    distill = recipe.distill
    if distill.method == "margin":
        distill = replace(distill, margin_min=0.1, margin_max=margin.m2)
    return replace(
        recipe,
        name=name,
        data=DataConfig(source="rendered:60x16", size=56, sampler=SamplerConfig(kind=recipe.data.sampler.kind)),
        backbone=MobileFaceNetConfig(blocks=(0, 1, 1, 0), activation="relu", width=16, embedding_dim=64, input_size=56),
        head=HeadConfig(margin=margin),
        distill=distill,
        schedule=ScheduleConfig(kind="cosine", epochs=2, warmup_epochs=0.5),
        run=RunConfig(out=Path("runs") / name, batch_global=32),
    )
