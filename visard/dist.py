"""Rank, world size and collectives over processes; plain identity where there is no process group.

In: torchrun's environment variables. Out: a process group on gloo (CPU) or nccl (CUDA), and the few collectives that
training needs.
Beside each collective: who combines what, over whom. Losses and gradients are summed over processes, never averaged.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

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
    store, rank, count = next(iter(td.rendezvous("env://")))
    # torchrun may keep its store over a restart; under its own prefix a group does not read the addresses of dead ones.
    store = td.PrefixStore(f"visard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    td.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )


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


def restarted() -> bool:
    """Whether torchrun started this process anew because one of the group had died (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and returned; every process gets the same bits. No gradient."""
    if active():
        td.all_reduce(tensor, op=td.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest over all processes, in place and returned. No gradient."""
    if active():
        td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return tensor


def gather_rows(rows_BD: Tensor, capacity: int, fill: float = 0.0) -> Tensor:
    """(W * capacity, ...) every process's rows in rank order, each padded with `fill`; the rows have a gradient.

    The gradient of a row is summed over processes: each holds its own summand of the joint loss.

    Args:
        rows_BD: (B, ...) of this process; B may differ, and be 0.
        capacity: at least the largest B over processes, the same on all of them.
        fill: what stands in the rows beyond B.
    """
    gathered: Tensor = _GatherRows.apply(rows_BD, capacity, fill)  # type: ignore[no-untyped-call]
    return gathered


def own_rows(count: int, capacity: int) -> slice:
    """Where the first `count` rows of this process stand in what `gather_rows` gives."""
    return slice(rank() * capacity, rank() * capacity + count)


def rows_of(total: int, rank: int, world_size: int) -> range:
    """The rows of a tensor of `total` rows that a process holds: torch.chunk's shares, the last of them smaller or
    empty, as DTensor has them."""
    share = -(-total // world_size)
    return range(min(rank * share, total), min((rank + 1) * share, total))


def as_shards(local: Tensor, total: int) -> Tensor:
    """This process's rows as their part of the joint tensor of `total` rows: a DTensor over the same memory.

    For torch.distributed.checkpoint, which saves and loads such a tensor at any number of processes.
    """
    if not active():
        return local
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(local.device.type, (world_size(),))
    shape = torch.Size((total, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, capacity: int, fill: float) -> Tensor:
        assert len(rows) <= capacity, (len(rows), capacity)
        ctx.count, ctx.capacity = len(rows), capacity
        padded = rows
        if len(rows) < capacity:
            padded = rows.new_full((capacity, *rows.shape[1:]), fill)
            padded[: len(rows)] = rows
        if not active():
            return padded.clone() if padded is rows else padded
        gathered = rows.new_empty((world_size() * capacity, *rows.shape[1:]))
        # torch 2.13 renames both collectives and warns of the older names; 2.11 and 2.12 have only those.
        gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
        gather(gathered, padded.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not active():
            return grad[: ctx.count], None, None
        own = grad.new_empty((ctx.capacity, *grad.shape[1:]))
        scatter = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
        scatter(own, grad.contiguous(), op=td.ReduceOp.SUM)
        return own[: ctx.count], None, None
