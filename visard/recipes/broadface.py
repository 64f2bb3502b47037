"""BroadFace for faces, with the settings of the paper, and a tiny variant that a CPU runs in about a minute.

In: the data set that the paper trained on, given as `--data`, and a pretrained network, given as `--init` (the tiny one
renders faces and begins from nothing). Out: a recipe. Those for retrieval are in `retrieval.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.config import (
    DataConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    QueueConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)
from visard.recipes.published import tiny


def broadface_ms1m_r100() -> Recipe:
    """BroadFace with ArcFace and ResNet-100 on MS1M, as its Sec. 4.1: a pretrained network learns on with a queue.

    Paper: BroadFace (arXiv:2008.06674). Data: MS1MV2 (faces_emore), the refined MS-Celeb-1M of 3.8 million images and
    85,000 identities in the paper's count.
    Command: torchrun --nproc-per-node 4 $(which visard) train broadface_ms1m_r100 --data faces_emore/train.rec
        --init arcface_r100 --val lfw.bin cfp_fp.bin agedb_30.bin
    `--init` names the network that the paper pretrains with ArcFace; from a run on the same data its class centres are
    taken too. It evaluates without mirrored images: `visard evaluate` does so unless told `--flip`.
    Hardware: 4 V100, 128 images each; the queue holds 64 steps, 8,192 entries a device in the paper, 32,768 in all here
    (every process keeps all of them: 134 MB). Hours: not published; 80,000 steps.
    Expected, its Tables 1, 2 and 4: LFW 99.85 %, CALFW 96.20 %, CPLFW 93.17 %, CFP-FP 98.63 %, AgeDB-30 98.38 %; TAR at
    FAR 1e-6, 1e-5, 1e-4 on IJB-B 46.53, 90.81, 94.61 %, on IJB-C 90.41, 94.11, 96.03 %. CosFace, its dagger:
    `--head.margin.m2 0 --head.margin.m3 0.35`.
    The paper gives neither scale and margin (ArcFace's 64 and 0.5 are meant here) nor the network's exact blocks
    (IResNet-100's), nor clipping (none), nor the number format.
    """
    return Recipe(
        name="broadface_ms1m_r100",
        data=DataConfig(source="", size=112, workers=2),
        backbone=IResNetConfig(blocks=(3, 13, 30, 3), dropout=0.0),
        head=HeadConfig(
            margin=MarginConfig(m1=1.0, m2=0.5, m3=0.0, scale=64.0),
            classes="sharded",
            queue=QueueConfig(size=32_768, compensation=True),
        ),
        optim=OptimConfig(lr=5e-3, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=True, clip_norm=0.0),
        schedule=ScheduleConfig(
            kind="multistep", max_steps=80_000, milestone_steps=(50_000, 70_000), gamma=0.1, warmup_epochs=0
        ),
        run=RunConfig(
            out=Path("runs/broadface_ms1m_r100"), batch_global=4 * 128, precision="fp16", evaluate_every=2000
        ),
    )


def broadface_ms1m_r100_tiny() -> Recipe:
    """`broadface_ms1m_r100` on rendered faces, in about a minute on one CPU core, from random weights.

    A queue of 12 steps and a larger rate, after a warm-up: there is no pretrained network to start from.
    """
    recipe = tiny(broadface_ms1m_r100(), "broadface_ms1m_r100_tiny")
    schedule = ScheduleConfig(kind="multistep", max_steps=180, milestone_steps=(112, 157), gamma=0.1, warmup_epochs=1)
    return replace(
        recipe,
        head=replace(recipe.head, queue=QueueConfig(size=384)),
        optim=replace(recipe.optim, lr=0.05, clip_norm=5.0),
        schedule=schedule,
    )
