"""Rank, world size and collectives over processes; plain identity where there is no process group.

In: torchrun's environment variables. Out: a process group on gloo (CPU) or nccl (CUDA), and the few collectives that
training needs.
Beside each collective: who combines what, over whom. Losses and gradients are summed over processes, never averaged.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Processes wait this long for one another: rank 0 alone evaluates and writes while the others stand at a barrier."""


def init(device: torch.device) -> None:
    """Joins the process group that torchrun's environment describes; nothing without it, or when already joined."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or td.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cuda = device.type == "cuda"
    td.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)


def close() -> None:
    """Leaves the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def active() -> bool:
    """Whether there is a process group."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process's number, 0 to world size - 1."""
    return td.get_rank() if active() else 0


def world_size() -> int:
    """How many processes train together."""
    return td.get_world_size() if active() else 1


def local_rank() -> int:
    """This process's number on its own machine: the index of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and returned; every process gets the same bits. No gradient."""
    if active():
        td.all_reduce(tensor, op=td.ReduceOp.SUM)
    return tensor


def all_gather_object(value: T) -> list[T]:
    """Every process's value, in rank order, on every process. Pickled: for ids and messages, not for tensors."""
    if not active():
        return [value]
    values: list[T | None] = [None] * world_size()
    td.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Rank 0's value on every process; what the others hand in is not used."""
    if not active():
        return value
    values = [value]
    td.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """Rank 0's tensor on every process, in place and returned."""
    if active():
        td.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    """Every process waits here for all others."""
    if active():
        td.barrier()
