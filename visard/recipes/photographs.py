"""Runs on one's own photographs, after `visard prepare`: from scratch with few images, and from a pretrained network.

In: a prepared data set given as `--data`. Out: a recipe; every number of it can be overridden on the command line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.config import (
    DataConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    MobileFaceNetConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)


def scratch_small() -> Recipe:
    """A narrow IResNet from random weights, for 10^3 to 10^5 photographs on a CPU or one small GPU.

    Few images a person: CosFace with a moderate scale is easier to start than ArcFace at 64. 56 px crops and 32
    channels train at some 150 images a second on one CPU core with bf16 units; the widths 24 and 32 cost the same.
    Data: any prepared data set. Hardware: 1 CPU core or more; minutes to hours.
    """
    return Recipe(
        name="scratch_small",
        data=DataConfig(source="", size=56, resize=True),
        backbone=IResNetConfig(blocks=(1, 2, 2, 1), width=32, embedding_dim=128, input_size=56, dropout=0.2),
        head=HeadConfig(margin=MarginConfig(m2=0.0, m3=0.25, scale=32.0)),
        optim=OptimConfig(lr=0.1, weight_decay=1e-3),
        schedule=ScheduleConfig(kind="cosine", epochs=30, warmup_epochs=2),
        run=RunConfig(out=Path("runs/scratch_small"), batch_global=64, precision="bf16"),
    )


def scratch_tiny() -> Recipe:
    """`scratch_small` that a CPU runs in about a minute on a few hundred photographs."""
    recipe = scratch_small()
    return replace(
        recipe,
        name="scratch_tiny",
        backbone=IResNetConfig(blocks=(1, 1, 1, 1), width=16, embedding_dim=64, input_size=56),
        schedule=ScheduleConfig(kind="cosine", epochs=6, warmup_epochs=1),
        run=RunConfig(out=Path("runs/scratch_tiny"), batch_global=32),
    )


def finetune_mobilefacenet() -> Recipe:
    """A pretrained MobileFaceNet goes on learning on one's own identities: `--init MODEL --data DATA`.

    The backbone's shape is taken from the model that `--init` names. A tenth of the usual rate, since the weights are
    good already and the new centres are not.
    Data: any prepared 112 px data set. Hardware: 1 CPU core (about 15 images a second) or a GPU.
    """
    return Recipe(
        name="finetune_mobilefacenet",
        data=DataConfig(source="", size=112),
        backbone=MobileFaceNetConfig(),
        head=HeadConfig(margin=MarginConfig(m2=0.3, scale=32.0)),
        optim=OptimConfig(lr=0.01),
        schedule=ScheduleConfig(kind="cosine", epochs=4, warmup_epochs=0.5),
        run=RunConfig(out=Path("runs/finetune_mobilefacenet"), batch_global=64),
    )
