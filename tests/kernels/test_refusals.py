"""Asking for the kernels where they cannot run gives one clear line; Triton need not be there for these."""

from __future__ import annotations

import sys

import pytest
import torch

from visard.errors import UserError
from visard.functional.softmax_workspace import Negatives
from visard.kernels import triton_pieces


def negatives(unit_dtype: torch.dtype, products: torch.dtype, device: torch.device) -> Negatives:
    nobody = torch.full((3,), -1, device=device)
    return Negatives(
        unit_ND=torch.zeros(3, 4, dtype=unit_dtype, device=device), weight_RD=torch.zeros(5, 4, device=device),
        own_class_N=nobody, own_row_N=nobody, scale=1.0, products=products,
    )  # fmt: skip


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "visard.kernels.softmax_triton", None)
    with pytest.raises(UserError, match=r"head\.kernel.*pip install 'visard\[kernels\]'.*chunked"):
        triton_pieces()


def test_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("visard.kernels.softmax_triton", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"needs a CUDA device, not cpu.*chunked"):
        triton_pieces(torch.device("cpu"))
    n = negatives(torch.float32, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="needs a CUDA device"):
        triton_pieces().sums(n, None)


@pytest.mark.parametrize(
    ("unit", "products", "line"),
    [
        (torch.float64, torch.float64, "the embeddings are torch.float64"),
        (torch.float32, torch.float16, "not torch.float16"),
    ],
)
def test_types(unit: torch.dtype, products: torch.dtype, line: str, device: torch.device) -> None:
    with pytest.raises(UserError, match=line):
        triton_pieces(device).sums(negatives(unit, products, device), None)
