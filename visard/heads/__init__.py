"""Embeddings and batch -> loss. `build_head` makes the head that a configuration describes."""

from __future__ import annotations

import torch

from visard.config import HeadConfig
from visard.heads.base import Head
from visard.heads.broadface import BroadFaceHead
from visard.heads.full import FullHead
from visard.heads.sharded import ShardedHead

CLASSES = {"replicated": FullHead, "sharded": ShardedHead}


def build_head(num_classes: int, embedding_dim: int, config: HeadConfig, device: torch.device | None = None) -> Head:
    """The head that `config` describes, with new centres drawn from torch's generator.

    Args:
        num_classes: C, over all processes.
        embedding_dim: D.
        config: see `HeadConfig`.
        device: where it will run, to refuse early what cannot; None = not known.

    Raises:
        UserError: what it asks for is not there (Triton).
    """
    if config.queue.size:
        return BroadFaceHead(num_classes, embedding_dim, config, device)
    return CLASSES[config.classes](num_classes, embedding_dim, config, device)
