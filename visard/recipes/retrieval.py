"""Runs for retrieval, where the classes that are searched are not those that were learnt.

In: a data set given as `--data`, and perhaps a start model as `--init`. Out: a recipe; BroadFace's queue is
`head.queue` and can be set or changed on the command line.
"""

from __future__ import annotations

from pathlib import Path

from visard.config import (
    DataConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)
from visard.config_augment import AugmentConfig, RotationConfig, ShiftConfig


def omniglot_small() -> Recipe:
    """A narrow IResNet on 28 px handwritten characters (Omniglot), judged by the nearest of characters never seen.

    Data: images_background, `visard convert images_background#nested TRAIN --size 28`; evaluation on images_evaluation
    converted likewise: `--val TEST::retrieval`. Characters are not mirrored.
    Hardware: 1 CPU core, about 4 minutes; Recall@1 of 13,180 images of 659 unseen characters about 0.84.
    """
    return Recipe(
        name="omniglot_small",
        data=DataConfig(
            source="",
            size=28,
            resize=True,
            flip_probability=0.0,
            augment=AugmentConfig(
                shift=ShiftConfig(probability=0.7, distance=0.08, scale=(0.85, 1.15)),
                rotation=RotationConfig(probability=0.7, degrees=12),
            ),
        ),
        backbone=IResNetConfig(blocks=(1, 2, 2, 1), width=16, embedding_dim=128, input_size=28),
        head=HeadConfig(margin=MarginConfig(m2=0.3, scale=32.0)),
        optim=OptimConfig(lr=0.1, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="cosine", epochs=10, warmup_epochs=0.5),
        run=RunConfig(out=Path("runs/omniglot_small"), batch_global=128, log_every=50),
    )
