"""The same batches from any number of workers and after any resume; the fast path equals the slow one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from visard.config import DataConfig
from visard.data.dataset import FaceDataset, open_dataset
from visard.data.loader import Loader, batches
from visard.data.sampler import EpochSampler
from visard.data.transforms import Sample, mirror_points
from visard.data.writer import DatasetWriter
from visard.errors import FormatError
from visard.records import Batch

S, N = 20, 41


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "set"
    rng = np.random.default_rng(0)
    with DatasetWriter(path, S, {}) as writing:
        for i in range(N):
            image = cv2.resize(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), (S, S))
            jpeg = cv2.imencode(".jpg", image)[1].tobytes()
            points = rng.uniform(0, S - 1, (5, 2)).astype(np.float32) if i % 3 else None
            writing.add(f"p{i // 5}/{i}.jpg", f"p{i // 5}", jpeg, points)
    return path


def config(**changes: object) -> DataConfig:
    return replace(DataConfig(size=S), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Noise:
    """An augmentation that shows which random numbers it was given."""

    strength: float = 20.0

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        noise = generator.normal(0, self.strength, sample.image.shape)
        image = np.clip(sample.image + noise, 0, 255).astype(np.uint8)
        points = None if sample.points is None else sample.points + np.float32(1)
        return Sample(image, points, sample.label, sample.id, sample.flipped)


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.flipped, b.flipped)
        assert (a.points is None) == (b.points is None)
        if a.points is not None and b.points is not None:
            torch.testing.assert_close(a.points, b.points, rtol=0, atol=0, equal_nan=True)


def epochs(loader: Loader, count: int) -> list[Batch]:
    return [batch for _ in range(count) for batch in loader]


def test_a_batch_is_what_the_data_set_holds(source: Path) -> None:
    data = open_dataset(source)
    index = {image_id: i for i, image_id in enumerate(data.ids)}
    loader = Loader(data, config(), EpochSampler(N, 8, 1))
    assert len(loader) == 5
    seen = []
    flips = 0
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, S, S, 3)
        assert batch.labels.dtype == torch.int64
        assert batch.points is not None
        for i, image_id in enumerate(batch.ids):
            seen.append(image_id)
            at = index[image_id]
            image, points = data.image(at), data.points(at)
            if batch.flipped[i]:
                flips += 1
                image, points = image[:, ::-1], None if points is None else mirror_points(points, S)
            assert (batch.images[i].numpy() == image).all()
            assert batch.labels[i] == data.labels[at]
            if points is None:
                assert batch.points[i].isnan().all()
            else:
                assert (batch.points[i].numpy() == points).all()
    assert len(set(seen)) == len(seen) == 40
    assert 5 < flips < 35


@pytest.mark.parametrize("augment", [None, Noise()])
def test_any_number_of_workers_gives_the_same_batches(source: Path, augment: Noise | None) -> None:
    data = open_dataset(source)
    expected = epochs(Loader(data, config(), EpochSampler(N, 8, 1), augment), 2)
    assert {batch.ids for batch in expected[:5]} != {batch.ids for batch in expected[5:]}
    for workers in (1, 2):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # on a machine of one core
            loader = Loader(data, config(workers=workers), EpochSampler(N, 8, 1), augment)
            assert_same(epochs(loader, 2), expected)


def test_an_augmentation_depends_on_the_image_and_not_on_its_batch(source: Path) -> None:
    data = open_dataset(source)
    alone = {b.ids[0]: b for b in Loader(data, config(), EpochSampler(N, 1, 1), Noise())}
    without = {b.ids[0]: b for b in Loader(data, config(), EpochSampler(N, 1, 1))}
    for batch in Loader(data, config(), EpochSampler(N, 8, 1), Noise()):
        for i, image_id in enumerate(batch.ids):
            assert torch.equal(batch.images[i], alone[image_id].images[0])
            assert not torch.equal(batch.images[i], without[image_id].images[0])


def test_augmented_points_are_kept(source: Path) -> None:
    data = open_dataset(source)
    plain = next(iter(Loader(data, config(), EpochSampler(N, N, 1))))
    moved = next(iter(Loader(data, config(), EpochSampler(N, N, 1), Noise())))
    assert plain.points is not None
    assert moved.points is not None
    torch.testing.assert_close(moved.points, plain.points + 1, equal_nan=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [0, 2, 5, 7])
def test_resume_equals_an_unbroken_run(source: Path, workers: int, taken: int) -> None:
    data = open_dataset(source)
    unbroken = epochs(Loader(data, config(), EpochSampler(N, 8, 1), Noise()), 3)
    first = Loader(data, config(), EpochSampler(N, 8, 1), Noise())
    states = [first.sampler.state_dict()] + [first.sampler.state_dict() for _ in range(2) for _ in first]
    sampler = EpochSampler(N, 8, 1)
    sampler.load_state_dict(states[taken])
    resumed = Loader(data, config(workers=workers), sampler, Noise())
    rest: list[Batch] = []
    while len(rest) < 15 - taken:
        rest += list(resumed)
    assert_same(rest, unbroken[taken:])


def test_ranks_together_load_what_one_loads(source: Path) -> None:
    data = open_dataset(source)
    expected = list(Loader(data, config(), EpochSampler(N, 8, 1)))
    shares = [list(Loader(data, config(), EpochSampler(N, 8, 1, rank, 3))) for rank in range(3)]
    for step, batch in enumerate(expected):
        assert sum((share[step].ids for share in shares), ()) == batch.ids
        assert torch.equal(torch.cat([share[step].images for share in shares]), batch.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_that_is_left_is_taken_up_where_it_was(source: Path, workers: int) -> None:
    data = open_dataset(source)
    expected = epochs(Loader(data, config(), EpochSampler(N, 8, 1)), 2)
    loader = Loader(data, config(workers=workers), EpochSampler(N, 8, 1))
    got = []
    while len(got) < 10:
        for batch in loader:
            got.append(batch)
            if len(got) % 3 == 0:
                break
    assert_same(got, expected)


class Counting:
    """A data set that remembers which images were asked for."""

    def __init__(self, data: FaceDataset) -> None:
        self.ids, self.labels, self.identities, self.size = data.ids, data.labels, data.identities, data.size
        self.data, self.asked = data, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.data)

    def image(self, index: int) -> np.ndarray:
        self.asked.append(index)
        return self.data.image(index)

    def points(self, index: int) -> np.ndarray | None:
        return None


def test_resume_decodes_nothing_that_was_used(source: Path) -> None:
    data = Counting(open_dataset(source))
    sampler = EpochSampler(N, 8, 1)
    sampler.load_state_dict({**sampler.state_dict(), "step": 4})
    (batch,) = Loader(data, config(), sampler)
    assert len(batch) == 8
    assert batch.points is None
    assert sorted(data.asked) == sorted(sampler.batch(0, 4).tolist())


def test_loading_runs_ahead_by_a_bounded_number_of_batches(source: Path) -> None:
    data = Counting(open_dataset(source))
    iterator = iter(Loader(data, config(), EpochSampler(N, 2, 1)))
    for _ in range(3):
        next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert len(data.asked) <= 2 * (3 + 2)


class Batched(Counting):
    """The same crops, made many at once."""

    def image(self, index: int) -> np.ndarray:
        raise AssertionError("the fast path was there")

    def images(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.data.image(int(i)) for i in indices])


def test_the_fast_path_of_a_data_set_gives_the_same(source: Path) -> None:
    data = open_dataset(source)
    slow = epochs(Loader(Counting(data), config(), EpochSampler(N, 8, 1), Noise()), 1)
    fast = epochs(Loader(Batched(data), config(), EpochSampler(N, 8, 1), Noise()), 1)
    assert_same(fast, slow)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(source: Path, workers: int) -> None:
    torch.manual_seed(0)
    np_state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    before = torch.get_rng_state()
    epochs(Loader(open_dataset(source), config(workers=workers), EpochSampler(N, 8, 1), Noise()), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_state).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_from_any_process(tmp_path: Path, workers: int) -> None:
    with DatasetWriter(tmp_path / "set", S, {}) as writing:
        for i in range(4):
            writing.add(f"{i}", "p", b"\xff\xd8 not an image")
    loader = Loader(open_dataset(tmp_path / "set"), config(workers=workers), EpochSampler(4, 2, 1))
    with pytest.raises(FormatError, match=r"train\.rec at byte \d+: is not an image") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_batches_for_evaluation_are_in_order_and_complete(source: Path) -> None:
    data = open_dataset(source)
    got = list(batches(data, 16))
    assert [len(batch) for batch in got] == [16, 16, 9]
    assert sum((batch.ids for batch in got), ()) == tuple(data.ids)
    assert torch.cat([batch.labels for batch in got]).tolist() == data.labels.tolist()
    assert not torch.cat([batch.flipped for batch in got]).any()
    assert (torch.cat([batch.images for batch in got])[17].numpy() == data.image(17)).all()


def test_a_process_that_still_holds_its_workers_ends(tmp_path: Path) -> None:
    """Workers stay for the training's last save, but must not keep the process itself from ending."""
    script = tmp_path / "hold.py"
    script.write_text(
        "from visard.config import DataConfig\n"
        "from visard.data.dataset import open_dataset\n"
        "from visard.data.loader import Loader\n"
        "from visard.data.sampler import EpochSampler\n"
        "if __name__ == '__main__':\n"
        "    faces = open_dataset('rendered:4x4', size=32)\n"
        "    held = Loader(faces, DataConfig(workers=1, size=32), EpochSampler(16, 4, 0))\n"
        "    walk = iter(held)\n"
        "    print(len(next(walk).ids))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"
