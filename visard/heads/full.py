"""The plain head: every process holds all class centres, margin softmax over all of them.

In: (B, D) embeddings, a `Batch` with labels. Out: the loss and what to log.
Right up to some hundred thousand classes; the (B, C) logits and the replicated (C, D) weight are what limits it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from visard.config import HeadConfig, MarginConfig
from visard.functional import margins
from visard.functional.margins import Margin
from visard.functional.softmax import margin_softmax_whole
from visard.heads.base import Head
from visard.records import Batch

INIT_STD = 0.01
"""Standard deviation of new class centres, as in arcface_torch; only their direction matters to the loss."""


class FullHead(Head):
    """Margin softmax with one centre a class.

    Args:
        num_classes: C.
        embedding_dim: D.
        config: margin and scale.
    """

    def __init__(self, num_classes: int, embedding_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim).normal_(0.0, INIT_STD))
        self.scale = config.margin.scale
        self._margin = margin_of(config.margin)

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
            self._margin,
            scale=self.scale,
            denominator=self.images_global(batch),
        )
        labelled = (batch.labels >= 0).sum().clamp(min=1)
        logs = {
            "cos_target": output.cos.sum() / labelled,
            "accuracy": output.correct.sum() / labelled,
            "embedding_norm": embeddings.detach().float().norm(dim=1).mean(),
        }
        return output.loss, logs


def margin_of(config: MarginConfig) -> Margin:
    """The margin function that a configuration describes; one without state, so that the head has none to keep."""
    margin: Margin = functools.partial(margins.combined, m1=config.m1, m2=config.m2, m3=config.m3)
    return margins.straight_through(margin) if config.gradient == "straight-through" else margin
