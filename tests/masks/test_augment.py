"""Masks while loading: drawn from (seed, epoch, id) alone, as often as asked for, told in the batch's extras."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from visard.config import DataConfig
from visard.config_augment import PRESETS
from visard.config_masks import KindShares, MaskConfig, WearingShares
from visard.data.dataset import open_dataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.data.transforms import Sample, SampleRandom
from visard.errors import UserError
from visard.masks.augment import MaskAugment, mask_augment, shares_of, template_points
from visard.masks.records import KINDS, WEARINGS, draw_look
from visard.records import Batch, Float32Array, UInt8Array

RENDERED = open_dataset("rendered:32x1,seed=9", size=112)


class Kept:
    """Rendered once, looked up by the tests."""

    ids, labels, identities, size = tuple(RENDERED.ids), RENDERED.labels, RENDERED.identities, 112

    def __init__(self) -> None:
        rows = np.arange(len(RENDERED))
        self._images, self._points = RENDERED.images(rows), RENDERED.all_points(rows)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> UInt8Array:
        return self._images[index]

    def points(self, index: int) -> Float32Array | None:
        return self._points[index]


DATA = Kept()
FLAT = DataConfig(source="", flip_probability=0.0)


def batches(masks: MaskConfig, config: DataConfig = FLAT, seed: int = 4) -> list[Batch]:
    return list(Loader(DATA, config, EpochSampler(len(DATA), 16, seed=seed), mask_augment(masks)))


def by_id(found: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: batch.images[k] for batch in found for k, name in enumerate(batch.ids)}


def test_no_masks_cost_nothing() -> None:
    assert mask_augment(MaskConfig()) is None
    assert batches(MaskConfig())[0].extras == {}


@pytest.mark.parametrize("uv_share", [0.0, 0.5, 1.0])
def test_the_extras_tell_what_was_done(uv_share: float) -> None:
    plain = by_id(batches(MaskConfig()))
    found = batches(MaskConfig(probability=0.6, uv_share=uv_share, jpeg=False))
    tools: set[int] = set()
    for batch in found:
        extras = batch.extras
        assert extras["mask_region"].dtype == torch.int64
        for k, name in enumerate(batch.ids):
            changed = bool((batch.images[k] != plain[name]).any())
            assert changed == bool(extras["log_masked"][k])
            assert changed == bool(extras["mask_region"][k]) == bool(extras["mask_tool"][k])
            assert not (extras["log_masked"][k] and extras["log_mask_refused"][k])
        tools |= set(extras["mask_tool"].tolist()) - {0}
    assert tools == {0.0: {2}, 0.5: {1, 2}, 1.0: {1}}[uv_share]
    share = float(torch.cat([b.extras["log_masked"] + b.extras["log_mask_refused"] for b in found]).mean())
    assert 0.4 < share < 0.8


def test_a_mask_depends_on_seed_epoch_and_id_alone() -> None:
    masks = MaskConfig(probability=0.5, uv_share=0.0)
    one, again, other = (by_id(batches(masks, seed=seed)) for seed in (4, 4, 5))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    alone = MaskAugment(masks)
    for k, name in enumerate(DATA.ids):
        sample = Sample(DATA.image(k), DATA.points(k), 0, name, False)
        image = alone(sample, SampleRandom(4, 0).generator(name)).image
        assert np.array_equal(image, one[name].numpy())


def test_other_augmentations_draw_the_same_with_and_without_a_mask() -> None:
    """What comes after a mask that is not drawn sees the numbers that it would see after one that is."""
    light = replace(FLAT, augment=PRESETS["light"])
    seldom, often = (batches(MaskConfig(probability=p, uv_share=0, jpeg=False), light) for p in (1e-9, 0.5))
    masked = {n: bool(m) for b in often for n, m in zip(b.ids, b.extras["mask_region"], strict=True)}
    first, second = by_id(seldom), by_id(often)
    assert all(torch.equal(first[name], second[name]) for name, mask in masked.items() if not mask)
    assert any(masked.values())


def test_loader_processes_give_the_same_batches() -> None:
    masks = MaskConfig(probability=0.5, uv_share=0.0)
    here, there = (batches(masks, replace(FLAT, workers=workers)) for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images)
        assert {k: v.tolist() for k, v in a.extras.items()} == {k: v.tolist() for k, v in b.extras.items()}


def test_without_points_the_templates_are_taken() -> None:
    augment = MaskAugment(MaskConfig(probability=1.0, uv_share=0.0))
    image = np.full((112, 112, 3), 130, np.uint8)
    random = SampleRandom(0, 0)
    given = [
        augment(Sample(image, points, 0, "a", False), random.generator("a")).image
        for points in (None, template_points(112))
    ]
    assert np.array_equal(*given)
    assert (given[0] != image).any()


def test_a_refused_crop_stays_as_it_is_and_is_counted() -> None:
    augment = MaskAugment(MaskConfig(probability=1.0, uv_share=0.0))
    image = np.full((112, 112, 3), 130, np.uint8)
    sample = Sample(image, np.full((5, 2), 50, np.float32), 0, "a", False, {"mine": 7})
    made = augment(sample, SampleRandom(0, 0).generator("a"))
    assert np.array_equal(made.image, image)
    assert (made.extras["log_mask_refused"], made.extras["log_masked"]) == (1, 0)
    assert made.extras["mine"] == 7


def test_shares_decide_what_is_drawn() -> None:
    only = dict.fromkeys(("surgical", "cloth", "n95", "bandana", "respirator"), 0.0)
    kinds, wearings = KindShares(**only, kn95=3.0), WearingShares(right=0.0, under_nose=0.0, chin=2.0)
    shares = shares_of(kinds, wearings)
    rng = np.random.default_rng(0)
    looks = [draw_look(rng, *shares) for _ in range(50)]
    assert {(look.kind, look.wearing) for look in looks} == {("kn95", "chin")}
    usual = [draw_look(rng, *shares_of(KindShares(), WearingShares())) for _ in range(600)]
    assert {look.kind for look in usual} == set(KINDS)
    assert {look.wearing for look in usual} == set(WEARINGS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MaskConfig(probability=1.2),
        lambda: MaskConfig(uv_share=-0.1),
        lambda: KindShares(cloth=-1.0),
        lambda: WearingShares(right=0.0, under_nose=0.0, chin=0.0),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(UserError, match=r"data\.masks\."):
        make()  # type: ignore[operator]


def test_it_pickles_into_loader_processes() -> None:
    augment = MaskAugment(MaskConfig(probability=0.3))
    assert pickle.loads(pickle.dumps(augment)) == augment
