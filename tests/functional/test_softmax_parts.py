"""Parts of a margin softmax: sampled classes, micro-batches, and processes that hold some of the classes each.

The processes are threads here, their collectives a barrier; `tests/heads` has real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.functional.softmax_problem import (
    MARGINS,
    SCALE,
    Problem,
    emulate,
    error,
    problem,
    solved,
)
from visard.functional import softmax_workspace
from visard.functional.softmax import SoftmaxOutput
from visard.functional.softmax_chunked import Part, RowBuffer, Settings


@pytest.mark.parametrize("centres", [1, 2])
@pytest.mark.parametrize("name", ["combined", "curricularface"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_classes_are_a_problem_of_their_own(
    name: str, centres: int, dtype: torch.dtype, chunks: Callable[[int], None]
) -> None:
    """Only the sampled rows, in their order; labels beside the sample count as another process's."""
    chunks(4)
    p = problem(centres=centres, unlabelled=0.0)
    sampled = torch.unique(torch.cat([p.labels[:6], torch.tensor([0, 11, 22])]))
    position = torch.full((23,), -1)
    position[sampled] = torch.arange(len(sampled))
    own = position[p.labels]
    labels = torch.where(own >= 0, own, -1)
    small = Problem(p.emb, p.weight[sampled], labels, p.weights)
    ignored = torch.arange(len(sampled)) == 1
    settings = Settings(ignored_C=ignored)
    _, exact = solved(small, name, whole=True, settings=settings)
    buffer = RowBuffer()
    part = Part(own_class_N=own, sampled_C=sampled, gradient=buffer)
    _, (loss, emb_grad, none) = solved(replace(p, labels=labels), name, dtype=dtype, settings=settings, part=part)
    bound = 1e-11 if dtype == torch.float64 else 3e-6
    assert error(loss, exact[0]) < bound
    assert error(emb_grad, exact[1]) < bound
    assert error(buffer.rows(), exact[2].flatten(0, -2)) < bound
    assert not none.any()


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_buffer_adds_up_micro_batches(products: torch.dtype | None, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=12, classes=30)
    sampled = torch.unique(torch.cat([p.labels[p.labels >= 0], torch.arange(5)]))
    own = torch.where(p.labels >= 0, torch.searchsorted(sampled, p.labels), -1)
    settings = Settings(products=products)

    def filled(*batches: slice) -> Tensor:
        buffer.clear()
        for rows in batches:
            part = Part(own_class_N=own[rows], sampled_C=sampled, gradient=buffer)
            images = Problem(p.emb[rows], p.weight, p.labels[rows], p.weights[rows])
            solved(images, "combined", part=part, settings=settings)
        assert buffer.filled == len(sampled)
        return buffer.rows().clone()

    buffer = RowBuffer()
    once = filled(slice(0, 12))
    assert error(filled(slice(0, 5), slice(5, 12)), once) < (1e-11 if products is None else 2e-2)
    # Nothing is left of the steps before.
    assert torch.equal(filled(slice(0, 12)), once)


def test_new_memory_of_a_buffer_is_shown_once_before_it_is_written() -> None:
    shown: list[Tensor] = []
    buffer, like = RowBuffer(made=shown.append), torch.zeros(1, 3)
    for rows in (4, 2, 4, 7):
        buffer.clear()
        buffer.room(rows, like)[0].fill_(1.0)
    assert [len(memory) for memory in shown] == [4, 7]


def test_a_buffer_is_reused_and_grows() -> None:
    buffer = RowBuffer()
    like = torch.empty(1, 4)
    rows, adds = buffer.room(6, like)
    assert (rows.shape, adds, buffer.filled) == ((6, 4), False, 6)
    assert buffer.room(6, like)[1]
    buffer.clear()
    smaller, adds = buffer.room(3, like)
    assert (smaller.data_ptr(), len(smaller), adds) == (rows.data_ptr(), 3, False)
    buffer.clear()
    assert len(buffer.room(9, like)[0]) == 9


def test_an_empty_sample_leaves_images_without_negatives() -> None:
    """A process may have none of the sampled classes."""
    p = problem(unlabelled=0.0)
    part = Part(own_class_N=torch.full((9,), -1), sampled_C=torch.arange(0), gradient=RowBuffer())
    _, (loss, emb_grad, _) = solved(p, "combined", part=part)
    assert loss == 0
    assert not emb_grad.any()


BOUNDS = {1: [0, 23], 2: [0, 9, 23], 4: [0, 11, 11, 12, 23]}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("processes", BOUNDS)
@pytest.mark.parametrize("most_sum", [80.0, SCALE + math.log(10)])
def test_shards_equal_the_whole(
    name: str,
    centres: int,
    processes: int,
    most_sum: float,
    chunks: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uneven parts, one of four empty, one of a single class; each process counts its own images' loss. Where there is
    room for the sum of ten classes only, shares of smaller parts are taken as they are, those of larger ones not."""
    chunks(4)
    monkeypatch.setattr(softmax_workspace, "MOST_SUM", most_sum)
    p = problem(images=13, centres=centres)
    ignored = torch.arange(23) % 5 == 2
    settings = Settings(ignored_C=ignored, conflict_cos=0.8)
    truth, exact = solved(p, name, whole=True, settings=settings, weighted=True)
    bounds = BOUNDS[processes]

    def work(
        rank: int, add: Callable[[Tensor], Tensor], most: Callable[[Tensor], Tensor]
    ) -> tuple[SoftmaxOutput, list[Tensor]]:
        first, last = bounds[rank], bounds[rank + 1]
        here = (p.labels >= first) & (p.labels < last)
        part = Part(
            own_class_N=torch.where(here, p.labels - first, -1),
            images=slice(13 * rank // processes, 13 * (rank + 1) // processes),
            add=add,
            most=most,
        )
        mine = Problem(p.emb.clone(), p.weight[first:last].clone(), p.labels, p.weights)
        return solved(mine, name, settings=replace(settings, ignored_C=ignored[first:last]), weighted=True, part=part)

    results = emulate(processes, work)
    assert error(sum(tensors[0] for _, tensors in results), exact[0]) < 1e-11
    assert error(sum(tensors[1] for _, tensors in results), exact[1]) < 1e-11
    assert error(torch.cat([tensors[2] for _, tensors in results]), exact[2]) < 1e-11
    for out, _ in results:
        torch.testing.assert_close(out.cos, truth.cos, rtol=0, atol=1e-12)
        assert torch.equal(out.correct, truth.correct)
        for key, value in truth.state.items():
            torch.testing.assert_close(out.state[key], value)


def test_sampled_shards_equal_the_whole_of_the_sampled(chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=13, unlabelled=0.0)
    sampled = torch.unique(torch.cat([p.labels, torch.arange(0, 23, 4)]))
    small = Problem(p.emb, p.weight[sampled], torch.searchsorted(sampled, p.labels), p.weights)
    _, exact = solved(small, "combined", whole=True)
    bounds = [0, 9, 23]

    def work(
        rank: int, add: Callable[[Tensor], Tensor], most: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        first, last = bounds[rank], bounds[rank + 1]
        mine = sampled[(sampled >= first) & (sampled < last)]
        here = (p.labels >= first) & (p.labels < last)
        part = Part(
            own_class_N=torch.where(here, torch.searchsorted(mine, p.labels), -1),
            sampled_C=mine - first,
            gradient=RowBuffer(),
            images=slice(7 * rank, 7 + 6 * rank),
            add=add,
            most=most,
        )
        shard = Problem(p.emb.clone(), p.weight[first:last].clone(), p.labels, p.weights)
        _, tensors = solved(shard, "combined", part=part)
        assert part.gradient is not None
        return tensors, part.gradient.rows()

    results = emulate(2, work)
    assert error(sum(tensors[0] for tensors, _ in results), exact[0]) < 1e-11
    assert error(sum(tensors[1] for tensors, _ in results), exact[1]) < 1e-11
    assert error(torch.cat([rows for _, rows in results]), exact[2]) < 1e-11
