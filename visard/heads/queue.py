"""BroadFace's queue: the embeddings of past steps, and the class centres of the moment they were put in.

In: a step's embeddings and labels. Out: the same, for as many steps as there is room. All of it is state: buffers that
a checkpoint holds, equal on every process.

A ring of slots. What may not enter (unlabelled images, embeddings that are not finite) is known to the device alone, so
slots are computed there and nothing waits for it.

Letters: Q slots, N new images, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.config import QueueConfig


class EmbeddingQueue(nn.Module):
    """The last Q embeddings that were put in, oldest first out.

    Args:
        config: size Q, and whether centres are kept.
        embedding_dim: D.

    Attributes:
        embeddings: (Q, D) as they came, not normalised.
        centres: (Q, D) centres of their classes when they came; (0, D) without compensation.
        labels: (Q,) int64, -1 = empty.
        following: () int64 the slot that is written next.
        offered: () int64 images that were offered so far, at most Q: no slot beyond was ever written.
    """

    def __init__(self, config: QueueConfig, embedding_dim: int) -> None:
        super().__init__()
        self.size = config.size
        self.embeddings: Tensor
        self.centres: Tensor
        self.labels: Tensor
        self.following: Tensor
        self.offered: Tensor
        self.register_buffer("embeddings", torch.zeros(self.size, embedding_dim))
        self.register_buffer("centres", torch.zeros(self.size if config.compensation else 0, embedding_dim))
        self.register_buffer("labels", torch.full((self.size,), -1))
        self.register_buffer("following", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self._reach: int | None = None
        self.register_load_state_dict_post_hook(_forget_reach)  # type: ignore[no-untyped-call]

    @property
    def reach(self) -> int:
        """Slots from the first that may hold something. The device is asked once, after a checkpoint was loaded."""
        if self._reach is None:
            self._reach = int(self.offered.item())
        return self._reach

    @torch.no_grad()
    def put(self, emb_ND: Tensor, centre_ND: Tensor | None, labels_N: Tensor) -> None:
        """Puts in what is labelled and finite, in order; of more than Q the last.

        Args:
            emb_ND: (N, D).
            centre_ND: (N, D) centres of their classes now; None without compensation.
            labels_N: (N,) int64, -1 = unlabelled.
        """
        enters_N = (labels_N >= 0) & emb_ND.isfinite().all(1)
        place_N = enters_N.cumsum(0)
        enters_N &= place_N > place_N[-1:] - self.size
        count = enters_N.sum()
        # First those that enter, in their order; then slots are filled from the front, and the others keep theirs.
        order_n = (~enters_N).to(torch.int8).argsort(stable=True)[: self.size]
        step_n = torch.arange(len(order_n), device=emb_ND.device)
        slot_n, entered_n = (self.following + step_n) % self.size, step_n < count
        for kept, new in ((self.embeddings, emb_ND), (self.centres, centre_ND)):
            if new is not None:
                kept[slot_n] = torch.where(entered_n.unsqueeze(1), new[order_n].to(kept.dtype), kept[slot_n])
        self.labels[slot_n] = torch.where(entered_n, labels_N[order_n], self.labels[slot_n])
        self.following.copy_((self.following + count) % self.size)
        self._reach = min(self.size, self.reach + len(labels_N))
        self.offered.fill_(self._reach)


def _forget_reach(queue: nn.Module, _: object) -> None:
    assert isinstance(queue, EmbeddingQueue)
    queue._reach = None
