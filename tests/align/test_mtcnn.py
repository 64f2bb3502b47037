"""MTCNN without its weights: the networks' layout, suppression against a plain one, places through the whole cascade.

In the cascade's tests the three networks are replaced by functions that see a face where a square is bright, so that
any mistake of shift, scale or order in pyramid, boxes, pieces or points shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.align.photos import CELL_POINTS, squares
from visard.align.mtcnn import MTCNN, ONet, PNet, RNet, cut_out, nms
from visard.errors import FormatError

LAYOUT = {
    PNet: {
        "conv1.weight": (10, 3, 3, 3),
        "prelu3.weight": (32,),
        "conv4_1.weight": (2, 32, 1, 1),
        "conv4_2.bias": (4,),
    },
    RNet: {
        "conv3.weight": (64, 48, 2, 2),
        "dense4.weight": (128, 576),
        "dense5_1.weight": (2, 128),
        "dense5_2.bias": (4,),
    },
    ONet: {
        "conv4.weight": (128, 64, 2, 2),
        "dense5.weight": (256, 1152),
        "dense6_3.weight": (10, 256),
        "prelu5.weight": (256,),
    },
}
PARAMETERS = {PNet: 6_632, RNet: 100_178, ONet: 389_040}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    paths = []
    for name, network in (("pnet", PNet()), ("rnet", RNet()), ("onet", ONet())):
        paths.append(tmp_path / f"{name}.pt")
        torch.save(network.state_dict(), paths[-1])
    return paths


@pytest.mark.parametrize("network", [PNet, RNet, ONet])
def test_names_and_shapes_are_facenet_pytorchs(network: type[torch.nn.Module]) -> None:
    state = network().state_dict()
    for name, shape in LAYOUT[network].items():
        assert tuple(state[name].shape) == shape
    assert sum(value.numel() for value in state.values()) == PARAMETERS[network]


def test_networks_give_a_probability_for_every_place() -> None:
    with torch.no_grad():
        probability, correction = PNet()(torch.zeros(1, 3, 30, 40))
        assert probability.shape == (1, 10, 15)
        assert correction.shape == (1, 4, 10, 15)
        assert [tuple(x.shape) for x in RNet()(torch.zeros(3, 3, 24, 24))] == [(3,), (3, 4)]
        assert [tuple(x.shape) for x in ONet()(torch.zeros(3, 3, 48, 48))] == [(3,), (3, 4), (3, 10)]


def test_dense_layers_read_columns_first() -> None:
    """The authors' order: a weight at flat index (x * 3 + y) * 64 + channel sees that place of the 3 x 3 map."""
    network = RNet()
    seen = {}
    network.dense4.register_forward_pre_hook(lambda module, inputs: seen.update(flat=inputs[0]))
    network.prelu3.register_forward_hook(lambda module, inputs, output: seen.update(map=output))
    with torch.no_grad():
        network(torch.randn(1, 3, 24, 24))
    y, x, channel = 0, 2, 5
    assert seen["map"].shape == (1, 64, 3, 3)
    assert seen["flat"][0, (x * 3 + y) * 64 + channel] == seen["map"][0, channel, y, x]


def test_suppression_equals_the_plain_definition() -> None:
    random = np.random.default_rng(1)
    corner = random.random((60, 2)) * 60
    boxes = np.concatenate([corner, corner + 5 + 30 * random.random((60, 2))], axis=1)
    scores = random.random(60)

    def overlap(a: np.ndarray, b: np.ndarray, of_smaller: bool) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return width * height / (min(areas) if of_smaller else sum(areas) - width * height)

    for of_smaller in (False, True):
        kept: list[int] = []
        for k in np.argsort(-scores):
            if all(overlap(boxes[k], boxes[other], of_smaller) <= 0.4 for other in kept):
                kept.append(int(k))
        assert nms(boxes, scores, 0.4, of_smaller=of_smaller).tolist() == kept
        assert len(kept) < 60
    assert nms(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def test_pieces_are_cut_out_with_black_beyond_the_border() -> None:
    image = np.full((40, 40, 3), 200, dtype=np.uint8)
    image[:, 20:] = 100
    inside, outside, beyond = cut_out(image, np.array([[8, 4, 32, 28], [-12, 28, 12, 52], [50, 50, 60, 60]]), 24)
    np.testing.assert_array_equal(inside, image[4:28, 8:32])
    assert (outside[:12, 12:] == 200).all()
    assert (outside[:, :12] == 0).all()
    assert (outside[12:] == 0).all()
    assert (beyond == 0).all()


def see_bright_squares(detector: MTCNN) -> MTCNN:
    """Replaces the networks: a face is a bright square in a dark rim of a quarter of its side."""

    def contrast(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
        grey, rim = (x.mean(dim=1, keepdim=True) + 1) / 2, size // 6
        whole = functional.avg_pool2d(grey, size, stride)
        inner = functional.avg_pool2d(grey[..., rim:-rim, rim:-rim], size - 2 * rim, stride)
        share = (size - 2 * rim) ** 2 / size**2
        return (inner - (whole - share * inner) / (1 - share))[:, 0]

    def proposal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probability = contrast(x, 12, 2)
        return probability, torch.zeros(len(x), 4, *probability.shape[1:])

    points = torch.tensor(CELL_POINTS.T.ravel(), dtype=torch.float32)
    detector.pnet = proposal
    detector.rnet = lambda x: (contrast(x, 24, 1)[:, 0, 0], torch.zeros(len(x), 4))
    detector.onet = lambda x: (contrast(x, 48, 1)[:, 0, 0], torch.zeros(len(x), 4), points.repeat(len(x), 1))
    return detector


@pytest.mark.parametrize(("x", "y", "side"), [(60, 40, 48), (4, 3, 40), (101, 77, 33)])
def test_a_face_is_found_where_it_is(files: list[Path], x: int, y: int, side: int) -> None:
    detector = see_bright_squares(MTCNN(*files, thresholds=(0.4, 0.4, 0.4)))
    best = max(detector.detect(squares(200, 150, (x, y, side))), key=lambda face: face.score)
    centre = best.box[:2] + best.box[2:] / 2
    # P-Net's steps of two pixels in a shrunk copy are the limit, as nothing corrects the boxes here.
    np.testing.assert_allclose(centre, [x + side / 2, y + side / 2], atol=0.13 * side)
    np.testing.assert_allclose(best.box[2:], 1.5 * side, rtol=0.2)
    np.testing.assert_allclose(best.points, best.box[:2] + best.box[2:] * CELL_POINTS, atol=1e-3)
    assert best.score > 0.5


def test_points_of_a_large_photograph_are_mapped_back(files: list[Path]) -> None:
    detector = see_bright_squares(MTCNN(*files, search_px=300, thresholds=(0.4, 0.4, 0.4)))
    best = max(detector.detect(squares(1200, 900, (400, 240, 200))), key=lambda face: face.score)
    np.testing.assert_allclose(best.box[:2] + best.box[2:] / 2, [500, 340], atol=26)
    np.testing.assert_allclose(best.points, best.box[:2] + best.box[2:] * CELL_POINTS, atol=1e-2)


def test_two_faces_and_none(files: list[Path]) -> None:
    detector = see_bright_squares(MTCNN(*files, thresholds=(0.4, 0.4, 0.4)))
    faces = detector.detect(squares(300, 150, (20, 40, 48), (200, 60, 48)))
    assert {face.box[0] > 150 for face in faces} == {True, False}
    assert detector.detect(squares(300, 150)) == []
    assert detector.detect(squares(10, 8, (0, 0, 8))) == []  # smaller than the smallest face


def test_what_is_not_weights_is_named(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"broken\.pt.*models pull mtcnn"):
        MTCNN(files[0], tmp_path / "broken.pt", files[2])
    with pytest.raises(FormatError, match=r"pnet\.pt.*not MTCNN weights"):
        MTCNN(files[0], files[0], files[2])


@pytest.mark.real_data
def test_real_weights_agree_with_yunet(shared_data: Path) -> None:
    """Both detectors on a photograph of six people: the same faces, points near in units of the eyes' distance."""
    from visard.align.photographs import decode
    from visard.align.yunet import YuNet

    models = shared_data / "models"
    image = decode((shared_data / "photos" / "t1.jpg").read_bytes())
    ours = [face for face in MTCNN(*(models / f"{n}net.pt" for n in "pro")).detect(image) if face.score > 0.9]
    theirs = [face for face in YuNet([models / "yunet_n_dynamic.onnx"]).detect(image) if face.score > 0.6]
    assert len(ours) == len(theirs) == 6
    distances = []
    for face in ours:
        nearest = min(theirs, key=lambda other: float(np.abs(other.points - face.points).sum()))
        eyes = np.linalg.norm(nearest.points[1] - nearest.points[0])
        distances.append(np.abs(nearest.points - face.points).mean() / eyes)
    assert max(distances) < 0.3  # two look to the side, where the detectors differ most
    assert np.median(distances) < 0.12
