"""Similarity transforms against known ones, crops against drawn dots, pose against known rotations."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from visard.functional.geometry import (
    ARCFACE_TEMPLATE,
    POSE_MODEL,
    crop,
    invert,
    pose,
    scale_of,
    similarity_transform,
    template,
    warp_crop,
    warp_points,
)

angles = st.floats(-np.pi, np.pi)
scales = st.floats(0.01, 100)
shifts = st.floats(-5000, 5000)
coordinates = st.floats(-1000, 1000, width=64)


def similarity(angle: float, scale: float, x: float, y: float) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, x], [s, c, y]])


@settings(deadline=None)
@given(angles, scales, shifts, shifts)
def test_a_known_similarity_is_recovered(angle: float, scale: float, x: float, y: float) -> None:
    truth = similarity(angle, scale, x, y)
    found = similarity_transform(ARCFACE_TEMPLATE, warp_points(ARCFACE_TEMPLATE, truth))
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-8)
    assert scale_of(found) == pytest.approx(scale, rel=1e-9)
    back = warp_points(warp_points(ARCFACE_TEMPLATE, truth), invert(truth))
    np.testing.assert_allclose(back, ARCFACE_TEMPLATE, atol=1e-6 / min(scale, 1))


@settings(deadline=None)
@given(arrays(np.float64, (5, 2), elements=coordinates), angles, st.floats(0.1, 10), shifts, shifts)
def test_where_a_face_lies_does_not_change_its_crop(
    noise: np.ndarray, angle: float, scale: float, x: float, y: float
) -> None:
    """Points moved by a similarity come to lie on the same crop pixels."""
    points = ARCFACE_TEMPLATE + 0.01 * noise
    moved = warp_points(points, similarity(angle, scale, x, y))
    here = warp_points(points, similarity_transform(points, ARCFACE_TEMPLATE))
    there = warp_points(moved, similarity_transform(moved, ARCFACE_TEMPLATE))
    np.testing.assert_allclose(here, there, atol=1e-6)


@settings(deadline=None)
@given(arrays(np.float64, (5, 2), elements=coordinates), arrays(np.float64, (4,), elements=st.floats(-1, 1)))
def test_no_other_similarity_fits_better(noise: np.ndarray, step: np.ndarray) -> None:
    points = ARCFACE_TEMPLATE + 0.02 * noise
    best = similarity_transform(points, ARCFACE_TEMPLATE)
    a, b, x, y = best[0, 0], best[1, 0], best[0, 2], best[1, 2]
    a, b, x, y = np.array([a, b, x, y]) + 1e-3 * step
    other = np.array([[a, -b, x], [b, a, y]])
    error = ((warp_points(points, best) - ARCFACE_TEMPLATE) ** 2).sum()
    assert error <= ((warp_points(points, other) - ARCFACE_TEMPLATE) ** 2).sum() + 1e-9


@settings(deadline=None)
@given(angles)
def test_mirrored_points_never_give_a_reflection(angle: float) -> None:
    mirrored = warp_points(ARCFACE_TEMPLATE * [-1, 1], similarity(angle, 1, 0, 0))
    matrix = similarity_transform(mirrored, ARCFACE_TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (np.full((5, 2), 7.0), "coincide"),
        (np.full((5, 2), np.nan), "not finite"),
        (ARCFACE_TEMPLATE[:1], "at least 2"),
        (ARCFACE_TEMPLATE[:, :1], "two equal sets"),
    ],
)
def test_points_that_are_no_face_are_named(points: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        similarity_transform(points, ARCFACE_TEMPLATE[: len(points)])


def test_points_that_give_no_scale_are_refused() -> None:
    source = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    turned_both_ways = np.array([[1.0, 0], [-1, 0], [0, -1], [0, 1]])
    with pytest.raises(ValueError, match="no similarity"):
        similarity_transform(source, turned_both_ways)


def test_the_template_is_scaled_by_areas() -> None:
    np.testing.assert_array_equal(template(112), ARCFACE_TEMPLATE)
    # A pixel centre p of the double size lies at (p + 0.5) / 2 - 0.5 once two by two pixels are averaged.
    np.testing.assert_allclose((template(224) + 0.5) / 2 - 0.5, ARCFACE_TEMPLATE)
    with pytest.raises(ValueError, match="at least 1"):
        template(0)


def smooth_photograph(height: int = 300, width: int = 400, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("size", [56, 112, 224])
@pytest.mark.parametrize(("angle", "scale"), [(0.0, 0.8), (0.4, 1.0), (-1.2, 0.6), (3.0, 3.0)])
def test_drawn_dots_come_to_lie_on_the_template(size: int, angle: float, scale: float) -> None:
    points = warp_points(ARCFACE_TEMPLATE - 56, similarity(angle, scale, 350.3, 300.7))
    for k in range(5):
        y, x = np.mgrid[:600, :700]
        spot = np.exp(-((x - points[k, 0]) ** 2 + (y - points[k, 1]) ** 2) / (2 * (4 * scale) ** 2))
        image = np.repeat((255 * spot).astype(np.uint8)[..., None], 3, axis=2)
        seen = crop(image, points, size)[..., 0].astype(np.float64)
        y, x = np.mgrid[:size, :size]
        centre = np.array([(seen * x).sum(), (seen * y).sum()]) / seen.sum()
        np.testing.assert_allclose(centre, template(size)[k], atol=0.12)


def test_a_crop_of_a_crop_is_the_crop() -> None:
    image = smooth_photograph(112, 112)
    np.testing.assert_array_equal(crop(image, ARCFACE_TEMPLATE, 112), image)


def test_a_double_crop_shrunk_is_the_crop() -> None:
    image = smooth_photograph(800, 800)
    points = warp_points(ARCFACE_TEMPLATE, similarity(0.3, 4.0, 250, 80))
    large = cv2.resize(crop(image, points, 224), (112, 112), interpolation=cv2.INTER_AREA)
    difference = np.abs(large.astype(int) - crop(image, points, 112))
    assert difference.mean() < 0.5
    assert difference.max() <= 6


def test_detail_finer_than_the_crop_is_averaged() -> None:
    """A board of 2 px squares in a photograph of five times the crop's resolution is grey, not moiré."""
    board = (np.indices((800, 800)) // 2).sum(axis=0) % 2 * 255
    image = np.repeat(board.astype(np.uint8)[..., None], 3, axis=2)
    points = warp_points(ARCFACE_TEMPLATE, similarity(0.2, 5.0, 180, 60))
    inner = crop(image, points, 112)[20:-20, 20:-20].astype(np.float64)
    assert inner.std() < 12
    assert cv2.warpAffine(image, similarity_transform(points, ARCFACE_TEMPLATE), (112, 112)).std() > 50


def test_outside_the_photograph_is_black() -> None:
    image = np.full((112, 112, 3), 200, dtype=np.uint8)
    seen = warp_crop(image, np.array([[1.0, 0, 56], [0, 1, 0]]), 112)
    assert (seen[:, :55] == 0).all()
    assert (seen[:, 57:] == 200).all()


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@settings(deadline=None)
@given(st.floats(-1.2, 1.2), st.floats(-0.9, 0.9), st.floats(-3, 3), st.floats(0.5, 200), shifts)
def test_a_known_pose_is_recovered(yaw: float, pitch: float, roll: float, scale: float, shift: float) -> None:
    points = scale * (POSE_MODEL @ rotation(yaw, pitch, roll).T)[:, :2] + shift
    np.testing.assert_allclose(pose(points), (yaw, pitch, roll), atol=1e-6)


def test_signs_of_the_pose() -> None:
    nose = np.array([[0, 0], [0, 0], [8.0, 0], [0, 0], [0, 0]])
    yaw, _, roll = pose(ARCFACE_TEMPLATE + nose)
    assert yaw > 0.15  # the nose lies to the viewer's right
    assert abs(roll) < 0.05
    assert pose(ARCFACE_TEMPLATE - nose)[0] < -0.15
    assert pose(ARCFACE_TEMPLATE - nose[:, ::-1])[1] > 0.2  # a higher nose: the face looks up
    assert pose(warp_points(ARCFACE_TEMPLATE, similarity(0.5, 1, 0, 0)))[2] == pytest.approx(0.5, abs=0.02)


def test_points_without_a_pose_are_refused() -> None:
    line = np.outer(np.arange(5.0), [1.0, 2.0])
    with pytest.raises(ValueError, match="line"):
        pose(line)
    with pytest.raises(ValueError, match="five points"):
        pose(ARCFACE_TEMPLATE[:4])
    with pytest.raises(ValueError, match="not finite"):
        pose(np.full((5, 2), np.inf))
