"""The kernels run on the GPU, or in Triton's interpreter where there is none; without Triton they are skipped."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Triton decides when it is imported whether to interpret.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels can run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'visard[kernels]'")
    if torch.cuda.is_available():
        return torch.device("cuda")
    from visard.kernels.softmax_triton import INTERPRETED

    if not INTERPRETED:
        pytest.skip("no CUDA device, and Triton was imported without TRITON_INTERPRET=1")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails with NumPy 2.4 and later; 3.7 does not")
    return torch.device("cpu")
