"""The sampler's promises: every image once, the same steps at any number of ranks, an exact position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.config import DataConfig, Recipe, RunConfig, SamplerConfig
from visard.data.sampler import BalancedSampler, EpochSampler, IdentitySampler, build_sampler
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


SIZES = st.lists(st.integers(1, 12), min_size=4, max_size=12)
CONFIGS = st.sampled_from(
    [
        SamplerConfig(),
        SamplerConfig(kind="balanced"),
        SamplerConfig(kind="balanced", power=0.5),
        SamplerConfig(kind="identities", images_per_identity=3),
    ]
)


def labels_of(sizes: list[int], unlabelled: int = 0) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(np.concatenate([labels, np.full(unlabelled, -1)]))


def draws(sampler: EpochSampler, epoch: int) -> np.ndarray:
    return np.concatenate([sampler.batch(epoch, step) for step in range(sampler.steps)])


@settings(max_examples=80, deadline=None)
@given(config=CONFIGS, sizes=SIZES, world_size=st.integers(1, 4), seed=st.integers(0, 99), taken=st.integers(0, 9))
def test_every_kind_resumes_exactly_at_another_world_size(
    config: SamplerConfig, sizes: list[int], world_size: int, seed: int, taken: int
) -> None:
    """2N steps = N steps, saved, N more on any number of ranks, and the shares are the batch of one rank."""
    labels = labels_of(sizes, 2)
    if len(labels) < 12 + 2:
        labels = labels_of([*sizes, 12], 2)
    first = build_sampler(config, labels, 12, seed)
    whole = walk(build_sampler(config, labels, 12, seed), 2 * taken)
    assert walk(first, taken) == whole[:taken]
    ranks = [build_sampler(config, labels, 12, seed, rank, world_size) for rank in range(world_size)]
    for sampler in ranks:
        sampler.load_state_dict(first.state_dict())
    shares = [walk(sampler, taken) for sampler in ranks]
    assert [[i for share in step for i in share] for step in zip(*shares, strict=True)] == whole[taken:]
    for step in zip(*shares, strict=True):
        assert max(map(len, step)) == ranks[0].most_per_rank


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, power=st.sampled_from([0.0, 0.3, 0.5, 1.0]), seed=st.integers(0, 99))
def test_balanced_draws_keep_to_their_shares(sizes: list[int], power: float, seed: int) -> None:
    labels = labels_of(sizes, 3)
    sampler = BalancedSampler(labels, 4, seed, power=power, drop_last=False)
    share = sum(sizes) * np.array(sizes) ** power / (np.array(sizes) ** power).sum()
    drawn: list[list[int]] = [[] for _ in sizes]
    for epoch in range(5):
        images = draws(sampler, epoch)
        assert len(images) == sum(sizes)
        repeats = np.concatenate([sampler.repeats(epoch, k) for k in range(sampler.steps)])  # type: ignore[list-item]
        assert len(set(zip(images.tolist(), repeats.tolist(), strict=True))) == len(images)
        counts = np.bincount(labels[images], minlength=len(sizes))
        assert (np.abs(counts - share) < 1 + 0.01 * share).all()
        for image in images.tolist():
            drawn[labels[image]].append(image)
    for size, images_of_one in zip(sizes, drawn, strict=True):
        times = np.unique(images_of_one, return_counts=True)[1]
        assert times.max() - (times.min() if len(times) == size else 0) <= 1  # used up before it begins again
    if power == 1:
        assert sorted(draws(sampler, 0).tolist()) == np.flatnonzero(labels >= 0).tolist()


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, k=st.integers(2, 5), seed=st.integers(0, 99), world_size=st.integers(1, 2))
def test_batches_of_identities(sizes: list[int], k: int, seed: int, world_size: int) -> None:
    labels = labels_of(sizes, 3)
    p = 3
    rank = IdentitySampler(labels, p * k, seed, 0, world_size, k)
    sampler = IdentitySampler(labels, p * k, seed, images_per_identity=k)
    assert sampler.steps == max(1, sum(sizes) // (p * k))
    assert len(rank.batch(0, 0)) % k == 0
    for epoch in range(3):
        for step in range(sampler.steps):
            images, repeats = sampler.batch(epoch, step), sampler.repeats(epoch, step)
            groups = labels[images].reshape(p, k)
            assert (groups == groups[:, :1]).all()
            assert len(set(groups[:, 0].tolist())) == p
            assert repeats is not None
            assert len(set(zip(images.tolist(), repeats.tolist(), strict=True))) == p * k
            for identity, group in zip(groups[:, 0], images.reshape(p, k), strict=True):
                assert len(set(group.tolist())) == min(k, sizes[identity])


def test_small_identities_are_left_out_if_asked_for() -> None:
    labels = labels_of([1, 5, 2, 6, 7])
    sampler = IdentitySampler(labels, 6, 0, images_per_identity=2, min_images=3)
    assert {int(i) for e in range(5) for i in labels[draws(sampler, e)]} == {1, 3, 4}


def test_impossible_batches_of_identities_are_refused() -> None:
    labels = labels_of([3, 3, 3])
    for batch, world, message in ((7, 1, "no multiple of 2"), (8, 1, "only 3 have"), (4, 3, "cannot be shared by 3")):
        with pytest.raises(UserError, match=message):
            IdentitySampler(labels, batch, 0, 0, world, 2)
    with pytest.raises(UserError, match="no image has an identity"):
        BalancedSampler(np.full(5, -1), 4, 0)
    with pytest.raises(UserError, match="belongs to kind balanced"):
        SamplerConfig(power=0.5)
    with pytest.raises(UserError, match=r"run\.batch_global 10 is not"):
        Recipe(name="a", data=DataConfig(sampler=SamplerConfig(kind="identities")), run=RunConfig(batch_global=10))


def test_a_position_in_another_order_is_refused() -> None:
    labels = labels_of([3, 3, 3])
    state = BalancedSampler(labels, 4, 0).state_dict()
    for other in (EpochSampler(9, 4, 0), BalancedSampler(labels[::-1], 4, 0), BalancedSampler(labels, 4, 0, power=0.5)):
        with pytest.raises(UserError, match="draws its images"):
            other.load_state_dict(state)
    old = EpochSampler(9, 4, 0).state_dict()
    del old["order"]
    EpochSampler(9, 4, 0).load_state_dict(old)


def test_long_orders_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labels_of(list(range(1, 30)))
    whole = draws(BalancedSampler(labels, 20, 0), 2)
    monkeypatch.setattr("visard.data.draws._CHUNK", 10)
    assert (draws(BalancedSampler(labels, 20, 0), 2) == whole).all()


GOLDEN_ORDER = [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]
GOLDEN_LATER_ORDER = [9, 6, 2, 3, 8, 4, 7, 0, 5, 1]
