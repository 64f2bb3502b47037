"""What only a GPU can show of the kernels: many tiles at once, the same bits, no memory that grows with the classes."""

from __future__ import annotations

import pytest
import torch

from tests.functional.softmax_problem import problem, solved
from visard.functional.margins import plain
from visard.functional.softmax_chunked import Settings, margin_softmax
from visard.kernels import triton_pieces

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_large_problem(products: torch.dtype | None, device: torch.device) -> None:
    p = problem(1000, 100_001, 512)
    p.emb, p.weight, p.labels, p.weights = (t.to(device) for t in (p.emb, p.weight, p.labels, p.weights))
    _, exact = solved(p, "combined", whole=True)
    torch_alone = Settings(products=products, keep=False)
    ours = Settings(products=products, keep=False, pieces=triton_pieces(device))
    _, chunked = solved(p, "combined", settings=torch_alone, dtype=torch.float32)
    (_, first), (_, second) = (solved(p, "combined", settings=ours, dtype=torch.float32) for _ in range(2))
    for mine, again, theirs, right in zip(first, second, chunked, exact, strict=True):
        assert torch.equal(mine, again)
        assert (mine - right).norm() <= 3 * (theirs - right).norm() + 1e-5 * right.norm()


def test_memory_does_not_grow_with_the_classes(device: torch.device) -> None:
    extra = []
    for classes in (300_000, 600_000):
        weight = torch.randn(classes, 512, device=device).requires_grad_()
        p = problem(512, 10, 512, dtype=torch.float32)
        p.weight, p.emb, p.labels, p.weights = weight, p.emb.to(device), p.labels.to(device), p.weights.to(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        settings = Settings(products=torch.bfloat16, keep=False, pieces=triton_pieces(device))
        margin_softmax(p.emb, weight, p.labels, plain, scale=64.0, denominator=512, settings=settings).loss.backward()
        extra.append(torch.cuda.max_memory_allocated(device) - before - weight.nbytes)
        del weight, p
    assert extra[1] < 1.05 * extra[0]
    assert extra[0] < 400e6
