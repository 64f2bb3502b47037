"""The plain head: every process holds all class centres, margin softmax over all of them.

In: (B, D) embeddings, a `Batch` with labels. Out: the loss and what to log.
Right up to some hundred thousand classes; the (B, C) logits and the replicated (C, D) weight are what limits it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.config import HeadConfig
from visard.functional.softmax import margin_softmax_whole
from visard.heads.base import Head
from visard.heads.margin import HeadMargin
from visard.records import Batch

INIT_STD = 0.01
"""Standard deviation of new class centres, as in arcface_torch; only their direction matters to the loss."""


class FullHead(Head):
    """Margin softmax; `weight` is (C, D), or (C, K, D) with K sub-centres a class.

    Args:
        num_classes: C.
        embedding_dim: D.
        config: margin, scale and sub-centres.
    """

    def __init__(self, num_classes: int, embedding_dim: int, config: HeadConfig) -> None:
        super().__init__()
        centres = (num_classes,) if config.subcentres == 1 else (num_classes, config.subcentres)
        self.weight = nn.Parameter(torch.empty(*centres, embedding_dim).normal_(0.0, INIT_STD))
        self.scale = config.margin.scale
        self.margin = HeadMargin(config.margin)

    def begin_step(self, images_global: int | None = None) -> None:
        """See `Head`; the margin's statistics of the step begin anew."""
        super().begin_step(images_global)
        self.margin.begin_step()

    def after_step(self) -> None:
        """See `Head`; the margin's running means go on by one step."""
        self.margin.after_step()

    def forward(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of one micro-batch.

        Args:
            embeddings: (B, D), any float type, not normalised.
            batch: with labels (B,), -1 = unlabelled.
        """
        output = margin_softmax_whole(
            embeddings,
            self.weight,
            batch.labels,
            self.margin.function,
            scale=self.scale,
            denominator=self.images_global(batch),
            state=self.margin.state(),
            total=self.margin.total,
        )
        self.margin.remember(output.state)
        labelled = (batch.labels >= 0).sum().clamp(min=1)
        logs = {
            "cos_target": output.cos.sum() / labelled,
            "accuracy": output.correct.sum() / labelled,
            "embedding_norm": embeddings.detach().float().norm(dim=1).mean(),
        }
        return output.loss, logs
