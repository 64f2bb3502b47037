"""The generic face: its proportions, and the fit that finds it again where it was put."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.functional import face_surface
from visard.functional.face_surface import (
    ANGLE_DEG,
    AXIS_Z,
    HEIGHT_MM,
    MODES,
    Fit,
    anchors,
    fit,
    place,
    radius,
    reshape,
)
from visard.functional.geometry import template

FIVE = np.array([[-30.7, 0, 0], [30.7, 0, 0], [0, 38, 34], [-26, 71, 5], [26, 71, 5]], np.float64)
REST = np.array([[0, -3, 10.5], [0, 50, 17.5], [0, 115, 3], [-54.5, 77, -46], [54.5, 77, -46]], np.float64)
TEN = np.vstack([FIVE, REST])


def standing(yaw: float, pitch: float, roll: float, scale: float = 0.57) -> Fit:
    """The mean face, angles in degrees."""
    return Fit(*(math.radians(a) for a in (yaw, pitch, roll)), scale, np.array([56.0, 52.0]), np.zeros(len(MODES)), 0.0)


def as_mesh(anchors_A2: np.ndarray) -> np.ndarray:
    """468 points of which those that are used are the ten anchors."""
    points = np.full((468, 2), 50.0)
    points[[33, 133, 159, 145]], points[[362, 263, 386, 374]] = anchors_A2[0], anchors_A2[1]
    points[[1, 61, 291, 168, 2, 152, 172, 397]] = anchors_A2[2:]
    return points


def as_68(anchors_A2: np.ndarray) -> np.ndarray:
    points = np.full((68, 2), 50.0)
    points[36:42], points[42:48] = anchors_A2[0], anchors_A2[1]
    points[[30, 48, 54, 27, 33, 8, 4, 12]] = anchors_A2[2:]
    return points


def as_106(anchors_A2: np.ndarray, *, insightface: bool) -> np.ndarray:
    points = np.full((106, 2), 50.0)
    if insightface:
        points[[38, 88, 86, 52, 61, 72, 80, 0, 14, 30]] = anchors_A2
        return points
    # The contour from ear to ear, so that the order can be told.
    points[:33, 1] = anchors_A2[7, 1] - 40 * np.abs(np.linspace(-1, 1, 33))
    points[[104, 105, 54, 84, 90, 51, 60, 16, 8, 24]] = anchors_A2
    return points


@pytest.mark.parametrize("yaw", [-60, -40, -20, 0, 20, 40, 60])
@pytest.mark.parametrize("pitch", [-20, 0, 20])
@pytest.mark.parametrize("roll", [-40, 0, 25])
def test_pose_is_found_again(yaw: int, pitch: int, roll: int) -> None:
    found = fit(place(FIVE, standing(yaw, pitch, roll)))
    assert found is not None
    assert abs(math.degrees(found.yaw) - yaw) < 1
    assert abs(math.degrees(found.pitch) - pitch) < 5, "five points say little of pitch: its prior pulls"
    assert abs(math.degrees(found.roll) - roll) < 2
    assert found.scale == pytest.approx(0.57, rel=0.01)
    assert found.error_mm < 0.6


@pytest.mark.parametrize(("count", "jaws"), [(5, True), (10, True), (10, False)])
def test_a_step_is_that_of_gauss_and_newton(count: int, jaws: bool) -> None:
    """The kept matrix against derivatives by differences, at the pose that it was made for; how near to the camera a
    place is does not change in a step."""
    tables, random = face_surface._tables(count), np.random.default_rng(count)
    yaw_steps, pitch_steps = 11, -4
    state = np.zeros(6 + len(MODES))
    state[:2] = face_surface._STEP_RAD * yaw_steps, face_surface._STEP_RAD * pitch_steps
    wanted = random.normal(0, 30, (count, 2))
    nearer = 1000 / (1000 - (face_surface._turn(*state[:3]) @ tables.places.reshape(-1, 3).T)[2])

    def off(state: np.ndarray) -> np.ndarray:
        places = (tables.places + state[6:] @ tables.modes).reshape(-1, 3)
        turned = (face_surface._turn(*state[:3]) @ places.T)[:2] * nearer
        return (wanted - math.exp(state[3]) * turned.T - state[4:6]).ravel()

    weight = np.repeat(tables.weight * (1 if jaws else np.arange(count) < 8), 2)
    rows = np.stack([(off(state - 1e-5 * one) - off(state + 1e-5 * one)) / 2e-5 for one in np.eye(len(state))], axis=1)
    rows = rows * weight[:, None]
    prior = np.array([0, face_surface._PITCH_RAD**-2, 0, 0, 0, 0] + [1.0] * len(MODES))
    expected = np.linalg.solve(rows.T @ rows + np.diag(prior), rows.T @ (weight * off(state)) - prior * state)
    step = face_surface._step(count, jaws, yaw_steps, pitch_steps)
    np.testing.assert_allclose(step @ np.concatenate([off(state), state]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("yaw", [-45, 0, 30])
def test_all_kinds_of_points_agree(yaw: int) -> None:
    where = standing(yaw, 5, 10)
    pixels = place(TEN, where)
    fits = [
        fit(pixels[:5]),
        fit(as_68(pixels)),
        fit(as_106(pixels, insightface=False)),
        fit(as_106(pixels, insightface=True)),
        fit(as_mesh(pixels)),
    ]
    for found in fits:
        assert found is not None
        assert abs(math.degrees(found.yaw) - yaw) < 1
        assert abs(math.degrees(found.pitch) - 5) < 2
        # Where it matters: the mask's own places, in pixels.
        some = np.array([[0.0, 20, 20], [0, 110, 5], [40, 60, -10], [-40, 60, -10]])
        moved = place(reshape(some, found.shape), found) - place(some, where)
        assert np.abs(moved).max() < 1.0


def test_anchors_of_68_are_those_of_the_renderer() -> None:
    from visard.data.rendered import RenderedFaces

    made = RenderedFaces(identities=12, images_per_identity=1, seed=3).render(range(12))
    for five, dense in zip(made.points.numpy(), made.dense.numpy(), strict=True):
        assert np.abs(anchors(dense)[:5] - five).max() < 4.5


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-50, 50),
    st.floats(-20, 20),
    st.floats(-30, 30),
    st.lists(st.floats(-1.0, 1.0), min_size=10, max_size=10),
)
def test_errors_of_a_pixel_move_the_face_little(yaw: float, pitch: float, roll: float, noise: list[float]) -> None:
    where = standing(yaw, pitch, roll)
    found = fit(place(FIVE, where) + np.array(noise).reshape(5, 2))
    assert found is not None
    assert abs(math.degrees(found.yaw) - yaw) < 12
    mouth = np.array([[0.0, 71.0, 15.0]])
    assert np.abs(place(reshape(mouth, found.shape), found) - place(mouth, where)).max() < 4.0


def test_the_template_is_a_frontal_mean_face() -> None:
    found = fit(template(112))
    assert found is not None
    assert abs(math.degrees(found.yaw)) < 1
    assert abs(math.degrees(found.roll)) < 1
    assert abs(math.degrees(found.pitch)) < 8
    assert np.abs(found.shape).max() < 0.5


@pytest.mark.parametrize(
    "points",
    [np.full((5, 2), 40.0), np.column_stack([np.arange(5.0) * 10, np.arange(5.0) * 10]), FIVE[:, :2] * 0.01],
    ids=["one place", "a line", "a speck"],
)
def test_no_face(points: np.ndarray) -> None:
    assert fit(points) is None


def test_number_of_points() -> None:
    with pytest.raises(ValueError, match="expected 5, 68, 106, 468 points, got 7"):
        fit(np.zeros((7, 2)))


def test_a_modes_effect_is_found_again() -> None:
    shape = np.zeros(len(MODES))
    shape[MODES.index("lower")] = 1.5
    where = standing(0, 0, 0)
    longer = fit(as_68(place(reshape(TEN, shape), where)))
    assert longer is not None
    assert longer.shape[MODES.index("lower")] > 0.3
    chin = np.array([[0.0, 115.0, 3.0]])
    assert np.abs(place(reshape(chin, longer.shape), longer) - place(reshape(chin, shape), where)).max() < 2.0


def surface_at(height: float, angle: float) -> tuple[float, float]:
    """x and z of the surface, mm."""
    row = round((height - HEIGHT_MM[0]) / HEIGHT_MM[2])
    column = round((angle - ANGLE_DEG[0]) / ANGLE_DEG[2])
    reach = radius()[row, column]
    return reach * math.sin(math.radians(angle)), AXIS_Z + reach * math.cos(math.radians(angle))


def test_proportions_are_those_of_the_tables() -> None:
    table = radius()
    heights = np.arange(HEIGHT_MM[0], HEIGHT_MM[1] + 0.1, HEIGHT_MM[2])
    angles = np.radians(np.arange(ANGLE_DEG[0], ANGLE_DEG[1] + 0.1, ANGLE_DEG[2]))
    half = (table * np.sin(angles)).max(1)
    assert 2 * half[heights == 20.0][0] == pytest.approx(134, abs=5), "cheekbones"
    assert 2 * half[heights == 85.0][0] == pytest.approx(104, abs=6), "jaw"
    tip, base = surface_at(37.5, 0)[1], surface_at(50, 0)[1]
    assert tip == pytest.approx(34, abs=1.5)
    assert 10 < tip - base < 19
    assert surface_at(115, 0)[1] == pytest.approx(3, abs=4), "chin"
    assert np.allclose(table, table[:, ::-1]), "the two halves are one"
    # Smooth: no step between neighbours that a face has not.
    assert np.abs(np.diff(table, 2, axis=0)).max() < 4.0
