"""Runs for retrieval, where the classes that are searched are not those that were learnt.

In: a data set given as `--data`, and perhaps a start model as `--init`. Out: a recipe; BroadFace's queue is
`head.queue` and can be set or changed on the command line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visard.config import (
    DataConfig,
    FramingConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    QueueConfig,
    Recipe,
    ResNetConfig,
    RunConfig,
    ScheduleConfig,
)
from visard.config_augment import AugmentConfig, RotationConfig, ShiftConfig


def broadface_inshop_r50() -> Recipe:
    """BroadFace on In-Shop Clothes Retrieval with ImageNet's ResNet-50, as the paper's 4.3.

    Paper: BroadFace (arXiv:2008.06674), ArcFace and a queue of 32k. It names no optimizer; Adam at 1e-4, its decay,
    batch, schedule, margin, scale and the parts that training sees (16 to 100 % of a photograph) are those of the
    official code (kakaoenterprise/BroadFace, run_inshop.py), with a queue of 32,768 for its 32,000.
    Not as there: photographs keep their shape (there they are squeezed to 256 x 256 first) and are scaled by area
    (there by Lanczos); the queue takes embeddings after the update, as the paper says (there before it); class centres
    start normal with deviation 0.01 (there by Xavier).
    Data: In-Shop's images, 25,882 for training, and list_eval_partition.txt beside them.
    Command: visard train broadface_inshop_r50 --data list_eval_partition.txt#train --init resnet50.pth
        --val list_eval_partition.txt#test::retrieval     (resnet50.pth: a state dict of torchvision's)
    512 dimensions; `--backbone.embedding-dim 128` for the paper's other size.
    Hardware: 1 GPU. Hours: not measured. Expected, the paper's Table 5: Recall@1 90.1 % (128 dimensions: 89.8 %),
    ArcFace alone (`--head.queue.size 0`) 87.3 % (84.1 %). This run was not made here.
    """
    return Recipe(
        name="broadface_inshop_r50",
        data=DataConfig(
            source="",
            size=224,
            workers=8,
            framing=FramingConfig(kind="photograph", area=(0.16, 1.0), aspect=(0.75, 1.33)),
        ),
        backbone=ResNetConfig(block="bottleneck", blocks=(3, 4, 6, 3), embedding_dim=512, input_size=224),
        head=HeadConfig(
            margin=MarginConfig(m1=1.0, m2=0.5, m3=0.0, scale=64.0),
            classes="sharded",
            queue=QueueConfig(size=32768, compensation=True),
        ),
        optim=OptimConfig(kind="adam", lr=1e-4, weight_decay=1e-5, decay_norm_and_bias=True, clip_norm=0.0),
        schedule=ScheduleConfig(kind="multistep", milestones=(40, 60, 80), gamma=0.2, epochs=100, warmup_epochs=0),
        run=RunConfig(out=Path("runs/broadface_inshop_r50"), batch_global=128),
    )


def broadface_inshop_r50_tiny() -> Recipe:
    """`broadface_inshop_r50` on parts of drawn characters, in seconds on one CPU core."""
    return _tiny(broadface_inshop_r50(), "broadface_inshop_r50_tiny")


def broadface_sop_r50() -> Recipe:
    """BroadFace on Stanford Online Products with ImageNet's ResNet-50, as the paper's 4.3.

    All settings and what differs from the official code (run_stanford.py): as `broadface_inshop_r50`.
    Data: Stanford Online Products, 59,551 images for training; its lists lie in its own folder.
    Command: visard train broadface_sop_r50 --data Stanford_Online_Products/Ebay_train.txt --init resnet50.pth
        --val Stanford_Online_Products/Ebay_test.txt::retrieval
    512 dimensions; `--backbone.embedding-dim 128` for the paper's other size.
    Hardware: 1 GPU. Hours: not measured. Expected, the paper's Table 5: Recall@1 80.2 % (128 dimensions: 79.7 %),
    ArcFace alone (`--head.queue.size 0`) 76.9 % (73.3 %). This run was not made here.
    """
    recipe = broadface_inshop_r50()
    name = "broadface_sop_r50"
    return replace(recipe, name=name, run=replace(recipe.run, out=Path("runs") / name))


def broadface_sop_r50_tiny() -> Recipe:
    """`broadface_sop_r50` on parts of drawn characters, in seconds on one CPU core."""
    return _tiny(broadface_sop_r50(), "broadface_sop_r50_tiny")


def omniglot_small() -> Recipe:
    """A narrow IResNet on 28 px handwritten characters (Omniglot), judged by the nearest of characters never seen.

    Data: images_background, `visard convert images_background#nested TRAIN --size 28`; evaluation on images_evaluation
    converted likewise: `--val TEST::retrieval`. Characters are not mirrored.
    Hardware: 1 CPU core, 5 to 10 minutes; Recall@1 of 13,180 images of 659 unseen characters 0.858 (seed 0).
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


def omniglot_tiny() -> Recipe:
    """`omniglot_small` on drawn characters (`strokes:`), in seconds on one CPU core."""
    recipe = omniglot_small()
    return replace(
        recipe,
        name="omniglot_tiny",
        data=replace(recipe.data, source="strokes:60x12"),
        backbone=IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=32, input_size=28),
        head=HeadConfig(margin=MarginConfig(m2=0.2, scale=16.0)),
        schedule=ScheduleConfig(kind="cosine", epochs=4, warmup_epochs=0.5),
        run=RunConfig(out=Path("runs/omniglot_tiny"), batch_global=32, val=("strokes:40x10,first=100000::retrieval",)),
    )


def _tiny(recipe: Recipe, name: str) -> Recipe:
    """On 60 drawn characters with a narrow ResNet, 8 epochs, the rate falling after 3, 5 and 7; not mirrored."""
    framing = FramingConfig(kind="photograph", area=(0.6, 1.0), aspect=(0.8, 1.25))
    return replace(
        recipe,
        name=name,
        data=replace(recipe.data, source="strokes:60x12", size=32, workers=0, flip_probability=0.0, framing=framing),
        backbone=ResNetConfig(block="basic", blocks=(1, 1, 1, 1), width=16, embedding_dim=32, input_size=32),
        head=replace(recipe.head, margin=MarginConfig(m2=0.2, scale=16.0), queue=QueueConfig(size=256)),
        optim=replace(recipe.optim, lr=2e-3),
        schedule=replace(recipe.schedule, milestones=(3, 5, 7), epochs=8),
        run=replace(
            recipe.run, out=Path("runs") / name, batch_global=32, val=("strokes:40x10,first=100000::retrieval",)
        ),
    )
