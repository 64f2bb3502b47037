"""The restated arcface_torch step against its parts by hand, and against ours over some steps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "parity.py"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_restated_logits_at_a_known_angle(parity: ModuleType) -> None:
    """60 degrees from the own centre; the gradient is that of the plain cosine."""
    emb = torch.tensor([[1.0, math.sqrt(3)]], dtype=torch.float64, requires_grad=True)
    centres = torch.tensor([[5.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    logits = parity.restated_logits(emb, centres, torch.tensor([0]))
    assert logits[0].tolist() == pytest.approx([64 * math.cos(math.pi / 3 + 0.5), 64 * math.sin(math.pi / 3)])
    (ours,) = torch.autograd.grad(logits[0, 0], emb)
    (plain,) = torch.autograd.grad(64 * torch.nn.functional.normalize(emb)[0, 0], emb)
    torch.testing.assert_close(ours, plain)


def test_difference_and_table(parity: ModuleType) -> None:
    curves = {name: [2.0, 1.0] for name in (parity.RESTATED, parity.OURS, parity.ROUNDING, parity.PUBLISHED)}
    curves[parity.EXACT] = [2.0, 1.1]
    assert parity.largest_difference(curves[parity.EXACT], curves[parity.RESTATED]) == pytest.approx(0.1)
    assert "| 2 | 1.00000 | 1.00000 | 1.00000 | 1.10000 | 1.00000 |" in parity.report(curves)


@pytest.mark.slow
def test_thirty_steps_agree(parity: ModuleType) -> None:
    """Ours to 1e-3 relative; the exact gradient and the other clipping are seen to make a difference."""
    curves = parity.run(30)
    off = {name: parity.largest_difference(curve, curves[parity.RESTATED]) for name, curve in curves.items()}
    assert off[parity.OURS] <= parity.TOLERANCE
    assert off[parity.EXACT] > parity.TOLERANCE
    assert off[parity.PUBLISHED] > parity.TOLERANCE
