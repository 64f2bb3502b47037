"""Several processes train one model: each sees its share of the global batch, gradients are summed.

In: a backbone and a head. Out: the backbone to call, and summed gradients. Without a process group nothing is changed.

The loss is every process's share of the mean over the global batch, so the sum of the shares' gradients is the gradient
of the mean. DistributedDataParallel divides by the number of processes; its communication hook is replaced by one that
does not.

Buffers are rank 0's at the start; see `batch_norm.py` for what becomes of running statistics.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with its own types.
import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visard import dist
from visard.heads.base import Head


def distribute(backbone: nn.Module, head: Head, device: torch.device) -> nn.Module:
    """The backbone to call in training: wrapped so that backward sums its gradients over processes.

    All processes start from rank 0's weights, of the backbone and of the head.
    """
    if dist.world_size() == 1:
        return backbone
    for parameter in head.replicated_parameters():
        dist.broadcast_tensor(parameter.data)
    for buffer in backbone.buffers():
        dist.broadcast_tensor(buffer)
    wrapped = DistributedDataParallel(
        backbone,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, _sum_over_processes)
    return wrapped


def sum_head_gradients(head: Head) -> None:
    """The gradients of the head's replicated parameters: the sum over processes, on every process."""
    if dist.world_size() == 1:
        return
    for parameter in head.replicated_parameters():
        if parameter.grad is not None:
            dist.all_reduce_sum(parameter.grad)


def _sum_over_processes(state: None, bucket: td.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook for a bucket of gradients: summed over all processes, not averaged."""
    work = td.all_reduce(bucket.buffer(), op=td.ReduceOp.SUM, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
