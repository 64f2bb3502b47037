"""Shared fixtures: one torch thread (two on a busy machine are far slower), and the real data where it is there."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

# How long an example takes says more of the machine than of the code; the whole run has a limit of its own.
hypothesis.settings.register_profile("visard", deadline=None)
hypothesis.settings.load_profile("visard")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and files beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the real data is not there ({path.name} beside the checkout)")
    return path
