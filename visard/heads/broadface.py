"""BroadFace: class centres learn from tens of thousands of past embeddings, the network from the mini-batch alone.

In: (B, D) embeddings, a `Batch` with labels. Out: the loss and what to log.
Source: BroadFace (arXiv:2008.06674). The head is a `ShardedHead` with a queue (`queue.py`). The value is Eq. 8's, the
mean over the mini-batch X; the embeddings' gradient is that of Eq. 8, the centres' that of Eq. 9, the mean over X and
the entries E of the queue. No scalar has both gradients: the mini-batch's loss is divided by |X| + |E|, which is right
for the centres, and on its way to the embeddings the gradient is multiplied by (|X| + |E|) / |X|. A factor of the loss
multiplies both. The queue's own part is made in the backward pass of the step's first micro-batch, block of entries by
block, from shares that live no longer than their block, and with no product for the embeddings' gradient.

What the paper leaves open:
- |X| counts the images of the step over all processes, as every head's loss does, unlabelled ones too. Those do not
  enter the queue, and neither do embeddings that are not finite. A step that the optimizer skips (fp16 overflow)
  enqueues: embeddings and centres are those of the moment all the same.
- A margin's statistics (AdaFace, CurricularFace) are those of the mini-batch; entries meet the margin as the steps
  before have left it, at their own length (MagFace, AdaFace).
- Partial FC: classes of entries go before random ones where the mini-batch's classes leave places in the sample.
  Entries whose class found none are left out of the step and of |E|.

Several processes: the queue is of all images of all of them, and every process holds it whole, 2 Q D x 4 bytes (without
compensation half of it). A step sends what a sharded head's does, and of the entries target cosines, what sums are
relative to, sums and nearest cosines, Q x 4 bytes each (with a sample once more); with compensation their centres now,
Q D x 4, and those of the new entries, B W D x 4: all of them sums over processes, which send 2 (W - 1) / W times as
much. Dividing the queue would send no less: Eq. 7's result is needed everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visard import dist
from visard.config import HeadConfig
from visard.functional.broadface import add_centre_gradient, compensated
from visard.heads.queue import EmbeddingQueue
from visard.heads.sharded import Joint, ShardedHead
from visard.heads.softmax import means_of
from visard.records import Batch

BLOCK_BYTES = 1 << 27
"""Shares of a block, all kept between its two passes: half of it is hardly slower, more of it no faster."""

BLOCK_LEAST = 128
"""Entries of a block; fewer make slow products, so where the shares of so many are too large, a part is kept."""

BLOCK_MOST = 1024
"""Entries of a block whose shares are partly made twice, and of any block."""


class BroadFaceHead(ShardedHead):
    """A sharded head whose centres also learn from past embeddings.

    Args:
        num_classes: C, over all processes.
        embedding_dim: D.
        config: with a queue; without sub-centres.
        device: see `ShardedHead`.
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, config: HeadConfig, device: torch.device | None = None
    ) -> None:
        super().__init__(num_classes, embedding_dim, config, device)
        self.queue = EmbeddingQueue(config.queue, embedding_dim)
        self._new: list[Joint] = []
        self._taking_part: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_between_steps)  # type: ignore[no-untyped-call]

    def on_step(self, labels: Tensor | None) -> None:
        """See `Head`; which entries take part is found with the first micro-batch."""
        self._new, self._taking_part = [], None
        super().on_step(labels)

    def forward(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ShardedHead`; the value is Eq. 8's share of this process, the gradients are those of Eq. 8 and 9."""
        joint = self.joint(embeddings, batch)
        first = self._taking_part is None
        labels_E, entries = self._taking_part = self._taking_part or self._entries()
        images = self.images_global(batch)
        both = (entries + images).to(joint.emb_ND.dtype)
        ratio = both / images
        output = self.softmax(joint._replace(emb_ND=_GradientTimes.apply(joint.emb_ND, ratio)), both)  # type: ignore[no-untyped-call]
        loss = _ValueTimes.apply(output.loss, ratio)  # type: ignore[no-untyped-call]
        if first and len(labels_E):
            loss = _AlsoLearn.apply(loss, lambda grad: self._learn(labels_E, grad / both))  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            self._new.append(joint._replace(emb_ND=joint.emb_ND.detach()))
        logs = means_of(output, embeddings, batch.labels, joint.images)
        return loss, {**logs, "queue": entries.float()}

    def after_step(self) -> None:
        """See `Head`; the step's images enter the queue, with the centres that the update has left."""
        super().after_step()
        if self._new:
            emb_ND = _in_order([joint.emb_ND for joint in self._new])
            labels_N = _in_order([joint.labels_N for joint in self._new])
            self.queue.put(emb_ND, self._centres_of(labels_N) if self.config.queue.compensation else None, labels_N)
        self._new = []

    def also_wanted(self) -> Tensor | None:
        """See `ShardedHead`: the classes of the queue."""
        return self.queue.labels[: self.queue.reach]

    def _entries(self) -> tuple[Tensor, Tensor]:
        """(E,) labels of the entries that may take part, -1 = does not; () int64 how many do."""
        labels_E = self.queue.labels[: self.queue.reach].clone()
        if self.config.sample_rate < 1:
            # Whether a class was drawn is known to the process that has it; it says so to all others.
            drawn_E = dist.all_reduce_sum((self._positions(labels_E) >= 0).float())
            labels_E = torch.where(drawn_E > 0, labels_E, -1)
        return labels_E, (labels_E >= 0).sum()

    def _learn(self, labels_E: Tensor, factor: Tensor) -> None:
        """Adds the entries' part of Eq. 9's gradient to that of the centres, block by block."""
        queue = self.queue
        rows = self._block_rows()
        for first in range(0, len(labels_E), rows):
            block = slice(first, min(first + rows, len(labels_E)))
            emb_ED, labels_b = queue.embeddings[block], labels_E[block]
            if self.config.queue.compensation:
                emb_ED = compensated(emb_ED, queue.centres[block], self._centres_of(queue.labels[block]))
            add_centre_gradient(
                emb_ED,
                self.weight,
                labels_b,
                self.margin.function,
                scale=self.config.margin.scale,
                factor=factor,
                state=self.margin.state(),
                settings=self.settings,
                part=self.part(labels_b, slice(0, 0)),
            )

    def _block_rows(self) -> int:
        """Entries of a block, the same on all processes: so many that their shares can all be kept."""
        most = -(-self.num_classes // dist.world_size())
        itemsize = (self.settings.products or self.weight.dtype).itemsize
        rows = BLOCK_BYTES // max(most * itemsize, 1)
        return BLOCK_MOST if rows < BLOCK_LEAST or self.settings.keep is False else min(rows, BLOCK_MOST)

    def _centres_of(self, labels_N: Tensor) -> Tensor:
        """(N, D) the centres of the labels' classes now, on every process; 0 for -1."""
        row_N, here_N = self.here(labels_N)
        weight = self.weight.detach()
        centre_ND = weight.new_zeros(len(labels_N), weight.shape[1])
        if len(weight):
            torch.where(here_N.unsqueeze(1), weight[torch.where(here_N, row_N, 0)], centre_ND, out=centre_ND)
        # One process has each; the others add 0.
        return dist.all_reduce_sum(centre_ND)


def _in_order(micro_batches: list[Tensor]) -> Tensor:
    """Micro-batches of all processes -> the step's rows as one process alone would have them: by process, then by
    micro-batch, so that the queue is the same however a step is divided."""
    world = dist.world_size()
    rows = torch.stack([rows.view(world, -1, *rows.shape[1:]) for rows in micro_batches], dim=1)
    return rows.flatten(0, 2)


def _between_steps(head: nn.Module, prefix: str, keep_vars: bool) -> None:
    """What waits for `after_step` is in no buffer: a state is taken before or after a step, never within."""
    assert isinstance(head, BroadFaceHead)
    assert not head._new, "the state was asked for within a step: call after_step first"


class _ValueTimes(torch.autograd.Function):
    """loss -> loss * factor, whose gradient is that of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: Tensor) -> Tensor:
        return loss * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GradientTimes(torch.autograd.Function):
    """values -> values, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


class _AlsoLearn(torch.autograd.Function):
    """loss -> loss; its backward pass also calls `learn` with the factor that the loss was given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, learn: Callable[[Tensor], None]) -> Tensor:
        ctx.learn = learn
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.learn(grad)
        ctx.learn = None
        return grad, None
