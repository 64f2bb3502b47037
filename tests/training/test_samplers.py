"""Training with identities evened out, and with P x K batches: it learns, and two halves equal the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of
from tests.training.test_resume import losses, stop_at
from visard.config import Recipe, SamplerConfig
from visard.errors import Interrupted
from visard.records import Float32Array, Int64Array, UInt8Array
from visard.training.loop import train

COUNTS = (8, 8, 7, 5, 3, 1)
SAMPLERS = [SamplerConfig(kind="balanced"), SamplerConfig(kind="identities", images_per_identity=2)]


class UnevenFaces:
    """Of six painted people 8 images down to one: 32 in all, 4 steps an epoch."""

    def __init__(self) -> None:
        self._all = PaintedFaces()
        each = self._all.images_each
        self._rows = [person * each + k for person, count in enumerate(COUNTS) for k in range(count)]
        self.ids = tuple(self._all.ids[row] for row in self._rows)
        self.labels: Int64Array = self._all.labels[self._rows]
        self.identities, self.size = self._all.identities, self._all.size

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> UInt8Array:
        return self._all.image(self._rows[index])

    def points(self, index: int) -> Float32Array | None:
        return None


def recipe_of(out: Path, sampler: SamplerConfig, epochs: int = 3, workers: int = 0) -> Recipe:
    recipe = tiny_recipe(out)
    return replace(
        recipe,
        data=replace(recipe.data, sampler=sampler, workers=workers),
        schedule=replace(recipe.schedule, epochs=epochs),
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_two_halves_equal_the_whole(tmp_path: Path, sampler: SamplerConfig) -> None:
    """12 steps against about 6 + 6, in the middle of the second epoch."""
    whole, parts = recipe_of(tmp_path / "whole", sampler), recipe_of(tmp_path / "parts", sampler)
    train(whole, UnevenFaces())
    with pytest.raises(Interrupted):
        train(parts, UnevenFaces(), augment=stop_at(6, parts))
    assert 0 < max(losses(parts.run.out), default=0) < 12
    train(parts, UnevenFaces(), resume=True)
    assert_same_bits(weights_of(whole.run.out), weights_of(parts.run.out))
    assert losses(whole.run.out) == losses(parts.run.out)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_a_loader_process_trains_the_same(tmp_path: Path, sampler: SamplerConfig) -> None:
    here, there = recipe_of(tmp_path / "here", sampler, 1), recipe_of(tmp_path / "there", sampler, 1, workers=1)
    train(here, UnevenFaces())
    train(there, UnevenFaces())
    assert_same_bits(weights_of(here.run.out), weights_of(there.run.out))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_it_learns(tmp_path: Path, sampler: SamplerConfig) -> None:
    recipe = recipe_of(tmp_path / "run", sampler, epochs=20)
    train(recipe, UnevenFaces())
    rows = [json.loads(line) for line in (recipe.run.out / "metrics.jsonl").read_text().splitlines()]
    seen = [row["loss"] for row in rows if row["kind"] == "train"]
    assert np.mean(seen[-3:]) < 0.5 * np.mean(seen[:3]), seen
