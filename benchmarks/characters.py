"""Recipes for the networks of BroadFace's Table 6b, narrow and on 32 px characters: MobileFaceNet and two ResNets.

    visard train benchmarks/characters.py:mobilefacenet_128 --data TRAIN --val TEST::retrieval [--head.queue.size Q]

TRAIN and TEST are Omniglot's two halves, converted as `omniglot_small` says but with `--size 32`.
"""

from __future__ import annotations

from dataclasses import replace

from visard.config import IResNetConfig, MobileFaceNetConfig, Recipe
from visard.recipes.retrieval import omniglot_small

SIZE, WIDTH, EPOCHS = 32, 16, 2


def mobilefacenet_128() -> Recipe:
    """MobileFaceNet with the paper's blocks a stage, a quarter as wide, 128 dimensions."""
    return _with(MobileFaceNetConfig(blocks=(2, 8, 16, 4), width=WIDTH, embedding_dim=128, input_size=SIZE))


def resnet18_128() -> Recipe:
    """IResNet-18, a quarter as wide, 128 dimensions."""
    return _with(IResNetConfig(blocks=(2, 2, 2, 2), width=WIDTH, embedding_dim=128, input_size=SIZE))


def resnet34_512() -> Recipe:
    """IResNet-34, a quarter as wide, 512 dimensions."""
    return _with(IResNetConfig(blocks=(3, 4, 6, 3), width=WIDTH, embedding_dim=512, input_size=SIZE))


def _with(backbone: IResNetConfig | MobileFaceNetConfig) -> Recipe:
    recipe = omniglot_small()
    return replace(
        recipe,
        name="characters",
        data=replace(recipe.data, size=SIZE),
        backbone=backbone,
        head=replace(recipe.head, classes="sharded"),
        schedule=replace(recipe.schedule, epochs=EPOCHS),
    )
