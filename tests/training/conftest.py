"""A small data set in memory, a network without batch norm, and recipes that train in a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visard import checkpoint
from visard.config import (
    DataConfig,
    DistillConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    SamplerConfig,
    ScheduleConfig,
)
from visard.embed import embed_to_directory, hash_model
from visard.records import Float32Array, Int64Array, UInt8Array
from visard.runtime import load
from visard.training.loop import train

SIZE = 16


@dataclass(frozen=True)
class PaintedFaces:
    """Identities are random 4 x 4 tiles of colour; images of one differ by noise. Fixed by the seed."""

    identities: tuple[str, ...] = tuple(f"person{i}" for i in range(6))
    images_each: int = 8
    size: int = SIZE
    first: int = 0

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{name}/{i}.png" for name in self.identities for i in range(self.images_each))

    @property
    def labels(self) -> Int64Array:
        return np.repeat(np.arange(len(self.identities)), self.images_each)

    def __len__(self) -> int:
        return len(self.identities) * self.images_each

    def image(self, index: int) -> UInt8Array:
        tiles = np.random.default_rng((1, self.first + index // self.images_each)).integers(0, 256, (4, 4, 3))
        noise = np.random.default_rng((2, self.first, index)).integers(-40, 41, (self.size, self.size, 3))
        whole = np.kron(tiles, np.ones((self.size // 4, self.size // 4, 1)))
        return np.clip(whole + noise, 0, 255).astype(np.uint8)

    def points(self, index: int) -> Float32Array | None:
        return None


@pytest.fixture
def faces() -> PaintedFaces:
    return PaintedFaces()


def tiny_recipe(out: Path, **run: object) -> Recipe:
    """48 images in 6 steps an epoch, 12 steps in all; IResNet of four blocks at 16 px with dropout."""
    # The matmul is fixed: on a busy machine the start-up test may choose differently in two runs that are compared.
    settings: dict[str, object] = {
        "batch_global": 8,
        "log_every": 4,
        "tensorboard": False,
        "device": "cpu",
        "float32_matmul": "highest",
    }
    return Recipe(
        name="tiny",
        data=DataConfig(source="painted", size=SIZE),
        backbone=IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=SIZE, dropout=0.2),
        head=HeadConfig(margin=MarginConfig(m2=0.2, scale=16.0)),
        optim=OptimConfig(lr=0.05),
        schedule=ScheduleConfig(epochs=2, warmup_epochs=0.5),
        run=RunConfig(out=out, **{**settings, **run}),  # type: ignore[arg-type]
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path / "run")


def weights_of(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """All tensors of a run's last or best checkpoint: backbone, head, momentum."""
    chosen = checkpoint.pointed(run, name)
    assert chosen is not None
    return checkpoint.read_tensors(run / "checkpoints" / chosen)


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return replace(recipe, schedule=replace(recipe.schedule, max_steps=steps))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on the painted faces."""
    return train(tiny_recipe(tmp_path_factory.mktemp("teacher") / "run"), PaintedFaces())


@pytest.fixture(scope="module")
def cache(teacher: Path) -> Path:
    return embedded(teacher, PaintedFaces(), teacher.parent / "cache")


def embedded(model: Path, faces: PaintedFaces, out: Path, flip: Any = "concat") -> Path:
    """As `visard embed` writes it, in float16."""
    embed_to_directory(load(model, "cpu"), faces, out, flip, 16, hash_model(model), "float16")
    return out


def student(out: Path, teacher: Path, method: Any = "bigface", **settings: Any) -> Recipe:
    """`tiny_recipe` that learns from a teacher."""
    recipe = tiny_recipe(out)
    sampler = SamplerConfig(kind="identities") if method.startswith("triplet") else SamplerConfig()
    distill = DistillConfig(**{"method": method, "teacher": str(teacher), **settings})
    return replace(
        recipe,
        distill=distill,
        head=HeadConfig(margin=MarginConfig(m2=0.5, scale=16.0)),
        data=replace(recipe.data, sampler=sampler),
    )


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()
