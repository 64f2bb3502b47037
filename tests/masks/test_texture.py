"""Textures are a function of the look and the size alone, differ where looks differ, and leave the cache unharmed."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from visard.masks import texture as drawn
from visard.masks.motifs import PATTERNS
from visard.masks.records import KINDS, Look, draw_look
from visard.masks.texture import CREASES, dyed, layers, texture
from visard.records import UInt8Array


def difference(a: Look, b: Look) -> float:
    return float(np.abs(texture(a, 48, 64).astype(float) - texture(b, 48, 64)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_any_look_of_a_kind_has_a_texture(kind: str) -> None:
    for seed in range(20):
        look = replace(draw_look(np.random.default_rng(seed)), kind=kind)  # type: ignore[arg-type]
        flat = texture(look, 40, 56)
        assert flat.shape == (40, 56, 4)
        assert flat.dtype == np.uint8
        assert flat[20, 28, 3] == 255
        assert flat[..., 3].mean() > 245


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_mask_has_the_colour_of_its_look(kind: str) -> None:
    colour = (150, 120, 180)
    flat = texture(Look(kind=kind, colour=colour, folds=0.0, wrinkles=0.0, pattern_seed=7), 96, 128)  # type: ignore[arg-type]
    if kind in ("respirator", "n95"):  # filters and a nose clip have their own
        assert np.abs(np.median(flat[..., :3], (0, 1)) - colour).max() <= 2
    else:
        assert np.abs(flat[10:-10, 10:-10, :3].mean((0, 1)) - colour).max() < 2


@pytest.mark.parametrize(
    "change",
    [
        {"colour": (40, 90, 60)},
        {"pattern": 3},
        {"folds": 0.0},
        {"wrinkles": 1.0},
        {"wrinkle_seed": 5},
        {"logo_seed": 3},
    ],
)
def test_each_part_of_the_look_shows(change: dict[str, object]) -> None:
    look = Look(kind="cloth", folds=0.8, wrinkles=0.5)
    assert difference(look, replace(look, **change)) > 0.3  # type: ignore[arg-type]


def test_every_pattern_shows_both_colours() -> None:
    assert len(PATTERNS) == 8
    for number in range(1, 1 + len(PATTERNS)):
        look = Look(kind="cloth", colour=(20, 20, 20), pattern=number, pattern_seed=number, folds=0, wrinkles=0)
        grey = texture(look, 96, 128)[..., :3].astype(int).mean(-1)
        assert (grey < 90).mean() > 0.1
        assert (grey > 130).mean() > 0.01


def test_the_same_look_gives_the_same_texture_and_a_new_array() -> None:
    look = draw_look(np.random.default_rng(3))
    first = texture(look, 48, 64)
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(texture(look, 48, 64), kept)


def test_creases_are_mirrored_by_the_seeds_next_bit() -> None:
    look = Look(kind="cloth", folds=0.0, wrinkles=1.0, wrinkle_seed=11)
    other = replace(look, wrinkle_seed=11 + CREASES)
    assert np.array_equal(texture(look, 48, 64)[:, ::-1], texture(other, 48, 64))


def test_light_from_a_side_brightens_that_side() -> None:
    look = Look(kind="surgical", folds=0.0, wrinkles=0.0)
    flat = texture(look, 48, 64, 0.4)[..., :3].astype(float).mean((0, 2))
    assert flat[50:60].mean() > flat[4:14].mean() + 30
    assert np.array_equal(texture(look, 48, 64, 0.0), texture(look, 48, 64))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_coloured_in_the_crop_is_as_coloured_before(kind: str, mirrored: bool) -> None:
    """Against the whole texture, moved: they differ by rounding, and a little where a print's edge meets a fold."""
    y, x = np.mgrid[:60, :100].astype(np.float32)
    across, down = 3 + 1.1 * x + 0.1 * y, 2 + 0.1 * x + 1.3 * y

    def move(planes: UInt8Array) -> UInt8Array:
        return cv2.remap(planes, across, down, cv2.INTER_LINEAR)  # type: ignore[return-value]

    for seed in range(12):
        look = replace(draw_look(np.random.default_rng(seed)), kind=kind)  # type: ignore[arg-type]
        flat = texture(look, 96, 128, -0.2 if mirrored else 0.2)
        expected = move(np.ascontiguousarray(flat[:, ::-1]) if mirrored else flat)[..., :3]
        off = np.abs(dyed(look, 96, 128, 0.2, move, mirrored=mirrored).astype(int) - expected)
        printed = layers(look, 96, 128).pattern is not None
        assert off.mean() < (1.0 if printed else 0.5)
        assert (off > 2).mean() < (0.07 if printed else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_lit_in_the_crop_is_as_lit_after(kind: str) -> None:
    """What is one colour is lit before it has it: that differs by rounding."""
    lit = np.broadcast_to(np.linspace(60, 150, 56).astype(np.uint8), (40, 56)).copy()
    tint = np.array([[0.7, 0.1, 0.0], [0.05, 0.6, 0.0], [0.0, 0.1, 0.5]])
    for seed in range(12):
        look = replace(draw_look(np.random.default_rng(seed)), kind=kind, colour=(120, 90, 130))  # type: ignore[arg-type]
        plain = dyed(look, 40, 56, 0.0, lambda planes: planes)
        expected = (plain @ tint.T * (lit[..., None] / 128)).clip(0, 255)
        off = np.abs(dyed(look, 40, 56, 0.0, lambda planes: planes, lit=lit, tint=tint) - expected)
        assert off.mean() < 0.8
        assert off.max() < 4


def test_what_was_drawn_once_is_kept() -> None:
    """Every plane of a size fits into its store, for both tools' sizes at once."""
    stores = (drawn._folds, drawn._creases, drawn._pattern, drawn._fitted, drawn._print)
    assert 2 * 2 * max(len(KINDS) * 8, 2 * CREASES, len(PATTERNS) * drawn.PATTERN_DRAWS, 2 * drawn.PRINTS) <= drawn.KEPT
    looks = [replace(draw_look(np.random.default_rng(k)), logo_seed=k % 2 * k or None) for k in range(150)]

    def fresh() -> list[int]:
        before = [store.cache_info().misses for store in stores]
        for look in looks:
            for size in ((12, 16), (15, 20)):
                for mirrored in (False, True):
                    layers(look, *size, mirrored=mirrored)
        return [store.cache_info().misses - then for store, then in zip(stores, before, strict=True)]

    assert all(fresh())
    assert not any(fresh())
