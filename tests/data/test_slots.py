"""A slot is free again when the last user of its batch is gone, and never before."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from visard.config import DataConfig
from visard.data.dataset import open_dataset
from visard.data.loader import AHEAD, HELD, Loader
from visard.data.sampler import EpochSampler
from visard.data.slots import Slots


def test_a_slot_is_held_by_whatever_shows_its_memory() -> None:
    slots = Slots(2, 3, 4)
    first, second = slots.reserve(3), slots.reserve(1)
    assert {first, second} == {0, 1}
    assert slots.reserve(1) is None
    slots.rows(0, 3)[...] = 5
    batch = torch.from_numpy(slots.hand_out(0, 3))
    part = batch[1:].float()[0], batch[2]
    del batch
    gc.collect()
    assert slots.reserve(1) is None
    assert (part[1] == 5).all()
    del part
    gc.collect()
    assert slots.reserve(1) == 0


def test_what_was_reserved_in_vain_is_reclaimed_and_what_is_used_is_not() -> None:
    slots = Slots(3, 1, 2)
    assert [slots.reserve(1) for _ in range(3)] == [0, 1, 2]
    kept = slots.hand_out(1, 1)
    slots.reclaim()
    assert {slots.reserve(1), slots.reserve(1)} == {0, 2}
    assert slots.reserve(1) is None
    assert kept.shape == (1, 2, 2, 3)


def test_a_batch_that_is_too_large_has_memory_of_its_own() -> None:
    assert Slots(1, 2, 4).reserve(3) is None


@pytest.mark.parametrize("kept", [1, AHEAD + HELD + 3])
def test_batches_that_are_kept_stay_what_they_were(kept: int) -> None:
    data = open_dataset("rendered:6x4", size=32)
    in_a_thread = Loader(data, DataConfig(size=32), EpochSampler(24, 2, 0))
    plain = [b for _ in range(3) for b in in_a_thread]
    loader = Loader(data, replace(DataConfig(size=32), workers=1), EpochSampler(24, 2, 0))
    held: list[tuple[int, torch.Tensor]] = []
    for number, batch in enumerate(b for _ in range(3) for b in loader):
        held = [*held, (number, batch.images)][-kept:]
        for n, images in held:
            assert torch.equal(images, plain[n].images)
    assert number == 35


def test_iterations_that_are_left_lose_no_slot() -> None:
    data = open_dataset("rendered:6x4", size=32)
    loader = Loader(data, replace(DataConfig(size=32), workers=1), EpochSampler(24, 2, 0))
    for _ in range(AHEAD + HELD + 1):
        for _ in loader:
            break
    memory = set()
    for batch in loader:
        memory.add(batch.images.data_ptr())
    assert loader._slots is not None
    first = loader._slots.rows(0, 2).ctypes.data
    size = loader._slots.rows(0, 2).nbytes
    assert memory <= {first + k * size for k in range(AHEAD + HELD)}
