"""Templates sit where a mask sits: over nose and mouth, never over the eyes, within the face; or are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from visard.data.rendered import RenderedFaces
from visard.functional.geometry import POSE_MODEL, template
from visard.masks.fitting import contour, fit, five_points
from visard.masks.records import KINDS, Look, Masked, draw_look
from visard.masks.shapes import PITCHES_DEG, TEXTURE, YAWS_DEG, sheet, view_of
from visard.masks.template import wear

FACES = RenderedFaces(identities=24, images_per_identity=1, seed=3, size=112)


def turned(yaw_deg: float, pitch_deg: float = 11.0, size: int = 112) -> np.ndarray:
    """(5, 2) float32: the mean head's points turned and laid where alignment would roughly have them."""
    yaw, pitch = math.radians(yaw_deg), math.radians(pitch_deg)
    around_x = np.array([[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]])
    around_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    seen = (around_y @ around_x @ (POSE_MODEL - POSE_MODEL.mean(0)).T).T[:, :2]
    return (seen * 0.157 * size + template(112).mean(0) * size / 112).astype(np.float32)


def grey(size: int = 112) -> np.ndarray:
    return np.full((size, size, 3), 120, np.uint8)


@pytest.mark.parametrize("yaw", [-60, -40, -20, 0, 20, 40, 60])
def test_the_turn_is_read_from_five_points(yaw: float) -> None:
    face = fit(turned(yaw), 112)
    assert not isinstance(face, str)
    assert math.degrees(face.yaw) == pytest.approx(yaw, abs=1)
    assert face.pitch == pytest.approx(0, abs=0.02)
    assert face.unit == pytest.approx(0.157 * 112, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("yaw", [-45, -15, 0, 30, 60])
def test_nose_and_mouth_are_covered_and_eyes_are_not(kind: str, yaw: float) -> None:
    points = turned(yaw)
    masked = wear(grey(), points, Look(kind=kind))  # type: ignore[arg-type]
    assert isinstance(masked, Masked)
    assert (masked.kind, masked.wearing) == (kind, "right")
    near = points[[2, 3, 4]] if yaw == 0 else points[[2, 3 if yaw > 0 else 4]]  # what is on the side that is seen
    for x, y in near:
        assert masked.region[round(float(y)), round(float(x))] > 200, (kind, yaw, x, y)
    for x, y in points[:2]:
        assert masked.region[max(0, round(float(y)) - 6) : round(float(y)) + 4, round(float(x))].max() == 0


def test_worn_under_the_nose_and_on_the_chin() -> None:
    points = turned(0)
    nose, mouth = points[2], points[3:].mean(0)
    under = wear(grey(), points, Look(kind="surgical", wearing="under-nose"))
    chin = wear(grey(), points, Look(kind="surgical", wearing="chin"))
    assert isinstance(under, Masked)
    assert isinstance(chin, Masked)
    assert under.region[round(float(nose[1])), round(float(nose[0]))] == 0
    assert under.region[round(float(mouth[1])), round(float(mouth[0]))] > 200
    assert chin.region[round(float(mouth[1])), round(float(mouth[0]))] == 0
    assert chin.region[108:, 50:62].mean() > 150


@pytest.mark.parametrize("yaw", [-50, -10, 25])
def test_a_mirrored_face_has_a_mirrored_mask(yaw: float) -> None:
    points = turned(yaw)
    mirrored = points[[1, 0, 2, 4, 3]].copy()
    mirrored[:, 0] = 111 - mirrored[:, 0]
    one, two = wear(grey(), points, Look(kind="kn95")), wear(grey(), mirrored, Look(kind="kn95"))
    assert isinstance(one, Masked)
    assert isinstance(two, Masked)
    apart = np.abs(one.region[:, ::-1].astype(int) - two.region)
    assert apart.mean() < 1.5


def test_size_drop_and_tilt_move_the_mask() -> None:
    points, look = turned(0), Look(kind="surgical")

    def box(look: Look) -> tuple[float, float, float]:
        masked = wear(grey(), points, look)
        assert isinstance(masked, Masked)
        rows, columns = np.nonzero(masked.region > 128)
        left, right = rows[columns < 34].min(), rows[columns > 78].min()
        return float(np.ptp(columns)), float(rows.min()), float(left - right)

    wide, top, _ = box(look)
    assert box(replace(look, size=1.15))[0] > wide * 1.08
    assert box(replace(look, drop=0.08))[1] > top + 2
    assert box(replace(look, tilt=0.15))[2] < -2  # clockwise: the left side rises
    assert box(replace(look, tilt=-0.15))[2] > 2


@pytest.mark.parametrize("size", [56, 112, 160, 224])
def test_masks_of_any_crop_size_cover_the_same_part(size: int) -> None:
    points = turned(20, size=size)
    masked = wear(grey(size), points, Look(kind="cloth"))
    reference = wear(grey(), turned(20), Look(kind="cloth"))
    assert isinstance(masked, Masked)
    assert isinstance(reference, Masked)
    assert masked.image.shape == (size, size, 3)
    assert (masked.region > 128).mean() == pytest.approx((reference.region > 128).mean(), rel=0.03)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (turned(75), "profile"),
        (turned(-75), "profile"),
        (turned(0) * np.float32(np.nan), "points"),
        (np.full((5, 2), 50, np.float32), "points"),
        (turned(0)[:4], "points"),
        (np.zeros((17, 2), np.float32), "points"),
        (turned(0) + np.float32(300), "outside"),
        (turned(0) * np.float32(0.1), "outside"),
        (turned(0)[[3, 4, 2, 0, 1]], "unlike"),
        (turned(0)[[1, 0, 2, 4, 3]], "unlike"),
    ],
)
def test_what_is_no_face_is_refused(points: np.ndarray, reason: str) -> None:
    image = grey()
    assert wear(image, points, Look(kind="surgical")) == reason
    assert (image == 120).all()


def test_any_look_on_any_rendered_face_is_a_mask_or_a_refusal() -> None:
    """Also: the crop that was given stays as it was, and nothing far from the mask changes."""
    worn = 0
    for k in range(len(FACES)):
        image, points = FACES.image(k), FACES.points(k)
        before = image.copy()
        masked = wear(image, points, draw_look(np.random.default_rng(k)))
        assert np.array_equal(image, before)
        if isinstance(masked, Masked):
            worn += 1
            assert (masked.image != image).any()
            brow = round(float(points[:2, 1].min())) - 14
            if brow > 0:  # above the eyes there are loops at most
                changed = (masked.image[:brow] != image[:brow]).any(-1).mean()
                assert changed < 0.1
    assert worn >= 18


def test_the_same_look_gives_the_same_pixels() -> None:
    look = draw_look(np.random.default_rng(1))
    one, two = (wear(FACES.image(2), FACES.points(2), look) for _ in range(2))
    assert isinstance(one, Masked)
    assert isinstance(two, Masked)
    assert np.array_equal(one.image, two.image)


def dense(five: np.ndarray, wide: float = 1.0, deep: float = 1.0) -> np.ndarray:
    """68 points about five: a jaw as wide and as deep as asked for, in mean ones."""
    points = np.zeros((68, 2), np.float32)
    for place, some in zip(five, (slice(36, 42), slice(42, 48), 30, 48, 54), strict=True):
        points[some] = place
    unit = float(np.linalg.norm(five[1] - five[0])) / 2
    mouth = five[3:].mean(0)
    t = np.linspace(math.pi, 0, 17)
    points[:17, 0] = mouth[0] + 1.85 * wide * unit * np.cos(t)
    points[:17, 1] = mouth[1] + unit * (np.sin(t) * (1.0 + 1.3 * deep) - 1.0)
    return points


def test_a_jaw_that_is_known_is_followed() -> None:
    five = turned(0)
    width = {}
    for wide in (0.85, 1.0, 1.2):
        masked = wear(grey(), dense(five, wide), Look(kind="surgical"))
        assert isinstance(masked, Masked)
        row = masked.region[round(float(five[3:, 1].mean()))] > 128
        width[wide] = int(row.sum())
    assert width[0.85] < 0.93 * width[1.0]
    assert width[1.2] > 1.1 * width[1.0]
    short = wear(grey(), dense(five, deep=0.7), Look(kind="surgical"))
    usual = wear(grey(), dense(five), Look(kind="surgical"))
    assert isinstance(short, Masked)
    assert isinstance(usual, Masked)
    assert (short.region > 128).sum() < (usual.region > 128).sum()


def test_five_points_of_denser_sets() -> None:
    five = turned(15)
    assert np.allclose(five_points(dense(five)), five, atol=1e-4)
    insightface, lapa = np.zeros((106, 2), np.float32), np.zeros((106, 2), np.float32)
    for place, some in zip(five, (slice(33, 43), slice(87, 97), 86, 52, 61), strict=True):
        insightface[some] = place
    insightface[:33] = (56, 60)
    insightface[0] = (56, 118)  # the chin comes first
    for place, one in zip(five, (104, 105, 54, 84, 90), strict=True):
        lapa[one] = place
    lapa[:33, 1] = 118 - np.abs(np.arange(33) - 16)  # from ear to ear
    assert np.allclose(five_points(insightface), five, atol=1e-4)
    assert np.allclose(five_points(lapa), five, atol=1e-4)
    assert five_points(five[:3]) is None
    assert contour(five) is None
    assert contour(dense(five)).shape == (17, 2)  # type: ignore[union-attr]


def test_a_grey_photograph_has_a_grey_mask() -> None:
    points = turned(0)
    masked = wear(grey(), points, Look(kind="cloth", colour=(200, 40, 40)))
    assert isinstance(masked, Masked)
    assert int(np.ptp(masked.image.astype(int), axis=-1).max()) <= 2


def test_dark_and_side_lit_faces_have_dark_and_side_lit_masks() -> None:
    points, look = turned(0), Look(kind="surgical", colour=(230, 230, 230), folds=0.0, wrinkles=0.0)
    skin = np.array([200, 150, 120], np.float32)
    ramp = np.linspace(0.4, 1.0, 112, dtype=np.float32)[None, :, None]
    bright, dark = (np.broadcast_to(skin * k, (112, 112, 3)).astype(np.uint8) for k in (1.0, 0.3))
    lit = (skin * np.broadcast_to(ramp, (112, 112, 1))).astype(np.uint8)
    levels = {}
    for name, image in (("bright", bright), ("dark", dark), ("lit", lit)):
        masked = wear(np.ascontiguousarray(image), points, look)
        assert isinstance(masked, Masked)
        levels[name] = masked.image.astype(float).mean(-1)
    assert levels["dark"][90, 50:62].mean() < 0.7 * levels["bright"][90, 50:62].mean()
    assert levels["lit"][90, 74:80].mean() > 1.15 * levels["lit"][90, 32:38].mean()
    assert levels["bright"][90, 74:80].mean() == pytest.approx(levels["bright"][90, 32:38].mean(), rel=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_views_show_the_sheet(kind: str) -> None:
    """The map of a view leads from a projected point of the sheet back to its place on the texture."""
    view = view_of(kind, "right", 3, 1, 1)  # type: ignore[arg-type]
    points = sheet(kind, "right")  # type: ignore[arg-type]
    assert view.maps.dtype == np.float32
    assert np.isfinite(view.maps).all()
    assert view.maps[..., 2].min() >= 0
    assert view.maps[..., 2].max() == pytest.approx(255, abs=0.01)
    assert not view.maps[0, :, 2].any()
    assert not view.maps[:, 0, 2].any()
    rows, columns = points.shape[:2]
    yaw = math.radians(YAWS_DEG[3])
    x, y, z = points[rows // 2, columns // 2]
    assert PITCHES_DEG[1] == 0
    flat = np.array([x * math.cos(yaw) + z * math.sin(yaw), y])
    five = np.array([[a * math.cos(yaw) + c * math.sin(yaw), b] for a, b, c in POSE_MODEL])
    at = np.linalg.inv(np.vstack([(view.solve @ five).T, [0, 0, 1]])) @ [*flat, 1]  # the view's pixel of that point
    seen = view.maps[round(float(at[1])), round(float(at[0]))]
    assert seen[0] == pytest.approx(TEXTURE[1] / 2, abs=3)
    assert seen[1] == pytest.approx(TEXTURE[0] / 2, abs=3)
