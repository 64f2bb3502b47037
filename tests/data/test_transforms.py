"""Randomness that depends on (seed, epoch, id) alone, and mirrors that keep left and right apart."""

from __future__ import annotations

import numpy as np
import pytest

from visard.data.transforms import Sample, SampleRandom, id_keys, mirror, mirror_points, scramble, scramble_array

IDS = [f"person{i // 7}/{i}.jpg" for i in range(4000)]


def test_scramble_is_splitmix64() -> None:
    """The first three outputs of the published generator started at 0."""
    golden = 0x9E3779B97F4A7C15
    outputs = [scramble(k * golden & (1 << 64) - 1) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    values = np.array([0, 1, 12345, 2**63, 2**64 - 1], np.uint64)
    assert scramble_array(values).tolist() == [scramble(v) for v in values.tolist()]


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_flips_come_at_their_rate(probability: float) -> None:
    rate = SampleRandom(0, 0).flips(IDS, probability).mean()
    assert abs(rate - probability) <= 4 * np.sqrt(probability * (1 - probability) / len(IDS))


def test_a_flip_depends_on_seed_epoch_and_id_alone() -> None:
    flips = SampleRandom(3, 5).flips(IDS, 0.5)
    assert (SampleRandom(3, 5).flips(IDS[::-1], 0.5)[::-1] == flips).all()
    assert [bool(SampleRandom(3, 5).flips([i], 0.5)[0]) for i in IDS[:50]] == flips[:50].tolist()
    for other in (SampleRandom(4, 5), SampleRandom(3, 6), SampleRandom(5, 3)):
        agree = (other.flips(IDS, 0.5) == flips).mean()
        assert abs(agree - 0.5) < 4 * 0.5 / np.sqrt(len(IDS))
    assert np.frombuffer(np.packbits(flips[:64]).tobytes(), ">u8")[0] == GOLDEN_FLIPS


def test_a_generator_starts_afresh_for_each_image() -> None:
    random = SampleRandom(3, 5)
    forward = {i: random.generator(i).random(5).tolist() for i in IDS[:20]}
    for i in reversed(IDS[:20]):
        generator = random.generator(i)
        assert generator.random(5).tolist() == forward[i]
        generator.integers(0, 100, 3, dtype=np.uint32)  # leaves half a word, which must not reach the next image
    philox = np.random.Philox(key=[random._base, int(id_keys([IDS[0]])[0])])
    assert np.random.Generator(philox).random(5).tolist() == forward[IDS[0]]
    assert SampleRandom(3, 6).generator(IDS[0]).random(5).tolist() != forward[IDS[0]]
    first = np.array([draws[0] for draws in forward.values()])
    assert len(set(first.tolist())) == 20


def test_mirrored_points_by_hand() -> None:
    points = np.array([[30, 50], [70, 52], [48, 70], [35, 90], [66, 91]], np.float32)
    expected = np.array([[41, 52], [81, 50], [63, 70], [45, 91], [76, 90]], np.float32)
    assert (mirror_points(points, 112) == expected).all()
    assert (mirror_points(mirror_points(points, 112), 112) == points).all()
    assert (mirror_points(np.stack([points] * 2), 112) == expected).all()


def test_the_mirror_moves_pixels_and_points_alike() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    points = np.array([[3, 4], [11, 5], [8, 8], [5, 12], [10, 13]], np.float32)
    for value, (x, y) in enumerate(points.astype(int), start=1):
        image[y, x] = value
    mirrored = mirror(Sample(image, points, 2, "a", False))
    assert mirrored.points is not None
    found = [int(mirrored.image[int(y), int(x), 0]) for x, y in mirrored.points]
    assert found == [2, 1, 3, 5, 4]
    assert mirrored.points[0, 0] < mirrored.points[1, 0]
    assert mirrored.flipped
    again = mirror(mirrored)
    assert (again.image == image).all()
    assert (again.points == points).all()
    assert not again.flipped
    assert mirror(Sample(image, None, 2, "a", False)).points is None


GOLDEN_FLIPS = 0xD4D7D8E14BFE1C13
