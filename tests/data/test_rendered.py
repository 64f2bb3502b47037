"""Rendered faces: the same for ever, the same in any batch, true landmarks, and the data set's interface."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from visard.data.faces3d import camera, head, scene
from visard.data.faces3d.latents import Latents, uniforms
from visard.data.faces3d.scene import render_crops
from visard.data.rendered import RenderedConfig, RenderedFaces
from visard.errors import UserError
from visard.functional.geometry import pose, template

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rendered.py"
# Grey levels by which a picture may differ from device to device and batch to batch.
TOLERANCE = 2


def difference(a, b):
    return np.abs(a.astype(np.int64) - b.astype(np.int64))


@pytest.fixture(scope="module")
def faces():
    return RenderedFaces(identities=8, images_per_identity=4, size=112)


@pytest.fixture(scope="module")
def rendering(faces):
    return faces.render(np.arange(32))


def test_random_numbers_are_these_for_ever():
    numbers = uniforms(3, np.array([0, 7, 1_000_000]), np.array([0, 2, 19]), np.array([0, 1, 4096]))
    expected = [
        [0.0724205, 0.93060428, 0.94571262],
        [0.72810295, 0.32231563, 0.71392837],
        [0.89472244, 0.8303009, 0.84664194],
    ]
    np.testing.assert_allclose(numbers, expected, atol=1e-8)


def test_random_numbers_are_uniform_and_unrelated():
    numbers = uniforms(0, np.arange(2000), np.zeros(2000, np.int64), np.arange(40))
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.001
    correlation = np.corrcoef(numbers.T) - np.eye(40)
    assert np.abs(correlation).max() < 0.1
    neighbours = np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.01


def test_pictures_are_these_for_ever(faces):
    """Mean grey level of 3 x 3 blocks of two pictures, within the promised tolerance."""
    pictures = faces.images([0, 21])[:, :111, :111].astype(np.float64)
    blocks = pictures.reshape(2, 3, 37, 3, 37, 3).mean((2, 4, 5))
    np.testing.assert_allclose(blocks, GOLDEN_BLOCKS, atol=TOLERANCE)


def test_a_picture_does_not_depend_on_its_batch(faces, rendering):
    together = rendering.images.numpy()
    alone = np.concatenate([faces.images([k]) for k in range(32)])
    assert difference(together, alone).max() <= TOLERANCE
    order = np.random.default_rng(0).permutation(32)
    assert difference(together[order], faces.images(order)).max() <= TOLERANCE
    assert difference(together[5], faces.image(5)).max() <= TOLERANCE


def test_single_precision_shows_the_same_picture(faces, rendering):
    """Devices without float64: a vertex may fall to the other side of a sixteenth of a pixel, so a few pixels may
    differ."""
    index = np.arange(8)
    single = Latents(0, index // 4, index % 4, torch.device("cpu"), torch.float32)
    off = difference(render_crops(single, 112).images.numpy(), rendering.images[:8].numpy())
    assert (off <= TOLERANCE).mean() > 0.999
    assert off.mean() < 0.05


@pytest.mark.gpu
def test_a_gpu_shows_the_same_pictures(rendering):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    other = RenderedFaces(identities=8, images_per_identity=4, size=112, device="cuda").images(np.arange(32))
    assert difference(rendering.images.numpy(), other).max() <= TOLERANCE


def test_the_shape_of_a_head_adds_up_exactly():
    """float32 gives what float64 gives, bit for bit: vertices cannot differ from device to device."""
    latents = RenderedFaces(identities=500, images_per_identity=2).latents(np.arange(1000))
    weights = head._weights(latents, latents.uniform("gender"))
    _, fields = head._fields(torch.device("cpu"), torch.float64)
    assert torch.equal((weights.float() @ fields).double(), weights @ fields.double())
    # Whatever the order, no partial sum of theirs exceeds this.
    most = (weights.abs().amax(0) @ fields.double().abs()).max()
    assert most < 2**24 * head.FIELD_STEP * head.WEIGHT_STEP


@pytest.mark.parametrize("size", [16, 56, 112, 150])
def test_reduction_is_a_gaussian_blur_of_linear_colours(size):
    side = round(size * 1.25)
    picture = torch.rand(camera.BLURS, 3, side, side, generator=torch.Generator().manual_seed(size))
    ours = camera.reduce(picture, torch.arange(camera.BLURS), size, 1.25)
    place = (torch.arange(size).double() + 0.5) * 1.25 - 0.5
    for k, (image, reduced) in enumerate(zip(picture, ours, strict=True)):
        blur = (k / (camera.BLURS - 1)) ** 3 * camera.WORST_BLUR * size / 112
        deviation = 1.25 * (blur**2 + 0.42**2) ** 0.5
        weights = torch.exp(-0.5 * ((torch.arange(side) - place[:, None]) / deviation) ** 2)
        weights = (weights / weights.sum(1, keepdim=True)).float()
        torch.testing.assert_close(reduced, weights @ image @ weights.T, atol=0.004, rtol=0)


def test_backdrop_lies_where_nobody_is(faces):
    """What the raster leaves to the background shows the backdrop, stretched."""
    latents = faces.latents(np.arange(8))
    stand, side = scene.take_stand(latents), 140
    shrunk = torch.tensor([[[0.1, 0, 70], [0, 0.1, 70]]], dtype=torch.float64).expand(8, 2, 3)
    backdrop = camera.backdrop(latents, side)
    drawn = scene.draw(latents, stand, shrunk, backdrop, side)
    uncovered = (drawn.raster.triangle < 0)[:, None].expand(-1, 3, -1, -1)
    assert 0.5 < uncovered.float().mean() < 1
    alone = camera.stretch_backdrop(backdrop, side)
    torch.testing.assert_close(drawn.linear[uncovered], alone[uncovered], atol=1e-4, rtol=0)


def test_jpeg_does_not_amplify_the_last_digits():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(4, 3, 112, 112, generator=generator) * 255
    quality = torch.tensor([30.0, 50.0, 75.0, 97.0])
    nudge = 1e-3 * torch.randn(picture.shape, generator=generator)
    off = camera.jpeg(picture + nudge, quality).round() - camera.jpeg(picture, quality).round()
    assert off.abs().max() <= TOLERANCE


def test_jpeg_resembles_the_real_one(rendering):
    import cv2

    pictures = rendering.images[:6]
    planes = pictures.permute(0, 3, 1, 2).float()
    for quality in (40, 75, 95):
        ours = camera.jpeg(planes, torch.full((6,), float(quality))).round().permute(0, 2, 3, 1).numpy()
        for mine, picture in zip(ours, pictures.numpy(), strict=True):
            data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            real = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
            lost = difference(real, picture).mean()
            assert difference(mine, real).mean() < 0.35 * lost + 0.5


def test_interface(faces):
    assert len(faces) == 32
    assert faces.labels.tolist() == [k // 4 for k in range(32)]
    assert faces.labels.dtype == np.int64
    assert list(faces.identities) == [f"{k:07d}" for k in range(8)]
    assert faces.ids[0] == "0000000/0000"
    assert faces.ids[31] == faces.ids[-1] == "0000007/0003"
    assert len(set(faces.ids)) == 32
    image, points = faces.image(6), faces.points(6)
    assert image.shape == (112, 112, 3)
    assert image.dtype == np.uint8
    assert points.shape == (5, 2)
    assert points.dtype == np.float32


def test_loader_sees_a_data_set_that_makes_batches(faces):
    from visard.data.dataset import BatchedDataset, open_dataset

    assert isinstance(faces, BatchedDataset)
    opened = open_dataset("rendered:8x4,seed=0", size=112)
    assert list(opened.ids) == list(faces.ids)
    np.testing.assert_array_equal(opened.points(9), faces.points(9))


def test_points_are_those_of_the_picture(faces, rendering):
    np.testing.assert_allclose(faces.all_points(np.arange(32)), rendering.points.numpy(), atol=1e-4)


@pytest.mark.parametrize("size", [56, 64, 224])
def test_other_sizes_show_the_same_person(faces, rendering, size):
    import cv2

    other = RenderedFaces(identities=8, images_per_identity=4, size=size)
    scale = size / 112
    expected = (rendering.points[:4].numpy() + 0.5) * scale - 0.5
    assert np.abs(other.all_points(np.arange(4)) - expected).max() < 1.2 * max(scale, 1)
    small = [cv2.resize(p, (28, 28), interpolation=cv2.INTER_AREA) for p in other.images(np.arange(4))]
    same = [cv2.resize(p, (28, 28), interpolation=cv2.INTER_AREA) for p in rendering.images[:4].numpy()]
    assert difference(np.stack(small), np.stack(same)).mean() < 8


def test_ranges_of_identities_are_windows_on_one_population():
    late = RenderedFaces(identities=2, images_per_identity=4, first_identity=6)
    whole = RenderedFaces(identities=8, images_per_identity=4)
    assert difference(late.images([1, 6]), whole.images([25, 30])).max() <= TOLERANCE
    assert late.ids[1] == whole.ids[25]
    other_seed = RenderedFaces(identities=8, images_per_identity=4, seed=1)
    assert difference(other_seed.image(0), whole.image(0)).mean() > 10


def test_a_million_identities_cost_nothing_until_asked():
    data = RenderedFaces(identities=1_000_000, images_per_identity=20)
    assert len(data) == 20_000_000
    assert data.ids[19_999_999] == "0999999/0019"
    assert data.image(19_999_999).shape == (112, 112, 3)
    assert data.labels[-1] == 999_999
    assert len(pickle.dumps(data)) < 2000
    assert pickle.loads(pickle.dumps(data)).ids[5] == data.ids[5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"identities": 0}, "identities is 0"),
        ({"size": 8}, "size is 8"),
        ({"first_identity": -1}, "first_identity is -1"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        RenderedConfig(**settings)


def test_indices_beyond_the_data_set_are_refused(faces):
    with pytest.raises(IndexError, match="0 to 31"):
        faces.images([32])


def test_landmarks_lie_near_the_template(rendering):
    """Frontal faces differ from the template by their shape and by the detector's error that is played, not by more."""
    frontal = rendering.pose[:, 0].abs() < 0.3
    off = (rendering.points[frontal] - torch.from_numpy(template(112)).float()).norm(dim=2)
    assert off.mean() < 4
    assert rendering.dense.shape == (32, 68, 2)
    # Eye centres lie between the corners and lids of the dense points, mouth corners coincide with them.
    eyes = torch.stack([rendering.dense[:, 36:42].mean(1), rendering.dense[:, 42:48].mean(1)], 1)
    assert (eyes - rendering.points[:, :2]).norm(dim=2).max() < 3
    torch.testing.assert_close(rendering.dense[:, [48, 54]], rendering.points[:, 3:], atol=0.1, rtol=0)


def test_pose_is_the_pose_that_landmarks_show():
    data = RenderedFaces(identities=60, images_per_identity=1)
    shots = data.photographs(np.arange(60))
    guess = np.array([pose(p) for p in shots.points[:, 0].numpy()])
    true = shots.pose[:, 0].numpy()
    assert np.corrcoef(guess[:, 0], true[:, 0])[0, 1] > 0.95
    assert np.corrcoef(guess[:, 1], true[:, 1])[0, 1] > 0.5
    assert np.corrcoef(guess[:, 2], true[:, 2])[0, 1] > 0.8
    assert np.abs(np.degrees(true[:, 0])).max() <= 60


def test_surface_is_the_ground_truth(faces, rendering):
    rows, columns = rendering.vertices.shape[1:3]
    assert rendering.depth.shape == rendering.visible.shape == (32, rows, columns)
    assert rendering.lower_face.shape == (32, 112, 112)
    middle = columns // 2
    profile = rendering.vertices[:, :, middle]
    # The middle line runs from the crown down to the chest.
    assert (profile[:, 1:, 1] - profile[:, :-1, 1]).median() > 0
    frontal = rendering.pose[:, 0].abs() < 0.25
    # In frontal pictures the nose tip is seen, nearer than the ears' places, and nobody sees the back of the head.
    tip = rendering.points[:, 2]
    nearest = (rendering.vertices - tip[:, None, None]).norm(dim=3).flatten(1).argmin(1)
    assert rendering.visible.flatten(1).gather(1, nearest[:, None])[frontal].float().mean() > 0.9
    assert not rendering.visible[frontal][:, :, [0, -1]].any()
    for k in torch.nonzero(frontal)[:, 0].tolist():
        x, y = rendering.points[k, 3:].mean(0).round().long().tolist()
        assert rendering.lower_face[k, y, x]
        for eye in rendering.points[k, :2].round().long().tolist():
            assert not rendering.lower_face[k, eye[1], eye[0]]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_photographs_show_so_many_faces(faces, count):
    shots = faces.photographs(np.arange(8), 192, faces=count)
    assert shots.images.shape == (8, 192, 192, 3)
    assert shots.points.shape == (8, count, 5, 2)
    assert shots.pose.shape == (8, count, 3)
    if count:
        assert shots.points[:, 0].min() > 0
        assert shots.points[:, 0].max() < 191
        np.testing.assert_allclose(shots.points[:, 0].numpy(), faces.photograph_points(np.arange(8), 192), atol=1e-4)
    if count == 2:
        eyes = (shots.points[:, :, 1] - shots.points[:, :, 0]).norm(dim=2)
        tall = (shots.points[:, :, :2].mean(2) - shots.points[:, :, 3:].mean(2)).norm(dim=2)
        assert (torch.maximum(eyes, tall)[:, 0] > torch.maximum(eyes, tall)[:, 1]).all()


@pytest.mark.real_data
def test_a_detector_finds_rendered_people(shared_data):
    """YuNet, trained on photographs, finds at least nine of ten frontal faces, and their points where they are."""
    import cv2

    detector = cv2.FaceDetectorYN.create(str(shared_data / "models" / "yunet_n_dynamic.onnx"), "", (256, 256), 0.6)
    data = RenderedFaces(identities=60, images_per_identity=2)
    shots = data.photographs(np.arange(120))
    found, errors = [], []
    for image, points, angles in zip(shots.images.numpy(), shots.points[:, 0].numpy(), shots.pose[:, 0], strict=True):
        if abs(float(angles[0])) > np.radians(25):
            continue
        _, faces = detector.detect(np.ascontiguousarray(image[..., ::-1]))
        size = np.linalg.norm(points[:2].mean(0) - points[3:].mean(0))
        errors_here = (
            []
            if faces is None
            else [np.linalg.norm(f[4:14].reshape(5, 2) - points, axis=1).mean() / size for f in faces]
        )
        found.append(min(errors_here, default=1.0) < 0.4)
        if found[-1]:
            errors.append(min(errors_here))
    assert len(found) >= 50
    assert np.mean(found) >= 0.9
    assert np.median(errors) < 0.15


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("rendered_bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def strangers(bench):
    """Images and labels of 100 people, 10 images each, that no training sees."""
    data = RenderedFaces(bench.TEST_PEOPLE, bench.TEST_IMAGES, size=56, first_identity=bench.TEST_FIRST)
    return data.images(np.arange(len(data))), data.labels


# What was measured is in docs/rendered.md; there is room for two to four percent above and below.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rank1", "pairs"),
    [
        ("pixels", (0.11, 0.18), (0.54, 0.60)),
        ("colours", (0.02, 0.08), (0.64, 0.70)),
        ("hair", (0.09, 0.15), (0.58, 0.64)),
    ],
)
def test_nothing_that_needs_no_learning_tells_people_apart(bench, strangers, method, rank1, pairs):
    images, labels = strangers
    score = bench.hardness(getattr(bench, method)(images), labels)
    assert rank1[0] < score["rank1"] < rank1[1]
    assert pairs[0] < score["pairs"] < pairs[1]


@pytest.mark.slow
def test_a_small_network_learns_what_makes_a_person(bench, strangers):
    """Briefly trained on other people it is far above every way of comparing that learns nothing."""
    images, labels = strangers
    score = bench.hardness(bench.train_network(200, 56, steps=120)(images), labels)
    assert score["rank1"] > 0.2
    assert score["pairs"] > 0.74


GOLDEN_BLOCKS = [
    [[72.5, 70.5, 66.2], [53.6, 83.7, 95.7], [47.4, 70.6, 98.3]],
    [[130.8, 114.1, 112.7], [130.7, 118.0, 110.2], [132.7, 100.8, 110.8]],
]
