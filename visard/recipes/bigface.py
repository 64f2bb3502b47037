"""Runs of very large networks: BigFace's, and the final one of the SenseTime paper; of each a tiny variant.

In: WebFace42M given as `--data`, 42,474,557 images of 2,059,906 identities (the tiny ones make rendered faces). Out: a
recipe. None of these runs was made here at that scale; `visard plan RECIPE --devices N` says what each needs before it
is started.

On several machines, the same command on each (8 machines x 8 GPUs; HOST is the first one):

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \\
        $(which visard) train bigface_r600 --data WebFace42M/train.rec --data.workers 4

A killed worker restarts all of them at the last checkpoint; `--resume RUN` goes on with any other number of processes.

Sources: BigFace, MFR-ICCV2021 track slides (training details: 256 images a rank, LARS, learning rate 0.01 with linear
scaling, warm-up, weight decay 5e-4, multi-step schedule, 30 epochs, 32 to 64 V100; mask-augmented images at a ratio of
0.35; CosFace); Towards Large-scale Masked Face Recognition, arXiv:2310.16364 (3.3, Tables 9 and 10).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.backbones.named import network
from visard.config import (
    DataConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    MaskConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)

EPOCHS = 30
DEVICES = 64


def bigface_r240() -> Recipe:
    """BigFace's ResNet-240: 137 M parameters, CosFace 0.4, LARS, masks on 35 % of the crops, 30 epochs.

    The slides do not give the milestones of the schedule nor LARS' coefficient: a tenth at 15, 24 and 28 epochs and
    0.001 stand for them. 0.01 is the rate for 256 images, the base of the linear scaling; 64 ranks make 0.64.
    Command and data: see above. Hardware: 64 GPUs x 256 images. Hours: not published.
    Expected, the slides: FNMR 0.0803 masked, 0.0235 clean on WebFace260M's test.
    """
    return _bigface("bigface_r240", "r240")


def bigface_r600() -> Recipe:
    """BigFace's ResNet-600: 306 M parameters; ZeRO 1 and checkpointing by segments. See `bigface_r240`."""
    return _divided(_bigface("bigface_r600", "r600"), zero=1)


def bigface_r1200() -> Recipe:
    """BigFace's ResNet-1.2K: 654 M parameters; ZeRO 3, 4 micro-batches. See `bigface_r240`."""
    return _divided(_bigface("bigface_r1200", "r1200"), zero=3, micro_batches=4)


def mfr_wf42m() -> Recipe:
    """The final setting of the SenseTime paper: SGD 0.9, 0.1 per 256 images, 4,512 images a step on 48 devices.

    CosFace 0.4, dropout 0.4, weight decay 1e-4, a tenth at 5, 9, 12 and 15 of 17 epochs, masks on 15 %; then
    `mfr_wf42m_masks33`. Deviation: the paper's network is its own search's; here ResNet-200 (`--backbone.blocks`).
    Command: as above with --nnodes 6. Hardware: 48 A100 x 94 images.
    Expected, its Table 4 (distributed FC in mixed precision; its own networks): error 0.0764 masked, 0.0146 clean on
    WebFace260M's test.
    """
    return Recipe(
        name="mfr_wf42m",
        data=DataConfig(source="", size=112, workers=4, masks=MaskConfig(probability=0.15, uv_share=1.0)),
        backbone=replace(_network("r200"), dropout=0.4),
        head=HeadConfig(margin=MarginConfig(m2=0.0, m3=0.4, scale=64.0), classes="sharded"),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(
            kind="multistep", milestones=(5.0, 9.0, 12.0, 15.0), epochs=17, warmup_epochs=1, base_batch=256
        ),
        run=RunConfig(out=Path("runs/mfr_wf42m"), batch_global=4512, precision="fp16", evaluate_every=5000),
    )


def mfr_wf42m_masks33() -> Recipe:
    """Three more epochs from `mfr_wf42m` (`--init RUN`) with masks on 33 %.

    The paper does not give the rate: that of the first training's end is taken.
    Expected, Table 10: error masked 0.0764 -> 0.0757, clean 0.0145 -> 0.0148.
    """
    recipe = mfr_wf42m()
    return replace(
        recipe,
        name="mfr_wf42m_masks33",
        data=replace(recipe.data, masks=replace(recipe.data.masks, probability=0.33)),
        optim=replace(recipe.optim, lr=1e-5),
        schedule=ScheduleConfig(kind="constant", epochs=3, warmup_epochs=0, base_batch=256),
        run=replace(recipe.run, out=Path("runs/mfr_wf42m_masks33")),
    )


def bigface_r240_tiny() -> Recipe:
    """`bigface_r240` on rendered faces, in about a minute on one CPU core."""
    return _tiny(bigface_r240(), (1, 1, 2, 1))


def bigface_r600_tiny() -> Recipe:
    """`bigface_r600` on rendered faces, in about a minute on one CPU core."""
    return _tiny(bigface_r600(), (1, 2, 2, 1))


def bigface_r1200_tiny() -> Recipe:
    """`bigface_r1200` on rendered faces, in two minutes on two CPU cores.

    64 images a step: its four micro-batches on two processes then leave batch norm 8 images at a time; with 4 a run of
    this length hardly learns.
    """
    recipe = _tiny(bigface_r1200(), (1, 2, 3, 1))
    schedule = replace(recipe.schedule, epochs=8, milestones=(4.0, 6.4, 7.5))
    return replace(recipe, schedule=schedule, run=replace(recipe.run, batch_global=64))


def mfr_wf42m_tiny() -> Recipe:
    """`mfr_wf42m` on rendered faces, in about a minute on one CPU core."""
    return _tiny(mfr_wf42m(), (1, 1, 1, 1))


def mfr_wf42m_masks33_tiny() -> Recipe:
    """`mfr_wf42m_masks33` on rendered faces: `--init runs/mfr_wf42m_tiny`."""
    return _tiny(mfr_wf42m_masks33(), (1, 1, 1, 1))


def _bigface(name: str, backbone: str) -> Recipe:
    return Recipe(
        name=name,
        data=DataConfig(source="", size=112, workers=4, masks=MaskConfig(probability=0.35)),
        backbone=_network(backbone),
        head=HeadConfig(margin=MarginConfig(m2=0.0, m3=0.4, scale=64.0), classes="sharded"),
        optim=OptimConfig(kind="lars", lr=0.01, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(
            kind="multistep", milestones=(15.0, 24.0, 28.0), epochs=EPOCHS, warmup_epochs=1, base_batch=256
        ),
        run=RunConfig(
            out=Path(f"runs/{name}"),
            batch_global=256 * DEVICES,
            precision="fp16",
            gradient_dtype="fp16",
            checkpointing="segment",
            evaluate_every=2000,
        ),
    )


def _divided(recipe: Recipe, *, zero: int, micro_batches: int = 1) -> Recipe:
    return replace(recipe, run=replace(recipe.run, zero=zero, micro_batches=micro_batches))


def _network(name: str) -> IResNetConfig:
    config = network(name)
    assert isinstance(config, IResNetConfig)
    return config


def _tiny(recipe: Recipe, blocks: tuple[int, int, int, int]) -> Recipe:
    """A few narrow blocks on 56 px rendered faces of 60 people; rates and margins that so small a run bears."""
    schedule = recipe.schedule
    part = 6 / schedule.epochs
    milestones = tuple(m * part for m in schedule.milestones)
    assert isinstance(recipe.backbone, IResNetConfig)
    return replace(
        recipe,
        name=f"{recipe.name}_tiny",
        data=replace(recipe.data, source="rendered:60x16", size=56, workers=0),
        backbone=replace(recipe.backbone, blocks=blocks, width=16, embedding_dim=64, input_size=56, dropout=0.0),
        head=replace(recipe.head, margin=MarginConfig(m2=0.0, m3=0.25, scale=32.0)),
        optim=replace(recipe.optim, lr=0.1, trust=0.02 if recipe.optim.kind == "lars" else recipe.optim.trust),
        schedule=replace(
            schedule, epochs=6, milestones=milestones, warmup_epochs=min(1, schedule.warmup_epochs), base_batch=32
        ),
        run=replace(
            recipe.run,
            out=Path(f"runs/{recipe.name}_tiny"),
            batch_global=32,
            precision="bf16" if recipe.run.precision == "fp16" else recipe.run.precision,
            gradient_dtype="bf16" if recipe.run.gradient_dtype == "fp16" else recipe.run.gradient_dtype,
            val=("rendered:20x8,first=100000",),
            val_pairs=400,
            evaluate_every=0,
        ),
    )
