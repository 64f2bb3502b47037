"""Batch norm over several processes, and frozen.

In: a backbone in training. Out: running statistics that are the same on every process.

Each process normalises by the images of its own share of the step (and of the micro-batch), as arcface_torch does: k
processes x N images differ from one x kN there. The running statistics that evaluation and checkpoints use are the mean
of all processes': a joint all-reduce of a few hundred kilobytes after every step, where DDP would send rank 0's to all
before every forward pass and throw the others' away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visard import dist


@torch.no_grad()
def average_statistics(backbone: nn.Module) -> None:
    """Makes running statistics the mean over processes; frozen ones stay. Every process calls it, once a step."""
    if dist.world_size() == 1:
        return
    layers = [part for part in backbone.modules() if isinstance(part, _BatchNorm) and part.training]
    buffers = [b for layer in layers for b in layer.buffers(recurse=False) if b.is_floating_point()]
    if not buffers:
        return
    joint = torch.cat([b.reshape(-1).float() for b in buffers])
    dist.all_reduce_sum(joint).div_(dist.world_size())
    parts: list[Tensor] = [
        part.view_as(b) for b, part in zip(buffers, joint.split([b.numel() for b in buffers]), strict=True)
    ]
    torch._foreach_copy_(buffers, parts)


def train_mode(backbone: nn.Module, *, freeze_bn: bool) -> None:
    """Training mode; with `freeze_bn` batch norm uses its running statistics and leaves them as they are.

    Its weights and biases still learn. For fine-tuning in batches too small to measure statistics.
    """
    backbone.train()
    if freeze_bn:
        for part in backbone.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
