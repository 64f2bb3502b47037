"""Photographs as crops: sides and offsets of the centre, random parts, and their place in the loader's randomness."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.config import DataConfig
from visard.config_augment import AugmentConfig, FramingConfig, GreyConfig, preset
from visard.data.dataset import open_dataset
from visard.data.framing import Photographs, centre, part_of, random_part, shorter_side
from visard.data.loader import Loader, batches
from visard.data.sampler import EpochSampler
from visard.errors import UserError

PHOTOGRAPH = FramingConfig(kind="photograph")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three identities of four photographs each; the grey level grows along x, of another shape each."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        path = root / f"i{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        ramp = np.linspace(0, 255, 50 + 7 * number).astype(np.uint8)
        cv2.imwrite(str(path), np.tile(ramp, (90, 1))[..., None].repeat(3, 2))
    return root


def ramp(height: int, width: int) -> np.ndarray:
    """Red is the row, green the column, blue 255."""
    image = np.full((height, width, 3), 255, np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)[None, :]
    return image


def test_the_standard_sides() -> None:
    assert shorter_side(224) == 256
    # 200 x 100 -> 64 x 32 with S = 28: rows 18 to 46 of 64, columns 2 to 30 of 32
    crop = centre(ramp(200, 100), 28)
    assert crop.shape == (28, 28, 3)
    assert crop[0, 0, 0] == pytest.approx(18.5 * 200 / 64, abs=1.5)
    assert crop[0, 0, 1] == pytest.approx(2.5 * 100 / 32, abs=1.5)
    assert (crop[..., 2] == 255).all()


def test_no_scaling_where_none_is_needed() -> None:
    image = ramp(70, 32)
    assert (centre(image, 28) == image[21:49, 2:30]).all()


@given(st.integers(1, 400), st.integers(1, 400), st.integers(16, 64))
def test_centre_of_any_shape(height: int, width: int, size: int) -> None:
    assert centre(np.zeros((height, width, 3), np.uint8), size).shape == (size, size, 3)


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(0, 2**32),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
)
def test_a_part_lies_in_the_photograph(height: int, width: int, seed: int, area: list, aspect: list) -> None:
    config = FramingConfig(kind="photograph", area=tuple(area), aspect=tuple(aspect))
    top, left, tall, wide = part_of(height, width, config, np.random.default_rng(seed).random((10, 4)))
    assert 0 <= top <= top + tall <= height
    assert 0 <= left <= left + wide <= width
    assert min(tall, wide) >= 1


def test_parts_are_of_the_area_and_shape_asked_for() -> None:
    config = FramingConfig(kind="photograph", area=(0.2, 0.5), aspect=(0.8, 1.25))
    numbers = np.random.default_rng(0)
    parts = np.array([part_of(300, 400, config, numbers.random((10, 4))) for _ in range(2000)])
    area, aspect = parts[:, 2] * parts[:, 3] / 120_000, parts[:, 3] / parts[:, 2]
    assert (area.min() > 0.198, area.max() < 0.503) == (True, True)
    assert area.mean() == pytest.approx(0.35, abs=0.01)
    assert (aspect.min() > 0.79, aspect.max() < 1.26) == (True, True)
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.01)
    assert parts[:, 0].mean() == pytest.approx((300 - parts[:, 2]).mean() / 2, rel=0.05)


def test_what_never_fits_is_the_largest_centre_of_an_allowed_shape() -> None:
    config = FramingConfig(kind="photograph", area=(1.0, 1.0))
    tries = np.random.default_rng(0).random((10, 4))
    assert part_of(100, 1000, config, tries) == (0, 433, 100, 133)
    assert part_of(1000, 100, config, tries) == (433, 0, 133, 100)


def test_a_part_is_scaled_to_the_crop() -> None:
    whole = FramingConfig(kind="photograph", area=(1.0, 1.0), aspect=(1.0, 1.0))
    image = ramp(64, 64)
    small = random_part(image, 32, whole, np.random.default_rng(0))
    assert (small == cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)).all()


def test_training_sees_parts_and_evaluation_the_centre(folder: Path) -> None:
    data = open_dataset(folder, size=28, framing="photograph")
    assert isinstance(data, Photographs)
    assert data.points(0) is None
    (evaluated,) = batches(data, 12)
    assert (evaluated.images.numpy() == np.stack([data.image(i) for i in range(12)])).all()
    config = DataConfig(source=str(folder), size=28, framing=PHOTOGRAPH)
    for batch in Loader(data, config, EpochSampler(12, 12, seed=3)):
        assert not (batch.images.numpy() == evaluated.images.numpy()).all((1, 2, 3)).any()
        assert batch.points is None
        # along x the grey level grows, unless mirrored
        grows = batch.images[:, 14, -1, 0].int() > batch.images[:, 14, 0, 0].int()
        assert (grows == ~batch.flipped).all()
        assert 0 < int(batch.flipped.sum()) < 12


def pictures(folder: Path, batch: int, augment: AugmentConfig, workers: int = 0) -> dict[str, bytes]:
    data = open_dataset(folder, size=28, framing="photograph")
    config = DataConfig(source=str(folder), size=28, framing=PHOTOGRAPH, augment=augment, workers=workers)
    loader = Loader(data, config, EpochSampler(12, batch, seed=3))
    return {i: image.tobytes() for b in loader for i, image in zip(b.ids, b.images.numpy(), strict=True)}


def test_parts_depend_on_seed_epoch_and_id_alone(folder: Path) -> None:
    """Not on the batch or the workers, nor on whether an augmentation draws numbers of its own."""
    first = pictures(folder, 12, preset("none"))
    assert pictures(folder, 5, preset("none")).items() <= first.items()
    assert pictures(folder, 12, preset("none"), workers=1) == first
    # these photographs are grey already: only the part would show a change
    assert pictures(folder, 12, AugmentConfig(grey=GreyConfig(probability=1.0))) == first


def test_rendered_faces_pass_as_photographs() -> None:
    data = open_dataset("rendered:3x2", size=56, framing="photograph")
    assert data.image(0).shape == (56, 56, 3)
    assert (data.image(1) == open_dataset("rendered:3x2", size=64).image(1)[4:60, 4:60]).all()


def test_what_makes_no_sense_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="photographs need a size"):
        open_dataset(folder, framing="photograph")
    with pytest.raises(UserError, match=r"data\.framing\.area and aspect belong to kind photograph"):
        FramingConfig(area=(0.1, 1.0))
    with pytest.raises(UserError, match=r"data\.framing\.area is \(0\.5, 0\.1\)"):
        FramingConfig(kind="photograph", area=(0.5, 0.1))
    with pytest.raises(UserError, match=r"data\.resize does nothing"):
        DataConfig(framing=PHOTOGRAPH, resize=True)
