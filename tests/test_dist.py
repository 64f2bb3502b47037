"""Without a process group every collective is the identity; with two gloo processes each does what it says."""

from __future__ import annotations

import pytest
import torch

from tests.training import processes
from visard import dist

TWO = """
import torch
from visard import dist
dist.init(torch.device("cpu"))
rank = dist.rank()
assert dist.world_size() == 2 and dist.active() and dist.is_main() == (rank == 0) and dist.local_rank() == rank
value = torch.tensor([1.0 + rank, 10.0])
assert dist.all_reduce_sum(value) is value and value.tolist() == [3.0, 20.0]
assert dist.all_gather_object(f"rank {rank}") == ["rank 0", "rank 1"]
assert dist.broadcast_object({"from": rank}) == {"from": 0}
assert dist.broadcast_tensor(torch.full((2,), float(rank))).tolist() == [0.0, 0.0]
dist.barrier()
dist.init(torch.device("cpu"))  # a second time does nothing
dist.close()
assert dist.world_size() == 1 and not dist.active()
"""


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    dist.init(torch.device("cpu"))
    assert not dist.active()
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.is_main()) == (0, 1, 0, True)
    value = torch.tensor([1.0])
    assert dist.all_reduce_sum(value) is value
    assert dist.broadcast_tensor(value) is value
    assert value.item() == 1
    assert dist.all_gather_object("a") == ["a"]
    assert dist.broadcast_object("a") == "a"
    dist.barrier()
    dist.close()


def test_two_processes() -> None:
    processes.run(2, "-c", TWO)
