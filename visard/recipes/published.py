"""Runs of the field with the settings of their source, and of each a tiny variant that a CPU runs in about a minute.

In: the data set that the source trained on, given as `--data` (the tiny ones make rendered faces). Out: a recipe.
Hours are arithmetic on published speeds, scores are the sources' own; none of these runs was made here.

What is not as in the source, in all of them: the gradient's norm is clipped over backbone and head together
(arcface_torch: the backbone alone, AdaFace: not at all), a step's images are cut from one permutation of the data for
all processes, and biases, PReLU slopes and batch norm decay or not as `optim.decay_norm_and_bias` says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.config import (
    AdaFaceConfig,
    DataConfig,
    HeadConfig,
    IRConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)
from visard.config_augment import preset


def ms1mv3_r50() -> Recipe:
    """ArcFace with IResNet-50 on MS1MV3, as arcface_torch's configs/ms1mv3_r50.py.

    Paper: ArcFace (arXiv:1801.07698). Data: MS1MV3 (ms1m-retinaface-t1), 5,179,510 images of 93,431 identities.
    Command: torchrun --nproc-per-node 8 $(which visard) train ms1mv3_r50 --data ms1m-retinaface-t1/train.rec
        --val lfw.bin cfp_fp.bin agedb_30.bin
    Hardware: 8 GPUs x 128 images (8 x V100-32G in the source). Hours: about 6 at the 4,800 images a second that its
    README gives for 125,000 classes.
    Expected, its README: IJB-C TAR 96.37 % at FAR 1e-4, 94.47 % at 1e-5; MFR-ALL 79.14 %. The gradient is the source's
    straight-through estimator; `--head.margin.gradient exact` is the paper's own.
    """
    return Recipe(
        name="ms1mv3_r50",
        data=DataConfig(source="", size=112, workers=2),
        backbone=IResNetConfig(blocks=(3, 4, 14, 3), dropout=0.0),
        head=HeadConfig(
            margin=MarginConfig(m1=1.0, m2=0.5, m3=0.0, scale=64.0, gradient="straight-through"), classes="sharded"
        ),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=True, clip_norm=5.0),
        schedule=ScheduleConfig(kind="polynomial", power=2.0, epochs=20, warmup_epochs=0),
        run=RunConfig(out=Path("runs/ms1mv3_r50"), batch_global=1024, precision="fp16", evaluate_every=2000),
    )


def ms1mv3_r50_tiny() -> Recipe:
    """`ms1mv3_r50` on rendered faces, in about a minute on one CPU core."""
    return tiny(ms1mv3_r50(), "ms1mv3_r50_tiny")


def glint360k_r100() -> Recipe:
    """CosFace with IResNet-100 on Glint360K, as arcface_torch's configs/glint360k_r100.py.

    Paper: CosFace (arXiv:1801.09414), Partial FC (arXiv:2010.05222) for the data. Data: Glint360K, 17,091,657 images of
    360,232 identities.
    Command: torchrun --nproc-per-node 8 $(which visard) train glint360k_r100 --data glint360k/train.rec
        --val lfw.bin cfp_fp.bin agedb_30.bin
    Hardware: 8 GPUs x 128 images. Hours: about 27 at the 3,480 images a second published for R100 on 8 x A100-80G (with
    2 million classes). Every process holds an eighth of the class centres: 0.28 GB with gradient and momentum.
    Expected, the README of arcface_torch: IJB-C TAR 97.55 % at FAR 1e-4, 96.38 % at 1e-5; MFR-ALL 89.52 %.
    """
    return Recipe(
        name="glint360k_r100",
        data=DataConfig(source="", size=112, workers=2),
        backbone=IResNetConfig(blocks=(3, 13, 30, 3), dropout=0.0),
        head=HeadConfig(margin=MarginConfig(m1=1.0, m2=0.0, m3=0.4, scale=64.0), classes="sharded"),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4, decay_norm_and_bias=True, clip_norm=5.0),
        schedule=ScheduleConfig(kind="polynomial", power=2.0, epochs=20, warmup_epochs=0),
        run=RunConfig(out=Path("runs/glint360k_r100"), batch_global=1024, precision="fp16", evaluate_every=2000),
    )


def glint360k_r100_tiny() -> Recipe:
    """`glint360k_r100` on rendered faces, in about a minute on one CPU core."""
    return tiny(glint360k_r100(), "glint360k_r100_tiny")


def wf42m_pfc02_r100() -> Recipe:
    """CosFace with IResNet-100 and Partial FC on WebFace42M, as arcface_torch's configs/wf42m_pfc02_r100.py.

    Each step trains on a sample of 20 % of the 2,059,906 class centres. A process holds an eighth of them: 0.53 GB,
    as much momentum, and 0.11 GB for the gradient of its sample; no logits. As in the source (Partial FC's second
    version), momentum and weight decay move the other centres too; `--head.unsampled untouched` leaves them alone, as
    the first version does, and is faster.
    Paper: CosFace (arXiv:1801.09414), WebFace260M (arXiv:2103.04098), Partial FC (arXiv:2203.15565). Data: WebFace42M,
    42,474,557 images of 2,059,906 identities.
    Command: torchrun --nproc-per-node 8 $(which visard) train wf42m_pfc02_r100 --data WebFace42M/train.rec
        --val lfw.bin cfp_fp.bin agedb_30.bin
    Hardware: 8 GPUs x 128 images. Hours: about 68 at the 3,480 images a second published for R100 and 2 million classes
    with Partial FC on 8 x A100-80G.
    Expected, the README of arcface_torch: IJB-C TAR 97.70 % at FAR 1e-4, 96.31 % at 1e-5; MFR-ALL
    96.27 %. It shows no loss against all centres on WebFace12M (97.60 and 97.59 % at FAR 1e-4).
    """
    return Recipe(
        name="wf42m_pfc02_r100",
        data=DataConfig(source="", size=112, workers=2),
        backbone=IResNetConfig(blocks=(3, 13, 30, 3), dropout=0.0),
        head=HeadConfig(
            margin=MarginConfig(m1=1.0, m2=0.0, m3=0.4, scale=64.0),
            classes="sharded",
            sample_rate=0.2,
            unsampled="decayed",
        ),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=True, clip_norm=5.0),
        schedule=ScheduleConfig(kind="polynomial", power=2.0, epochs=20, warmup_epochs=0),
        run=RunConfig(out=Path("runs/wf42m_pfc02_r100"), batch_global=1024, precision="fp16", evaluate_every=10000),
    )


def wf42m_pfc02_r100_tiny() -> Recipe:
    """`wf42m_pfc02_r100` on rendered faces, in about a minute on one CPU core."""
    return tiny(wf42m_pfc02_r100(), "wf42m_pfc02_r100_tiny")


def adaface_ms1mv2_r50() -> Recipe:
    """AdaFace with its IR-50 on MS1MV2, as its scripts/run_ir50_ms1mv2.sh.

    Paper: AdaFace (arXiv:2204.00964). Data: MS1MV2 (faces_emore), 5.8 million images of 85,742 identities.
    Command: torchrun --nproc-per-node 4 $(which visard) train adaface_ms1mv2_r50 --data faces_emore/train.rec
        --val lfw.bin cfp_fp.bin agedb_30.bin calfw.bin cplfw.bin
    Hardware: 4 GPUs, 256 images a step in all. Hours: not published.
    Expected, the README of AdaFace: LFW 99.82 %, CFP-FP 97.86 %, CPLFW 92.83 %, CALFW 96.07 %, AgeDB-30 97.85 %; IJB-B
    and IJB-C TAR at FAR 1e-4 94.82 % and 96.27 %.
    The augmentation (crop, low resolution and light, each 0.2) is `--augment adaface`.
    Not as in the source: it reads BGR, here the network learns on RGB; biases and PReLU slopes do not decay; the class
    centres start at a length of 0.23, not 1: the loss is the same, but they turn faster at first.
    """
    return Recipe(
        name="adaface_ms1mv2_r50",
        data=DataConfig(source="", size=112, workers=4, augment=preset("adaface")),
        backbone=IRConfig(blocks=(3, 4, 14, 3), dropout=0.4),
        head=HeadConfig(margin=AdaFaceConfig(m=0.4, h=0.333, t_alpha=0.01, scale=64.0)),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, clip_norm=0.0),
        schedule=ScheduleConfig(kind="multistep", epochs=26, milestones=(12, 20, 24), gamma=0.1, warmup_epochs=0),
        run=RunConfig(out=Path("runs/adaface_ms1mv2_r50"), batch_global=256, precision="fp16"),
    )


def adaface_ms1mv2_r50_tiny() -> Recipe:
    """`adaface_ms1mv2_r50` on rendered faces, in about a minute on one CPU core.

    The learning rate in proportion to the batch: without warm-up and clipping 0.1 throws so few images a step far off.
    """
    whole = adaface_ms1mv2_r50()
    recipe = tiny(whole, "adaface_ms1mv2_r50_tiny")
    milestones = tuple(m * recipe.schedule.epochs / 26 for m in (12, 20, 24))
    lr = whole.optim.lr * recipe.run.batch_global / whole.run.batch_global
    return replace(
        recipe,
        optim=replace(recipe.optim, lr=lr),
        schedule=replace(recipe.schedule, milestones=milestones),
    )


def tiny(recipe: Recipe, name: str) -> Recipe:
    """The recipe's head, optimizer and schedule with four narrow blocks on 56 px rendered faces of 60 people.

    Without augmentation and dropout, which hold back so short a run.
    """
    backbone = replace(
        recipe.backbone,
        blocks=(1, 1, 1, 1),  # type: ignore[call-arg]
        width=16,
        embedding_dim=64,
        input_size=56,
        dropout=0.0,
    )
    return replace(
        recipe,
        name=name,
        data=DataConfig(source="rendered:60x16", size=56),
        backbone=backbone,
        schedule=replace(recipe.schedule, epochs=6),
        run=RunConfig(out=Path("runs") / name, batch_global=32, val=("rendered:20x8,first=100000",), val_pairs=400),
    )
