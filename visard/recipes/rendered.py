"""Runs on rendered faces: no data to fetch, so that every part of the house can be seen working.

In: nothing, or rendered faces on disk given as `--data`. Out: a recipe.
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
    Recipe,
    RunConfig,
    ScheduleConfig,
)


def rendered_small() -> Recipe:
    """A narrow IResNet on 56 px rendered faces of 400 people.

    Data: made while training; `visard render` puts them on disk, which is faster from the second epoch on.
    Command: visard train rendered_small. Hardware: 1 CPU core.
    """
    return Recipe(
        name="rendered_small",
        data=DataConfig(source="rendered:400x20", size=56),
        backbone=IResNetConfig(blocks=(1, 2, 2, 1), width=24, embedding_dim=128, input_size=56),
        head=HeadConfig(margin=MarginConfig(m2=0.0, m3=0.25, scale=32.0)),
        optim=OptimConfig(lr=0.1),
        schedule=ScheduleConfig(kind="cosine", epochs=12, warmup_epochs=1),
        run=RunConfig(
            out=Path("runs/rendered_small"), batch_global=64, val=("rendered:100x10,first=100000",), val_pairs=1500
        ),
    )


def rendered_tiny() -> Recipe:
    """`rendered_small` that one CPU core runs in about a minute; its losses are a golden file of the tests."""
    recipe = rendered_small()
    return replace(
        recipe,
        name="rendered_tiny",
        data=replace(recipe.data, source="rendered:60x16"),
        backbone=IResNetConfig(blocks=(1, 1, 1, 1), width=16, embedding_dim=64, input_size=56),
        schedule=ScheduleConfig(kind="cosine", epochs=5, warmup_epochs=1),
        run=RunConfig(
            out=Path("runs/rendered_tiny"), batch_global=32, val=("rendered:20x8,first=100000",), val_pairs=400
        ),
    )


def quickstart() -> Recipe:
    """`rendered_small` half as wide for `make quickstart`: minutes on two CPU cores, data from `visard render`."""
    recipe = rendered_small()
    return replace(
        recipe,
        name="quickstart",
        backbone=IResNetConfig(blocks=(1, 2, 2, 1), width=16, embedding_dim=128, input_size=56),
        schedule=ScheduleConfig(kind="cosine", epochs=6, warmup_epochs=1),
        run=replace(recipe.run, out=Path("runs/quickstart"), val=()),
    )
