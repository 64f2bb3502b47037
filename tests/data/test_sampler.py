"""The sampler's promises: every image once, the same steps at any number of ranks, an exact position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.data.sampler import EpochSampler
from visard.errors import UserError


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(4, 200),
    batch_global=st.integers(4, 60),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_ranks_share_the_batches_of_one_rank(
    length: int, batch_global: int, world_size: int, seed: int, epoch: int
) -> None:
    alone = EpochSampler(length, batch_global, seed, drop_last=False)
    ranks = [EpochSampler(length, batch_global, seed, r, world_size, drop_last=False) for r in range(world_size)]
    seen: list[int] = []
    for step in range(alone.steps):
        shares = [rank.batch(epoch, step) for rank in ranks]
        assert np.concatenate(shares).tolist() == alone.batch(epoch, step).tolist()
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        seen += np.concatenate(shares).tolist()
    assert sorted(seen) == list(range(length))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 200), batch_global=st.integers(1, 60), seed=st.integers(0, 9))
def test_the_rest_is_left_out_unless_it_is_all_there_is(length: int, batch_global: int, seed: int) -> None:
    sampler = EpochSampler(length, batch_global, seed)
    seen = np.concatenate([sampler.batch(0, step) for step in range(sampler.steps)]).tolist()
    assert len(set(seen)) == len(seen)
    assert len(seen) == (length if length < batch_global else length // batch_global * batch_global)
    assert all(len(sampler.batch(0, k)) == min(batch_global, length) for k in range(sampler.steps))


def test_the_rest_differs_from_epoch_to_epoch() -> None:
    sampler = EpochSampler(100, 30, 0)
    rests = []
    for epoch in range(8):
        seen = {i for step in range(3) for i in sampler.batch(epoch, step).tolist()}
        rests.append(frozenset(range(100)) - seen)
    assert len(set(rests)) == 8


def test_orders_differ_by_seed_and_epoch_and_look_random() -> None:
    length = 2000
    orders = [EpochSampler(length, length, seed).batch(epoch, 0) for seed in range(3) for epoch in range(3)]
    orders.append(np.arange(length))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.1  # 4.5 standard deviations of 1 / sqrt(2000)
            assert (a == b).sum() < 10  # a random permutation has 1 fixed point on average


def test_the_order_is_the_same_for_ever() -> None:
    """A run is resumed with another numpy, on another machine."""
    assert EpochSampler(10, 10, 0).batch(0, 0).tolist() == GOLDEN_ORDER
    assert EpochSampler(10, 10, 7).batch(3, 0).tolist() == GOLDEN_LATER_ORDER


def walk(sampler: EpochSampler, steps: int) -> list[list[int]]:
    """The next steps, moving the position."""
    batches = []
    for _ in range(steps):
        batches.append(sampler.batch(sampler.epoch, sampler.step).tolist())
        sampler.advance()
    return batches


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 13])
def test_resume_is_exact_at_another_world_size(taken: int) -> None:
    whole = walk(EpochSampler(55, 11, 3), 20)
    first = EpochSampler(55, 11, 3)
    walk(first, taken)
    later = [EpochSampler(55, 11, 3, rank, 3) for rank in range(3)]
    for sampler in later:
        sampler.load_state_dict(first.state_dict())
    walks = [walk(sampler, 20 - taken) for sampler in later]
    joined = [[i for share in shares for i in share] for shares in zip(*walks, strict=True)]
    assert joined == whole[taken:]
    assert (first.epoch, first.step) == divmod(taken, 5)


def test_a_position_in_other_data_is_refused() -> None:
    state = EpochSampler(55, 11, 3).state_dict()
    for other, message in (
        (EpochSampler(54, 11, 3), "55 images, this one 54"),
        (EpochSampler(55, 10, 3), "11 images a step, this one 10"),
        (EpochSampler(55, 11, 4), "3 as seed, this one 4"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state_dict(state)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="3 images a step cannot be shared by 4 processes"):
        EpochSampler(3, 100, 0, 0, 4)
    with pytest.raises(UserError, match="2 images a step"):
        EpochSampler(100, 2, 0, 0, 4)
    with pytest.raises(UserError, match="no images"):
        EpochSampler(0, 2, 0)


GOLDEN_ORDER = [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]
GOLDEN_LATER_ORDER = [9, 6, 2, 3, 8, 4, 7, 0, 5, 1]
