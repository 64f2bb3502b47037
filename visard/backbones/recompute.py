"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

In: a network's blocks and their input. Out: the same values, gradients and batch-norm statistics as without, to the
last bit: random numbers and autocast are those of the first pass, and what batch norm learns in the second is dropped.

With n blocks a stage, each keeping about 6 maps of the size of its input, n blocks keep in maps:
    none     6 n                    everything
    stage    1, and 6 n while a stage is computed again
    segment  n / k, and 6 k while k blocks are; least for k = sqrt(n / 6)
    block    n, and 6 while one is

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, section 4.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visard.config import Checkpointing

MAPS_A_BLOCK = 6
"""Maps of its input's size that an IResNet block keeps: both sides of two convolutions, of a PReLU and of norms."""


class Recomputing(nn.Module):
    """A network that can leave out keeping its blocks' activations.

    Attributes:
        checkpointing: what is computed again; set by `set_checkpointing`, no part of the weights.
    """

    checkpointing: Checkpointing = "none"

    def through(self, blocks: nn.Sequential | Sequence[nn.Module], x: Tensor) -> Tensor:
        """`x` through all blocks, a stage."""
        if self.checkpointing == "none" or not (self.training and torch.is_grad_enabled()):
            return blocks(x) if isinstance(blocks, nn.Sequential) else _chain(blocks, x)
        parts = list(blocks)
        size = {"stage": len(parts), "segment": segment_of(len(parts)), "block": 1}[self.checkpointing]
        for first in range(0, len(parts), max(size, 1)):
            x = recomputed(parts[first : first + size], x)
        return x


def set_checkpointing(network: nn.Module, level: Checkpointing) -> None:
    """What `network` computes again in its backward pass; "none" leaves a network as its configuration made it."""
    if level != "none":
        assert isinstance(network, Recomputing), type(network)
        network.checkpointing = level


def segment_of(blocks: int) -> int:
    """Blocks computed again together so that a stage of that many keeps least."""
    return max(1, round(math.sqrt(blocks / MAPS_A_BLOCK)))


def recomputed(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """`x` through the blocks, of which the backward pass computes everything anew from `x`."""
    result: Tensor = checkpoint(
        lambda images: _chain(blocks, images),
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _spare_buffers(blocks)),
    )
    return result


@contextlib.contextmanager
def _spare_buffers(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the blocks' buffers are copies: a second pass over a batch must not count it twice.

    Copies rather than none at all, because the second pass must save as many tensors as the first.
    """
    owners = [(part, name, b) for block in blocks for part in block.modules() for name, b in _buffers(part)]
    for part, name, buffer in owners:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in owners:
            setattr(part, name, buffer)


def _buffers(part: nn.Module) -> list[tuple[str, Tensor]]:
    return list(part.named_buffers(recurse=False))


def _chain(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
