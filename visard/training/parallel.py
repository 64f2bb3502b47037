"""Several processes train one model: each sees its share of the global batch, gradients are summed.

In: a backbone and a head. Out: the backbone to call, and summed gradients. Without a process group nothing is changed.

The loss is every process's share of the mean over the global batch, so the sum of the shares' gradients is the gradient
of the mean. DistributedDataParallel and FSDP divide by the number of processes; here they do not.

Whole on every process (DDP), or divided in three stages (ZeRO, arXiv:1910.02054): what the optimizer remembers
(torch's ZeroRedundancyOptimizer, see `optim.py`), the gradients too, the parameters too (FSDP2's `fully_shard`, a block
of the network at a time). All give the same gradients. Buffers are rank 0's at the start; see `batch_norm.py` for what
becomes of running statistics.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with its own types.
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from visard import dist
from visard.backbones import build
from visard.config import BackboneConfig, RunConfig
from visard.heads.base import Head

GRADIENT_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUFFERS_EACH_STEP = (
    "forward_sync_buffers"  # torch 2.13's name, which warns of the older one
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
Hook = Callable[[None, td.GradBucket], torch.futures.Future[torch.Tensor]]


def distribute(backbone: nn.Module, head: Head, device: torch.device, run: RunConfig) -> nn.Module:
    """The backbone to call in training: its backward sums gradients over processes.

    All processes start from rank 0's weights, of the backbone and of the head.

    Args:
        backbone: on `device`; from stage 2 on its parameters become DTensors.
        head: on `device`.
        device: of this process.
        run: `zero` and `gradient_dtype`.
    """
    if dist.world_size() == 1:
        return backbone
    for parameter in head.replicated_parameters():
        dist.broadcast_tensor(parameter.data)
    for buffer in backbone.buffers():
        dist.broadcast_tensor(buffer)
    dtype = GRADIENT_DTYPE[run.gradient_dtype]
    if run.zero >= 2:
        for parameter in backbone.parameters():  # DDP does so itself
            dist.broadcast_tensor(parameter.data)
        return _fully_sharded(backbone, device, dtype, keep=run.zero == 2)
    wrapped = DistributedDataParallel(
        backbone,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{BUFFERS_EACH_STEP: False},
    )
    wrapped.register_comm_hook(None, _sum_over_processes if dtype == torch.float32 else _sum_in(dtype))
    return wrapped


@contextmanager
def unsummed(model: nn.Module) -> Iterator[None]:
    """Inside, backward adds gradients up in this process alone; the first backward outside sums all of them."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def whole_backbone(backbone: nn.Module, config: BackboneConfig, device: torch.device) -> nn.Module:
    """The backbone with all of its parameters on this process: itself, or a copy where processes divide it.

    Evaluation calls it differently often on each process, which a divided network does not bear. Every process calls
    this.
    """
    if not isinstance(backbone, FSDPModule):
        return backbone
    tensors = backbone.state_dict()
    with torch.random.fork_rng(devices=[]):
        copy = build(config)
    copy.load_state_dict({name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()})
    return copy.to(device)


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


def _sum_in(dtype: torch.dtype) -> Hook:
    """The same with half as many bytes: summed in `dtype`."""

    def hook(state: None, bucket: td.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        work = td.all_reduce(buffer.to(dtype), op=td.ReduceOp.SUM, async_op=True)
        return work.get_future().then(lambda future: buffer.copy_(future.value()[0]))

    return hook


def _fully_sharded(backbone: nn.Module, device: torch.device, dtype: torch.dtype, *, keep: bool) -> nn.Module:
    """FSDP2 over every block of the network's stages.

    Args:
        keep: parameters gathered for the forward pass stay until the backward pass has used them (stage 2).
    """
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    stages = [m for m in backbone.children() if isinstance(m, nn.Sequential | nn.ModuleList)]
    blocks = [block for stage in stages for block in stage if next(block.parameters(), None) is not None]
    for module in (*blocks, backbone):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
        sharded.set_gradient_divide_factor(1.0)
        # Otherwise it asks for a kind of sum that gloo does not have.
        sharded.set_force_sum_reduction_for_comms(True)
    return backbone
