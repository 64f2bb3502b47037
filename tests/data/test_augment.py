"""Transformations by hand; landmarks stay on their pixels; draws depend on the image alone."""

from __future__ import annotations

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.config import DataConfig
from visard.config_augment import (
    PRESETS,
    AugmentConfig,
    BlurConfig,
    CropConfig,
    GreyConfig,
    JpegConfig,
    LightConfig,
    RotationConfig,
    ShiftConfig,
    preset,
)
from visard.data import augment
from visard.data.augment import NAMES, Augmentation, augmentation, in_order
from visard.data.dataset import open_dataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler, IdentitySampler
from visard.data.transforms import Sample, SampleRandom
from visard.errors import UserError
from visard.recipes.train import parse
from visard.records import UInt8Array

S = 56


def noise(size: int = S) -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def sample(image: UInt8Array | None = None) -> Sample:
    points = np.array([[20, 22], [36, 22], [28, 30], [22, 40], [34, 40]], np.float32)
    return Sample(noise() if image is None else image, points, 3, "a", False)


def only(name: str) -> AugmentConfig:
    part = replace(getattr(PRESETS["strong"], name), probability=1.0)
    return replace(AugmentConfig(), **{name: part})


def test_nothing_is_done_at_first() -> None:
    assert augmentation(AugmentConfig()) is None
    assert augmentation(PRESETS["none"]) is None
    assert in_order(None, None) is None


@pytest.mark.parametrize("name", NAMES)
def test_each_changes_pixels_and_keeps_the_rest(name: str) -> None:
    way, given_sample = Augmentation(only(name)), sample()
    before = given_sample.image.copy()
    changed = [way(given_sample, SampleRandom(0, epoch).generator("a")) for epoch in range(6)]
    assert (given_sample.image == before).all()
    assert sum((c.image != before).any() for c in changed) >= 5
    for c in changed:
        assert c.image.shape == (S, S, 3)
        assert c.image.dtype == np.uint8
        assert (c.label, c.id, c.flipped) == (3, "a", False)
        assert c.points is not None
        assert c.points.dtype == np.float32
        assert (c.points == given_sample.points).all() == (name not in ("shift", "rotation"))
    none = Sample(before, None, 3, "a", True)
    assert way(none, SampleRandom(0, 0).generator("a")).points is None
    again = pickle.loads(pickle.dumps(way))(given_sample, SampleRandom(0, 2).generator("a"))
    assert (again.image == changed[2].image).all()


@settings(max_examples=60, deadline=None)
@given(angle=st.floats(-3.1, 3.1), scale=st.floats(0.7, 1.4), x=st.floats(-6, 6), y=st.floats(-6, 6), size=st.just(57))
def test_landmarks_stay_on_their_pixels(angle: float, scale: float, x: float, y: float, size: int) -> None:
    point = np.array([[31, 24]], np.float32)
    image = np.zeros((size, size, 3), np.uint8)
    cv2.circle(image, (31, 24), 3, (255, 255, 255), -1)
    matrix = augment.motion_matrix(size, angle, scale, x, y)
    weight = augment.warp(image, matrix)[..., 0].astype(float)
    rows, columns = np.indices(weight.shape)
    centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    np.testing.assert_allclose(augment.warp_points(point, matrix)[0], centre, atol=0.3)


def test_a_quarter_turn_by_hand() -> None:
    matrix = augment.motion_matrix(5, np.pi / 2, 1, 0, 0)
    image = noise(5)
    assert (augment.warp(image, matrix) == np.rot90(image, -1)).all()
    moved = augment.warp_points(np.array([[0, 0], [4, 0], [2, 2]], np.float32), matrix)
    np.testing.assert_allclose(moved, [[4, 0], [4, 4], [2, 2]], atol=1e-6)


def test_light_by_hand() -> None:
    image = np.array([[[100, 100, 100], [50, 50, 50]], [[200, 100, 0], [10, 20, 30]]], np.uint8)
    assert (augment.light(image, 1, 1, 1, 1) == image).all()
    assert augment.light(image, 1.5, 1, 1, 1)[0].tolist() == [[150] * 3, [75] * 3]
    assert (augment.light(image, 1, 1, 0, 1) == augment.grey(image)).all()
    assert np.abs(augment.grey(image)[1, 0] - (0.299 * 200 + 0.587 * 100)).max() <= 1
    luma = image.reshape(-1, 3).mean(0) @ [0.299, 0.587, 0.114]
    assert (np.abs(augment.light(image, 1, 0, 1, 1) - luma) <= 0.5).all()
    assert augment.light(image, 1, 1, 1, 2)[0, 0, 0] == round(255 * (100 / 255) ** 2)


def test_blur_and_motion_keep_the_mean_and_spread_a_point() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    along = augment.motion_blur(image, 9, 0.0)
    assert set(np.flatnonzero(along[..., 0].sum(1))) == {20}
    assert set(np.flatnonzero(along[..., 0].sum(0))) == set(range(16, 25))
    across = augment.motion_blur(image, 9, np.pi / 2)
    assert (across[..., 0] == along[..., 0].T).all()
    for length in (1, 1.5, 4, 11):
        for angle in (0, 0.3, 1.2, 3.0):
            assert augment.line(length, angle).sum() == pytest.approx(1, abs=1e-5)
    assert (augment.motion_blur(noise(), 1, 0.7) == noise()).all()
    assert augment.blur(noise(), 2.0).std() < 0.4 * noise().std()


def test_low_resolution_jpeg_window_and_erasing() -> None:
    image = noise()
    assert (augment.low_resolution(image, 1.0, cv2.INTER_AREA, cv2.INTER_LINEAR) == image).all()
    coarse = augment.low_resolution(image, 0.01, cv2.INTER_AREA, cv2.INTER_NEAREST)
    assert (coarse[: S // 2, : S // 2] == coarse[0, 0]).all()
    flat = np.full((S, S, 3), (200, 60, 20), np.uint8)
    assert np.abs(augment.jpeg(flat, 95).astype(int) - flat).max() <= 3  # channels are not exchanged
    kept = augment.window(image, 5, 6, 10, 20)
    assert (kept[5:15, 6:26] == image[5:15, 6:26]).all()
    kept[5:15, 6:26] = 0
    assert not kept.any()
    erased = augment.erase(image, 5, 6, 10, 20, np.random.default_rng(0))
    assert (erased[5:15, 6:26] != image[5:15, 6:26]).mean() > 0.9
    erased[5:15, 6:26] = image[5:15, 6:26]
    assert (erased == image).all()


@given(st.integers(1, 200), st.floats(0.01, 1), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_rectangles_lie_in_the_crop(size: int, area: float, uniform: list[float]) -> None:
    top, left, height, width = augment.rectangle(size, (area, area), np.array(uniform), 3.0)
    assert 0 <= top <= top + height <= size
    assert 0 <= left <= left + width <= size
    assert min(height, width) >= 1


def test_switching_one_on_leaves_the_others_as_they_were() -> None:
    blurred = Augmentation(AugmentConfig(blur=BlurConfig(probability=0.5)))
    both = Augmentation(AugmentConfig(blur=BlurConfig(probability=0.5), grey=GreyConfig(probability=1.0)))
    for epoch in range(8):
        random = SampleRandom(0, epoch)
        grey_first = sample(augment.grey(noise()))
        alone = blurred(grey_first, random.generator("a")).image
        assert (both(sample(), random.generator("a")).image == alone).all()


def test_each_comes_at_its_rate() -> None:
    way = Augmentation(AugmentConfig(grey=GreyConfig(probability=0.2)))
    random, given_sample = SampleRandom(1, 0), sample()
    changed = sum(way(given_sample, random.generator(str(i))) is not given_sample for i in range(2000))
    assert abs(changed - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8)


def test_the_loader_applies_what_its_settings_say() -> None:
    data = open_dataset("rendered:3x2", size=32)
    config = DataConfig(size=32, augment=PRESETS["strong"])
    plain = next(iter(Loader(data, replace(config, augment=AugmentConfig()), EpochSampler(6, 6, 0))))
    got = next(iter(Loader(data, config, EpochSampler(6, 6, 0))))
    assert got.ids == plain.ids
    random, way = SampleRandom(0, 0), Augmentation(PRESETS["strong"])
    for i, image_id in enumerate(plain.ids):
        before = Sample(plain.images[i].numpy(), plain.points[i].numpy(), 0, image_id, False)  # type: ignore[index]
        assert (way(before, random.generator(image_id)).image == got.images[i].numpy()).all()
    assert not torch.equal(got.images, plain.images)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ShiftConfig(probability=1.5),
        lambda: RotationConfig(degrees=-1),
        lambda: CropConfig(area=(0.9, 0.2)),
        lambda: JpegConfig(quality=(0, 50)),
        lambda: LightConfig(probability=0.5, brightness=0, contrast=0, saturation=0),
        lambda: preset("heavy"),
    ],
)
def test_impossible_settings_are_refused(wrong: object) -> None:
    with pytest.raises(UserError):
        wrong()  # type: ignore[operator]


def test_an_image_that_comes_again_is_augmented_anew() -> None:
    data = open_dataset("rendered:2x1", size=32)
    config = DataConfig(size=32, augment=only("light"))
    batch = next(iter(Loader(data, config, IdentitySampler(data.labels, 6, 0, images_per_identity=3))))
    assert sorted(batch.ids) == sorted([*data.ids] * 3)
    crops = {batch.images[i].numpy().tobytes() for i in range(6)}
    assert len(crops) == 6


def test_a_preset_on_the_command_line_is_changed_by_its_fields() -> None:
    request = parse(["quickstart", "--augment", "adaface", "--data.augment.blur.probability", "0.1"])
    assert request is not None
    assert request.recipe.data.augment == replace(PRESETS["adaface"], blur=BlurConfig(probability=0.1))
    with pytest.raises(UserError, match="'heavy' is not one of none, light, strong, adaface"):
        parse(["quickstart", "--augment", "heavy"])
