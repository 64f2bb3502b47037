"""The plain head: every process holds all class centres and its own images, margin softmax over all of them.

In: (B, D) embeddings, a `Batch` with labels. Out: the loss and what to log.
Right up to some ten thousand classes: beyond, the replicated (C, D) weight, its gradient's sum over processes and its
momentum are what limits it, and `sharded.py` is the way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.config import HeadConfig
from visard.functional.softmax_chunked import margin_softmax
from visard.heads.base import Head
from visard.heads.centres import draw_seed, new_centres
from visard.heads.margin import HeadMargin
from visard.heads.softmax import against_teacher, means_of, settings_of
from visard.records import Batch


class FullHead(Head):
    """Margin softmax; `weight` is (C, D), or (C, K, D) with K sub-centres a class.

    Args:
        num_classes: C.
        embedding_dim: D.
        config: margin, scale and sub-centres.
        device: where it will run, to refuse early what cannot; None = not known. The centres are made on the CPU.
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, config: HeadConfig, device: torch.device | None = None
    ) -> None:
        super().__init__(num_classes)
        shape = (embedding_dim,) if config.subcentres == 1 else (config.subcentres, embedding_dim)
        self.weight = nn.Parameter(new_centres(range(num_classes), shape, draw_seed()))
        self.scale = config.margin.scale
        self.margin = HeadMargin(config.margin)
        self.settings = settings_of(config, device)

    def on_step(self, labels: Tensor | None) -> None:
        """See `Head`; the margin's statistics of the step begin anew."""
        self.margin.begin_step()

    def after_step(self) -> None:
        """See `Head`; the margin's running means go on by one step."""
        self.margin.after_step()

    def forward(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of one micro-batch.

        Args:
            embeddings: (B, D), any float type, not normalised.
            batch: with labels (B,), -1 = unlabelled; extras["margin_rad"] (B,) are margins in the place of m2.
        """
        output = margin_softmax(
            embeddings,
            self.weight,
            batch.labels,
            self.margin.of(batch.extras.get("margin_rad")),
            scale=self.scale,
            denominator=self.images_global(batch),
            state=self.margin.state(),
            total=self.margin.total,
            settings=self.settings,
        )
        self.margin.remember(output.state)
        return output.loss, means_of(output, embeddings, batch.labels, slice(0, len(batch)))

    def soft_targets(
        self, embeddings: Tensor, batch: Batch, teacher: Tensor, centres: Tensor, temperature: float, *, margins: bool
    ) -> Tensor:
        """See `Head`."""
        return against_teacher(
            embeddings,
            self.weight,
            batch.labels,
            teacher,
            centres,
            self.margin,
            self.scale,
            temperature,
            margins=margins,
            denominator=self.images_global(batch),
            settings=self.settings,
        )
