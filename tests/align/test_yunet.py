"""YuNet's wrapper over a network made here (bright 32 px cells are faces): places, sizes, fixed inputs, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.align.photos import CELL_POINTS, bright_square_network, squares
from visard.align.yunet import YuNet
from visard.errors import UserError


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bright_square_network(tmp_path_factory.mktemp("yunet") / "any.onnx")


@pytest.fixture(scope="module")
def fixed_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bright_square_network(tmp_path_factory.mktemp("yunet") / "fixed.onnx", side=320)


def test_a_face_is_found_where_it_is(network: Path) -> None:
    (face,) = YuNet([network]).detect(squares(200, 150, (64, 32, 32)))
    np.testing.assert_allclose(face.box, [64, 32, 32, 32], atol=1e-3)
    np.testing.assert_allclose(face.points, [64, 32] + 32 * CELL_POINTS, atol=1e-3)
    assert face.score == pytest.approx(1, abs=1e-3)


def test_several_faces_are_all_reported(network: Path) -> None:
    faces = YuNet([network]).detect(squares(200, 150, (0, 0, 32), (128, 96, 32)))
    assert sorted(face.box[0].item() for face in faces) == pytest.approx([0, 128], abs=1e-3)


def test_points_of_a_large_photograph_are_mapped_back(network: Path) -> None:
    """2400 px is searched at 600; the 128 px square is the network's 32 px cell there."""
    detector = YuNet([network], search_px=(600,))
    (face,) = detector.detect(squares(2400, 1201, (512, 256, 128)))
    np.testing.assert_allclose(face.box, [512, 256, 128, 128], rtol=2e-3)
    np.testing.assert_allclose(face.points, [512, 256] + 128 * CELL_POINTS, rtol=2e-3)


def test_a_face_too_small_at_first_is_found_at_more_detail(network: Path) -> None:
    image = squares(1280, 640, (320, 320, 32))
    (face,) = YuNet([network], search_px=(320, 1280)).detect(image)
    np.testing.assert_allclose(face.box, [320, 320, 32, 32], atol=1e-2)
    assert YuNet([network], search_px=(320,)).detect(image) == []


def test_points_are_measured_again_closer_up(network: Path) -> None:
    """At 640 px the 40 px square fills a 32 px cell; at full size the cell is its upper left part."""
    (face,) = YuNet([network], search_px=(640,)).detect(squares(800, 800, (0, 0, 40)))
    np.testing.assert_allclose(face.box, [0, 0, 32, 32], atol=1e-2)
    np.testing.assert_allclose(face.points, 32 * CELL_POINTS, atol=1e-2)
    (unshrunk,) = YuNet([network], search_px=(800,)).detect(squares(800, 800, (0, 0, 32)))
    np.testing.assert_allclose(unshrunk.points, 32 * CELL_POINTS, atol=1e-2)


def test_a_second_look_that_finds_another_face_does_not_count(network: Path) -> None:
    """At full size the cells of the 128 px square are all faces of their own to this network: a quarter of its side."""
    (face,) = YuNet([network], search_px=(600,)).detect(squares(2400, 1200, (512, 256, 128)))
    np.testing.assert_allclose(face.box, [512, 256, 128, 128], rtol=2e-3)


def test_a_doubtful_face_is_reported_with_its_score(network: Path) -> None:
    (face,) = YuNet([network], min_score=0.9).detect(squares(200, 150, (64, 32, 32), level=128))
    assert face.score == pytest.approx(0.5, abs=0.02)


def test_a_file_for_one_size_gets_a_letterbox(fixed_network: Path) -> None:
    detector = YuNet([fixed_network])
    assert detector.fixed_px == 320
    (small,) = detector.detect(squares(200, 150, (64, 32, 32)))
    np.testing.assert_allclose(small.box, [64, 32, 32, 32], atol=1e-3)
    (large,) = detector.detect(squares(1280, 960, (512, 256, 128)))
    np.testing.assert_allclose(large.points, [512, 256] + 128 * CELL_POINTS, rtol=1e-3)


def test_what_is_not_a_network_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(UserError, match=r"bad\.onnx.*models pull yunet"):
        YuNet([tmp_path / "bad.onnx"])


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["yunet_n_dynamic.onnx", "yunet_n_320_320.onnx", "yunet_n_640_640.onnx"])
def test_real_weights_find_the_faces_of_a_photograph(shared_data: Path, name: str) -> None:
    from visard.align.photographs import decode

    image = decode((shared_data / "photos" / "t1.jpg").read_bytes())
    faces = [face for face in YuNet([shared_data / "models" / name]).detect(image) if face.score >= 0.6]
    assert len(faces) == 6
    for face in faces:
        left_eye, right_eye, nose, left_mouth, right_mouth = face.points
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])
