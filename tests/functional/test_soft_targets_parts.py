"""Parts of soft targets: sampled classes, and processes (threads here) that hold some of the classes each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.functional.softmax_problem import (
    Problem,
    distilled,
    emulate,
    error,
    problem,
    teacher_of,
)
from visard.functional.softmax_chunked import Part, RowBuffer, Settings

BOUNDS = {1: [0, 23], 2: [0, 9, 23], 4: [0, 11, 11, 12, 23]}


@pytest.mark.parametrize("name", ["combined", "curricularface", "magface"])
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("processes", BOUNDS)
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float64, 1.0), (torch.float64, 4.0), (torch.float32, 4.0)])
def test_shards_equal_the_whole(
    name: str, centres: int, processes: int, dtype: torch.dtype, temperature: float, chunks: Callable[[int], None]
) -> None:
    """Uneven parts, one of four empty, one of a single class; each process counts its own images' loss."""
    chunks(4)
    p = problem(images=13, centres=centres)
    teacher = teacher_of(p, name="adaface")
    ignored = torch.arange(23) % 5 == 2
    solve = functools.partial(distilled, name=name, temperature=temperature, weighted=True)
    _, exact = solve(p, teacher, whole=True, settings=Settings(ignored_C=ignored))
    bounds = BOUNDS[processes]

    def work(rank: int, add: Callable[[Tensor], Tensor], most: Callable[[Tensor], Tensor]) -> list[Tensor]:
        first, last = bounds[rank], bounds[rank + 1]
        here = (p.labels >= first) & (p.labels < last)
        part = Part(
            own_class_N=torch.where(here, p.labels - first, -1),
            images=slice(13 * rank // processes, 13 * (rank + 1) // processes),
            add=add,
            most=most,
        )
        mine = Problem(p.emb.clone(), p.weight[first:last].clone(), p.labels, p.weights)
        frozen = replace(teacher, weight=teacher.weight[first:last])
        settings = Settings(ignored_C=ignored[first:last])
        return solve(mine, frozen, settings=settings, part=part, dtype=dtype)[1]

    results = emulate(processes, work)
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    for i in range(3):
        assert error(sum(tensors[i] for tensors in results), exact[i]) < bound
    assert error(torch.cat([tensors[3] for tensors in results]), exact[3]) < bound


@pytest.mark.parametrize("processes", [1, 2])
def test_sampled_classes_are_a_problem_of_their_own(processes: int, chunks: Callable[[int], None]) -> None:
    """The teacher's distribution is that over the sampled classes; gradients add up in the hard loss's buffer."""
    chunks(4)
    p = problem(images=13)
    teacher = teacher_of(p)
    known = p.labels >= 0
    sampled = torch.unique(torch.cat([p.labels[known], torch.arange(0, 23, 4)]))
    small = Problem(p.emb, p.weight[sampled], torch.where(known, torch.searchsorted(sampled, p.labels), -1), p.weights)
    _, exact = distilled(small, replace(teacher, weight=teacher.weight[sampled]), whole=True)
    bounds = {1: [0, 23], 2: [0, 9, 23]}[processes]

    def work(
        rank: int, add: Callable[[Tensor], Tensor], most: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        first, last = bounds[rank], bounds[rank + 1]
        mine = sampled[(sampled >= first) & (sampled < last)]
        here = (p.labels >= first) & (p.labels < last)
        buffer = RowBuffer()
        part = Part(
            own_class_N=torch.where(here, torch.searchsorted(mine, p.labels), -1),
            sampled_C=mine - first,
            gradient=buffer,
            images=slice(None) if processes == 1 else slice(7 * rank, 7 + 6 * rank),
            add=add,
            most=most,
        )
        shard = Problem(p.emb.clone(), p.weight[first:last].clone(), p.labels, p.weights)
        _, tensors = distilled(shard, replace(teacher, weight=teacher.weight[first:last]), part=part)
        once = buffer.rows().clone()
        distilled(shard, replace(teacher, weight=teacher.weight[first:last]), part=part)
        torch.testing.assert_close(buffer.rows(), 2 * once)
        return tensors, once

    results = emulate(processes, work)
    for i in range(3):
        assert error(sum(tensors[i] for tensors, _ in results), exact[i]) < 1e-11
    assert error(torch.cat([rows for _, rows in results]), exact[3]) < 1e-11
